"""Contexts in which the parameters are something else: looked ahead, or averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..arrays.stored import AVERAGE, LeafState
from ..plan.spec import fresh
from ..rules.groups import at_step
from ..system.interrupts import Uninterrupted
from .assembly import Assembly


class Exchange(Uninterrupted):
    """A context in which parameters are something else; after it they have their own bits again.

    leaves: those that `move` writes. value: what the context gives.
    """

    def __init__(
        self,
        assembly: Assembly,
        name: str,
        leaves: Sequence[int],
        move: Callable[[], None],
        value: Any = None,
    ) -> None:
        super().__init__(self._enter, self._leave)
        self._assembly, self._name = assembly, name
        self._leaves, self._move, self._value = leaves, move, value
        self._backup: list[np.ndarray] = []
        self._token = object()

    def _enter(self) -> Any:
        assembly = self._assembly
        if assembly.exchanged:
            raise RuntimeError(f"{self._name}(): already inside of {assembly.exchanged}()")
        assembly.check_at_home(self._name)
        assembly.plan.take(self._token)  # all the while, for a thread that comes past the checks
        try:
            assembly.plan.synchronize()
            assembly.watch.check()
            self._backup = [assembly.parameters[k].copy(order="K") for k in self._leaves]
            assembly.exchanged = self._name
            self._move()
        except BaseException:
            self._leave()
            raise
        return self._value

    def _leave(self) -> None:
        assembly = self._assembly
        backup, self._backup = self._backup, []
        if not assembly.plan.held(self._token):
            return
        try:
            if backup:
                assembly.watch.check()
            for k, original in zip(self._leaves, backup, strict=False):
                assembly.parameters[k][...] = original
        finally:
            assembly.exchanged = ""
            assembly.plan.give(self._token)


class Averaged(Exchange):
    """Averages of weights, live: `params`, float32 or float64, nested like the parameters.

    As a context manager, puts them in the parameters' place, and gives the parameters.
    """

    def __init__(self, assembly: Assembly, params: Any) -> None:
        averages = [leaf_state.states[AVERAGE].data for leaf_state in assembly.leaf_states]
        self.params = assembly.tree.build(averages)

        def move() -> None:
            for p, average in zip(assembly.parameters, averages, strict=True):
                with np.errstate(all="ignore"):  # whatever np.seterr says: it rounds
                    p[...] = average

        super().__init__(assembly, "averaged", range(len(averages)), move, params)


def lookahead(assembly: Assembly) -> Exchange:
    """Move parameters to where their rules want the gradient: see `Optimizer.lookahead`."""
    groups = at_step(assembly.groups, int(assembly.counters[0]) + 1)
    of_leaves = enumerate(groups[k].rule.ahead for k in assembly.group_of)
    rules = {k: rule for k, rule in of_leaves if rule is not None}
    if not rules:
        raise ValueError("lookahead(): no leaf is updated by Nesterov(form='lookahead')")

    def move() -> None:
        states = [assembly.leaf_states[k] for k in rules]
        moving = [LeafState(assembly.device.check_state("p", s.caller), {}) for s in states]
        plan = assembly.backend.plan(fresh(list(rules.values()), moving, 1, 0.0))
        if plan.step_leaves([s.states["v"].values for s in states], None) is None:
            raise RuntimeError("the core refused the look-ahead; please report this")

    return Exchange(assembly, "lookahead", list(rules), move)
