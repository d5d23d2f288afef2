"""Careful NumPy: in place, and in as few passes as its functions allow.

Each function does one step of one tensor: rule, step number (1 first), parameter, gradient, states,
and a scratch array of the tensor's shape, or None to make every temporary anew. They do what a rule
does by default, and weight decay where it is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .problems import Array

States = tuple[Array, ...]


def sgd(rule: Any, t: int, p: Array, g: Array, states: States, s: Array | None) -> None:
    p -= np.multiply(g, rule.lr, out=s)


def momentum(rule: Any, t: int, p: Array, g: Array, states: States, s: Array | None) -> None:
    (v,) = states
    v *= rule.momentum
    v += g
    p -= np.multiply(v, rule.lr, out=s)


def nesterov(rule: Any, t: int, p: Array, g: Array, states: States, s: Array | None) -> None:
    (v,) = states
    v *= rule.momentum
    v += g
    a = np.multiply(v, rule.momentum, out=s)
    a += g
    a *= rule.lr
    p -= a


def adagrad(rule: Any, t: int, p: Array, g: Array, states: States, s: Array | None) -> None:
    (total,) = states
    total += np.multiply(g, g, out=s)
    a = np.sqrt(total, out=s)
    a += rule.eps
    a = np.divide(g, a, out=s)
    a *= rule.lr
    p -= a


def rmsprop(rule: Any, t: int, p: Array, g: Array, states: States, s: Array | None) -> None:
    (v,) = states
    v *= rule.rho
    a = np.multiply(g, g, out=s)
    a *= 1 - rule.rho
    v += a
    a = np.sqrt(v, out=s)
    a += rule.eps
    a = np.divide(g, a, out=s)
    a *= rule.lr
    p -= a


def adam(rule: Any, t: int, p: Array, g: Array, states: States, s: Array | None) -> None:
    m, v = states
    b1, b2 = rule.betas
    root = (1 - b2**t) ** 0.5
    m *= b1
    m += np.multiply(g, 1 - b1, out=s)
    v *= b2
    a = np.multiply(g, g, out=s)
    a *= 1 - b2
    v += a
    a = np.sqrt(v, out=s)
    a += rule.eps * root
    a = np.divide(m, a, out=s)
    a *= rule.lr * root / (1 - b1**t)
    if rule.weight_decay:
        p *= 1 - rule.lr * rule.weight_decay
    p -= a


def lion(rule: Any, t: int, p: Array, g: Array, states: States, s: Array | None) -> None:
    (m,) = states
    b1, b2 = rule.betas
    # b1 m + (1 - b1) g has the sign of m + g (1 - b1) / b1: one pass less.
    a = np.multiply(g, (1 - b1) / b1, out=s)
    a += m
    a = np.sign(a, out=s)
    a *= rule.lr
    if rule.weight_decay:
        p *= 1 - rule.lr * rule.weight_decay
    p -= a
    m *= b2
    m += np.multiply(g, 1 - b2, out=s)


def sophia(rule: Any, t: int, p: Array, g: Array, states: States, s: Array | None) -> None:
    m, h = states
    b1 = rule.betas[0]
    m *= b1
    m += np.multiply(g, 1 - b1, out=s)
    a = np.multiply(h, rule.rho * rule.bs, out=s)
    a += rule.eps
    a = np.divide(m, a, out=s)
    a = np.clip(a, -rule.clip, rule.clip, out=s)
    a *= rule.lr
    p *= 1 - rule.lr * rule.weight_decay
    p -= a


STEPS: dict[str, Callable[[Any, int, Array, Array, States, Array | None], None]] = {
    **{f.__name__: f for f in (sgd, momentum, nesterov, adagrad, rmsprop, adam, lion, sophia)},
    "adamw": adam,
}
"""By the rule's name."""
