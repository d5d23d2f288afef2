"""What an optimizer will take of memory, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import DTYPES, memory_order
from .groups import RuleChoice, assign
from .newton_schulz import Stack, Workspace, batches
from .trees import Tree


@dataclass(frozen=True)
class Estimate:
    """Bytes of the parameters, of the states, and of work space that all leaves share."""

    parameters: int
    states: int
    work: int

    @property
    def total(self) -> int:
        return self.parameters + self.states + self.work


def estimate(params: Any, rule: RuleChoice) -> Estimate:
    """The memory of `Optimizer(params, rule)` on the native backend, in bytes.

    params: arrays nested as there, or anything with a shape and a dtype in their place. Raises
    TypeError or ValueError where the optimizer would, as far as shapes and dtypes tell.
    """
    tree = Tree(params)
    groups, group_of = assign(tree.leaves, rule)
    parameters = states = 0
    matrices: list[tuple[int, np.dtype, Stack, Any]] = []
    for leaf, k in zip(tree.leaves, group_of, strict=True):
        shape, dtype = tuple(leaf.value.shape), np.dtype(leaf.value.dtype)
        if dtype not in DTYPES:
            raise TypeError(f"{leaf.label}: expected float32 or float64, got {dtype}")
        # Of one repeated element: a shape and a dtype for the rule to judge, and no memory.
        reason = groups[k].rule.refuses(np.broadcast_to(np.zeros((), dtype), shape))
        if reason:
            raise ValueError(f"{leaf.label}: {reason}")
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        parameters += size
        states += size * len(groups[k].rule.states)
        if groups[k].rule.program.phases > 1:
            order = memory_order(leaf.value) if isinstance(leaf.value, np.ndarray) else "C"
            stack = groups[k].rule.matrices(shape)
            matrices.append((len(matrices), dtype, stack, (k, shape, order)))
    made = batches(matrices)
    work = sum(
        Workspace.bytes_for([batch.stack for batch in made if batch.dtype == dtype], dtype)
        for dtype in DTYPES
    )
    return Estimate(parameters, states, work)
