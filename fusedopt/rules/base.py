"""The base of every rule: hyperparameters, weight decay, scalars, reference and program."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

import numpy as np

from ..arrays.devices import device_of
from ..arrays.storage import StateDtype, Storage
from ..linalg.newton_schulz import Stack
from ..programs.arithmetic import Array, Pooling, alone, slice_of, stacked, unless_opposed
from ..programs.elements import Element
from ..programs.program import AXES, MEASURE, Operation, Program
from .conventions import CONVENTIONS, Convention, hyperparameters_of
from .hyperparameters import (
    LearningRate,
    NonNegative,
    Number,
    check_fields,
    field_names,
    in_step,
    kinds_of_numbers,
    number_names,
)

DecayForm = Literal["l2", "decoupled", "decoupled_first", "cautious", "independent", "scaled"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An update rule: frozen hyperparameters, and the arithmetic that they select.

    Parameters
    ----------
    lr : float or schedule
        Learning rate: a number >= 0, or a callable of the optimizer's step number (1 first).
    weight_decay : float
        Coefficient lambda >= 0 of the weight decay.
    decay : {"l2", "decoupled", "decoupled_first", "cautious", "independent", "scaled"}
        Form of the weight decay: "l2" adds lambda p to the gradient; "decoupled" subtracts
        lr lambda p together with the update; "decoupled_first" multiplies p by 1 - lr lambda before
        the update (PyTorch's order); "cautious" is "decoupled" for the elements that the update
        moves towards zero or not at all (Chen et al. 2025), and none for the others; "independent"
        subtracts lambda p lr / base, with the base value of lr, so that the learning rate itself
        does not scale it; "scaled", of rules that measure the size of their steps, makes lambda p a
        part of the update whose size that is.
    maximize : bool
        Ascend instead of descend; default False.

    Raises
    ------
    TypeError
        If a value is of the wrong kind.
    ValueError
        If a value is out of range.

    Notes
    -----
    Every number, and each of a pair such as `betas`, takes a schedule as `lr` does, unless it
    determines what the states hold. A value of a schedule that does not fit is refused in its step.
    """

    name: ClassVar[str]
    year: ClassVar[int | None] = None
    """When the rule was published."""
    conventions: ClassVar[Mapping[str, Convention]] = {}
    """Forms of the rule in other libraries, from `CONVENTIONS`."""
    takes_hessian: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Hyperparameters that between them select every kernel and every branch of `scalars`."""
    branches: ClassVar[int] = 1
    """The step by which the examples have taken every branch of `scalars`."""
    settled: ClassVar[tuple[str, ...]] = ()
    """Hyperparameters that say what the states hold, so that no step may change them."""

    over: ClassVar[Literal["row", "column", "parameter", "group", "optimizer"]] = "parameter"
    """The arrays over which `measure` is taken: each row or each column of a parameter, a
    parameter, those of its group, or those of all groups of the optimizer that have a rule of this
    class.

    A row is what one index of the first axis selects, a column what one of the last axis does; a
    parameter with one axis is one row, and one column.
    """

    maxima: ClassVar[int] = 0
    """How many of what `measure` returns, the last ones, are maxima and no sums."""

    kept: ClassVar[tuple[str, ...]] = ()
    """Numbers that a rule over more than a parameter keeps from step to step, as side states."""

    scales_decay: ClassVar[bool] = False
    """Whether weight decay may have the form "scaled"."""

    works: ClassVar[tuple[str, ...]] = ()
    """The work space between two phases, by the names of operands."""

    lr: LearningRate = 1e-2
    weight_decay: NonNegative = 0.0
    decay: DecayForm = "l2"
    maximize: bool = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.conventions = CONVENTIONS.get(getattr(cls, "name", ""), {})

    def __post_init__(self) -> None:
        check_fields(self, self.scheduled)
        for name in self.scheduled:
            if name in self.settled:
                raise ValueError(
                    f"{type(self).__name__}({name}): determines what the states hold, and takes no"
                    f" schedule; got {getattr(self, name)!r}"
                )
        self.check_together()
        if self.decay == "scaled" and not self.scales_decay:
            raise ValueError(
                f"{type(self).__name__}(decay): 'scaled' is not available for this rule; take"
                " 'decoupled'"
            )
        if self.decay == "independent" and callable(self.lr) and not hasattr(self.lr, "base"):
            raise ValueError(
                f"{type(self).__name__}(decay): 'independent' divides lr by its base value, and the"
                " schedule given has none; give it an attribute `base`, its peak learning rate"
            )

    def check_together(self) -> None:
        """Raise ValueError where hyperparameters that fit alone do not fit each other."""

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
        new = replace(self, **{name: in_step(self, name, step) for name in self.scheduled})
        like = self.__dict__.get("_like")
        if like is None:
            self.__dict__["_like"] = new.program
        else:
            new.__dict__["_like"] = like
        return new

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
        return cls(**hyperparameters_of(cls.__name__, cls.conventions, library, hyperparameters))

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
        """The value with which a state array is filled, or a number that is kept begins."""
        return 0.0

    @property
    def kernel(self) -> str | None:
        """The name of the struct in csrc/rules.hpp; None where Numba compiles the element."""
        return self.name

    def scalars(self, *known: Any) -> tuple[float, ...]:
        """(t, lr) -> the struct's fields, folded in float64, for the leaf's t-th step (1 first).

        The numbers of `kept`, as they are before the step, come behind t and lr.
        """
        raise TypeError(f"{type(self).__name__} defines no scalars")

    @property
    def element(self) -> Element:
        """The kernel in Python: (p, g, states, scalars) -> (delta, states), as in elements.py."""
        raise TypeError(f"{type(self).__name__} defines no element")

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        """The delta to subtract and the new states, as the source's equation writes them."""
        return self.textbook_over(p, g, states, t=t, lr=lr, pool=alone)

    def textbook_over(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float, pool: Pooling
    ) -> tuple[Array, tuple[Array, ...]]:
        """The textbook form of a rule whose `over` is more than a parameter.

        pool: makes the sums over all arrays of what was measured on this one.
        """
        raise TypeError(f"{type(self).__name__} defines no textbook form")

    @property
    def measure(self) -> Element | None:
        """The addends of an element, or None for a rule that reads no sums.

        (p, g, states, scalars) -> a tuple, whose members are each added up over the arrays that
        `over` says before the step, but for the last `maxima`, of which the largest is found; all
        in float64, and without the scalars that come from the sums.
        """
        return None

    def measured(self, *known: Any) -> tuple[Any, ...]:
        """(t, lr, sums) -> the struct's last fields, behind `scalars`, from sums over the arrays.

        The numbers that are kept come behind the sums, and their new values behind the fields. They
        are to depend on neither t nor lr: both may be any leaf's. With sums of each row, each sum
        is an array with a number for each row, and each field such an array or a number.
        """
        raise TypeError(f"{type(self).__name__} measures nothing")

    def operations(self) -> tuple[Operation, ...]:
        """The program of one step."""
        operands = ("p", "g", *self.states)
        fold = self.folded if self.kept else self.scalars
        rule = Operation(self.kernel, operands, fold, element=self.element)
        if self.measure is None:
            return (rule,)
        ones = [1.0] * (len(operands) + len(fold(1, 0.1)))
        sums = tuple(f"{MEASURE}{k}" for k in range(len(self.measure(*ones))))
        measure = Operation(
            rule.kernel and f"{rule.kernel}_measure",
            (*sums, *operands),
            fold,
            loop="measure",
            element=self.measure,
            maxima=self.maxima,
        )
        count = self.measured_count(len(sums))
        return measure, rule._replace(phase=1, measured=count)

    def folded(self, t: int, lr: float, *kept: float) -> tuple[float, ...]:
        """`scalars` with the numbers that are kept, or those that they begin as."""
        return self.scalars(t, lr, *(kept or map(self.initial, self.kept)))

    def measured_count(self, sums: int) -> int:
        """Return how many scalars come from as many sums."""
        if self.over not in AXES:
            return len(self.from_sums(1, 0.1, (1.0,) * sums))
        try:
            return len(self.from_sums(1, 0.1, np.ones((sums, 2))))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{type(self).__name__}.measured: with over = {self.over!r} each sum is an array"
                f" with a number for each {self.over}, and a tuple of such arrays or numbers is"
                f" expected ({error}); take np.sqrt and np.where in place of math.sqrt and if"
            ) from error

    def from_sums(self, t: int, lr: float, sums: Any, *kept: float) -> Any:
        """`measured` without the new values of the numbers that are kept.

        With sums of each row or column, these and the scalars are float64 arrays whose last axis
        has a number for each.
        """
        if self.over in AXES:
            with np.errstate(all="ignore"):
                found: Any = self.measured(t, lr, tuple(sums))
            if not isinstance(found, tuple):
                raise TypeError(f"got {found!r}")
            count = sums.shape[1]
            every = [np.broadcast_to(x, count) for x in found]
            return np.array(every, np.float64).reshape(len(found), count)
        if not self.kept:
            return self.measured(t, lr, sums)
        found = self.measured(t, lr, sums, *(kept or map(self.initial, self.kept)))
        return found[: len(found) - len(self.kept)]

    def sums(self) -> tuple[Operation, ...]:
        """Return the counts of elements that `stats` adds to its own.

        They run after the rule, and each is named by its first operand.
        """
        return ()

    def textbook_sums(
        self, before: Sequence[np.ndarray], after: Sequence[np.ndarray], *, t: int
    ) -> dict[str, float]:
        """Return the counts of `sums` in plain NumPy, from the states before and after a step."""
        return {}

    @property
    def ahead(self) -> tuple[Rule, str] | None:
        """The rule whose step moves p to where the gradient is wanted; None where that is p.

        With it the name of the state that is the gradient of that step.
        """
        return None

    @property
    def evaluated(self) -> tuple[Rule, str] | None:
        """The rule whose step moves p to where it is to be evaluated, and its state, as `ahead`."""
        return None

    def every_operation(self) -> tuple[Operation, ...]:
        """Return the operations of the step, and of whatever else the rule runs."""
        moves = [move[0] for move in (self.ahead, self.evaluated) if move]
        return (*self.operations(), *[op for rule in moves for op in rule.operations()])

    def absorb(self, states: tuple[Array, ...], hessian: Array) -> tuple[Array, ...]:
        """The textbook form of what a step does with a Hessian estimate."""
        raise TypeError(f"{type(self).__name__} takes no Hessian")

    def sides(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the states of another shape than their parameter's.

        They have the compute type, whatever `state_dtype` says, begin as `initial` says, and come
        after the other states, in `init` too. They are the numbers of `kept`, or what
        `MatrixRule.before` and `between` update.
        """
        return dict.fromkeys(self.kept, ())

    def matrices(self, shape: tuple[int, ...]) -> Stack | None:
        """Return the number of matrices, rows and columns as which a `MatrixRule` treats a leaf."""
        return None

    @property
    def short_products(self) -> bool:
        """Whether matrices are multiplied in bfloat16."""
        return False

    def note(self, shape: tuple[int, ...]) -> str | None:
        """Return how parameters of this shape are updated, where that depends on the shape."""
        if self.program.axis is None:
            return None
        return f"{type(self).__name__}: with sums of each {self.over}"

    @property
    def pooled(self) -> bool:
        """Whether sums are taken over more than a parameter."""
        return self.over in ("group", "optimizer")

    @property
    def host_only(self) -> bool:
        """Whether there is no form of the rule for arrays on a device."""
        return self.measure is not None

    def refuses(self, p: np.ndarray) -> str | None:
        """Return why this rule cannot update this parameter, with the remedy, or None."""
        return None

    # What follows from it.

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step.

        Parameters
        ----------
        step : int
            Number of the optimizer's step, 1 for the first.

        Returns
        -------
        float
            The learning rate.

        Raises
        ------
        TypeError, ValueError
            If the value of the schedule is no learning rate.
        """
        if not callable(self.lr):
            return self.lr
        where = f"{type(self).__name__}(lr) at step {step}"
        return float(Number().accept(where, self.lr(step)))

    @property
    def scaled_decay(self) -> float:
        """The coefficient of weight decay that is a part of the update."""
        return self.weight_decay if self.decay == "scaled" else 0.0

    @property
    def decay_line(self) -> tuple[float, float]:
        """(a, b): the loop around the rule multiplies the parameter with a + b lr."""
        lam = self.weight_decay
        if self.decay in ("decoupled", "cautious"):
            return 0.0, lam
        if self.decay == "scaled":
            return 0.0, 0.0
        if self.decay == "l2":
            return lam, 0.0
        if self.decay == "decoupled_first":
            return 1.0, -lam
        base = self.lr.base if callable(self.lr) else self.lr  # type: ignore[attr-defined]
        return (0.0, lam / base) if base else (lam, 0.0)

    def reference(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        """Compute one step in plain NumPy.

        Parameters
        ----------
        p, g : array
            Parameter and gradient of one shape; the arithmetic has their dtype.
        states : tuple of array
            States in the order of `init`.
        t : int
            Step of the parameter, 1 for the first.
        lr : float
            Learning rate of the step.

        Returns
        -------
        p : array
            The new parameter. The arguments are left alone.
        states : tuple of array
            The new states.
        """
        return self.reference_over(p, g, states, t=t, lr=lr, pool=alone)

    def reference_over(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float, pool: Pooling
    ) -> tuple[Array, tuple[Array, ...]]:
        """`reference` of a parameter whose sums are taken together with those of others."""
        count, axis = self.program.slices(p.shape), self.program.axis
        if not count or axis is None:
            return self._updated(p, g, states, t=t, lr=lr, pool=pool)
        found = []
        for k in range(count):
            w, gradient, *own = [slice_of(a, axis, k) for a in (p, g, *states)]
            found.append(self._updated(w, gradient, tuple(own), t=t, lr=lr, pool=pool))
        new, after = zip(*found, strict=True)
        new_states = tuple([stacked(each, p.ndim, axis) for each in zip(*after, strict=True)])
        return stacked(new, p.ndim, axis), new_states

    def _updated(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float, pool: Pooling
    ) -> tuple[Array, tuple[Array, ...]]:
        """`reference_over` of what has sums of its own: a parameter, or a row or column of it."""
        if self.maximize:
            g = -g
        # Not from `decay_line`, which it is there to check.
        lam = self.weight_decay
        if lam and self.decay == "l2":
            g = g + lam * p
        if lam and self.decay == "decoupled_first":
            p = p * (1.0 - lr * lam)
        if self.pooled:
            delta, states = self.textbook_over(p, g, states, t=t, lr=lr, pool=pool)
        else:
            delta, states = self.textbook(p, g, states, t=t, lr=lr)
        if lam and self.decay == "decoupled":
            return p - delta - lr * lam * p, states
        if lam and self.decay == "cautious":
            return p - delta - unless_opposed(lr * lam * p, delta, p), states
        if lam and self.decay == "independent":
            base = self.lr.base if callable(self.lr) else self.lr  # type: ignore[attr-defined]
            return p - delta - (lr / base if base else 1.0) * lam * p, states
        return p - delta, states

    def init(self, p: np.ndarray, state_dtype: StateDtype = None) -> tuple[Any, ...]:
        """Return new states for a parameter.

        Parameters
        ----------
        p : array
            The parameter, whose shape and memory order the states have.
        state_dtype : str or mapping, optional
            Format of the states, as `Optimizer` takes it. By default float64 for a float64
            parameter, else float32.

        Returns
        -------
        tuple of array or Quantized
            The states, in the order of `states`.

        Raises
        ------
        TypeError, ValueError
            If the rule cannot update the parameter, or the format does not fit.
        """
        space, rule = device_of(p), self.at(1)
        p = space.check_parameter("p", p, rule)
        storage = Storage(state_dtype)
        storage.check(["p"], [p.dtype], [p.shape], [rule])
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
        if self.scheduled:
            return self.at(1).program
        operations = self.operations()
        like: Program | None = self.__dict__.pop("_like", None)  # of a rule with other numbers
        program = like.renumbered(self, operations) if like else None
        return program or Program(self, operations, ("p", *self.states))


class Bounds(NamedTuple):
    """The numbers in [low, high) that a hyperparameter accepts.

    zero: whether zero is a number like others. It may otherwise select other states or operations,
    which nothing else about a number does.
    """

    low: float
    high: float
    zero: bool


def numbers_of(cls: Any) -> tuple[dict[str, Bounds], tuple[str, ...]]:
    """Return what the core needs to make a rule with other numbers of one that there is.

    These are the bounds of all hyperparameters that are numbers, or tuples of them, and may change
    between steps; and the names of the hyperparameters of any kind.
    """
    if cls.__post_init__ is not Rule.__post_init__:  # it has more to check, of the user's own
        return {}, ()
    bounds = {
        name: Bounds(number.low, number.high, name == "lr")
        for name, number in kinds_of_numbers(cls).items()
        if name not in cls.settled
    }
    return bounds, field_names(cls)


def _has_schedule(rule: Rule, name: str) -> bool:
    value = getattr(rule, name)
    if isinstance(value, (tuple, list)):
        return any(map(callable, value))
    return callable(value)
