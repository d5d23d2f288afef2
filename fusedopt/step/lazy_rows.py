"""Rows that no gradient touched, and the steps that they missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..arrays.formats import compute_dtype
from ..arrays.rows import UniqueRows, check_indices
from ..arrays.trees import Tree
from ..plan.extras import Extras
from ..plan.interface import Plan
from ..plan.spec import PlanSpec
from ..rules.groups import Group

Values = tuple[Sequence[Group], Extras]
"""The groups and extras of a step, with the values that schedules gave it."""


@dataclass
class Table:
    """A leaf whose gradients were of some rows.

    current: int64, of each row the leaf's step up to which it was updated. missed: of each step
    after `start` its learning rate, the values of the other hyperparameters, and whether it came
    with a Hessian estimate.
    """

    current: np.ndarray
    start: int
    missed: list[tuple[float, Values, bool]] = field(default_factory=list)


class LazyRows:
    """Replays, for `Optimizer(exact=True)`, the steps with a gradient of zero that rows missed."""

    def __init__(self, tree: Tree, spec: PlanSpec, plan: Plan) -> None:
        self._paths = [leaf.path for leaf in tree.leaves]
        self.moved(spec, plan)
        self._tables: dict[int, Table] = {}

    def moved(self, spec: PlanSpec, plan: Plan) -> None:
        """Go on with another plan of the same leaves, or other hyperparameters."""
        self._spec, self._plan = spec, plan
        self._adopted: Values = (spec.groups, spec.extras)

    def check(self, grads: Sequence[Any]) -> None:
        """Raise ValueError where a step would touch rows that are not caught up."""
        for k, table in self._tables.items():
            if grads[k] is None:
                continue
            rows = grads[k].rows if isinstance(grads[k], UniqueRows) else slice(None)
            behind = np.flatnonzero(table.current[rows] < self._t(k))
            if behind.size:
                row = int(np.arange(table.current.size)[rows][behind[0]])
                raise ValueError(
                    f"{self._paths[k]}: row {row} has missed"
                    f" {self._t(k) - int(table.current[row])} steps; call catch_up({{"
                    f"{self._paths[k]!r}: indices}}), before the forward pass, with all rows that"
                    " will have a gradient"
                )

    def record(self, grads: Sequence[Any], hessian: Sequence[Any] | None) -> None:
        """Note a step that was taken."""
        for k, g in enumerate(grads):
            if g is None:
                continue
            t = self._t(k)
            if not isinstance(g, UniqueRows):
                self._tables.pop(k, None)
                continue
            rows = self._spec.leaves[k].caller.shape[0]
            table = self._tables.setdefault(k, Table(np.full(rows, t - 1), t - 1))
            table.current[g.rows] = t
            rate = float(self._spec.rates[self._spec.group_of[k]])
            refreshed = hessian is not None and hessian[k] is not None
            table.missed.append((rate, (self._spec.groups, self._spec.extras), refreshed))

    @property
    def behind(self) -> list[str]:
        """The paths of leaves with rows that have missed steps."""
        return [
            self._paths[k]
            for k, table in self._tables.items()
            if (table.current < self._t(k)).any()
        ]

    def catch_up(self, rows: Mapping[str, np.ndarray] | None) -> None:
        """Replays what these rows have missed; None: all rows of all leaves."""
        if rows is None:
            chosen = {k: np.arange(table.current.size) for k, table in self._tables.items()}
        else:
            chosen = {}
            for path, indices in rows.items():
                if path not in self._paths:
                    raise ValueError(
                        f"catch_up: expected paths of leaves such as {self._paths[0]!r}, got"
                        f" {path!r}"
                    )
                k = self._paths.index(path)
                shape = self._spec.leaves[k].caller.shape
                chosen[k] = np.unique(check_indices(f"catch_up[{path!r}]", indices, shape))
        for k, indices in chosen.items():
            if k in self._tables and indices.size:
                self._replay(k, indices)

    def _replay(self, k: int, rows: np.ndarray) -> None:
        spec, table, t = self._spec, self._tables[k], self._t(k)
        p = spec.leaves[k].caller
        # Two arrays: with `zero_grads` the gradient is written, and may overlap nothing.
        nothing = np.zeros((2, 1, *p.shape[1:]), compute_dtype(p.dtype))
        grads: list[Any] = [None] * len(self._paths)
        estimates = list(grads)
        counters, rates = spec.counters.copy(), spec.rates.copy()
        try:
            for step in range(int(table.current[rows].min()) + 1, t + 1):
                behind = rows[table.current[rows] < step]
                rate, values, refreshed = table.missed[step - 1 - table.start]
                self._adopt(values)
                spec.counters[k + 1] = step - 1
                spec.rates[spec.group_of[k]] = rate
                first = np.zeros(behind.size, np.int64)
                grads[k], estimates[k] = (UniqueRows(behind, first, zeros) for zeros in nothing)
                if self._plan.step_leaves(grads, estimates if refreshed else None) is None:
                    raise RuntimeError("the core refused a replay; please report this")
                table.current[behind] = step
        finally:
            self._adopt((spec.groups, spec.extras))
            spec.counters[...], spec.rates[...] = counters, rates
        if (table.current == t).all():
            del self._tables[k]

    def _adopt(self, values: Values) -> None:
        if values != self._adopted and not self._plan.adopt(*values):
            raise RuntimeError("the plan refused the hyperparameters of a step; please report this")
        self._adopted = values

    def _t(self, k: int) -> int:
        return int(self._spec.counters[k + 1])
