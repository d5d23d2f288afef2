"""The roofline: how near each step comes to what memory allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

import fusedopt as fo

from ..plotting import BLACK, BLUE, GREEN, PURPLE, SMALL, TEXT, TITLE, VERMILION, figure, save, tidy
from .contenders import LIMIT
from .result import FUSED, Row

MARKS = {
    FUSED: ("o", BLUE, 10),
    "NumPy": ("s", VERMILION, 8),
    "torch fused": ("D", GREEN, 8),
    "torch foreach": ("^", PURPLE, 9),
}
BEYOND = "#e4e4e4"
ROW = 0.4  # inches


def write(
    large: Sequence[Row], formats: Sequence[Row], machine: dict[str, Any], file: Path
) -> None:
    """Draw the rows that have a limit, at least one large, as a PNG."""
    panels = [
        (large, f"{large[0].elements:,} float32 parameters", _rule_name),
        (formats, "AdamW by storage format", _way_name),
    ]
    panels = [panel for panel in panels if panel[0]]
    heights = [len(rows) for rows, *_ in panels]
    made = figure(1.9 + 0.7 * len(panels) + ROW * sum(heights))
    made.suptitle(
        "Optimizer steps and the memory limit", fontsize=TITLE, fontweight="bold", x=0.02, ha="left"
    )
    top = 1.1 * max(row.gb_s(name) for row in (*large, *formats) for name in row.seconds)
    grid = made.subplots(len(panels), 1, squeeze=False, height_ratios=heights, sharex=True)
    for axes, (rows, title, name) in zip(grid.flat, panels, strict=True):
        _panel(axes, rows, [name(row) for row in rows], top)
        axes.set_title(title, fontsize=TEXT, loc="left")
        axes.tick_params(labelbottom=True)
    threads = machine["threads"]
    grid[-1, 0].set_xlabel(
        "GB/s; at the right, fusedopt's share of the limit\n"
        f"{machine['processor']}, {threads} thread{'s' * (threads > 1)}",
        fontsize=SMALL,
    )
    handles, labels = grid[0, 0].get_legend_handles_labels()
    made.legend(handles, labels, fontsize=SMALL, frameon=False, ncols=2, loc="outside lower left")
    save(made, file)


def _rule_name(row: Row) -> str:
    return fo.RULES[row.name].__name__


def _way_name(row: Row) -> str:
    return row.name.replace(", ", ",\n")


def _panel(axes: Axes, rows: Sequence[Row], names: Sequence[str], top: float) -> None:
    places = np.arange(len(rows))[::-1]
    limits = np.array([row.gb_s(LIMIT) for row in rows])
    axes.barh(places, top - limits, left=limits, height=1.0, color=BEYOND)
    axes.vlines(limits, places - 0.5, places + 0.5, color=BLACK, linewidth=2, label="memory limit")
    for depth, (name, (mark, colour, size)) in enumerate(MARKS.items()):
        points = [
            (row.gb_s(name), k) for row, k in zip(rows, places, strict=True) if name in row.seconds
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                mark,
                color=colour,
                markersize=size,
                label=name,
                zorder=9 - depth,
            )
    for row, k in zip(rows, places, strict=True):
        axes.annotate(
            f"{row.share():.0%}",
            (1.0, k),
            (6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            annotation_clip=False,
        )
    axes.set_xlim(0, top)
    axes.set_ylim(-0.5, len(rows) - 0.5)
    axes.set_yticks(places, names)
    tidy(axes)
    axes.grid(visible=False, axis="y")
