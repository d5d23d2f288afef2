"""Muon."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from ..linalg.coefficients import KELLER, coefficient_set
from ..linalg.newton_schulz import (
    Gram,
    Iteration,
    Norm,
    Products,
    Stack,
    Workspace,
    as_matrix,
    no_unit,
)
from ..programs.arithmetic import Array, correction, ratio, textbook_correction
from ..programs.program import Operation
from .base import DecayForm
from .hyperparameters import Count, Fraction, LearningRate, NonNegative, QuinticSet
from .matrix import DeviceAlgebra, MatrixRule, Member, through
from .momentum import Momentum
from .nesterov import nesterov

SHORT_FACTOR = 16.0
"""With products of bfloat16, elements differ by at most this over the root of the longer side,
which is about the largest element of a random orthogonal matrix: where a matrix has a low rank, its
other singular values depend on nothing but rounding, of which the iteration makes values up to 1.
Measured over all sets of coefficients: up to 2 for rank one and low rank in five iterations, 6 in
eight, 14 in ten; 0.3 for singular values that fall as 1/k, 0.15 for Gaussian matrices."""


def muon(p, g, m, o, mu, a, lr):
    m = mu * m + a * g
    return lr * o, m


@dataclass(frozen=True, kw_only=True)
class Muon(MatrixRule):
    """Momentum, orthogonalised, for matrices.

    Parameters
    ----------
    momentum : float
        Decay rate mu in [0, 1) of the average of the gradient; default 0.95.
    nesterov : bool
        Orthogonalise the direction one step ahead; default True.
    form : {"ema", "heavy_ball"}
        Form of the momentum; default "ema".
    ns_steps : int
        Number of Newton-Schulz iterations, at least 1; default 5.
    ns_coefficients : str, triple of float, or sequence of triples
        Coefficients of the iterations; default (3.4445, -4.775, 2.0315).
    norm : {"frobenius", "aol"}
        Norm that scales u before the iterations; default "frobenius".
    gram : {"auto", True, False}
        Whether to iterate on the Gram matrix; default "auto".
    ns_dtype : {"float32", "bfloat16"}
        Dtype of the factors of matrix products; default "float32".
    split : int
        Number of matrices that lie one below the other along the first axis; default 1.
    scale : {"original", "match_rms_adamw", "spectral", "none"}
        Factor s of the step by the shape of the matrix; default "original".
    eps : float
        Number >= 0 added to the norm of u; default 1e-30.
    bias_correction : bool
        Divide g and m by their bias in u; default False.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        "ema"         m := mu m + (1 - mu) g    u = (1 - mu) g + mu m with `nesterov`, else m
        "heavy_ball"  m := mu m + g             u = g + mu m with `nesterov`, else m
        o = NewtonSchulz(u / (||u|| + eps)),    p := p - lr s o

    Newton-Schulz: `ns_steps` times x := a x + (b A + c A^2) x with A = x x^T. `ns_coefficients`:
    (a, b, c), a list of `ns_steps` of them, or the name of a set: "keller", "you", "cans",
    "polar_express" (`fusedopt.linalg.coefficients` has sources and accuracy). `norm`: "aol" divides
    each row of u by its own norm. `gram`: iterate on the Gram matrix, True, False, or "auto": where
    that is faster; `Optimizer.describe` shows it. `ns_dtype`: "bfloat16" multiplies matrices in
    bfloat16, by AMX or AVX512-BF16, on a GPU by PyTorch, several times as fast and rougher
    (`fo.orthogonalize` says by how much); "float32" in the dtype of the arithmetic, which is
    float64 for such parameters.

    Parameters of more than two dimensions are flattened to (shape[0], the rest). `split` n: the
    first axis is that of n matrices one below the other, such as the heads, or the query, key and
    value, of one fused projection; each is orthogonalised by itself. s by `scale`, of each matrix:
    "original" sqrt(max(1, rows/cols)), "match_rms_adamw" 0.2 sqrt(max(rows, cols)), "spectral"
    sqrt(rows/cols), "none" 1. Rows are outputs; in optax's own layout they are the columns, unless
    its `MuonDimensionNumbers` says otherwise. `bias_correction` (optax) divides g by 1 - mu^t and m
    by 1 - mu^(t+1) in u. eps only guards a zero gradient. Vectors are refused: `with_adamw` sends
    them to AdamW.

    State: m.

    References
    ----------
    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.zeros((2, 3)), np.array([[1.0, 2, 3], [4, 5, 6]])
    >>> rule = fo.Muon(lr=1.0)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(3))
    [[ 0.568 -0.058 -0.684]
     [-0.563 -0.406 -0.248]]
    """

    name = "muon"
    year = 2024
    settled = ("form",)
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"nesterov": False, "scale": "match_rms_adamw"},
        {"form": "heavy_ball", "scale": "spectral", "ns_steps": 3},
        {"ns_coefficients": "polar_express", "ns_steps": 8, "gram": True},
        {"ns_coefficients": "you", "ns_steps": 4, "norm": "aol"},
        {"bias_correction": True, "scale": "none"},
        {"bias_correction": True, "nesterov": False},
    )

    lr: LearningRate = 2e-2
    momentum: Fraction = 0.95
    nesterov: bool = True
    form: Literal["ema", "heavy_ball"] = "ema"
    ns_steps: Count = 5
    ns_coefficients: QuinticSet = KELLER
    norm: Norm = "frobenius"
    gram: Gram = "auto"
    ns_dtype: Products = "float32"
    split: Count = 1
    scale: Literal["original", "match_rms_adamw", "spectral", "none"] = "original"
    eps: NonNegative = 1e-30
    bias_correction: bool = False
    weight_decay: NonNegative = 0.0
    decay: DecayForm = "decoupled"

    def check_together(self) -> None:
        if self.bias_correction and self.form != "ema":
            raise ValueError(
                f"{type(self).__name__}(bias_correction): only the form 'ema' has a bias; got"
                f" {self.form!r}"
            )
        if not self.scheduled:
            _ = self.iteration  # or why there is none

    @property
    def states(self) -> tuple[str, ...]:
        return ("m",)

    def refuses(self, p: np.ndarray) -> str | None:
        reason = super().refuses(p)
        short = self.short_products and isinstance(p, np.ndarray)  # a device's library has its own
        if reason is None and short and (lacking := no_unit()):
            return f"{type(self).__name__}(ns_dtype): {lacking}"
        if reason is None and p.shape[0] % self.split:
            return (
                f"{type(self).__name__}(split={self.split}) splits the first axis into equal parts,"
                f" got shape {p.shape}; give such parameters a rule of their own by a pattern"
            )
        return reason

    def operations(self) -> tuple[Operation, ...]:
        direction = Operation(
            "nesterov" if self.nesterov else "momentum",
            ("p", "g", "m", "work"),
            self._direction,
            loop="peek",
            element=nesterov if self.nesterov else Momentum.element,
        )
        operands = ("p", "g", "m", "work")
        commit = Operation("muon", operands, self._commit, phase=1, written=1, element=muon)
        return (direction, commit)

    @property
    def _gain(self) -> float:
        return 1.0 - self.momentum if self.form == "ema" else 1.0

    def _direction(self, t: int, lr: float) -> tuple[float, ...]:
        mu, a = self.momentum, self._gain
        # A positive factor on the whole direction disappears in the normalisation.
        c_g = c_m = 1.0
        if self.bias_correction:
            c_g, c_m = correction(mu, t), correction(mu, t + 1)
        return (mu, a, a / c_g, mu / c_m) if self.nesterov else (mu, a, 1.0 / c_g)

    def _commit(self, t: int, lr: float) -> tuple[float, ...]:
        return self.momentum, self._gain, lr

    def factor(self, rows: int, cols: int) -> float:
        """Return s, by which the orthogonalised direction is multiplied."""
        if self.scale == "original":
            return math.sqrt(max(1.0, rows / cols))
        if self.scale == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, cols))
        return math.sqrt(rows / cols) if self.scale == "spectral" else 1.0

    @functools.cached_property
    def iteration(self) -> Iteration:
        """The iteration that is applied to each matrix."""
        coefficients = coefficient_set(
            self.ns_coefficients, self.ns_steps, f"{type(self).__name__}(ns_coefficients)"
        )
        iteration = Iteration(coefficients, self.norm, self.gram, self.eps, self.ns_dtype)
        iteration.check(f"{type(self).__name__}(ns_dtype)")
        return iteration

    @property
    def short_products(self) -> bool:
        return self.ns_dtype == "bfloat16"

    def matrices(self, shape: tuple[int, ...]) -> Stack:
        rows, cols = as_matrix(shape)
        return self.split, rows // self.split, cols

    def between(
        self,
        phase: int,
        works: Sequence[np.ndarray],
        workspace: Workspace,
        members: Sequence[Member | None],
    ) -> None:
        # Leaves of the batch that have no gradient are orthogonalised too, whatever is there.
        (directions,) = works
        if directions.size:
            stack = self.stack(directions)
            workspace.orthogonalize(directions, stack, self.iteration, self.factor(*stack[1:]))

    def on_device(
        self, phase: int, works: Mapping[str, Any], sides: Mapping[str, Any], algebra: DeviceAlgebra
    ) -> dict[str, Any]:
        u = works["work"]
        stack = self.matrices(tuple(u.shape))
        x = u.reshape(stack)
        if phase == 0:
            x = algebra.orthogonalized(x, self.iteration)
        x, new = self.scaled_on_device(phase, x, sides, algebra)
        u[...] = x.reshape(u.shape)
        return new

    def scaled_on_device(
        self, phase: int, x: Any, sides: Mapping[str, Any], algebra: DeviceAlgebra
    ) -> tuple[Any, dict[str, Any]]:
        """Return what follows from a stack of matrices after a phase, and new side states."""
        return self.factor(*x.shape[1:]) * x, {}

    def stack(self, directions: np.ndarray) -> Stack:
        """Return the matrices of several parameters, which the first dimension counts."""
        leaves, *shape = directions.shape
        count, rows, cols = self.matrices(tuple(shape))
        return leaves * count, rows, cols

    def note(self, shape: tuple[int, ...]) -> str:
        stack = count, rows, cols = self.matrices(shape)
        treated = "" if stack == (1, *shape) else f", as {count} of ({rows}, {cols})"
        form = self.iteration.describe(rows, cols)
        return f"{type(self).__name__} of shape {shape}{treated}: {form}"

    def orthogonalized(self, u: np.ndarray) -> np.ndarray:
        """Return s o of a direction, in its shape, in plain NumPy; `between` is the fast form."""
        if u.size == 0:
            return u.copy()
        return self.factor(*self.matrices(u.shape)[1:]) * self.polar(u)

    def polar(self, u: np.ndarray) -> np.ndarray:
        """Return the orthogonalised direction, without the scale s."""
        if u.size == 0:
            return u.copy()
        matrices = [self._textbook(matrix) for matrix in u.reshape(self.matrices(u.shape))]
        return np.stack(matrices).reshape(u.shape)

    def _textbook(self, matrix: np.ndarray) -> np.ndarray:
        wide = matrix.shape[0] <= matrix.shape[1]
        x = matrix if wide else matrix.T
        shift = -np.frexp(np.max(np.abs(x)))[1]  # by a power of two: the squares stay in range
        x = np.ldexp(x, shift)
        coefficients = self.iteration.coefficients
        if self.norm == "frobenius":
            norm = np.sqrt(np.sum(x * x))
        else:
            norm = np.sqrt(np.sum(np.abs(x @ x.T), axis=1, keepdims=True))
        x = ratio(x, coefficients.prescale * norm + np.ldexp(self.eps, shift))
        for a, b, c in coefficients.rows:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        o: np.ndarray = x if wide else x.T
        return o

    def through(self, u: Array, function: Callable[[np.ndarray], Any], size: float) -> Any:
        """`function`, which is `orthogonalized` or `polar`, of a reference's direction, with the
        rounding that it amplifies. size: by which orthogonal matrices are multiplied in it.
        """
        if isinstance(u, np.ndarray) or self.ns_dtype == "float32":
            return through(u, function, self.iteration.coefficients.amplification)
        _, *sides = self.matrices(u.shape)
        return u.within(function, SHORT_FACTOR * size / math.sqrt(max(1, *sides)))

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        u, m = self.textbook_direction(g, states[0], t)
        size = self.factor(*self.matrices(p.shape)[1:]) if 0 not in p.shape else 0.0
        return lr * self.through(u, self.orthogonalized, size), (m,)

    def textbook_direction(self, g: Array, m: Array, t: int) -> tuple[Array, Array]:
        """Return u and the new m."""
        mu = self.momentum
        gained = (1 - mu) * g if self.form == "ema" else g
        m = mu * m + gained
        c_g = c_m = 1.0
        if self.bias_correction:
            c_g, c_m = textbook_correction(mu, t), textbook_correction(mu, t + 1)
        return gained / c_g + mu * m / c_m if self.nesterov else m / c_g, m
