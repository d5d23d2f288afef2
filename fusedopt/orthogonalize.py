"""The nearest orthogonal matrix, nearly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from .arrays.formats import FLOAT32, FLOAT64
from .linalg.coefficients import Row, coefficient_set
from .linalg.newton_schulz import Gram, Iteration, Norm, Workspace, no_unit
from .rules.hyperparameters import Count, NonNegative, QuinticSet, check_field


def orthogonalize(
    x: np.ndarray,
    *,
    steps: int = 5,
    coefficients: str | Row | Sequence[Row] = "keller",
    norm: Norm = "frobenius",
    gram: Gram = "auto",
    eps: float = 1e-30,
    dtype: Literal["bfloat16"] | None = None,
) -> np.ndarray:
    """Return Newton-Schulz's approximation to u v^T, of the decomposition x = u s v^T.

    Parameters
    ----------
    x : array of float32 or float64, shape (..., rows, columns)
        A matrix or a stack of them; left alone.
    steps : int, default 5
        Number of iterations.
    coefficients : {"keller", "you", "cans", "polar_express"} or sequence, default "keller"
        The name of a set, one (a, b, c), or a list of `steps` of them.
    norm : {"frobenius", "aol"}, default "frobenius"
        Norm that x is divided by; "aol" divides each row by its own.
    gram : {"auto", True, False}, default "auto"
        Whether to iterate on the Gram matrix; "auto" does where that is faster.
    eps : float, default 1e-30
        Added to the norm.
    dtype : {None, "bfloat16"}, default None
        Dtype of the factors of matrix products; by default that of `x`. "bfloat16" needs a
        processor with AMX or AVX512-BF16; `fo.info()["matrix_units"]` says which there is.

    Returns
    -------
    array
        A new array of the shape and dtype of `x`. A zero matrix stays zero; an infinity or NaN
        makes its matrix NaN.

    Raises
    ------
    TypeError
        If a value is of the wrong kind.
    ValueError
        If a value does not fit, or if there are no products of bfloat16 here.

    Notes
    -----
    The arithmetic is done in the dtype of `x`. `Muon` does the same to its momentum.

    With "bfloat16" the factors of each product are rounded to it and sums are of float32. That is
    more accurate than an iteration all of whose arrays are in bfloat16, and as rough as that where
    `x` has small singular values, which the iteration amplifies with their rounding: elements
    of Gaussian matrices differ from the exact iteration's by up to 3 % of the largest.

    References
    ----------
    See `fusedopt.linalg.coefficients.coefficient_set` and
    `fusedopt.linalg.newton_schulz.Iteration`.

    Examples
    --------
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
        "float32" if dtype is None else check_field(where("dtype"), Literal["bfloat16"], dtype),
    )
    iteration.check("orthogonalize(dtype)")
    stack = math.prod(x.shape[:-2]), *x.shape[-2:]
    if dtype is not None and (reason := no_unit()):
        raise ValueError(f"orthogonalize(dtype): {reason}")
    wanted = ([stack], []) if dtype is None else ([], [stack])
    workspace = Workspace(*wanted, np.dtype(x.dtype.name))
    result = workspace.direction.reshape(x.shape)
    result[...] = x
    workspace.orthogonalize(result, stack, iteration, 1.0)
    return result
