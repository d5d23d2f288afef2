"""Memory, streams and devices, by numba-cuda or its simulator."""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import cuda

from .toolkit import SIMULATED, call, current_context

NO_TIMING = 2
"""The driver's CU_EVENT_DISABLE_TIMING."""

_FREE: dict[tuple[int, int, int], list[Memory]] = {}
"""By device, stream and size."""


class Memory:
    """Bytes on the current device. owner: what keeps them alive. written_on: the handle of the
    stream that wrote them last, where arrays are made of them."""

    def __init__(self, address: int, size: int, owner: Any) -> None:
        self.address, self.size, self.owner = address, size, owner
        self.written_on = 0
        self._data: Any = None

    @classmethod
    def new(cls, size: int) -> Memory:
        """Bytes that nothing was written to, on a 256-byte boundary."""
        if not SIMULATED:
            array = cuda.device_array(max(size, 1), np.uint8)
            return cls(array.__cuda_array_interface__["data"][0], size, array)
        block = np.full(size + 256, 255, np.uint8)  # NaN, so that reading it is noticed
        start = block.__array_interface__["data"][0]
        return cls(start + -start % 256, size, block)

    @classmethod
    def reused(cls, size: int, stream: int) -> Memory:
        """Return memory for use on one stream, which is used again when this object goes.

        To free memory makes the host wait for the device, and to allocate may.
        """
        rounded = max(256, 1 << (size - 1).bit_length())
        free = _FREE.setdefault((current_device(), stream, rounded), [])
        try:
            whole = free.pop()
        except IndexError:
            whole = cls.new(rounded)
        taken = cls(whole.address, size, whole)
        if SIMULATED:
            taken.fill(255, stream)
        weakref.finalize(taken, free.append, whole).atexit = False
        return taken

    def _simulated(self) -> np.ndarray:
        return simulated_view(self.address, np.dtype(np.uint8), self.size)

    def fill(self, byte: int, stream: int) -> None:
        """Set all bytes to one value, behind all that was queued on the stream."""
        if not self.size:
            return
        if SIMULATED:
            self._simulated()[:] = byte
        else:
            call("cuMemsetD8Async", self.address, byte, self.size, stream)

    def read(self, stream: int) -> np.ndarray:
        """The bytes, after all that was queued on the stream: a copy on the host."""
        if not self.size:
            return np.empty(0, np.uint8)
        if SIMULATED:
            return self._simulated().copy()
        host = np.empty(self.size, np.uint8)
        call("cuMemcpyDtoHAsync", host.ctypes.data, self.address, self.size, stream)
        call("cuStreamSynchronize", stream)
        return host

    def write(self, data: np.ndarray, stream: int, *, wait: bool = True) -> None:
        """Puts bytes of the host there, behind all that was queued on the stream.

        wait: until that is done; otherwise `data` must not change as long as this object lives.
        """
        if not self.size:
            return
        flat = data.reshape(-1).view(np.uint8)
        if SIMULATED:
            self._simulated()[:] = flat
            return
        call("cuMemcpyHtoDAsync", self.address, flat.ctypes.data, self.size, stream)
        if wait:
            call("cuStreamSynchronize", stream)
        else:
            self._data = flat


class Echo:
    """An int64 of the device as the host knows it without waiting: as it was a while ago."""

    def __init__(self, address: int) -> None:
        self._there = Memory(address, 8, None)
        self._here = np.zeros(1, np.int64) if SIMULATED else cuda.pinned_array(1, np.int64)
        self._event: Any = None if SIMULATED else cuda.event(timing=False)
        self._target = int(self._here.ctypes.data)

    def ask(self, stream: int) -> None:
        """Has it copied behind all that was queued on the stream."""
        if SIMULATED:
            self._here[:] = self._there._simulated().view(np.int64)
            return
        call("cuMemcpyDtoHAsync", self._target, self._there.address, 8, stream)
        call("cuEventRecord", self._event.handle, stream)

    def arrived(self) -> bool:
        """Return whether what was asked for last is here."""
        return SIMULATED or bool(self._event.query())

    @property
    def value(self) -> int:
        """The value that has arrived."""
        return int(self._here[0])


def simulated_view(address: int, dtype: np.dtype, size: int) -> np.ndarray:
    """So many elements at an address of the simulator, flat."""
    kind = ctypes.c_uint8 * (size * dtype.itemsize)
    return np.ctypeslib.as_array(kind.from_address(address)).view(dtype)


_NUMBERS: dict[int, int] = {}
"""The numbers of devices, by the handles of their contexts that were entered."""

_NOTHING = contextlib.nullcontext()


def on_device(number: int) -> contextlib.AbstractContextManager[None]:
    """Return a context in which a device is the current one.

    Most often the device is the current one already, which Numba's own context finds out slowly.
    """
    if SIMULATED or _NUMBERS.get(current_context()) == number:
        return _NOTHING
    return _entered(number)


@contextlib.contextmanager
def _entered(number: int) -> Iterator[None]:
    with cuda.gpus[number]:
        _NUMBERS[current_context()] = number
        yield


def current_device() -> int:
    """The number of the device in use."""
    return 0 if SIMULATED else int(cuda.current_context().device.id)


def synchronize() -> None:
    """Waits for all that was queued on the current device, on whatever stream."""
    if not SIMULATED:
        cuda.synchronize()


def wait_for(stream: int, other: int) -> None:
    """Makes a stream wait for what was queued on another one."""
    if SIMULATED or stream == other:
        return
    event = call("cuEventCreate", NO_TIMING)
    call("cuEventRecord", event, other)
    call("cuStreamWaitEvent", stream, event, 0)
    call("cuEventDestroy", event)  # which takes effect when the event has come
