"""Schedule-Free SGD and AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import numpy as np

from ..programs.arithmetic import Array, correction, ratio, textbook_correction
from ..programs.elements import quotient
from .base import DecayForm, Rule
from .hyperparameters import Betas, Fraction, LearningRate, NonNegative, Power, Whole
from .nesterov import LookAhead


@dataclass(frozen=True, kw_only=True)
class ScheduleFree(Rule):
    """Base of the rules whose parameter lies between an average and the point that steps."""

    # All weights are of one form, and d holds what it does for one share of the average.
    settled: ClassVar[tuple[str, ...]] = ("warmup_steps", "r", "weight_lr_power")

    warmup_steps: Whole = 0
    r: Power = 0.0
    weight_lr_power: Power = 2.0

    def check_together(self) -> None:
        name = type(self).__name__
        if callable(self.lr):
            raise ValueError(
                f"{name}(lr): the rule stands for a schedule and takes none; give a number, and"
                " `warmup_steps`"
            )
        if not self.beta:
            raise ValueError(f"{name}: the average needs a momentum above 0, got 0")

    @property
    def beta(self) -> float:
        """The share of the average in the parameter."""
        raise NotImplementedError

    @property
    def evaluated(self) -> tuple[Rule, str]:
        return LookAhead(momentum=1.0 / self.beta - 1.0), "d"

    def warm(self, t: int) -> float:
        """Return the share of the learning rate that a step has."""
        return min(t / self.warmup_steps, 1.0) if self.warmup_steps else 1.0

    def weight(self, t: int) -> float:
        """Return the weight of a step over lr^weight_lr_power, which all have."""
        return float(t**self.r * self.warm(t) ** self.weight_lr_power)

    def total(self, t: int) -> float:
        """Return the sum of all weights so far, from that of the step asked for before."""
        if not self.r and t > self.warmup_steps:
            return self.total(self.warmup_steps) + t - self.warmup_steps
        last, total = self.__dict__.get("_total", (0, 0.0))
        if last > t:
            last, total = 0, 0.0
        for step in range(last + 1, t + 1):
            total += self.weight(step)
        self.__dict__["_total"] = t, total
        return float(total)

    def shares(self, t: int, lr: float) -> tuple[float, ...]:
        """Return (a, c, k, b): p := p - a u + c d, d := k d - b u."""
        c, eta = self.weight(t) / self.total(t), lr * self.warm(t)
        kept = 1.0 - c
        return eta * (1.0 - self.beta * kept), c, kept, eta * self.beta * kept

    def textbook_step(self, y: Array, d: Array, u: Array, t: int, lr: float) -> tuple[Array, Array]:
        """Return the delta of y, and the new d, as the paper has them."""
        weights = [self.weight(k) for k in range(1, t + 1)]
        c, eta = weights[-1] / sum(weights), lr * self.warm(t)
        delta = eta * (1 - self.beta * (1 - c)) * u - c * d
        return delta, (1 - c) * (d - self.beta * eta * u)


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeSGD(ScheduleFree):
    """Gradient descent whose average replaces the schedule.

    Parameters
    ----------
    momentum : float
        Share in (0, 1) of the average in the parameter; default 0.9.
    warmup_steps : int
        Number of steps >= 0 in which the learning rate grows linearly; default 0.
    r : float
        Power in [0, 16) of the step's number in the weights of the average; default 0.
    weight_lr_power : float
        Power in [0, 16) of the learning rate, while that grows, in these weights; default 2.
    lr, weight_decay, decay, maximize
        As in `Rule`, lr a number.

    Notes
    -----
    ::

        y = (1 - momentum) z + momentum x is the parameter, where the gradient is taken
        eta = lr min(1, t / warmup_steps),  w_t = t^r eta^weight_lr_power,  c = w_t / sum of all w
        z := z - eta g,  x := (1 - c) x + c z

    Evaluate, and keep in the end, the average x: inside of ``with opt.averaged()``, or what is
    copied there. The weights are those of the present lr: setting it counts as if it had been so
    from the first step.

    State: d = z - y.

    References
    ----------
    Defazio et al. 2024, "The Road Less Scheduled", algorithm 1 and the authors' code.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p = np.array([1.0])
    >>> opt = fo.Optimizer(p, fo.ScheduleFreeSGD(lr=0.5))
    >>> for _ in range(20):
    ...     _ = opt.step(p.copy())  # the gradient of p^2 / 2
    >>> with opt.averaged():
    ...     print(p.round(3))
    [-0.034]
    """

    name = "schedulefreesgd"
    year = 2024
    examples = ({}, {"warmup_steps": 3, "r": 0.5, "weight_lr_power": 1.0})
    settled = (*ScheduleFree.settled, "momentum")

    lr: LearningRate = 1.0
    momentum: Fraction = 0.9

    @property
    def beta(self) -> float:
        return float(self.momentum)

    @property
    def states(self) -> tuple[str, ...]:
        return ("d",)

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        return self.shares(t, lr)

    @staticmethod
    def element(p, g, d, a, c, k, b):
        return a * g - c * d, k * d - b * g

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        delta, d = self.textbook_step(p, states[0], g, t, lr)
        return delta, (d,)


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeAdamW(ScheduleFree):
    """AdamW whose average replaces the schedule and the first moment.

    Parameters
    ----------
    betas : pair of float
        Share b1 in (0, 1) of the average in the parameter, and decay rate b2 in [0, 1) of v;
        default (0.9, 0.999).
    eps : float
        Number >= 0 added to the root in the denominator; default 1e-8.
    warmup_steps, r, weight_lr_power
        As in `ScheduleFreeSGD`.
    lr, weight_decay, decay, maximize
        As in `Rule`, lr a number; decay "scaled" by default.

    Notes
    -----
    ::

        v := b2 v + (1 - b2) g^2,  u = g / (sqrt(v / (1 - b2^t)) + eps) + lambda y
        z := z - eta u,  x := (1 - c) x + c z,  y = (1 - b1) z + b1 x is the parameter

    with eta and c of `ScheduleFreeSGD`, where it also says how to evaluate: ``opt.averaged()``.

    States: d = z - y, v.

    References
    ----------
    Defazio et al. 2024, "The Road Less Scheduled", and the authors' code.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p = np.array([1.0])
    >>> opt = fo.Optimizer(p, fo.ScheduleFreeAdamW(lr=0.1))
    >>> for _ in range(40):
    ...     _ = opt.step(p.copy())  # the gradient of p^2 / 2
    >>> with opt.averaged():
    ...     print(p.round(3))
    [-0.08]
    """

    name = "schedulefreeadamw"
    year = 2024
    examples = ({}, {"warmup_steps": 3, "r": 0.5, "weight_lr_power": 1.0})
    settled = (*ScheduleFree.settled, "betas")
    scales_decay = True

    lr: LearningRate = 2.5e-3
    betas: Betas = (0.9, 0.999)
    eps: NonNegative = 1e-8
    decay: DecayForm = "scaled"

    @property
    def beta(self) -> float:
        return float(self.betas[0])

    @property
    def states(self) -> tuple[str, ...]:
        return ("d", "v")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("v",))

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        b2 = self.betas[1]
        root = sqrt(correction(b2, t))
        return *self.shares(t, lr), b2, 1.0 - b2, root, self.eps * root, self.scaled_decay

    @staticmethod
    def element(p, g, d, v, a, c, k, b, b2, one_b2, root, eps, decay):
        v = b2 * v + one_b2 * (g * g)
        u = quotient(root * g, sqrt(v) + eps) + decay * p
        return a * u - c * d, k * d - b * u, v

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        d, v = states
        b2 = self.betas[1]
        v = b2 * v + (1 - b2) * (g * g)
        u = ratio(g, np.sqrt(v / textbook_correction(b2, t)) + self.eps) + self.scaled_decay * p
        delta, d = self.textbook_step(p, d, u, t, lr)
        return delta, (d, v)
