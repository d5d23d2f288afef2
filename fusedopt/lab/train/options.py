"""The options of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fusedopt as fo

from ...arrays.formats import BFLOAT16, FLOAT32
from ...arrays.storage import Master, Rounding
from .recipes import ESTIMATORS, HESSIAN_EVERY, SCHEDULES, replaces_schedule

DTYPES = {"float32": FLOAT32, "bfloat16": BFLOAT16}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of `fusedopt train`.

    data: a UTF-8 text, None for the default one. rule: a name in `fo.RULES`. steps: updates.
    batch: windows per micro-batch; accumulate: micro-batches per update, whose gradients are
    averaged: the windows are those of one batch of batch * accumulate, and so are learning rate and
    losses. lr: peak learning rate, None for `recipes.peak_rate`.
    schedule: a name in `recipes.SCHEDULES`. clip: the largest norm of all gradients together, None
    for any. ema: decay of an average of the parameters, which is evaluated too, None for none.
    estimator, hessian_every: for rules that take curvature, a name in `recipes.ESTIMATORS`, and how
    many steps there are from one estimate to the next; None for "gnb" and 10. stats: whether
    these rules' statistics are taken in every step, which take time of their own (the step of the
    default model takes 0.19 instead of 0.06 ms on one core of a Zen 5).
    context, layers, heads, width, tied: sizes, see `gpt.Config`. seed: of the parameters, batches
    and sample, at least 0. out: the directory for `run.json` and `loss.png`, made if it is not
    there; both are overwritten. json: a second place for the JSON.
    checkpoint: a file that holds all the run needs to go on, written at the end and at Ctrl-C;
    checkpoint_every: the number of steps after which it is written, too. resume: such a file of an
    equal run to go on from.
    dtype: in which parameters are kept and gradients handed over, "float32" or "bfloat16"; the
    model computes in float32 all the same. state_dtype, master, rounding, backend, threads: of the
    optimizer; the threads of the model's products are NumPy's affair.
    Raises ValueError for a number out of range, a name that does not exist, or an option that the
    others leave without effect.
    """

    data: Path | None = None
    rule: str = "adamw"
    steps: int = 4000
    lr: float | None = None
    schedule: str = "cosine"
    batch: int = 8
    accumulate: int = 1
    clip: float | None = None
    ema: float | None = None
    estimator: str | None = None
    hessian_every: int | None = None
    stats: bool = True
    context: int = 64
    layers: int = 2
    heads: int = 4
    width: int = 128
    tied: bool = True
    seed: int = 0
    out: Path = Path("runs/train")
    json: Path | None = None
    checkpoint: Path | None = None
    checkpoint_every: int | None = None
    resume: Path | None = None
    dtype: str = "float32"
    state_dtype: str | None = None
    master: Master | None = None
    rounding: Rounding = "nearest"
    backend: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("rule", fo.RULES), ("schedule", SCHEDULES), ("dtype", DTYPES)):
            self._check_name(name, known)
        for name, least in (
            ("steps", 1), ("batch", 1), ("accumulate", 1), ("context", 1), ("seed", 0),
            ("hessian_every", 1), ("checkpoint_every", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if self.estimator is not None:
            self._check_name("estimator", ESTIMATORS)
        for name in ("estimator", "hessian_every"):
            if getattr(self, name) is not None and not self.takes_hessian:
                raise ValueError(f"{name}: {self.rule} takes no curvature; leave it out")
        for name, default in (("schedule", "cosine"), ("ema", None)):
            if replaces_schedule(self.rule) and getattr(self, name) != default:
                raise ValueError(
                    f"{name}: {self.rule} averages by itself, in place of a schedule; leave it out"
                )
        if self.checkpoint_every is not None and self.checkpoint is None:
            raise ValueError("checkpoint_every: there is no file for it; give checkpoint too")

    def _check_name(self, what: str, known: Any) -> None:
        if getattr(self, what) not in known:
            names = ", ".join(known)
            raise ValueError(f"{what}: expected one of {names}, got {getattr(self, what)!r}")

    @property
    def tokens(self) -> int:
        """The number of tokens of one update."""
        return self.batch * self.context * self.accumulate

    @property
    def takes_hessian(self) -> bool:
        """Whether the rule takes estimates of curvature."""
        return fo.RULES[self.rule].takes_hessian

    @property
    def curvature(self) -> str:
        """The estimator of curvature: a name in `recipes.ESTIMATORS`."""
        return self.estimator or "gnb"

    @property
    def refresh(self) -> int:
        """The number of steps from one estimate of curvature to the next."""
        return self.hessian_every or HESSIAN_EVERY

    @property
    def storage(self) -> dict[str, Any]:
        """The optimizer's keyword arguments that say how it stores and computes."""
        names = ("state_dtype", "master", "rounding", "seed", "backend", "threads")
        return {name: getattr(self, name) for name in names}

    @property
    def optimizer(self) -> dict[str, Any]:
        """Return all keyword arguments of the optimizer."""
        stats = self.stats and self.takes_hessian
        return self.storage | {"clip_norm": self.clip, "ema": self.ema, "stats": stats}
