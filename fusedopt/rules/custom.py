"""Rules of the user's own, from one scalar function."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from types import FunctionType
from typing import Any, dataclass_transform

from ..programs.arithmetic import Array
from ..programs.element_source import inexact, on_arrays
from ..programs.program import Operation
from .base import Rule

_RESERVED = {
    *("hessian", "work", "master", "low", "compensation", "average"),
    *("clipped", "before", "update", "weight", "gradient"),
}
"""Names that an optimizer gives to arrays of its own."""


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
    """

    name = "custom"

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__.lower()
        own = cls.__dict__.get("element")
        if isinstance(own, FunctionType):
            cls.element = staticmethod(own)  # type: ignore[method-assign]
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    @property
    def states(self) -> tuple[str, ...]:
        return self._states

    @functools.cached_property
    def _states(self) -> tuple[str, ...]:
        where = type(self).__name__
        if not isinstance(self.element, FunctionType):
            raise TypeError(f"{where}.element: expected a function, got {self.element!r}")
        scalars = self.scalars(1, 0.1)
        if not isinstance(scalars, tuple) or not all(isinstance(s, (int, float)) for s in scalars):
            raise TypeError(f"{where}.scalars: expected a tuple of floats, got {scalars!r}")
        parameters = inspect.signature(self.element).parameters.values()
        names = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
        if len(names) != len(parameters) or names[:2] != ["p", "g"]:
            raise TypeError(f"{where}.element: expected parameters (p, g, ...), got {names}")
        count = len(names) - 2 - len(scalars)
        if count < 0:
            raise TypeError(
                f"{where}.element: takes {len(names) - 2} parameters behind p and g, but `scalars`"
                f" returns {len(scalars)} values; each has a parameter of its own"
            )
        states = tuple(names[2 : 2 + count])
        for state in states:
            if state in _RESERVED:
                raise ValueError(f"{where}.element: a state cannot be called {state!r}")
        return states

    def operations(self) -> tuple[Operation, ...]:
        return (Operation(None, ("p", "g", *self.states), self.scalars, element=self.element),)

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        try:
            result = on_arrays(self.element)(p, g, *states, *self.scalars(t, lr))
        except (TypeError, ValueError) as error:
            where = type(self).__name__
            raise TypeError(
                f"{where}.textbook: {where}.element does not work on whole arrays ({error}); define"
                f" `textbook`, which returns the delta and a tuple of the states, in plain NumPy"
                f" without branches: np.where, np.maximum, np.minimum, np.sign"
            ) from error
        return (result[0], tuple(result[1:])) if self.states else (result, ())

    def note(self, shape: tuple[int, ...]) -> str:
        called = sorted(set(inexact(self.element)))
        beyond = f"; {', '.join(called)} may give other bits on other machines" if called else ""
        return f"{type(self).__name__}: its element function, compiled by Numba{beyond}"
