"""One rule's part of a race."""

from __future__ import annotations

import math
from collections import deque
from itertools import islice
from statistics import fmean

import numpy as np

from ..train import TrainOptions, gpt
from ..train.descent import descend
from ..train.history import History
from ..train.setup import Setup


class Lane:
    """A run that stops and goes on, so that all rules can run in turn.

    setup, history: the trainer's. clock: seconds of training at each of the history's held-out
    losses. failed: why the run has ended early, empty where it has not.
    """

    def __init__(self, options: TrainOptions) -> None:
        self.setup = Setup.of(options)
        self.history = History(options.tokens)
        self.clock: list[float] = []
        self.failed = ""
        self._descent = descend(self.setup, self.history)

    @property
    def steps(self) -> int:
        """The number of steps that were done."""
        return len(self.history.losses)

    @property
    def seconds(self) -> float:
        """Seconds spent on training, without evaluation."""
        return sum(self.history.seconds.values())

    @property
    def loss(self) -> float:
        """The last on held-out text; infinite where the run has failed."""
        return math.inf if self.failed else self.history.held_out[-1][1]

    @property
    def training_loss(self) -> float:
        """The mean of the last batches'; one small batch tells little."""
        return fmean(self.history.losses[-50:])

    def train(self, steps: int) -> None:
        """Take `steps` more steps; a loss that is not finite ends the run."""
        try:
            deque(islice(self._descent, steps), maxlen=0)
        except FloatingPointError:
            self.failed = f"loss not finite at step {self.steps + 1}"

    def evaluate(self) -> None:
        """Take the held-out loss, if the run has not failed."""
        if self.failed:
            return
        with self.setup.evaluated(), np.errstate(over="ignore", invalid="ignore"):
            loss = gpt.evaluate(self.setup.params, *self.setup.held_out, self.setup.config)
        if not math.isfinite(loss):
            self.failed = f"held-out loss not finite at step {self.steps}"
            return
        self.history.held_out.append((self.steps, loss))
        self.clock.append(self.seconds)
