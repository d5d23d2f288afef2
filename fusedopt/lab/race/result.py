"""The results of a race, as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any, cast

import fusedopt as fo

from ..train import gpt, steptime
from ..train.report import Status
from ..train.setup import Setup
from .lanes import Lane
from .options import RaceOptions
from .rates import as_rows


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one rule in a race.

    lr: peak learning rate. rules: path pattern -> rule in words. steps: how many were done with
    each seed. runs: of each seed (step, seconds of training, loss in nats per character), step 0
    before the first update. failed: why one ended early, or empty. seconds: where the time of all
    went. step_times: of one optimizer step, fused and naive. state_bytes: of the optimizer's
    states.
    """

    rule: str
    lr: float
    rules: dict[str, str]
    steps: int
    runs: list[list[tuple[int, float, float]]]
    failed: str
    seconds: dict[str, float]
    step_times: steptime.StepTimes
    state_bytes: int

    @classmethod
    def of(cls, lanes: Sequence[Lane]) -> Outcome:
        """Return the outcome of a rule's runs, with the time of one step on fresh parameters."""
        options = lanes[0].setup.options
        fresh = Setup.of(options)
        x, y = (part[: options.batch] for part in fresh.held_out)
        _, grads = gpt.loss_and_grads(fresh.params, x, y, fresh.config)
        return cls(
            rule=options.rule,
            lr=cast(float, options.lr),
            rules={pattern: repr(rule) for pattern, rule in fresh.rules.items()},
            steps=min(lane.steps for lane in lanes),
            runs=[
                [
                    (step, seconds, loss)
                    for (step, loss), seconds in zip(lane.history.held_out, lane.clock, strict=True)
                ]
                for lane in lanes
            ],
            failed=next((lane.failed for lane in lanes if lane.failed), ""),
            seconds={
                what: sum(lane.history.seconds[what] for lane in lanes)
                for what in lanes[0].history.seconds
            },
            step_times=steptime.compare(
                fresh.params, grads, fresh.rules, backend=options.backend, threads=options.threads
            ),
            state_bytes=fo.estimate(fresh.params, fresh.rules).states,
        )

    @property
    def name(self) -> str:
        """Name as papers write it."""
        return fo.RULES[self.rule].__name__

    @property
    def held_out(self) -> list[tuple[int, float, float]]:
        """The means over the runs, as far as all have come."""
        return [
            (at[0][0], fmean(seconds for _, seconds, _ in at), fmean(loss for _, _, loss in at))
            for at in zip(*self.runs, strict=False)
        ]

    @property
    def loss(self) -> float:
        """The last on held-out text, the mean over the runs; infinite where one has failed."""
        return math.inf if self.failed else self.held_out[-1][2]

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and the highest of the runs' losses where `loss` is taken."""
        last = [run[len(self.held_out) - 1][2] for run in self.runs]
        return min(last), max(last)

    def seconds_to(self, target: float) -> float | None:
        """Return the seconds of training until the held-out loss is `target`, by interpolation.

        None where it was not reached.
        """
        for (_, before, higher), (_, after, lower) in pairwise(self.held_out):
            if lower <= target < higher:
                return before + (after - before) * (higher - target) / (higher - lower)
        return None


@dataclass(frozen=True, kw_only=True)
class Race:
    """A race and how it went.

    status: "interrupted" after Ctrl-C. source: where the text is from; characters: its length.
    parameters: how many numbers each rule trained. bigram_loss: of the baseline, on the same
    held-out characters. target: the held-out loss whose time is taken. tried: rule -> learning
    rate -> held-out loss after `options.search_steps`. outcomes: of the rules that set out, in the
    options' order. machine: `fo.info()`.
    """

    status: Status
    options: RaceOptions
    source: str
    characters: int
    parameters: int
    bigram_loss: float
    target: float
    tried: dict[str, dict[float, float]]
    outcomes: list[Outcome]
    machine: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """Return the result as values for JSON; losses that are not finite are None."""
        outcomes = [
            {
                **asdict(outcome),
                "held_out": outcome.held_out,
                "loss": None if outcome.failed else outcome.loss,
                "seconds_to_target": outcome.seconds_to(self.target),
            }
            for outcome in self.outcomes
        ]
        tried = {rule: as_rows(tried) for rule, tried in self.tried.items()}
        return {**asdict(self), "tried": tried, "outcomes": outcomes}
