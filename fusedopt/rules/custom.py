"""Rules of the user's own, from one scalar function."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from types import FunctionType
from typing import Any, dataclass_transform

import numpy as np

from ..programs.arithmetic import Array, Pooling, Sums, plain, summed
from ..programs.element_source import inexact, on_arrays
from ..programs.program import AXES
from .base import Rule

_RESERVED = {
    *("hessian", "work", "master", "low", "compensation", "average", "slow_weights"),
    *("clipped", "before", "update", "weight", "gradient"),
}
"""Names that an optimizer gives to arrays of its own."""


def _numbers(where: str, values: Any) -> tuple[float, ...]:
    """Return a tuple of numbers; TypeError for anything else."""
    if not isinstance(values, tuple) or not all(isinstance(x, (int, float)) for x in values):
        raise TypeError(f"{where}: expected a tuple of floats, got {values!r}")
    return values


@dataclass_transform(frozen_default=True, kw_only_default=True)
class CustomRule(Rule):
    """A rule of your own: fields, `scalars` and `element` are all that it takes.

    Parameters
    ----------
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    A subclass is made a frozen dataclass with keyword-only fields (of those annotated float or int
    the values are checked), beside `lr`, `weight_decay`, `decay` and `maximize`, which every rule
    has and which `element` need not know. Numba compiles `element` at first use.

    scalars(t, lr): a tuple of floats, folded in float64 once for each step of a leaf; t is 1 in the
    first. element(p, g, states, scalars): a static method on numbers of one type, float32 or
    float64, the parameter, the gradient, each state and each scalar in turn; the states are named
    here, between g and the scalars. It returns the delta, which is subtracted from the parameter,
    and behind it the new value of each state; without states the delta alone. Constants come in
    through the scalars: 0.5 x is a float64.

    A rule may read sums over the parameter, such as norms: `measure`, a static method on the
    parameters of `element` before those sums are known, returns a tuple of what each element adds,
    and `measured(t, lr, sums)` makes scalars of the sums, which `element` takes behind the others.
    Each step measures all parameters before it writes anything. `measure` computes in float64
    and sees the gradient with clipping and weight decay of the form "l2"; 1.0 adds up to the number
    of elements. A parameter is then updated as a whole: `Rows` are refused. With the class
    attribute `maxima` = 1 the last of these values is no sum but the largest, with 2 the last two.
    `over` = "group" takes all over the parameter group, "optimizer" over all groups of this rule.

    `over` = "row" takes them over each row, what one index of the first axis selects, and "column"
    over each column, what one of the last axis selects; of a parameter with one axis that is all of
    it. Each sum is then an array with a number for each row or column, and `measured` returns such
    arrays or numbers, of which its own go to `element`; `Rows` update the rows that they have. Rows
    are to be dense in memory, as in C order, and columns as in Fortran order; storage formats with
    blocks or random bits take none that they would cut.

    `kept` names numbers that a rule over more than a parameter keeps from step to step: `scalars`
    and `measured` take them as further arguments, `measured` returns their new values behind the
    scalars, and `initial` gives the first ones. Groups that share them may differ in `lr`,
    `weight_decay`, `decay` and `maximize` alone.

    `nonnegative` names states that are never negative, `initial` gives the value that states start
    with, `textbook` the reference for `verify` and the backend "reference"; by default that is
    `element` itself, in float64 on whole arrays, which cannot branch. `sqrt` comes from `math`;
    `fusedopt.programs.elements` has a quotient that is 0 where the denominator is, `maximum` and
    `clamp`.

    The bits are the same on every machine as long as `element` keeps to + - * / sqrt, comparison
    and selection; `Optimizer.describe` says where it does not.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> class SignMomentum(fo.CustomRule):
    ...     beta: float = 0.9
    ...
    ...     def scalars(self, t, lr):
    ...         return self.beta, 1 - self.beta, lr
    ...
    ...     @staticmethod
    ...     def element(p, g, m, beta, rest, lr):
    ...         m = beta * m + rest * g
    ...         return (lr if m > 0 else -lr), m
    >>> SignMomentum(lr=0.1).states
    ('m',)

    LARS, whose steps are a share of the parameter's norm:

    >>> class LARS(fo.CustomRule):
    ...     momentum: float = 0.9
    ...     trust: float = 1e-3
    ...
    ...     def scalars(self, t, lr):
    ...         return (self.momentum,)
    ...
    ...     @staticmethod
    ...     def measure(p, g, v, momentum):
    ...         return p * p, g * g
    ...
    ...     def measured(self, t, lr, sums):
    ...         p, g = sums
    ...         return (lr * self.trust * (p / g) ** 0.5 if p and g else lr,)
    ...
    ...     @staticmethod
    ...     def element(p, g, v, momentum, rate):
    ...         v = momentum * v + rate * g
    ...         return v, v
    >>> p, g = np.array([3.0, 4.0]), np.array([0.0, 1000.0])
    >>> rule = LARS(lr=1.0, trust=0.1)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))
    [3.  3.5]
    """

    name = "custom"
    kernel = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__.lower()
        for name in ("element", "measure"):
            own = cls.__dict__.get(name)
            if isinstance(own, FunctionType):
                setattr(cls, name, staticmethod(own))
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    @property
    def states(self) -> tuple[str, ...]:
        return self._states

    @functools.cached_property
    def _states(self) -> tuple[str, ...]:
        where = type(self).__name__
        self._check_attributes()
        scalars = _numbers(f"{where}.scalars", self.folded(1, 0.1))
        if self.measure is not None:
            ahead = self._parameters("measure", len(scalars), "`scalars` returns")
            sums = self.measure(*[1.0] * (2 + len(ahead) + len(scalars)))
            sums = _numbers(f"{where}.measure", sums)
            if not 0 <= self.maxima <= len(sums):
                raise ValueError(
                    f"{where}.maxima: expected at most the {len(sums)} values of `measure`, got"
                    f" {self.maxima!r}"
                )
            if self.over in AXES:
                scalars += (1.0,) * self.measured_count(len(sums))
            else:
                begun = tuple(map(self.initial, self.kept))
                found = self.measured(1, 0.1, (1.0,) * len(sums), *begun)
                scalars += _numbers(f"{where}.measured", found)[: len(found) - len(begun)]
        origin = "`scalars` returns" if self.measure is None else "`scalars` and `measured` return"
        states = self._parameters("element", len(scalars), origin)
        if self.measure is not None and ahead != states:
            raise TypeError(
                f"{where}.measure: expected the states of `element`, {states}, between g and the"
                f" scalars, got {ahead}"
            )
        for state in states:
            if state in _RESERVED:
                raise ValueError(f"{where}.element: a state cannot be called {state!r}")
        return states

    def _check_attributes(self) -> None:
        """Raise ValueError where what a class says of its sums does not fit."""
        where = type(self).__name__
        if self.over not in (*AXES, "parameter", "group", "optimizer"):
            raise ValueError(
                f"{where}.over: expected 'row', 'column', 'parameter', 'group' or 'optimizer', got"
                f" {self.over!r}"
            )
        if self.measure is None and (self.over != "parameter" or self.maxima or self.kept):
            raise ValueError(f"{where}: `over`, `maxima` and `kept` are for rules that `measure`")
        if self.kept and not self.pooled:
            raise ValueError(
                f"{where}.kept: numbers are kept over a group or an optimizer; take a state of the"
                " parameter's shape, or over = 'group'"
            )
        for name in self.kept:
            if name in _RESERVED:
                raise ValueError(f"{where}.kept: a number cannot be called {name!r}")

    def _parameters(self, name: str, scalars: int, origin: str) -> tuple[str, ...]:
        """Return the states that a function names between g and as many scalars."""
        where, function = f"{type(self).__name__}.{name}", getattr(self, name)
        if not isinstance(function, FunctionType):
            raise TypeError(f"{where}: expected a function, got {function!r}")
        parameters = inspect.signature(function).parameters.values()
        names = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
        if len(names) != len(parameters) or names[:2] != ["p", "g"]:
            raise TypeError(f"{where}: expected parameters (p, g, ...), got {names}")
        count = len(names) - 2 - scalars
        if count < 0:
            raise TypeError(
                f"{where}: takes {len(names) - 2} parameters behind p and g, but {origin}"
                f" {scalars} values; each has a parameter of its own"
            )
        return tuple(names[2 : 2 + count])

    def textbook_over(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float, pool: Pooling
    ) -> tuple[Array, tuple[Array, ...]]:
        count = len(self.states)
        states, sides = states[:count], states[count:]
        kept = [plain(side).item() for side in sides]
        scalars = self.scalars(t, lr, *kept)
        try:
            if self.measure is not None:
                arrays = map(plain, (p, g, *states))
                addends = on_arrays(self.measure)(*arrays, *scalars)
                sums = pool(self._measured_of(addends, p.shape))
                if self.over in AXES:
                    found = tuple(self.from_sums(t, lr, np.array(sums)[:, None])[:, 0].tolist())
                else:
                    found = self.measured(t, lr, sums, *kept)
                scalars += tuple([summed(x, p) for x in found[: len(found) - len(kept)]])
                # In arrays that know their rounding where the others do.
                sides = tuple(
                    0.0 * side + number
                    for side, number in zip(sides, found[len(found) - len(kept) :], strict=True)
                )
            result = on_arrays(self.element)(p, g, *states, *scalars)
        except (TypeError, ValueError) as error:
            where = type(self).__name__
            raise TypeError(
                f"{where}.textbook: {where}.element does not work on whole arrays ({error}); define"
                f" `textbook`, which returns the delta and a tuple of the states, in plain NumPy"
                f" without branches: np.where, np.maximum, np.minimum, np.sign"
            ) from error
        return (result[0], (*result[1:], *sides)) if self.states else (result, sides)

    def _measured_of(self, addends: tuple[Array, ...], shape: tuple[int, ...]) -> Sums:
        """The sums and maxima of what the elements of an array add."""
        whole = [np.broadcast_to(x, shape) for x in addends]
        sums = len(whole) - self.maxima
        return (
            *[float(np.sum(x)) for x in whole[:sums]],
            *[float(np.max(x, initial=-np.inf)) for x in whole[sums:]],
        )

    def note(self, shape: tuple[int, ...]) -> str:
        called = sorted(set(inexact(self.element)))
        beyond = f"; {', '.join(called)} may give other bits on other machines" if called else ""
        own = f", with sums of each {self.over}" if self.program.axis is not None else ""
        return f"{type(self).__name__}: its element function, compiled by Numba{own}{beyond}"
