"""Newton-Schulz: fusedopt, plain NumPy and torch.optim.Muon, and how near to the machine's rate.

Run it as `python benchmarks/orthogonalize.py [--rounds N] [--step] [--no-torch]`. The rate is that
of one 1024x1024 product in the same run. The share of it counts the operations of the chosen form
as dense ones: a symmetric product, of which half is computed, counts in full, so that a share can
exceed 1. `--step` times a whole step of GPT-2 small too, with its parts.

PyTorch iterates in bfloat16, and so is slow where the processor has no instructions for it, as
ONEDNN_MAX_CPU_ISA=AVX2 makes oneDNN believe.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import NamedTuple

import numpy as np

import fusedopt as fo
from fusedopt.lab.bench.contenders import pytorch
from fusedopt.lab.bench.measure import Times, interleaved
from fusedopt.lab.bench.problems import Array, Step, gpt2_small
from fusedopt.linalg.newton_schulz import Workspace, flops

STACKS = (
    (1, 512, 512),
    (1, 768, 768),
    (1, 768, 2304),
    (1, 768, 3072),
    (1, 3072, 768),
    (64, 64, 64),
    (16, 64, 256),
    (12, 64, 768),
)
SIDE = 1024
MUON = fo.Muon(scale="none")


def textbook(x: Array) -> Array:
    """Newton-Schulz as it is usually written, of each matrix of a stack in turn."""

    def one(x: Array) -> Array:
        if x.shape[0] > x.shape[1]:
            return one(x.T).T
        x = x / (np.linalg.norm(x) + 1e-7)
        for a, b, c in MUON.iteration.coefficients.rows:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x

    return np.stack([one(matrix) for matrix in x])


def inside_muon(x: Array) -> Step:
    """What an optimizer does between its two passes, in work space made beforehand."""
    workspace = Workspace([x.shape], x.dtype)
    directions = workspace.direction.reshape(1, *x.shape)

    def step() -> None:
        workspace.direction[...] = x.reshape(-1)
        workspace.orthogonalize(directions, x.shape, MUON.iteration, 1.0)

    return step


def torch_seconds(x: Array, rounds: int) -> float | None:
    """The median step of torch.optim.Muon; fewer rounds where it takes seconds. None without it."""
    torch = pytorch()
    if torch is None:
        return None
    parameters = [torch.nn.Parameter(torch.zeros(*m.shape)) for m in (x[0, :8, :8], *x)]
    for parameter, m in zip(parameters, (x[0, :8, :8], *x), strict=True):
        parameter.grad = torch.from_numpy(m.copy())
    torch.optim.Muon(parameters[:1]).step()  # whatever is done only once
    optimizer = torch.optim.Muon(parameters[1:])
    seconds: list[float] = []
    while not seconds or (len(seconds) < rounds and sum(seconds) < 5.0):
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


class Row(NamedTuple):
    """Times of one stack, in seconds, and the rate of a dense product in the same rounds."""

    stack: tuple[int, int, int]
    seconds: dict[str, float]
    faster: float
    torch: float | None
    rate: float

    def cells(self) -> list[str]:
        count, rows, cols = self.stack
        iteration = MUON.iteration
        dense = count * flops(rows, cols, iteration.groups(rows, cols), symmetric=1.0)
        muon = self.seconds["Muon"]
        return [
            f"{count} x ({rows}, {cols})",
            *(f"{1e3 * seconds:.3g} ms" for seconds in self.seconds.values()),
            "-" if self.torch is None else f"{1e3 * self.torch:.4g} ms",
            f"{self.faster:.2f}",
            "-" if self.torch is None else f"{self.torch / muon:.3g}",
            f"{self.rate / 1e9:.0f}",
            f"{dense / muon / self.rate:.2f}",
            iteration.describe(rows, cols),
        ]


HEAD = ("stack", "fo.orthogonalize", "in Muon", "NumPy", "torch", "x NumPy", "x torch",
        "sgemm, Gflop/s", "share", "form")  # fmt: skip


def measure(stack: tuple[int, int, int], rounds: int, with_torch: bool) -> Row:
    """Checks, then times, every contender on the same stack."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(stack, np.float32)
    difference = float(np.abs(fo.orthogonalize(x) - textbook(x)).max())
    if difference > 1e-4:
        raise SystemExit(f"{stack}: fo.orthogonalize and NumPy differ by {difference:.2g}")
    a, b = (rng.standard_normal((SIDE, SIDE), np.float32) for _ in range(2))
    out = np.empty_like(a)
    steps: dict[str, Step] = {
        "fo.orthogonalize": lambda: fo.orthogonalize(x),
        "Muon": inside_muon(x),
        "NumPy": lambda: textbook(x),
        "sgemm": lambda: np.dot(a, b, out=out),
    }
    times = interleaved(steps, rounds)
    seconds = times.medians()
    rate = 2 * SIDE**3 / seconds.pop("sgemm")
    torch = torch_seconds(x, rounds) if with_torch else None
    return Row(stack, seconds, times.ratio("NumPy", "Muon"), torch, rate)


def whole_step(rounds: int) -> Times:
    """A step over GPT-2 small's 148 tensors with Muon and AdamW, and either rule's part of it."""
    rng = np.random.default_rng(0)
    grads = {name: rng.standard_normal(s, np.float32) for name, s in gpt2_small().items()}
    params = {name: np.zeros_like(g) for name, g in grads.items()}
    optimizer = fo.Optimizer(params, fo.Muon.with_adamw(params))
    matrices = {name for name, states in optimizer.state.items() if len(states) == 1}
    muon = {name: g if name in matrices else None for name, g in grads.items()}
    adamw = {name: None if name in matrices else g for name, g in grads.items()}
    return interleaved(
        {
            f"all {len(params)} tensors": lambda: optimizer.step(grads),
            f"Muon's {len(matrices)}": lambda: optimizer.step(muon),
            f"AdamW's {len(params) - len(matrices)}": lambda: optimizer.step(adamw),
        },
        rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Times of Newton-Schulz iterations.")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each time")
    parser.add_argument("--step", action="store_true", help="a step of GPT-2 small too")
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="leave torch out")
    options = parser.parse_args()
    print(f"float32, {fo.get_threads()} threads; NumPy {np.__version__}\n")
    print("| " + " | ".join(HEAD) + " |")
    print("|" + "---|" * len(HEAD))
    for stack in STACKS:
        row = measure(stack, options.rounds, options.torch)
        print("| " + " | ".join(row.cells()) + " |", flush=True)
    if options.step:
        print("\na step of GPT-2 small")
        for name, seconds in whole_step(options.rounds).medians().items():
            print(f"{name}: {1e3 * seconds:.1f} ms")


if __name__ == "__main__":
    main()
