"""The rules' own textbook forms, in float64: slow, with temporaries, and independent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..arrays import host
from ..arrays.formats import DTYPES, RandomKey, compute_dtype, least_state
from ..arrays.rows import UniqueRows, selected, values_of, whole
from ..arrays.stored import LeafState, Stored
from ..plan.extras import NOTHING, Extras
from ..plan.interface import ExclusiveUse, Plan
from ..plan.pools import Kept, Pools, together
from ..plan.spec import PlanSpec
from ..programs.arithmetic import Pooling, alone
from ..programs.program import narrowed
from ..rules.base import Rule
from ..rules.groups import Group


def reference_step(
    rule: Rule,
    leaf_state: LeafState,
    g: np.ndarray,
    hessian: np.ndarray | None,
    keys: Sequence[RandomKey],
    *,
    t: int,
    lr: float,
    factor: float = 1.0,
    extras: Extras = NOTHING,
    pool: Pooling = alone,
) -> tuple[list[np.ndarray], list[tuple[Stored, tuple[np.ndarray, Any]]]]:
    """The new parameter and states, in the type that is computed in; and what is to be written,
    and where: these and the copies, encoded."""
    operands = leaf_state.stored
    p, *states = (stored.values.astype(np.float64) for stored in operands)
    dtype = compute_dtype(operands[0].format.dtype)
    estimate = None if hessian is None else hessian.astype(np.float64)
    with np.errstate(all="ignore"):
        new, after = extras.reference(
            rule, p, g.astype(np.float64), tuple(states), estimate,
            t=t, lr=lr, factor=factor, pool=pool,
        )  # fmt: skip
        narrow = [np.asarray(a).astype(dtype) for a in (new, *after)]
    for stored, state in zip(operands[1:], narrow[1:], strict=True):
        state[np.abs(state) < least_state(dtype, stored.format.dtype)] = 0
    copies = [Stored.plain(copy) for copy in leaf_state.mirrors]
    plain = len(leaf_state.sides) + len(copies)
    keyed = [key.after(t - 1) for key in keys] + [0] * plain
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
    textbook = True
    takes_means = False
    update_alone = None
    device = host

    def unavailable(self) -> str | None:
        return None

    def describe(self) -> str:
        return f"NumPy {np.__version__}"

    def plan(self, spec: PlanSpec) -> Plan:
        return ReferencePlan(spec)

    def sums_of_squares(self, arrays: Sequence[Any]) -> Sequence[tuple[float, float]] | None:
        if not all(isinstance(a, np.ndarray) and a.dtype in DTYPES for a in arrays):
            return None
        return [sum_of_squares(a) for a in arrays]


class ReferencePlan(ExclusiveUse):
    """Plan that computes every leaf's new arrays and then writes them all."""

    work_bytes = 0

    def __init__(self, spec: PlanSpec) -> None:
        super().__init__()
        self._spec = spec

    def adopt(self, groups: Sequence[Group], extras: Extras) -> bool:
        """Take other rules for the groups."""
        self._spec = replace(self._spec, groups=groups, extras=extras)
        return True

    def step_leaves(self, grads: Sequence[Any], hessian: Sequence[Any] | None) -> int | None:
        spec = self._spec
        spec.results[...] = 0
        active = [k for k, g in enumerate(grads) if g is not None]
        if spec.decide is not None:
            for k in active:
                computed = compute_dtype(spec.leaves[k].caller.dtype)
                with np.errstate(all="ignore"):
                    given = selected(grads[k]).astype(computed)
                spec.results[k, :2] = sum_of_squares(given)
            if not spec.decide():
                return int(spec.counters[0])
        pools = Pools(spec)
        self._check_scalars(active, pools)

        def found(k: int, pool: Pooling = alone) -> Any:
            group, shape = spec.group_of[k], spec.leaves[k].parameter.shape
            return reference_step(
                spec.groups[group].rule,
                spec.leaves[k],
                whole(grads[k], shape),
                whole(hessian[k], shape) if hessian is not None else None,
                spec.keys[k],
                t=int(spec.counters[k + 1]) + 1,
                lr=float(spec.rates[group]),
                factor=float(spec.factors[group]),
                extras=spec.extras,
                pool=pool,
            )

        new: dict[int, Any] = {}
        kept: list[Kept] = []
        for pool, members in pools.active(active):
            new |= together(members, pool.rule, found)
            if pool.rule.kept:
                sides = new[pools.widest(members)][0][-len(pool.rule.kept) :]
                kept += pools.to_keep(pool, [float(side) for side in sides])
        new |= {k: found(k) for k in active if k not in new}
        for k in active:
            self._sum(k, grads[k], new[k][0])
        spec.check_unmoved()
        for k in active:
            rows = grads[k].rows if isinstance(grads[k], UniqueRows) else None
            for stored, encoded in new[k][1]:
                stored.write(encoded, rows)
            if spec.zero_grads:
                values_of(grads[k])[...] = 0
            spec.counters[k + 1] += 1
        pools.keep(kept)
        spec.counters[0] += 1
        return int(spec.counters[0])

    def _check_scalars(self, active: Sequence[int], pools: Pools) -> None:
        """Refuse numbers that the other backends refuse."""
        spec = self._spec
        types = [compute_dtype(leaf.caller.dtype) for leaf in spec.leaves]
        kinds = {(spec.group_of[k], int(spec.counters[k + 1]) + 1, types[k]) for k in active}
        for g, t, dtype in kinds:
            lr, program = float(spec.rates[g]), pools.programs[g]
            for op in program.operations:
                narrowed(program.scalars(op, t, lr, float(spec.factors[g])), dtype, op, t, lr)

    def _sum(self, k: int, g: Any, new: Sequence[np.ndarray]) -> None:
        """Fill in the sums of a leaf's program."""
        spec, leaf_state = self._spec, self._spec.leaves[k]
        if not spec.extras.stats:
            return
        rows = g.rows if isinstance(g, UniqueRows) else ...
        rule = spec.groups[spec.group_of[k]].rule
        p, *before = (stored.values.astype(np.float64)[rows] for stored in leaf_state.operands)
        after = [a.astype(np.float64)[rows] for a in new]
        t = int(spec.counters[k + 1]) + 1
        with np.errstate(all="ignore"):
            found = {
                "gradient": np.sum(selected(g).astype(np.float64) ** 2),
                "update": np.sum((after[0] - p) ** 2),
                "weight": np.sum(p**2),
                **rule.textbook_sums(before, after[1:], t=t),
            }
        sums = spec.extras.program(rule).told
        spec.results[k, 1] = spec.results[k, 1] or 1.0
        spec.results[k, 2] = p.size
        spec.results[k, 3 : 3 + len(sums)] = [found[name] for name in sums]
