"""The style of the pictures: colours, sizes, and axes with little on them."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's colours, which are told apart with every common colour blindness; without their
# yellow, which white swallows.
BLACK, BLUE, VERMILION, GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY = "#CC79A7", "#E69F00", "#56B4E9"
GREY = "#767676"

WIDTH, DPI = 5.0, 160  # inches, of every picture; its text stays readable on a phone
TITLE, TEXT, SMALL = 13, 12, 11  # points


def figure(height: float) -> Figure:
    """An empty figure, `WIDTH` x `height` inches, on a canvas of its own.

    Not pyplot's: which backend that uses is the caller's to choose.
    """
    made = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(made)
    return made


def save(picture: Figure, file: Path | BinaryIO) -> None:
    """Write a PNG of few colours: a third of the bytes, and no difference to be seen."""
    raw = BytesIO()
    picture.savefig(raw, format="png")
    few_colours(Image.open(raw).convert("RGB")).save(file, format="PNG", optimize=True)


def few_colours(image: Image.Image) -> Image.Image:
    """The image with a palette of 96 colours.

    Those that are almost white become white: the background would not be, otherwise.
    """
    reduced = image.quantize(96, kmeans=1)
    colours = np.array(reduced.getpalette()).reshape(-1, 3)
    colours[(colours > 240).all(axis=1)] = 255
    reduced.putpalette(colours.ravel().tolist())
    return reduced


def tidy(axes: Axes) -> None:
    """Light frame and grid, readable ticks."""
    axes.tick_params(labelsize=SMALL)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.label.set_fontsize(TEXT)
    axes.yaxis.label.set_fontsize(TEXT)
