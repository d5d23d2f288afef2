"""What a backend is: plans for optimizers, and single steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..arrays.rows import UniqueRows
from ..arrays.stored import LeafState, Stored
from ..rules.base import Rule
from .spec import PlanSpec


class Decision(Protocol):
    """What a plan asks between the reading of the gradients and the step."""

    factor: float
    """The inverse of the scale of the gradients."""

    def __call__(self) -> bool:
        """Whether the step is to be taken; sets the factors on the gradients."""

    @property
    def limits(self) -> list[float]:
        """The largest norm of all gradients, or of those of each group; infinite for none."""

    def told(self, norms: Sequence[Any], scales: Sequence[Any]) -> None:
        """Take what a device will find instead, in the order of `limits`."""

    def stopped(self, number: int, bad: Sequence[int]) -> FloatingPointError:
        """Return the error of a step that a device did not take, because of these leaves."""


class Device(Protocol):
    """Checks and makes the arrays of a backend: `fusedopt.arrays.host`, or
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

    def take(self) -> None:
        """Keeps everything else from using the plan until `give`; RuntimeError where it is in use.

        One that was replaced is never given back, and so refused to a thread that still has it.
        """

    def give(self) -> None:
        """Ends what `take` began."""

    def synchronize(self) -> None:
        """Waits until all steps are done; FloatingPointError where one found no finite norm."""

    def adopt(self, rules: Sequence[Rule]) -> bool:
        """Take other rules for the groups, on the same arrays; False if a new plan is needed."""

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

    def adopt(self, rules: Sequence[Rule]) -> bool:
        """Take other rules for the groups, on the same arrays; False if a new plan is needed."""
        return False

    def step(self, grads: Any, hessian: Any) -> int | None:
        """Refuse trees: the optimizer checks them, and keeps interrupts out of the step."""
        return None


class Backend(Protocol):
    """A way to run programs."""

    name: str
    textbook: bool
    """Whether rules run as their textbooks write them, in float64."""

    @property
    def update_alone(self) -> Callable[..., bool] | None:
        """A function (rule, t, lr, arrays, gradient, hessian) that takes one step of one tensor's
        parameter and states, in place; or None. It returns False, with nothing written, where a
        plan must do it or something must be checked."""

    @property
    def device(self) -> Any:
        """The `Device` of its arrays."""

    def unavailable(self) -> str | None:
        """Why it cannot be used here; None where it can."""

    def describe(self) -> str:
        """The variant in use, such as the instruction set."""

    def plan(self, spec: PlanSpec) -> Plan:
        """Prepares an optimizer's steps."""

    def sums_of_squares(self, arrays: Sequence[Any]) -> Sequence[tuple[float, float]] | None:
        """Of each dense array the sum of the squares of its elements times scale, and that scale, a
        power of two which keeps the sum in range. None where something is to be checked first."""
