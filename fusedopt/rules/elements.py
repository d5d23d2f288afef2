"""What the rules' scalar `element` functions share.

An element function is one kernel of csrc/rules.hpp in Python, with the same order of operations:
`element(p, g, *states, *scalars)` returns the delta to subtract, and behind it in a tuple the new
values of the states that the kernel writes (a kernel without states returns the delta alone). An
operation that is no rule takes its operands and scalars, and returns the new value of the first.

Plain Python on numbers of one type, float32 or float64, for a just-in-time compiler: it may call
functions like those here. No constants but in comparisons: 0.5 x would be a float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Element = Callable[..., Any]


def quotient(numerator: float, denominator: float) -> float:
    """No step, rather than NaN, where nothing was ever accumulated and eps is zero."""
    result = numerator / denominator
    return denominator if denominator == 0 else result


def maximum(a: float, b: float) -> float:
    """A NaN in either operand stays visible."""
    return b if (b > a) | (b != b) else a


def clamp(x: float, limit: float) -> float:
    """x within [-limit, limit]; NaN stays NaN."""
    return limit if x > limit else (-limit if x < -limit else x)
