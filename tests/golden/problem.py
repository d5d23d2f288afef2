"""The problem whose trajectories ``libraries.json`` records.

Parameters, gradients and curvature estimates follow from closed formulas, so neither the
recording nor the test that replays it stores them. Every number is a sine rounded to four
decimals times a power of two: exact steps, so that all platforms get the same bits.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Tree = dict[str, Array]

STEPS = 25
SNAPSHOTS = (1, 2, 10, 25)
HESSIAN_EVERY = 3

VECTORS: dict[str, tuple[int, ...]] = {"w": (5, 3), "b": (7,)}
MATRICES: dict[str, tuple[int, ...]] = {"w": (5, 3), "wide": (3, 8)}


def shapes(rule: str) -> dict[str, tuple[int, ...]]:
    """The tensors that a rule (its lower-case name) is run on: Muon takes only matrices."""
    return MATRICES if rule == "muon" else VECTORS


def parameters(rule: str) -> Tree:
    """Start values between -1 and 1, not zero, a new copy at each call."""
    return {name: _waves(shape, 0.9, 0.3) for name, shape in shapes(rule).items()}


def gradients(rule: str, step: int) -> Tree:
    """Gradients of one step (1 is the first), from 1e-8 to 1 in size, with either sign.

    Every sixth element is exactly zero, another one at each step; the last element of each
    tensor is zero for the first three steps, so that states of zero are met too.
    """
    tree = {}
    for name, shape in shapes(rule).items():
        index = np.arange(np.prod(shape)).reshape(shape)
        g = np.ldexp(_waves(shape, 1.7, 0.8 * step), -(5 * index % 24))
        g[(index + step) % 6 == 0] = 0.0
        if step <= 3:
            g.flat[-1] = 0.0
        tree[name] = g
    return tree


def curvature(rule: str, step: int) -> Tree:
    """Estimates of the Hessian's diagonal: as spread as the gradients, some of them negative."""
    return {
        name: 64.0 * np.abs(g) + np.ldexp(_waves(g.shape, 0.5, 1.1 * step), -7)
        for name, g in gradients(rule, step + 1).items()
    }


def learning_rate(lr: float, step: int) -> float:
    """The recorded schedule: down to a third, with a jump up at every fifth step."""
    return lr * (2.0 if step % 5 == 0 else 1.0) / (1.0 + step / 12.0)


def allowed(tolerance: float | None, step: int, start: Array, want: Array) -> Array:
    """How far each element may be off after a step.

    In float64 both sides round the parameter once per step, hence the number of steps, and the
    update is small beside it. Where the library itself computes with less, ``tolerance`` says what
    share of the tensor's largest movement that amounts to.
    """
    rounding = np.finfo(np.float64).eps * np.maximum(np.abs(start), np.abs(want))
    bound: Array = (4 + step) * rounding + (tolerance or 0.0) * np.abs(want - start).max()
    return bound


def _waves(shape: tuple[int, ...], frequency: float, phase: float) -> Array:
    index = np.arange(np.prod(shape)).reshape(shape)
    waves: Array = np.round(np.sin(frequency * (index + shape[-1]) + phase), 4)
    return waves
