"""The kinds of hyperparameters: what each accepts, and how a refusal reads."""

from __future__ import annotations

import functools
import math
import numbers
import typing
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Literal

from ..linalg.coefficients import Row

Schedule = Callable[[int], float]
"""The value of a hyperparameter in a step, from the optimizer's step number (1 for the first)."""


@dataclass(frozen=True)
class Number:
    """A number in [low, high), or in [low, high] if closed."""

    low: float = 0.0
    high: float = math.inf
    integer: bool = False
    closed: bool = False

    def __str__(self) -> str:
        kind = "an integer" if self.integer else "a number"
        end = "]" if self.closed else ")"
        bound = f"in [{self.low:g}, {self.high:g}{end}"
        return f"{kind} >= {self.low:g}" if self.high == math.inf else f"{kind} {bound}"

    def accept(self, where: str, value: Any) -> float | int:
        if type(value) is float and not self.integer and self.low <= value < self.high:
            return value  # nearly always, and without asking abstract classes
        kind: Any = numbers.Integral if self.integer else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            raise TypeError(f"{where}: expected {self}, got {value!r}")
        inside = self.low <= value < self.high or (self.closed and value == self.high)
        if not inside:  # NaN compares false
            raise ValueError(f"{where}: expected {self}, got {value!r}")
        try:
            # NumPy's float32 scalars would drag the folding of constants down to float32.
            number = float(value)
            return int(value) if self.integer else number
        except OverflowError as error:
            raise ValueError(f"{where}: expected {self} that float64 can hold") from error


@dataclass(frozen=True)
class Numbers:
    """A tuple of a fixed length of numbers of one kind."""

    length: int
    each: Number

    def accept(self, where: str, value: Any) -> tuple[float, ...]:
        if not isinstance(value, (tuple, list)) or len(value) != self.length:
            raise TypeError(f"{where}: expected {self.length} numbers, got {value!r}")
        return tuple(self.each.accept(f"{where}[{k}]", v) for k, v in enumerate(value))


@dataclass(frozen=True)
class Quintics:
    """The name of a set of coefficients, one triple, or a triple for each iteration."""

    def accept(self, where: str, value: Any) -> str | Row | tuple[Row, ...]:
        if isinstance(value, str):
            return value  # which names there are, `coefficients` knows
        if not isinstance(value, (tuple, list)) or not value:
            raise TypeError(
                f"{where}: expected the name of a set, a triple of numbers or a list of triples,"
                f" got {value!r}"
            )
        if isinstance(value[0], (tuple, list)):
            return tuple(self._triple(f"{where}[{k}]", row) for k, row in enumerate(value))
        return self._triple(where, value)

    def _triple(self, where: str, value: Any) -> Row:
        a, b, c = Numbers(3, Number(low=-math.inf)).accept(where, value)
        return a, b, c


NONNEGATIVE = Number()


@dataclass(frozen=True)
class Rate:
    """A learning rate: a number, or a schedule."""

    def accept(self, where: str, value: Any) -> float | Schedule:
        return value if callable(value) else NONNEGATIVE.accept(where, value)


Amount = Annotated[float, Number()]
Share = Annotated[float, Number(high=1.0)]
Part = Annotated[float, Number(high=1.0, closed=True)]

# Any: they are given as numbers or schedules, and are numbers where a step reads them (`Rule.at`).
NonNegative = Annotated[Any, Number()]
Fraction = Annotated[Any, Number(high=1.0)]
UpToOne = Annotated[Any, Number(high=1.0, closed=True)]
Betas = Annotated[tuple[Any, Any], Numbers(2, Number(high=1.0))]
ThreeBetas = Annotated[tuple[Any, Any, Any], Numbers(3, Number(high=1.0))]
Power = Annotated[Any, Number(high=16.0)]  # which leaves products of step numbers finite
Positive = Annotated[Any, Number(low=2.0**-126)]  # which is not zero in float32 either
Normal = Annotated[float, Number(low=2.0**-126)]  # which is not zero in float32 either
Pair = Annotated[tuple[Any, Any], Numbers(2, Number())]
QuinticSet = Annotated[str | Row | tuple[Row, ...], Quintics()]
Count = Annotated[int, Number(low=1, integer=True)]
Whole = Annotated[int, Number(integer=True)]
LearningRate = Annotated[float | Schedule, Rate()]


def check_fields(value: Any, scheduled: Collection[str] = ()) -> None:
    """Check a frozen dataclass's own hyperparameters, and store them as their kinds do.

    scheduled: names of those whose values are found, and checked, step by step. TypeError or
    ValueError where one does not fit.
    """
    for name, where, kind, default in _checks(type(value)):  # type: ignore[arg-type]
        given = getattr(value, name)
        if given is not default:
            check = _check_scheduled if name in scheduled else check_field
            object.__setattr__(value, name, check(where, kind, given))


