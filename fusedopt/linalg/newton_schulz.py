"""Newton-Schulz iterations in buffers that are made once."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from ..system.extension import core
from ..system.threads import in_use, most
from .coefficients import Coefficients, Row

Stack = tuple[int, int, int]
"""The numbers of matrices, rows and columns of a stack."""

Group = tuple[Row, ...]
"""One iteration, or two that are made together."""

Norm = Literal["frobenius", "aol"]
Gram = Literal["auto", True, False]
Products = Literal["float32", "bfloat16"]

BFLOAT16_ROUNDING = 2.0**-7
"""The relative error that bfloat16 may add to a singular value in each iteration: twice that of one
element."""

FARTHEST = 2.0
"""The largest singular value that may come of it: the sets in use stay below 1.25, "cans" comes to
2e17."""

UNITS_ISA = "x86_v4_bf16"
"""The instruction set to which the instructions for products of bfloat16 belong."""

SMALL = 1 << 16
"""Matrices of at most this size are the compiled core's, and those of several leaves are one stack,
each matrix on one thread. Five steps of one of 64x64, 128x128 and 256x256 took 0.12, 0.68 and 5.1
ms so, and by BLAS on two threads 0.33, 0.96 and 6.8."""

BATCH = 1 << 17
"""The number of elements from which on matrices go into one stack."""


def unit() -> str | None:
    """Return the name of the fastest instructions for products of bfloat16 that may be used."""
    return next(iter(core.matrix_units()), None) if core else None


def no_unit() -> str | None:
    """Return why there are no products of bfloat16, with the remedy; None where there are."""
    if unit() is not None:
        return None
    found = "the processor or this build has neither"
    remedy = "take 'float32'"
    if not core:
        found = "there is no compiled core"
    elif UNITS_ISA in core.levels():
        found = f"the instruction set in use is {core.get_level()!r}"
        remedy += f", or fo.set_isa({UNITS_ISA!r})"
    return f"'bfloat16' needs AMX or AVX512-BF16, and {found}; {remedy}"


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """The matrix as which an array is treated: the first dimension against all others."""
    return shape[0], math.prod(shape[1:])


def at_once(rows: int, cols: int) -> int:
    """Return the number of matrices of several leaves that go into one stack."""
    return BATCH // (rows * cols) if 0 < rows * cols <= SMALL else 1


class Batch(NamedTuple):
    """Leaves that are orthogonalised in one go, and the stack that they are together.

    short: whether the products are of bfloat16.
    """

    dtype: np.dtype
    short: bool
    stack: Stack
    members: list[int]


def batches(leaves: Iterable[tuple[int, np.dtype, bool, Stack, Hashable]]) -> list[Batch]:
    """The batches of leaves given by (number, dtype, short, stack, what else must be equal)."""
    latest: dict[Hashable, list[int]] = {}
    made = []
    for k, dtype, short, stack, rest in leaves:
        count, rows, cols = stack
        key = dtype, short, stack, rest
        if key not in latest or (len(latest[key]) + 1) * count > at_once(rows, cols):
            latest[key] = []
            made.append((dtype, short, stack, latest[key]))
        latest[key].append(k)
    return [
        Batch(dtype, short, (len(m) * c, rows, cols), m)
        for dtype, short, (c, rows, cols), m in made
    ]


def stacks(made: Sequence[Batch], dtype: np.dtype) -> tuple[list[Stack], list[Stack]]:
    """Return the stacks of a dtype's batches, and of those whose products are of bfloat16."""
    own = [b for b in made if b.dtype == dtype]
    return [b.stack for b in own if not b.short], [b.stack for b in own if b.short]


