"""Estimate the memory of an optimizer before anything is allocated."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays.checks import EXPECTED
from .arrays.formats import DTYPES, compute_dtype
from .arrays.order import memory_order
from .arrays.storage import Master, Rounding, StateDtype, Storage
from .arrays.stored import WINDOW
from .arrays.trees import Tree
from .linalg.newton_schulz import Stack, Workspace, batches, stacks
from .plan.extras import Extras
from .plan.slow_weights import Lookahead
from .rules.groups import RuleChoice, assign, at_step
from .rules.hyperparameters import Schedule


@dataclass(frozen=True)
class Estimate:
    """Memory that an optimizer takes.

    Parameters
    ----------
    parameters : int
        Bytes of the parameters.
    states : int
        Bytes of the states in memory.
    work : int
        Bytes of the work space that all leaves share; of a `state_path` also the window of the
        file that a step has in memory.
    disk : int
        Bytes of the states in the file of a `state_path`.
    """

    parameters: int
    states: int
    work: int
    disk: int = 0

    @property
    def total(self) -> int:
        """Bytes of memory."""
        return self.parameters + self.states + self.work


def estimate(
    params: Any,
    rule: RuleChoice,
    *,
    state_dtype: StateDtype = None,
    rounding: Rounding = "nearest",
    master: Master | None = None,
    ema: float | Schedule | None = None,
    slow_weights: Lookahead | None = None,
    state_path: str | os.PathLike[str] | None = None,
) -> Estimate:
    """Estimate the memory of `Optimizer(params, rule, ...)` on the native backend.

    Parameters
    ----------
    params : nested arrays
        As for the optimizer; anything with a shape and a dtype serves in an array's place.
    rule : Rule, mapping or callable
        As for the optimizer, and so are the other arguments.
    state_dtype, rounding, master, ema, slow_weights, state_path
        As for the optimizer. With a `state_path`, which is not looked at, states are on disk.

    Returns
    -------
    Estimate
        Numbers of bytes. Masters, averages and slow weights count as states.

    Raises
    ------
    TypeError, ValueError
        If the optimizer would raise, as far as shapes and dtypes tell.
    """
    storage = Storage(state_dtype, master, rounding)
    tree = Tree(params)
    given, group_of = assign(tree.leaves, rule)
    groups = at_step(given, 1)
    parameters, states, works = 0, 0, 1
    matrices: list[tuple[int, np.dtype, bool, Stack, Any]] = []
    for leaf, k in zip(tree.leaves, group_of, strict=True):
        shape, dtype = tuple(leaf.value.shape), np.dtype(leaf.value.dtype)
        if dtype not in DTYPES:
            raise TypeError(f"{leaf.label}: expected {EXPECTED}, got {dtype}")
        # One repeated element: a shape and a dtype for the rule to judge, without memory.
        reason = groups[k].rule.refuses(np.broadcast_to(np.zeros((), dtype), shape))
        if reason:
            raise ValueError(f"{leaf.label}: {reason}")
        n, own = int(np.prod(shape, dtype=np.int64)), groups[k].rule
        parameters += n * dtype.itemsize
        formats = [
            storage.state(own, name, dtype, n)
            for name in Extras(ema=ema, slow=slow_weights).states(own)
        ]
        states += sum(f.nbytes(n) for f in formats)
        for side in own.sides(shape).values():
            states += math.prod(side) * compute_dtype(dtype).itemsize
        computed = storage.parameter(dtype)
        if computed.aux_dtype is not None:
            states += computed.nbytes(n) - n * dtype.itemsize
        elif computed.dtype != dtype:
            states += computed.nbytes(n)
        stack = own.matrices(shape)
        if stack is not None:
            works = max(works, len(own.works))
            order = memory_order(leaf.value) if isinstance(leaf.value, np.ndarray) else "C"
            compute = compute_dtype(dtype)
            rest = k, shape, order
            matrices.append((len(matrices), compute, own.short_products, stack, rest))
    labels, rules = [leaf.label for leaf in tree.leaves], [groups[k].rule for k in group_of]
    values = [leaf.value for leaf in tree.leaves]
    dtypes = [np.dtype(value.dtype) for value in values]
    storage.check(labels, dtypes, [tuple(value.shape) for value in values], rules)
    made = batches(matrices)
    work = sum(
        Workspace.bytes_for(*stacks(made, dtype), dtype, works)
        for dtype in {batch.dtype for batch in made}
    )
    if state_path is None:
        return Estimate(parameters, states, work)
    return Estimate(parameters, min(states, WINDOW), work, states)
