"""The interface of a backend: plans for optimizers, and single steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from ..arrays.rows import UniqueRows
from ..arrays.stored import LeafState, Stored
from ..rules.groups import Group
from .extras import Extras
from .spec import PlanSpec


class Decision(Protocol):
    """The decision between the reading of the gradients and the step."""

    factor: float
    """The inverse of the scale of the gradients."""

    def __call__(self) -> bool:
        """Return whether the step is to be taken; sets the factors on the gradients."""

    @property
    def limits(self) -> list[float]:
        """The largest norm of all gradients, or of those of each group; infinite for none."""

    def told(self, norms: Sequence[Any], scales: Sequence[Any]) -> None:
        """Take the results that a device will find, in the order of `limits`."""

    def stopped(self, number: int, bad: Sequence[int]) -> FloatingPointError:
        """Return the error of a step that a device did not take, because of these leaves."""


class Policy(NamedTuple):
    """The work of a whole step in one call of a plan besides the update, and what it returns.

    info: the class `StepInfo`. labels, paths: of groups and leaves. schedules: of each group the
    `formula` of its learning rate, or None where that stays or only Python knows. limits: see
    `Decision`. by_group: whether each group has its own norm. measures: whether gradients are read
    before the step; clips: whether a norm must be finite; skips: whether a step without one does
    nothing. narrow: whether gradients are multiplied in float32. refusal: gives the error of a step
    whose gradients are not finite, from the numbers of these leaves. stats: makes what
    `StepInfo.stats` tells from a copy of the results and the inverse of the scale; None where none
    are told. gradient_sums: with them the columns of results with sums of squares that no pass has
    found before, and the leaves that have them. rates:
    `fusedopt.step.rates.Rates`. numbers: of each group's rule `numbers_of` its class. scheduled:
    of each group the other numbers that have schedules, with their formulas or None; moving:
    whether what is around the rules differs from step to step. transforms: of each gradient, before
    anything else: (clip_leaf or 0.0, clip_adaptive or 0.0, centralize), or None.
    """

    info: type
    labels: list[str]
    paths: list[str]
    schedules: list[Any]
    limits: list[float]
    by_group: bool
    measures: bool
    clips: bool
    skips: bool
    narrow: bool
    refusal: Callable[[Sequence[int]], FloatingPointError]
    stats: Callable[[Any, float], Any] | None
    gradient_sums: list[tuple[int, list[int]]]
    rates: Any
    numbers: list[Any]
    scheduled: list[dict[str, Any]]
    moving: bool
    transforms: tuple[float, float, bool] | None


class Device(Protocol):
    """Checks and creation of the arrays of a backend: `fusedopt.arrays.host`, or
    `fusedopt.backends.cuda.device`, which has arrays of its own with a shape, a dtype and a size.

    check_options: ValueError for what there is for other arrays alone. check_target,
    check_parameter, check_apart, Fit: see `fusedopt.arrays.checks`. check_state: what `update` is
    given, as it is stored. allocate: see `Storage.allocate`.
    blank: new arrays like others, in the types that they are computed in. same: whether two arrays
    have the same elements. unique_rows: see `fusedopt.arrays.rows`.
    """

    check_options: Callable[..., None]
    check_target: Callable[..., Any]
    check_parameter: Callable[..., Any]
    check_apart: Callable[..., None]
    check_state: Callable[..., Stored]
    GradientChecks: Callable[..., Any]
    allocate: Callable[..., list[LeafState]]
    blank: Callable[..., list[Stored]]
    same: Callable[..., bool]
    unique_rows: Callable[..., UniqueRows]


class Plan(Protocol):
    """One optimizer on one backend. work_bytes: memory beside parameters and states."""

    work_bytes: int

    def take(self, token: object) -> None:
        """Keep everything else from using the plan until `give`; RuntimeError if it is in use.

        One that was replaced is never given back, and so refused to a thread that still has it.
        """

    def give(self, token: object) -> None:
        """End what `take` of the same token began; do nothing if it had not, or if it is over.

        Whoever may have been interrupted anywhere can so give once more, to be sure.
        """

    def held(self, token: object) -> bool:
        """Whether this token has the plan."""

    def synchronize(self) -> None:
        """Wait until all steps are done; FloatingPointError where one found no finite norm."""

    def adopt(self, groups: Sequence[Group], extras: Extras) -> bool:
        """Take other rules for the groups, and other numbers beside them, on the same arrays.

        False, and nothing has changed, if a new plan is needed.
        """

    def step(self, grads: Any, hessian: Any) -> int | None:
        """Take a step with trees of arrays as the caller has them, and return its number.

        None, with nothing written, where something must be checked, explained or laid out first.
        """

    def step_leaves(self, grads: Sequence[Any], hessian: Sequence[Any] | None) -> int | None:
        """Update every leaf that has a gradient, and its counter, in place; return the number.

        grads, hessian: of each leaf, checked, and laid out like its parameter or `UniqueRows`; or
        None. Where `decide` says no, the number of the step before.
        """


class ExclusiveUse:
    """The part of a plan that keeps others from using it."""

    def __init__(self) -> None:
        self._holder: list[object] = []  # the first has it; to append and to remove is one step

    def take(self, token: object) -> None:
        self._holder.append(token)
        if self._holder[0] is not token:
            self.give(token)
            raise RuntimeError(
                "this optimizer is in use in another thread: give each thread its own optimizer"
            )

    def give(self, token: object) -> None:
        if token in self._holder:
            self._holder.remove(token)

    def held(self, token: object) -> bool:
        return self._holder[:1] == [token]

    def synchronize(self) -> None:
        """Do nothing, since steps on the host are done when they return."""

    def step(self, grads: Any, hessian: Any) -> int | None:
        """Refuse trees: the optimizer checks them, and keeps interrupts out of the step."""
        return None


class Backend(Protocol):
    """A way to run programs."""

    name: str
    textbook: bool
    """Whether rules run as their textbooks write them, in float64."""
    takes_means: bool
    """Whether a gradient may be a `core.Mean` of arrays in the parameter's memory order."""

    @property
    def update_alone(self) -> Callable[..., bool] | None:
        """A function (rule, t, lr, arrays, gradient, hessian) that takes one step of one tensor's
        parameter and states, in place; or None. It returns False, with nothing written, where a
        plan must do it or something must be checked."""

    @property
    def device(self) -> Any:
        """The `Device` of its arrays."""

    def unavailable(self) -> str | None:
        """Return why the backend cannot be used here, or None."""

    def describe(self) -> str:
        """The variant in use, such as the instruction set."""

    def plan(self, spec: PlanSpec) -> Plan:
        """Prepare an optimizer's steps."""

    def sums_of_squares(self, arrays: Sequence[Any]) -> Sequence[tuple[float, float]] | None:
        """Return the sum of the squares of the elements times scale, and the scale, of each array.

        The scale is a power of two that keeps the sum in range. None where something is to be
        checked first.
        """
