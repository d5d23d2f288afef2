"""Operations around a rule while a tile is in the cache: clip, average, count."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import numpy as np

from ..arrays.stored import AVERAGE, SLOW
from ..programs.arithmetic import Array, Pooling, alone
from ..programs.program import Operation, Program
from ..rules.base import Rule
from ..rules.hyperparameters import Schedule
from .slow_weights import Lookahead


class Extras(NamedTuple):
    """clip_value: every element of the gradient is kept within +- this. ema: how much of the
    average of a parameter a step keeps. slow: the share of the way to the parameter that its slow
    weights take, where it then returns to; 0 where a step leaves them alone, None where there are
    none. stats: sum up what `StepInfo.stats` tells; norms: with the gradient's norm, which no other
    pass finds."""

    clip_value: float | None = None
    ema: float | Schedule | None = None
    slow: float | Lookahead | None = None
    stats: bool = False
    norms: bool = False

    @property
    def scheduled(self) -> bool:
        """Whether steps differ in what is done."""
        return callable(self.ema) or isinstance(self.slow, Lookahead)

    def at(self, step: int) -> Extras:
        """Return what is done in a step."""
        if not self.scheduled:
            return self
        ema, slow = self.ema, self.slow
        if callable(ema):
            ema = check_ema(f"ema at step {step}", ema(step))
        if isinstance(slow, Lookahead):
            slow = slow.share(step)
        return self._replace(ema=ema, slow=slow)

    def states(self, rule: Rule) -> tuple[str, ...]:
        """The rule's states and those that are added."""
        kept = [SLOW] * (self.slow is not None) + [AVERAGE] * (self.ema is not None)
        return (*rule.states, *kept)

    @property
    def _kept(self) -> float:
        """The share of an average that a step keeps; where it has a schedule, in the first step."""
        kept = self.at(1).ema
        assert isinstance(kept, float)
        return kept

    def _limit(self, t: int, lr: float) -> tuple[float, ...]:
        assert self.clip_value is not None
        return (self.clip_value,)

    def _gain(self, t: int, lr: float) -> tuple[float, ...]:
        return (1.0 - self._kept,)

    def _share(self, t: int, lr: float) -> tuple[float, ...]:
        assert isinstance(self.slow, float)  # that of a step: see `at`
        return (self.slow,)

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
            temporaries.append("clipped")
            for phase in sorted({op.phase for op in own if "g" in op.operands}):
                before.append(
                    Operation("clip_value", ("clipped", "g"), self._limit, "filter", phase)
                )
            own = tuple(
                op._replace(operands=tuple("clipped" if o == "g" else o for o in op.operands))
                for op in own
            )
        if self.slow:
            after += [
                Operation("lerp", (SLOW, "p"), self._share, "other", last),
                Operation("keep", ("p", SLOW), _nothing, "other", last),
            ]
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
            after.append(Operation("lerp", (AVERAGE, "p"), self._gain, "other", last))
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
        names, n = self.states(rule), len(rule.states)
        beside = dict(zip(names[n:], states[n:], strict=False))
        held = (*states[:n], *states[len(names) :])
        if pool is alone:
            new, own = rule.reference(p, g, held, t=t, lr=lr)
        else:
            new, own = rule.reference_over(p, g, held, t=t, lr=lr, pool=pool)
        if hessian is not None:
            own = rule.absorb(own, hessian)
        if self.slow:
            new = beside[SLOW] = beside[SLOW] + self.slow * (new - beside[SLOW])
        if self.ema is not None:  # a form that keeps a constant
            beside[AVERAGE] = beside[AVERAGE] + (1.0 - self._kept) * (new - beside[AVERAGE])
        return new, (*own[:n], *beside.values(), *own[n:])


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
EVERYTHING = Extras(clip_value=1.0, ema=0.5, slow=0.5, stats=True, norms=True)
"""For whoever checks that all of it is there."""
