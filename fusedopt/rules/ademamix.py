"""AdEMAMix."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log, sqrt

import numpy as np

from ..programs.arithmetic import Array, correction, ratio, textbook_correction
from ..programs.elements import quotient
from .base import DecayForm, Rule
from .hyperparameters import Count, LearningRate, NonNegative, ThreeBetas


@dataclass(frozen=True, kw_only=True)
class AdEMAMix(Rule):
    """AdamW with a second, much slower mean of the gradients.

    Parameters
    ----------
    betas : triple of float
        Decay rates b1, b2 and b3 in [0, 1) of m, v and slow; default (0.9, 0.999, 0.9999).
    alpha : float
        Weight >= 0 of the slow average; default 5.
    eps : float
        Number >= 0 added to the root in the denominator; default 1e-8.
    warmup : int
        Number of steps, at least 1, in which alpha and b3 grow; default 1.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        m := b1 m + (1 - b1) g,  slow := b3 slow + (1 - b3) g,  v := b2 v + (1 - b2) g^2
        p := p - lr (m / c1 + alpha slow) / (sqrt(v / c2) + eps),  c1 = 1 - b1^t,  c2 = 1 - b2^t

    `betas` are b1, b2, b3. In the first `warmup` steps alpha grows linearly, and b3 from b1 on so
    that the logarithm's inverse does.

    States: m, slow, v.

    References
    ----------
    Pagliardini et al. 2024, algorithm 1; optax's `contrib.ademamix`, which has constants there.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.01, 100.0])
    >>> rule = fo.AdEMAMix(lr=0.1)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))
    [0.89995 0.89995]
    """

    name = "ademamix"
    year = 2024
    examples = ({"betas": (0.9, 0.999, 0.99), "warmup": 2},)

    lr: LearningRate = 1e-3
    betas: ThreeBetas = (0.9, 0.999, 0.9999)
    alpha: NonNegative = 5.0
    eps: NonNegative = 1e-8
    warmup: Count = 1
    decay: DecayForm = "decoupled"

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "slow", "v")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("v",))

    def mixture(self, t: int) -> tuple[float, float]:
        """Return alpha and b3 of a step."""
        b1, _, b3 = self.betas
        share = min(t / self.warmup, 1.0)
        if share == 1.0:
            return self.alpha, b3
        first, last = (-1.0 / log(b) if b else 0.0 for b in (b1, b3))
        life = (1.0 - share) * first + share * last
        return share * self.alpha, exp(-1.0 / life) if life else 0.0

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        b1, b2, _ = self.betas
        alpha, b3 = self.mixture(t)
        root = sqrt(correction(b2, t))
        step, slow_step = lr * root / correction(b1, t), lr * root * alpha
        return b1, 1.0 - b1, b3, 1.0 - b3, b2, 1.0 - b2, step, slow_step, self.eps * root

    @staticmethod
    def element(p, g, m, slow, v, b1, one_b1, b3, one_b3, b2, one_b2, step, slow_step, eps):
        m = b1 * m + one_b1 * g
        slow = b3 * slow + one_b3 * g
        v = b2 * v + one_b2 * (g * g)
        return quotient(step * m + slow_step * slow, sqrt(v) + eps), m, slow, v

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        m, slow, v = states
        b1, b2, _ = self.betas
        alpha, b3 = self.mixture(t)
        m = b1 * m + (1 - b1) * g
        slow = b3 * slow + (1 - b3) * g
        v = b2 * v + (1 - b2) * (g * g)
        m_hat, v_hat = m / textbook_correction(b1, t), v / textbook_correction(b2, t)
        return ratio(lr * (m_hat + alpha * slow), np.sqrt(v_hat) + self.eps), (m, slow, v)
