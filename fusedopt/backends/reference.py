"""The rules' own textbook forms, in float64: slow, with temporaries, and independent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays import host
from ..arrays.formats import DTYPES, compute_dtype, least_state, subkey
from ..arrays.rows import Touched, selected, values_of, whole
from ..arrays.stored import Memory, Stored
from ..plan.extras import NOTHING, Around
from ..plan.interface import Plan, Turn
from ..plan.spec import Layout, single
from ..rules import Rule
from ..system.interrupts import deferred


def reference_step(
    rule: Rule,
    memory: Memory,
    g: np.ndarray,
    hessian: np.ndarray | None,
    keys: Sequence[int],
    *,
    t: int,
    lr: float,
    factor: float = 1.0,
    around: Around = NOTHING,
) -> tuple[list[np.ndarray], list[tuple[Stored, tuple[np.ndarray, Any]]]]:
    """The new parameter and states, in the type that is computed in; and what is to be written,
    and where: these and the copies, encoded."""
    operands = memory.stored
    p, *states = (stored.values.astype(np.float64) for stored in operands)
    dtype = compute_dtype(operands[0].format.dtype)
    estimate = None if hessian is None else hessian.astype(np.float64)
    with np.errstate(all="ignore"):
        new, after = around.reference(
            rule, p, g.astype(np.float64), tuple(states), estimate, t=t, lr=lr, factor=factor
        )
        narrow = [np.asarray(a).astype(dtype) for a in (new, *after)]
    for stored, state in zip(operands[1:], narrow[1:], strict=True):
        state[np.abs(state) < least_state(dtype, stored.format.dtype)] = 0
    copies = [Stored.plain(copy) for copy in memory.mirrors]
    plain = len(memory.sides) + len(copies)
    keyed = [int(subkey(key, t - 1)[0]) for key in keys] + [0] * plain
    targets = zip([*operands, *copies], [*narrow, *[narrow[0]] * len(copies)], keyed, strict=True)
    encoded = [(stored, stored.format.encode(stored.flat(a), key)) for stored, a, key in targets]
    return narrow, encoded


def sum_of_squares(array: np.ndarray) -> tuple[float, float]:
    """(sum, scale) as `Backend.sums_of_squares` gives them; any order of adding will do here."""
    wide = array.astype(np.float64)
    with np.errstate(all="ignore"):
        largest = float(np.max(np.abs(wide), initial=0.0))
        scale = 2.0 ** -np.clip(np.frexp(largest)[1], -1000, 1000) if array.itemsize == 8 else 1.0
        return float(np.sum((wide * scale) ** 2)), float(scale)


class ReferenceBackend:
    """NumPy alone."""

    name = "reference"
    space = host

    def unavailable(self) -> str | None:
        return None

    def describe(self) -> str:
        return f"NumPy {np.__version__}"

    def plan(self, layout: Layout) -> Plan:
        return ReferencePlan(layout)

    def update(
        self,
        rule: Rule,
        t: int,
        lr: float,
        arrays: tuple[Any, ...],
        g: np.ndarray,
        hessian: np.ndarray | None,
        checked: bool,
    ) -> bool:
        if not checked:
            return False
        layout = single(rule, rule.program, t, lr, arrays)
        (memory,), (keys,) = layout.leaves, layout.keys
        _, new = reference_step(rule, memory, g, hessian, keys, t=t, lr=lr)
        with deferred():
            for stored, encoded in new:
                stored.write(encoded)
        return True

    def sums_of_squares(self, arrays: Sequence[Any]) -> Sequence[tuple[float, float]] | None:
        if not all(isinstance(a, np.ndarray) and a.dtype in DTYPES for a in arrays):
            return None
        return [sum_of_squares(a) for a in arrays]

    def shift(self, rule: Any, p: np.ndarray, v: np.ndarray) -> None:
        p[...] = p.astype(np.float64) - rule.momentum * v.astype(np.float64)


class ReferencePlan(Turn):
    """Computes every leaf's new arrays, then writes them all."""

    work_bytes = 0

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self._layout = layout

    def step(self, grads: Any, hessian: Any, flat: bool) -> int | None:
        if not flat:  # the optimizer checks, and sees to it that this is not interrupted
            return None
        layout, groups = self._layout, len(self._layout.groups)
        layout.results[...] = 0
        active = [k for k, g in enumerate(grads) if g is not None]
        if layout.decide is not None:
            for k in active:
                computed = compute_dtype(layout.leaves[k].caller.dtype)
                with np.errstate(over="ignore"):
                    given = selected(grads[k]).astype(computed)
                layout.results[k, :2] = sum_of_squares(given)
            if not layout.decide():
                return int(layout.counters[0])
        new = {}
        for k in active:
            group, shape = layout.group_of[k], layout.leaves[k].parameter.shape
            new[k] = reference_step(
                layout.groups[group].rule,
                layout.leaves[k],
                whole(grads[k], shape),
                whole(hessian[k], shape) if hessian is not None else None,
                layout.keys[k],
                t=int(layout.counters[k + 1]) + 1,
                lr=float(layout.rates[group]),
                factor=float(layout.rates[groups + group]),
                around=layout.around,
            )
        for k in active:
            self._sum(k, grads[k], new[k][0])
        for k in active:
            rows = grads[k].rows if isinstance(grads[k], Touched) else None
            for stored, encoded in new[k][1]:
                stored.write(encoded, rows)
            if layout.zero_grads:
                values_of(grads[k])[...] = 0
            layout.counters[k + 1] += 1
        layout.counters[0] += 1
        return int(layout.counters[0])

    def _sum(self, k: int, g: Any, new: Sequence[np.ndarray]) -> None:
        """Fills in the sums of a leaf's program."""
        layout, memory = self._layout, self._layout.leaves[k]
        if not layout.around.stats:
            return
        rows = g.rows if isinstance(g, Touched) else ...
        rule = layout.groups[layout.group_of[k]].rule
        p, *before = (stored.values.astype(np.float64)[rows] for stored in memory.operands)
        after = [a.astype(np.float64)[rows] for a in new]
        t = int(layout.counters[k + 1]) + 1
        with np.errstate(all="ignore"):
            found = {
                "gradient": np.sum(selected(g).astype(np.float64) ** 2),
                "update": np.sum((after[0] - p) ** 2),
                "weight": np.sum(p**2),
                **rule.textbook_sums(before, after[1:], t=t),
            }
        sums = layout.around.program(rule).sums
        layout.results[k, 1] = layout.results[k, 1] or 1.0
        layout.results[k, 2] = p.size
        layout.results[k, 3 : 3 + len(sums)] = [found[name] for name in sums]
