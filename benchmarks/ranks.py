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

What is added up hides behind what travels, but for the last round. A round brings each rank a
bucket of S bytes from n - 1 others, so r = N b (n - 1) / n / S. A bucket is large enough where its
bytes cost more than its messages: S >= n alpha beta.
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

    def step(self, elements: float, ranks: int, bucket: float, width: int = 4) -> dict[str, float]:
        """Seconds of each part of a step, and of the whole."""
        travelling = (ranks - 1) / ranks * elements * width
        rounds = max(1.0, travelling / bucket)
        reduce = (ranks - 1) * self.alpha * rounds + travelling / self.beta
        add = (ranks + 1) * width * elements / ranks / self.gamma
        update = UPDATE * elements / ranks / self.gamma
        gather = (ranks - 1) * self.alpha + travelling / self.beta
        exchange = max(reduce, add) + min(reduce, add) / rounds
        return {
            "reduce": reduce, "add": add, "update": update, "gather": gather,
            "step": exchange + update + gather,
        }  # fmt: skip

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


def measure(repeats: int, buckets: list[int]) -> None:
    from mpi4py import MPI

    from fusedopt.mpi import ShardedOptimizer

    comm = MPI.COMM_WORLD
    params = gpt2_small()
    elements = sum(p.size for p in params.values())
    grads = {name: np.full_like(p, 1e-3 * (1 + comm.rank)) for name, p in params.items()}
    found: dict[str, Any] = {"ranks": comm.size, "elements": elements}
    for bucket in buckets:
        opt = ShardedOptimizer(params, fo.AdamW(), comm, bucket_bytes=bucket)
        seconds = median(functools.partial(opt.step, grads), repeats, comm.Barrier)
        found[f"sharded, buckets of {bucket >> 10} KiB"] = comm.allreduce(seconds, MPI.MAX)
        held = sum(a.nbytes for state in opt.state.values() for a in state.values())
        found["states of a rank, of the whole"] = comm.allreduce(held, MPI.MAX) / (8 * elements)
        del opt
    found |= machine_of(comm)
    comm.Barrier()
    if comm.rank == 0:
        threads = comm.size
        second = {name: g + np.float32(1e-3) for name, g in grads.items()}
        whole = fo.Optimizer(params, fo.AdamW(), threads=threads)
        found[f"one process, {threads} threads: step"] = median(
            lambda: whole.step(grads), repeats, lambda: None
        )

        def both() -> None:
            whole.accumulate(grads)
            whole.accumulate(second)
            whole.step(grad_scale=2.0)

        found[f"one process, {threads} threads: two gradients added, step"] = median(
            both, repeats, lambda: None
        )
        machine = Machine(found["alpha"], found["beta"], found["gamma"])
        found["model"] = machine.step(elements, comm.size, buckets[0] / 2)["step"]
        print(json.dumps(found, indent=1), flush=True)
    idle = comm.Ibarrier()
    while not idle.Test():  # a rank that waits must not take the processor of the other's threads
        time.sleep(0.01)


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
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--buckets", type=int, nargs="+", default=[8 << 20, 2 << 20, 32 << 20])
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.repeats, arguments.buckets)
    else:
        predict(arguments.elements)


if __name__ == "__main__":
    main()
