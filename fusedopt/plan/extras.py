"""Operations around a rule while a tile is in the cache: clip, average, count."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import numpy as np

from ..arrays.stored import AVERAGE
from ..programs.arithmetic import Array, Pooling, alone
from ..programs.program import Operation, Program
from ..rules.base import Rule
from ..rules.hyperparameters import Schedule


class Extras(NamedTuple):
    """clip_value: every element of the gradient is kept within +- this. ema: how much of the
    average of a parameter a step keeps. stats: sum up what `StepInfo.stats` tells; norms: with the
    gradient's norm, which no other pass finds."""

    clip_value: float | None = None
    ema: float | Schedule | None = None
    stats: bool = False
    norms: bool = False

    def at(self, step: int) -> Extras:
        """Return what is done in a step, where `ema` is a schedule."""
        if not callable(self.ema):
            return self
        return self._replace(ema=check_ema(f"ema at step {step}", self.ema(step)))

    def states(self, rule: Rule) -> tuple[str, ...]:
        """The rule's states and those that are added."""
        return (*rule.states, *([AVERAGE] if self.ema is not None else []))

    @property
    def _kept(self) -> float:
        """The share of an average that a step keeps; where it has a schedule, in the first step."""
        kept = self.at(1).ema
        assert isinstance(kept, float)
        return kept

    def program(self, rule: Rule) -> Program:
        """The rule's program with everything around it."""
        if self == NOTHING:
            return rule.program
        own = rule.operations()
        last = max(op.phase for op in own)  # in which the parameter is written
        before: list[Operation] = []
        after: list[Operation] = []
        temporaries: list[str] = []
        if self.clip_value is not None:
            limit = (self.clip_value,)
            temporaries.append("clipped")
            for phase in sorted({op.phase for op in own if "g" in op.operands}):
                before.append(
                    Operation("clip_value", ("clipped", "g"), lambda t, lr: limit, "filter", phase)
                )
            own = tuple(
                op._replace(operands=tuple("clipped" if o == "g" else o for o in op.operands))
                for op in own
            )
        if self.stats:
            temporaries.append("before")
            before.append(Operation("keep", ("before", "p"), _nothing, "other", last))
            after += [
                Operation("squared_differences", ("update", "p", "before"), _nothing, "sum", last),
                Operation("squares", ("weight", "before"), _one, "sum", last),
                *rule.sums(),
            ]
            if self.norms:
                before.append(Operation("squares", ("gradient", "g"), _one, "sum"))
        if self.ema is not None:
            gain = (1.0 - self._kept,)
            after.append(Operation("lerp", (AVERAGE, "p"), lambda t, lr: gain, "other", last))
        steps = tuple(op for op in own if op.needs is None)
        refreshes = tuple(op for op in own if op.needs is not None)
        operations = (*before, *steps, *after, *refreshes)
        return Program(rule, operations, ("p", *self.states(rule)), tuple(temporaries))

    def reference(
        self,
        rule: Rule,
        p: Array,
        g: Array,
        states: tuple[Array, ...],
        hessian: Array | None,
        *,
        t: int,
        lr: float,
        factor: float,
        pool: Pooling = alone,
    ) -> tuple[Array, tuple[Array, ...]]:
        """The textbook form: `Rule.reference` with everything around it.

        states: as `states` names them, then side states. factor: on the gradient. pool: see
        `Rule.reference_over`.
        """
        if factor != 1.0:
            g = factor * g
        if self.clip_value is not None:
            g = np.minimum(np.maximum(g, -self.clip_value), self.clip_value)
        n = len(rule.states)
        kept, own = states[n:], states[:n]
        if self.ema is not None:
            kept = kept[1:]
        states_before = (*own, *kept)
        if pool is alone:
            new, own = rule.reference(p, g, states_before, t=t, lr=lr)
        else:
            new, own = rule.reference_over(p, g, states_before, t=t, lr=lr, pool=pool)
        if hessian is not None:
            own = rule.absorb(own, hessian)
        if self.ema is None:
            return new, own
        average = states[n] + (1.0 - self._kept) * (new - states[n])  # which keeps a constant
        return new, (*own[:n], average, *own[n:])


def check_ema(where: str, value: Any) -> float:
    """Return a number in [0, 1]; TypeError or ValueError otherwise."""
    kind: Any = numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{where}: expected a number, got {value!r}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{where}: expected a number in [0, 1], got {value!r}")
    return float(value)


def _nothing(t: int, lr: float) -> tuple[float, ...]:
    return ()


def _one(t: int, lr: float) -> tuple[float, ...]:
    return (1.0,)


NOTHING = Extras()
EVERYTHING = Extras(clip_value=1.0, ema=0.5, stats=True, norms=True)
"""For whoever checks that all of it is there."""
