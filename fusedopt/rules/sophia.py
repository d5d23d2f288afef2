"""Sophia."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..programs.arithmetic import Array, correction, textbook_correction
from ..programs.elements import Element, clamp, maximum
from ..programs.program import Operation
from .base import DecayForm, Rule
from .hyperparameters import Betas, Count, LearningRate, NonNegative, Normal


def sophia(p, g, m, h, b1, one_b1, lr, gamma, eps, clip, k):
    m = b1 * m + one_b1 * g
    return lr * clamp(k * m / (gamma * h + eps), clip), m


def sophia_paper(p, g, m, h, b1, one_b1, lr, gamma, eps, clip, k):
    m = b1 * m + one_b1 * g
    return lr * clamp(k * m / maximum(eps, gamma * h), clip), m


@dataclass(frozen=True, kw_only=True)
class Sophia(Rule):
    """Second-order clipped steps.

    Parameters
    ----------
    betas : pair of float
        Decay rates b1 and b2 in [0, 1) of the averages of the gradient and of the Hessian's
        diagonal; default (0.965, 0.99).
    rho : float
        Number >= 0 that scales h; default 0.04.
    bs : int
        Number of tokens or samples in the batch; default 5120.
    eps : float
        Number >= 2^-126 added to, or least value of, the denominator; default 1e-15.
    clip : float
        Limit >= 0 of each element's step over lr; default 1.
    form : {"official", "paper"}
        Form of the denominator; default "official".
    estimator : {"gnb", "hutchinson"}
        Kind of the Hessian estimate; default "gnb".
    bias_correction : bool
        Divide m by its bias; default False.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        m := b1 m + (1 - b1) g
        "official"  p := p - lr clip(m / (rho bs h + eps))    the authors' code
        "paper"     p := p - lr clip(m / max(rho h, eps))     algorithm 3

    clip(r) limits |r| to `clip`. h changes only in steps that get `hessian=`, after the update::

        estimator="gnb"         h := b2 h + (1 - b2) e^2     e: gradient at sampled labels; the
                                                             paper's form has bs e^2
        estimator="hutchinson"  h := b2 h + (1 - b2) e       e: u times the Hessian's product with u

    bs is the number of tokens (samples) in the batch. `bias_correction` divides m by 1 - b1^t
    (optax). A Hutchinson estimate can be negative, where only the paper's form is safe, so the
    official one refuses it. `fusedopt.hessian` makes both estimates.

    States: m, h.

    References
    ----------
    Liu et al. 2023, algorithms 1-3; the authors' code.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.01, -0.01])
    >>> opt = fo.Optimizer(p, fo.Sophia(lr=0.1, bs=100, weight_decay=0.0))
    >>> _ = opt.step(g, hessian=np.array([0.1, 0.2]))  # h was still zero: a clipped step
    >>> _ = opt.step(g)
    >>> print(p.round(6))
    [0.8      1.142984]
    """

    name = "sophia"
    year = 2023
    takes_hessian = True
    settled = ("form", "estimator")
    examples = (
        {"bs": 100},
        {"form": "paper", "rho": 0.05, "eps": 1e-12, "bs": 100},
        {"form": "paper", "estimator": "hutchinson", "bias_correction": True, "clip": 0.5},
    )

    lr: LearningRate = 1e-4
    betas: Betas = (0.965, 0.99)
    rho: NonNegative = 0.04
    bs: Count = 5120
    eps: Normal = 1e-15
    clip: NonNegative = 1.0
    form: Literal["official", "paper"] = "official"
    estimator: Literal["gnb", "hutchinson"] = "gnb"
    bias_correction: bool = False
    weight_decay: NonNegative = 0.1
    decay: DecayForm = "decoupled"

    def check_together(self) -> None:
        if self.estimator == "hutchinson" and self.form == "official":
            raise ValueError(
                "Sophia(estimator): 'hutchinson' can be negative, which the official form does not"
                " survive; take form='paper'"
            )

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "h")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("h",) if self.estimator == "gnb" else ())

    @property
    def kernel(self) -> str:
        return "sophia" if self.form == "official" else "sophia_paper"

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        b1 = self.betas[0]
        return b1, 1.0 - b1, lr, *self._denominator(t, lr)

    def _denominator(self, t: int, lr: float) -> tuple[float, ...]:
        gamma = self.rho * self.bs if self.form == "official" else self.rho
        k = 1.0 / correction(self.betas[0], t) if self.bias_correction else 1.0
        return gamma, self.eps, self.clip, k

    @property
    def element(self) -> Element:
        return sophia if self.form == "official" else sophia_paper

    def operations(self) -> tuple[Operation, ...]:
        gnb = self.estimator == "gnb"
        refresh = Operation(
            "sophia_refresh_square" if gnb else "average",
            ("h", "hessian"),
            self._refresh,
            loop="other",
            needs="hessian",
        )
        (step,) = super().operations()
        return step._replace(written=1), refresh

    def _refresh(self, t: int, lr: float) -> tuple[float, float]:
        b2 = self.betas[1]
        scaled = self.estimator == "gnb" and self.form == "paper"
        return b2, (1.0 - b2) * (self.bs if scaled else 1)

    def sums(self) -> tuple[Operation, ...]:
        # A share of the elements in the published code's log, as "win_rate".
        kernel = f"{self.kernel}_wins"
        return (Operation(kernel, ("win_rate", "m", "h"), self._denominator, loop="sum"),)

    def textbook_sums(
        self, before: Sequence[np.ndarray], after: Sequence[np.ndarray], *, t: int
    ) -> dict[str, float]:
        r = self._textbook_ratio(after[0], before[1], t)
        return {"win_rate": float(np.sum((-self.clip < r) & (r < self.clip)))}

    def absorb(self, states: tuple[Array, ...], hessian: Array) -> tuple[Array, ...]:
        m, h = states
        b2 = self.betas[1]
        if self.estimator == "hutchinson":
            return m, b2 * h + (1 - b2) * hessian
        estimate = hessian * hessian
        if self.form == "paper":
            estimate = float(self.bs) * estimate
        return m, b2 * h + (1 - b2) * estimate

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        m, h = states
        b1 = self.betas[0]
        m = b1 * m + (1 - b1) * g
        r = self._textbook_ratio(m, h, t)
        return lr * np.minimum(np.maximum(r, -self.clip), self.clip), (m, h)

    def _textbook_ratio(self, m: Array, h: Array, t: int) -> Array:
        m_hat = m / textbook_correction(self.betas[0], t) if self.bias_correction else m
        if self.form == "official":
            return m_hat / (self.rho * self.bs * h + self.eps)
        return m_hat / np.maximum(self.rho * h, self.eps)
