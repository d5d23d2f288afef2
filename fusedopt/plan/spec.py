"""The description of an optimizer from which a backend makes a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays.formats import RandomKey
from ..arrays.state_file import StateFile
from ..arrays.stored import LeafState, Stored
from ..arrays.watch import Watch
from ..programs.program import Program
from ..rules.base import Rule
from ..rules.groups import Group
from .extras import NOTHING, Extras

INPUTS = ("g", "hessian")
"""The operands that come with each step; they have the first slots."""

HALFWAY = -1
"""The step of an optimizer whose arrays are of no one step: a file could not be read to its end, or
a step of matrices failed after it had begun to write."""


@dataclass(frozen=True)
class PlanSpec:
    """Everything about an optimizer that a plan needs.

    tree: the parameters' `Tree.spec`. leaves: what a step writes of each. groups: the rules;
    group_of: of each leaf its place among them. rates: float64, the groups' learning rates
    in the step at hand. factors: float64, what their gradients are multiplied by. counters: int64,
    the optimizer's step and then each leaf's; a plan advances them. keys: of each leaf, for its
    parameter and states, the keys of their random bits. results: float64, a row for each leaf,
    which a step fills in: the sum of squares of its gradient times scale, that scale (0 where it
    takes no part), the elements that are touched, and the sums of its program. extras: what is done
    beside the rules. decide: asked when the first two columns are known whether to go on, and may
    set the factors; without it they are not computed. zero_grads: gradients are set to zero.
    threads: the most to use, or None. wait: whether a step may wait for what `decide` needs;
    otherwise see `backends.cuda.clipping`. state_file: the file that states are in, of which a step
    is to have a window in memory at a time; None where they are in memory. watch: of the caller's
    arrays, to be asked before anything is written. beside: dense arrays that no gradient may
    overlap and that the plan itself does not write.
    """

    tree: Any
    leaves: Sequence[LeafState]
    groups: Sequence[Group]
    group_of: Sequence[int]
    rates: np.ndarray
    factors: np.ndarray
    counters: np.ndarray
    keys: Sequence[Sequence[RandomKey]]
    results: np.ndarray
    extras: Extras = NOTHING
    decide: Callable[[], bool] | None = None
    zero_grads: bool = False
    threads: int | None = None
    wait: bool = True
    state_file: StateFile | None = None
    watch: Watch | None = None
    beside: Sequence[np.ndarray] = ()

    def check_unmoved(self) -> None:
        """ValueError where an array of the caller's is not what it was."""
        if self.watch is not None:
            self.watch.check()


def results_for(programs: Sequence[Program], leaves: int) -> np.ndarray:
    """The array of a `PlanSpec`."""
    return np.zeros((leaves, 3 + max(len(program.sums) for program in programs)))


def single(rule: Rule, t: int, lr: float, arrays: Sequence[Stored]) -> PlanSpec:
    """Describe the t-th step of one tensor; arrays: its parameter, states, and side states."""
    program = rule.program
    names = program.arrays[1 : len(program.arrays) - len(program.works)]
    states = dict(zip(names, arrays[1:], strict=False))
    sides = dict(zip(rule.sides(arrays[0].shape), arrays[1 + len(names) :], strict=True))
    leaf_state = LeafState(arrays[0], states, sides=sides)
    return fresh([rule], [leaf_state], t, lr)


def fresh(rules: Sequence[Rule], leaves: Sequence[LeafState], t: int, lr: float) -> PlanSpec:
    """Describe the t-th step of leaves, each with its rule, with nothing around it."""
    count = len(leaves)
    return PlanSpec(
        tree=list(range(count)),
        leaves=leaves,
        groups=[Group(rule.name, rule) for rule in rules],
        group_of=list(range(count)),
        rates=np.full(count, lr),
        factors=np.ones(count),
        counters=np.array([0] + [t - 1] * count),
        keys=[[RandomKey()] * (1 + len(leaf.states)) for leaf in leaves],
        results=results_for([rule.program for rule in rules], count),
    )
