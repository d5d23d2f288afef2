"""Checks of drawn figures."""

from __future__ import annotations

from itertools import combinations

from matplotlib.figure import Figure
from matplotlib.text import Text


def check_texts(made: Figure) -> int:
    """No text of a figure is cut off or covers another; returns how many there are."""
    made.draw_without_rendering()
    hidden = {  # ticks outside of the view are not drawn
        label
        for axes in made.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for label in (tick.label1, tick.label2)
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    texts = [text for text in made.findobj(Text) if text.get_visible() and text not in hidden]
    boxes = [
        (text.get_text(), text.get_window_extent()) for text in texts if text.get_text().strip()
    ]
    for name, box in boxes:
        assert min(box.x0, box.y0) >= 0, name
        assert box.x1 <= made.bbox.x1, name
        assert box.y1 <= made.bbox.y1, name
    for (first, a), (second, b) in combinations(boxes, 2):
        assert not a.overlaps(b), f"{first} and {second}"
    return len(boxes)
