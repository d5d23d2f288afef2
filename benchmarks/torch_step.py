"""The cost of a step of fusedopt.torch over the direct call, for each tensor.

    python benchmarks/torch_step.py

Many tensors of few elements: what a step does for a tensor counts, and not its arithmetic. The
direct call gets the same gradients in a list. torch's own steps are there for comparison. Times are
those of steps one after the other; behind the slash, of the first one after a sweep over an array,
when neither data nor code is in the caches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fusedopt as fo
import fusedopt.torch as ft

ROUNDS = 40
CALLS = 10
SWEPT = 1 << 24
"""Elements of an array that is larger than the caches."""


def parameters(count: int, size: int) -> list[Any]:
    """Parameters with gradients."""
    source = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(size, generator=source)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn(size, generator=source)
    return params


def ways(name: str, count: int, size: int) -> dict[str, Callable[[], Any]]:
    """What takes a step, by its label."""
    ours = parameters(count, size)
    opt = getattr(ft, name)(ours)
    direct, gradients = [p.detach() for p in parameters(count, size)], [p.grad for p in ours]
    plain = fo.Optimizer(direct, opt._rule(opt.param_groups[0]))
    found: dict[str, Callable[[], Any]] = {
        "fusedopt.torch": opt.step,
        "direct": lambda: plain.step(gradients),
        "torch": getattr(torch.optim, name)(parameters(count, size)).step,
        "torch, foreach": getattr(torch.optim, name)(parameters(count, size), foreach=True).step,
    }
    if name in ("SGD", "Adam", "AdamW", "Adagrad"):
        found["torch, fused"] = getattr(torch.optim, name)(parameters(count, size), fused=True).step
    return found


def microseconds(steps: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """The least time of a step that comes after others, and the median of one that does not."""
    times: dict[str, list[float]] = {label: [] for label in steps}
    first: dict[str, list[float]] = {label: [] for label in steps}
    swept = torch.ones(SWEPT)
    for _ in range(ROUNDS):
        for label, step in steps.items():
            swept += 1
            start = time.perf_counter()
            step()
            begin = time.perf_counter()
            for _ in range(CALLS):
                step()
            first[label].append((begin - start) * 1e6)
            times[label].append((time.perf_counter() - begin) / CALLS * 1e6)
    return {label: (min(times[label]), statistics.median(first[label])) for label in steps}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rules", nargs="+", default=["SGD", "AdamW", "NAdam"])
    parser.add_argument("--count", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--size", type=int, default=64)
    chosen = parser.parse_args()
    fo.set_threads(1)
    torch.set_num_threads(1)
    for name in chosen.rules:
        for count in chosen.count:
            found = microseconds(ways(name, count, chosen.size))
            over, cold = (
                (ours - direct) / count
                for ours, direct in zip(found["fusedopt.torch"], found["direct"], strict=True)
            )
            shown = ", ".join(f"{label} {a:.0f} / {b:.0f} us" for label, (a, b) in found.items())
            print(
                f"{name}, {count} tensors of {chosen.size}: {shown};"
                f" over the direct call {over:.2f} / {cold:.2f} us for each tensor"
            )


if __name__ == "__main__":
    main()
