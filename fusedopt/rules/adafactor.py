"""Adafactor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import numpy as np

from ..linalg.newton_schulz import Stack, Workspace
from ..programs.arithmetic import Array, ratio, total
from ..programs.program import Operation
from .base import DecayForm
from .hyperparameters import Count, Fraction, LearningRate, NonNegative, Positive
from .matrix import MatrixRule, Member, one
from .sgd import SGD


def apply(p: float, g: float, work: float, lr: float) -> float:
    return lr * work


@dataclass(frozen=True, kw_only=True)
class Adafactor(MatrixRule):
    """Steps of a share of the parameter's size, by a second moment kept by row and by column.

    Parameters
    ----------
    beta2_decay : float
        Exponent in [0, 1) by which averages come to forget more slowly; default 0.8.
    eps : float
        Number >= 0 that keeps the second moment from zero: see `floor`; default 1e-30.
    eps_scale : float
        Smallest root mean square >= 0 that a parameter is taken to have; default 1e-3.
    clip : float
        Largest root mean square > 0 of an update; default 1.
    relative_step : bool
        Whether lr is at most 1 / sqrt(t); default True.
    scale_parameter : bool
        Whether steps are a share of the parameter's root mean square; default True.
    floor : {"added", "least"}
        Whether eps is added to the gradient's square, or is the least that the root of the second
        moment may be (PyTorch); default "added".
    min_dim : int
        Smallest side, at least 1, of a matrix that is factored; default 1.
    lr, weight_decay, decay, maximize
        As in `Rule`; lr 0.01, and decay "decoupled_first" by default.

    Notes
    -----
    ::

        w = t^-beta2_decay,  rho = min(lr, 1 / sqrt(t))
        R_i := (1 - w) R_i + w mean_j (g_ij^2 + eps)
        C_j := (1 - w) C_j + w mean_i (g_ij^2 + eps)
        u = g / sqrt(R C / mean(R))
        p := p - rho max(eps_scale, RMS(p)) u / max(1, RMS(u) / clip)

    R and C are of the last two dimensions, whatever stands before them, each matrix with its own;
    RMS is of the whole parameter. Leaves with fewer dimensions, and matrices with a side of one or
    shorter than `min_dim`, have v := (1 - w) v + w (g^2 + eps) for R C / mean(R). The weight decay
    of optax is "independent", with a constant lr.

    States: row (R) and col (C), or v, in the compute type, whatever `state_dtype` says. A step has
    work space of three times the largest parameter, which all share.

    References
    ----------
    Shazeer and Stern 2018, algorithms 4 to 6; `torch.optim.Adafactor`; optax's `adafactor`, which
    factors the two longest dimensions.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.full((2, 2), 10.0), np.array([[1.0, 2.0], [3.0, -6.0]])
    >>> opt = fo.Optimizer(p, fo.Adafactor())
    >>> info = opt.step(g)
    >>> print(p, opt.state["params"]["row"])  # a hundredth of 10
    [[ 9.9  9.9]
     [ 9.9 10.1]] [ 2.5 22.5]
    """

    name = "adafactor"
    year = 2018
    works = ("work", "turned")
    settled = ("min_dim",)
    examples = (
        {},
        {"floor": "least", "eps": 1e-3, "clip": 1e3, "relative_step": False},
        {"min_dim": 1 << 20, "scale_parameter": False, "beta2_decay": 0.5},
        {"min_dim": 1 << 20, "floor": "least", "eps": 1e-3},
    )

    lr: LearningRate = 1e-2
    beta2_decay: Fraction = 0.8
    eps: NonNegative = 1e-30
    eps_scale: NonNegative = 1e-3
    clip: Positive = 1.0
    relative_step: bool = True
    scale_parameter: bool = True
    floor: Literal["added", "least"] = "added"
    min_dim: Count = 1
    decay: DecayForm = "decoupled_first"

    def refuses(self, p: np.ndarray) -> str | None:
        return None

    def matrices(self, shape: tuple[int, ...]) -> Stack:
        if len(shape) < 2:
            return 1, 1, math.prod(shape)
        return math.prod(shape[:-2]), shape[-2], shape[-1]

    def sides(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        if len(shape) < 2 or min(shape[-2:]) < max(2, self.min_dim):
            return {"v": shape}
        return {"row": shape[:-1], "col": (*shape[:-2], shape[-1])}

    def operations(self) -> tuple[Operation, ...]:
        return (
            Operation("sgd", ("p", "g", "work"), one, "peek", element=SGD.element),
            Operation("keep", ("turned", "p"), _nothing, "other"),
            Operation("apply", ("p", "g", "work"), self._rate, phase=1, written=0, element=apply),
        )

    def _rate(self, t: int, lr: float) -> tuple[float, ...]:
        return (min(lr, 1.0 / sqrt(t)) if self.relative_step else lr,)

    def between(
        self,
        phase: int,
        works: Sequence[np.ndarray],
        workspace: Workspace,
        members: Sequence[Member | None],
    ) -> None:
        work, turned = works
        if not work.size:
            return
        count, rows, cols = self.matrices(work.shape[1:])
        stack = len(members) * count, rows, cols
        each = (len(members), count, rows, cols)
        p = workspace.opened(turned, stack, 1)[0].reshape(each)
        sizes = [_size(x, x) for x in p] if self.scale_parameter else []
        u, spare = workspace.opened(work, stack)
        room = workspace.directions[1]  # which holds nothing any more
        for k, (g, s, member) in enumerate(
            zip(u.reshape(each), spare.reshape(each), members, strict=True)
        ):
            if member is None:
                continue
            self._roots(g, s, room, member)
            np.divide(g, s, out=g)
            factor = max(self.eps_scale, sizes[k]) if self.scale_parameter else 1.0
            g *= g.dtype.type(factor / max(1.0, _size(g, s) / self.clip))
        workspace.closed(work, u)

    def _roots(self, g: np.ndarray, s: np.ndarray, room: np.ndarray, member: Member) -> None:
        """Update a leaf's averages, and put the roots of the second moments into s."""
        _, rows, cols = g.shape
        w, tiny = member.t**-self.beta2_decay, np.finfo(s.dtype).smallest_normal
        added, least = (self.eps, tiny) if self.floor == "added" else (0.0, max(self.eps, tiny))
        np.multiply(g, g, out=s)
        s += s.dtype.type(added)
        if "v" in member.sides:
            v = member.sides["v"].reshape(g.shape)
            _average(v, s, w, room)
            np.sqrt(v, out=s)
        else:
            means = []
            for name, axis, n in (("row", 2, cols), ("col", 1, rows)):
                average = member.sides[name].reshape(len(g), -1)
                mean, room = (part for part in (room[: average.size], room[average.size :]))
                mean = mean.reshape(average.shape)
                np.add.reduce(s, axis=axis, out=mean)
                mean /= s.dtype.type(n)
                _average(average, mean, w, room)
                means.append((average, mean))
            (row, r), (col, c) = means
            whole = np.maximum(np.add.reduce(row, axis=1, keepdims=True) / rows, least)
            np.sqrt(np.divide(row, whole, out=r), out=r)
            np.sqrt(col, out=c)
            np.multiply(r[:, :, None], c[:, None, :], out=s)
        np.maximum(s, s.dtype.type(least), out=s)

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        count, rows, cols = self.matrices(p.shape)
        w = t**-self.beta2_decay
        added, least = (self.eps, 0.0) if self.floor == "added" else (0.0, self.eps)
        x = g.reshape(count, rows, cols)
        squares = x * x + added
        if len(states) == 1:
            v = (1 - w) * states[0].reshape(count, rows, cols) + w * squares
            root, new = np.sqrt(v), (v.reshape(p.shape),)
        else:
            row, col = states[0].reshape(count, rows, 1), states[1].reshape(count, 1, cols)
            row = (1 - w) * row + w * (squares.sum(axis=-1, keepdims=True) / cols)
            col = (1 - w) * col + w * (squares.sum(axis=-2, keepdims=True) / rows)
            whole = np.maximum(row.sum(axis=-2, keepdims=True) / rows, least)
            root = np.sqrt(ratio(row, whole)) * np.sqrt(col)
            new = row.reshape(p.shape[:-1]), col.reshape(*p.shape[:-2], cols)
        u = ratio(x, np.maximum(root, least))
        n = count * rows * cols
        size = np.sqrt(total(u * u) / max(n, 1))
        k = min(lr, 1 / np.sqrt(t)) if self.relative_step else lr
        if self.scale_parameter:
            first = self.decay == "decoupled_first" and lr * self.weight_decay != 1
            before = p / (1 - lr * self.weight_decay) if first else p
            k = k * np.maximum(np.sqrt(total(before * before) / max(n, 1)), self.eps_scale)
        return (k * u / np.maximum(size / self.clip, 1.0)).reshape(p.shape), new


def _nothing(t: int, lr: float) -> tuple[float, ...]:
    return ()


def _size(x: np.ndarray, spare: np.ndarray) -> float:
    """The root mean square; spare: of x's shape, overwritten."""
    np.multiply(x, x, out=spare)
    return sqrt(np.add.reduce(spare.reshape(-1), dtype=np.float64) / max(x.size, 1))


def _average(average: np.ndarray, x: np.ndarray, w: float, room: np.ndarray) -> None:
    """average := (1 - w) average + w x, in place; x is overwritten, and room too.

    room: contiguous, of as many elements as x.
    """
    average *= average.dtype.type(1.0 - w)
    x *= x.dtype.type(w)
    average += x
    small = room.view(np.bool_)[: average.size].reshape(average.shape)
    np.less(average, np.finfo(average.dtype).smallest_normal, out=small)
    np.copyto(average, 0.0, where=small)
