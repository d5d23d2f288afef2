"""The step of a ShardedOptimizer: a model of its time, and what ranks of this machine measure.

    python benchmarks/ranks.py                          the model's prediction, 8 to 4096 ranks
    mpiexec -n 2 python benchmarks/ranks.py --measure   this machine: step, exchange, and the model

The alpha-beta model. n ranks have N parameters of b bytes, and gradients of the same number of
bytes. A rank sends its gradients to those that update them and receives n - 1 parts of its own
share; then shares of parameters go round. With latency alpha, bandwidth beta of one rank (bytes
per second, one direction) and memory bandwidth gamma:

    reduce   (n - 1) alpha r + (n - 1) / n N b / beta       r rounds of buckets
    add      (n + 1) b N / n / gamma                        n gradients read, one sum written
    update   28 N / n / gamma                               AdamW in float32
    gather   (n - 1) alpha + (n - 1) / n N b / beta

What is added up hides behind what travels, but for the last round; on one host the same cores do
both, and nothing hides. A round brings each rank a bucket of S bytes from n - 1 others, so
r = N b (n - 1) / n / S. A bucket is large enough where its bytes cost more than its messages:
S >= n alpha beta.

With parameters and gradients in memory that the ranks of one host have in common, nothing travels:
a step reads n gradients and moves 24 other bytes of each element, (24 + n b) N / n / gamma.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import fusedopt as fo

UPDATE = 28  # bytes of memory for one element of AdamW in float32


@dataclass(frozen=True)
class Machine:
    """alpha: seconds of a message. beta: bytes per second that a rank sends, and receives at the
    same time. gamma: bytes per second of a rank's memory."""

    alpha: float
    beta: float
    gamma: float

    def step(
        self, elements: float, ranks: int, bucket: float, *, width: int = 4, one_host: bool = False
    ) -> dict[str, float]:
        """Seconds of each part of a step, and of the whole."""
        travelling = (ranks - 1) / ranks * elements * width
        rounds = max(1.0, travelling / bucket)
        reduce = (ranks - 1) * self.alpha * rounds + travelling / self.beta
        add = (ranks + 1) * width * elements / ranks / self.gamma
        update = UPDATE * elements / ranks / self.gamma
        gather = (ranks - 1) * self.alpha + travelling / self.beta
        exchange = max(reduce, add) + min(reduce, add) / (1 if one_host else rounds)
        return {
            "reduce": reduce, "add": add, "update": update, "gather": gather,
            "step": exchange + update + gather,
        }  # fmt: skip

    def step_in_common(self, elements: float, ranks: int, width: int = 4) -> float:
        """Seconds of a step where gradients and parameters are in memory of all ranks."""
        return (UPDATE - 4 + ranks * width) * elements / ranks / self.gamma

    def bucket(self, ranks: int) -> float:
        """Bytes of a bucket whose messages take as long as its bytes."""
        return ranks * self.alpha * self.beta


CLUSTER = Machine(alpha=2e-6, beta=25e9, gamma=200e9)
"""Assumed, not measured: 200 Gbit/s to each rank, a socket's memory behind it."""


def predict(elements: float) -> None:
    print(f"{elements:.3g} parameters in float32; {CLUSTER}")
    print("ranks  bucket MB  reduce  add  update  gather  step (ms)")
    for ranks in (8, 32, 128, 512, 2048, 4096):
        bucket = max(CLUSTER.bucket(ranks), 8 << 20)
        parts = CLUSTER.step(elements, ranks, bucket)
        shown = "  ".join(f"{1e3 * parts[k]:8.3f}" for k in parts)
        print(f"{ranks:5d}  {bucket / 1e6:9.2f}  {shown}")


