"""Learning rates: a small search for each rule, kept in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FACTOR = 3  # between neighbouring rates
LEAST, MOST = 3, 9  # rates per rule

Tried = Mapping[float, float]
"""From each rate that was tried to the loss that it led to; infinite where that was not finite."""


def next_rate(start: float, tried: Tried) -> float | None:
    """The rate to try next: `start`, its neighbours, and on where the best is at an edge.

    None where the best lies between two others, or `MOST` have been tried.
    """
    for rate in (start, _rounded(start / FACTOR), _rounded(start * FACTOR)):
        if rate not in tried:
            return rate
    if bracketed(tried) or len(tried) >= MOST:
        return None
    rate = best(tried)
    return _rounded(rate / FACTOR if rate == min(tried) else rate * FACTOR)


def bracketed(tried: Tried) -> bool:
    """Return whether the best rate lies between two others, which are worse."""
    return min(tried) < best(tried) < max(tried)


def best(tried: Tried) -> float:
    """The rate of the lowest loss, the lower one of equals."""
    return min(tried, key=lambda rate: (tried[rate], rate))


@dataclass
class RateBook:
    """The learning rates that were tried so far, written to `file` with every entry.

    settings: all that the losses depend on but rule and rate.
    """

    file: Path
    settings: dict[str, Any]
    tried: dict[str, dict[float, float]] = field(default_factory=dict)

    @classmethod
    def open(cls, file: Path, settings: dict[str, Any]) -> RateBook:
        """The book in `file` if it has these settings, an empty one otherwise.

        Raises ValueError where the file is no such book.
        """
        book = cls(file, settings)
        if not file.exists():
            return book
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["settings"] == settings:
                book.tried = {rule: _of_rows(rows) for rule, rows in found["tried"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file}: expected learning rates as a race writes them, got something else"
                f" ({error}); move it away, or try them anew with --search"
            ) from None
        return book

    def add(self, rule: str, rate: float, loss: float) -> None:
        """Note the loss at a rate, and write the file."""
        self.tried.setdefault(rule, {})[rate] = loss
        tried = {rule: as_rows(tried) for rule, tried in self.tried.items()}
        record = {"settings": self.settings, "tried": tried}
        self.file.write_text(json.dumps(record, indent=1) + "\n", encoding="ascii")


def as_rows(tried: Tried) -> list[tuple[float, float | None]]:
    """(rate, loss) by rising rate, as JSON has them: None for a loss that was not finite."""
    return [(r, loss if math.isfinite(loss) else None) for r, loss in sorted(tried.items())]


def _of_rows(rows: list[tuple[float, float | None]]) -> dict[float, float]:
    return {float(rate): math.inf if loss is None else float(loss) for rate, loss in rows}


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")
