"""The learning rates of a step's parameter groups, and the factors on their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..rules.groups import Group


class Rates:
    """The learning rate of each parameter group in the step at hand.

    values, factors: float64, the groups' learning rates and the factors on their gradients, which a
    plan reads. scheduled: whether a learning rate changes from step to step. only: the learning
    rate, where there is one group without a schedule; 0, which is as good as none, otherwise.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.values, self.factors = np.ones(len(groups)), np.ones(len(groups))
        self.settle(groups)

    def settle(self, groups: Sequence[Group]) -> None:
        """Take the learning rates of other rules from the next step on."""
        self._groups = groups
        self.scheduled = any(callable(group.rule.lr) for group in groups)
        self.only = 0.0
        if not self.scheduled:
            self.use([group.rule.lr_at(1) for group in groups])

    def use(self, rates: Sequence[float]) -> None:
        """Set the learning rates from the next step on, and leave the rules alone."""
        self.values[:] = rates
        self.only = float(rates[0]) if len(rates) == 1 else 0.0

    def begin(self, step: int) -> None:
        """Find what the schedules give a step."""
        if self.scheduled:
            self.values[:] = [group.rule.lr_at(step) for group in self._groups]

    def end(self) -> None:
        """Forget a step's factors: a step that guards itself leaves them alone."""
        self.factors[:] = 1.0

    def used(self) -> float | dict[str, float]:
        """Return the learning rates of the last step: one number, or one for each label."""
        return self.only or self._by_label(self.values.tolist())

    def upcoming(self, step: int) -> float | dict[str, float]:
        """Return the learning rates that a step will have."""
        if not self.scheduled:
            return self.used()
        return self._by_label([group.rule.lr_at(step) for group in self._groups])

    def _by_label(self, rates: Sequence[float]) -> float | dict[str, float]:
        if len(rates) == 1:
            return rates[0]
        return {group.label: lr for group, lr in zip(self._groups, rates, strict=True)}
