"""Two runs of `fusedopt bench` side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from rich.console import Console

from .contenders import LIMIT
from .result import FUSED, Bench, Row
from .show import duration, grid, say

LEAST = 0.03
"""A change below this share is never more than noise: code moves by as much when memory does."""


@dataclass(frozen=True)
class Change:
    """The change of a contender's time in one case, from one run to another.

    before, after: median seconds. ratio: after over before; where the limit was measured, both in
    units of their own run's limit, so that a machine with slower memory that day shows no change.
    noise: the share by which the ratio can differ from 1 without meaning anything.
    """

    case: str
    contender: str
    before: float
    after: float
    ratio: float
    noise: float

    @property
    def verdict(self) -> str:
        if abs(math.log(self.ratio)) <= math.log1p(self.noise):
            return ""
        return "slower" if self.ratio > 1 else "faster"


def changes(a: Bench, b: Bench) -> Iterator[Change]:
    """Yield the changes of all contenders that both runs have in a case, in the order of `a`."""
    others = {_key(row): row for row in b.rows}
    for row in a.rows:
        other = others.get(_key(row))
        for name in row.seconds if other else ():
            if other and name in other.seconds:
                before, after = _figures(row, name), _figures(other, name)
                yield Change(
                    f"{row.group}: {row.name}",
                    name,
                    row.times.median(name),
                    other.times.median(name),
                    median(after) / median(before),
                    max(LEAST, math.hypot(_uncertainty(before), _uncertainty(after))),
                )


def compare(first: Path, second: Path, console: Console) -> list[Change]:
    """Print what changed from the first file's run to the second's, and return it.

    Raises OSError, or ValueError for a file that `fusedopt bench` did not write, and where no case
    is in both.
    """
    a, b = Bench.read(first), Bench.read(second)
    found = list(changes(a, b))
    if not found:
        raise ValueError(f"{first}, {second}: no case is in both; give equal --rule and --size")
    for key, value in a.machine.items():
        if b.machine.get(key) != value:
            say(console, f"{key}: {value} -> {b.machine.get(key)}")
    for file, run in ((first, a), (second, b)):
        for line in run.starved:
            say(console, f"STARVED, {file}: {line}")
    grid(
        console,
        f"{first} -> {second}",
        ["", "contender", "before", "after", "ratio", "noise", ""],
        [
            [
                c.case,
                c.contender,
                duration(c.before),
                duration(c.after),
                f"{c.ratio:.3f}",
                f"{c.noise:.1%}",
                c.verdict,
            ]
            for c in found
        ],
    )
    say(console, "ratio: of the times, after over before; where there is a limit, each in units of"
                 " its own run's limit.")  # fmt: skip
    missing = {_key(row) for row in a.rows} ^ {_key(row) for row in b.rows}
    if missing:
        say(console, f"in one run only: {len(missing)} case(s)")
    slow = slower(found)
    say(console, f"{len(slow)} of fusedopt's times became longer beyond the noise.")
    return found


def slower(found: list[Change]) -> list[Change]:
    """fusedopt's own that became slower."""
    return [c for c in found if c.contender.startswith(FUSED) and c.verdict == "slower"]


def _key(row: Row) -> tuple[str, str, int]:
    return row.group, row.name, row.elements


def _figures(row: Row, name: str) -> list[float]:
    own = row.seconds[name]
    if name == LIMIT or LIMIT not in row.seconds:
        return own
    return [x / y for x, y in zip(own, row.seconds[LIMIT], strict=True)]


def _uncertainty(figures: list[float]) -> float:
    """Half the notch of a box plot, as a share of the median (McGill, Tukey, Larsen 1978): medians
    whose notches do not overlap differ with about 95 % confidence."""
    low, _, high = quantiles(figures, n=4, method="inclusive")
    return 1.57 * (high - low) / math.sqrt(len(figures)) / median(figures)
