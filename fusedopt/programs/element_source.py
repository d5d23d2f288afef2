"""Inspect what an element function uses, and make the same function for whole arrays."""

from __future__ import annotations

import dis
import math
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

from . import elements
from .arithmetic import ratio

_EXACT = {
    *(math.sqrt, math.fabs, math.copysign, math.floor, math.ceil, math.trunc),
    *(math.isnan, math.isinf, math.isfinite),
    *(np.sqrt, np.abs, np.copysign, np.floor, np.ceil, np.trunc, np.rint, np.sign),
    *(np.isnan, np.isinf, np.isfinite, np.float32, np.float64),
}
"""Functions whose results are the same on every machine."""

_ARRAYS: dict[Any, Any] = {
    elements.quotient: ratio,
    elements.maximum: np.maximum,
    elements.magnitude: np.abs,
    elements.signed_like: lambda size, x: size * np.sign(x),
    elements.clamp: lambda x, limit: np.minimum(np.maximum(x, -limit), limit),
    math: np,
}
"""NumPy functions that replace scalar functions where an element function works on whole arrays."""


def used_globals(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Return what a function uses of its module, nested functions included."""
    names = dict.fromkeys(name for code in codes(function.__code__) for name in code.co_names)
    known = function.__globals__
    return ((name, known[name]) for name in sorted(names) if name in known)


def codes(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function, and of those within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def on_arrays(function: Any) -> Any:
    """An element function that works on whole arrays."""

    def replaced(value: Any) -> Any:
        if isinstance(value, (FunctionType, ModuleType)) and value in _ARRAYS:
            return _ARRAYS[value]
        if isinstance(value, FunctionType):
            return on_arrays(value)
        if getattr(value, "__module__", None) == "math":
            return getattr(np, value.__name__, value)
        return value

    globals_ = {**function.__globals__, **{n: replaced(v) for n, v in used_globals(function)}}
    return FunctionType(function.__code__, globals_, function.__name__, None, function.__closure__)


def inexact(function: Any) -> Iterator[str]:
    """Return what a function calls that is outside of the contract on bits."""
    for code in codes(function.__code__):
        if any(i.argrepr in ("**", "**=") for i in dis.get_instructions(code)):
            yield "**"
    names = [name for code in codes(function.__code__) for name in code.co_names]
    if "pow" in names:
        yield "pow"
    for _, value in used_globals(function):
        if isinstance(value, FunctionType):
            yield from inexact(value)
        elif isinstance(value, ModuleType):
            found = (getattr(value, name, None) for name in names)
            yield from (f.__name__ for f in found if callable(f) and f not in _EXACT)
        elif callable(value) and value not in _EXACT and not isinstance(value, type):
            yield value.__name__
