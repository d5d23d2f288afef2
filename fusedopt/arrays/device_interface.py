"""Arrays of other libraries, read without importing any: where they lie, and what they hold."""

from __future__ import annotations

import ctypes
import sys
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .order import axes_of, inverse

CUDA = 2
"""DLPack's number of CUDA devices."""

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Description(NamedTuple):
    """address: of the first element, 0 where there is none. strides: in bytes; None: C order.
    dtype: None where NumPy has none. stream: the handle that the producer named, else 0. library:
    the top module of its type."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: np.dtype | None
    device: int | None
    stream: int
    writeable: bool
    library: str


def library_of(array: Any) -> str:
    """The top module of an array's type."""
    return type(array).__module__.partition(".")[0]


def on_device(array: Any) -> bool:
    """Return whether this is an array in the memory of a CUDA device."""
    if isinstance(array, np.ndarray):
        return False
    if library_of(array) == "torch":
        return bool(getattr(array, "is_cuda", False))
    if hasattr(array, "__cuda_array_interface__"):
        return True
    kind = getattr(array, "__dlpack_device__", None)
    return kind is not None and int(kind()[0]) == CUDA


def describe(array: Any) -> Description:
    """Describe an array for which `on_device` is true; TypeError where that cannot be done."""
    library = library_of(array)
    if library == "torch":
        return _torch(array)
    if hasattr(array, "__cuda_array_interface__"):
        return _interface(array, library)
    return _dlpack(array, library)


def _torch(tensor: Any) -> Description:
    names = {"bfloat16": _BFLOAT16, "float16": np.dtype(np.float16)}
    name = str(tensor.dtype).removeprefix("torch.")
    known = {**names, "float32": np.dtype(np.float32), "float64": np.dtype(np.float64)}
    size = tensor.element_size()
    strides = tuple(size * s for s in tensor.stride())
    return Description(
        tensor.data_ptr(), tuple(tensor.shape), strides, known.get(name), tensor.device.index, 0,
        True, "torch",
    )  # fmt: skip


def _interface(array: Any, library: str) -> Description:
    told = array.__cuda_array_interface__
    address, readonly = told["data"]
    if told.get("mask") is not None:
        raise TypeError("masks are not supported")
    device = getattr(getattr(array, "device", None), "id", None)
    if device is None and hasattr(array, "__dlpack_device__"):
        device = int(array.__dlpack_device__()[1])
    # The interface has no name for bfloat16, and calls it raw bytes.
    own = getattr(array, "dtype", None)
    low = isinstance(own, np.dtype) and own == _BFLOAT16
    dtype = _BFLOAT16 if low else np.dtype(told["typestr"])
    # 1 is the legacy default stream, and 2 that of each thread, by which name the driver knows it.
    stream = told.get("stream") or 0
    return Description(
        address, tuple(told["shape"]), told.get("strides"), dtype, device,
        0 if stream == 1 else stream, not readonly, library,
    )  # fmt: skip


class _Tensor(ctypes.Structure):
    """DLPack's DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_FLOATS = {(2, 16): np.float16, (2, 32): np.float32, (2, 64): np.float64, (4, 16): _BFLOAT16}
"""By DLPack's type code and bits."""


def _dlpack(array: Any, library: str) -> Description:
    # 1, the legacy default stream: the producer makes it wait for what is still to be written.
    capsule = array.__dlpack__(stream=1)
    take = ctypes.pythonapi.PyCapsule_GetPointer
    take.restype, take.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    t = _Tensor.from_address(take(capsule, b"dltensor"))
    shape = tuple(t.shape[k] for k in range(t.ndim))
    kind = _FLOATS.get((t.code, t.bits))
    strides = tuple(t.strides[k] * t.bits // 8 for k in range(t.ndim)) if t.strides else None
    address = (t.data or 0) + t.byte_offset
    dtype = None if kind is None or t.lanes != 1 else np.dtype(kind)
    # The capsule frees the view when it goes; the memory is the array's, which stays.
    number = int(array.__dlpack_device__()[1])
    return Description(address, shape, strides, dtype, number, 0, True, library)


def current_stream(library: str, device: int, named: int) -> int:
    """The handle of the stream on which a library works now; named: that of its description."""
    if library == "torch":
        torch = sys.modules["torch"]
        # What current_stream wraps in an object.
        raw = getattr(getattr(torch, "_C", None), "_cuda_getCurrentRawStream", None)
        return int(raw(device) if raw else torch.cuda.current_stream(device).cuda_stream)
    if library == "cupy":
        return int(sys.modules["cupy"].cuda.get_current_stream(device).ptr)
    return named


def relaid(array: Any, library: str, order: str) -> Any:
    """A dense copy in a memory order by its own library; None where that is not known."""
    if library not in ("torch", "cupy"):
        return None
    axes, back = axes_of(order, len(array.shape)), inverse(order, len(array.shape))
    if library == "torch":
        return array.permute(axes).contiguous().permute(back)
    return sys.modules["cupy"].array(array.transpose(axes), order="C").transpose(back)
