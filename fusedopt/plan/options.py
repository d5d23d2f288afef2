"""The keyword arguments of an optimizer, and which values they take."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from ..arrays.formats import FLOAT64
from ..arrays.storage import Master, Rounding, StateDtype, Storage
from ..rules.hyperparameters import Schedule
from ..system.threads import check_threads
from .extras import Extras, check_ema
from .slow_weights import Lookahead

ClipNorm = float | Mapping[str, float | None] | None


FLAGS = ("centralize", "skip_nonfinite", "zero_grads", "stats", "exact", "verify", "wait")


class Options(NamedTuple):
    """The options of an optimizer, as `Optimizer` takes them."""

    clip_norm: ClipNorm
    clip_value: float | None
    clip_leaf: float | None
    clip_adaptive: float | None
    centralize: bool
    skip_nonfinite: bool
    zero_grads: bool
    state_dtype: StateDtype
    rounding: Rounding
    master: Master | None
    copy_out: Any
    ema: float | Schedule | None
    slow_weights: Lookahead | None
    stats: bool
    exact: bool
    seed: int
    backend: str
    threads: int | None
    verify: bool
    wait: bool

    def checked(self) -> Options:
        """Raise TypeError or ValueError where a value does not fit."""
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.clip_norm is not None and self.clip_value is not None:
            raise ValueError("clip_norm, clip_value: give one of them")
        if isinstance(self.clip_norm, Mapping):
            for label, limit in self.clip_norm.items():
                if limit is not None:
                    positive(f"clip_norm[{label!r}]", limit)
        elif self.clip_norm is not None:
            positive("clip_norm", self.clip_norm)
        for name in ("clip_value", "clip_leaf", "clip_adaptive"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        if self.transforms and self.exact:
            raise ValueError(
                "clip_leaf, clip_adaptive, centralize: take no gradients of some rows, which exact"
                " is for; leave out exact"
            )
        if self.ema is not None and not callable(self.ema):
            check_ema("ema", self.ema)
        slow = self.slow_weights
        if slow is not None:
            if not isinstance(slow, Lookahead):
                raise TypeError(
                    f"slow_weights: expected fo.Lookahead(k=5, alpha=0.5), got {slow!r}"
                )
            if slow.reset and self.rounding == "stochastic":
                raise ValueError(
                    "slow_weights, rounding: with reset=True random bits would repeat; leave out"
                    " one of reset and 'stochastic'"
                )
            if slow.reset and not self.wait:
                raise ValueError(
                    "slow_weights, wait: reset=True has to know whether a step was taken; leave one"
                    " of them out"
                )
            if self.exact:
                raise ValueError(
                    "slow_weights, exact: parameters with slow weights take no gradients of some"
                    " rows; leave out exact"
                )
        check_seed(self.seed)
        threads = None if self.threads is None else check_threads("threads", self.threads)
        return self._replace(threads=threads)

    def storage(self) -> Storage:
        """Return how parameters and states are stored."""
        return Storage(self.state_dtype, self.master, self.rounding)

    def clip_by_group(self, labels: Sequence[str]) -> float | dict[str, float | None] | None:
        """clip_norm; ValueError where its labels are not the groups'."""
        if not isinstance(self.clip_norm, Mapping):
            return None if self.clip_norm is None else float(self.clip_norm)
        if set(self.clip_norm) != set(labels):
            raise ValueError(
                f"clip_norm: expected a number, or a mapping with one or None for each of"
                f" {list(labels)}; got {dict(self.clip_norm)!r}"
            )
        return {k: None if x is None else float(x) for k, x in self.clip_norm.items()}

    @property
    def transforms(self) -> bool:
        """Whether gradients are transformed leaf by leaf before anything else."""
        clips = self.clip_leaf is not None or self.clip_adaptive is not None
        return clips or self.centralize

    def decides(self, wide: bool) -> bool:
        """Return whether gradients are read before the step.

        wide: whether some leaf is float64, whose squares may leave the range and be wanted again.
        """
        return self.clip_norm is not None or self.skip_nonfinite or (self.stats and wide)

    def extras(self, wide: bool) -> Extras:
        """Return what is done beside the rules."""
        clip_value = None if self.clip_value is None else float(self.clip_value)
        ema = self.ema if self.ema is None or callable(self.ema) else float(self.ema)
        return Extras(
            clip_value, ema, self.slow_weights, self.stats, self.stats and not self.decides(wide)
        )


def unsupported(what: str, remedy: str) -> str:
    """The message where arrays on a CUDA device are refused something that there is on the host.

    All that is refused so is in the table of docs/user-guide/gpu.md.
    """
    return f"{what}: is not supported by the backend 'cuda'; {remedy}"


def number(where: str, value: Any) -> float:
    """A real number; TypeError otherwise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{where}: expected a number, got {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{where}: expected a number that float64 can hold") from error


def positive(where: str, value: Any) -> float:
    """A number > 0; TypeError or ValueError otherwise."""
    if not number(where, value) > 0.0:
        raise ValueError(f"{where}: expected a number > 0, got {value!r}")
    return float(value)


def check_grad_scale(value: Any, dtype: np.dtype = FLOAT64) -> float:
    """Return a number > 0 by which gradients can be divided; TypeError or ValueError otherwise.

    dtype: the narrowest type that gradients are computed in. The factor on them is the inverse:
    where it became infinite in that type, zeros would become NaN, and where it became 0, all would
    vanish.
    """
    scale = positive("grad_scale", value)
    with np.errstate(all="ignore"):
        inverse = (1.0 / np.float64(scale)).astype(dtype)
    if not 0.0 < inverse < math.inf:
        raise ValueError(
            f"grad_scale: expected a number whose inverse is neither 0 nor infinite in"
            f" {dtype.name}, got {value!r}"
        )
    return scale


def check_seed(seed: Any) -> int:
    """An integer >= 0; TypeError or ValueError otherwise."""
    if isinstance(seed, bool) or not isinstance(seed, SupportsIndex):
        raise TypeError(f"seed: expected an integer >= 0, got {seed!r}")
    if operator.index(seed) < 0:
        raise ValueError(f"seed: expected an integer >= 0, got {seed!r}")
    return operator.index(seed)
