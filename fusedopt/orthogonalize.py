"""The nearest orthogonal matrix, nearly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .arrays.formats import FLOAT32, FLOAT64
from .linalg.coefficients import Row, coefficient_set
from .linalg.newton_schulz import Gram, Iteration, Norm, Workspace
from .rules.hyperparameters import Count, NonNegative, QuinticSet, check_field


def orthogonalize(
    x: np.ndarray,
    *,
    steps: int = 5,
    coefficients: str | Row | Sequence[Row] = "keller",
    norm: Norm = "frobenius",
    gram: Gram = "auto",
    eps: float = 1e-30,
) -> np.ndarray:
    """Newton-Schulz's approximation to u v^T, where x = u s v^T is a singular value decomposition.

    x: float32 or float64, a matrix or a stack of them (..., rows, columns), left alone. steps: of
    the iteration. coefficients: "keller", "you", "cans", "polar_express", one (a, b, c) or a list
    of `steps` of them. norm: "frobenius", or "aol" for each row's own. gram: iterate on the Gram
    matrix: "auto" where that is faster, True, or False. eps: added to the norm. Returns a new
    array of x's shape and dtype, in which the arithmetic is done too; a zero matrix stays zero, an
    infinity or NaN makes its matrix NaN. `Muon` does the same to its momentum.

    Raises TypeError for a value of the wrong kind, ValueError for one that does not fit.

    Sources: see `fusedopt.linalg.coefficients.coefficient_set` and
    `fusedopt.linalg.newton_schulz.Iteration`.

    >>> import numpy as np, fusedopt as fo
    >>> x = np.array([[1.0, 2, 3], [4, 5, 6]])
    >>> print(fo.orthogonalize(x, coefficients="polar_express", steps=8).round(4))
    [[-0.5778  0.1151  0.808 ]
     [ 0.7067  0.5658  0.4248]]
    """
    if not isinstance(x, np.ndarray) or x.dtype not in (FLOAT32, FLOAT64):
        kind = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
        raise TypeError(f"x: expected an ndarray of float32 or float64, got {kind}; convert it")
    if x.ndim < 2:
        raise ValueError(f"x: expected a matrix or a stack of them, got the shape {x.shape}")
    where = "orthogonalize({})".format
    steps = check_field(where("steps"), Count, steps)
    choice = check_field(where("coefficients"), QuinticSet, coefficients)
    iteration = Iteration(
        coefficient_set(choice, steps, where("coefficients")),
        check_field(where("norm"), Norm, norm),
        check_field(where("gram"), Gram, gram),
        check_field(where("eps"), NonNegative, eps),
    )
    stack = math.prod(x.shape[:-2]), *x.shape[-2:]
    workspace = Workspace([stack], np.dtype(x.dtype.name))
    result = workspace.direction.reshape(x.shape)
    result[...] = x
    workspace.orthogonalize(result, stack, iteration, 1.0)
    return result
