"""The backends, and the choice between them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any

from ..cuda.foreign import on_device
from ..environment import choice
from .base import Backend, Group, Layout, Plan
from .native import NativeBackend, check_registry, core
from .numba_cpu import NumbaBackend
from .numba_cuda import CudaBackend
from .reference import ReferenceBackend

BACKENDS: dict[str, Backend] = {
    b.name: b for b in (NativeBackend(), NumbaBackend(), ReferenceBackend(), CudaBackend())
}
"""Every backend, the preferred first."""

ON_HOST = ("native", "numba", "reference")
"""Those of NumPy's arrays; the last can always be used."""

FORCED = choice("FUSEDOPT_BACKEND", ("auto", *BACKENDS))


def get_backend(name: str = "auto") -> Backend:
    """A backend by name; "auto" takes FUSEDOPT_BACKEND, else the first that can be used.

    Raises ValueError for an unknown name and RuntimeError where it cannot be used here. Warns
    where nothing but the NumPy reference is left.
    """
    if name == "auto":
        name = FORCED or "auto"
    if name == "auto":
        name = next(n for n in ON_HOST if BACKENDS[n].unavailable() is None)
        if name == "reference":
            warnings.warn(
                "fusedopt runs on its NumPy reference, which is slow:"
                f" {BACKENDS['native'].unavailable()}. {BACKENDS['numba'].unavailable()}",
                RuntimeWarning,
                stacklevel=3,
            )
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}; got {name!r}")
    backend = BACKENDS[name]
    reason = backend.unavailable()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot be used here: {reason}")
    return backend


def backend_for(name: str, arrays: Iterable[Any]) -> Backend:
    """`get_backend` for these parameters: "auto" takes "cuda" where one is on a CUDA device."""
    if name == "auto" and FORCED in (None, "auto") and any(map(on_device, arrays)):
        name = "cuda"
    return get_backend(name)


@functools.cache
def default_backend() -> Backend:
    """What "auto" stands for: asked at every `update`, decided once."""
    return get_backend()


__all__ = [
    "BACKENDS",
    "ON_HOST",
    "Backend",
    "Group",
    "Layout",
    "Plan",
    "backend_for",
    "check_registry",
    "core",
    "default_backend",
    "get_backend",
]
