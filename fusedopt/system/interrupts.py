"""Work that must happen as a whole, whatever interrupts the thread that wants it."""

from __future__ import annotations

# The functions themselves: the module `signal` looks handlers up among its enumerations, which took
# most of the time of entering and leaving.
import _signal  # type: ignore[import-not-found]  # typeshed has no stub of it
import os
import sys
import threading
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from .extension import core

T = TypeVar("T")

SIGNALS: list[int] = sorted(map(int, _signal.valid_signals()))


class deferred:  # noqa: N801  # used as a function is
    """A context at whose end the handlers of signals that arrived inside are run.

    In another thread than the main one, where none arrives, it does nothing. What is raised by
    other means, such as PyThreadState_SetAsyncExc, it does not keep out: see `uninterrupted`.
    """

    def __enter__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._arrived: list[Any] = []
        if threading.current_thread() is not threading.main_thread():
            return
        self._previous = _handlers()
        for number in self._previous:
            _signal.signal(number, self._arrive)

    def _arrive(self, *details: Any) -> None:
        self._arrived.append(details)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            _signal.signal(number, handler)
        for number, frame in self._arrived:
            self._previous[number](number, frame)


def _handlers() -> dict[int, Any]:
    """Return the handlers of signals that Python code has installed."""
    global _last
    found = list(map(_signal.getsignal, SIGNALS))
    if found != _last[0]:  # a look at each takes longer than all the rest
        pairs = zip(SIGNALS, found, strict=True)
        _last = found, {number: handler for number, handler in pairs if callable(handler)}
    return _last[1]


_last: tuple[list[Any], dict[int, Any]] = [], {}
"""The handlers of all signals at the last look, and those of them that Python code installed."""


class Helper(threading.Thread):
    """A thread that works for others, in which nothing is raised from outside."""

    def __init__(self, ready: Callable[[None], None]) -> None:
        super().__init__(name="fusedopt", daemon=True)
        self._ready = ready

    def run(self) -> None:
        core.floating_point()  # that of the thread that made this one may be another
        errands: SimpleQueue[Any] = SimpleQueue()
        _idle.append(errands)
        self._ready(None)
        while True:
            function, outcome, keep = errands.get()
            result = error = None
            try:
                result = function()
            except BaseException as caught:
                error = caught
            if error is not None or not keep:
                _idle.append(errands)
            outcome.finish(result, error)
            del function, outcome, result, error


_idle: list[SimpleQueue[Any]] = []
"""The errands of the helpers that have none."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)


def uninterrupted(function: Callable[[], T]) -> T:
    """Call a function so that it is called as a whole, or not at all.

    It runs in a thread of its own, where no handler of a signal runs and no exception from outside
    arrives, while the calling thread waits in the compiled core, which looks at neither; what is to
    be raised there is raised after it. In a thread of the same kind it is simply called. Without
    the core signals are held back, and no more can be done.
    """
    while _helper_is_idle():
        outcome = core.hand_over(_idle, partial(copy_context().run, function))
        if outcome is not NotImplemented:
            return outcome  # type: ignore[no-any-return]
    return directly(function)


def _helper_is_idle() -> bool:
    """Whether a helper can be had: see to it that one is idle."""
    if core is None or sys.is_finalizing() or isinstance(threading.current_thread(), Helper):
        return False
    if not _idle:
        ready: SimpleQueue[None] = SimpleQueue()
        try:
            Helper(ready.put).start()
        except RuntimeError:  # the system gives no more threads, or the process ends
            return False
        ready.get()
    return True


def directly(function: Callable[[], T]) -> T:
    """Call a function with signals held back."""
    with deferred():
        return function()


class _Context:
    """The form of `core.Context` without the core."""

    def __init__(self, enter: Callable[[], Any], leave: Callable[[], Any], *_: Any) -> None:
        self._enter, self._leave = enter, leave

    def __enter__(self) -> Any:
        return directly(self._enter)

    def __exit__(self, *exception: object) -> None:
        directly(self._leave)


class Uninterrupted(core.Context if core else _Context):  # type: ignore[misc]
    """A context whose beginning and end are calls as by `uninterrupted`.

    helped: whether both may run in a thread of their own. What `enter` returns is the context's
    value. Once it has been entered, `leave` is called
    whatever is raised wherever: both methods are the core's, and nothing can come between.
    """

    def __init__(
        self, enter: Callable[[], Any], leave: Callable[[], Any], *, helped: bool = True
    ) -> None:
        idle = _helper_is_idle if helped else lambda: False
        super().__init__(enter, leave, _idle, idle, directly)
