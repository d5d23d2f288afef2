"""The learning rates of a step's parameter groups, and the factors on their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..plan.extras import Extras
from ..rules.groups import Group, at_step
from ..rules.hyperparameters import Number

StepRate = float | Mapping[str, float]
"""The learning rate of one step: for all groups, or for each label."""


class Rates:
    """The learning rate of each parameter group in the step at hand, and the rule that it is of.

    groups: with the rules as they were given; current: with the values that schedules gave the step
    that was begun last, but for learning rates. extras_given, extras: the same of what is fused
    round the rules. values, factors: float64, the groups' learning rates and the factors on their
    gradients, which a plan reads. scheduled: whether a learning rate changes from step to step.
    """

    def __init__(self, groups: list[Group]) -> None:
        self.values, self.factors = np.ones(len(groups)), np.ones(len(groups))
        self._kept: np.ndarray | None = None
        self.groups, self.current = groups, at_step(groups, 1)
        self.extras_given = self.extras = Extras()
        self.settle()

    def be_around(self, extras: Extras) -> None:
        """Take what is fused round the rules, as it was given."""
        self.extras_given, self.extras = extras, extras.at(1)

    def settle(self) -> None:
        """Take the learning rates of the rules from the next step on."""
        self.scheduled = any(callable(group.rule.lr) for group in self.groups)
        self.use(
            [
                before if callable(group.rule.lr) else group.rule.lr
                for group, before in zip(self.groups, self.values.tolist(), strict=True)
            ]
        )

    def use(self, rates: Sequence[float]) -> None:
        """Set the learning rates from the next step on, and leave the rules alone."""
        self.values[:] = rates

    def begin(self, step: int, lr: StepRate | None = None) -> None:
        """Find what the schedules give a step; lr: what the caller gives it instead."""
        if lr is not None:
            given = self._accepted(lr)
            self._kept = self.values.copy()
            self.values[:] = given
        elif self.scheduled:
            self.values[:] = [group.rule.lr_at(step) for group in self.groups]

    def end(self) -> None:
        """Forget what was one step's alone; a step that guards itself leaves the factors alone."""
        self.factors[:] = 1.0
        if self._kept is not None:
            self.values[:] = self._kept
            self._kept = None

    def _accepted(self, lr: StepRate) -> list[float]:
        labels = [group.label for group in self.groups]
        if not isinstance(lr, Mapping):
            return [Number().accept("step(lr)", lr)] * len(labels)
        if set(lr) != set(labels):
            raise ValueError(
                f"step(lr): expected a number, or a mapping with one for each of {labels}; got"
                f" {dict(lr)!r}"
            )
        return [Number().accept(f"step(lr[{label!r}])", lr[label]) for label in labels]

    def used(self) -> float | dict[str, float]:
        """Return the learning rates of the last step: one number, or one for each label."""
        return self._by_label(self.values.tolist())

    def upcoming(self, step: int) -> float | dict[str, float]:
        """Return the learning rates that a step will have."""
        if not self.scheduled:
            return self.used()
        return self._by_label([group.rule.lr_at(step) for group in self.groups])

    def _by_label(self, rates: Sequence[float]) -> float | dict[str, float]:
        if len(rates) == 1:
            return rates[0]
        return {group.label: lr for group, lr in zip(self.groups, rates, strict=True)}
