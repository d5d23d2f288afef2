"""What a backend is: plans for optimizers, and single steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..arrays.stored import Memory, Stored
from ..rules import Rule
from ..rules.base import Program
from .extras import NOTHING, Around

INPUTS = ("g", "hessian")
"""The operands that come with each step; they have the first slots."""

HEAD = {"rule": 2, "peek": 2, "filter": 1, "sum": 0, "other": 0}
"""How many scalars an operation has before its own, by its loop."""

if TYPE_CHECKING:
    from ..arrays.state_file import Scratch


@dataclass(frozen=True)
class Group:
    """The leaves of one rule. label: the pattern that chose them, or the rule's name."""

    label: str
    rule: Rule


@dataclass(frozen=True)
class Layout:
    """Everything about an optimizer that a plan needs.

    tree: the parameters' `Tree.spec`. leaves: what a step writes of each. groups: the rules;
    group_of: of each leaf its place among them. rates: float64, in the step at hand the groups'
    learning rates and then their factors on gradients. counters: int64, the optimizer's step and
    then each leaf's; a plan advances them. keys: of each leaf, for its parameter and states, the
    keys of their random bits. results: float64, a row for each leaf, which a step fills in: the sum
    of squares of its gradient times scale, that scale (0 where it takes no part), the elements that
    are touched, and the sums of its program. around: what is done beside the rules. decide: asked
    when the first two columns are known whether to go on, and may set the factors; without it they
    are not computed. zero_grads: gradients are set to zero. threads: at most so many, or None.
    wait: whether a step may wait for what `decide` needs; otherwise see `cuda.guard`. scratch: the
    file that states are in, of which a step is to have a window in memory at a time; None where
    they are in memory.
    """

    tree: Any
    leaves: Sequence[Memory]
    groups: Sequence[Group]
    group_of: Sequence[int]
    rates: np.ndarray
    counters: np.ndarray
    keys: Sequence[Sequence[int]]
    results: np.ndarray
    around: Around = NOTHING
    decide: Callable[[], bool] | None = None
    zero_grads: bool = False
    threads: int | None = None
    wait: bool = True
    scratch: Scratch | None = None


def results_for(programs: Sequence[Program], leaves: int) -> np.ndarray:
    """The array of a `Layout`."""
    return np.zeros((leaves, 3 + max(len(program.sums) for program in programs)))


def single(rule: Rule, program: Program, t: int, lr: float, arrays: Sequence[Stored]) -> Layout:
    """That of one tensor's t-th step; arrays: the parameter, then those of the program."""
    names = program.arrays[1 : len(program.arrays) - len(program.works)]
    states = dict(zip(names, arrays[1:], strict=False))
    sides = dict(zip(rule.sides(arrays[0].shape), arrays[1 + len(names) :], strict=True))
    memory = Memory(arrays[0], states, sides=sides)
    rates, counters = np.array([lr, 1.0]), np.array([0, t - 1])
    group, keys = Group(rule.name, rule), [[0] * (1 + len(names))]
    return Layout(0, [memory], [group], [0], rates, counters, keys, results_for([program], 1))


class Space(Protocol):
    """Checks and makes the arrays of a backend: `fusedopt.arrays.host`, or
    `fusedopt.backends.cuda.device`, which has arrays of its own with a shape, a dtype and a size.

    check_options: ValueError for what there is for other arrays alone. check_target,
    check_parameter, check_apart, Fit: see `fusedopt.arrays.checks`. check_state: what `update` is
    given, as it is stored. allocate: see `Storage.allocate`.
    blank: new arrays like others, in the types that they are computed in. same: whether two arrays
    have the same elements.
    """

    check_options: Callable[..., None]
    check_target: Callable[..., Any]
    check_parameter: Callable[..., Any]
    check_apart: Callable[..., None]
    check_state: Callable[..., Stored]
    Fit: Callable[..., Any]
    allocate: Callable[..., list[Memory]]
    blank: Callable[..., list[Stored]]
    same: Callable[..., bool]


class Plan(Protocol):
    """One optimizer on one backend. work_bytes: memory beside parameters and states."""

    work_bytes: int

    def take(self) -> None:
        """Keeps everything else from using the plan until `give`; RuntimeError where it is in use.

        One that was replaced is never given back, and so refused to a thread that still has it.
        """

    def give(self) -> None:
        """Ends what `take` began."""

    def synchronize(self) -> None:
        """Waits until all steps are done; FloatingPointError where one found no finite norm."""

    def step(self, grads: Any, hessian: Any, flat: bool) -> int | None:
        """Updates every leaf that has a gradient, and its counter, in place; the step's number.

        flat: grads and hessian are lists of leaves, checked, and laid out like their parameters or
        `Touched`; otherwise trees, and None comes back, with nothing written, where something is to
        be checked or explained first. Where `decide` says no, the number of the step before.
        """


class Turn:
    """The part of a plan that keeps others from using it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def take(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "this optimizer is in use in another thread: give each thread its own optimizer"
            )

    def give(self) -> None:
        self._lock.release()

    def synchronize(self) -> None:
        """Steps on the host are done when they return."""


class Backend(Protocol):
    """A way to run programs."""

    name: str

    @property
    def space(self) -> Any:
        """The `Space` of its arrays."""

    def unavailable(self) -> str | None:
        """Why it cannot be used here; None where it can."""

    def describe(self) -> str:
        """The variant in use, such as the instruction set."""

    def plan(self, layout: Layout) -> Plan:
        """Prepares an optimizer's steps."""

    def update(
        self,
        rule: Rule,
        t: int,
        lr: float,
        arrays: tuple[Any, ...],
        g: np.ndarray,
        hessian: np.ndarray | None,
        checked: bool,
    ) -> bool:
        """One step of one tensor (its parameter, then its states), in place.

        checked: the arrays are `Stored`, fit, and are laid out alike; otherwise they are what the
        caller passed, and False comes back, with nothing written, where something is to be checked
        or explained first.
        """

    def sums_of_squares(self, arrays: Sequence[Any]) -> Sequence[tuple[float, float]] | None:
        """Of each dense array the sum of the squares of its elements times scale, and that scale, a
        power of two which keeps the sum in range. None where something is to be checked first."""

    def shift(self, rule: Any, p: np.ndarray, v: np.ndarray) -> None:
        """Moves a parameter to where a look-ahead rule wants its gradient."""
