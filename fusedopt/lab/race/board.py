"""Show a race while it runs: a live table on a terminal, plain lines in a pipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean

from rich.console import Console
from rich.live import Live
from rich.table import Table

from .lanes import Lane

COLUMNS = ("rule", "learning rate", "step", "training", "held out", "ms a step", "")


class Board:
    """The state of all rules, as rows of strings."""

    def __init__(self, console: Console, rules: tuple[str, ...]) -> None:
        self._console = console
        self._rows = {rule: [rule, *[""] * (len(COLUMNS) - 1)] for rule in rules}
        self._title = ""

    @contextmanager
    def live(self) -> Iterator[None]:
        """Keep the table on the terminal and up to date; do nothing in a pipe."""
        if not self._console.is_terminal:
            yield
            return
        with Live(get_renderable=self._table, console=self._console, refresh_per_second=4):
            yield

    def title(self, text: str) -> None:
        """The activity that the board names."""
        self._title = text

    def trying(self, rule: str, rate: float, tried: Mapping[float, float]) -> None:
        """A rule tries a rate after those in `tried`."""
        self._rows[rule][1] = f"{rate:g} ?"
        self._rows[rule][-1] = ", ".join(f"{r:g}: {loss:.3f}" for r, loss in sorted(tried.items()))

    def chosen(self, rule: str, rate: float, tried: Mapping[float, float]) -> None:
        """A rule takes a rate."""
        self.trying(rule, rate, tried)
        self._rows[rule][1] = f"{rate:g}"
        self._say(f"{rule}: learning rate {rate:g} (held-out loss by rate: {self._rows[rule][-1]})")
        self._rows[rule][-1] = ""

    def moved(self, rule: str, runs: Sequence[Lane]) -> None:
        """The runs of a rule have gone on; means over them are shown."""
        row, steps = self._rows[rule], [lane.steps for lane in runs]
        row[2], row[6] = str(min(steps)), next((lane.failed for lane in runs if lane.failed), "")
        if all(steps):
            row[3] = f"{fmean(lane.training_loss for lane in runs):.3f}"
            row[5] = f"{1e3 * fmean(lane.seconds / lane.steps for lane in runs):.2f}"
        if all(lane.history.held_out for lane in runs):
            row[4] = f"{fmean(lane.history.held_out[-1][1] for lane in runs):.3f}"

    def round_done(self, text: str) -> None:
        """Show that all rules have gone on, as far as `text` says."""
        self.title(text)
        self._say(f"{text}: {', '.join(f'{r[0]} {r[6] or r[4]}' for r in self._rows.values())}")

    def _say(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(*COLUMNS, title=self._title, title_justify="left")
        for row in self._rows.values():
            table.add_row(*row)
        return table
