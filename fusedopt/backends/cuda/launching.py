"""Tables of leaves on the device, and launches over them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from ...arrays.formats import FLOAT64, PLAIN_OF, SEGMENT, compute_dtype
from ...arrays.rows import UniqueRows, values_of
from ...arrays.stored import Stored
from ...jit.tiles import LANES
from ...programs.arithmetic import rescaling
from ...programs.elements import keep
from . import blocks
from .blocks import LANES as TILE_LANES
from .blocks import kernel_of
from .buffers import Memory, on_device, wait_for
from .kernels import THREADS, Step, Variant
from .reductions import GROUPS, row_squares_kernel, squares_kernel, totals_kernel
from .vectors import VECTOR_BYTES


class Placed(Protocol):
    """The part of an array that a launch needs: see `arrays.DeviceArray`."""

    address: int
    size: int
    dtype: np.dtype
    device: int

    @property
    def stream(self) -> int:
        """The handle of the stream on which the array is to be read."""


def _listed(sizes: Sequence[int], unit: int) -> np.ndarray:
    """leaf << 32 | number, for every part of `unit` elements of the leaves."""
    counts = -(-np.asarray(sizes, np.int64) // unit)
    leaves = np.repeat(np.arange(counts.size), counts)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    return leaves << 32 | (np.arange(leaves.size) - starts)


def uploaded(data: np.ndarray, stream: int) -> Memory:
    """New memory with these elements, as soon as the stream comes to it."""
    memory = Memory.reused(data.nbytes, stream)
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
        return cls(uploaded(np.array(rows, np.int64), stream), uploaded(parts, stream), parts.size)


class Place(NamedTuple):
    """The part of a row of a table that is about one array.

    words: see `kernels.columns`. aligned: whether the addresses among them are on the boundaries of
    vectors.
    """

    words: tuple[int, ...]
    aligned: bool

    @classmethod
    def of(cls, array: Any, key: int = 0) -> Place:
        """The place of an array, or of a `Stored` with the key of its random bits."""
        if not isinstance(array, Stored):
            return cls((array.address,), not array.address % VECTOR_BYTES)
        held: list[Any] = array.arrays
        addresses = tuple(a.address for a in held)
        signed = (key + 2**63) % 2**64 - 2**63
        aligned = not any(address % VECTOR_BYTES for address in addresses)
        return cls(addresses + (signed,) * array.format.random, aligned)


def table_row(size: int, places: Sequence[Place], first_tile: int = 0) -> list[int]:
    """Return the row of a leaf with a number of elements, and with the places of the arrays that
    `Variant.arrays` names; first_tile: where the leaf begins in the array that it is a part of."""
    words = [word for place in places for word in place.words]
    return [size, first_tile << 1 | all(place.aligned for place in places), *words]


class Launch:
    """One kernel over all leaves of a variant.

    rows: those of the table, see `table_row` and `rows.table_rows`. random: whether `run` takes
    the steps that the leaves have behind them.
    """

    def __init__(
        self,
        variant: Variant,
        rows: Sequence[Sequence[int]],
        device: int,
        stream: int,
    ) -> None:
        blocked = variant.blocked
        self._table = Table.of(rows, blocks.CHUNK if blocked else variant.chunk, stream)
        self._threads = TILE_LANES * blocks.WARPS if blocked else THREADS
        self._kernel = kernel_of(variant)
        self._kernel.prepare(device)
        self.dtype, self.random, self._device = variant.dtype, variant.random, device

    def run(self, scalars: Sequence[float], stream: int, *more: int) -> None:
        """scalars: of all the operations. more: words that the kernel takes behind the addresses of
        its tables."""
        if self._table.count:
            words = (self._table.rows.address, self._table.parts.address, *more)
            queue = self._device, stream
            self._kernel.launch(self._table.count, self._threads, queue, words, scalars)


def convert(target: Placed, source: Stored) -> None:
    """Write the elements of an array of the same shape and order, rounded to the nearest."""
    types = [compute_dtype(target.dtype), compute_dtype(source.format.dtype)]
    wide = FLOAT64 if FLOAT64 in types else types[0]
    formats = (("g", source.format), ("p", PLAIN_OF[target.dtype]))
    step = Step(keep, "other", ("p", "g"), ("p",), 0, "", False)
    there: Any = source.data
    stream, other = target.stream, there.stream
    row = table_row(target.size, [Place.of(source), Place.of(target)])
    launch = Launch(Variant((step,), (), wide, formats), [row], target.device, stream)
    wait_for(stream, other)
    launch.run((), stream, *[0] * launch.random)
    wait_for(other, stream)


class Squares:
    """Sums of squares of gradients of one dtype, computed in one type, by segments."""

    def __init__(self, dtype: np.dtype, arrays: Sequence[Placed], stream: int) -> None:
        self.dtype, self._device = dtype, arrays[0].device
        self._kernel = squares_kernel(PLAIN_OF[arrays[0].dtype], dtype)
        self._table = Table.of([(a.size, a.address) for a in arrays], SEGMENT, stream)
        self._partials = Memory.reused(8 * self._table.count, stream)
        counts = np.array([-(-a.size // SEGMENT) for a in arrays])
        addresses = self._partials.address + 8 * (np.cumsum(counts) - counts)
        self.rows = list(zip(addresses.tolist(), counts.tolist(), strict=True))
        """The address of the partial sums of each array, and their number."""

    def queue(self, scale: float, stream: int) -> None:
        """Put the kernel on a stream."""
        t = self._table
        if t.count:
            words = (t.rows.address, t.parts.address, self._partials.address, t.count)
            blocks, threads = -(-t.count // GROUPS), GROUPS * LANES
            self._kernel.launch(blocks, threads, (self._device, stream), words, [scale])


class RowSquares:
    """`Squares` of gradients of some rows: the sums that the whole gradients have."""

    def __init__(self, dtype: np.dtype, grads: Sequence[UniqueRows], stream: int) -> None:
        first: Any = grads[0].values
        self.dtype, self._device = dtype, first.device
        self._kernel = row_squares_kernel(PLAIN_OF[first.dtype], dtype)
        parts, pairs, counts, before = [], [], [], 0
        for g in grads:
            values: Any = g.values
            length = math.prod(values.shape[1:])
            own = segments_of(g.rows, length, before)
            parts += [(values.address, length, *segment) for segment in own]
            pairs.append(np.stack([g.rows, g.places], axis=1))
            counts.append(len(own))
            before += len(g.rows)
        self._count = len(parts)
        self._parts = uploaded(np.array(parts, np.int64), stream)
        self._pairs = uploaded(np.concatenate(pairs), stream)
        self._partials = Memory.reused(8 * self._count, stream)
        starts = self._partials.address + 8 * (np.cumsum(counts) - counts)
        self.rows = list(zip(starts.tolist(), counts, strict=True))

    def queue(self, scale: float, stream: int) -> None:
        """Put the kernel on a stream."""
        if self._count:
            leaf_states = self._parts, self._pairs, self._partials
            words = (*(memory.address for memory in leaf_states), self._count)
            blocks, threads = -(-self._count // GROUPS), GROUPS * LANES
            self._kernel.launch(blocks, threads, (self._device, stream), words, [scale])


def segments_of(rows: np.ndarray, length: int, before: int) -> list[list[int]]:
    """Return the segments of a parameter that rows of `length` elements touch.

    Of each segment: where it begins, the first of these rows and the one behind the last, counted
    from `before` on.
    """
    if not length:
        return []
    first = rows * length // SEGMENT
    last = ((rows + 1) * length - 1) // SEGMENT
    counts = last - first + 1
    starts = np.repeat(first - (np.cumsum(counts) - counts), counts)
    segments = np.unique(starts + np.arange(starts.size))
    low, high = np.searchsorted(last, segments), np.searchsorted(first, segments, "right")
    table = np.stack([segments * SEGMENT, before + low, before + high], axis=1)
    found: list[list[int]] = table.tolist()
    return found


class Sums:
    """Sums of squares of gradients, one for each.

    grads: by place among all leaves, arrays or `UniqueRows`. dtypes: of the arithmetic, by place.
    After `queue`, `memory` has the sums of `leaves`, float64.
    """

    def __init__(self, grads: Mapping[int, Any], dtypes: Sequence[np.dtype], stream: int) -> None:
        alike: dict[tuple[np.dtype, np.dtype, bool], list[int]] = {}
        for k, g in grads.items():
            key = values_of(g).dtype, dtypes[k], isinstance(g, UniqueRows)
            alike.setdefault(key, []).append(k)
        self._parts = [
            (RowSquares if some else Squares)(dtype, [grads[k] for k in members], stream)
            for (_, dtype, some), members in alike.items()
        ]
        self.leaves = np.array([k for members in alike.values() for k in members], np.int64)
        self.wide = np.array([dtypes[k] == FLOAT64 for k in self.leaves], bool)
        """Leaves that are summed in float64 arithmetic, since their squares may leave the range."""
        rows = [row for part in self._parts for row in part.rows]
        self._rows = uploaded(np.array(rows, np.int64), stream)
        self.memory = Memory.reused(8 * self.leaves.size, stream)
        self._device = next((values_of(g).device for g in grads.values()), 0)

    def queue(self, stream: int, scale: float = 1.0) -> None:
        """Put the kernels on a stream. scale: of the elements; 1 in float32 arithmetic."""
        for part in self._parts:
            part.queue(scale if part.dtype == FLOAT64 else 1.0, stream)
        if self.leaves.size:
            words, queue = (self._rows.address, self.memory.address), (self._device, stream)
            totals_kernel().launch(self.leaves.size, THREADS, queue, words)

    def read(self, stream: int) -> np.ndarray:
        """The sums, when they are there."""
        return self.memory.read(stream).view(np.float64)

    def found(self, stream: int) -> np.ndarray:
        """Wait, after `queue`, and return a row for each of `leaves`: the sum of squares of its
        elements times scale, and that scale."""
        totals = self.read(stream)
        rows = np.stack([totals, np.ones(totals.size)], axis=1)
        # Once more for those whose squares left the range: see csrc/norms.hpp.
        factors = np.where(self.wide, rescaling(totals), 1.0)
        for factor in set(factors.tolist()) - {1.0}:
            lost = factors == factor
            self.queue(stream, factor)
            rows[lost, 0], rows[lost, 1] = self.read(stream)[lost], factor
        return rows


def sums_of_squares(arrays: Sequence[Placed]) -> list[tuple[float, float]]:
    """See `Backend.sums_of_squares`; the arrays are checked. ValueError where they are on several
    devices."""
    first = arrays[0]
    if any(a.device != first.device for a in arrays):
        raise ValueError("grads: are on several devices; take the norm of those of each")
    with on_device(first.device):
        stream = first.stream
        for other in {a.stream for a in arrays} - {stream}:
            wait_for(stream, other)
        dtypes = [compute_dtype(a.dtype) for a in arrays]
        sums = Sums(dict(enumerate(arrays)), dtypes, stream)
        sums.queue(stream)
        rows = np.empty((len(arrays), 2))
        rows[sums.leaves] = sums.found(stream)
    return [(total, scale) for total, scale in rows.tolist()]
