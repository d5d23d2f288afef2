"""Gradients of micro-batches, added up until a step takes their sum."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ..arrays.formats import RandomKey
from ..arrays.rows import Rows, as_rows, joined, values_of
from ..arrays.stored import LeafState
from ..arrays.trees import Tree
from ..plan.interface import Backend
from ..plan.options import unsupported
from ..plan.spec import PlanSpec, results_for
from ..programs.arithmetic import Array
from ..programs.program import Operation
from ..rules.base import Rule
from ..rules.groups import Group
from .gradients import GradientReader


class Accumulated:
    """The gradients that `Optimizer.accumulate` added up."""

    def __repr__(self) -> str:
        return "<accumulated>"


ACCUMULATED: Any = Accumulated()
"""The accumulated gradients that `Optimizer.step` takes when it is called without any."""


@dataclass(frozen=True, kw_only=True)
class Accumulation(Rule):
    """The sum takes the parameter's place: sum := g in its first step, sum := sum + g later."""

    name: ClassVar[str] = "accumulate"

    def operations(self) -> tuple[Operation, ...]:
        def keep(t: int, lr: float) -> tuple[float]:
            return (float(t > 1),)

        return (Operation("accumulate", ("p", "g"), keep, loop="other"),)

    def reference(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        return (p + g if t > 1 else g), ()


class Accumulator:
    """Sums of gradients, in the type that each leaf is computed in.

    gradient_checks: of the parameters, which gradients may not share memory with. An empty sum is
    one whose leaf has counted no gradient; what stands in its array is of no account, so that
    emptying touches no memory. `Rows` are copied and kept until the step.
    """

    def __init__(
        self,
        backend: Backend,
        tree: Tree,
        parameters: Sequence[np.ndarray],
        leaf_states: Sequence[LeafState],
        zero_grads: bool,
        threads: int | None,
    ) -> None:
        self._sums = backend.device.blank(parameters)
        self._device = backend.device
        self._counters = np.zeros(1 + len(self._sums), np.int64)
        self._rows: dict[int, list[Rows]] = {}
        rule = Accumulation()
        self._spec = PlanSpec(
            tree=tree.spec,
            leaves=[LeafState(stored, {}) for stored in self._sums],
            groups=[Group(rule.name, rule)],
            group_of=[0] * len(self._sums),
            rates=np.zeros(1),
            factors=np.ones(1),
            counters=self._counters,
            keys=[[RandomKey()]] * len(self._sums),
            results=results_for([rule.program], len(self._sums)),
            zero_grads=zero_grads,
            threads=threads,
        )
        self._tree, self._backend = tree, backend
        self.watch(parameters, leaf_states)

    def watch(self, parameters: Sequence[np.ndarray], leaf_states: Sequence[LeafState]) -> None:
        """Note what the optimizer writes, and where."""
        written = [
            [*held.written, *stored.arrays]
            for held, stored in zip(leaf_states, self._sums, strict=True)
        ]
        gradient_checks = self._device.GradientChecks(
            [leaf.label for leaf in self._tree.leaves],
            parameters,
            written,
            [len(held.copies) for held in leaf_states],
        )
        beside = [a for held in leaf_states for a in held.written]
        self._spec = replace(self._spec, beside=beside)
        self._plan = self._backend.plan(self._spec)
        self._gradient_reader = GradientReader(
            self._tree, gradient_checks, self._device.unique_rows, self._spec, self._plan
        )

    @property
    def nbytes(self) -> int:
        """The bytes of the sums."""
        return sum(stored.nbytes for stored in self._sums)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to consume."""
        return not self._counters[0]

    def add(self, grads: Any) -> int:
        """Add a micro-batch's gradients and return how many there are now."""
        if not self._rows and not self._spec.zero_grads:
            count = self._plan.step(grads, None)
            if count is not None:
                return count
        leaves = self._gradient_reader.flatten(grads, "grads")
        some = {k: as_rows("grads", g) for k, g in enumerate(leaves)}
        rows = {k: given for k, given in some.items() if given is not None}
        if not rows:
            self._refuse_mixed([k for k, g in enumerate(leaves) if g is not None], self._rows)
            return self._add(grads)
        self._refuse_mixed(rows, np.flatnonzero(self._counters[1:]))
        taken = {k: self._gradient_reader.fit_leaf(k, "grads", given) for k, given in rows.items()}
        if self._spec.zero_grads:
            self._gradient_reader.check_exclusive(leaves, None)
        if not all(isinstance(t.values, np.ndarray) for t in taken.values()):
            raise ValueError(unsupported("accumulate(Rows)", "give them to step()"))
        kept = {k: Rows(t.rows, t.gathered) for k, t in taken.items()}
        dense = [None if k in rows else g for k, g in enumerate(leaves)]
        self._refuse_mixed([k for k, g in enumerate(dense) if g is not None], self._rows)
        count = self._add(self._tree.build(dense))
        for k, some_rows in kept.items():
            self._rows.setdefault(k, []).append(some_rows)
            if self._spec.zero_grads:
                values_of(leaves[k])[...] = 0
        return count

    def _add(self, grads: Any) -> int:
        if self._spec.zero_grads:  # only the slow way knows the parameters, which must stay
            return self._gradient_reader.explained(grads, None)
        return self._gradient_reader.step(grads, None)

    def _refuse_mixed(self, leaves: Iterable[int], others: Collection[int]) -> None:
        for k in leaves:
            if k in others:
                raise ValueError(
                    f"{self._tree.leaves[k].label}: the micro-batches of one step give either Rows"
                    " or whole gradients"
                )

    @property
    def sums(self) -> list[np.ndarray | Rows | None]:
        """The sum of each leaf; None where there was no gradient."""
        counted = zip(self._sums, self._counters[1:], strict=True)
        dense = [stored.data if count else None for stored, count in counted]
        return [joined(self._rows[k]) if k in self._rows else g for k, g in enumerate(dense)]

    def clear(self) -> None:
        """Forget the sums."""
        self._counters[:] = 0
        self._rows.clear()
