"""The pictures of a race."""

from __future__ import annotations

from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ..plotting import BLACK, BLUE, SMALL, TITLE, VERMILION, figure, tidy
from .result import Outcome, Race

PALE = "#c8c8c8"
ROW = 1.3  # inches of each row of curves

Over = Literal["step", "second"]


def curves(race: Race, over: Over) -> Figure:
    """The held-out loss of each rule on axes of its own, in front of all others'."""
    rows = (len(race.outcomes) + 1) // 2
    made = figure(1.0 + ROW * rows)
    heading(made, f"Loss on held-out text, by {over}{' of training' * (over == 'second')}")
    grid = made.subplots(rows, 2, sharex=True, sharey=True, squeeze=False)
    for axes, outcome in zip(grid.flat, race.outcomes, strict=False):
        for other in race.outcomes:
            _curve(axes, other, over, PALE, 1.0)
        axes.axhline(race.bigram_loss, color=BLACK, linestyle=":", linewidth=1.2)
        colour = VERMILION if outcome.failed else BLUE
        _band(axes, outcome, over, colour)
        _curve(axes, outcome, over, colour, 2.4)
        end = "failed" if outcome.failed else f"{outcome.loss:.2f}"
        axes.set_title(f"{outcome.name} {end}", fontsize=SMALL, loc="left", pad=3)
        tidy(axes)
    if len(race.outcomes) % 2:
        grid[-1, 1].set_axis_off()
        for axes in grid[:-1, 1][-1:]:  # stands over the gap, and takes its numbers
            axes.tick_params(labelbottom=True)
    grid[0, 0].set_ylim(top=_top(race))
    labels = f"{over}s; dotted: the bigram model; grey: the others"
    if race.options.seeds > 1:
        labels += "\nband: from the lowest to the highest seed"
    made.supxlabel(labels, fontsize=SMALL)
    made.supylabel("nats per character", fontsize=SMALL)
    return made


def step_times(race: Race) -> Figure:
    """The time of one optimizer step, fused and in plain NumPy, rule below rule."""
    made = figure(1.3 + 0.36 * len(race.outcomes))
    heading(made, "One optimizer step: fused, and in plain NumPy")
    axes = made.add_subplot()
    rows = np.arange(len(race.outcomes))[::-1]
    fused, naive = (
        np.array([1e3 * getattr(outcome.step_times, name) for outcome in race.outcomes])
        for name in ("fused_s", "naive_s")
    )
    axes.hlines(rows, fused, naive, color=PALE, linewidth=3)
    axes.plot(fused, rows, "o", color=BLUE, markersize=9, label="fused")
    axes.plot(naive, rows, "s", color=VERMILION, markersize=8, label="plain NumPy")
    for row, left, right in zip(rows, fused, naive, strict=True):
        times = f"{right / left:.1f} times"
        axes.annotate(
            times,
            (max(left, right), row),
            (9, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
        )
    axes.set_xscale("log")
    low, high = 0.7 * min(fused.min(), naive.min()), 4 * max(fused.max(), naive.max())
    axes.set_xlim(low, high)
    # Three numbers for each decade have room in two decades.
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_yticks(rows, [outcome.name for outcome in race.outcomes])
    axes.set_xlabel("milliseconds")
    axes.legend(
        fontsize=SMALL, frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(-0.02, 0.99)
    )
    tidy(axes)
    return made


def heading(made: Figure, title: str) -> None:
    """The heading above the picture."""
    made.suptitle(title, fontsize=TITLE, fontweight="bold", x=0.02, ha="left")


def _top(race: Race) -> float:
    """Above all but the losses at the start, which would press the curves together."""
    later = [loss for outcome in race.outcomes for _, _, loss in outcome.held_out[1:]]
    return 1.03 * min(max([race.bigram_loss, *later]), race.outcomes[0].held_out[0][2])


def _band(axes: Axes, outcome: Outcome, over: Over, colour: str) -> None:
    """From the lowest to the highest run's loss."""
    steps, seconds, _ = zip(*outcome.held_out, strict=True)
    losses = np.array([[loss for _, _, loss in run[: len(steps)]] for run in outcome.runs])
    at = steps if over == "step" else seconds
    axes.fill_between(at, losses.min(0), losses.max(0), color=colour, alpha=0.3, linewidth=0)


def _curve(axes: Axes, outcome: Outcome, over: Over, colour: str, width: float) -> None:
    steps, seconds, losses = zip(*outcome.held_out, strict=True)
    axes.plot(steps if over == "step" else seconds, losses, color=colour, linewidth=width)
