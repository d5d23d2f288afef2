"""Explain what is wrong with a user's element function."""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

import numpy as np
from numba.core.errors import NumbaError

from .compiler import returned


@functools.cache
def check_element(element: FunctionType, dtype: np.dtype, states: int, scalars: int) -> None:
    """Raise TypeError where a rule's element function does not compile or returns the wrong things.

    It is to return the delta and the new states, in numbers of the dtype.
    """
    code = element.__code__
    where = f"{element.__qualname__} ({code.co_filename}, line {code.co_firstlineno})"
    arguments = 2 + states + scalars
    try:
        kinds = returned(element, dtype, arguments)
    except NumbaError as error:
        raise TypeError(
            f"{where}: Numba cannot compile it for {dtype.name} numbers. It may use numbers,"
            f" comparisons, `math` and functions of the same kind, but no other Python objects."
            f" {_essence(error)}"
        ) from error
    if len(kinds) != 1 + states:
        expected = "the delta alone" if not states else f"the delta and {states} new states"
        raise TypeError(
            f"{where}: expected it to return {1 + states} values ({expected}; parameters between g"
            f" and the {scalars} scalars are states), got {len(kinds)}"
        )
    for k, kind in enumerate(kinds):
        if kind != dtype.name:
            what = code.co_varnames[1 + k] if k else "the delta"
            remedy = ""
            if kind == "float64":
                remedy = (
                    ". A constant in the text, such as 0.5, is a float64, and makes one of all that"
                    " it touches: return it from `scalars`, and take it as a parameter"
                )
            raise TypeError(f"{where}: {what} is {kind} where all else is {dtype.name}{remedy}")


@functools.cache
def check_measure(element: FunctionType, states: int, scalars: int, sums: int) -> None:
    """Raise TypeError where what a rule measures does not compile or is not a tuple of numbers."""
    code = element.__code__
    where = f"{element.__qualname__} ({code.co_filename}, line {code.co_firstlineno})"
    try:
        kinds = returned(element, np.dtype(np.float64), 2 + states + scalars)
    except NumbaError as error:
        raise TypeError(
            f"{where}: Numba cannot compile it for float64 numbers. It may use numbers,"
            f" comparisons, `math` and functions of the same kind, but no other Python objects."
            f" {_essence(error)}"
        ) from error
    for k, kind in enumerate(kinds):
        if kind != "float64":
            raise TypeError(
                f"{where}: value {k} of the {sums} that it returns is {kind}; expected a float64,"
                " such as 1.0 for a count"
            )


def _essence(error: Any) -> str:
    """The lines of Numba's message that speak of the user's code."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [
        line
        for line in lines
        if line
        and not line.startswith(("Failed in", "During", "-", ">>>", "There are", "Overload"))
    ]
    return "Numba says: " + " ".join(telling[:4])
