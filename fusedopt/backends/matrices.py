"""What stands between the two phases of a rule: matrices in work space, and their products."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..formats import compute_dtype
from ..newton_schulz import Workspace, batches
from ..rules import Rule
from ..states import Stored
from .base import Layout


class Matrices:
    """The leaves whose rule has two phases, and the matrix products between these.

    work: of each such leaf its part of the work space that all of one dtype share. batches: of
    each the number of its batch.
    """

    def __init__(self, layout: Layout) -> None:
        leaves = []
        for k, group in enumerate(layout.group_of):
            rule, p = layout.groups[group].rule, layout.leaves[k].parameter
            if rule.program.phases > 1:
                compute = compute_dtype(p.format.dtype)
                leaves.append((k, compute, rule.matrices(p.shape), (group, p.shape, p.order)))
        made = batches(leaves)
        self._spaces = {
            dtype: Workspace([batch.stack for batch in made if batch.dtype == dtype], dtype)
            for dtype in {batch.dtype for batch in made}
        }
        self.batches: dict[int, int] = {}
        self.work: dict[int, tuple[np.ndarray]] = {}
        self._steps: list[tuple[Rule, np.ndarray, Workspace]] = []
        for number, batch in enumerate(made):
            first = batch.members[0]
            space = self._spaces[batch.dtype]
            directions = _alike(layout.leaves[first].parameter, len(batch.members), space.direction)
            self._steps.append((layout.groups[layout.group_of[first]].rule, directions, space))
            for k, direction in zip(batch.members, directions, strict=True):
                self.batches[k], self.work[k] = number, (direction,)

    @property
    def work_bytes(self) -> int:
        return sum(space.nbytes for space in self._spaces.values())

    def between(self, batch: int, leaves: Sequence[int]) -> None:
        # Leaves of the batch that have no gradient are orthogonalised too, whatever is there.
        rule, directions, space = self._steps[batch]
        rule.between(directions, space)


def _alike(p: Stored, count: int, flat: np.ndarray) -> np.ndarray:
    """So many arrays of a parameter's shape and memory order, along a first axis, in `flat`."""
    flat = flat[: count * p.size]
    if p.order == "C":
        return flat.reshape(count, *p.shape)
    return flat.reshape(count, *p.shape[::-1]).transpose(0, *range(len(p.shape), 0, -1))
