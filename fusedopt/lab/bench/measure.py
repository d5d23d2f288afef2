"""Times of several contenders, taken in turn, so that whatever disturbs one disturbs all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping

from .problems import Step

PAUSE = 0.02
"""Seconds before each sample: runtimes let their threads spin for some milliseconds after a call,
and would take the processor from the next contender."""
SAMPLE = 0.05
"""Seconds that a sample of a short step takes at least, of many calls."""
WAKING = 0.02
"""Seconds of untimed calls before it: a thread that is woken may share a processor with its maker
for some milliseconds. 64 matrices of 64x64 took 3.5 ms or 7 after a single call."""
FEWEST = 3
"""Rounds, however long they take."""


class Times:
    """Seconds per call: of each contender one figure for each round."""

    def __init__(self, seconds: Mapping[str, list[float]]) -> None:
        self.seconds = seconds

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def medians(self) -> dict[str, float]:
        return {name: self.median(name) for name in self.seconds}

    def ratio(self, a: str, b: str) -> float:
        """Return the time of a over the time of b: the median of the ratios within each round."""
        pairs = zip(self.seconds[a], self.seconds[b], strict=True)
        return statistics.median(x / y for x, y in pairs)

    def difference(self, a: str, b: str) -> float:
        """Return by how many seconds a takes longer than b, as the median over the rounds."""
        pairs = zip(self.seconds[a], self.seconds[b], strict=True)
        return statistics.median(x - y for x, y in pairs)


def interleaved(
    steps: Mapping[str, Step], rounds: int, *, asleep: bool = False, within: float = math.inf
) -> Times:
    """Times every contender once in each of the rounds, and begins each round with another.

    asleep: time a single call after a pause, when all threads sleep; otherwise untimed calls wake
    the contender's own threads, and a short step is timed over many calls. within: seconds after
    which no further round begins, if there were `FEWEST`.
    """
    start = time.perf_counter()
    calls = {name: 1 if asleep else _calls(step) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for k in range(rounds):
        if k >= FEWEST and time.perf_counter() - start > within:
            break
        first = k % len(names)
        for name in names[first:] + names[:first]:
            step = steps[name]
            time.sleep(PAUSE)
            if not asleep:
                _wake(step)
            seconds[name].append(_timed(step, calls[name]) / calls[name])
    return Times(seconds)


def _calls(step: Step) -> int:
    step()
    # The first call after a pause can be much slower than the next ones.
    once = min(_timed(step, 1) for _ in range(2))
    return max(1, round(SAMPLE / once))


def _wake(step: Step) -> None:
    end = time.perf_counter() + WAKING
    step()
    while time.perf_counter() < end:
        step()


def _timed(step: Step, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return time.perf_counter() - start
