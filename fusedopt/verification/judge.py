"""The comparison of a step with its reference, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays.formats import RandomKey, Values, least_state
from ..arrays.order import flattened
from ..arrays.stored import Stored
from ..plan.extras import NOTHING, Extras
from ..programs.arithmetic import Pooling, alone
from ..rules.base import Rule
from .running_error import Bounded

SLACK = 2.0
"""How many times the bound on its rounding a kernel may differ from the reference: the kernel
folds constants and orders operations otherwise than the textbook, whose bound it is."""


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
        value, bound = reference.value, SLACK * reference.error + reference.lost
        low, high = _span(stored, value - bound, value + bound, key)
        same = (got == value) | (np.isnan(got) & (np.isnan(value) | np.isnan(low)))
        difference = np.abs(got.astype(np.float64) - value)
        # The values that the format gives the bounds on each side.
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
    """Return what the stored format may make of the ends of intervals, by candidate."""
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
    keys: Sequence[RandomKey] | None = None,
    copies: Sequence[np.ndarray] = (),
    factor: float = 1.0,
    extras: Extras = NOTHING,
    rows: np.ndarray | None = None,
    pool: Pooling = alone,
) -> list[Worst]:
    """Compares a step's parameter and states with the reference's.

    before: what they held, in the type that is computed in. after: as they are stored. keys: of
    the random bits. copies: other arrays that got the new parameter. factor: on the gradient.
    rows: what alone may have changed, if given. pool: see `Rule.reference_over`.
    """
    dtype, order = before[0].dtype, after[0].order
    # Matrices, rows and columns, which the reference needs in their shape.
    shaped = rule.program.matrices or rule.program.axis is not None

    def lift(a: np.ndarray) -> Bounded:
        return Bounded.exact(a if shaped else flattened(a, order), dtype)

    def flat(a: Bounded, stored: Stored) -> Bounded:
        return a.flat(stored.order, len(stored.shape)) if shaped else a

    p, *states = [lift(a) for a in before]
    estimate = None if hessian is None else lift(hessian)
    with np.errstate(all="ignore"):  # the float64 values that rules measure may be anything
        new, new_states = extras.reference(
            rule, p, lift(g), tuple(states), estimate, t=t, lr=lr, factor=factor, pool=pool
        )
    new = flat(new, after[0])
    kept = (
        flat(state, stored).stored(least_state(dtype, stored.format.dtype))
        for state, stored in zip(new_states, after[1:], strict=True)
    )
    expected = [new, *kept]
    if rows is not None:
        touched = np.zeros(after[0].shape, bool)
        touched[rows] = True
        chosen = touched.reshape(-1)
        old = [flat(a, stored) for a, stored in zip((p, *states), after, strict=True)]
        expected = [e.where(~chosen, o) for e, o in zip(expected, old, strict=True)]
        copies, new = [copy[rows].reshape(-1) for copy in copies], new.pick(chosen)
    names = ("p", *extras.states(rule), *rule.sides(after[0].shape))
    keyed = [*(keys or ()), *[RandomKey()] * len(after)][: len(after)]
    targets = list(zip(names, after, expected, keyed, strict=True))
    targets += [("copy of p", Stored.plain(copy), new, RandomKey()) for copy in copies]
    worst = (compare(name, stored, e, key.after(t - 1)) for name, stored, e, key in targets)
    return [w for w in worst if w is not None]
