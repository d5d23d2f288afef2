"""Arrays on a device."""

from __future__ import annotations

import math
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from ...arrays import device_interface
from ...arrays.formats import BFLOAT16, FLOAT32, PLAIN_OF
from ...arrays.order import flattened, inverse, shaped, turned_shape
from ...arrays.stored import Quantized, Stored
from .buffers import Memory, on_device
from .launching import convert


class Library(NamedTuple):
    """A library's arrays on a device. named_stream: the one that an array itself named."""

    name: str
    device: int
    named_stream: int

    @property
    def written_on(self) -> int:
        """The handle of the stream on which the library works now."""
        return device_interface.current_stream(*self)


Producer = Library | Memory
"""An object that tells the stream for which a reader of an array must wait."""


class DeviceArray:
    """A dense array on a CUDA device, over memory of its owner.

    Other libraries take it by `__cuda_array_interface__` (bfloat16 as uint16, its bits). `copy`
    makes an ndarray on the host, and `a[...] = b` takes one, or another array of the device, and
    converts.
    """

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        dtype: np.dtype,
        order: str,
        device: int,
        owner: Any,
        library: str,
        stream: int = 0,
    ) -> None:
        self.address, self.shape, self.dtype, self.order = address, shape, dtype, order
        self.device, self.owner, self.library, self.named_stream = device, owner, library, stream
        self.ndim, self.size = len(shape), math.prod(shape)
        self.itemsize = dtype.itemsize
        self.nbytes = self.size * self.itemsize

    def like(
        self, address: int, dtype: np.dtype, owner: Any, shape: tuple[int, ...] | None = None
    ) -> DeviceArray:
        """Return an array elsewhere that works on the same stream, of the same shape and order, or
        of another shape in C order."""
        return DeviceArray(
            address,
            self.shape if shape is None else shape,
            dtype,
            self.order if shape is None else "C",
            self.device,
            owner,
            self.library,
            self.named_stream,
        )

    @property
    def flags(self) -> Any:
        """The memory orders in which the elements are contiguous."""
        both = self.ndim < 2 or self.size < 2
        return SimpleNamespace(
            c_contiguous=both or self.order == "C", f_contiguous=both or self.order == "F"
        )

    @property
    def producer(self) -> Producer:
        """The object that tells the stream, without keeping the caller's array alive."""
        if isinstance(self.owner, Memory):
            return self.owner
        return Library(self.library, self.device, self.named_stream)

    @property
    def stream(self) -> int:
        """The handle of the stream on which the array is to be read: the one that last wrote to it
        where this package did, otherwise the one on which its library works now."""
        return self.producer.written_on

    @property
    def current_stream(self) -> int:
        """The handle of the stream on which the library of the array works now."""
        return device_interface.current_stream(self.library, self.device, self.named_stream)

    @property
    def unmoved(self) -> bool:
        """Whether the owner still has the same memory."""
        moves = device_interface.library_of(self.owner) == "torch"
        return not moves or bool(self.owner.data_ptr() == self.address)

    @property
    def memory(self) -> Memory:
        """The bytes of the array."""
        return Memory(self.address, self.nbytes, self)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        steps = [self.itemsize, *turned_shape(self.shape, self.order)[::-1]]
        strides = list(accumulate(steps, lambda x, y: x * y))[: self.ndim][::-1]
        return {
            "shape": self.shape,
            "typestr": "<u2" if self.dtype == BFLOAT16 else self.dtype.str,
            "data": (self.address, False),
            "strides": tuple(strides[k] for k in inverse(self.order, self.ndim)),
            "stream": self.stream or 1,
            "version": 3,
        }

    def copy(self, order: str = "K") -> np.ndarray:
        """The elements on the host, in the same order in memory."""
        with on_device(self.device):
            flat = self.memory.read(self.stream).view(self.dtype)
        host: np.ndarray = shaped(flat, self.shape, self.order)
        return host

    def __float__(self) -> float:
        """The only element; waits until it is there."""
        return float(self.copy().item())

    def __setitem__(self, key: Any, value: Any) -> None:
        if key is not Ellipsis:
            raise TypeError(f"only whole arrays can be assigned to, with a[...], got a[{key!r}]")
        with on_device(self.device):
            if isinstance(value, DeviceArray):
                convert(self, stored(value))
                return
            if np.ndim(value) == 0 and value == 0:
                self.memory.fill(0, self.stream)
                return
            host = np.broadcast_to(np.asarray(value), self.shape).astype(self.dtype)
            flat = np.ascontiguousarray(flattened(host, self.order))
            self.memory.write(flat, self.stream)

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype.name}, device={self.device})"


class DeviceStored(Stored):
    """The elements of an array on a device."""

    @property
    def values(self) -> Any:
        """The array itself where its elements are plain, otherwise a new one of float32."""
        data: Any = self.data
        if self.aux is None:
            return data
        with on_device(data.device):
            memory = Memory.new(4 * self.size)
            memory.written_on = data.current_stream
            made = data.like(memory.address, FLOAT32, memory, self.shape)
            made.order = self.order
            convert(made, self)
        return made


class DeviceQuantized(DeviceStored, Quantized):
    """A quantised state on a device: codes, scales, and `dequantize` are arrays there."""


def stored(a: DeviceArray) -> Stored:
    """An array as it is."""
    data: Any = a
    return DeviceStored(PLAIN_OF[a.dtype], data, None, a.shape, a.order)
