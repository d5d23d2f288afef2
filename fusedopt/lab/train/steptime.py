"""Time one optimizer step, next to the same step written in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import fusedopt as fo

from ...arrays.trees import Tree
from ...rules.groups import assign
from .gpt import Params

ROUNDS = 15


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Median seconds of one step on the same tensors: fused, and tensor by tensor in NumPy.

    rounds: how many times both were timed, in turn.
    """

    fused_s: float
    naive_s: float
    rounds: int


def compare(
    params: Params,
    grads: Params,
    rules: Mapping[str, fo.Rule],
    **options: Any,
) -> StepTimes:
    """Step copies of `params` by `fo.Optimizer` and by each rule's textbook form in turn.

    params, grads: one nesting, both left as they are. rules: path pattern -> rule, as the optimizer
    takes it; options: its others. The textbook form works in float32. The first round only warms
    up.
    """
    fused_params = deepcopy(params)
    optimizer = fo.Optimizer(fused_params, rules, **options)
    tree = Tree(params)
    groups, group_of = assign(tree.leaves, rules)
    naive = []
    for leaf, k, g in zip(tree.leaves, group_of, tree.flatten(grads, "grads"), strict=True):
        rule, p = groups[k].rule, leaf.value.astype(np.float32)
        naive.append((rule, p, g.astype(np.float32), rule.init(p)))
    fused_times, naive_times = [], []
    for t in range(1, ROUNDS + 2):
        start = perf_counter()
        optimizer.step(grads)
        between = perf_counter()
        for i, (rule, p, g, states) in enumerate(naive):
            p, states = rule.reference(p, g, states, t=t, lr=rule.lr_at(t))
            naive[i] = rule, p, g, states
        fused_times.append(between - start)
        naive_times.append(perf_counter() - between)
    return StepTimes(
        fused_s=median(fused_times[1:]), naive_s=median(naive_times[1:]), rounds=ROUNDS
    )
