"""Measure the speed that memory allows a step, without a compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np

import fusedopt as fo

HOW = (
    "NumPy, in turn with the step and in as many threads, reads the arrays that it reads and"
    " updates as many bytes as it updates, with one addition for each word"
)
LARGEST = 1 << 23
"""Bytes of a part: long enough to cost nothing."""

Traffic = Sequence[tuple[Sequence[Any], Sequence[Any]]]
"""For each tensor, the arrays that a step only reads, and those that it reads and writes."""


class Sweep:
    """The reads and writes of a step with next to no arithmetic.

    traffic: dense arrays of any dtype. Those that a step updates are copied, and the copies
    updated, so that all values stay as they are. threads: how many work; as many as fusedopt may
    use where it is not said. The last bytes of an array, if they fill no word of 8, are left out.
    """

    def __init__(self, traffic: Traffic, threads: int | None = None) -> None:
        threads = fo.get_threads() if threads is None else threads
        streams = [stream for read, updated in traffic for stream in _streams(read, updated)]
        total = sum(a.nbytes for _, arrays in streams for a in arrays)
        size = max(1, min(LARGEST, total // (8 * threads)) // 8)
        self._parts = [
            partial(work, *(a[start : start + size] for a in arrays))
            for work, arrays in streams
            for start in range(0, arrays[0].size, size)
        ]
        self._helpers = threads - 1
        self._pool = ThreadPoolExecutor(max(1, self._helpers))  # starts with the first sweep

    def __call__(self) -> None:
        parts = iter(self._parts)  # of which each thread takes the next
        helpers = [self._pool.submit(_run, parts) for _ in range(self._helpers)]
        _run(parts)
        for helper in helpers:
            helper.result()


Stream = tuple[Callable[..., object], tuple[Any, ...]]


def _streams(read: Sequence[Any], updated: Sequence[Any]) -> Iterator[Stream]:
    """Reads go with updates as far as they can: alone they would wait for each other's sum."""
    nothing = np.empty(0, np.uint64)
    for r, u in zip_longest(map(_words, read), map(_words, updated), fillvalue=nothing):
        u = u.copy()
        common = min(r.size, u.size)
        yield _add, (u[:common], r[:common])
        yield _increase, (u[common:],)
        yield _read, (r[common:],)


def _words(a: Any) -> Any:
    flat = a.ravel(order="K").view(np.uint8)
    return flat[: flat.size // 8 * 8].view(np.uint64)


def _add(updated: Any, read: Any) -> None:
    np.add(updated, read, out=updated)


def _increase(updated: Any) -> None:
    np.add(updated, np.uint64(1), out=updated)


def _read(read: Any) -> None:
    np.bitwise_or.reduce(read)


def _run(parts: Iterator[Callable[[], object]]) -> None:
    for part in parts:
        part()
