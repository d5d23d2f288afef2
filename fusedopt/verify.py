"""Every element of a step against the float64 textbook form."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .arrays import memory_order
from .backends import BACKENDS, Backend, Layout
from .bounded import Bounded
from .interrupts import deferred
from .rules import RULES, Rule
from .trees import Leaf

SLACK = 2.0
"""A kernel may differ from the reference by so many times the bound on its rounding: the kernel
folds constants and orders operations otherwise than the textbook, whose bound it is."""


class VerificationError(ArithmeticError):
    """A backend's step left the bound round the reference; nothing was committed."""


@dataclass(frozen=True)
class Worst:
    """The element of an array that came nearest to its bound, or went beyond it.

    share: its difference over the bound, at most 1 where all is well. ulps: its difference in
    units in the last place of the expected value.
    """

    array: str
    index: int
    got: float
    expected: float
    bound: float
    share: float
    ulps: float

    def __str__(self) -> str:
        return (
            f"{self.array}[{self.index}] is {self.got!r}, the reference {self.expected!r}, the"
            f" bound on their difference {self.bound:.3g}"
        )


def compare(name: str, got: np.ndarray, reference: Bounded) -> Worst | None:
    """The worst element of a flat array; None of an empty one. Indices are of the flat array."""
    if got.size == 0:
        return None
    with np.errstate(all="ignore"):
        value, bound = reference.value, SLACK * reference.error
        same = (got == value) | (np.isnan(got) & np.isnan(value))
        difference = np.abs(got.astype(np.float64) - value)
        share = np.where(same | np.isinf(bound), 0.0, difference / bound)
        share = np.where(np.isnan(share), np.inf, share)
        if share.ndim > 1:  # candidates: the nearest counts
            nearest = np.argmin(share, axis=0)[None]
            share, value, bound, difference = (
                np.take_along_axis(np.broadcast_to(a, share.shape), nearest, axis=0)[0]
                for a in (share, value, bound, difference)
            )
        k = int(np.argmax(share))
        ulp = float(np.spacing(np.abs(value[k]).astype(got.dtype)))
    return Worst(
        name,
        k,
        float(got[k]),
        float(value[k]),
        float(bound[k]),
        float(share[k]),
        float(difference[k]) / ulp if share[k] else 0.0,
    )


def judge(
    rule: Rule,
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    g: np.ndarray,
    hessian: np.ndarray | None,
    *,
    t: int,
    lr: float,
) -> list[Worst]:
    """Compares a step's parameter and states (before, after) with the reference's."""
    dtype, order = before[0].dtype, memory_order(before[0])
    whole = rule.program.phases > 1  # a matrix, which the reference needs in its shape

    def lift(a: np.ndarray) -> Bounded:
        return Bounded.exact(a if whole else a.reshape(-1, order=order), dtype)

    p, *states = (lift(a) for a in before)
    new, new_states = rule.reference(p, lift(g), tuple(states), t=t, lr=lr)
    if hessian is not None:
        new_states = rule.absorb(new_states, lift(hessian))
    expected = (new, *(state.stored() for state in new_states))
    worst = (
        compare(name, a.reshape(-1, order=order), e.flat(order) if whole else e)
        for name, a, e in zip(("p", *rule.states), after, expected, strict=True)
    )
    return [w for w in worst if w is not None]


