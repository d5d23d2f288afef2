"""A plan whose steps are committed only when they pass the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..arrays.formats import compute_dtype
from ..arrays.rows import UniqueRows, selected, whole
from ..arrays.trees import Leaf
from ..plan.extras import Extras
from ..plan.interface import Backend, ExclusiveUse
from ..plan.pools import Pools, together
from ..plan.spec import PlanSpec
from ..programs.arithmetic import Pooling, alone
from ..rules.groups import Group
from .judge import Worst, judge

NORM_BOUND = 1e-11
"""Bound on the relative difference between a norm and the reference's. A lane adds 1024 squares,
and a billion elements have 61035 segments: at most 62000 roundings, each of 1.1e-16."""


class VerificationError(ArithmeticError):
    """A backend's step left the bound round the reference; nothing was committed."""


class VerifiedPlan(ExclusiveUse):
    """A plan over copies, whose results are committed when all leaves pass."""

    def __init__(self, backend: Backend, spec: PlanSpec, leaves: Sequence[Leaf]) -> None:
        super().__init__()
        self._spec, self._leaves = spec, leaves
        self._copies = replace(
            spec,
            leaves=[leaf_state.copy() for leaf_state in spec.leaves],
            counters=spec.counters.copy(),
            watch=None,
            zero_grads=False,  # the caller's gradients are not zeroed before all has passed
        )
        self._plan = backend.plan(self._copies)
        copied = (a for leaf_state in self._copies.leaves for a in leaf_state.written)
        self.work_bytes = self._plan.work_bytes + sum(a.nbytes for a in copied)

    def step_leaves(self, grads: Sequence[Any], hessian: Sequence[Any] | None) -> int | None:
        self._spec.check_unmoved()
        self._check_masters()
        self.accept()
        number = self._plan.step_leaves(grads, hessian)
        try:
            self._check_norms(grads)
            if number == self._spec.counters[0]:  # skipped
                return number
            active = [k for k, g in enumerate(grads) if g is not None]

            def found(k: int, pool: Pooling = alone) -> list[Worst]:
                return self._judged(k, grads[k], hessian[k] if hessian is not None else None, pool)

            pooled = {
                k: worst
                for pool, members in Pools(self._spec).active(active)
                for k, worst in together(members, pool.rule, found).items()
            }
            for k in active:
                self._check(k, pooled[k] if k in pooled else found(k))
        except BaseException:
            self.accept()
            raise
        self._spec.check_unmoved()
        for live, copy in zip(self._spec.leaves, self._copies.leaves, strict=True):
            live.take(copy)
        self._spec.counters[...] = self._copies.counters
        return number

    def adopt(self, groups: Sequence[Group], extras: Extras) -> bool:
        """Take other rules for the groups; False if a new plan is needed."""
        if not self._plan.adopt(groups, extras):
            return False
        self._spec = replace(self._spec, groups=groups, extras=extras)
        return True

    def accept(self) -> None:
        """Take the caller's arrays as they are now."""
        for live, copy in zip(self._spec.leaves, self._copies.leaves, strict=True):
            copy.take(live)
        self._copies.counters[...] = self._spec.counters

    def _check_masters(self) -> None:
        """The copies still hold what the last step committed."""
        for leaf, live, copy in zip(
            self._leaves, self._spec.leaves, self._copies.leaves, strict=True
        ):
            if live.extra and live.written[0].tobytes() != copy.written[0].tobytes():
                raise VerificationError(
                    f"{leaf.label}: was written since the last step, and its master was not;"
                    " call sync() after writing parameters"
                )

    def _check_norms(self, grads: Sequence[Any]) -> None:
        if self._spec.decide is None:
            return
        for k, g in enumerate(grads):
            total, scale = self._spec.results[k, :2]
            computed = compute_dtype(self._spec.leaves[k].caller.dtype)
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

    def _judged(self, k: int, g: Any, hessian: Any, pool: Pooling) -> list[Worst]:
        spec = self._spec
        group = spec.group_of[k]
        rule = spec.groups[group].rule
        lr, factor = float(spec.rates[group]), float(spec.factors[group])
        before = [stored.values for stored in spec.leaves[k].stored]
        after, t = self._copies.leaves[k], int(self._copies.counters[k + 1])
        shape, rows = after.parameter.shape, g.rows if isinstance(g, UniqueRows) else None
        return judge(
            rule, before, after.stored, whole(g, shape), whole(hessian, shape),
            t=t, lr=lr, keys=spec.keys[k], copies=after.mirrors, factor=factor,
            extras=spec.extras, rows=rows, pool=pool,
        )  # fmt: skip

    def _check(self, k: int, found: Sequence[Worst]) -> None:
        rule, t = self._spec.groups[self._spec.group_of[k]].rule, self._copies.counters[k + 1]
        for worst in found:
            if worst.share > 1.0:
                raise VerificationError(f"{self._leaves[k].label}: {worst}, in step {t} of {rule}")
