"""Arrays of other libraries in the host's memory, as ndarrays over the same memory."""

from __future__ import annotations

import sys
from array import array as buffer_array
from collections.abc import Iterable
from dataclasses import is_dataclass
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
    """Return why an array cannot be written, with the remedy."""
    library = library_of(array)
    if isinstance(array, np.ndarray) or library == "numpy":
        return (
            "is read-only, and is to be updated in place; make it writable with"
            " a.flags.writeable = True, or pass a copy and use that in its place"
        )
    if library == "mlx":
        return "is read-only by DLPack; pass np.asarray(x), by which MLX lets others write it"
    return (
        f"is an array of {library}, which lets nobody write it; keep the parameters as ndarrays"
        f" (np.array(x)), and give {library} copies of them after each step"
    )


def remedy(given: Any, use: str) -> str:
    """Return what to pass in the place of an object that is no array.

    use: what the array is for, "update" or "read".
    """
    library = library_of(given)
    if library == "mygrad":
        return "pass x.data, the ndarray that it holds"
    if isinstance(given, (memoryview, buffer_array)):
        return "pass np.asarray(x), which has the same memory"
    tree = _as_tree(given, use)
    if tree:
        return f"pass {tree}, since only dicts, lists and tuples are looked into"
    if use == "read":
        if library == "torch":
            return "pass it dense and on the host, with x.to_dense() or x.cpu()"
        if library == "mlx":  # which evaluates in the thread that made it alone
            return "evaluate it with mx.eval(x) first; of bfloat16 pass x.astype(mx.float32)"
        return f"pass {'x.numpy()' if hasattr(given, 'numpy') else 'np.asarray(x)'}"
    if library == "tinygrad":
        return (
            "pass the memory of its buffer, np.frombuffer(x.uop.buffer.as_memoryview("
            "allow_zero_copy=True), np.float32).reshape(x.shape), after x.realize()"
        )
    others = f", and make what {library} needs of them" if _is_array(given) else ""
    return (
        "keep the parameters as ndarrays, which are updated in place"
        f"{others if library != 'numpy' else ''} (np.asarray(x) would be a copy)"
    )


def _is_array(given: Any) -> bool:
    """Return whether an object has numbers that its library can turn into an ndarray."""
    return any(hasattr(given, name) for name in ("__array__", "__dlpack__", "numpy"))


def _as_tree(given: Any, use: str) -> str:
    """Return how a container of arrays becomes a dict or list of them; nothing for others."""
    if isinstance(given, (type, str, bytes, bytearray)) or _is_array(given):
        return ""
    if hasattr(given, "named_parameters"):  # a module of PyTorch, and of others that are alike
        of_each = "{name: p.grad for name, p in x.named_parameters()}"
        return of_each if use == "read" else "dict(x.named_parameters())"
    if hasattr(given, "keys") and hasattr(given, "__getitem__"):
        return "dict(x)"
    if is_dataclass(given):
        return "{f.name: getattr(x, f.name) for f in dataclasses.fields(x)}"
    if isinstance(given, Iterable):
        return "list(x)"
    return "vars(x)" if getattr(given, "__dict__", None) else ""


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
    """Return the memory of an array by DLPack."""
    device = getattr(array, "__dlpack_device__", None)
    if device is None or int(device()[0]) != CPU:
        return None
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError):  # a dtype that NumPy does not have
        return None


def _interface(array: Any) -> Any:
    """Return the memory of an array by NumPy's array interface."""
    return np.asarray(array) if hasattr(array, "__array_interface__") else None
