"""Trains the character model with every way to store parameters and states.

`python benchmarks/training.py` trains the default model of `fusedopt train` with AdamW, three seeds
for each way, and prints a table of the held-out losses at the end and how far their mean is from
float32's. `--jobs N` runs N at a time; give each its share of the processor by
`OPENBLAS_NUM_THREADS`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from fusedopt.lab.train import TrainOptions, gpt
from fusedopt.lab.train.descent import descend
from fusedopt.lab.train.history import History
from fusedopt.lab.train.setup import Setup

# What is accepted: how much worse than float32 a way's mean loss may be; None shows it only.
WAYS: dict[str, tuple[dict[str, Any], float | None]] = {
    "float32": ({}, None),
    "bfloat16 + split16": ({"dtype": "bfloat16", "master": "split16"}, 0.01),
    "bfloat16, stochastic": ({"dtype": "bfloat16", "rounding": "stochastic"}, 0.01),
    "all bfloat16, stochastic": (
        {"dtype": "bfloat16", "state_dtype": "bfloat16", "rounding": "stochastic"},
        None,
    ),
    "bfloat16, kahan": ({"dtype": "bfloat16", "rounding": "kahan"}, None),
    "bfloat16, nearest": ({"dtype": "bfloat16"}, None),
    "all bfloat16, nearest": ({"dtype": "bfloat16", "state_dtype": "bfloat16"}, None),
    "float8 states": ({"state_dtype": "float8"}, 0.01),
    "dynamic8 states": ({"state_dtype": "dynamic8"}, 0.01),
    "dynamic4 states": ({"state_dtype": "dynamic4"}, 0.02),
    "float8 states, stochastic": ({"state_dtype": "float8", "rounding": "stochastic"}, None),
    "dynamic4 states, stochastic": ({"state_dtype": "dynamic4", "rounding": "stochastic"}, None),
}


@dataclass(frozen=True)
class Run:
    """One training: held-out loss at the end, in nats per character."""

    way: str
    seed: int
    loss: float


def train(way: str, seed: int, steps: int) -> Run:
    """Trains the default model; equal arguments give equal losses."""
    options, _ = WAYS[way]
    setup = Setup.of(TrainOptions(steps=steps, seed=seed, **options))
    history = History(setup.options.tokens)
    for _ in islice(descend(setup, history), steps):
        pass
    return Run(way, seed, gpt.evaluate(setup.weights(), *setup.held_out, setup.config))


def rows(runs: Iterable[Run]) -> Iterator[tuple[str, ...]]:
    """The table, with its head."""
    losses: dict[str, list[float]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        losses.setdefault(run.way, []).append(run.loss)
    base = fmean(losses["float32"])
    yield "stored", "losses", "mean", "against float32", "accepted", "met"
    for way in (way for way in WAYS if way in losses):
        mean, (_, bound) = fmean(losses[way]), WAYS[way]
        off = mean / base - 1
        accepted = "shown" if bound is None else f"<= {bound:.0%}"
        met = "" if bound is None else ("yes" if off <= bound else "NO")
        each = ", ".join(f"{loss:.4f}" for loss in losses[way])
        yield way, each, f"{mean:.4f}", f"{off:+.2%}", accepted, met


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains with every way to store.")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    ways = list(dict.fromkeys(["float32", *options.ways]))
    runs = []
    with ProcessPoolExecutor(options.jobs) as pool:
        waiting = [
            pool.submit(train, way, seed, options.steps)
            for seed in range(options.seeds)
            for way in ways
        ]
        for future in waiting:
            runs.append(future.result())
            print(f"{runs[-1].way}, seed {runs[-1].seed}: {runs[-1].loss:.4f}", flush=True)
    for k, row in enumerate(rows(runs)):
        print("| " + " | ".join(row) + " |")
        if k == 0:
            print("|" + "---|" * len(row))
    if options.json:
        options.json.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")


if __name__ == "__main__":
    main()
