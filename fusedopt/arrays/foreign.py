"""Arrays of other libraries in the host's memory, as ndarrays over the same memory."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np

from .device_interface import library_of, on_device

CPU = 1
"""The number of the host's memory in DLPack."""


def host_array(array: Any) -> Any:
    """An ndarray over an array's memory, or the object itself where it has no such view.

    Taken are ndarrays, CPU tensors of PyTorch and whatever offers DLPack or
    `__array_interface__` without a copy. Arrays that their library does not let others write are
    read-only.
    """
    if isinstance(array, (np.ndarray, np.generic)) or on_device(array):
        return array
    if library_of(array) == "torch" and hasattr(array, "data_ptr"):
        return _tensor(array)
    for ndarray in (_exchanged, _interface):
        found = ndarray(array)
        if found is not None:
            return found
    return array


def read_only(array: Any) -> str:
    """Why an array cannot be written, and what to do."""
    library = library_of(array)
    if isinstance(array, np.ndarray) or library == "numpy":
        return "is read-only, and is to be updated in place; pass a copy"
    return (
        f"is an array of {library}, which lets nobody write it; keep the parameters as ndarrays"
        f" (np.array(x)), and give {library} copies of them after each step"
    )


def address_of(array: Any) -> Any:
    """Return a function that tells where a tensor's elements are; None for other arrays."""
    if isinstance(array, np.ndarray) or library_of(array) != "torch" or on_device(array):
        return None
    return getattr(array, "data_ptr", None)


def _tensor(tensor: Any) -> Any:
    """A tensor of PyTorch."""
    if tensor.device.type != "cpu" or "strided" not in str(tensor.layout):
        return tensor
    tensor = tensor.detach().resolve_neg()
    if "bfloat16" in str(tensor.dtype):  # NumPy knows it under ml_dtypes' name alone
        return tensor.view(sys.modules["torch"].int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _exchanged(array: Any) -> Any:
    """By DLPack."""
    device = getattr(array, "__dlpack_device__", None)
    if device is None or int(device()[0]) != CPU:
        return None
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError):  # a dtype that NumPy does not have
        return None


def _interface(array: Any) -> Any:
    """By NumPy's array interface."""
    return np.asarray(array) if hasattr(array, "__array_interface__") else None
