"""Optimizers for thinc and spaCy: thinc's own, with the arithmetic of a parameter in one pass.

They are registered as `fusedopt.Adam.v1`, `fusedopt.AdamW.v1`, `fusedopt.RAdam.v1` and
`fusedopt.SGD.v1`, with the hyperparameters of thinc's `Adam.v1`, `RAdam.v1` and `SGD.v1`; in a
configuration one line changes. thinc is imported only here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from thinc.optimizers import Optimizer as ThincOptimizer

from .functional import global_norm, update
from .rules import RULES, Rule

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "RAdam"]

MAX_DECAY = 0.9999
"""The largest decay of the averages."""


class Optimizer(ThincOptimizer):  # type: ignore[misc]
    """thinc's optimizer for parameters that are NumPy arrays, updated in place.

    Parameters, attributes, schedules and averages are those of `thinc.api.Optimizer`. What it
    computes differs from that one in rounding alone; a gradient is zero after its step.
    """

    def __call__(
        self, key: tuple[int, str], weights: Any, gradient: Any, *, lr_scale: float = 1.0
    ) -> tuple[Any, Any]:
        """Update a parameter with its gradient, and the average of it.

        Parameters
        ----------
        key : tuple of int and str
            The parameter's layer and name.
        weights, gradient : numpy.ndarray
            Of float32.
        lr_scale : float
            Factor on the learning rate, 1 by default. RAdam has none, as in thinc.

        Returns
        -------
        tuple of numpy.ndarray
            The parameter, and its gradient, which is zero.

        Raises
        ------
        TypeError
            For arrays that are not NumPy's.
        """
        if len(gradient) < 1:
            return weights, gradient
        for name, array in (("weights", weights), ("gradient", gradient)):
            if not isinstance(array, np.ndarray):
                raise TypeError(
                    f"fusedopt.thinc: {name} of {key}: expected a NumPy array, got"
                    f" {type(array).__name__}; on a GPU use thinc's own optimizer"
                )
        self.nr_update[key] += 1
        t = self.nr_update[key]
        if self.L2 != 0 and not self.L2_is_weight_decay:
            gradient += self.L2 * weights
        if self.grad_clip:
            norm = global_norm(gradient)
            if norm >= self.grad_clip:
                gradient *= self.grad_clip / norm
        flat = weights.reshape(-1)
        update(*self._rule(lr_scale, t), flat, gradient.reshape(-1), *self._states(key, flat))
        weights = flat.reshape(weights.shape)
        gradient.fill(0)
        if self.averages is not None:
            if key not in self.averages:
                self.averages[key] = np.zeros(weights.shape, np.float32)
            decay = min((1.0 + t) / (10.0 + t), MAX_DECAY)
            update(_averaging(decay), 1, self.averages[key], weights)
        return weights, gradient

    def _rule(self, lr_scale: float, t: int) -> tuple[Rule, int]:
        """The rule of this parameter's step, and the number that this step has for it."""
        decay = self.L2 if self.L2_is_weight_decay else 0.0
        moments = (float(self.b1), float(self.b2), float(self.eps))
        scaled = lr_scale * self.learn_rate
        if self.use_radam:  # thinc counts its first step as the second, and has no scale here
            return _folded("radam", self.learn_rate, scaled * decay, *moments), t + 1
        if self.b1 > 0.0 and self.b2 > 0.0:
            return _folded("adam", scaled, scaled * decay, *moments), t
        return _folded("sgd", scaled, scaled * decay), t

    def _states(self, key: tuple[int, str], flat: np.ndarray) -> tuple[np.ndarray, ...]:
        if not self.use_radam and not (self.b1 > 0.0 and self.b2 > 0.0):
            return ()
        for moments in (self.mom1, self.mom2):
            if key not in moments:
                moments[key] = np.zeros(flat.shape, np.float32)
        return self.mom1[key], self.mom2[key]


