"""The backends, and the choice between them."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterable
from typing import Any

from ..arrays import devices
from ..arrays.device_interface import on_device
from ..plan.interface import Backend
from ..system.environment import BACKEND as FORCED
from ..system.extension import core
from .cuda.backend import CudaBackend
from .native import NativeBackend, check_registry
from .numba.backend import NumbaBackend
from .reference import ReferenceBackend

BACKENDS: dict[str, Backend] = {
    b.name: b for b in (NativeBackend(), NumbaBackend(), ReferenceBackend(), CudaBackend())
}
"""Every backend, the preferred first."""

ON_HOST = ("native", "numba", "reference")
"""The backends of NumPy's arrays; the last can always be used."""

if core:
    check_registry()


def _calls_inside() -> int:
    """Return how many calls, this one's caller the first, lie between here and the user's code."""
    frame, count = sys._getframe(1), 0
    while frame.f_back and frame.f_globals["__name__"].partition(".")[0] == "fusedopt":
        frame, count = frame.f_back, count + 1
    return count


def get_backend(name: str = "auto", arrays: Iterable[Any] = ()) -> Backend:
    """A backend by name; "auto" takes FUSEDOPT_BACKEND, else "cuda" where one of these arrays is on
    a CUDA device, else the first that can be used.

    Raises ValueError for an unknown name and RuntimeError where it cannot be used here. Warns
    where nothing but the NumPy reference is left.
    """
    if name == "auto":
        name = FORCED or "auto"
    if name == "auto":
        usable = (n for n in ON_HOST if BACKENDS[n].unavailable() is None)
        name = "cuda" if any(map(on_device, arrays)) else next(usable)
        if name == "reference":
            warnings.warn(
                "fusedopt runs on its NumPy reference, which is slow:"
                f" {BACKENDS['native'].unavailable()}. {BACKENDS['numba'].unavailable()}",
                RuntimeWarning,
                stacklevel=_calls_inside() + 1,
            )
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}; got {name!r}")
    backend = BACKENDS[name]
    reason = backend.unavailable()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot be used here: {reason}")
    return backend


devices.register(lambda array: get_backend("auto", [array]).device)


@functools.cache
def default_backend() -> Backend:
    """Return the backend that "auto" stands for: asked at every `update`, decided once."""
    return get_backend()


__all__ = [
    "BACKENDS",
    "FORCED",
    "ON_HOST",
    "check_registry",
    "default_backend",
    "get_backend",
]
