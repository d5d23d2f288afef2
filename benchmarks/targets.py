"""Targets: what was measured against what is accepted, printed as one table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fusedopt as fo
from fusedopt.lab.bench.contenders import Contender, pytorch
from fusedopt.lab.bench.measure import Times, interleaved

Parts = Mapping[str, Callable[[int], Iterator["Row"]]]


@dataclass(frozen=True)
class Row:
    """A target: `value` shall be at least (or at most) `bound`, both in `unit`.

    value: None where it could not be measured. medians: seconds of every contender.
    """

    target: str
    value: float | None
    bound: float
    medians: dict[str, float]
    at_least: bool = True
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def cells(self) -> tuple[str, ...]:
        """As the table shows it."""
        return (
            self.target,
            f"{'>=' if self.at_least else '<='} {self.bound:g} {self.unit}",
            "-" if self.value is None else f"{self.value:.3g} {self.unit}",
            {True: "yes", False: "NO", None: "not measured: no PyTorch here"}[self.met],
            ", ".join(f"{name} {_duration(s)}" for name, s in self.medians.items()),
        )


def _duration(seconds: float) -> str:
    unit, scale = next(
        ((unit, scale) for unit, scale in (("s", 1.0), ("ms", 1e-3)) if seconds >= scale),
        ("us", 1e-6),
    )
    return f"{seconds / scale:.3g} {unit}"


def race(contenders: Iterable[Contender], rounds: int, *, asleep: bool = False) -> Times:
    """Check the first step of each, then time all of them in turn."""
    steps = {}
    for contender in contenders:
        contender.check()
        steps[contender.name] = contender.step
    return interleaved(steps, rounds, asleep=asleep)


def speedup(target: str, times: Times, rival: str, bound: float, name: str = "fusedopt") -> Row:
    """How many times as fast as the rival fusedopt is; without a value if the rival is missing."""
    value = times.ratio(rival, name) if rival in times.seconds else None
    return Row(f"{target}: times as fast as {rival}", value, bound, times.medians())


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    keys = ("processor", "machine", "threads", "isa", "parallel", "compiler", "version")
    info = fo.info()
    torch_version = getattr(pytorch(), "__version__", "not installed")
    return {
        **{key: info[key] for key in keys},
        "python": info["python"],
        "numpy": info["numpy"],
        "torch": str(torch_version),
    }


def text(rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table, aligned so that it is as good to read in a terminal."""
    rows = [HEAD, *rows]
    widths = [max(len(row[k]) for row in rows) for k in range(len(HEAD))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


HEAD = ("target", "accepted", "measured", "met", "medians")


def main(description: str, parts: Parts) -> None:
    """The command line of a table: runs all parts, or some, and prints their rows."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=15, help="samples of each contender")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), metavar="PART",
                        help=f"some of {', '.join(parts)}")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = []
    for part in options.only:
        for row in parts[part](options.rounds):
            print("  ".join(row.cells()), file=sys.stderr)
            rows.append(row)
    about = machine()
    heading = ", ".join(f"{key} {value}" for key, value in about.items())
    table = f"{heading}\n\n{text(row.cells() for row in rows)}\n"
    print(table)
    if options.markdown:
        options.markdown.write_text(table, encoding="utf-8")
    if options.json:
        results = [{**asdict(row), "met": row.met} for row in rows]
        options.json.write_text(json.dumps({"machine": about, "rows": results}, indent=2) + "\n")
