"""Threads in a real loop: after a product, after a pause, and with threads of the core's own.

Run it as `python benchmarks/threads.py [--rounds N] [--only loop] [--other PYTHON]`.

loop: between two steps there is nothing, a product of NumPy's, or a pause; the step that chooses
for itself between one thread and all of them is timed beside steps that take one thread.
pool: PYTHON is an interpreter whose core was built with FUSEDOPT_PARALLEL=threads, this one's with
OpenMP; both step the same tensors in turn, each in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import fusedopt as fo

LOOP_SIZES = (50_000, 100_000, 200_000, 400_000, 800_000, 3_000_000)
POOL_SIZES = (70_000, 100_000, 200_000, 1_000_000, 10_000_000)
CALLS = 20

_A = np.random.default_rng(0).random((900, 900), np.float32)

BETWEEN: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "a product": lambda: _A @ _A,
    "5 ms of sleep": lambda: time.sleep(0.005),
}


Stepped = tuple[fo.Optimizer, list[np.ndarray]]


def optimizer_of(elements: int, threads: int | None = None) -> Stepped:
    """An optimizer of ten tensors, and gradients."""
    rng = np.random.default_rng(elements)
    params = [rng.standard_normal(elements // 10, np.float32) for _ in range(10)]
    return fo.Optimizer(params, fo.AdamW(), threads=threads), [p.copy() for p in params]


def loop(rounds: int) -> None:
    """Print the time of a step that chooses, and of one on one thread."""
    print("| between steps | elements | 1 thread, us | chosen, us | chosen over 1 |")
    print("|---|---|---|---|---|")
    for name, before in BETWEEN.items():
        for elements in LOOP_SIZES:
            made = {threads: optimizer_of(elements, threads) for threads in (1, None)}
            taken: dict[int | None, list[float]] = {1: [], None: []}
            for _ in range(rounds):
                for threads, (optimizer, grads) in made.items():
                    # A loop of its own, as a trainer has it: what comes before each step is the
                    # same for all of them.
                    for _ in range(CALLS):
                        before()
                        start = time.perf_counter()
                        optimizer.step(grads)
                        taken[threads].append(time.perf_counter() - start)
            one, chosen = (1e6 * statistics.median(taken[k]) for k in (1, None))
            print(f"| {name} | {elements} | {one:.0f} | {chosen:.0f} | {chosen / one:.2f} |")


class Worker:
    """A process that steps tensors of the size that it is told."""

    def __init__(self, python: str) -> None:
        command = [python, str(Path(__file__).resolve()), "--serve"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.name = self.ask("name")

    def ask(self, what: object) -> str:
        """Send a line and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(what, file=self._process.stdin, flush=True)
        return self._process.stdout.readline().strip()


def serve() -> None:
    """Answer each size with the seconds that a step of it takes."""
    known: dict[int, Stepped] = {}
    for line in sys.stdin:
        if line.strip() == "name":
            print(fo.info()["parallel"], flush=True)
            continue
        elements = int(line)
        optimizer, grads = known.setdefault(elements, optimizer_of(elements))
        optimizer.step(grads)
        start = time.perf_counter()
        for _ in range(CALLS):
            optimizer.step(grads)
        print((time.perf_counter() - start) / CALLS, flush=True)


def pool(rounds: int, other: str) -> None:
    """Print the times of two builds in turn."""
    workers = [Worker(sys.executable), Worker(other)]
    first, second = (worker.name for worker in workers)
    print(f"| elements | {first}, us | {second}, us | {second} over {first} |")
    print("|---|---|---|---|")
    for elements in POOL_SIZES:
        taken: list[list[float]] = [[], []]
        for _ in range(rounds):
            for seconds, worker in zip(taken, workers, strict=True):
                time.sleep(0.01)  # until the other's threads sleep
                seconds.append(float(worker.ask(elements)))
        a, b = (1e6 * statistics.median(seconds) for seconds in taken)
        ratio = statistics.median(y / x for x, y in zip(*taken, strict=True))
        print(f"| {elements} | {a:.0f} | {b:.0f} | {ratio:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Times steps with threads in a loop.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("loop", "pool"))
    parser.add_argument("--other", metavar="PYTHON", help="an interpreter with another build")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    if options.only == "pool" and not options.other:
        parser.error("pool compares two builds: give --other PYTHON")
    print(f"{fo.info()['processor']}, {fo.get_threads()} threads, AdamW, float32\n")
    if options.only != "pool":
        loop(options.rounds)
    if options.other:
        pool(options.rounds, options.other)
    return None


if __name__ == "__main__":
    main()
