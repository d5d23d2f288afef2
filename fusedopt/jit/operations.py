"""Operations of programs, compiled for the tiles of the core and of Numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..programs.elements import ELEMENTS, OF_STATES
from ..programs.program import HEAD, Operation, Program
from . import unavailable


def tile_function(program: Program, op: Operation, dtype: np.dtype) -> Any:
    """An operation of a program, compiled for elements of one type; it lives as long as Numba.

    Raises RuntimeError where there is no Numba, TypeError for a user's element that does not fit.
    """
    element = op.element or ELEMENTS[str(op.kernel)]
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"{element.__qualname__} is compiled by Numba: {reason}")
    from . import tiles
    from .diagnostics import check_element, check_measure

    operands, sums = len(op.operands), len(op.sums)
    scalars = op.scalar_count - (0 if op.loop == "filter" else HEAD[op.loop])
    if op.kernel is None and op.loop == "rule":
        check_element(element, dtype, operands - 2, scalars)
    if op.loop == "measure":
        states = operands - sums - 2
        if op.kernel is None:
            check_measure(element, states, scalars, sums)
        return tiles.measure_tile(
            element, sums, op.maxima, states, scalars, program.mode(op), dtype
        )
    if op.loop == "sum":
        return tiles.sum_tile(element, operands, scalars, dtype)
    if op.loop in ("filter", "other"):
        return tiles.other_tile(element, operands, scalars, op.kernel in OF_STATES, dtype)
    states = operands - 2 - (op.loop == "peek")
    written = states if op.written is None else op.written
    return tiles.rule_tile(element, states, written, scalars, program.mode(op), dtype)
