"""The results of a benchmark, as numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal, Self

from .contenders import LIMIT
from .measure import Times
from .memory import HOW

FUSED = "fusedopt"


@dataclass(frozen=True)
class Row:
    """One case and who was timed in it, in turn and on the same arrays.

    group: what the case is an example of. elements: of all parameters. bytes: that a step must read
    and write. seconds: of each contender one figure for each round.
    """

    group: str
    name: str
    elements: int
    bytes: int
    seconds: Mapping[str, list[float]]

    @cached_property
    def times(self) -> Times:
        return Times(self.seconds)

    def gb_s(self, contender: str) -> float:
        """The bytes that the step must move over the contender's time, in 1e9 bytes a second."""
        return self.bytes / self.times.median(contender) / 1e9

    def share(self, contender: str = FUSED) -> float | None:
        """The contender's speed as a share of the limit's; None where that was not measured."""
        return self.times.ratio(LIMIT, contender) if LIMIT in self.seconds else None

    def record(self) -> dict[str, Any]:
        """Return the result as values for JSON, with the figures that follow from it."""
        contenders = {
            name: {
                "median_s": self.times.median(name),
                "gb_s": self.gb_s(name),
                "share_of_limit": self.share(name),
                "seconds": seconds,
            }
            for name, seconds in self.seconds.items()
        }
        return {
            "group": self.group,
            "name": self.name,
            "elements": self.elements,
            "bytes": self.bytes,
            "contenders": contenders,
        }

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """Return the result of what `record` gave."""
        seconds = {name: one["seconds"] for name, one in record["contenders"].items()}
        own = {key: record[key] for key in ("group", "name", "elements", "bytes")}
        return cls(**own, seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A benchmark and how it went.

    status: "interrupted" after Ctrl-C; the rows are those that were finished then. machine:
    `fo.info()`. starved: what makes the figures worse than the machine, in words.
    """

    status: Literal["finished", "interrupted"]
    rows: list[Row]
    machine: dict[str, Any]
    starved: list[str]

    @property
    def limit_gb_s(self) -> float | None:
        """The median of the rows' limits, in 1e9 bytes a second; None without any."""
        limits = [row.gb_s(LIMIT) for row in self.rows if LIMIT in row.seconds]
        return median(limits) if limits else None

    def record(self) -> dict[str, Any]:
        """Return the result as values for JSON."""
        return {
            **asdict(self),
            "limit": {"gb_s": self.limit_gb_s, "how": HOW},
            "rows": [row.record() for row in self.rows],
        }

    @classmethod
    def read(cls, file: Path) -> Self:
        """Return the result of a file of `record`; raise OSError or ValueError if it is none."""
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            own = {key: record[key] for key in ("status", "machine", "starved")}
            return cls(**own, rows=[Row.of(row) for row in record["rows"]])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file}: expected what `fusedopt bench --json` writes, got something else"
                f" ({type(error).__name__}: {error})"
            ) from None
