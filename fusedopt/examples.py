"""Rules written as you would write your own: fields, `scalars`, `element`. Numba compiles them.

`import fusedopt as fo; fo.Optimizer(params, fo.examples.AdaBelief(lr=1e-3))`. `textbook` is the
equation in plain NumPy: what `verify=True` holds the compiled step to, and the only part that can
be left out. All three are built in too, as `fusedopt.AdaBelief`, `ADOPT` and `AdEMAMix`, compiled
beforehand: these show how little a rule of your own takes.
"""

from __future__ import annotations

from math import exp, log, sqrt
from typing import Any

import numpy as np

from .programs.arithmetic import ratio
from .programs.elements import clamp, maximum, quotient
from .rules import CustomRule
from .rules.hyperparameters import Betas, Count, Fraction, NonNegative

__all__ = ["ADOPT", "AdEMAMix", "AdaBelief"]


class AdaBelief(CustomRule):
    """Adam with the variance about the mean in place of the mean square.

    Notes
    -----
    ::

        m := b1 m + (1 - b1) g,  s := b2 s + (1 - b2) (g - m)^2 + eps_root
        p := p - lr (m / c1) / (sqrt(s / c2) + eps),  c1 = 1 - b1^t,  c2 = 1 - b2^t

    States: m, s.

    References
    ----------
    Zhuang et al. 2020, algorithm 2; optax's `adabelief`.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.01, 100.0])
    >>> rule = fo.examples.AdaBelief(lr=0.1)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))  # nothing was expected: belief is low, and steps are Adam's / 0.9
    [0.888889 0.888889]
    """

    betas: Betas = (0.9, 0.999)
    eps: NonNegative = 1e-16
    eps_root: NonNegative = 1e-16
    nonnegative = frozenset(("s",))

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        b1, b2 = self.betas
        c1, root = 1 - b1**t, sqrt(1 - b2**t)
        return b1, 1 - b1, b2, 1 - b2, lr * root / c1, self.eps_root, self.eps * root

    @staticmethod
    def element(
        p: float,
        g: float,
        m: float,
        s: float,
        b1: float,
        one_b1: float,
        b2: float,
        one_b2: float,
        step: float,
        eps_root: float,
        eps: float,
    ) -> tuple[float, float, float]:
        m = b1 * m + one_b1 * g
        off = g - m
        s = b2 * s + one_b2 * (off * off) + eps_root
        return quotient(step * m, sqrt(s) + eps), m, s

    def textbook(
        self, p: Any, g: Any, states: tuple[Any, ...], *, t: int, lr: float
    ) -> tuple[Any, tuple[Any, ...]]:
        m, s = states
        b1, b2 = self.betas
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * (g - m) * (g - m) + self.eps_root
        m_hat, s_hat = m / (1 - b1**t), s / (1 - b2**t)
        return ratio(lr * m_hat, np.sqrt(s_hat) + self.eps), (m, s)


class ADOPT(CustomRule):
    """Adam that converges with any b2: v divides before it takes the gradient in.

    Notes
    -----
    ::

        t = 1:  v := g^2, and p stays
        t > 1:  n = g / max(sqrt(v), eps), clipped to +-(t - 1)^(1/4)
                m := b1 m + (1 - b1) n,  p := p - lr m,  v := b2 v + (1 - b2) g^2

    States: m, v.

    References
    ----------
    Taniguchi et al. 2024, algorithm 2 (clipped); optax's `contrib.adopt`.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.01, 100.0])
    >>> rule = fo.examples.ADOPT(lr=0.1)
    >>> states = rule.init(p)
    >>> for t in (1, 2):
    ...     fo.update(rule, t, p, g, *states)
    >>> print(p.round(6))
    [0.99 0.99]
    """

    betas: Betas = (0.9, 0.9999)
    eps: NonNegative = 1e-6
    nonnegative = frozenset(("v",))

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        b1, b2 = self.betas if t > 1 else (1.0, 0.0)
        return b1, 1 - b1, b2, 1 - b2, lr, self.eps, (t - 1) ** 0.25

    @staticmethod
    def element(
        p: float,
        g: float,
        m: float,
        v: float,
        b1: float,
        one_b1: float,
        b2: float,
        one_b2: float,
        lr: float,
        eps: float,
        limit: float,
    ) -> tuple[float, float, float]:
        m = b1 * m + one_b1 * clamp(g / maximum(sqrt(v), eps), limit)
        return lr * m, m, b2 * v + one_b2 * (g * g)

    def textbook(
        self, p: Any, g: Any, states: tuple[Any, ...], *, t: int, lr: float
    ) -> tuple[Any, tuple[Any, ...]]:
        m, v = states
        b1, b2 = self.betas
        if t == 1:
            return 0.0 * g, (m, g * g)
        limit = (t - 1) ** 0.25
        n = np.minimum(np.maximum(g / np.maximum(np.sqrt(v), self.eps), -limit), limit)
        m = b1 * m + (1 - b1) * n
        return lr * m, (m, b2 * v + (1 - b2) * (g * g))


