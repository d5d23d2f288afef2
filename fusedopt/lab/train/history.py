"""The history of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class History:
    """The history of a run. tokens: those of one update; the rest as in `Result`."""

    tokens: int
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    averaged: list[tuple[int, float]] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    win_rates: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"model": 0.0, "hessian": 0.0, "optimizer": 0.0, "evaluation": 0.0}
    )

    @property
    def tokens_per_second(self) -> float:
        return self.tokens * len(self.losses) / self._stepping if self.losses else 0.0

    @property
    def optimizer_share(self) -> float:
        return self.seconds["optimizer"] / self._stepping if self.losses else 0.0

    @property
    def summary(self) -> str:
        """Loss, speed and the optimizer's share of the time; needs a finished step."""
        recent = np.mean(self.losses[-50:])  # one small batch tells little
        speed, share = self.tokens_per_second, self.optimizer_share
        line = f"training {recent:.3f}, {speed:,.0f} tokens/s, optimizer {share:.1%}"
        return line + (f", win rate {self.win_rates[-1]:.2f}" if self.win_rates else "")

    @property
    def _stepping(self) -> float:
        return sum(self.seconds.values()) - self.seconds["evaluation"]
