"""The compiled core, where it was built."""

from __future__ import annotations

from typing import Any

from .environment import sleepy_openmp

reason: str | None = None
"""Why there is none."""

try:
    with sleepy_openmp():
        from .. import _core as core
except ImportError as error:
    core = None  # type: ignore[assignment]
    reason = f"the compiled core could not be imported ({error}); it was not built"

Mean: Any = type(None) if core is None else core.Mean
"""The class of a gradient that is the mean of several arrays."""

__all__ = ["Mean", "core", "reason"]
