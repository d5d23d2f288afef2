"""An exception from outside, at a bytecode of the package's Python."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fusedopt as fo

PACKAGE = str(Path(fo.__file__).parent)


class FromOutside(BaseException):
    """What a handler of a signal may raise, or another thread."""


class At:
    """A tracer that raises at a bytecode, counted over the package's own frames in this thread."""

    def __init__(self, place: int) -> None:
        self.left = place

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                raise FromOutside
        return self


def interrupted_at(place: int, action: Callable[[], object]) -> bool:
    """Whether an action was interrupted at a bytecode; it has fewer otherwise."""
    tracer, previous = At(place), sys.gettrace()
    sys.settrace(tracer)
    try:
        action()
    except FromOutside:
        return True
    finally:
        sys.settrace(previous)
    assert tracer.left > 0, "the exception was lost"
    return False
