"""Hyperparameters other than those that a rule has."""

from __future__ import annotations

import typing
from typing import Any


def others(kind: Any, value: Any) -> list[Any]:
    """Other legal values of a field."""
    if isinstance(value, bool):
        return [not value] + [a for a in typing.get_args(kind) if isinstance(a, str)]
    if isinstance(value, str):
        named = typing.get_origin(kind) is not typing.Literal  # of many; the examples vary these
        return [] if named else [a for a in typing.get_args(kind) if a != value]
    if isinstance(value, tuple):
        return [(*value[:k], v / 2, *value[k + 1 :]) for k, v in enumerate(value)]
    return [value + 1] if isinstance(value, int) else [value * 0.7 + 0.013]