@lru_cache
def _folded(
    name: str, lr: float, shrunk: float, b1: float = 0.0, b2: float = 0.0, eps: float = 0.0
) -> Rule:
    """A rule whose parameters are multiplied with 1 - shrunk after the step.

    Here decay and step are one sum: p - delta - c p with both of them of this size is
    (p - delta) (1 - c).
    """
    moments: dict[str, Any] = {"betas": (b1, b2), "eps": eps, "hat": True}
    rest = lr * (1.0 - shrunk)
    return RULES[name](
        lr=rest,
        weight_decay=shrunk / rest if rest else 0.0,
        decay="decoupled",
        **({} if name == "sgd" else moments),
    )


@lru_cache
def _averaging(decay: float) -> Rule:
    """Descent of an average towards what stands in the gradient's place."""
    return RULES["sgd"](lr=1.0 - decay, weight_decay=1.0, decay="l2", maximize=True)


def Adam(
    learn_rate: Any = 0.001,
    *,
    L2: Any = 0.0,
    beta1: Any = 0.9,
    beta2: Any = 0.999,
    eps: Any = 1e-8,
    grad_clip: Any = 1.0,
    L2_is_weight_decay: bool = True,
    use_averages: bool = True,
) -> Optimizer:
    """Make Adam as thinc's `Adam.v1`.

    Parameters
    ----------
    learn_rate, L2, beta1, beta2, eps, grad_clip, L2_is_weight_decay, use_averages
        As in thinc: numbers, or schedules for all but the last two.
    """
    return Optimizer(
        learn_rate,
        L2=L2,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        grad_clip=grad_clip,
        L2_is_weight_decay=L2_is_weight_decay,
        use_averages=use_averages,
    )


def AdamW(
    learn_rate: Any = 0.001,
    *,
    L2: Any = 0.01,
    beta1: Any = 0.9,
    beta2: Any = 0.999,
    eps: Any = 1e-8,
    grad_clip: Any = 1.0,
    L2_is_weight_decay: bool = True,
    use_averages: bool = True,
) -> Optimizer:
    """Make Adam with a weight decay of 0.01, as thinc's `Adam.v1` with `L2 = 0.01`.

    Parameters
    ----------
    learn_rate, L2, beta1, beta2, eps, grad_clip, use_averages
        As in thinc: numbers, or schedules for all but the last.
    L2_is_weight_decay
        True; without it this is Adam.

    Raises
    ------
    ValueError
        If `L2_is_weight_decay` is False.
    """
    if not L2_is_weight_decay:
        raise ValueError(
            "fusedopt.AdamW.v1(L2_is_weight_decay): expected true, got false; take fusedopt.Adam.v1"
        )
    return Adam(
        learn_rate,
        L2=L2,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        grad_clip=grad_clip,
        use_averages=use_averages,
    )


def RAdam(
    learn_rate: Any = 0.001,
    *,
    L2: Any = 0.0,
    beta1: Any = 0.9,
    beta2: Any = 0.999,
    eps: Any = 1e-8,
    grad_clip: Any = 1.0,
    L2_is_weight_decay: bool = True,
    use_averages: bool = True,
) -> Optimizer:
    """Make RAdam as thinc's `RAdam.v1`.

    Parameters
    ----------
    learn_rate, L2, beta1, beta2, eps, grad_clip, L2_is_weight_decay, use_averages
        As in thinc: numbers, or schedules for all but the last two.
    """
    return Optimizer(
        learn_rate,
        L2=L2,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        grad_clip=grad_clip,
        L2_is_weight_decay=L2_is_weight_decay,
        use_averages=use_averages,
        use_radam=True,
    )


def SGD(
    learn_rate: Any,
    *,
    L2: Any = 0.0,
    grad_clip: Any = 1.0,
    L2_is_weight_decay: bool = True,
    use_averages: bool = True,
) -> Optimizer:
    """Make plain descent as thinc's `SGD.v1`.

    Parameters
    ----------
    learn_rate, L2, grad_clip, L2_is_weight_decay, use_averages
        As in thinc: numbers, or schedules for all but the last two.
    """
    return Optimizer(
        learn_rate,
        L2=L2,
        grad_clip=grad_clip,
        L2_is_weight_decay=L2_is_weight_decay,
        beta1=0.0,
        beta2=0.0,
        use_averages=use_averages,
    )
