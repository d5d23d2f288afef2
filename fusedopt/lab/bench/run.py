"""Times this machine's steps: one large tensor, storage formats, matrices, small tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

import fusedopt as fo

from ..output_paths import claim_directory, claim_file
from ..progress import progress
from . import picture
from .contenders import LIMIT, Contender, enter, pytorch
from .formats import WAYS, Stored
from .measure import FEWEST, interleaved
from .memory import HOW, Sweep
from .problems import Problem, elementwise_rules, rule_of, tensors
from .result import FUSED, Bench, Row
from .show import say, table

LARGE, FORMATS, MATRIX, SMALL = (
    "one large tensor",
    "AdamW by storage format",
    "a matrix",
    "small tensors",
)
SHOWN_WAYS = ("all bfloat16", "bfloat16, split16", "float8 states", "dynamic8 states")
PIECE = 1 << 19
"""Elements of each tensor where formats are compared, so that every one can be checked."""
SIDE = 512
RIVALS = ("NumPy", "torch fused", "torch foreach")
FILES = ("bench.json", "roofline.png")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """rules: names in `fo.RULES`. size: elements of the large tensor. rounds: samples of each
    contender at most. seconds: of measuring, shared between the cases; each gets `FEWEST` rounds.
    out: the directory of the picture and the numbers. threads: the most to use, where the process
    may use more. json: where the numbers go too.

    Raises ValueError for a number out of range or a rule that does not exist.
    """

    rules: tuple[str, ...] = tuple(fo.RULES)
    size: int = 1 << 24
    rounds: int = 15
    seconds: float = 40.0
    out: Path = Path("runs/bench")
    threads: int | None = None
    json: Path | None = None

    def __post_init__(self) -> None:
        for name in self.rules:
            if name not in fo.RULES:
                raise ValueError(f"rule: expected one of {', '.join(fo.RULES)}; got {name!r}")
        for key, least in (("size", 8), ("rounds", FEWEST), ("threads", 1)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ValueError(f"{key}: expected at least {least}, got {value}")
        if not self.rules:
            raise ValueError("rule: expected at least one")
        if not self.seconds > 0:
            raise ValueError(f"seconds: expected more than 0, got {self.seconds:g}")


@dataclass(frozen=True)
class Case:
    """make: arrays, and who steps them, not checked yet."""

    group: str
    name: str
    make: Callable[[], tuple[Problem | Stored, list[Contender]]]
    asleep: bool = False

    def measure(self, rounds: int, seconds: float) -> Row:
        """Check every contender's step, then time all of them in turn."""
        problem, contenders = self.make()
        for contender in contenders:
            contender.check()
        steps = {contender.name: contender.step for contender in contenders}
        times = interleaved(steps, rounds, asleep=self.asleep, within=seconds)
        elements, moved = problem.elements, problem.bytes_per_step
        return Row(self.group, self.name, elements, moved, times.seconds)


