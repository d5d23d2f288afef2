"""Builds and calls limit.cpp: how fast memory and caches allow a step to be."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusedopt.lab.bench.problems import Array

BLOCK = 1 << 18
"""Elements that a thread takes at a time: long enough to cost nothing."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled sweeps. RuntimeError where no C++ compiler with OpenMP is found."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    remedy = "install GCC or Clang with OpenMP, or name such a compiler in CXX"
    if compiler is None or shutil.which(compiler) is None:
        raise RuntimeError(f"limit.cpp needs a C++ compiler, found {compiler or 'none'}; {remedy}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        built = Path(folder) / "limit.so"
        flags = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        if platform.machine() in ("x86_64", "AMD64"):
            # NumPy's arrays begin 16 bytes into a line, so that each 64-byte access touches two.
            flags.append("-mprefer-vector-width=256")
        command = [compiler, *flags, "-o", str(built), str(Path(__file__).with_name("limit.cpp"))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed; {remedy}\n{done.stderr}")
        return ctypes.CDLL(str(built))


class Sweep:
    """One parallel pass over tensors that reads some arrays, and reads and writes others.

    leaves: of each tensor the arrays that are only read, and those that are written too, all of
    one size and dtype (float32 or float64) and dense. threads: how many work.
    """

    def __init__(
        self, leaves: Sequence[tuple[Sequence[Array], Sequence[Array]]], threads: int
    ) -> None:
        read, written = leaves[0]
        itemsize = written[0].itemsize
        pointers: list[int] = []
        sizes: list[int] = []
        for read, written in leaves:
            for start in range(0, written[0].size, BLOCK):
                pointers += [a.ctypes.data + start * itemsize for a in (*read, *written)]
                sizes.append(min(BLOCK, written[0].size - start))
        self._leaves = leaves  # keeps the arrays alive
        self._arguments = (
            ctypes.c_size_t(itemsize),
            ctypes.c_size_t(len(read)),
            ctypes.c_size_t(len(written)),
            ctypes.c_ssize_t(len(sizes)),
            (ctypes.c_void_p * len(pointers))(*pointers),
            (ctypes.c_size_t * len(sizes))(*sizes),
        )
        self._counts = len(read), len(written)
        self._threads = ctypes.c_int(threads)
        self._sweep = library().sweep

    def __call__(self, c: float = 0.0) -> None:
        """Add c times the sum of a place's elements to each that is written there."""
        if self._sweep(*self._arguments, ctypes.c_double(c), self._threads):
            raise ValueError(
                "limit.cpp: expected up to 2 arrays to read and 1 to 5 to write, got"
                f" {self._counts}; raise MOST_READ or MOST_WRITTEN there"
            )


TILE = 256
"""Elements of a tile, of which every format has whole bytes."""


class Streams:
    """One parallel pass over tensors whose arrays have several element sizes.

    leaves: of each tensor its elements and the arrays that are read, updated, and only written, as
    (array, bytes of a tile). Updated arrays keep their values, written ones become zero. What is
    left over of a tensor's last tile is left out.
    """

    def __init__(
        self, leaves: Sequence[tuple[int, Sequence[tuple[Array, int, int]]]], threads: int
    ) -> None:
        (_, first), *_ = leaves
        pointers: list[int] = []
        tiles: list[int] = []
        for n, streams in leaves:
            for start in range(0, n // TILE, BLOCK // TILE):
                pointers += [a.ctypes.data + start * size for a, size, _ in streams]
                tiles.append(min(BLOCK // TILE, n // TILE - start))
        self._leaves = leaves  # keeps the arrays alive
        self.bytes = sum(size * (1 + (kind == 1)) for _, size, kind in first) / TILE
        self._seen = ctypes.c_uint()
        self._arguments = (
            ctypes.c_ssize_t(len(tiles)),
            ctypes.c_size_t(len(first)),
            (ctypes.c_void_p * len(pointers))(*pointers),
            (ctypes.c_size_t * len(first))(*(size for _, size, _ in first)),
            (ctypes.c_int * len(first))(*(kind for _, _, kind in first)),
            (ctypes.c_size_t * len(tiles))(*tiles),
            ctypes.c_uint(0),
            ctypes.c_int(threads),
            ctypes.byref(self._seen),
        )
        self._sweep = library().sweep_streams

    def __call__(self) -> None:
        self._sweep(*self._arguments)


def check_sweep(reads: int, writes: int, dtype: np.dtype[Any], threads: int) -> None:
    """AssertionError where a sweep over so many arrays does not read and write all of them."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-9, 9, 2 * BLOCK + 3).astype(dtype) for _ in range(reads + writes)]
    before = [a.copy() for a in arrays]
    Sweep([(arrays[:reads], arrays[reads:])], threads)(1.0)
    total = np.sum(before, axis=0)
    for k, (old, new) in enumerate(zip(before, arrays, strict=True)):
        np.testing.assert_array_equal(new, old if k < reads else old + total)
