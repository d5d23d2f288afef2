"""Contexts in which the parameters are something else: looked ahead, averaged, or perturbed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..arrays.formats import compute_dtype
from ..arrays.rows import UniqueRows
from ..arrays.stored import AVERAGE, LeafState
from ..plan.spec import fresh
from ..rules.base import Rule
from ..rules.groups import at_step
from ..rules.sgd import SGD
from ..system.interrupts import Uninterrupted
from .assembly import Assembly
from .clipping import combined

UPHILL = SGD(maximize=True)
LEAST_NORM = 1e-12
"""Addend of the norm of gradients by which a perturbation is divided."""


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
    moves = _moves(assembly, "ahead", int(assembly.counters[0]) + 1)
    if not moves:
        raise ValueError("lookahead(): no leaf is updated by Nesterov(form='lookahead')")
    return _moved_by_states(assembly, "lookahead", moves)


def evaluated(assembly: Assembly, params: Any) -> Exchange | None:
    """Move parameters to where their rules want them evaluated; None where no rule has a place."""
    moves = _moves(assembly, "evaluated", max(int(assembly.counters[0]), 1))
    return _moved_by_states(assembly, "averaged", moves, params) if moves else None


def perturbed(assembly: Assembly, grads: Any, rho: float, adaptive: bool) -> Exchange:
    """Move parameters uphill: see `fusedopt.SAM`."""
    device, reader = assembly.device, assembly.reader
    fitted = {k: g for k, g in enumerate(reader.fitted(grads, "grads")) if g is not None}
    if adaptive:
        scaled = {k: _times(assembly.parameters[k], g) for k, g in fitted.items()}
        measured = list(scaled.values())
        fitted = {k: _times(assembly.parameters[k], g) for k, g in scaled.items()}
    else:
        given = reader.flatten(grads, "grads")
        measured = [device.check_summed("grads", g) for g in given if g is not None]
    sums = assembly.backend.sums_of_squares(measured)
    norm = combined(np.array(sums, np.float64).reshape(-1, 2))
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"grads: their norm is {norm}, and parameters cannot be perturbed along them; nothing"
            " has changed; with skip_nonfinite=True SAM.step skips such steps"
        )
    rules = dict.fromkeys(fitted, UPHILL)
    return _moved(assembly, "perturbed", rules, fitted.__getitem__, rho / (norm + LEAST_NORM))


def _times(p: np.ndarray, g: Any) -> np.ndarray:
    """The product of a parameter and its gradient, in the type that is computed in."""
    if isinstance(g, UniqueRows):
        raise ValueError(
            "grads: SAM(adaptive=True) takes no gradients of some rows; give whole gradients, or"
            " leave adaptive out"
        )
    dtype = compute_dtype(p.dtype)
    with np.errstate(all="ignore"):
        return np.asarray(p.astype(dtype) * g.astype(dtype))


def _moves(assembly: Assembly, where: str, step: int) -> dict[int, tuple[Rule, str]]:
    groups = at_step(assembly.groups, step)
    found = {k: getattr(groups[g].rule, where) for k, g in enumerate(assembly.group_of)}
    return {k: move for k, move in found.items() if move is not None}


def _moved_by_states(
    assembly: Assembly, name: str, moves: Mapping[int, tuple[Rule, str]], value: Any = None
) -> Exchange:
    """moves: of each leaf the rule that moves it, and the state that it takes as gradient."""
    rules = {k: rule for k, (rule, _) in moves.items()}

    def state(k: int) -> Any:
        return assembly.leaf_states[k].states[moves[k][1]].values

    return _moved(assembly, name, rules, state, value=value)


def _moved(
    assembly: Assembly,
    name: str,
    rules: Mapping[int, Rule],
    given: Callable[[int], Any],
    lr: float = 0.0,
    value: Any = None,
) -> Exchange:
    """rules: of each leaf the one that moves it. given: what it takes as gradient."""

    def move() -> None:
        callers = [assembly.leaf_states[k].caller for k in rules]
        moving = [LeafState(assembly.device.check_state("p", p), {}) for p in callers]
        spec = fresh(list(rules.values()), moving, 1, lr)
        plan = assembly.backend.plan(replace(spec, threads=assembly.options.threads))
        if plan.step_leaves([given(k) for k in rules], None) is None:
            raise RuntimeError(f"the core refused {name}(); please report this")

    return Exchange(assembly, name, list(rules), move, value)
