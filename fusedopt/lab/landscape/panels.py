"""The parts of a picture: each draws itself on axes, and returns what an animation moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D

from ..plotting import BLACK, GREEN, GREY, SMALL, TEXT, tidy
from .objectives import Array, Objective
from .paths import Path

Extent = tuple[float, float, float, float]

GROUND = LinearSegmentedColormap.from_list("ground", ["#ffffff", "#d3dce5"])
CONTOUR = "#aab7c4"
GRID = 300  # points along each side of a map
LEVELS = 11


@dataclass(frozen=True)
class Trace:
    """A line, or the dot at its end, that follows the steps.

    points: (N, 2), of which each is reached at its number in `steps`, (N,).
    """

    line: Line2D
    steps: Array
    points: Array
    dot: bool = False

    def show(self, step: float) -> None:
        """Draw what has been reached by `step`."""
        reached = int(np.searchsorted(self.steps, step, side="right"))
        first = max(reached - 1, 0) if self.dot else 0
        self.line.set_data(*self.points[first:reached].T)


class Panel(Protocol):
    """A part of a picture, drawn from the paths of the scene's runs."""

    def draw(self, axes: Axes, objective: Objective, paths: Sequence[Path]) -> list[Trace]: ...


@dataclass(frozen=True, kw_only=True)
class Ground:
    """A map of an objective, to scale.

    extent: left, right, bottom and top. levels: the lowest and the highest contour; those between
    differ by equal factors. objective: what is drawn where it is not the scene's own.
    """

    extent: Extent
    levels: tuple[float, float]
    objective: Objective | None = None

    def draw(self, axes: Axes, objective: Objective) -> None:
        left, right, bottom, top = self.extent
        x, y = np.linspace(left, right, GRID), np.linspace(bottom, top, GRID)
        heights = (self.objective or objective).value(np.stack(np.meshgrid(x, y), axis=-1))
        levels = np.geomspace(*self.levels, LEVELS)
        axes.contourf(x, y, np.log(heights + 1e-300), np.log(levels), cmap=GROUND, extend="both")
        axes.contour(x, y, heights, levels, colors=CONTOUR, linewidths=0.7)
        axes.plot(*objective.minimum, marker="*", color=BLACK, markersize=11, zorder=2.5)
        axes.set_aspect("equal")
        axes.set_xlim(left, right)
        axes.set_ylim(bottom, top)
        axes.tick_params(labelsize=SMALL)


@dataclass(frozen=True, kw_only=True)
class Map:
    """Paths over the ground.

    only: the label of the one path to draw; all of them, with a legend, without. axes: names of
    the two weights. bare: no numbers along the edges; the loss at the path's end stands above.
    """

    ground: Ground
    only: str | None = None
    axes: tuple[str, str] = ("", "")
    bare: bool = False

    def draw(self, axes: Axes, objective: Objective, paths: Sequence[Path]) -> list[Trace]:
        self.ground.draw(axes, objective)
        shown = [path for path in paths if self.only in (None, path.run.label)]
        traces = [trace for path in shown for trace in self._path(axes, path)]
        if self.only is None:
            axes.legend(
                loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=len(shown), fontsize=SMALL,
                frameon=False, handlelength=1.2, columnspacing=1.0, borderpad=0.2,
            )  # fmt: skip
        else:
            (path,) = shown
            title = f"{self.only} {path.losses[-1]:.1g}" if self.bare else self.only
            axes.set_title(title, fontsize=SMALL, color=path.run.colour, loc="left", pad=4)
        if self.bare:
            axes.set_xticks([])
            axes.set_yticks([])
        axes.set_xlabel(self.axes[0], fontsize=TEXT)
        axes.set_ylabel(self.axes[1], fontsize=TEXT)
        return traces

    @staticmethod
    def _path(axes: Axes, path: Path) -> list[Trace]:
        run = path.run
        (line,) = axes.plot(*path.points.T, color=run.colour, linewidth=run.width, label=run.label)
        (start,) = axes.plot(
            *path.points[0], marker="o", color=BLACK, markerfacecolor="white", markersize=6
        )
        (end,) = axes.plot(
            *path.points[-1], marker="o", color=run.colour, markersize=8, markeredgecolor="white"
        )
        steps = np.arange(len(path.points), dtype=np.float64)
        return [
            Trace(line, steps, path.points),
            Trace(start, steps[:1], path.points[:1]),
            Trace(end, steps, path.points, dot=True),
        ]


