"""Dion."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..linalg.newton_schulz import Stack, Workspace, as_matrix
from ..programs.arithmetic import Array, ratio
from ..programs.program import Operation
from .base import DecayForm
from .hyperparameters import Fraction, LearningRate, NonNegative, Part
from .matrix import MatrixRule, Member, through
from .momentum import Momentum
from .muon import muon


@dataclass(frozen=True, kw_only=True)
class Dion(MatrixRule):
    """Momentum of low rank, orthonormalised, with error feedback, for matrices.

    Parameters
    ----------
    momentum : float
        Share mu in [0, 1) of what a step takes from m that stays in m; default 0.95.
    rank_fraction : float
        Rank r of a step, as a fraction in [0, 1] of the shorter side; at least 1 and rounded up;
        default 1.0.
    eps : float
        Number >= 0 added to the norms of the columns of R; default 1e-8.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    With G the gradient as a matrix of m rows and n columns, which is (shape[0], the rest)::

        B = M + G              P = orthonormal columns of B Q, by a QR decomposition
        R = B^T P              M := B - (1 - mu) P R^T
        Q := R, each column over its norm + eps
        p := p - lr sqrt(m / n) P Q^T

    That is one step of power iteration, from the Q of the step before, which is n x r; the first
    one is drawn from a normal distribution, the same for all parameters of a shape. What has not
    the rank for it stays in M for later steps. All products are in float64, in memory that a step
    asks for before it begins. Where B is zero nothing but the decay of weights happens; where it
    has not the rank r, a part of P is whatever LAPACK takes. Q is in the compute type, whatever
    the optimizer's `state_dtype`. Vectors are refused, and embeddings and output heads belong to
    another rule, as they do with `Muon`.

    States: m, which is M; Q.

    References
    ----------
    Ahn et al. 2025, arXiv 2504.05295, the algorithm for one process; the authors' code
    (https://github.com/microsoft/dion), whose defaults these are, has P on the longer side.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.zeros((2, 3)), np.array([[1.0, 2, 3], [4, 5, 6]])
    >>> rule = fo.Dion(lr=1.0)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(3))
    [[-0.122 -0.243 -0.364]
     [-0.484 -0.605 -0.726]]
    """

    name = "dion"
    year = 2025
    settled = ("rank_fraction",)
    works = ("work", "rest")
    examples = ({}, {"momentum": 0.8, "rank_fraction": 0.4, "eps": 1e-3}, {"rank_fraction": 0.25})

    lr: LearningRate = 1e-2
    momentum: Fraction = 0.95
    rank_fraction: Part = 1.0
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.01
    decay: DecayForm = "decoupled"

    @property
    def states(self) -> tuple[str, ...]:
        return ("m",)

    def rank(self, shape: tuple[int, ...]) -> int:
        """Return the rank of a step of a parameter."""
        return max(1, math.ceil(self.rank_fraction * min(as_matrix(shape))))

    def sides(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"Q": (as_matrix(shape)[1], self.rank(shape))}

    def matrices(self, shape: tuple[int, ...]) -> Stack:
        return 1, *as_matrix(shape)

    def reserve(self, shape: tuple[int, ...]) -> int:
        m, n = as_matrix(shape)
        return 8 * (4 * m * n + (5 * m + 3 * n) * self.rank(shape))

    def note(self, shape: tuple[int, ...]) -> str | None:
        return f"Dion of shape {shape}: rank {self.rank(shape)}"

    def operations(self) -> tuple[Operation, ...]:
        matrices = ("p", "g", "m", "work")
        return (
            Operation("momentum", matrices, _sum, "peek", element=Momentum.element),
            Operation("muon", matrices, _commit, phase=1, written=1, element=muon),
            Operation("average", ("m", "rest"), _taken, "other", 1),
        )

    def before(self, t: int, sides: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"Q": first(sides["Q"].shape)} if t == 1 and "Q" in sides else {}

    def between(
        self,
        phase: int,
        works: Sequence[np.ndarray],
        workspace: Workspace,
        members: Sequence[Member | None],
    ) -> None:
        for work, rest, member in zip(*works, members, strict=True):
            if member is None:
                continue
            rows, cols = as_matrix(work.shape)
            b, q = work.reshape(rows, cols).astype(np.float64), member.sides["Q"]
            if not b.any():
                rest[...] = 0.0
                continue
            p = np.linalg.qr(b @ q)[0]
            r = b.T @ p
            b -= (1.0 - self.momentum) * (p @ r.T)
            np.copyto(rest, b.reshape(work.shape))
            r = ratio(r, np.sqrt(np.einsum("ij,ij->j", r, r)) + self.eps)
            p *= math.sqrt(rows / cols)
            np.copyto(work, (p @ r.T).reshape(work.shape))
            r[np.abs(r) < np.finfo(q.dtype).smallest_normal] = 0.0  # as in all states
            q[...] = r

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        m, side = states
        rows, cols = shape = as_matrix(p.shape)
        b = m + g
        q = np.asarray(getattr(side, "value", side))
        if t == 1:
            q = first(q.shape).astype(m.dtype).astype(np.float64)
        if 0 in shape:
            return b, (b, through(side, lambda _: q, 1.0))

        def parts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            """The step, the new M, and the new Q."""
            x = x.reshape(shape)
            if not x.any():
                return 0.0 * x, 0.0 * x, q
            basis = np.linalg.qr(x @ q)[0]
            r = x.T @ basis
            new = ratio(r, np.linalg.norm(r, axis=0) + self.eps)
            rest = x - (1 - self.momentum) * basis @ r.T
            return math.sqrt(rows / cols) * basis @ new.T, rest, new

        gain = sensitivity(np.asarray(getattr(b, "value", b)).reshape(shape), q)
        step, rest, new = (
            through(b, functools.partial(lambda k, x: parts(x)[k], k), gain) for k in range(3)
        )
        return lr * step.reshape(*p.shape), (rest.reshape(*p.shape), new)


def _sum(t: int, lr: float) -> tuple[float, ...]:
    return 1.0, 1.0, 1.0


def _taken(t: int, lr: float) -> tuple[float, ...]:
    return 0.0, 1.0


def _commit(t: int, lr: float) -> tuple[float, ...]:
    return 1.0, 1.0, lr


def first(shape: tuple[int, ...]) -> np.ndarray:
    """The first Q of this shape."""
    return np.random.default_rng(0).standard_normal(shape)


def sensitivity(b: np.ndarray, q: np.ndarray) -> float:
    """Return how many times a step of b and q may amplify rounding of b."""
    b = np.ldexp(b, -np.frexp(np.max(np.abs(b)))[1])  # which changes nothing but the range
    if not np.isfinite(b).all():
        return 1.0
    sizes = np.linalg.svd(b @ q, compute_uv=False)
    columns = np.linalg.norm(b.T @ np.linalg.qr(b @ q)[0], axis=0)
    weak = float(sizes[-1] * columns.min())
    return float(sizes[0] * np.linalg.norm(b)) / weak if weak else 1e30