def gpt2_small() -> dict[str, np.ndarray]:
    """Arrays of the shapes of GPT-2 small: 124 million elements."""
    shapes = {"wte": (50257, 768), "wpe": (1024, 768), "ln": (768,)}
    for k in range(12):
        shapes |= {
            f"{k}.ln1": (768,), f"{k}.ln2": (768,), f"{k}.qkv": (768, 2304),
            f"{k}.proj": (768, 768), f"{k}.up": (768, 3072), f"{k}.down": (3072, 768),
        }  # fmt: skip
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def median(function: Callable[[], Any], repeats: int, before: Callable[[], Any]) -> float:
    times = []
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def in_turn(
    comm: Any,
    together: dict[str, Callable[[], Any]],
    alone: dict[str, Callable[[], Any]],
    rounds: int,
) -> dict[str, list[float]]:
    """Seconds of each function in each round but the first; `alone` are the first rank's."""
    times: dict[str, list[float]] = {name: [] for name in (*together, *alone)}
    for _ in range(rounds):
        for name, function in (*together.items(), *alone.items()):
            comm.Barrier()
            start = time.perf_counter()
            if name in together or comm.rank == 0:
                function()
            seconds = time.perf_counter() - start
            idle = comm.Ibarrier()
            while not idle.Test():  # who waits must not take the processor of the other's threads
                time.sleep(0.001)
            times[name].append(max(comm.allgather(seconds)))
    return {name: found[1:] for name, found in times.items()}


def measure(rounds: int, buckets: list[int]) -> None:
    from mpi4py import MPI

    from fusedopt.mpi import ShardedOptimizer, shared_arrays

    comm = MPI.COMM_WORLD
    params = gpt2_small()
    elements = sum(p.size for p in params.values())
    grads = {name: np.full_like(p, 1e-3 * (1 + comm.rank)) for name, p in params.items()}
    found: dict[str, Any] = {"ranks": comm.size, "elements": elements}
    together: dict[str, Callable[[], Any]] = {}
    for bucket in buckets:
        opt = ShardedOptimizer(params, fo.AdamW(), comm, bucket_bytes=bucket)
        together[f"sharded, buckets of {bucket >> 10} KiB"] = functools.partial(opt.step, grads)
    held = sum(a.nbytes for state in opt.state.values() for a in state.values())
    found["states of a rank, of the whole"] = max(comm.allgather(held)) / (8 * elements)
    common = shared_arrays(params, comm), shared_arrays(grads, comm, each=True)
    opt = ShardedOptimizer(common[0], fo.AdamW(), comm)
    together["sharded, memory in common"] = functools.partial(opt.step, common[1])
    process = f"one process, {comm.size} threads"
    whole = fo.Optimizer(params, fo.AdamW(), threads=comm.size) if comm.rank == 0 else None
    alone = {process: lambda: whole and whole.step(grads)}
    times = in_turn(comm, together, alone, rounds)
    found |= machine_of(comm)
    machine = Machine(found["alpha"], found["beta"], found["gamma"])
    models = [
        *(machine.step(elements, comm.size, b / 2, one_host=True)["step"] for b in buckets),
        machine.step_in_common(elements, comm.size),
    ]
    found[process] = statistics.median(times[process])
    for name, model in zip(together, models, strict=True):
        ratios = [a / b for a, b in zip(times[name], times[process], strict=True)]
        found[name] = statistics.median(times[name])
        found[f"{name}: times that of one process"] = statistics.median(ratios)
        found[f"{name}: of the model's time"] = found[name] / model
    if comm.rank == 0:
        print(json.dumps(found, indent=1), flush=True)


def machine_of(comm: Any) -> dict[str, float]:
    """alpha and beta between two ranks at once in both directions, gamma with all ranks at work."""
    partner = comm.rank ^ 1
    small, large = np.zeros(1, np.uint8), np.zeros(32 << 20, np.uint8)

    def exchange(a: np.ndarray, b: np.ndarray) -> None:
        if partner < comm.size:
            comm.Sendrecv(a, partner, recvbuf=b, source=partner)

    alpha = median(lambda: exchange(small, small.copy()), 200, comm.Barrier)
    received = np.zeros_like(large)
    beta = large.size / median(lambda: exchange(large, received), 7, comm.Barrier)
    p = {"w": np.zeros(8 << 20, np.float32)}
    g = {"w": np.ones_like(p["w"])}
    opt = fo.Optimizer(p, fo.AdamW(), threads=1)
    gamma = UPDATE * p["w"].size / median(lambda: opt.step(g), 7, comm.Barrier)
    return {"alpha": alpha, "beta": beta, "gamma": gamma}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--elements", type=float, default=7e9)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--buckets", type=int, nargs="+", default=[8 << 20, 2 << 20, 32 << 20])
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.rounds, arguments.buckets)
    else:
        predict(arguments.elements)


if __name__ == "__main__":
    main()