class VerifiedPlan:
    """A plan over copies, whose results are committed when all leaves pass."""

    def __init__(self, backend: Backend, layout: Layout, leaves: Sequence[Leaf]) -> None:
        self._layout, self._leaves = layout, leaves
        copies = [tuple(np.empty_like(a) for a in arrays) for arrays in layout.arrays]
        self._copies = replace(layout, arrays=copies, counters=layout.counters.copy())
        self._plan = backend.plan(self._copies)
        self.work_bytes = self._plan.work_bytes + sum(a.nbytes for arrays in copies for a in arrays)

    def step(self, grads: Any, hessian: Any, flat: bool) -> int | None:
        if not flat:  # the gradients are needed leaf by leaf
            return None
        self._copy(self._layout, self._copies)
        number = self._plan.step(grads, hessian, True)
        for k, g in enumerate(grads):
            if g is not None:
                self._check(k, g, hessian[k] if hessian is not None else None)
        with deferred():
            self._copy(self._copies, self._layout)
        return number

    @staticmethod
    def _copy(source: Layout, target: Layout) -> None:
        for a, b in zip(source.arrays, target.arrays, strict=True):
            for x, y in zip(a, b, strict=True):
                y[...] = x
        target.counters[...] = source.counters

    def _check(self, k: int, g: np.ndarray, hessian: np.ndarray | None) -> None:
        rule = self._layout.groups[self._layout.group_of[k]].rule
        lr = float(self._layout.rates[self._layout.group_of[k]])
        before, after = self._layout.arrays[k], self._copies.arrays[k]
        t = int(self._copies.counters[k + 1])
        for worst in judge(rule, before, after, g, hessian, t=t, lr=lr):
            if worst.share > 1.0:
                raise VerificationError(f"{self._leaves[k].label}: {worst}, in step {t} of {rule}")


@dataclass(frozen=True)
class Check:
    """One rule on one backend and dtype: how many variants and elements, and the worst of them."""

    rule: str
    backend: str
    isa: str
    dtype: str
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
        for decay in ("l2", "decoupled", "decoupled_first", "independent"):
            yield cls(**example, weight_decay=0.1, decay=decay)


def verify(
    rules: Iterable[str] | None = None,
    *,
    backends: Iterable[str] | None = None,
    dtypes: Iterable[str] = ("float32", "float64"),
    isas: Iterable[str] | None = None,
    size: int = 1009,
    steps: int = 3,
    seed: int = 0,
) -> list[Check]:
    """Checks rules on this machine, element by element, against the float64 reference.

    rules: names in `RULES`, by default all; each in every variant. backends, isas: by default all
    that can be used. size: elements of each array (matrices for Muon: about as many). The data
    span many orders of magnitude, with exact zeros, and are drawn from `seed`. Raises ValueError
    for unknown names.
    """
    from .runtime import get_isa, set_isa
    from .runtime import isas as available_isas

    names = list(RULES) if rules is None else list(rules)
    for name in names:
        if name not in RULES:
            raise ValueError(f"rules: expected names of {', '.join(RULES)}; got {name!r}")
    usable = [name for name, backend in BACKENDS.items() if backend.unavailable() is None]
    chosen = list(backends) if backends is not None else usable
    levels = list(isas) if isas is not None else available_isas()
    checks = []
    before = get_isa()
    try:
        for name, backend, dtype in itertools.product(names, chosen, dtypes):
            for isa in levels if backend == "native" else ["-"]:
                if isa != "-":
                    set_isa(isa)
                checks.append(_check(name, backend, isa, dtype, size, steps, seed))
    finally:
        if before != "none":
            set_isa(before)
    return checks


def _check(
    name: str, backend: str, isa: str, dtype: str, size: int, steps: int, seed: int
) -> Check:
    worst, settings, count, elements = None, "", 0, 0
    for rule in variants(RULES[name]):
        count += 1
        for found in _run(rule, backend, np.dtype(dtype), size, steps, seed):
            elements += size
            if worst is None or found.share > worst.share:
                worst, settings = found, repr(rule)
    assert worst is not None
    return Check(name, backend, isa, dtype, count, elements, worst, settings)


def _run(
    rule: Rule, backend: str, dtype: np.dtype, size: int, steps: int, seed: int
) -> Iterator[Worst]:
    from .optimizer import Optimizer  # which uses this module

    rng = np.random.default_rng(seed)
    side = max(2, int(size**0.5))
    shape = (side, max(2, size // side)) if rule.program.phases > 1 else (size,)

    def draw() -> np.ndarray:
        wide = rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 2, shape)
        return np.where(rng.random(shape) < 0.03, 0.0, wide).astype(dtype)

    p = draw()
    optimizer = Optimizer(p, rule, backend=backend)
    live = (p, *optimizer.state["params"].values())
    for t in range(1, steps + 1):
        g, h = draw(), draw() if rule.takes_hessian else None
        before = [a.copy() for a in live]
        optimizer.step(g, hessian=h)
        yield from judge(rule, before, live, g, h, t=t, lr=rule.lr_at(t))