def cases(options: BenchOptions) -> Iterator[Case]:
    """Yield all that is measured, group by group."""
    elementwise = [name for name in options.rules if name in elementwise_rules()]
    names = (LIMIT, FUSED, *RIVALS)
    for rule in elementwise:
        yield Case(LARGE, rule, partial(_problem, tensors(1, options.size), rule, *names))
    if "adamw" in elementwise:
        piece = min(options.size, PIECE)
        pieces = tensors(options.size // piece, piece)
        for way in SHOWN_WAYS:
            yield Case(FORMATS, way, partial(_stored, way, pieces))
    for rule in options.rules:
        if rule not in elementwise:
            yield Case(MATRIX, f"{rule}, {SIDE} x {SIDE}", partial(_matrix, rule))
    if elementwise:
        # Between rules there is little difference here.
        rule = "adamw" if "adamw" in elementwise else elementwise[0]
        for count, size in ((1000, 1000), (1, 100_000), (1, 1000)):
            make = partial(_problem, tensors(count, size), rule, FUSED, "fusedopt.update", *RIVALS)
            yield Case(SMALL, f"{rule}, {count:,} of {size:,}", make)
        asleep = partial(_problem, tensors(1, 100_000), rule, FUSED, *RIVALS)
        yield Case(SMALL, f"{rule}, 1 of 100,000, threads asleep", asleep, asleep=True)


def _problem(shapes: Any, rule: str, *names: str) -> tuple[Problem, list[Contender]]:
    problem = Problem(shapes, rule_of(rule))
    return problem, enter(problem, *names)


def _stored(way: str, shapes: Any) -> tuple[Stored, list[Contender]]:
    stored, plain = (Stored(WAYS[w], shapes, fo.AdamW()) for w in (way, "float32"))
    sweep = Sweep(stored.traffic)
    return stored, [
        Contender(LIMIT, sweep, sweep),
        Contender(FUSED, stored.step, stored.check),
        Contender("in float32", plain.step, plain.check),
    ]


def _matrix(rule: str) -> tuple[Stored, list[Contender]]:
    stored = Stored(WAYS["float32"], {"w": (SIDE, SIDE)}, rule_of(rule))
    return stored, [
        Contender(FUSED, stored.step, stored.check),
        Contender("textbook", stored.textbook, stored.textbook),  # what the other is checked by
    ]


def bench(options: BenchOptions, console: Console) -> Bench:
    """Measure, print a table of each group, and write the picture and the numbers.

    A KeyboardInterrupt ends it with the cases that are finished. Raises OSError, before any work,
    where a file cannot be written; VerificationError where a step gives a wrong answer.
    """
    claim_directory("--out", options.out)
    if options.json is not None:
        claim_file("--json", options.json)
    rows: list[Row] = []
    status: Literal["finished", "interrupted"] = "finished"
    with _threads(options.threads):
        machine, hindered = fo.info(), starved(options.threads)
        _announce(console, options, machine, hindered)
        try:
            _measure(options, console, rows)
        except KeyboardInterrupt:
            status = "interrupted"
    result = Bench(status=status, rows=rows, machine=machine, starved=hindered)
    _conclude(console, result, options)
    return result


def _measure(options: BenchOptions, console: Console, rows: list[Row]) -> None:
    todo = list(cases(options))
    bar = progress(console)
    group: list[Row] = []
    try:
        with bar:
            task = bar.add_task("", total=len(todo))
            for k, case in enumerate(todo):
                bar.update(task, completed=k, description=f"{case.group}: {case.name}")
                if group and group[0].group != case.group:
                    table(console, group)
                    group = []
                row = case.measure(options.rounds, options.seconds / len(todo))
                rows.append(row)
                group.append(row)
    finally:
        if group:
            table(console, group)


def _announce(
    console: Console, options: BenchOptions, machine: dict[str, Any], hindered: Sequence[str]
) -> None:
    peer = pytorch()
    say(
        console,
        f"{machine['processor']}, {machine['isa']}, threads {machine['threads']}; numpy"
        f" {machine['numpy']}, {f'torch {peer.__version__}' if peer else 'no torch here'}",
    )
    for line in hindered:
        say(console, f"STARVED: {line}")
    say(console, f"About {1.5 * options.seconds:.0f} s; Ctrl-C ends it with what it has.")
    say(console, f"The limit: {HOW}.")


def _conclude(console: Console, result: Bench, options: BenchOptions) -> None:
    numbers, roofline = (options.out / name for name in FILES)
    files = [numbers] if options.json is None else [numbers, options.json]
    for file in files:
        file.write_text(json.dumps(result.record(), indent=1) + "\n", encoding="utf-8")
    large, formats = ([row for row in result.rows if row.group == g] for g in (LARGE, FORMATS))
    if large:
        picture.write(large, formats, result.machine, roofline)
        files.append(roofline)
    if result.limit_gb_s is not None:
        say(console, f"Measured memory limit: {result.limit_gb_s:.1f} GB/s (median of the cases).")
    if result.status == "interrupted":
        say(console, f"Interrupted after {len(result.rows)} of {len(list(cases(options)))} cases.")
    say(console, ", ".join(map(str, files)))


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = fo.get_threads()
    if wanted is not None:
        fo.set_threads(wanted)
    try:
        yield
    finally:
        fo.set_threads(before)


def starved(wanted: int | None) -> list[str]:
    """Return, in words, what makes this process slower than its machine."""
    info = fo.info()
    threads, limits = info["threads"], dict(info["thread_limits"])
    processors = limits.pop("processors")
    lines = [
        f"{name} allows {most} of {processors} processors"
        for name, most in limits.items()
        if most < processors
    ]
    if wanted is not None and wanted > threads:
        lines.append(f"--threads {wanted} asks for more than the {threads} that may be used here")
    if info["backend"] == "reference":
        lines.append("steps run on the slow NumPy reference")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load + threads > 1.25 * processors:
        lines.append(
            f"load average {load:.1f} before a start with {threads} threads on {processors}"
            " processors: other work takes part of the time"
        )
    return lines
