"""Adam and AdamW."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import expm1, inf, log, sqrt
from typing import Literal

import numpy as np

from ..programs.arithmetic import Array, correction, ratio, textbook_correction
from ..programs.elements import Element, maximum, moments, quotient
from .base import DecayForm, Rule
from .hyperparameters import Betas, LearningRate, NonNegative


def adam(p, g, m, v, b1, one_b1, b2, one_b2, step, eps_root, eps):
    m, v = moments(g, m, v, b1, one_b1, b2, one_b2)
    return quotient(step * m, sqrt(v + eps_root) + eps), m, v


def adam_nesterov(p, g, m, v, b1, one_b1, b2, one_b2, step, eps_root, eps, step_g):
    m, v = moments(g, m, v, b1, one_b1, b2, one_b2)
    return quotient(step * m + step_g * g, sqrt(v + eps_root) + eps), m, v


def adam_amsgrad(p, g, m, v, x, b1, one_b1, b2, one_b2, step, eps_root, eps, k):
    m, v = moments(g, m, v, b1, one_b1, b2, one_b2)
    x = maximum(x, k * v)
    return quotient(step * m, sqrt(x + eps_root) + eps), m, v, x


_ELEMENTS: dict[str, Element] = {f.__name__: f for f in (adam, adam_nesterov, adam_amsgrad)}


@dataclass(frozen=True, kw_only=True)
class Adam(Rule):
    """Adaptive moment estimation.

    Parameters
    ----------
    betas : pair of float
        Decay rates b1 and b2 in [0, 1) of the averages of the gradient and of its square;
        default (0.9, 0.999).
    eps : float
        Number >= 0 added to the root in the denominator; default 1e-8.
    eps_root : float
        Number >= 0 added inside the root; default 0.
    hat : bool
        Add eps to the uncorrected root, as the paper's efficient form does; default False.
    amsgrad : {False, "raw", "corrected"}
        Divide by the largest v so far, as it is or bias-corrected; default False.
    nesterov : bool
        Look one step ahead with the first moment; default False.
    bias_correction : bool
        Divide m and v by their bias; default True.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        m := b1 m + (1 - b1) g,  v := b2 v + (1 - b2) g^2,  c1 = 1 - b1^t,  c2 = 1 - b2^t
        p := p - lr (m / c1) / (sqrt(v / c2 + eps_root) + eps)

    `hat`: p := p - lr (sqrt(c2) / c1) m / (sqrt(v + eps_root) + eps), the paper's efficient form
    and Keras's. `amsgrad`: "raw" divides by the largest v so far (PyTorch, Keras), "corrected" by
    the largest v / c2 (optax). `nesterov`: b1 m / (1 - b1^(t+1)) + (1 - b1) g / c1 stands for m /
    c1. `bias_correction=False`: c1 = c2 = 1.

    States: m, v, and x with `amsgrad`.

    References
    ----------
    "The Evolution of AdamW", eq. (14)-(17); Kingma & Ba 2015, algorithm 1; Reddi et al. 2018
    (amsgrad); Dozat 2016 (nesterov).

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.01, 100.0])
    >>> rule = fo.Adam(lr=0.1)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))
    [0.9 0.9]
    """

    name = "adam"
    year = 2014
    settled = ("amsgrad",)
    examples = (
        {},
        {"eps_root": 1e-6},
        {"hat": True},
        {"amsgrad": "raw"},
        {"amsgrad": "corrected", "eps_root": 1e-6},
        {"nesterov": True},
        {"bias_correction": False},
    )

    lr: LearningRate = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: NonNegative = 1e-8
    eps_root: NonNegative = 0.0
    hat: bool = False
    amsgrad: Literal[False, "raw", "corrected"] = False
    nesterov: bool = False
    bias_correction: bool = True

    def check_together(self) -> None:
        if self.amsgrad and (self.nesterov or (self.hat and self.amsgrad != "raw")):
            other = "nesterov" if self.nesterov else "hat"
            raise ValueError(
                f"{type(self).__name__}(amsgrad): {self.amsgrad!r} does not go with {other}"
            )

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "v", "x") if self.amsgrad else ("m", "v")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("v", "x"))

    @property
    def kernel(self) -> str:
        return "adam" + "_amsgrad" * bool(self.amsgrad) + "_nesterov" * self.nesterov

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        b1, one_b1, b2, one_b2, log_b1, log_b2 = self._folded
        c1 = c2 = 1.0
        if self.bias_correction:  # `correction` without two logarithms and two calls
            c1, c2 = -expm1(t * log_b1), -expm1(t * log_b2)
        # The constants move out of the root: see the struct.
        inner = 1.0 if self.amsgrad == "corrected" else c2
        root = sqrt(inner)
        step, eps_root, eps = lr * root / c1, self.eps_root, self.eps
        if not self.hat:
            eps_root, eps = eps_root * inner, eps * root
        if self.nesterov:
            ahead = correction(b1, t + 1) if self.bias_correction else 1.0
            step, step_g = lr * root * b1 / ahead, step * one_b1
            return b1, one_b1, b2, one_b2, step, eps_root, eps, step_g
        if self.amsgrad:
            return b1, one_b1, b2, one_b2, step, eps_root, eps, inner / c2
        return b1, one_b1, b2, one_b2, step, eps_root, eps

    @property
    def element(self) -> Element:
        return _ELEMENTS[self.kernel]

    @functools.cached_property
    def _folded(self) -> tuple[float, ...]:
        b1, b2 = self.betas
        log_b1, log_b2 = log(b1) if b1 else -inf, log(b2) if b2 else -inf
        return b1, 1.0 - b1, b2, 1.0 - b2, log_b1, log_b2

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        b1, b2 = self.betas
        m = b1 * states[0] + (1 - b1) * g
        v = b2 * states[1] + (1 - b2) * (g * g)
        c1 = c2 = c1_next = 1.0
        if self.bias_correction:
            c1, c2, c1_next = (
                textbook_correction(b, s) for b, s in ((b1, t), (b2, t), (b1, t + 1))
            )
        m_hat = b1 * m / c1_next + (1 - b1) * g / c1 if self.nesterov else m / c1
        new: tuple[Array, ...] = (m, v)
        largest = v
        if self.amsgrad:
            largest = np.maximum(states[2], v if self.amsgrad == "raw" else v / c2)
            new += (largest,)
        if self.hat:
            alpha = lr * c2**0.5
            return ratio(alpha * m_hat, np.sqrt(largest + self.eps_root) + self.eps), new
        v_hat = largest if self.amsgrad == "corrected" else largest / c2
        return ratio(lr * m_hat, np.sqrt(v_hat + self.eps_root) + self.eps), new


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay: p := p - lr (adam's step) - lr lambda p.

    Parameters
    ----------
    betas, eps, eps_root, hat, amsgrad, nesterov, bias_correction
        As in `Adam`.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    States as Adam's.

    References
    ----------
    "The Evolution of AdamW", eq. (18); Loshchilov & Hutter 2019.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.0, 100.0])
    >>> rule = fo.AdamW(lr=0.1, weight_decay=0.5)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))
    [0.95 0.85]
    """

    name = "adamw"
    year = 2017

    weight_decay: NonNegative = 1e-2
    decay: DecayForm = "decoupled"
