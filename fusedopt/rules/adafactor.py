"""Adafactor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..linalg.newton_schulz import Stack, Workspace
from ..programs.arithmetic import Array, ratio, squares
from ..programs.program import Operation
from .base import DecayForm
from .hyperparameters import Count, LearningRate, NonNegative, Positive, UpToOne
from .matrix import MatrixRule, Member, limits, one, without_denormals
from .sgd import SGD

RUN = 256
"""The number of squares that are added up in the compute type, a seventh of float64's time."""


def decayed(p: float, g: float, factor: float) -> float:
    return factor * p


def apply(p: float, g: float, work: float, lr: float) -> float:
    return lr * work


@dataclass(frozen=True, kw_only=True)
class Adafactor(MatrixRule):
    """Steps of a share of the parameter's size, by a second moment kept by row and by column.

    Parameters
    ----------
    beta2_decay : float
        Exponent in [0, 1] of t in the weight of a new square; default 0.8.
    eps : float
        Number in [0, 1] that keeps the second moment from zero: see `floor`; default 1e-30.
    eps_scale : float
        Smallest root mean square >= 0 that a parameter is taken to have; default 1e-3.
    clip : float
        Largest root mean square > 0 of U; default 1.
    relative_step : bool
        Whether the learning rate is at most 1 / sqrt(t); default True.
    scale_parameter : bool
        Whether steps are a share of the parameter's root mean square; default True.
    floor : {"added", "least"}
        Whether eps is added to the square of the gradient, or is the least value of mean(R) and of
        the root of the second moment (PyTorch); default "added".
    min_dim : int
        Shortest side, at least 1, of a matrix that is factored; default 1.
    lr, weight_decay, decay, maximize
        As in `Rule`; lr 0.01 and decay "decoupled" by default.

    Notes
    -----
    With G the gradient, and means over a row or a column::

        w = t^-beta2_decay                    rho = min(lr, 1 / sqrt(t))
        R := (1 - w) R + w mean_row(G^2 + eps)
        C := (1 - w) C + w mean_column(G^2 + eps)
        V = R C / mean(R)                     U = G / sqrt(V)
        p := p - rho max(eps_scale, RMS(p)) U / max(1, RMS(U) / clip)

    The last two dimensions are the matrix, and each matrix of an array of more has its own R and C.
    RMS is the root mean square of the whole array, of p after a decay that is "decoupled_first" and
    before any other. Arrays of fewer dimensions, and those with a side shorter than `min_dim`, have
    V := (1 - w) V + w (G^2 + eps).

    States: row and col, which are R and C with a side of 1 for the other, or v, all in the compute
    type, whatever the optimizer's `state_dtype`. A step has work space of three times the largest
    parameter.

    References
    ----------
    Shazeer and Stern 2018, arXiv 1804.04235, algorithms 4 to 6. optax factors the two longest
    dimensions, which for a matrix are the same, and its weight decay is "independent" while its lr
    is constant.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.full((2, 2), 10.0), np.array([[1.0, 2.0], [3.0, -6.0]])
    >>> opt = fo.Optimizer(p, fo.Adafactor())
    >>> info = opt.step(g)
    >>> print(p, opt.state["params"]["col"])  # a hundredth of 10
    [[ 9.9  9.9]
     [ 9.9 10.1]] [[ 5. 20.]]
    """

    name = "adafactor"
    year = 2018
    works = ("work", "kept")
    settled = ("min_dim",)
    examples = (
        {},
        {"floor": "least", "eps": 1e-3, "clip": 1e3, "relative_step": False, "min_dim": 3},
        {"min_dim": 1 << 20, "scale_parameter": False, "beta2_decay": 0.5, "lr": 1.0},
        {"min_dim": 1 << 20, "floor": "least", "eps": 1e-3, "eps_scale": 2.0},
    )

    lr: LearningRate = 1e-2
    beta2_decay: UpToOne = 0.8
    eps: UpToOne = 1e-30
    eps_scale: NonNegative = 1e-3
    clip: Positive = 1.0
    relative_step: bool = True
    scale_parameter: bool = True
    floor: Literal["added", "least"] = "added"
    min_dim: Count = 1
    decay: DecayForm = "decoupled"

    def refuses(self, p: np.ndarray) -> str | None:
        return None

    def matrices(self, shape: tuple[int, ...]) -> Stack:
        return math.prod(shape), 1, 1  # there are no products, which would want room of their own

    def sides(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        if len(shape) < 2 or min(shape[-2:]) < self.min_dim:
            return {"v": shape}
        return {"row": (*shape[:-1], 1), "col": (*shape[:-2], 1, shape[-1])}

    def reserve(self, shape: tuple[int, ...]) -> int:
        sides = self.sides(shape)
        means = 0 if "v" in sides else sum(map(math.prod, sides.values()))
        return 32 * means + 8 * math.prod(shape) // RUN + (1 << 17)  # which are einsum's buffers

    def operations(self) -> tuple[Operation, ...]:
        return (
            Operation("sgd", ("p", "g", "work"), one, "peek", element=SGD.element),
            Operation("decayed", ("p", "g", "kept"), self._kept, "peek", element=decayed),
            Operation("apply", ("p", "g", "work"), self._rate, phase=1, written=0, element=apply),
        )

    def _kept(self, t: int, lr: float) -> tuple[float, ...]:
        return (1.0 - lr * self.weight_decay if self.decay == "decoupled_first" else 1.0,)

    def _rate(self, t: int, lr: float) -> tuple[float, ...]:
        return (min(lr, 1.0 / math.sqrt(t)) if self.relative_step else lr,)

    def _floors(self) -> tuple[float, float]:
        """Return what is added to squares, and the least root of a second moment."""
        return (self.eps, 0.0) if self.floor == "added" else (0.0, self.eps)

    def between(
        self,
        phase: int,
        works: Sequence[np.ndarray],
        workspace: Workspace,
        members: Sequence[Member | None],
    ) -> None:
        work, kept = works
        u, spare = workspace.opened(work, work.shape)
        for k, member in enumerate(members):
            if member is None:
                continue
            g, root = u[k, ...], spare[k, ...]
            self._roots(root, g, member)
            g /= root
            step = 1.0 / _at_least(1.0, _size(g) / self.clip)
            if self.scale_parameter:
                step *= _at_least(self.eps_scale, _size(kept[k, ...]))
            largest = limits(g.dtype)[1]
            g *= largest if step > largest else step  # 0 remains 0
        workspace.closed(work, u)

    def _roots(self, root: np.ndarray, g: np.ndarray, member: Member) -> None:
        """Update the averages of a leaf, and find the roots of its second moments."""
        w, (added, least), sides = member.t**-self.beta2_decay, self._floors(), member.sides
        least = max(least, limits(g.dtype)[0])
        np.multiply(g, g, out=root)
        if "v" in sides:
            root += added
            _average(sides["v"], root, w)
            np.sqrt(sides["v"], out=root)
            lowest = root.min(initial=least)
        else:
            row, col = sides["row"], sides["col"]
            _average(row, _mean(root, -1) + added, w)
            _average(col, _mean(root, -2) + added, w)
            share = row / np.maximum(_mean(row, -2), least)
            first, second = np.sqrt(share), np.sqrt(col)
            np.multiply(first, second, out=root)
            # The lowest of the products, without a look at all of them: rounding keeps their order.
            lowests = first.min(axis=-2, initial=np.inf) * second.min(axis=-1, initial=np.inf)
            lowest = lowests.min(initial=least)
        if lowest < least:
            np.maximum(root, least, out=root)

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        w, (added, least) = t**-self.beta2_decay, self._floors()
        square = g * g + added
        new: tuple[Array, ...]
        if len(states) == 1:
            v = (1 - w) * states[0] + w * square
            new, root = (v,), np.sqrt(v)
        else:
            rows, cols = p.shape[-2:]
            row = (1 - w) * states[0] + w * (square.sum(axis=-1, keepdims=True) / cols)
            col = (1 - w) * states[1] + w * (square.sum(axis=-2, keepdims=True) / rows)
            mean = np.maximum(row.sum(axis=-2, keepdims=True) / rows, least)
            new = row, col
            root = np.sqrt(ratio(row, mean)) * np.sqrt(col)
        u = ratio(g, np.maximum(root, least))
        u = u / np.maximum(_textbook_size(u) / self.clip, 1.0)
        if self.scale_parameter:
            u = u * np.maximum(_textbook_size(p), self.eps_scale)
        return (min(lr, 1 / np.sqrt(t)) if self.relative_step else lr) * u, new


def _size(x: np.ndarray) -> float:
    """The root mean square."""
    flat, whole, found = x.ravel("K"), x.size - x.size % RUN, 0.0
    if whole:
        runs = flat[:whole].reshape(-1, RUN)
        found = float(np.add.reduce(np.einsum("ij,ij->i", runs, runs), dtype=np.float64))
    if x.size > whole:
        rest = flat[whole:]
        found += float(np.einsum("i,i", rest, rest))
    if not x.size * limits(x.dtype)[0] <= found < math.inf:
        found = float(np.einsum("i,i", flat, flat, dtype=np.float64))
    return math.sqrt(found / max(x.size, 1))


def _at_least(least: float, x: float) -> float:
    """Return the larger number; NaN where x is."""
    return least if x <= least else x


def _mean(x: np.ndarray, axis: int) -> np.ndarray:
    """Return the mean along an axis, which is kept; `np.mean` takes 3 us more."""
    total: np.ndarray = np.add.reduce(x, axis=axis, keepdims=True)
    total /= x.shape[axis]
    return total


def _textbook_size(x: Array) -> Array:
    return np.sqrt(squares(x, RUN) / max(math.prod(x.shape), 1))


def _average(average: np.ndarray, x: np.ndarray, w: float) -> None:
    """average := (1 - w) average + w x, in place; x is overwritten."""
    average *= 1.0 - w
    x *= w
    average += x
    without_denormals(average, x)