class AdEMAMix(CustomRule):
    """AdamW with a second, much slower mean of the gradients.

    Notes
    -----
    ::

        m := b1 m + (1 - b1) g,  slow := b3 slow + (1 - b3) g,  v := b2 v + (1 - b2) g^2
        p := p - lr (m / c1 + alpha slow) / (sqrt(v / c2) + eps)

    In the first `warmup` steps alpha grows linearly, and b3 from b1 on so that the mean's half-life
    does.

    States: m, slow, v.

    References
    ----------
    Pagliardini et al. 2024, algorithm 1; optax's `contrib.ademamix`.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.01, 100.0])
    >>> rule = fo.examples.AdEMAMix(lr=0.1)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))
    [0.89995 0.89995]
    """

    b1: Fraction = 0.9
    b2: Fraction = 0.999
    b3: Fraction = 0.9999
    alpha: NonNegative = 5.0
    eps: NonNegative = 1e-8
    warmup: Count = 1
    nonnegative = frozenset(("v",))

    def mixture(self, t: int) -> tuple[float, float]:
        """alpha and b3 of a step."""
        share = min(t / self.warmup, 1.0)
        if share == 1.0:
            return self.alpha, self.b3
        first, last = (-1 / log(b) if b else 0.0 for b in (self.b1, self.b3))
        life = (1 - share) * first + share * last
        return share * self.alpha, exp(-1 / life) if life else 0.0

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        alpha, b3 = self.mixture(t)
        b1, b2 = self.b1, self.b2
        c1, root = 1 - b1**t, sqrt(1 - b2**t)
        step, slow_step = lr * root / c1, lr * root * alpha
        return b1, 1 - b1, b3, 1 - b3, b2, 1 - b2, step, slow_step, self.eps * root

    @staticmethod
    def element(
        p: float,
        g: float,
        m: float,
        slow: float,
        v: float,
        b1: float,
        one_b1: float,
        b3: float,
        one_b3: float,
        b2: float,
        one_b2: float,
        step: float,
        slow_step: float,
        eps: float,
    ) -> tuple[float, float, float, float]:
        m = b1 * m + one_b1 * g
        slow = b3 * slow + one_b3 * g
        v = b2 * v + one_b2 * (g * g)
        return quotient(step * m + slow_step * slow, sqrt(v) + eps), m, slow, v

    def textbook(
        self, p: Any, g: Any, states: tuple[Any, ...], *, t: int, lr: float
    ) -> tuple[Any, tuple[Any, ...]]:
        m, slow, v = states
        alpha, b3 = self.mixture(t)
        m = self.b1 * m + (1 - self.b1) * g
        slow = b3 * slow + (1 - b3) * g
        v = self.b2 * v + (1 - self.b2) * (g * g)
        m_hat, v_hat = m / (1 - self.b1**t), v / (1 - self.b2**t)
        mixed = lr * (m_hat + alpha * slow)
        return ratio(mixed, np.sqrt(v_hat) + self.eps), (m, slow, v)
