"""Careful NumPy: in place, in as few passes as its functions allow, temporaries made beforehand.

Each function does one step of one tensor: rule, step number (1 first), parameter, gradient,
states, and a scratch array of the tensor's shape. They do what a rule does by default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from problems import Array


def adamw(rule: Any, t: int, p: Array, g: Array, states: tuple[Array, ...], a: Array) -> None:
    m, v = states
    b1, b2 = rule.betas
    root = (1 - b2**t) ** 0.5
    m *= b1
    np.multiply(g, 1 - b1, out=a)
    m += a
    v *= b2
    np.multiply(g, g, out=a)
    a *= 1 - b2
    v += a
    np.sqrt(v, out=a)
    a += rule.eps * root
    np.divide(m, a, out=a)
    a *= rule.lr * root / (1 - b1**t)
    p *= 1 - rule.lr * rule.weight_decay
    p -= a


def rmsprop(rule: Any, t: int, p: Array, g: Array, states: tuple[Array, ...], a: Array) -> None:
    (v,) = states
    v *= rule.rho
    np.multiply(g, g, out=a)
    a *= 1 - rule.rho
    v += a
    np.sqrt(v, out=a)
    a += rule.eps
    np.divide(g, a, out=a)
    a *= rule.lr
    p -= a


def lion(rule: Any, t: int, p: Array, g: Array, states: tuple[Array, ...], a: Array) -> None:
    (m,) = states
    b1, b2 = rule.betas
    # b1 m + (1 - b1) g has the sign of m + g (1 - b1) / b1: one pass less.
    np.multiply(g, (1 - b1) / b1, out=a)
    a += m
    np.sign(a, out=a)
    a *= rule.lr
    if rule.weight_decay:
        p *= 1 - rule.lr * rule.weight_decay
    p -= a
    m *= b2
    np.multiply(g, 1 - b2, out=a)
    m += a


def sophia(rule: Any, t: int, p: Array, g: Array, states: tuple[Array, ...], a: Array) -> None:
    m, h = states
    b1 = rule.betas[0]
    m *= b1
    np.multiply(g, 1 - b1, out=a)
    m += a
    np.multiply(h, rule.rho * rule.bs, out=a)
    a += rule.eps
    np.divide(m, a, out=a)
    np.clip(a, -rule.clip, rule.clip, out=a)
    a *= rule.lr
    p *= 1 - rule.lr * rule.weight_decay
    p -= a


STEPS: dict[str, Callable[[Any, int, Array, Array, tuple[Array, ...], Array], None]] = {
    step.__name__: step for step in (adamw, rmsprop, lion, sophia)
}
"""By the rule's name."""
