"""Gradients of all ranks, averaged or added up, each rank receiving its share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..arrays.formats import SEGMENT, compute_dtype
from ..arrays.rows import Rows, UniqueRows, unique_rows
from ..system.extension import Mean, reason
from .memory import Place, array_at, places_of
from .ranks import Ranks
from .shares import Cut, flat

PIECE = 4 * SEGMENT
"""Elements that NumPy adds and divides while they are in the cache."""

WIDEST = 8
"""Bytes of the widest element of a gradient."""


class Kind(NamedTuple):
    """The kind of gradient that one rank has for one leaf.

    scalar: the type of an element, which ranks know by name; a dtype arrives as another object than
    NumPy's own, which the core does not take. counts: of `Rows`, the number of rows in each rank's
    share; None of an array. place: of an array in memory from which all ranks read it.
    """

    scalar: type
    counts: tuple[int, ...] | None = None
    place: Place | None = None

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the gradient."""
        return np.dtype(self.scalar)


class Span(NamedTuple):
    """Elements [start, stop) of a leaf, in memory order."""

    leaf: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.stop - self.start


Round = list[list[Span]]
"""The spans of each rank's share that a round brings it."""


class Reduction:
    """Reduction of gradients in rounds, each of which brings every rank a bucket of its share.

    Parameters
    ----------
    ranks : Ranks
        The processes.
    labels, parameters, cuts : sequences
        Names of the leaves in messages, the whole parameters and their shares.
    mean : bool
        Divide the sums by the number of ranks.
    fast : bool
        Leave the order of additions to MPI, where all ranks send gradients of the computing type.
    bucket_bytes : int
        Memory for what is received, two rounds of it.
    """

    def __init__(
        self,
        ranks: Ranks,
        labels: Sequence[str],
        parameters: Sequence[np.ndarray],
        cuts: Sequence[Cut],
        *,
        mean: bool,
        fast: bool,
        bucket_bytes: int,
    ) -> None:
        self._ranks, self._labels, self._cuts = ranks, labels, cuts
        self._parameters, self._fast = parameters, fast
        self._divisor = float(ranks.size) if mean else 1.0
        others = max(ranks.size - 1, 1)
        self._room = max(bucket_bytes // (2 * others * WIDEST) // SEGMENT, 1) * SEGMENT
        # Pages are there once something is received.
        self._received = np.empty(
            (2, others, WIDEST * self._room if ranks.size > 1 else 0), np.uint8
        )
        self._kept: dict[tuple[str, int], np.ndarray] = {}
        self._rounds: dict[tuple[int, ...], list[Round]] = {}
        self._means: dict[int, tuple[Sequence[Kind | None], Any]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the buckets."""
        return self._received.nbytes

    def rebind(self, parameters: Sequence[np.ndarray]) -> None:
        """Take other parameters of the same shapes."""
        self._parameters = parameters

    def kinds(self, values: Sequence[Any]) -> list[Kind | None]:
        """Return the kind of this rank's gradient for each leaf, for the others to know."""
        places = places_of(self._ranks, values)
        given = zip(values, places, strict=True)
        return [None if g is None else self._kind(k, g, at) for k, (g, at) in enumerate(given)]

    def _kind(self, k: int, g: Any, place: Place | None) -> Kind:
        if not isinstance(g, UniqueRows):
            return Kind(g.dtype.type, place=place)
        cut = self._cuts[k]
        if cut.owner is None and not cut.row:
            raise ValueError(
                f"{self._labels[k]}: Rows of {self._parameters[k].shape}, whose rows are cut across"
                " ranks; give the whole gradient"
            )
        ends = np.searchsorted(g.rows, self._row_bounds(k))
        return Kind(g.values.dtype.type, tuple(np.diff(ends).tolist()))

    def _row_bounds(self, k: int) -> np.ndarray:
        p = self._parameters[k]
        length = max(p.size // max(p.shape[0], 1), 1)
        return np.array([bound // length for bound in self._cuts[k].bounds])

    def reduce(
        self,
        values: Sequence[Any],
        kinds: Sequence[Sequence[Kind | None]],
        what: str,
        unread: Collection[int] = (),
    ) -> list[Any]:
        """Return this rank's share of the reduced gradients; None for leaves without a part.

        what: "grads" or "hessian": the arrays are those of the last call with the same word, since
        new memory would cost as much as the additions.
        values: of each leaf a dense array in its parameter's memory order, `UniqueRows` or None.
        kinds: what `kinds` returned on each rank. A rank that has None for a leaf counts as zero.
        unread: leaves whose shares only a plan reads, which takes a `core.Mean`: of those whose
        gradients are all to be had here, no share is written to memory.
        Raises ValueError, on all ranks alike, where some give rows and others whole arrays.
        """
        given = list(zip(*kinds, strict=True))
        sparse = [k for k in range(len(values)) if self._is_sparse(k, given[k])]
        unread = {
            k for k in unread if all(kind is None or kind.place is not None for kind in given[k])
        }
        apart = unread.union(sparse)
        dense = [k for k, of in enumerate(given) if any(of) and k not in apart]
        shares: list[Any] = [None] * len(values)
        for k in unread:
            if any(given[k]) and self._cuts[k].holds(self._ranks.rank):
                shares[k] = self._mean(k, given[k])
        for k in dense:
            p = self._parameters[k]
            if self._cuts[k].holds(self._ranks.rank):
                if (what, k) not in self._kept:
                    part = self._cuts[k].part(p, self._ranks.rank)
                    self._kept[what, k] = np.empty_like(part, compute_dtype(p.dtype))
                shares[k] = self._kept[what, k]
        own = [flat(s) if isinstance(s, np.ndarray) else None for s in shares]
        self._reduce_dense(values, given, dense, own)
        for k in sparse:
            shares[k] = self._reduce_rows(k, values[k], given[k])
        return shares

    def _is_sparse(self, k: int, kinds: Sequence[Kind | None]) -> bool:
        found = {kind.counts is not None for kind in kinds if kind is not None}
        if len(found) > 1:
            rows = [r for r, kind in enumerate(kinds) if kind is not None and kind.counts]
            raise ValueError(
                f"{self._labels[k]}: ranks {rows} give Rows, others the whole gradient; give the"
                " same on all ranks"
            )
        return found == {True}

    # ---------------------------------------------------------------- arrays

    def _plan(self, leaves: Sequence[int]) -> list[Round]:
        """Return for each round the spans of each rank's share that it brings."""
        of_ranks = [list(self._buckets(leaves, rank)) for rank in range(self._ranks.size)]
        count = max(map(len, of_ranks))
        return [
            [buckets[j] if j < len(buckets) else [] for buckets in of_ranks] for j in range(count)
        ]

    def _buckets(self, leaves: Sequence[int], rank: int) -> Iterator[list[Span]]:
        bucket: list[Span] = []
        room = self._room
        for k in leaves:
            start, end = self._cuts[k].bounds[rank : rank + 2]
            while start < end:
                stop = min(end, start + room)
                bucket.append(Span(k, start, stop))
                room -= stop - start
                start = stop
                if not room:
                    yield bucket
                    bucket, room = [], self._room
        if bucket:
            yield bucket

    def _reduce_dense(
        self,
        values: Sequence[Any],
        given: Sequence[Sequence[Kind | None]],
        leaves: Sequence[int],
        shares: Sequence[np.ndarray | None],
    ) -> None:
        rank = self._ranks.rank
        rounds = self._rounds.get(tuple(leaves))
        if rounds is None:
            rounds = self._rounds[tuple(leaves)] = self._plan(leaves)
        elements = {k: self._elements(k, values[k], given[k]) for k in leaves}

        def share_of(span: Span) -> np.ndarray:
            share, begin = shares[span.leaf], self._cuts[span.leaf].bounds[rank]
            assert share is not None
            return share[span.start - begin : span.stop - begin]

        under_way: list[Any] = []
        for number in range(len(rounds) + 1):
            # The next bucket travels while the last one is added up.
            begun = (
                self._begin(number, rounds[number], elements, given, share_of)
                if number < len(rounds)
                else []
            )
            if number:
                self._ranks.wait(under_way)
                for at, span in _places(rounds[number - 1][rank]):
                    self._add(number - 1, at, span, elements, given[span.leaf], share_of(span))
            under_way = begun

    def _mean(self, k: int, kinds: Sequence[Kind | None]) -> Any:
        """Return the mean of this rank's share of a leaf, of arrays in memory of all ranks."""
        kept, mean = self._means.get(k, (None, None))
        if kinds != kept:
            start, stop = self._cuts[k].bounds[self._ranks.rank : self._ranks.rank + 2]
            parts = [a[start:stop] for a in self._elements(k, None, kinds) if a is not None]
            mean = Mean(parts, self._divisor)
            self._means[k] = kinds, mean
        return mean

    def _elements(
        self, k: int, g: np.ndarray | None, kinds: Sequence[Kind | None]
    ) -> list[np.ndarray | None]:
        """Return the flat arrays of those ranks whose gradients are to be had here.

        g: this rank's, which need not be in memory of all ranks.
        """
        of_ranks: list[np.ndarray | None] = [
            array_at(kind.place, kind.dtype, self._parameters[k].size)
            if kind is not None and kind.place is not None
            else None
            for kind in kinds
        ]
        if g is not None:
            of_ranks[self._ranks.rank] = flat(g)
        return of_ranks

    def _begin(
        self,
        number: int,
        spans: Round,
        elements: Mapping[int, Sequence[np.ndarray | None]],
        given: Sequence[Sequence[Kind | None]],
        share_of: Callable[[Span], np.ndarray],
    ) -> list[Any]:
        """Begin a round: send each rank its spans, and receive one's own from all."""
        ranks, comm, requests = self._ranks, self._ranks.comm, []
        for rank in range(ranks.size):
            for at, span in _places(spans[rank]):
                kinds, mine = given[span.leaf], elements[span.leaf][ranks.rank]
                sent = None if mine is None else mine[span.start : span.stop].view(np.uint8)
                if self._left_to_mpi(span.leaf, kinds):
                    out = share_of(span) if rank == ranks.rank else None
                    requests.append(self._reduce_to(rank, sent, out, kinds))
                elif rank == ranks.rank:
                    for source, kind in enumerate(kinds):
                        if _is_sent(kind) and source != rank:
                            slot = self._slot(number, source, at, span, kind)
                            requests.append(comm.Irecv(slot.view(np.uint8), source=source))
                elif _is_sent(kinds[ranks.rank]):
                    requests.append(comm.Isend(sent, dest=rank))
        return requests

    def _left_to_mpi(self, k: int, kinds: Sequence[Kind | None]) -> bool:
        wanted = Kind(compute_dtype(self._parameters[k].dtype).type)
        return self._fast and all(kind == wanted for kind in kinds)

    def _reduce_to(
        self, rank: int, sent: Any, out: np.ndarray | None, kinds: Sequence[Kind | None]
    ) -> Any:
        mpi = self._ranks.mpi
        assert kinds[0] is not None
        dtype = mpi.FLOAT if kinds[0].dtype.itemsize == 4 else mpi.DOUBLE
        received = None if out is None else [out, dtype]
        return self._ranks.comm.Ireduce([sent, dtype], received, op=mpi.SUM, root=rank)

    def _slot(self, number: int, source: int, at: int, span: Span, kind: Any) -> np.ndarray:
        """Return the memory in which a rank's part of a span is received."""
        place = source - (source > self._ranks.rank)
        room = self._received[number % 2, place, WIDEST * at :]
        return room[: span.size * kind.dtype.itemsize].view(kind.dtype)

    def _add(
        self,
        number: int,
        at: int,
        span: Span,
        elements: Mapping[int, Sequence[np.ndarray | None]],
        kinds: Sequence[Kind | None],
        out: np.ndarray,
    ) -> None:
        """Add up a span in the order of the ranks."""
        if self._left_to_mpi(span.leaf, kinds):
            parts = [out]
        else:
            parts = [
                self._slot(number, source, at, span, kind)
                if (here := elements[span.leaf][source]) is None
                else here[span.start : span.stop]
                for source, kind in enumerate(kinds)
                if kind is not None
            ]
        self.average(parts, out)

    def average(self, parts: Sequence[np.ndarray], out: np.ndarray) -> None:
        """Add up flat arrays of any dtype, from the first to the last, in that of `out`; divide."""
        if reason is None and Mean(list(parts), self._divisor).write(out):
            return
        with np.errstate(all="ignore"):
            for a in range(0, out.size, PIECE):
                piece = out[a : a + PIECE]
                first, *others = (part[a : a + PIECE].astype(out.dtype) for part in parts)
                piece[...] = first
                for other in others:
                    np.add(piece, other, out=piece)
                self._divide(piece)

    def _divide(self, sums: np.ndarray) -> None:
        if self._divisor != 1.0:
            np.divide(sums, sums.dtype.type(self._divisor), out=sums)

    # ---------------------------------------------------------------- rows

    def _reduce_rows(
        self, k: int, mine: UniqueRows | None, kinds: Sequence[Kind | None]
    ) -> Rows | None:
        """The rows of this rank's share, those of equal indices added in the order of ranks."""
        ranks, cut, p = self._ranks, self._cuts[k], self._parameters[k]
        bounds, requests, received = self._row_bounds(k), [], []
        for source, kind in enumerate(kinds):
            count = kind.counts[ranks.rank] if kind and kind.counts else 0
            if kind is not None and count and source != ranks.rank:
                rows = np.empty(count, np.int64)
                values = np.empty((count, *p.shape[1:]), kind.dtype)
                requests.append(ranks.comm.Irecv(rows, source=source))
                requests.append(ranks.comm.Irecv(values.view(np.uint8), source=source))
                received.append((rows, values))
            elif count and mine is not None:
                received.append(_between(mine, bounds[ranks.rank], bounds[ranks.rank + 1]))
        kept = []
        for rank in range(ranks.size):
            if mine is not None and rank != ranks.rank:
                rows, values = _between(mine, bounds[rank], bounds[rank + 1])
                if rows.size:
                    requests.append(ranks.comm.Isend(rows, dest=rank))
                    requests.append(ranks.comm.Isend(values.view(np.uint8), dest=rank))
                    kept += [rows, values]  # until they are sent
        ranks.wait(requests)
        if not cut.holds(ranks.rank):
            return None
        dtype = compute_dtype(p.dtype)
        rows = np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in received)])
        values = np.concatenate(
            [np.empty((0, *p.shape[1:]), dtype), *(v.astype(dtype) for _, v in received)]
        )
        found = unique_rows(self._labels[k], Rows(rows, values), p)
        sums = found.gathered
        with np.errstate(all="ignore"):
            self._divide(sums)
        return Rows(found.rows - bounds[ranks.rank], sums)


def _places(spans: Sequence[Span]) -> Iterator[tuple[int, Span]]:
    """Return the position in a bucket at which each of its spans begins."""
    at = 0
    for span in spans:
        yield at, span
        at += span.size


def _is_sent(kind: Kind | None) -> bool:
    """Return whether a rank's gradient travels in messages."""
    return kind is not None and kind.place is None


def _between(rows: UniqueRows, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows [start, stop) and their values, copied."""
    a, b = np.searchsorted(rows.rows, (start, stop))
    return rows.rows[a:b].copy(), rows.values[rows.places[a:b]]
