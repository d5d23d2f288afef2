"""The work between the phases of a matrix rule: matrices in a workspace, and their products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from ..arrays.formats import compute_dtype
from ..arrays.stored import Stored
from ..linalg.newton_schulz import Workspace, batches, stacks
from ..plan.spec import PlanSpec
from ..rules.groups import Group, only_numbers_differ
from ..rules.matrix import MatrixRule, Member

RESERVE = 1 << 20
"""Bytes that must be free before a step begins. What comes between its phases takes less, and could
not be undone if it failed: the parameters and states of the matrices before would be written."""


class Matrices:
    """The leaves whose rule has matrix products between its phases.

    work: of each such leaf its part of the work space that all of one dtype share. batches: of
    each the number of its batch. sided: whether any has side states.
    """

    def __init__(self, spec: PlanSpec) -> None:
        leaves, works, self._reserve = [], 1, 0
        self._spec = spec
        self.sided = any(leaf_state.sides for leaf_state in spec.leaves)
        for k, group in enumerate(spec.group_of):
            rule, p = spec.groups[group].rule, spec.leaves[k].parameter
            stack = rule.matrices(p.shape)
            if stack is not None:
                works = max(works, len(rule.works))
                self._reserve = max(self._reserve, cast(MatrixRule, rule).reserve(p.shape))
                compute = compute_dtype(p.format.dtype)
                rest = group, p.shape, p.order
                leaves.append((k, compute, rule.short_products, stack, rest))
        made = batches(leaves)
        self._workspaces = {
            dtype: Workspace(*stacks(made, dtype), dtype, works, spec.threads)
            for dtype in {batch.dtype for batch in made}
        }
        self.batches: dict[int, int] = {}
        self.work: dict[int, tuple[np.ndarray, ...]] = {}
        self._made = made
        self._works: list[list[np.ndarray]] = []
        self._fresh: dict[int, dict[str, np.ndarray]] = {}
        for number, batch in enumerate(made):
            p, count = spec.leaves[batch.members[0]].parameter, len(batch.members)
            flats = self._workspaces[batch.dtype].directions[
                : len(self._rule(batch.members[0]).works)
            ]
            self._works.append([_alike(p, count, flat) for flat in flats])
            for at, k in enumerate(batch.members):
                # With the ellipsis, a parameter without dimensions has an array too.
                own = tuple(work[at, ...] for work in self._works[-1])
                self.batches[k], self.work[k] = number, own

    def adopt(self, groups: Sequence[Group]) -> bool:
        """Take other rules for the groups; False where their matrices may be others."""
        if self.batches and not only_numbers_differ(self._spec.groups, [g.rule for g in groups]):
            return False
        self._spec = replace(self._spec, groups=groups)
        return True

    def _rule(self, k: int) -> MatrixRule:
        return cast(MatrixRule, self._spec.groups[self._spec.group_of[k]].rule)

    def _member(self, k: int) -> Member:
        sides = {name: side.data for name, side in self._spec.leaves[k].sides.items()}
        return Member(int(self._spec.counters[k + 1]) + 1, sides)

    @property
    def work_bytes(self) -> int:
        return sum(workspace.nbytes for workspace in self._workspaces.values())

    def before(self, leaves: Sequence[int]) -> None:
        """Do all that may yet fail, for the leaves that take part in a step, before it begins."""
        np.empty(RESERVE + self._reserve, np.uint8)
        with np.errstate(all="ignore"):
            self._fresh = {
                k: self._rule(k).before(*self._member(k)) for k in leaves if k in self.batches
            }

    def between(self, batch: int, phase: int, leaves: Sequence[int]) -> None:
        """Do what comes after a phase, for the leaves of a batch that take part."""
        made, active = self._made[batch], set(leaves)
        members = [self._member(k) if k in active else None for k in made.members]
        if phase == 0:
            for k, member in zip(made.members, members, strict=True):
                for name, value in self._fresh.pop(k, {}).items():
                    assert member is not None
                    with np.errstate(over="ignore"):  # of what leaves the type there are no roots
                        np.copyto(member.sides[name], value)
        with np.errstate(all="ignore"):
            workspace = self._workspaces[made.dtype]
            self._rule(made.members[0]).between(phase, self._works[batch], workspace, members)
        if self.sided and self._spec.state_file:
            self._spec.state_file.release()


def _alike(p: Stored, count: int, flat: np.ndarray) -> np.ndarray:
    """Return arrays of a parameter's shape and memory order, along a first axis, in `flat`."""
    flat = flat[: count * p.size]
    if p.order == "C":
        return flat.reshape(count, *p.shape)
    return flat.reshape(count, *p.shape[::-1]).transpose(0, *range(len(p.shape), 0, -1))
