"""Find the device of an array: what checks and makes arrays that lie there."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from . import host
from .device_interface import on_device

_DEVICES: list[Callable[[Any], Any]] = []


def register(device_of_array: Callable[[Any], Any]) -> None:
    """Take a function that returns the `Device` of an array that does not lie on the host."""
    _DEVICES[:] = [device_of_array]


def device_of(array: Any) -> Any:
    """Return the `Device` of an array; RuntimeError where no backend can use its device."""
    if not on_device(array):
        return host
    if not _DEVICES:  # in a process that has unpickled a rule and done nothing else
        import_module("fusedopt.backends")
    return _DEVICES[0](array)
