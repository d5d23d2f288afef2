"""The rules' own textbook forms, in float64: slow, with temporaries, and independent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..interrupts import deferred
from ..rules import Rule
from .base import Layout, Plan


def reference_step(
    rule: Rule,
    arrays: Sequence[np.ndarray],
    g: np.ndarray,
    hessian: np.ndarray | None,
    *,
    t: int,
    lr: float,
) -> list[np.ndarray]:
    """The new parameter and states in the arrays' dtype; the arrays are left alone."""
    wide = [a.astype(np.float64) for a in (*arrays, g)]
    p, *states, gradient = wide
    with np.errstate(all="ignore"):
        new, after = rule.reference(p, gradient, tuple(states), t=t, lr=lr)
        if hessian is not None:
            after = rule.absorb(after, hessian.astype(np.float64))
        dtype = arrays[0].dtype
        narrow = [np.asarray(a).astype(dtype) for a in (new, *after)]
    for state in narrow[1:]:
        state[np.abs(state) < np.finfo(dtype).smallest_normal] = 0
    return narrow


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
        arrays: tuple[np.ndarray, ...],
        g: np.ndarray,
        hessian: np.ndarray | None,
        checked: bool,
    ) -> bool:
        if not checked:
            return False
        new = reference_step(rule, arrays, g, hessian, t=t, lr=lr)
        with deferred():
            for a, b in zip(arrays, new, strict=True):
                a[...] = b
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
                    layout.arrays[k],
                    g,
                    hessian[k] if hessian is not None else None,
                    t=int(layout.counters[k + 1]) + 1,
                    lr=float(layout.rates[layout.group_of[k]]),
                )
        for k, new in results.items():
            for a, b in zip(layout.arrays[k], new, strict=True):
                a[...] = b
            layout.counters[k + 1] += 1
        layout.counters[0] += 1
        return int(layout.counters[0])