@functools.cache
def _checks(cls: Any) -> list[tuple[str, str, Any, Any]]:
    """Return each field's name, how messages call it, its kind, and a default that needs no check.

    A rule is made whenever a learning rate is set: three quarters of that were checks of defaults.
    """
    found = []
    for field in fields(cls):
        if field.init:
            where, kind = f"{cls.__name__}({field.name})", _kinds(cls)[field.name]
            kept = field.default if _is_checked(where, kind, field.default) else MISSING
            found.append((field.name, where, kind, kept))
    return found


def _is_checked(where: str, kind: Any, default: Any) -> bool:
    """Whether a default is what a check would make of it."""
    try:
        return repr(check_field(where, kind, default)) == repr(default)
    except (TypeError, ValueError):  # a field without one, or of a rule of one's own
        return False


def _check_scheduled(where: str, annotation: Any, value: Any) -> Any:
    """Return a schedule, or a tuple with some; TypeError or ValueError where a number there does
    not fit."""
    if callable(value):
        return value
    kind = typing.get_args(annotation)[1]
    if len(value) != kind.length:
        return kind.accept(where, value)  # which refuses it
    return tuple(
        v if callable(v) else kind.each.accept(f"{where}[{k}]", v) for k, v in enumerate(value)
    )


@functools.cache
def _kinds(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


@functools.cache
def field_names(cls: Any) -> tuple[str, ...]:
    """Return the names of a rule's hyperparameters."""
    return tuple(field.name for field in fields(cls))


def number_names(cls: Any) -> tuple[str, ...]:
    """Return the names of a rule's hyperparameters that are numbers, or tuples of them."""
    return _number_names(cls)  # type: ignore[arg-type,unused-ignore]


@functools.cache
def _number_names(cls: Any) -> tuple[str, ...]:
    kinds = _kinds(cls)
    return tuple(field.name for field in fields(cls) if _is_number(kinds[field.name]))


def _is_number(annotation: Any) -> bool:
    if typing.get_origin(annotation) is not Annotated:
        return annotation is float  # of a user's own rule
    kind = typing.get_args(annotation)[1]
    each = kind.each if isinstance(kind, Numbers) else kind
    return isinstance(each, Number) and not each.integer


def check_number(rule: Any, name: str, value: Any, when: str = "") -> Any:
    """Return a value of a hyperparameter that is a number, or a tuple of them, as it is stored.

    TypeError or ValueError where it does not fit. when: what a message says behind the name.
    """
    where, kind = _number_kinds(type(rule))[name]  # type: ignore[arg-type]
    return kind.accept(where + when, value)


@functools.cache
def _number_kinds(cls: Any) -> dict[str, tuple[str, Any]]:
    """Return how messages call each hyperparameter that takes a number, and its kind."""
    kinds = _kinds(cls)
    return {
        name: (f"{cls.__name__}({name})", _kind(kinds[name]))
        for name in ("lr", *_number_names(cls))
    }


def kinds_of_numbers(cls: Any) -> dict[str, Number]:
    """Return what a learning rate and each hyperparameter that is a number, or a tuple of them,
    accepts as a number."""
    kinds = {name: _kind(_kinds(cls)[name]) for name in number_names(cls)}
    own = {k: v.each if isinstance(v, Numbers) else v for k, v in kinds.items()}
    return {"lr": NONNEGATIVE, **own}


def _kind(annotation: Any) -> Any:
    if typing.get_origin(annotation) is Annotated:
        return typing.get_args(annotation)[1]
    return Number(low=-math.inf, integer=annotation is int)  # of a user's own rule


def in_step(rule: Any, name: str, step: int) -> Any:
    """Return the value of a hyperparameter in a step; TypeError or ValueError where its schedule
    gives none that fits."""
    value = getattr(rule, name)
    if isinstance(value, tuple):
        value = tuple(each(step) if callable(each) else each for each in value)
    elif callable(value):
        value = value(step)
    return check_number(rule, name, value, f" at step {step}")


def check_field(where: str, annotation: Any, value: Any) -> Any:
    """`value` as the field's kind stores it; TypeError or ValueError where it does not fit."""
    if typing.get_origin(annotation) is Annotated or annotation in (float, int):
        return _kind(annotation).accept(where, value)
    if typing.get_origin(annotation) is Literal:
        accepted = typing.get_args(annotation)
        if not any(value is a or (isinstance(a, str) and value == a) for a in accepted):
            raise ValueError(f"{where}: expected one of {accepted}, got {value!r}")
    elif annotation is bool and not isinstance(value, bool):
        raise TypeError(f"{where}: expected True or False, got {value!r}")
    return value
