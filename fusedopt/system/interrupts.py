"""Keeping Ctrl-C out of work that must happen as a whole."""

from __future__ import annotations

# The functions themselves: the module `signal` looks handlers up among its enumerations, which took
# most of the time of entering and leaving.
import _signal  # type: ignore[import-not-found]  # typeshed has no stub of it
import threading
from typing import Any

SIGINT: int = _signal.SIGINT


class deferred:  # noqa: N801  # used as a function is
    """A context at whose end an interrupt that arrived inside is raised.

    In another thread than the main one, where none arrives, it does nothing.
    """

    def __enter__(self) -> None:
        self._previous: Any = None
        if threading.current_thread() is not threading.main_thread():
            return
        previous = _signal.getsignal(SIGINT)
        if callable(previous):  # otherwise ignored, or installed by something other than Python
            self._arrived: list[Any] = []
            self._previous = previous
            _signal.signal(SIGINT, self._arrive)

    def _arrive(self, *details: Any) -> None:
        self._arrived.append(details)

    def __exit__(self, *exception: object) -> None:
        if self._previous is not None:
            _signal.signal(SIGINT, self._previous)
            if self._arrived:
                self._previous(*self._arrived[-1])
