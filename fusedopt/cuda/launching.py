"""Tables of leaves on the device, and launches over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..formats import FLOAT64, PLAIN, compute_dtype
from ..jit.kernels import LANES, SEGMENT
from ..rules.elements import keep
from .arrays import DeviceArray
from .kernels import CHUNK, GROUPS, THREADS, Step, Variant, squares_kernel, step_kernel
from .memory import Memory
from .vectors import VECTOR_BYTES


def _listed(sizes: Sequence[int], unit: int) -> np.ndarray:
    """leaf << 32 | number, for every part of `unit` elements of the leaves."""
    counts = -(-np.asarray(sizes, np.int64) // unit)
    leaves = np.repeat(np.arange(counts.size), counts)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    return leaves << 32 | (np.arange(leaves.size) - starts)


def _uploaded(data: np.ndarray, stream: int) -> Memory:
    memory = Memory.new(data.nbytes)
    memory.write(data, stream, wait=False)
    return memory


@dataclass
class Table:
    """Rows of leaves, and the list of their parts, on the device."""

    rows: Memory
    parts: Memory
    count: int

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], unit: int, stream: int) -> Table:
        """rows: the elements of a leaf, and whatever else. unit: elements of a part."""
        parts = _listed([row[0] for row in rows], unit)
        return cls(
            _uploaded(np.array(rows, np.int64), stream), _uploaded(parts, stream), parts.size
        )


class Launch:
    """One kernel over all leaves of a variant.

    arrays: of each leaf those that `Variant.arrays` names.
    """

    def __init__(
        self, variant: Variant, arrays: Sequence[Sequence[DeviceArray]], stream: int
    ) -> None:
        rows = []
        for own in arrays:
            addresses = [a.address for a in own]
            aligned = not any(address % VECTOR_BYTES for address in addresses)
            rows.append([own[0].size, int(aligned), *addresses])
        self._table = Table.of(rows, CHUNK, stream)
        self._kernel, self.dtype = step_kernel(variant), variant.dtype
        self._device = arrays[0][0].device

    def run(self, scalars: np.ndarray, stream: int) -> None:
        """scalars: of all the operations, in the type of the arithmetic."""
        if self._table.count:
            words = (self._table.rows.address, self._table.parts.address)
            queue = self._device, stream
            self._kernel.launch(self._table.count, THREADS, queue, words, scalars)


def convert(target: DeviceArray, source: DeviceArray) -> None:
    """Writes the elements of an array of the same shape and order, rounded to the nearest."""
    types = [compute_dtype(a.dtype) for a in (target, source)]
    wide = FLOAT64 if FLOAT64 in types else types[0]
    formats = tuple((n, PLAIN[a.dtype.name]) for n, a in (("g", source), ("p", target)))
    step = Step(keep, "other", ("p", "g"), ("p",), 0, "", False)
    stream = target.stream
    launch = Launch(Variant((step,), (), wide, formats), [(source, target)], stream)
    launch.run(np.empty(0, wide), stream)


class Squares:
    """Sums of squares of gradients of one dtype, computed in one type.

    members: places of these gradients among all.
    """

    def __init__(
        self, dtype: np.dtype, arrays: Sequence[DeviceArray], members: Sequence[int], stream: int
    ) -> None:
        self.dtype, self.members = dtype, np.array(members)
        self._device = arrays[0].device
        self._kernel = squares_kernel(PLAIN[arrays[0].dtype.name], dtype)
        self._table = Table.of([(a.size, a.address) for a in arrays], SEGMENT, stream)
        self._partials = Memory.new(8 * self._table.count)
        counts = np.array([-(-a.size // SEGMENT) for a in arrays])
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts

    def queue(self, scale: float, stream: int) -> None:
        """Puts the kernel on a stream."""
        t = self._table
        if t.count:
            words = (t.rows.address, t.parts.address, self._partials.address, t.count)
            scalars = np.array([scale], self.dtype)
            blocks, threads = -(-t.count // GROUPS), GROUPS * LANES
            self._kernel.launch(blocks, threads, (self._device, stream), words, scalars)

    def totals(self, stream: int) -> np.ndarray:
        """Of each array its sum, when the kernel is done."""
        partials = self._partials.read(stream).view(np.float64)
        counts = self._ends - self._starts
        found = np.zeros(counts.size)
        found[counts == 1] = partials[self._starts[counts == 1]]
        for k in np.flatnonzero(counts > 1):
            # In index order, which np.sum is not.
            found[k] = np.cumsum(partials[self._starts[k] : self._ends[k]])[-1]
        return found
