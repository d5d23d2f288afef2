"""Measures the speed targets and prints them as one table.

Run it as `python benchmarks/table.py [--rounds N] [--only PART ...] [--json F] [--markdown F]`.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import fusedopt as fo
from contenders import enter
from fusedopt.bench.contenders import Contender, fused, pytorch
from fusedopt.bench.measure import Times, interleaved
from fusedopt.bench.problems import Problem, elementwise_rules, gpt2_small, rule_of, tensors

LIMIT_SHARE = 0.92
# Over GPT-2 small, against PyTorch's fastest form; where PyTorch lacks the rule, against NumPy as
# it is usually written, a temporary for each operation ("textbook"), and with care ("NumPy").
RIVALS = {
    "adamw": {"torch fused": 1.0},
    "rmsprop": {"torch foreach": 5.0},
    "lion": {"textbook": 5.0, "NumPy": 5.0},
    "sophia": {"textbook": 5.0, "NumPy": 5.0},
}


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
    """Checks the first step of each, then times all of them in turn."""
    steps = {}
    for contender in contenders:
        contender.check()
        steps[contender.name] = contender.step
    return interleaved(steps, rounds, asleep=asleep)


def speedup(target: str, times: Times, rival: str, bound: float, name: str = "fusedopt") -> Row:
    """How many times as fast as the rival fusedopt is; without a value if the rival is missing."""
    value = times.ratio(rival, name) if rival in times.seconds else None
    return Row(f"{target}: times as fast as {rival}", value, bound, times.medians())


def gpt2(rounds: int) -> Iterator[Row]:
    """Every elementwise rule over GPT-2 small."""
    for name in elementwise_rules():
        problem = Problem(gpt2_small(), rule_of(name))
        where = f"{name}, GPT-2 small"
        rivals = RIVALS.get(name, {})
        times = race(enter(problem, "limit", "fusedopt", *rivals), rounds)
        share = times.ratio("limit", "fusedopt")
        yield Row(f"{where}: speed relative to the limit", share, LIMIT_SHARE, times.medians())
        for rival, bound in rivals.items():
            yield speedup(where, times, rival, bound)


def many_small(rounds: int) -> Iterator[Row]:
    """Many small tensors against one of as many elements."""
    many = Problem(tensors(1000, 1000), rule_of("adamw"))
    one = replace(fused(Problem(tensors(1, 1_000_000), rule_of("adamw"))), name="one tensor")
    times = race([*enter(many, "fusedopt", "torch fused"), one], rounds)
    where = "adamw, 1000 tensors of 1000"
    against_one = times.ratio("fusedopt", "one tensor")
    yield Row(f"{where}: time over one of 10^6", against_one, 1.4, times.medians(), at_least=False)
    yield speedup(where, times, "torch fused", 10.0)


def one_small(rounds: int) -> Iterator[Row]:
    """One small tensor, where calls cost more than arithmetic."""
    problem = Problem(tensors(1, 1000), rule_of("adamw"))
    times = race(enter(problem, "fusedopt.update", "fusedopt", "NumPy", "torch fused"), rounds)
    for ours, how in (("fusedopt.update", "update"), ("fusedopt", "step")):
        for rival, bound in (("NumPy", 4.0), ("torch fused", 15.0)):
            yield speedup(f"adamw, one tensor of 1000, {how}", times, rival, bound, ours)


def cached(rounds: int) -> Iterator[Row]:
    """One tensor that stays in cache."""
    for asleep in (False, True):
        problem = Problem(tensors(1, 100_000), rule_of("adamw"))
        times = race(enter(problem, "fusedopt", "torch fused"), rounds, asleep=asleep)
        where = f"adamw, one tensor of 10^5, threads {'asleep' if asleep else 'awake'}"
        yield speedup(where, times, "torch fused", 2.5)


def decayed(rounds: int) -> Iterator[Row]:
    """States that went through a million steps of zero gradients: none of them is a denormal."""
    fresh, old = (Problem(tensors(1, 1000), rule_of("adamw")) for _ in range(2))
    nothing = {name: np.zeros_like(g) for name, g in old.grads.items()}
    for _ in range(1_000_000):
        old.optimizer.step(nothing)
    steps = {
        "decayed": lambda: old.optimizer.step(nothing),
        "fresh": lambda: fresh.optimizer.step(fresh.grads),
    }
    times = interleaved(steps, rounds)
    target = "adamw, one tensor of 1000 after 10^6 zero gradients: time over a fresh one"
    ratio = times.ratio("decayed", "fresh")
    yield Row(target, ratio, 1.3, times.medians(), at_least=False)


def imports(rounds: int) -> Iterator[Row]:
    """A fresh interpreter's `import fusedopt` against `import numpy`."""

    def run(module: str) -> None:
        # Isolated, so that no folder that happens to be current is imported instead.
        subprocess.run([sys.executable, "-I", "-c", f"import {module}"], check=True)

    steps = {name: functools.partial(run, name) for name in ("numpy", "fusedopt")}
    times = interleaved(steps, rounds)
    extra = 1e3 * times.difference("fusedopt", "numpy")
    target = "import fusedopt: longer than import numpy"
    yield Row(target, extra, 40.0, times.medians(), at_least=False, unit="ms")


PARTS: dict[str, Callable[[int], Iterator[Row]]] = {
    part.__name__: part for part in (gpt2, many_small, one_small, cached, decayed, imports)
}


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the speed targets.")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each contender")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"some of {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = []
    for part in options.only:
        for row in PARTS[part](options.rounds):
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


if __name__ == "__main__":
    main()
