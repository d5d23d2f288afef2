"""The rules' own textbook forms, in float64: slow, with temporaries, and independent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..formats import compute_dtype, least_state, subkey
from ..interrupts import deferred
from ..rules import Rule
from ..states import Memory, Stored
from .base import Layout, Plan


def reference_step(
    rule: Rule,
    memory: Memory,
    g: np.ndarray,
    hessian: np.ndarray | None,
    keys: Sequence[int],
    *,
    t: int,
    lr: float,
) -> list[tuple[Stored, tuple[np.ndarray, Any]]]:
    """What is to be written, and where: the new parameter, states and copies, encoded."""
    operands = memory.operands
    p, *states = (stored.values.astype(np.float64) for stored in operands)
    dtype = compute_dtype(operands[0].format.dtype)
    with np.errstate(all="ignore"):
        new, after = rule.reference(p, g.astype(np.float64), tuple(states), t=t, lr=lr)
        if hessian is not None:
            after = rule.absorb(after, hessian.astype(np.float64))
        narrow = [np.asarray(a).astype(dtype) for a in (new, *after)]
    for stored, state in zip(operands[1:], narrow[1:], strict=True):
        state[np.abs(state) < least_state(dtype, stored.format.dtype)] = 0
    copies = [Stored.plain(copy) for copy in memory.mirrors]
    keyed = [int(subkey(key, t - 1)[0]) for key in keys] + [0] * len(copies)
    targets = zip([*operands, *copies], [*narrow, *[narrow[0]] * len(copies)], keyed, strict=True)
    return [(stored, stored.format.encode(stored.flat(a), key)) for stored, a, key in targets]


class ReferenceBackend:
    """NumPy alone."""

    name = "reference"
    native = False

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
        memory = Memory(arrays[0], dict(zip(rule.states, arrays[1:], strict=True)))
        new = reference_step(rule, memory, g, hessian, [0] * len(arrays), t=t, lr=lr)
        with deferred():
            for stored, encoded in new:
                stored.write(encoded)
        return True

    def shift(self, rule: Any, p: np.ndarray, v: np.ndarray) -> None:
        p[...] = p.astype(np.float64) - rule.momentum * v.astype(np.float64)


class ReferencePlan:
    """Computes every leaf's new arrays, then writes them all."""

    work_bytes = 0

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def step(self, grads: Any, hessian: Any, flat: bool) -> int | None:
        if not flat:  # the optimizer checks, and sees to it that this is not interrupted
            return None
        layout = self._layout
        results = {}
        for k, g in enumerate(grads):
            if g is not None:
                group = layout.groups[layout.group_of[k]]
                results[k] = reference_step(
                    group.rule,
                    layout.leaves[k],
                    g,
                    hessian[k] if hessian is not None else None,
                    layout.keys[k],
                    t=int(layout.counters[k + 1]) + 1,
                    lr=float(layout.rates[layout.group_of[k]]),
                )
        for k, new in results.items():
            for stored, encoded in new:
                stored.write(encoded)
            if layout.zero_grads:
                grads[k][...] = 0
            layout.counters[k + 1] += 1
        layout.counters[0] += 1
        return int(layout.counters[0])
