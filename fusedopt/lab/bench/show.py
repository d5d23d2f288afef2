"""Show results: tables on a terminal, aligned lines in a pipe."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from .contenders import LIMIT
from .result import FUSED, Row


def duration(seconds: float) -> str:
    """Format a duration in the unit that leaves the fewest digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def table(console: Console, rows: Sequence[Row]) -> None:
    """Return the table of one group: time, speed and share of the limit, and the others' times.

    Each of the others has the ratio of its time to fusedopt's.
    """
    others = list(dict.fromkeys(n for r in rows for n in r.seconds if n not in (FUSED, LIMIT)))
    limited = any(LIMIT in row.seconds for row in rows)
    head = ["", FUSED, *(["GB/s", "of limit"] if limited else []), *others]
    body = []
    for row in rows:
        cells = [row.name, duration(row.times.median(FUSED))]
        if limited:
            cells += [f"{row.gb_s(FUSED):.1f}", f"{row.share() or 0:.0%}"]
        body.append([*cells, *(_against(row, name) for name in others)])
    sizes = {row.elements for row in rows}
    size = f", {sizes.pop():,} elements" if len(sizes) == 1 else ""
    grid(console, f"{rows[0].group}{size}", head, body)


def _against(row: Row, name: str) -> str:
    if name not in row.seconds:
        return "-"
    return f"{duration(row.times.median(name))} ({row.times.ratio(name, FUSED):.2g} x)"


def grid(console: Console, title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """A titled table, whose first column is text and whose others are numbers."""
    if console.is_terminal:
        made = Table(title=title, title_justify="left")
        for k, name in enumerate(head):
            made.add_column(name, justify="right" if k else "left")
        for cells in body:
            made.add_row(*cells)
        console.print(made)
        return
    say(console, f"\n{title}")
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    for cells in (head, *body):
        line = [c.rjust(w) if k else c.ljust(w) for k, (c, w) in
                enumerate(zip(cells, widths, strict=True))]  # fmt: skip
        say(console, "  ".join(line).rstrip())


def say(console: Console, text: str) -> None:
    """A line, which a pipe gets whole."""
    console.print(text, markup=False, soft_wrap=not console.is_terminal)
