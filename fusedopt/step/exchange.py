"""Averages of weights, to look at or to put in the parameters' place."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any


class Averaged:
    """Averages of weights, live: `params`, float32 or float64, nested like the parameters.

    As a context manager, once, puts them in the parameters' place, and gives the parameters.
    """

    def __init__(self, params: Any, exchange: AbstractContextManager[Any]) -> None:
        self.params, self._exchange = params, exchange

    def __enter__(self) -> Any:
        return self._exchange.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return self._exchange.__exit__(kind, error, trace)
