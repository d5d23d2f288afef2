"""The `Device` of the host: NumPy's arrays."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .checks import GradientChecks, check_apart, check_input, check_parameter, check_target
from .formats import PLAIN_OF, compute_dtype
from .rows import added_up, as_rows, unique_rows
from .storage import Storage
from .stored import ArraySpec, Quantized, Stored
from .stored import allocate as new

__all__ = [
    "GradientChecks", "allocate", "blank", "check_apart", "check_options", "check_parameter",
    "check_state", "check_summed", "check_target", "same", "unique_rows",
]  # fmt: skip

allocate = Storage.allocate
same = functools.partial(np.array_equal, equal_nan=True)


class Waiting(Protocol):
    """The option of an optimizer that the host looks at."""

    @property
    def wait(self) -> bool:
        """Whether a step may wait for its norm."""


def check_options(options: Waiting, state_path: Any) -> None:
    """ValueError, with the name, for what there is on a device alone."""
    if not options.wait:
        raise ValueError(
            "wait=False: is for arrays on a CUDA device, whose norm a step need not wait for; on"
            " the host a step that returns is done, so leave it out"
        )


def check_state(label: str, state: Any) -> Stored:
    """An array that will be updated in place, or a quantised state; errors as `check_target`."""
    return state if isinstance(state, Quantized) else Stored.plain(check_target(label, state))


def check_summed(label: str, gradient: Any) -> np.ndarray:
    """Return a gradient whose squares will be summed, dense; errors as `check_input`."""
    rows = as_rows(label, gradient)
    return check_input(label, gradient) if rows is None else added_up(label, rows)


def blank(parameters: Sequence[np.ndarray]) -> list[Stored]:
    """New arrays like these, in the types that they are computed in."""
    return new([ArraySpec(PLAIN_OF[compute_dtype(p.dtype)], p) for p in parameters])
