"""Arrays in files, read into memory that is there.

They are not mapped: where somebody truncates a mapped file, or the disk fails, whoever touches its
pages is ended by a signal. Reading them ends in an OSError.
"""

from __future__ import annotations

import errno
import math
import os
import stat
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .order import flattened, inverse, memory_order, shaped


class File:
    """A regular file, open for reading as long as this object lives.

    Raises OSError where it cannot be opened, or is no regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._file = open(path, "rb", buffering=0, opener=_open_regular)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, begin: int, end: int) -> bytes:
        """Some of its bytes, or as many as there are."""
        self._file.seek(begin)
        memory = bytearray(max(0, min(end, self.size) - begin))
        self.read_into(memoryview(memory), begin)
        return bytes(memory)

    def read_into(self, memory: memoryview, begin: int) -> None:
        """Fill memory with the bytes from `begin` on; OSError where there are not as many."""
        self._file.seek(begin)
        done = 0
        while done < len(memory):
            count = self._file.readinto(memory[done:])
            if not count:
                raise OSError(
                    errno.EIO,
                    "ended while it was read; it must not be written by others",
                    self.path,
                )
            done += count


class Part(NamedTuple):
    """Bytes of a file, or of a flat array of uint8."""

    source: File | np.ndarray
    begin: int
    end: int

    def read_into(self, memory: np.ndarray) -> None:
        """Copy them into as many of memory."""
        if isinstance(self.source, File):
            self.source.read_into(memory.data, self.begin)
        else:
            memory[...] = self.source[self.begin : self.end]


class FileArray:
    """An array that lies in one part or several, to be read into memory of the same order.

    dtype, shape, order: of the array; its elements lie in `parts` in this memory order.
    """

    def __init__(
        self, dtype: np.dtype, shape: Sequence[int], parts: Sequence[Part], order: str = "C"
    ) -> None:
        self.dtype, self.shape, self.order = dtype, tuple(shape), order
        self.ndim, self.size = len(self.shape), math.prod(self.shape)
        self._parts = parts

    @classmethod
    def of(cls, a: np.ndarray, order: str) -> FileArray:
        """A dense array in memory."""
        memory = flattened(a, order).view(np.uint8)
        return cls(a.dtype, a.shape, [Part(memory, 0, memory.size)], order)

    def reshape(self, shape: Sequence[int]) -> FileArray:
        """Return the elements in another shape, in C order."""
        return FileArray(self.dtype, shape, self._parts)

    def laid_out_as(self, a: Any) -> FileArray:
        """The array that has these elements, one after the other, in the memory order of another
        with as many dimensions."""
        order = memory_order(a)
        if order == "C" or a.ndim != self.ndim:
            return self
        shape = [self.shape[k] for k in inverse(order, self.ndim)]
        return FileArray(self.dtype, shape, self._parts, order)

    def some(self, start: int, stop: int) -> FileArray:
        """Some of the elements, flat."""
        found, at = [], 0
        low, high = (n * self.dtype.itemsize for n in (start, stop))
        for source, begin, end in self._parts:
            first, last = (min(max(n - at, 0), end - begin) for n in (low, high))
            if first < last:
                found.append(Part(source, begin + first, begin + last))
            at += end - begin
        count = sum(end - begin for _, begin, end in found) // self.dtype.itemsize
        return FileArray(self.dtype, (count,), found)

    def read_into(self, out: np.ndarray) -> None:
        """Fill an array of this dtype, shape and memory order; OSError where that fails halfway."""
        memory, at = flattened(out, self.order).view(np.uint8), 0
        for part in self._parts:
            size = part.end - part.begin
            part.read_into(memory[at : at + size])
            at += size

    def read(self) -> np.ndarray:
        """The array, in memory of its own."""
        flat = np.empty(self.size, self.dtype)
        FileArray(self.dtype, flat.shape, self._parts).read_into(flat)
        found: np.ndarray = shaped(flat, self.shape, self.order)
        return found


def joined(arrays: Sequence[FileArray], shape: Sequence[int]) -> FileArray:
    """The elements of flat arrays of one dtype, one after the other, as an array in C order."""
    return FileArray(arrays[0].dtype, shape, [part for a in arrays for part in a._parts])


def _open_regular(path: str, flags: int) -> int:
    """Open a file; OSError, instead of waiting for ever, where it is a pipe or the like."""
    opened = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(opened).st_mode
    if stat.S_ISREG(mode):
        return opened
    os.close(opened)
    number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(number, "is no file; give the path of one that save wrote", path)