@dataclass(frozen=True, kw_only=True)
class OneStep:
    """One step of a path, enlarged: the jump that the velocity makes, and the gradient's part.

    only: the label of the path. step: which, 1 for the first. title: stands above.
    """

    ground: Ground
    only: str
    step: int
    title: str

    def draw(self, axes: Axes, objective: Objective, paths: Sequence[Path]) -> list[Trace]:
        self.ground.draw(axes, objective)
        (path,) = (path for path in paths if path.run.label == self.only)
        before, after = path.points[self.step - 1 : self.step + 1]
        pull = -cast(float, path.run.rule.lr) * path.gradients[self.step - 1]
        probe, landing = path.probes[self.step - 1], after - pull
        _arrow(axes, before, landing, BLACK, "velocity")
        _arrow(axes, landing, after, GREEN, "gradient")
        if not np.allclose(probe, landing):  # where it was taken, it is drawn faintly
            _arrow(axes, probe, probe + pull, GREEN, alpha=0.4)
        axes.plot(*before, marker="o", color=BLACK, markerfacecolor="white", markersize=6)
        axes.plot(*probe, marker="o", color=GREEN, markersize=8, markeredgecolor=BLACK, zorder=4)
        axes.set_title(self.title, fontsize=SMALL, color=path.run.colour, loc="left", pad=4)
        axes.set_xticks([])
        axes.set_yticks([])
        return []


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A number of each path over the steps.

    of: from objective and path to the values: one of each step, with or without the start. log:
    which axes are logarithmic. last: the last step that is shown. guide: the label of a dashed
    line, and its values from the steps.
    """

    of: Callable[[Objective, Path], Array]
    ylabel: str
    log: Literal["", "y", "xy"] = ""
    last: int | None = None
    guide: tuple[str, Callable[[Array], Array]] | None = None

    def draw(self, axes: Axes, objective: Objective, paths: Sequence[Path]) -> list[Trace]:
        traces = []
        for path in paths:
            values = self.of(objective, path)
            steps = np.arange(len(path.points) - len(values), len(path.points), dtype=np.float64)
            points = np.stack([steps, values], axis=1)[: self.last]
            (line,) = axes.plot(*points.T, color=path.run.colour, linewidth=path.run.width)
            traces.append(Trace(line, points[:, 0], points))
        if self.guide:
            label, values_at = self.guide
            steps = traces[0].steps
            axes.plot(steps, values_at(steps), "--", color=GREY, linewidth=1.5, label=label)
            axes.legend(fontsize=SMALL, frameon=False)
        if "y" in self.log:
            axes.set_yscale("log")
        if "x" in self.log:
            axes.set_xscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel(self.ylabel)
        tidy(axes)
        return traces


def _arrow(
    axes: Axes, tail: Array, tip: Array, colour: str, label: str = "", *, alpha: float = 1.0
) -> None:
    style = {"arrowstyle": "-|>", "linewidth": 2.2, "mutation_scale": 16, "color": colour}
    ends = {"shrinkA": 0, "shrinkB": 0, "alpha": alpha}
    axes.annotate("", tuple(tip), tuple(tail), arrowprops={**style, **ends}, zorder=3)
    middle, right = tuple((tail + tip) / 2), (8, 0)
    axes.annotate(
        label, middle, right, textcoords="offset points", color=colour, fontsize=SMALL, va="center"
    )
