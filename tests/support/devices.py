"""Arrays of other libraries and a small device, for tests on Numba's simulator.

The "device" is the host's memory. Blocks and chunks are small, so that a small tensor has several.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from exactness import Array
from fusedopt.backends.cuda import (
    blocks,
    clipping,
    kernels,
    launching,
    reductions,
    rows,
    stats,
    toolkit,
)


class OnDevice:
    """An array of a library that has the array interface. dtype: as the library has it."""

    def __init__(self, array: Array, **more: Any) -> None:
        self.array, self.dtype, self._more = array, array.dtype, more

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        told = {k: v for k, v in self.array.__array_interface__.items() if k != "descr"}
        typestr = "<V2" if self.dtype == ml_dtypes.bfloat16 else told["typestr"]
        return {**told, "typestr": typestr, "version": 3, **self._more}

    def __setitem__(self, key: Any, value: Any) -> None:
        self.array[key] = value


class Exported:
    """An array that is exchanged by DLPack alone. number: of its device."""

    def __init__(self, array: Array, number: int = 0) -> None:
        self.array, self.dtype, self._number = array, array.dtype, number
        self.streams: list[Any] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self._number

    def __dlpack__(self, *, stream: Any) -> Any:
        self.streams.append(stream)
        return self.array.__dlpack__()


class Tensor:
    """PyTorch's tensor, as far as it is looked at."""

    is_cuda = True
    device = SimpleNamespace(index=0)

    def __init__(self, array: Array) -> None:
        self.array = array

    @property
    def dtype(self) -> str:
        return f"torch.{self.array.dtype.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def ndim(self) -> int:
        return self.array.ndim

    def element_size(self) -> int:
        return self.array.itemsize

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def data_ptr(self) -> int:
        return int(self.array.__array_interface__["data"][0])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.array[key] = value

    def contiguous(self) -> Tensor:
        return Tensor(np.ascontiguousarray(self.array))

    def permute(self, axes: tuple[int, ...]) -> Tensor:
        return Tensor(self.array.transpose(axes))


Tensor.__module__ = "torch"


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands for PyTorch; the streams that it was asked for, by device."""
    asked: list[int] = []

    def current_stream(device: int) -> Any:
        asked.append(device)
        return SimpleNamespace(cuda_stream=7)

    cuda = SimpleNamespace(current_stream=current_stream)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    return asked


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `exactness.elementwise` puts in the place of matrix products."""

    def between(rule: Any, phase: int, works: Any, sides: Any, algebra: Any) -> dict[str, Any]:
        for name in rule.works if phase == 0 else rule.works[:1]:
            works[name] *= 0.5  # of the others states are yet to be made
        return {}

    for rule in (fo.Muon, fo.SOAP):
        monkeypatch.setattr(rule, "on_device", between)


CACHED = (
    kernels.step_kernel,
    blocks.block_kernel,
    reductions.squares_kernel,
    reductions.totals_kernel,
    reductions.guard_kernel,
    reductions.row_squares_kernel,
    rows.added_kernel,
    stats.sums_kernel,
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads to a block, so that a chunk has 32 elements of float32; of sums two segments.
    Blocks that share a scale need a warp for a tile; their chunks have two tiles."""
    assert toolkit.SIMULATED
    for cached in CACHED:
        cached.cache_clear()
    for module in (kernels, reductions, launching, clipping, rows, stats):
        monkeypatch.setattr(module, "THREADS", 2)
        monkeypatch.setattr(module, "GROUPS", 2, raising=False)
    monkeypatch.setattr(blocks, "WARPS", 1)
    monkeypatch.setattr(blocks, "CHUNK", 512)
    yield
    for cached in CACHED:
        cached.cache_clear()
