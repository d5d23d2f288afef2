"""Scalar functions that the `element` functions of several rules share.

An element function is one kernel of csrc/rules.hpp in Python, with the same order of operations:
`element(p, g, *states, *scalars)` returns the delta to subtract, and behind it in a tuple the new
values of the states that the kernel writes (a kernel without states returns the delta alone). An
operation that is no rule takes its operands and scalars, and returns the new value of the first; a
sum takes what it sums over, and returns what is added.

Plain Python on numbers of one type, float32 or float64, for a just-in-time compiler: it may call
functions like those here. No constants but in comparisons: 0.5 x would be a float64.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

from numpy import float64

Element = Callable[..., Any]


def quotient(numerator: float, denominator: float) -> float:
    """No step, rather than NaN, where nothing was ever accumulated and eps is zero."""
    result = numerator / denominator
    return denominator if denominator == 0 else result


def maximum(a: float, b: float) -> float:
    """A NaN in either operand stays visible."""
    return b if (b > a) | (b != b) else a


def magnitude(x: float) -> float:
    """|x|; NaN stays NaN."""
    return -x if x < 0 else x


def signed_like(size: float, x: float) -> float:
    """The size with the sign of x: x itself where that is zero or NaN."""
    return size if x > 0 else (-size if x < 0 else x)


def agree(x: float, g: float) -> float:
    """1 where both have one sign, else 0, also where one is zero or NaN."""
    return 1.0 if ((x > 0) & (g > 0)) | ((x < 0) & (g < 0)) else 0.0


def clamp(x: float, limit: float) -> float:
    """x within [-limit, limit]; NaN stays NaN."""
    return limit if x > limit else (-limit if x < -limit else x)


def moments(
    g: float, m: float, v: float, b1: float, one_b1: float, b2: float, one_b2: float
) -> tuple[float, float]:
    """Moving averages of the gradient and of its square."""
    return b1 * m + one_b1 * g, b2 * v + one_b2 * (g * g)


# Operations that are no rule, as csrc/rules.hpp has them.


def sophia_refresh_square(h: float, e: float, b2: float, k: float) -> float:
    return b2 * h + k * (e * e)


def average(average: float, x: float, keep: float, gain: float) -> float:
    return keep * average + gain * x


def lerp(average: float, x: float, gain: float) -> float:
    return average + gain * (x - average)


def lookahead(p: float, v: float, mu: float) -> float:
    return p - mu * v


def accumulate(total: float, g: float, keep: float) -> float:
    return g if keep == 0 else total + g


def keep(kept: float, p: float) -> float:
    return p


def clip_value(clipped: float, g: float, factor: float, limit: float) -> float:
    return clamp(factor * g, limit)


def normalize(o: float, v: float, k: float, eps: float) -> float:
    return quotient(o, sqrt(k * v) + eps)


# Sums over a leaf: what an element adds, in float64.


def squares(x: float, scale: float) -> float:
    scaled = float64(scale * x)
    return scaled * scaled


def squared_differences(x: float, y: float) -> float:
    difference = float64(x) - float64(y)
    return difference * difference


def sophia_wins(m: float, h: float, gamma: float, eps: float, clip: float, k: float) -> float:
    r = k * m / (gamma * h + eps)
    return 1.0 if (r < clip) & (r > -clip) else 0.0


def sophia_paper_wins(m: float, h: float, gamma: float, eps: float, clip: float, k: float) -> float:
    r = k * m / maximum(eps, gamma * h)
    return 1.0 if (r < clip) & (r > -clip) else 0.0


ELEMENTS: dict[str, Element] = {
    f.__name__: f
    for f in (
        *(sophia_refresh_square, average, lerp, lookahead, accumulate, keep, clip_value),
        normalize,
        *(squares, squared_differences, sophia_wins, sophia_paper_wins),
    )
}
"""By the kernel's name."""

OF_STATES = frozenset(("sophia_refresh_square", "average", "lerp"))
"""Operations whose first operand is stored as states are, without denormals."""
