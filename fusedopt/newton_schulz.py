"""Newton-Schulz iterations in buffers that are made once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """The matrix as which an array is treated: the first dimension against all others."""
    return shape[0], math.prod(shape[1:])


class Workspace:
    """The buffers of the largest matrix, shared by all matrices of an optimizer.

    shapes: of the matrices; dtype: of the arithmetic.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], dtype: np.dtype) -> None:
        whole, square = _extents(shapes)
        self._x, self._y, self.direction = (np.empty(whole, dtype) for _ in range(3))
        self._gram, self._square = (np.empty(square, dtype) for _ in range(2))
        self.nbytes = self.bytes_for(shapes, dtype)

    @staticmethod
    def bytes_for(shapes: Sequence[tuple[int, int]], dtype: np.dtype) -> int:
        """What a workspace takes of memory."""
        whole, square = _extents(shapes)
        return (3 * whole + 2 * square) * dtype.itemsize

    def orthogonalize(
        self,
        u: np.ndarray,
        coefficients: Sequence[tuple[float, float, float]],
        eps: float,
        factor: float,
    ) -> None:
        """Replaces u by factor times its Newton-Schulz iterate, and allocates nothing for it.

        u: array of the workspace's dtype, in any layout, treated as a matrix. coefficients:
        (a, b, c) of each iteration x := a x + (b A + c A^2) x, A = x x^T, from
        x = u / (||u|| + eps).
        """
        rows, cols = as_matrix(u.shape)
        n, m = sorted((rows, cols))
        x, y = (b[: n * m].reshape(n, m) for b in (self._x, self._y))
        gram, square = (b[: n * n].reshape(n, n) for b in (self._gram, self._square))
        upright = x if rows <= cols else y.reshape(rows, cols)  # as u stands, in C order
        np.copyto(upright.reshape(u.shape), u)
        if upright is not x:
            np.copyto(x, upright.T)
        # Whatever np.seterr says: an error here would leave a step half done.
        with np.errstate(all="ignore"):
            _normalize(x, eps, y)
            for a, b, c in coefficients:
                np.matmul(x, x.T, out=gram)
                np.matmul(gram, gram, out=square)
                square *= c
                gram *= b
                gram += square
                np.matmul(gram, x, out=y)
                x *= a
                x += y
            x *= factor
        if upright is not x:
            np.copyto(upright, x.T)
        np.copyto(u, upright.reshape(u.shape))


def _extents(shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Elements of the largest matrix, and of the largest Gram matrix."""
    whole = max((rows * cols for rows, cols in shapes), default=0)
    return whole, max((min(shape) ** 2 for shape in shapes), default=0)


def _normalize(x: np.ndarray, eps: float, scratch: np.ndarray) -> None:
    """x := x / (||x|| + eps), without over- or underflow of the sum of squares."""
    np.abs(x, out=scratch)
    largest = float(scratch.max())
    if 0.0 < largest < np.inf:
        # Powers of two scale exactly, so that the scaling leaves no trace in the result.
        power = float(2.0 ** np.clip(-np.frexp(largest)[1], -1000, 1000))
        if x.dtype == np.float32 and power > 2.0**120:  # denormals: two steps stay in range
            x *= x.dtype.type(2.0**100)
            power, eps = power * 2.0**-100, eps * 2.0**100
        x *= x.dtype.type(power)
        norm = float(np.sqrt(np.vdot(x, x)))
        x /= x.dtype.type(norm + eps * power)
    elif largest != 0.0:  # an infinity or a NaN: the result must show it
        x *= x.dtype.type(np.nan)
