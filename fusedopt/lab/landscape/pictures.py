"""Pictures of scenes: one PNG of the whole paths, and one GIF of them growing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as File
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ..plotting import SMALL, TITLE, few_colours, figure, save
from .panels import Trace
from .paths import Path
from .scenes import Scene

GIF_DPI = 128
FRAMES, FRAME, HELD = 60, 70, 2500  # how many; milliseconds of each, and of the last
LINE_HEIGHT = 0.25  # inches


def draw(scene: Scene, paths: Sequence[Path]) -> tuple[Figure, list[Trace]]:
    """The finished picture, and what moves in it."""
    lines = 1 + scene.title.count("\n") + len(scene.footer.splitlines())
    made = figure(LINE_HEIGHT * lines + sum(scene.heights))
    made.suptitle(scene.title, fontsize=TITLE, fontweight="bold", x=0.02, ha="left")
    made.supxlabel(scene.footer, fontsize=SMALL, x=0.02, ha="left")
    rows = made.add_gridspec(len(scene.panels), 1, height_ratios=scene.heights)
    traces = []
    for k, panels in enumerate(scene.panels):
        cells = rows[k].subgridspec(1, len(panels))
        for j, panel in enumerate(panels):
            traces += panel.draw(made.add_subplot(cells[j]), scene.objective, paths)
    return made, traces


def write_png(scene: Scene, paths: Sequence[Path], file: File) -> None:
    """The whole paths, 800 pixels across."""
    made, _ = draw(scene, paths)
    save(made, file)


def write_gif(scene: Scene, paths: Sequence[Path], file: File) -> None:
    """The paths growing, 640 pixels across, for ever from the start again."""
    made, traces = draw(scene, paths)
    made.set_dpi(GIF_DPI)
    for trace in traces:
        trace.line.set_animated(True)  # left out of the first drawing, which all frames share
    canvas: Any = made.canvas  # of Agg; matplotlib has no types for it
    canvas.draw()
    still = canvas.copy_from_bbox(made.bbox)
    frames = []
    for step in np.linspace(0, scene.steps, FRAMES):
        canvas.restore_region(still)
        for trace in traces:
            trace.show(step)
            made.draw_artist(trace.line)
        frames.append(Image.fromarray(np.array(canvas.buffer_rgba())).convert("RGB"))
    # One palette for all: what does not move stays the same bytes, and takes none after the first.
    palette = few_colours(frames[-1])
    first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    durations = [FRAME] * (FRAMES - 1) + [HELD]
    first.save(file, save_all=True, append_images=rest, duration=durations, loop=0)
