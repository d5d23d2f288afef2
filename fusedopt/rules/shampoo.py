"""Shampoo."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..linalg.newton_schulz import Stack, Workspace, as_matrix
from ..programs.arithmetic import Array, correction, moved, ratio, textbook_correction
from ..programs.program import Operation
from .base import DecayForm
from .hyperparameters import Betas, Count, LearningRate, NonNegative, UpToOne
from .matrix import MatrixRule, Member, accumulate, multiply, one, through
from .momentum import Momentum
from .muon import muon
from .sgd import SGD
from .soap import eigenbasis


@dataclass(frozen=True, kw_only=True)
class Shampoo(MatrixRule):
    """The gradient between inverse roots of its second moments, for matrices.

    Parameters
    ----------
    betas : pair of float
        Decay rates b1 and b2 in [0, 1) of the averages of the gradient and of its square;
        default (0.9, 0.999).
    shampoo_beta : float
        Decay rate b in [0, 1] of L and R, which are sums where it is 1; default 1.0.
    eps : float
        Number >= 0 added to the eigenvalues of L and R in the roots; default 1e-12.
    precondition_frequency : int
        Number of steps, at least 1, between computations of the inverse roots; default 10.
    max_precond_dim : int
        Longest side of a block that has an L and R of its own; default 1024.
    grafting : {"adam", "rmsprop", "adagrad", "sgd", "none"}
        Rule whose step's norm the step has; default "adam".
    grafting_eps : float
        Number >= 0 added to the root in that rule's denominator; default 1e-8.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    With G the gradient as a matrix, which is (shape[0], the rest)::

        m := b1 m + (1 - b1) G          u = m / (1 - b1^t)
        L := b L + (1 - b) G G^T        R := b R + (1 - b) G^T G
        s = (L + eps)^(-1/4) u (R + eps)^(-1/4)         p := p - lr s ||d|| / ||s||

    d is the step of the rule in `grafting`: "adam" u / (sqrt(v / (1 - b2^t)) + grafting_eps),
    "rmsprop" u / (sqrt(v) + grafting_eps), both with v := b2 v + (1 - b2) G^2, "adagrad" as
    "rmsprop" with v := v + G^2, "sgd" u. "none" is s itself. b is `shampoo_beta`; where it is 1,
    G G^T and G^T G are added as they are, and else L and R are divided by 1 - b^t in the roots.

    The roots are computed in float64 after every `precondition_frequency` steps, for the next
    ones. Until there are some the steps are d, or u without grafting. In directions that no
    gradient had, the roots are as large as eps and the rounding of L and R let them become.

    A matrix with a side longer than `max_precond_dim` is split into as few equal blocks as
    possible, each with its own L, R and norms. L, R and the roots PL and PR are in the compute
    type, whatever the optimizer's `state_dtype`; m and v are as `state_dtype` says. Once L or R is
    not finite, its block becomes NaN, and no other parameter does. Vectors are refused.

    States: m; v with "adam", "rmsprop" and "adagrad"; L, R, PL, PR, of blocks [i, j] where there
    are several.

    References
    ----------
    Gupta, Koren, Singer 2018, arXiv 1802.09568; Shi et al. 2023, arXiv 2309.06497, and its code
    (https://github.com/facebookresearch/optimizers), whose defaults these are but for lr and
    grafting (those of its examples) and the frequency (1 there, 100 in its examples). It has the
    gradient of a step in the roots of that step, not of the next, adds eps only where an eigenvalue
    is less, splits blocks off at full length, makes a vector of a matrix that has no more elements
    than a block's side, and gives each dimension of a filter its own factor. Of equal blocks and
    gradients, all steps are equal but those in which it computes roots.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.zeros((2, 3)), np.array([[1.0, 2, 3], [4, 5, 6]])
    >>> rule = fo.Shampoo(lr=1.0, grafting="sgd", precondition_frequency=1)
    >>> states = rule.init(p)
    >>> for t in (1, 2):
    ...     fo.update(rule, t, p, g, *states)
    >>> print(p.round(3))
    [[ 2.897 -2.777 -8.45 ]
     [-8.767 -8.816 -8.865]]
    """

    name = "shampoo"
    year = 2018
    settled = ("precondition_frequency", "max_precond_dim", "grafting")
    works = ("work", "turned")
    branches = 3
    examples = (
        {},
        {"precondition_frequency": 1, "shampoo_beta": 0.9, "eps": 1e-6},
        {"precondition_frequency": 2, "grafting": "rmsprop", "max_precond_dim": 40},
        {"precondition_frequency": 1, "grafting": "adagrad"},
        {"max_precond_dim": 3},
        {"precondition_frequency": 1, "grafting": "sgd"},
        {"precondition_frequency": 1, "grafting": "none", "betas": (0.0, 0.99), "eps": 0.1},
    )

    lr: LearningRate = 1e-3
    betas: Betas = (0.9, 0.999)
    shampoo_beta: UpToOne = 1.0
    eps: NonNegative = 1e-12
    precondition_frequency: Count = 10
    max_precond_dim: Count = 1024
    grafting: Literal["adam", "rmsprop", "adagrad", "sgd", "none"] = "adam"
    grafting_eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.0
    decay: DecayForm = "decoupled"

    @property
    def states(self) -> tuple[str, ...]:
        return ("m",) if self.grafting in ("sgd", "none") else ("m", "v")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset({"v"} & {*self.states})

    @property
    def _outer(self) -> tuple[float, float]:
        """The coefficients of L and of the new product."""
        b = self.shampoo_beta
        return b, 1.0 - b if b < 1.0 else 1.0

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Return the numbers of rows and columns of blocks, and of a block's rows and columns."""
        rows, cols = as_matrix(shape)
        down, across = (max(1, -(-n // self.max_precond_dim)) for n in (rows, cols))
        return down, across, -(-rows // down), -(-cols // across)

    def sides(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        down, across, *sizes = self.grid(shape)
        blocks = () if down * across == 1 else (down, across)
        left, right = ((*blocks, n, n) for n in sizes)
        return {"L": left, "R": right, "PL": left, "PR": right}

    def matrices(self, shape: tuple[int, ...]) -> Stack:
        return 1, *as_matrix(shape)

    def note(self, shape: tuple[int, ...]) -> str | None:
        down, across, *sizes = self.grid(shape)
        if down * across == 1:
            return None
        return f"Shampoo of shape {shape}: {down} x {across} blocks of at most {tuple(sizes)}"

    def operations(self) -> tuple[Operation, ...]:
        matrices = ("p", "g", "m", "work")
        mean = Operation("momentum", matrices, self._mean, "peek", element=Momentum.element)
        commit = Operation("muon", matrices, self._commit, phase=1, written=1, element=muon)
        gradient = Operation("sgd", ("p", "g", "turned"), one, "peek", element=SGD.element)
        if self.grafting == "none":
            return gradient, mean, commit
        again = mean._replace(operands=("p", "g", "m", "turned"), phase=1)
        grafted: tuple[Operation, ...] = (again,)
        if "v" in self.states:
            square = ("sophia_refresh_square", ("v", "turned"), self._squares)
            divide = ("normalize", ("turned", "v"), self._division)
            grafted = Operation(*square, "other", 1), again, Operation(*divide, "other", 1)
        return gradient, mean, *grafted, commit._replace(phase=2)

    def _mean(self, t: int, lr: float) -> tuple[float, ...]:
        b1 = self.betas[0]
        return b1, 1.0 - b1, 1.0 / correction(b1, t)

    def _squares(self, t: int, lr: float) -> tuple[float, ...]:
        b2 = self.betas[1]
        return (1.0, 1.0) if self.grafting == "adagrad" else (b2, 1.0 - b2)

    def _division(self, t: int, lr: float) -> tuple[float, ...]:
        k = 1.0 / correction(self.betas[1], t) if self.grafting == "adam" else 1.0
        return k, self.grafting_eps

    def _commit(self, t: int, lr: float) -> tuple[float, ...]:
        return self.betas[0], 1.0 - self.betas[0], lr

    def before(self, t: int, sides: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if not self._due(t):
            return {}
        b = self.shampoo_beta
        c = correction(b, t - 1) if b < 1.0 else 1.0
        return {"P" + side: inverse_roots(sides[side], c, self.eps) for side in ("L", "R")}

    def _due(self, t: int) -> bool:
        return t > 1 and (t - 1) % self.precondition_frequency == 0

    def between(
        self,
        phase: int,
        works: Sequence[np.ndarray],
        workspace: Workspace,
        members: Sequence[Member | None],
    ) -> None:
        work, turned = works
        if phase == 0:
            keep, gain = self._outer
            for _, block, spare, sides in self._blocks(turned, 1, workspace, members):
                accumulate(sides["L"], block, spare, keep, gain)
                accumulate(sides["R"], block.T, spare, keep, gain)
            for t, block, spare, sides in self._blocks(work, 0, workspace, members):
                if t > self.precondition_frequency:
                    multiply(sides["PL"], block, sides["PR"], spare)
            return
        for s, d, member in zip(work, turned, members, strict=True):
            if member is not None and member.t <= self.precondition_frequency:
                np.copyto(s, d)
        norms = [_norm(*pair) for _, *pair, _ in self._blocks(turned, 1, workspace, members)]
        blocks = self._blocks(work, 0, workspace, members)
        for (t, block, spare, _), norm in zip(blocks, norms, strict=True):
            if t > self.precondition_frequency:
                own = _norm(block, spare)
                block *= block.dtype.type(norm / own if own else 0.0)

    def _blocks(
        self,
        work: np.ndarray,
        number: int,
        workspace: Workspace,
        members: Sequence[Member | None],
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
        """The blocks of all matrices in a work space, which may be changed: each with its leaf's
        step, as much room, and its side states."""
        leaves, *rest = work.shape
        down, across, height, width = self.grid(tuple(rest))
        x, y = workspace.opened(work, (leaves, *as_matrix(tuple(rest))), number)
        for matrix, spare, member in zip(x, y, members, strict=True):
            if member is None or not matrix.size:
                continue
            for i, j in np.ndindex(down, across):
                block = matrix[i * height : (i + 1) * height, j * width : (j + 1) * width]
                room = spare.reshape(-1)[: block.size].reshape(block.shape)
                sides = {}
                for name, side in member.sides.items():
                    n = len(block) if name.endswith("L") else len(block.T)
                    sides[name] = side.reshape(down, across, *side.shape[-2:])[i, j, :n, :n]
                yield member.t, block, room, sides
        workspace.closed(work, x)

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        rows, cols = as_matrix(p.shape)
        down, across, height, width = self.grid(p.shape)
        m, *v = states[: len(self.states)]
        sides = dict(zip(self.sides(p.shape), states[len(self.states) :], strict=True))
        b1, b2 = self.betas

        def stacked(x: np.ndarray) -> np.ndarray:
            margins = (0, down * height - rows), (0, across * width - cols)
            padded = np.pad(x.reshape(rows, cols), margins)
            return padded.reshape(down, height, across, width).swapaxes(1, 2)

        def joined(x: np.ndarray) -> np.ndarray:
            whole = x.swapaxes(1, 2).reshape(down * height, across * width)
            return whole[:rows, :cols].reshape(p.shape)

        m = b1 * m + (1 - b1) * g
        u = d = m / textbook_correction(b1, t)
        if v:
            v = [v[0] + g * g if self.grafting == "adagrad" else b2 * v[0] + (1 - b2) * (g * g)]
            c = textbook_correction(b2, t) if self.grafting == "adam" else 1.0
            d = ratio(u, np.sqrt(v[0] / c) + self.grafting_eps)
        if self._due(t):
            b = self.shampoo_beta
            c = textbook_correction(b, t - 1) if b < 1 else 1.0
            for side in ("L", "R"):  # rounded once: the same computation in float64
                roots = through(sides[side], lambda a: inverse_roots(a, c, self.eps), 1 / 64)
                sides["P" + side] = roots

        def moments(x: Array, inside: np.ndarray) -> Array:
            """The products of rows; the margins stay zero, whatever is beside them."""
            own = inside @ _transposed(inside) > 0
            return moved(x @ moved(x, _transposed), lambda a: np.where(own, a, 0.0))

        x, inside = moved(g, stacked), stacked(np.ones(p.shape))
        left, right = moments(x, inside), moments(moved(x, _transposed), _transposed(inside))
        keep, gain = self._outer
        for side, moment in (("L", left), ("R", right)):
            sides[side] = keep * sides[side] + gain * moment.reshape(*sides[side].shape)
        if t > self.precondition_frequency:
            left = sides["PL"].reshape(down, across, height, height)
            right = sides["PR"].reshape(down, across, width, width)
            s, d = left @ moved(u, stacked) @ right, moved(d, stacked)
            if self.grafting != "none":
                s = s * ratio(_textbook_norm(d), _textbook_norm(s))
            d = moved(s, joined)
        return lr * d, (m, *v, *sides.values())


def _transposed(x: np.ndarray) -> np.ndarray:
    return x.swapaxes(-1, -2)


def _textbook_norm(x: Array) -> Array:
    """The norms of blocks, scaled by powers of two: their squares stay in range."""
    values = np.abs(np.asarray(getattr(x, "value", x)))
    largest = values.max(axis=(-2, -1), keepdims=True, initial=0.0)
    shift = np.frexp(largest)[1]
    x = moved(x, lambda a: np.ldexp(a, -shift))
    root = np.sqrt((x * x).sum(axis=-1, keepdims=True).sum(axis=-2, keepdims=True))
    return moved(root, lambda a: np.ldexp(a, shift))


def _norm(x: np.ndarray, spare: np.ndarray) -> float:
    """The Euclidean norm, whose squares stay in range; spare: of x's shape, overwritten."""
    most = float(max(x.max(), -x.min()))
    if not most:
        return 0.0
    np.divide(x, most, out=spare)
    flat = spare.reshape(-1)
    return most * math.sqrt(np.dot(flat, flat))


def inverse_roots(moments: np.ndarray, c: float, eps: float) -> np.ndarray:
    """The inverse fourth roots of symmetric matrices over c, plus eps, in float64; NaN where one is
    not finite. Eigenvalues that float32 has no normal numbers for count as zero, which has none."""
    roots = np.empty(moments.shape)
    for at in np.ndindex(moments.shape[:-2]):
        a = moments[at].astype(np.float64)
        q = eigenbasis(a)
        values = np.sum(q * (a @ q), axis=0) / c
        values = np.maximum(values, 0.0) + eps
        values[values < 2.0**-126] = 0.0
        roots[at] = ratio(q, values**0.25) @ q.T
    return roots
