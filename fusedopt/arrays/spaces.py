"""The memory in which an array lies: where arrays like it are checked and made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import host
from .device_interface import on_device

_DEVICES: list[Callable[[Any], Any]] = []


def register(space_of_device_array: Callable[[Any], Any]) -> None:
    """Have a function name the space of an array that lies on a device."""
    _DEVICES[:] = [space_of_device_array]


def space_of(array: Any) -> Any:
    """Return the space of an array; RuntimeError where no backend can use its device."""
    return _DEVICES[0](array) if on_device(array) else host
