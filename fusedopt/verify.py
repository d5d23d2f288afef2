"""Every element of a step against the float64 textbook form."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .around import NOTHING, Around
from .backends import BACKENDS, ON_HOST, Backend, Layout
from .backends.base import Turn
from .bounded import Bounded
from .formats import PLAIN, Values, compute_dtype, least_state, subkey
from .interrupts import deferred
from .rows import Touched, selected, whole
from .rules import RULES, Rule
from .states import Stored
from .trees import Leaf

SLACK = 2.0
"""A kernel may differ from the reference by so many times the bound on its rounding: the kernel
folds constants and orders operations otherwise than the textbook, whose bound it is."""


NORM_BOUND = 1e-11
"""Of the relative difference between a norm and the reference's. A lane adds 1024 squares, and a
billion elements have 61035 segments: at most 62000 roundings, each of 1.1e-16."""


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


def compare(name: str, stored: Stored, reference: Bounded, key: int = 0) -> Worst | None:
    """The worst element of a flat array; None of an empty one. Indices are of the flat array.

    key: of the random bits with which it was stored.
    """
    got = stored.flat(stored.values)
    if got.size == 0:
        return None
    with np.errstate(all="ignore"):
        value, bound = reference.value, SLACK * reference.error
        low, high = _span(stored, value - bound, value + bound, key)
        same = (got == value) | (np.isnan(got) & (np.isnan(value) | np.isnan(low)))
        difference = np.abs(got.astype(np.float64) - value)
        # Towards each side, what the format makes of the bound there.
        bound = np.where(got > value, high - value, value - low)
        share = np.where(same | np.isinf(bound) & (bound > 0), 0.0, difference / bound)
        share = np.where(np.isnan(share) | (bound < 0), np.inf, share)
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


def _span(stored: Stored, low: np.ndarray, high: np.ndarray, key: int) -> np.ndarray:
    """What the stored format may make of the ends of intervals, of each candidate in turn."""
    if low.ndim > 1:
        pairs = zip(low, high, strict=True)
        return np.stack([_span(stored, *pair, key) for pair in pairs], axis=1)
    return np.array(stored.format.span(low, high, stored.flat_data, stored.aux, key), np.float64)


def judge(
    rule: Rule,
    before: Sequence[Values],
    after: Sequence[Stored],
    g: np.ndarray,
    hessian: np.ndarray | None,
    *,
    t: int,
    lr: float,
    keys: Sequence[int] | None = None,
    copies: Sequence[np.ndarray] = (),
    factor: float = 1.0,
    around: Around = NOTHING,
    rows: np.ndarray | None = None,
) -> list[Worst]:
    """Compares a step's parameter and states with the reference's.

    before: what they held, in the type that is computed in. after: as they are stored. keys: of
    the random bits. copies: other arrays that got the new parameter. factor: on the gradient.
    rows: what alone may have changed, if given.
    """
    dtype, order = before[0].dtype, after[0].order
    whole = rule.program.phases > 1  # a matrix, which the reference needs in its shape

    def lift(a: np.ndarray) -> Bounded:
        return Bounded.exact(a if whole else a.reshape(-1, order=order), dtype)

    old = [lift(a) for a in before]
    p, *states = old
    estimate = None if hessian is None else lift(hessian)
    new, new_states = around.reference(
        rule, p, lift(g), tuple(states), estimate, t=t, lr=lr, factor=factor
    )
    kept = (
        state.stored(least_state(dtype, stored.format.dtype))
        for state, stored in zip(new_states, after[1:], strict=True)
    )
    expected = [new, *kept]
    if rows is not None:
        untouched = np.ones(after[0].shape, bool)
        untouched[rows] = False
        flat = untouched.reshape(-1)
        expected = [e.where(flat, o) for e, o in zip(expected, old, strict=True)]
        copies, new = [copy[rows].reshape(-1) for copy in copies], new.pick(~flat)
    names = ("p", *around.states(rule), *rule.sides(after[0].shape))
    keyed = [*(keys or ()), *[0] * len(after)][: len(after)]
    targets = list(zip(names, after, expected, keyed, strict=True))
    targets += [("copy of p", Stored.plain(copy), new, 0) for copy in copies]
    worst = (
        compare(name, stored, e.flat(stored.order) if whole else e, int(subkey(key, t - 1)[0]))
        for name, stored, e, key in targets
    )
    return [w for w in worst if w is not None]


class VerifiedPlan(Turn):
    """A plan over copies, whose results are committed when all leaves pass."""

    def __init__(self, backend: Backend, layout: Layout, leaves: Sequence[Leaf]) -> None:
        super().__init__()
        self._layout, self._leaves = layout, leaves
        self._copies = replace(
            layout,
            leaves=[memory.copy() for memory in layout.leaves],
            counters=layout.counters.copy(),
            zero_grads=False,  # the caller's gradients are not zeroed before all has passed
        )
        self._plan = backend.plan(self._copies)
        copied = (a for memory in self._copies.leaves for a in memory.written)
        self.work_bytes = self._plan.work_bytes + sum(a.nbytes for a in copied)

    def step(self, grads: Any, hessian: Any, flat: bool) -> int | None:
        if not flat:  # the gradients are needed leaf by leaf
            return None
        self._check_masters()
        self.accept()
        number = self._plan.step(grads, hessian, True)
        try:
            self._check_norms(grads)
            if number == self._layout.counters[0]:  # skipped
                return number
            for k, g in enumerate(grads):
                if g is not None:
                    self._check(k, g, hessian[k] if hessian is not None else None)
        except BaseException:
            self.accept()
            raise
        with deferred():
            for live, copy in zip(self._layout.leaves, self._copies.leaves, strict=True):
                live.take(copy)
            self._layout.counters[...] = self._copies.counters
        return number

    def accept(self) -> None:
        """Takes the caller's arrays as they are now."""
        for live, copy in zip(self._layout.leaves, self._copies.leaves, strict=True):
            copy.take(live)
        self._copies.counters[...] = self._layout.counters

    def _check_masters(self) -> None:
        """The copies still hold what the last step committed."""
        for leaf, live, copy in zip(
            self._leaves, self._layout.leaves, self._copies.leaves, strict=True
        ):
            if live.extra and live.written[0].tobytes() != copy.written[0].tobytes():
                raise VerificationError(
                    f"{leaf.label}: was written since the last step, and its masters do not know;"
                    " call sync() after writing parameters"
                )

    def _check_norms(self, grads: Sequence[Any]) -> None:
        if self._layout.decide is None:
            return
        for k, g in enumerate(grads):
            total, scale = self._layout.results[k, :2]
            computed = compute_dtype(self._layout.leaves[k].caller.dtype)
            with np.errstate(all="ignore"):
                wide = np.zeros(0) if g is None else selected(g).astype(computed).astype(np.float64)
                found = np.sqrt(total) / scale if scale else 0.0
                largest = np.max(np.abs(wide), initial=0.0) or 1.0
                expected = largest * np.sqrt(np.sum((wide / largest) ** 2))
                agree = found == expected or abs(found / expected - 1) < NORM_BOUND
            if not agree and (np.isfinite(found) or np.isfinite(largest)):
                raise VerificationError(
                    f"{self._leaves[k].label}: the norm of its gradient is {found!r}, the reference"
                    f" {expected!r}"
                )

    def _check(self, k: int, g: Any, hessian: Any) -> None:
        layout = self._layout
        rule = layout.groups[layout.group_of[k]].rule
        lr, factor = (
            float(rate) for rate in layout.rates[layout.group_of[k] :: len(layout.groups)]
        )
        before = [stored.values for stored in layout.leaves[k].stored]
        after, t = self._copies.leaves[k], int(self._copies.counters[k + 1])
        shape, rows = after.parameter.shape, g.rows if isinstance(g, Touched) else None
        found = judge(
            rule, before, after.stored, whole(g, shape), whole(hessian, shape),
            t=t, lr=lr, keys=layout.keys[k], copies=after.mirrors, factor=factor,
            around=layout.around, rows=rows,
        )  # fmt: skip
        for worst in found:
            if worst.share > 1.0:
                raise VerificationError(f"{self._leaves[k].label}: {worst}, in step {t} of {rule}")


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
        for decay in ("l2", "decoupled", "decoupled_first", "independent"):
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
    """Checks rules on this machine, element by element, against the float64 reference.

    rules: names in `RULES`, by default all; each in every variant. backends, isas: by default all
    that can be used. storages: names in `STORAGES`, by default all; float32 and float64 with every
    instruction set, the others with the one in use. size: elements of each array (matrices for
    Muon: about as many). steps: more are taken where a rule has branches that begin later. The
    data span many orders of magnitude, with exact zeros, and are drawn from `seed`. Raises
    ValueError for unknown names.
    """
    from .runtime import get_isa, set_isa
    from .runtime import isas as available_isas

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
    from .optimizer import Optimizer  # which uses this module

    rng = np.random.default_rng(seed)
    side = max(2, int(size**0.5))
    shape = (side, max(2, size // side)) if rule.program.phases > 1 else (size,)
    name, options = STORAGES[way]
    dtype = PLAIN[name].dtype

    def draw() -> np.ndarray:
        wide = rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 2, shape)
        return np.where(rng.random(shape) < 0.03, 0.0, wide).astype(dtype)

    p = draw()
    optimizer = Optimizer(p, rule, backend=backend, **options)
    memory, keys = optimizer.memory("params")
    for t in range(1, max(steps, rule.branches) + 1):
        g, h = draw(), draw() if rule.takes_hessian else None
        before = [stored.values for stored in memory.stored]
        optimizer.step(g, hessian=h)
        yield from judge(rule, before, memory.stored, g, h, t=t, lr=rule.lr_at(t), keys=keys)
