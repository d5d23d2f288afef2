"""The base of every rule: hyperparameters, weight decay, scalars, reference and program."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

import numpy as np

from ..arrays.devices import device_of
from ..arrays.storage import StateDtype, Storage
from ..linalg.newton_schulz import Stack, Workspace
from ..programs.arithmetic import Array
from ..programs.elements import Element
from ..programs.program import Operation, Program
from .hyperparameters import (
    LearningRate,
    NonNegative,
    Number,
    check_fields,
    check_number,
    field_names,
    in_step,
    number_names,
)

DecayForm = Literal["l2", "decoupled", "decoupled_first", "independent"]


class Convention(NamedTuple):
    """A library's form of a rule.

    free: the hyperparameters that the library has, with its defaults (`REQUIRED`: it has none).
    fixed: the settings that make a rule the library's.
    spelled: what a value is called there, by hyperparameter (`amsgrad=True`).
    """

    free: Mapping[str, Any]
    fixed: Mapping[str, Any] = {}
    spelled: Mapping[str, Mapping[Any, Any]] = {}


REQUIRED = object()


class Member(NamedTuple):
    """A parameter among those of one shape whose matrices are treated in one go.

    t: its step, 1 first. sides: its side states, live.
    """

    t: int
    sides: Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An update rule: frozen hyperparameters, and the arithmetic that they select.

    lr: learning rate, a number >= 0 or a callable of the optimizer's step number (1 first). Every
    other number, and each of a pair such as `betas`, takes such a schedule too, unless it says what
    the states are; a value that does not fit is refused in its step.
    weight_decay: lambda >= 0, applied as `decay` says: "l2" adds lambda p to the gradient,
    "decoupled" subtracts lr lambda p together with the update, "decoupled_first" multiplies p by
    1 - lr lambda before it (PyTorch's order), "independent" subtracts lambda p times lr divided
    by its base value, so that lr itself does not scale it. maximize: ascend instead of descend.

    Raises TypeError for a value of the wrong kind and ValueError for one out of range.
    """

    name: ClassVar[str]
    conventions: ClassVar[Mapping[str, Convention]] = {}
    takes_hessian: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Hyperparameters that between them select every kernel and every branch of `scalars`."""
    branches: ClassVar[int] = 1
    """The step by which the examples have taken every branch of `scalars`."""
    settled: ClassVar[tuple[str, ...]] = ()
    """Hyperparameters that say what the states hold, so that no step may change them."""

    works: ClassVar[tuple[str, ...]] = ("work",)
    """The work space of a rule of several phases, by the names of operands."""

    lr: LearningRate = 1e-2
    weight_decay: NonNegative = 0.0
    decay: DecayForm = "l2"
    maximize: bool = False

    def __post_init__(self) -> None:
        check_fields(self, self.scheduled)
        for name in self.scheduled:
            if name in self.settled:
                raise ValueError(
                    f"{type(self).__name__}({name}): says what the states are, and takes no"
                    f" schedule; got {getattr(self, name)!r}"
                )
        self.check_together()
        if self.decay == "independent" and callable(self.lr) and not hasattr(self.lr, "base"):
            raise ValueError(
                f"{type(self).__name__}(decay): 'independent' divides lr by its base value, and the"
                " schedule given has none; give it an attribute `base`, its peak learning rate"
            )

    def check_together(self) -> None:
        """ValueError where hyperparameters that fit alone do not fit each other."""

    def with_numbers(self, **values: Any) -> Self:
        """Return the rule with other numbers, checked, at a tenth of the cost of `replace`.

        TypeError or ValueError where one does not fit, or is none.
        """
        if type(self).__post_init__ is not Rule.__post_init__:  # of a rule of the user's own
            return replace(self, **values)
        checked = {name: check_number(self, name, value) for name, value in values.items()}
        new = object.__new__(type(self))
        new.__dict__.update(self.__getstate__())
        new.__dict__.update(checked)
        new.check_together()
        return new

    def with_rate(self, lr: float) -> Self | None:
        """Return the rule with another learning rate >= 0, at the cost of a copy.

        None where more than the rate changes with it.
        """
        own = type(self).__post_init__ is not Rule.__post_init__
        if own or callable(self.lr) or self.decay == "independent" or "lr" in self.settled:
            return None
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)  # with its program, which does not depend on the rate
        new.__dict__["lr"] = lr
        return new

    @functools.cached_property
    def scheduled(self) -> tuple[str, ...]:
        """The names of hyperparameters, other than `lr`, that have a schedule."""
        return tuple(name for name in number_names(type(self)) if _has_schedule(self, name))

    def at(self, step: int) -> Self:
        """Return the rule with the values of its hyperparameters in a step; `lr` stays as it is.

        TypeError or ValueError where the value of a schedule does not fit.
        """
        if not self.scheduled:
            return self
        return self.with_numbers(**{name: in_step(self, name, step) for name in self.scheduled})

    def __getstate__(self) -> dict[str, Any]:
        own, cls = self.__dict__, cast(Any, type(self))
        return {name: own[name] for name in field_names(cls)}

    @classmethod
    def like(cls, library: str, **hyperparameters: Any) -> Self:
        """Return the rule in another library's convention, with that library's defaults.

        Parameters
        ----------
        library : {"torch", "optax", "keras"}
            Name of the library.
        **hyperparameters
            Values of those that the library has, under the names used here.

        Returns
        -------
        Rule
            The rule.

        Raises
        ------
        ValueError
            If the library lacks the rule, the rule lacks the name there, or the library has no
            default for a name that is not given.
        """
        if library not in cls.conventions:
            known = ", ".join(map(repr, cls.conventions)) or "none"
            raise ValueError(
                f"{cls.__name__}.like: {library!r} has no such rule; libraries that have: {known}"
            )
        convention = cls.conventions[library]
        for name in hyperparameters:
            if name not in convention.free:
                raise ValueError(
                    f"{cls.__name__}.like({library!r}): {name!r} does not apply there; names that"
                    f" do: {', '.join(convention.free)}"
                )
        values = {**convention.free, **hyperparameters}
        for name, value in values.items():
            if value is REQUIRED:
                raise ValueError(
                    f"{cls.__name__}.like({library!r}): {library} has no default for {name!r}; give"
                    " one"
                )
            spelling = convention.spelled.get(name)
            if spelling is not None:
                if value not in spelling:
                    raise ValueError(
                        f"{cls.__name__}.like({library!r}): {name}={value!r} is not available"
                        f" there; values that are: {', '.join(map(repr, spelling))}"
                    )
                values[name] = spelling[value]
        return cls(**{**convention.fixed, **values})

    # What a rule defines.

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the state arrays, in the order of `init`."""
        return ()

    @property
    def nonnegative(self) -> frozenset[str]:
        """The states that are never negative, such as means of squares."""
        return frozenset()

    def initial(self, state: str) -> float:
        """The value with which a state array is filled."""
        return 0.0

    @property
    def kernel(self) -> str:
        """The name of the struct in csrc/rules.hpp."""
        return self.name

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        """The struct's fields, folded in float64, for the leaf's t-th step (1 first)."""
        raise TypeError(f"{type(self).__name__} defines no scalars")

    @property
    def element(self) -> Element:
        """The kernel in Python: (p, g, states, scalars) -> (delta, states), as in elements.py."""
        raise TypeError(f"{type(self).__name__} defines no element")

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        """The delta to subtract and the new states, as the source's equation writes them."""
        raise TypeError(f"{type(self).__name__} defines no textbook form")

    def operations(self) -> tuple[Operation, ...]:
        """The program of one step."""
        operands = ("p", "g", *self.states)
        return (Operation(self.kernel, operands, self.scalars, element=self.element),)

    def sums(self) -> tuple[Operation, ...]:
        """Counts of elements that `stats` adds to its own: run after the rule, each named by its
        first operand."""
        return ()

    def textbook_sums(
        self, before: Sequence[np.ndarray], after: Sequence[np.ndarray], *, t: int
    ) -> dict[str, float]:
        """Return the counts of `sums` in plain NumPy, from the states before and after a step."""
        return {}

    @property
    def ahead(self) -> Rule | None:
        """The rule whose step, with the velocity for gradient, moves p to where the gradient is
        wanted; None where that is p itself."""
        return None

    def every_operation(self) -> tuple[Operation, ...]:
        """Return the operations of the step, and of whatever else the rule runs."""
        return (*self.operations(), *(self.ahead.operations() if self.ahead else ()))

    def absorb(self, states: tuple[Array, ...], hessian: Array) -> tuple[Array, ...]:
        """The textbook form of what a step does with a Hessian estimate."""
        raise TypeError(f"{type(self).__name__} takes no Hessian")

    def sides(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """States of another shape than their parameter's, and that shape: for matrix rules alone.

        They have the compute type, whatever `state_dtype` says, begin as zero, and come after the
        other states, in `init` too; `before` and `between` update them.
        """
        return {}

    def matrices(self, shape: tuple[int, ...]) -> Stack:
        """As how many matrices, of how many rows and columns, a rule of several phases treats a
        parameter."""
        raise TypeError(f"{type(self).__name__} has one phase")

    def before(self, t: int, sides: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """New values of a leaf's side states, found before anything is written, for all leaves:
        here is the place for what may raise or needs memory. They are in `sides` in `between`."""
        return {}

    def between(
        self,
        phase: int,
        works: Sequence[np.ndarray],
        space: Workspace,
        members: Sequence[Member | None],
    ) -> None:
        """Change the workspace between the phases of a rule, in place, after each but the last.

        phase: that which has just run. works: by name as `self.works`; the first axis is that of
        parameters of one shape; each lies at the beginning of one of the space's directions.
        members: of each of these parameters, None where it takes no part in the step. Must neither
        raise nor need memory: the matrices before these have been updated by then.
        """
        raise TypeError(f"{type(self).__name__} has one phase")

    @property
    def short_products(self) -> bool:
        """Whether matrices are multiplied in bfloat16."""
        return False

    def note(self, shape: tuple[int, ...]) -> str | None:
        """How parameters of this shape are updated, where that depends on the shape."""
        return None

    def refuses(self, p: np.ndarray) -> str | None:
        """Why this parameter cannot be updated by this rule, with the remedy; None where it can."""
        return None

    # What follows from it.

    def lr_at(self, step: int) -> float:
        """The learning rate of a step; ValueError where the schedule's value is no rate."""
        if not callable(self.lr):
            return self.lr
        where = f"{type(self).__name__}(lr) at step {step}"
        return float(Number().accept(where, self.lr(step)))

    @property
    def decay_line(self) -> tuple[float, float]:
        """(a, b): the loop around the rule multiplies the parameter with a + b lr."""
        lam = self.weight_decay
        if self.decay == "l2":
            return lam, 0.0
        if self.decay == "decoupled":
            return 0.0, lam
        if self.decay == "decoupled_first":
            return 1.0, -lam
        base = self.lr.base if callable(self.lr) else self.lr  # type: ignore[attr-defined]
        return (0.0, lam / base) if base else (lam, 0.0)

    def reference(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        """The step in plain NumPy: the new parameter and the new states.

        p, g, states: arrays of one shape, left alone; the arithmetic has their dtype. t: the
        leaf's step, 1 first. lr: the learning rate of this step.
        """
        if self.maximize:
            g = -g
        # Not from `decay_line`, which it is there to check.
        lam = self.weight_decay
        if lam and self.decay == "l2":
            g = g + lam * p
        if lam and self.decay == "decoupled_first":
            p = p * (1.0 - lr * lam)
        delta, states = self.textbook(p, g, states, t=t, lr=lr)
        if lam and self.decay == "decoupled":
            return p - delta - lr * lam * p, states
        if lam and self.decay == "independent":
            base = self.lr.base if callable(self.lr) else self.lr  # type: ignore[attr-defined]
            return p - delta - (lr / base if base else 1.0) * lam * p, states
        return p - delta, states

    def init(self, p: np.ndarray, state_dtype: StateDtype = None) -> tuple[Any, ...]:
        """New states for a parameter, with its shape and memory order.

        state_dtype: as `Optimizer` takes it; without it float64 for a float64 parameter, else
        float32. Arrays, or `Quantized` objects where the state is stored so.
        """
        space, rule = device_of(p), self.at(1)
        p = space.check_parameter("p", p, rule)
        storage = Storage(state_dtype)
        storage.check(["p"], [p.dtype], [rule])
        (leaf_state,) = space.allocate(storage, [rule], [p], [None])
        stored = [*leaf_state.states.values(), *leaf_state.sides.values()]
        return tuple(state.visible for state in stored)

    def summary(self) -> str:
        """The rule with its learning rate and what differs from its defaults."""
        shown = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name == "lr" or getattr(self, field.name) != field.default
        )
        return f"{type(self).__name__}({', '.join(shown)})"

    @functools.cached_property
    def program(self) -> Program:
        """The program of a step; where hyperparameters have schedules, of the first."""
        rule = self.at(1)
        return Program(rule, rule.operations(), ("p", *rule.states))


def _has_schedule(rule: Rule, name: str) -> bool:
    value = getattr(rule, name)
    if isinstance(value, (tuple, list)):
        return any(map(callable, value))
    return callable(value)