@dataclass(frozen=True)
class Iteration:
    """Newton-Schulz iterations: x = u / norm, then x := (a + b A + c A^2) x with A = x x^T.

    norm: "frobenius" divides u by prescale ||u|| + eps; "aol" each row i of it (column, if u is
    tall) by prescale sqrt(sum_j |u u^T|_ij) + eps, after which no singular value exceeds 1 (arXiv
    2208.03160, for Newton-Schulz arXiv 2512.04632). eps counts where u is nearly zero only.

    gram: True makes pairs of iterations on the Gram matrix R = x x^T of n x n elements alone:
    P0 = p(R), R := P0 R P0, P1 = p(R), x := (P1 P0) x; so x itself is multiplied once for two
    iterations (the idea: https://github.com/Dao-AILab/gram-newton-schulz). R loses the small
    singular values to rounding, and is computed anew from x before the next iteration ("reset").
    False makes every iteration on x; "auto" what takes fewer operations: pairs from an aspect
    ratio of 2 on. Small matrices are the compiled core's, which has no pairs.

    products: "bfloat16" rounds x, A and b A + c A^2 to that format wherever they are multiplied,
    adds in float32, and leaves all matrices to the compiled core.
    """

    coefficients: Coefficients
    norm: Norm
    gram: Gram
    eps: float
    products: Products = "float32"

    def check(self, owner: str) -> None:
        """ValueError where bfloat16 is too short for what else is asked."""
        if self.products == "float32":
            return
        if self.gram is True:
            raise ValueError(
                f"{owner}: pairs of iterations on the Gram matrix lose too much in 'bfloat16'; take"
                " gram='auto', or products of 'float32'"
            )
        reach = self.coefficients.reach(BFLOAT16_ROUNDING)
        if not reach < FARTHEST:
            raise ValueError(
                f"{owner}: with the rounding of 'bfloat16' these coefficients let singular values"
                f" grow to {reach:.2g}; take 'polar_express', or products of 'float32'"
            )

    def groups(self, rows: int, cols: int) -> list[Group]:
        """Singles and pairs of iterations, for a matrix of this shape."""
        if self.products == "bfloat16":
            return self._grouped(False)
        standard, paired = (self._grouped(paired) for paired in (False, True))
        if self.gram == "auto" and not self.in_core(rows, cols):
            return min(standard, paired, key=lambda groups: flops(rows, cols, groups))
        return paired if self.gram is True else standard

    def in_core(self, rows: int, cols: int) -> bool:
        """Return whether the compiled core makes the iterations of such a matrix."""
        small = core is not None and rows * cols <= SMALL and self.gram is not True
        return small and self.products == "float32"

    def _grouped(self, paired: bool) -> list[Group]:
        rows = self.coefficients.rows
        seconds = {k + 1 for k in self.coefficients.pairs} if paired else set()
        starts = [k for k in range(len(rows)) if k not in seconds]
        return [rows[i:j] for i, j in zip(starts, [*starts[1:], len(rows)], strict=True)]

    def describe(self, rows: int, cols: int) -> str:
        """The form chosen for a matrix of this shape, and its cost."""
        if self.products == "bfloat16":
            return f"standard form, in bfloat16 by {unit()}"
        groups, standard = self.groups(rows, cols), self._grouped(False)
        if len(groups) == len(standard):
            return "standard form"
        resets = tuple(sum(map(len, groups[:k])) for k in range(1, len(groups)))
        share = flops(rows, cols, groups) / flops(rows, cols, standard)
        return f"Gram form, resets {resets}, {share:.2f} of the standard form's operations"


def flops(rows: int, cols: int, groups: Sequence[Group], *, symmetric: float = 0.5) -> float:
    """Operations of an iteration's products: the cost model.

    symmetric: what part of a product's operations counts where a matrix is multiplied with its own
    transpose, of which half is carried out (by BLAS's syrk). All others count in full.
    """
    n, m = sorted((rows, cols))
    on_x, square = 2 * n * n * m, 2 * n**3
    single = symmetric * on_x + symmetric * square + on_x
    second = symmetric * square + 3 * square
    return sum(single + (len(group) - 1) * second for group in groups)


