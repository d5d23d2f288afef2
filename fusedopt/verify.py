"""Every element of a step against the float64 textbook form."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays.formats import PLAIN
from .backends import BACKENDS, ON_HOST
from .optimizer import Optimizer
from .rules import RULES, Rule
from .system.isa import get_isa, set_isa
from .system.isa import isas as available_isas
from .verification.judge import Worst, judge


@dataclass(frozen=True)
class Check:
    """One rule on one backend and storage: variants and elements checked, the worst of these."""

    rule: str
    backend: str
    isa: str
    storage: str
    variants: int
    elements: int
    worst: Worst
    settings: str

    @property
    def passed(self) -> bool:
        return self.worst.share <= 1.0


def variants(cls: type[Rule]) -> Iterator[Rule]:
    """A rule's examples, each with every form of weight decay, without any, and maximised."""
    for example in cls.examples:
        yield cls(**example, weight_decay=0.0)
        yield cls(**{**example, "maximize": True})
        scaled = ("scaled",) if cls.scales_decay else ()
        forms = ("l2", "decoupled", "decoupled_first", "cautious", "independent", *scaled)
        for decay in forms:
            yield cls(**example, weight_decay=0.1, decay=decay)


STORAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {}),
    "float64": ("float64", {}),
    "bfloat16": ("bfloat16", {"state_dtype": "bfloat16"}),
    "float16": ("float16", {"state_dtype": "float16"}),
    "stochastic": ("bfloat16", {"state_dtype": "bfloat16", "rounding": "stochastic"}),
    "kahan": ("bfloat16", {"rounding": "kahan"}),
    "split16": ("bfloat16", {"master": "split16"}),
    "masters": ("float16", {"master": "float32"}),
    "float8": ("float32", {"state_dtype": "float8"}),
    "dynamic8": ("float32", {"state_dtype": "dynamic8"}),
    "dynamic4": ("float32", {"state_dtype": "dynamic4"}),
}
"""Ways to store parameters (their dtype) and what goes with them (arguments of `Optimizer`)."""


def verify(
    rules: Iterable[str] | None = None,
    *,
    backends: Iterable[str] | None = None,
    storages: Iterable[str] | None = None,
    isas: Iterable[str] | None = None,
    size: int = 4201,
    steps: int = 3,
    seed: int = 0,
) -> list[Check]:
    """Check rules on this machine, element by element, against the float64 reference.

    Parameters
    ----------
    rules : iterable of str, optional
        Names in `RULES`, by default all. Each is checked in every variant.
    backends, isas : iterable of str, optional
        Backends and instruction sets, by default all that can be used.
    storages : iterable of str, optional
        Ways to store, names in `fusedopt.verify.STORAGES`, by default all: float32 and float64 on
        every instruction set, the others on the one in use.
    size : int, default 4201
        Number of elements of each array; matrices for Muon have about this number.
    steps : int, default 3
        Number of steps. More are taken where a rule has branches that begin later.
    seed : int, default 0
        Seed of the data, which span many orders of magnitude and have exact zeros.

    Returns
    -------
    list of Check
        One for each rule, backend, instruction set and way to store.

    Raises
    ------
    ValueError
        If a name is unknown.
    """
    names = list(RULES) if rules is None else list(rules)
    for name in names:
        if name not in RULES:
            raise ValueError(f"rules: expected names of {', '.join(RULES)}; got {name!r}")
    ways = list(STORAGES) if storages is None else list(storages)
    for way in ways:
        if way not in STORAGES:
            raise ValueError(f"storages: expected names of {', '.join(STORAGES)}; got {way!r}")
    usable = [name for name in ON_HOST if BACKENDS[name].unavailable() is None]
    chosen = list(backends) if backends is not None else usable
    levels = list(isas) if isas is not None else available_isas()
    checks = []
    before = get_isa()
    try:
        for name, backend, way in itertools.product(names, chosen, ways):
            each = levels if way in ("float32", "float64") else [before]
            for isa in each if backend == "native" else ["-"]:
                if isa != "-":
                    set_isa(isa)
                checks.append(_check(name, backend, isa, way, size, steps, seed))
    finally:
        if before != "none":
            set_isa(before)
    return checks


def _check(name: str, backend: str, isa: str, way: str, size: int, steps: int, seed: int) -> Check:
    worst, settings, count, elements = None, "", 0, 0
    for rule in variants(RULES[name]):
        count += 1
        for found in _run(rule, backend, way, size, steps, seed):
            elements += size
            if worst is None or found.share > worst.share:
                worst, settings = found, repr(rule)
    assert worst is not None
    return Check(name, backend, isa, way, count, elements, worst, settings)


def _run(rule: Rule, backend: str, way: str, size: int, steps: int, seed: int) -> Iterator[Worst]:
    rng = np.random.default_rng(seed)
    side = max(2, int(size**0.5))
    shape = (side, max(2, size // side)) if rule.program.matrices else (size,)
    name, options = STORAGES[way]
    dtype = PLAIN[name].dtype

    def draw() -> np.ndarray:
        wide = rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 2, shape)
        with np.errstate(under="ignore"):
            return np.where(rng.random(shape) < 0.03, 0.0, wide).astype(dtype)

    p = g = draw()
    optimizer = Optimizer(p, rule, backend=backend, **options)
    leaf_state, keys = optimizer.leaf_state("params")
    for t in range(1, max(steps, rule.branches) + 1):
        # What a rule keeps grows by what gradients have in common.
        g = draw() if t == 1 or not rule.kept else g
        h = draw() if rule.takes_hessian else None
        before = [stored.values for stored in leaf_state.stored]
        optimizer.step(g, hessian=h)
        yield from judge(rule, before, leaf_state.stored, g, h, t=t, lr=rule.lr_at(t), keys=keys)
