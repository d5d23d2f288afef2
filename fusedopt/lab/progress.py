"""The progress bar of long commands."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn


def progress(console: Console, *more: ProgressColumn) -> Progress:
    """Show how much is done of how much, and `more` behind it; nothing where no terminal is."""
    return Progress(
        BarColumn(10),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        *more,
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