class Workspace:
    """The buffers of the largest stack, shared by all matrices of an optimizer.

    stacks: each that one call will take, but for those whose products are of bfloat16, which are
    `short`; dtype: of the arithmetic. directions: flat, the number of
    stacks for which there is room; the first is the one that is orthogonalised. threads: the most
    that work on a stack of small matrices, where the process may use more.
    """

    def __init__(
        self,
        stacks: Sequence[Stack],
        short: Sequence[Stack],
        dtype: np.dtype,
        count: int = 1,
        threads: int | None = None,
    ) -> None:
        whole, square, slots, shorter = _extents(stacks, short)
        *self.directions, self._other = (np.empty(whole, dtype) for _ in range(count + 1))
        self._squares = [np.empty(square, dtype) for _ in range(3)]
        self._slots = np.empty(slots, dtype)
        self._short = np.empty(shorter, np.uint8)
        self._unit = unit() if short else None
        self._threads = threads
        self.nbytes = self.bytes_for(stacks, short, dtype, count)

    @staticmethod
    def bytes_for(
        stacks: Sequence[Stack], short: Sequence[Stack], dtype: np.dtype, count: int = 1
    ) -> int:
        """Return the bytes that a workspace takes."""
        whole, square, slots, shorter = _extents(stacks, short)
        return ((count + 1) * whole + 3 * square + slots) * dtype.itemsize + shorter

    @property
    def direction(self) -> np.ndarray:
        return self.directions[0]

    def opened(
        self, u: np.ndarray, stack: tuple[int, ...], number: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """The stack of u's elements in C order, and as much room, until `closed`.

        u: an array of any shape and layout over the beginning of `directions[number]`, which it
        gives up.
        """
        x, y = (b[: u.size].reshape(stack) for b in (self.directions[number], self._other))
        if u.flags.c_contiguous:
            return x, y
        np.copyto(y.reshape(u.shape), u)
        return y, x

    @staticmethod
    def closed(u: np.ndarray, x: np.ndarray) -> None:
        """Put the stack of `opened` back into u."""
        if not u.flags.c_contiguous:
            np.copyto(u, x.reshape(u.shape))

    def orthogonalize(
        self, u: np.ndarray, stack: Stack, iteration: Iteration, factor: float
    ) -> None:
        """Replace each matrix by factor times its iterate; does not raise, allocates next to
        nothing.

        u: an array of any shape and layout over the beginning of `direction`; the stack consists
        of its elements in C order.
        """
        if not u.size:
            return
        x, y = self.opened(u, stack)
        coefficients, by_row = iteration.coefficients, iteration.norm == "aol"
        triples = [value for row in coefficients.rows for value in row]
        threads = min(self._threads or in_use(), in_use())
        if iteration.products == "bfloat16":
            for part, eps in _in_float32(x, y, iteration.eps):
                core.orthogonalize_bfloat16(
                    part,
                    self._short,
                    triples,
                    coefficients.prescale,
                    eps,
                    factor,
                    by_row,
                    threads,
                    self._unit,
                )
        elif iteration.in_core(*stack[1:]):
            core.orthogonalize(
                x,
                self._slots,
                triples,
                coefficients.prescale,
                iteration.eps,
                factor,
                by_row,
                threads,
            )
        else:
            groups = iteration.groups(*stack[1:])
            # Whatever np.seterr says: an error here would leave a step half done.
            with np.errstate(all="ignore"):
                for one, spare in zip(x, y, strict=True):
                    self._iterate(one, spare, iteration, groups, factor)
        self.closed(u, x)

    def _iterate(
        self,
        x: np.ndarray,
        y: np.ndarray,
        iteration: Iteration,
        groups: Sequence[Group],
        factor: float,
    ) -> None:
        wide, n = x.shape[0] <= x.shape[1], min(x.shape)
        gram, poly, spare = (b[: n * n].reshape(n, n) for b in self._squares)
        for k, group in enumerate(groups):
            _gram(x, gram)
            if k == 0:
                scale = _normalize(x, y, gram, spare, iteration)
            q = _multiplier(group, gram, poly, spare)
            if k == 0:  # x itself is never divided: that would be one more pass
                q *= scale
            if k == len(groups) - 1:
                q *= factor
            # The products' rounding is half as large without the diagonal, which is much larger
            # than the other elements where x has a low rank.
            diagonal = _diagonal(q).copy()
            _diagonal(q)[...] = 0.0
            if wide:
                np.dot(q, x, out=y)
                x *= diagonal[:, None]
            else:
                np.dot(x, q.T, out=y)
                x *= diagonal
            x += y


def _in_float32(x: np.ndarray, y: np.ndarray, eps: float) -> Iterator[tuple[np.ndarray, float]]:
    """Yield stacks of float32 that are to be replaced, and what is added to their norms.

    x: a stack; y: as much room, overwritten where x is of float64.
    """
    if x.dtype == np.float32:
        yield x, eps
        return
    narrow = y.reshape(-1).view(np.float32)[: x[0].size].reshape(1, *x.shape[1:])
    with np.errstate(all="ignore"):
        for one in x:
            # By a power of two into float32's range: it leaves no trace in the result.
            shift = -int(np.frexp(max(one.max(), -one.min()))[1])
            np.ldexp(one, shift, out=narrow[0], casting="same_kind")
            yield narrow, float(np.ldexp(eps, shift))
            one[...] = narrow[0]


def _extents(stacks: Sequence[Stack], short: Sequence[Stack]) -> tuple[int, int, int, int]:
    """Elements of the largest stack, of the largest Gram matrix, and of the core's space for small
    matrices, for each thread that may have a part of a stack; bytes of its space for products of
    bfloat16."""
    whole = max((math.prod(stack) for stack in (*stacks, *short)), default=0)
    square = max((min(s) ** 2 for _, *s in stacks), default=0)
    slots = 0
    if core:
        small = (s for s in stacks if math.prod(s[1:]) <= SMALL)
        slots = max((min(c, most()) * core.orthogonalize_space(*s) for c, *s in small), default=0)
    short = [stack for stack in short if math.prod(stack)]
    bytes_ = max((core.orthogonalize_bfloat16_space(*s, most()) for s in short), default=0)
    return whole, square, slots, bytes_


def _gram(x: np.ndarray, out: np.ndarray) -> None:
    """The products of the rows with one another, or of the columns if these are fewer: of a matrix
    with its own transpose, BLAS computes one half. (np.dot mirrors it in half of np.matmul's time:
    768x768 in 2.5 ms instead of 3.1.)"""
    np.dot(*((x, x.T) if x.shape[0] <= x.shape[1] else (x.T, x)), out=out)


def _normalize(
    x: np.ndarray, y: np.ndarray, gram: np.ndarray, spare: np.ndarray, iteration: Iteration
) -> np.ndarray:
    """Turn x's Gram matrix into that of the normalised matrix, whose rows are those of x times the
    result, one factor for each row or one for all. y, spare: overwritten.
    """
    limits = np.finfo(x.dtype)
    epsilon = float(limits.eps)
    squares, shift = _trace(gram), 0
    if not float(limits.tiny) / epsilon**2 <= squares <= float(limits.max) * epsilon:
        # What may have under- or overflowed.
        np.abs(x, out=y)
        shift = -int(np.frexp(y.max())[1])
        np.ldexp(x, shift, out=x)  # exact: it leaves no trace in the result
        _gram(x, gram)
        squares = _trace(gram)
    sums = np.array([squares])
    if iteration.norm == "aol":
        np.abs(gram, out=spare)
        sums = spare.sum(axis=1).astype(np.float64)
    norm = iteration.coefficients.prescale * np.sqrt(sums) + np.ldexp(iteration.eps, shift)
    scale: np.ndarray = np.divide(1.0, norm, out=np.zeros_like(norm), where=sums != 0).astype(
        x.dtype
    )
    gram *= scale[:, None]
    gram *= scale
    return scale


def _multiplier(group: Group, gram: np.ndarray, poly: np.ndarray, spare: np.ndarray) -> np.ndarray:
    """Return what one or two iterations multiply x by.

    gram: x's Gram matrix. The result is one of these buffers, all of which are overwritten.
    """
    _polynomial(group[0], gram, poly, spare)
    if len(group) == 1:
        return poly
    # In this order: gram @ (poly @ poly) would save half a product, and be up to ten times less
    # accurate. The mean with the transpose takes up to a third off the error.
    _commuting(poly, gram, spare)
    np.dot(spare, poly, out=gram)
    np.add(gram, gram.T, out=spare)
    spare *= 0.5
    _polynomial(group[1], spare, gram, spare)
    _commuting(gram, poly, spare)
    return spare


BLOCKS = 4
"""Rows of blocks in a symmetric product: one of 768x768 takes 3.6 ms instead of 4.8, with eight
3.4."""


def _commuting(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """out := a b of polynomials of one matrix: symmetric but for rounding, so that the blocks below
    the diagonal are the others' mirror image."""
    n = len(a)
    size = -(-n // BLOCKS)
    for k in range(0, n, size):
        rows, rest = slice(k, k + size), slice(k + size, n)
        np.matmul(a[rows], b[:, k:], out=out[rows, k:])
        out[rest, rows] = out[rows, rest].T


def _polynomial(row: Row, gram: np.ndarray, out: np.ndarray, scratch: np.ndarray) -> None:
    """out := a + b gram + c gram^2; scratch, which may be gram, is overwritten."""
    a, b, c = row
    np.dot(gram, gram.T, out=out)
    out *= c
    np.multiply(gram, b, out=scratch)
    out += scratch
    diagonal = _diagonal(out)
    diagonal += a


def _trace(square: np.ndarray) -> float:
    return float(_diagonal(square).astype(np.float64).sum())


def _diagonal(square: np.ndarray) -> np.ndarray:
    """A view of that of a contiguous matrix."""
    return square.reshape(-1)[:: len(square) + 1]
