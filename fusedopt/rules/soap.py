"""SOAP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..linalg.newton_schulz import Stack, Workspace, as_matrix
from ..programs.arithmetic import Array, correction, ratio, textbook_correction
from ..programs.program import Operation
from .base import DecayForm
from .hyperparameters import Betas, Count, Fraction, LearningRate, NonNegative
from .matrix import DeviceAlgebra, MatrixRule, Member, accumulate, multiply, one, through
from .momentum import Momentum
from .muon import muon
from .sgd import SGD


@dataclass(frozen=True, kw_only=True)
class SOAP(MatrixRule):
    """Adam in the eigenbasis of Shampoo's preconditioner, for matrices.

    Parameters
    ----------
    betas : pair of float
        Decay rates b1 and b2 in [0, 1) of the averages of the gradient and of its square;
        default (0.95, 0.95).
    shampoo_beta : float
        Decay rate b in [0, 1) of L and R; default 0.95.
    eps : float
        Number >= 0 added to the root in the denominator; default 1e-8.
    precondition_frequency : int
        Number of steps, at least 1, between refinements of the basis; default 10.
    max_precond_dim : int
        Longest side that has a basis of its own; default 10000.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    With G the gradient as a matrix, which is (shape[0], the rest)::

        m := b1 m + (1 - b1) G       v := b2 v + (1 - b2) (QL^T G QR)^2
        n = (QL^T m QR) / (sqrt(v) + eps)       p := p - lr sqrt(c2) / c1 QL n QR^T
        L := b L + (1 - b) G G^T     R := b R + (1 - b) G^T G

    c1 = 1 - b1^(t-1), c2 likewise; b is `shampoo_beta`. The first step only begins L and R: m, v
    and, but for weight decay, p stay. The second finds QL and QR by an eigendecomposition of L and
    R. After every `precondition_frequency` steps they are refined by one step of orthogonal
    iteration: the QR decomposition of L Q with its columns by falling eigenvalue, which then return
    to their places, so that v, unlike in the authors' code, need not be sorted again. To L a 1e-7
    part of its trace is added there, so that directions that no gradient had stay where they are.
    All of that is in float64. Where the first gradient has not the full rank, the rest of the first
    basis is whatever LAPACK takes, and so in part are all later steps.

    A side longer than `max_precond_dim` has no L and QL (R and QR): there Q is the identity. L, R,
    QL and QR are in the compute type, whatever the optimizer's `state_dtype`; m and v are as
    `state_dtype` says. Once L or R is not finite, the basis and the parameter become NaN, and no
    other parameter does. Vectors are refused.

    States: m, v; L, R, QL, QR.

    References
    ----------
    Vyas et al. 2024, arXiv 2409.11321, with the first step, bias correction and defaults of the
    authors' code (https://github.com/nikhilvyas/SOAP); that gives each dimension of a filter its
    own basis, and decays the weights after the update.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.zeros((2, 3)), np.array([[1.0, 2, 3], [4, 5, 6]])
    >>> rule = fo.SOAP(lr=1.0, max_precond_dim=2)
    >>> states = rule.init(p)
    >>> for t in (1, 2):
    ...     fo.update(rule, t, p, g, *states)
    >>> print(p.round(3))
    [[ 0.536  0.536 -1.309]
     [-1.309 -1.309 -0.536]]
    """

    name = "soap"
    year = 2024
    settled = ("max_precond_dim",)
    works = ("work", "turned")
    examples = (
        {},
        {"betas": (0.9, 0.99), "shampoo_beta": 0.8, "precondition_frequency": 1, "eps": 1e-6},
        {"max_precond_dim": 64},
        {"max_precond_dim": 3},
    )

    lr: LearningRate = 3e-3
    betas: Betas = (0.95, 0.95)
    shampoo_beta: Fraction = 0.95
    eps: NonNegative = 1e-8
    precondition_frequency: Count = 10
    max_precond_dim: Count = 10000
    weight_decay: NonNegative = 0.01
    decay: DecayForm = "decoupled"

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "v")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset({"v"})

    def sides(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        rows, cols = as_matrix(shape)
        sides = {"L": rows, "R": cols, "QL": rows, "QR": cols}
        return {name: (n, n) for name, n in sides.items() if n <= self.max_precond_dim}

    def matrices(self, shape: tuple[int, ...]) -> Stack:
        return 1, *as_matrix(shape)

    def operations(self) -> tuple[Operation, ...]:
        matrices = ("p", "g", "m", "work")
        return (
            Operation("sgd", ("p", "g", "turned"), one, "peek", element=SGD.element),
            Operation("momentum", matrices, self._mean, "peek", element=Momentum.element),
            Operation("sophia_refresh_square", ("v", "turned"), self._squares, "other", 1),
            Operation("normalize", ("work", "v"), self._division, "other", 1),
            Operation("muon", matrices, self._commit, phase=2, written=1, element=muon),
        )

    def _line(self, beta: float, t: int) -> tuple[float, float]:
        return (beta, 1.0 - beta) if t > 1 else (1.0, 0.0)

    def _mean(self, t: int, lr: float) -> tuple[float, ...]:
        return (*self._line(self.betas[0], t), 1.0)

    def _squares(self, t: int, lr: float) -> tuple[float, ...]:
        return self._line(self.betas[1], t)

    def _division(self, t: int, lr: float) -> tuple[float, ...]:
        return 1.0, self.eps

    def _commit(self, t: int, lr: float) -> tuple[float, ...]:
        step = 0.0
        if t > 1:
            c1, c2 = (correction(beta, t - 1) for beta in self.betas)
            step = lr * math.sqrt(c2) / c1
        return (*self._line(self.betas[0], t), step)

    def before(self, t: int, sides: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if t < 2 or (t - 2) % self.precondition_frequency:
            return {}
        return {
            "Q" + side: eigenbasis(sides[side]) if t == 2 else refined(sides[side], basis)
            for side, basis in (("L", sides.get("QL")), ("R", sides.get("QR")))
            if basis is not None
        }

    def between(
        self,
        phase: int,
        works: Sequence[np.ndarray],
        workspace: Workspace,
        members: Sequence[Member | None],
    ) -> None:
        for number, work in reversed([*enumerate(works)]) if phase == 0 else [(0, works[0])]:
            leaves, *shape = work.shape
            x, y = workspace.opened(work, (leaves, *as_matrix(tuple(shape))), number)
            for matrix, spare, member in zip(x, y, members, strict=True):
                if member is None or not matrix.size:
                    continue
                left, right = (member.sides.get(name) for name in ("QL", "QR"))
                if number == 1:
                    keep, gain = self.shampoo_beta, 1.0 - self.shampoo_beta
                    for name, u in (("L", matrix), ("R", matrix.T)):
                        if name in member.sides:
                            accumulate(member.sides[name], u, spare, keep, gain)
                if phase == 0 and left is not None:
                    left = left.T
                if phase == 1 and right is not None:
                    right = right.T
                multiply(left, matrix, right, spare)
            workspace.closed(work, x)

    def on_device(
        self, phase: int, works: Mapping[str, Any], sides: Mapping[str, Any], algebra: DeviceAlgebra
    ) -> dict[str, Any]:
        new = {}
        for name in ("turned", "work") if phase == 0 else ("work",):
            u = works[name]
            x = u.reshape(as_matrix(tuple(u.shape)))
            if name == "turned":
                for side, y in (("L", x), ("R", x.swapaxes(0, 1))):
                    if side in sides:
                        moment = (1.0 - self.shampoo_beta) * (y @ y.swapaxes(0, 1))
                        new[side] = algebra.normal(self.shampoo_beta * sides[side] + moment)
            left, right = (sides.get(basis) for basis in ("QL", "QR"))
            if left is not None:
                x = (left.swapaxes(0, 1) if phase == 0 else left) @ x
            if right is not None:
                x = x @ (right if phase == 0 else right.swapaxes(0, 1))
            u[...] = x.reshape(u.shape)
        return new

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        m, v, *own = states
        shape = as_matrix(p.shape)
        b1, b2 = self.betas if t > 1 else (1.0, 1.0)
        sides = dict(zip(self.sides(p.shape), own, strict=True))
        m = b1 * m + (1 - b1) * g
        matrix, mean = g.reshape(*shape), m.reshape(*shape)
        for side, moment in (("L", matrix @ matrix.T), ("R", matrix.T @ matrix)):
            if side not in sides:
                continue
            q = self._basis(sides[side], sides["Q" + side], t)
            sides["Q" + side] = q
            beta = self.shampoo_beta
            sides[side] = beta * sides[side] + (1 - beta) * moment
        matrix, mean = (self._rotated(x, sides.get("QL"), sides.get("QR")) for x in (matrix, mean))
        v = b2 * v.reshape(*shape) + (1 - b2) * (matrix * matrix)
        n = ratio(mean, np.sqrt(v) + self.eps)
        left, right = (None if q is None else q.T for q in map(sides.get, ("QL", "QR")))
        n = self._rotated(n, left, right)
        step = 0.0
        if t > 1:
            c1, c2 = (textbook_correction(beta, t - 1) for beta in self.betas)
            step = lr * math.sqrt(c2) / c1
        return step * n.reshape(*p.shape), (m, v.reshape(*p.shape), *sides.values())

    def _basis(self, moment: Array, basis: Array, t: int) -> Array:
        if t < 2 or (t - 2) % self.precondition_frequency:
            return basis
        old = np.asarray(getattr(basis, "value", basis))
        find = eigenbasis if t == 2 else lambda a: refined(a, old)
        q = through(moment, find, 1 / 64)  # rounded once: the same computation in float64
        return q.astype(moment.dtype) if isinstance(q, np.ndarray) else q

    @staticmethod
    def _rotated(x: Array, left: Array | None, right: Array | None) -> Array:
        x = x if left is None else left.T @ x
        return x if right is None else x @ right


def eigenbasis(moment: np.ndarray) -> np.ndarray:
    """Eigenvectors of a symmetric matrix, by falling eigenvalue, in float64; NaN where it is not
    finite, the identity where LAPACK finds none."""
    if not np.isfinite(moment).all():
        return np.full(moment.shape, np.nan)
    try:
        vectors: np.ndarray = np.linalg.eigh(moment.astype(np.float64))[1]
    except np.linalg.LinAlgError:
        return np.eye(len(moment))
    return vectors[:, ::-1]


def refined(moment: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """The basis after one step of orthogonal iteration, each vector in its place, in float64; NaN
    where anything is not finite."""
    a, q = moment.astype(np.float64), basis.astype(np.float64)
    shift = 1e-7 * np.trace(a)
    if not (np.isfinite(a).all() and np.isfinite(q).all()):
        return np.full(a.shape, np.nan)
    if shift <= 0.0:
        return q
    product = a @ q
    order = np.argsort(-np.sum(q * product, axis=0), kind="stable")
    new = np.empty_like(q)
    new[:, order] = np.linalg.qr((product + shift * q)[:, order])[0]
    return new
