"""Measures the speed targets and prints them as one table.

Run it as `python benchmarks/table.py [--rounds N] [--only PART ...] [--json F] [--markdown F]`.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from contenders import enter
from fusedopt.lab.bench.contenders import fused
from fusedopt.lab.bench.measure import interleaved
from fusedopt.lab.bench.problems import Problem, elementwise_rules, gpt2_small, rule_of, tensors
from targets import Parts, Row, main, race, speedup

LIMIT_SHARE = 0.92
# Over GPT-2 small, against PyTorch's fastest form; where PyTorch lacks the rule, against NumPy as
# it is usually written, a temporary for each operation ("textbook"), and with care ("NumPy").
RIVALS = {
    "adamw": {"torch fused": 1.0},
    "rmsprop": {"torch foreach": 5.0},
    "lion": {"textbook": 5.0, "NumPy": 5.0},
    "sophia": {"textbook": 5.0, "NumPy": 5.0},
}


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


PARTS: Parts = {
    part.__name__: part for part in (gpt2, many_small, one_small, cached, decayed, imports)
}


if __name__ == "__main__":
    main("Measures the speed targets.", PARTS)
