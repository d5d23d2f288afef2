"""Contexts in which the parameters are something else: looked ahead, or averaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import numpy as np

from ..arrays.stored import AVERAGE
from ..rules import Nesterov
from ..system.interrupts import deferred
from .assembly import Assembly


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


@contextmanager
def exchange(assembly: Assembly, name: str, leaves: Sequence[int]) -> Iterator[None]:
    """Let some parameters be anything inside; after it they have their own bits again."""
    if assembly.exchanged:
        raise RuntimeError(f"{name}(): already inside of {assembly.exchanged}()")
    backup: list[np.ndarray] = []
    taken = False
    try:
        with deferred():
            assembly.plan.take()  # all the while, for a thread that comes past the checks
            taken = True
            assembly.plan.synchronize()
            backup += (assembly.parameters[k].copy(order="A") for k in leaves)
            assembly.exchanged = name
        yield
    finally:
        with deferred():
            for k, original in zip(leaves, backup, strict=False):
                assembly.parameters[k][...] = original
            if taken:
                assembly.exchanged = ""
                assembly.plan.give()


@contextmanager
def lookahead(assembly: Assembly) -> Iterator[None]:
    """Move parameters to where their rules want the gradient: see `Optimizer.lookahead`."""
    moving = [
        k
        for k, rule in enumerate(assembly.rules)
        if isinstance(rule, Nesterov) and rule.form == "lookahead"
    ]
    if not moving:
        raise ValueError("lookahead(): no leaf is updated by Nesterov(form='lookahead')")
    with exchange(assembly, "lookahead", moving):
        for k in moving:
            velocity = assembly.leaf_states[k].states["v"].values
            assembly.backend.shift(assembly.rules[k], assembly.parameters[k], velocity)
        yield


def averaged(assembly: Assembly, params: Any) -> Averaged:
    """Return the averages of `ema`, which may take the place of `params`."""
    averages = [leaf_state.states[AVERAGE].data for leaf_state in assembly.leaf_states]

    @contextmanager
    def in_place_of_parameters() -> Iterator[Any]:
        with exchange(assembly, "averaged", range(len(averages))):
            for p, average in zip(assembly.parameters, averages, strict=True):
                with np.errstate(over="ignore"):
                    p[...] = average
            yield params

    return Averaged(assembly.tree.build(averages), in_place_of_parameters())
