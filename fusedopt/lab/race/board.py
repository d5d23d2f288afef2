"""Show a race while it runs: a live table on a terminal, plain lines in a pipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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

    def moved(self, rule: str, lane: Lane) -> None:
        """A rule has gone on."""
        row = self._rows[rule]
        row[2], row[6] = str(lane.steps), lane.failed
        if lane.steps:
            row[3], row[5] = f"{lane.training_loss:.3f}", f"{1e3 * lane.seconds / lane.steps:.2f}"
        if lane.history.held_out:
            row[4] = f"{lane.history.held_out[-1][1]:.3f}"

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
