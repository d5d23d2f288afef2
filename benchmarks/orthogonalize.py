"""Newton-Schulz: fusedopt, plain NumPy and torch.optim.Muon, and how near to the machine's rate.

fusedopt's products are of float32 and, where the processor has matrix units, of bfloat16.

Run it as `python benchmarks/orthogonalize.py [--rounds N] [--step] [--no-torch]`. The rate is that
of one 1024x1024 product in the same run. The share of it counts the operations of the chosen form
as dense ones: a symmetric product, of which half is computed, counts in full, so that a share can
exceed 1. `--step` times a whole step of GPT-2 small too, with its parts.

PyTorch iterates in bfloat16, and so is slow where the processor has no instructions for it, as
ONEDNN_MAX_CPU_ISA=AVX2 makes oneDNN believe. All are timed in turn, round by round.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

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
    (1, 1024, 1024),
    (1, 2048, 2048),
    (64, 64, 64),
    (16, 64, 256),
    (12, 64, 768),
)
SIDE = 1024
MUON = fo.Muon(scale="none")
SHORT = fo.Muon(scale="none", ns_dtype="bfloat16")
UNITS = fo.info()["matrix_units"]


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


def inside_muon(x: Array, rule: fo.Muon) -> Step:
    """What an optimizer does between its two passes, in work space made beforehand."""
    short = rule.short_products
    workspace = Workspace([] if short else [x.shape], [x.shape] if short else [], x.dtype)
    directions = workspace.direction.reshape(1, *x.shape)

    def step() -> None:
        workspace.direction[...] = x.reshape(-1)
        workspace.orthogonalize(directions, x.shape, rule.iteration, 1.0)

    return step


def torch_muon(matrices: Iterable[Array]) -> Step | None:
    """A step of torch.optim.Muon over matrices; None without torch."""
    torch = pytorch()
    if torch is None:
        return None
    parameters = []
    for m in matrices:
        parameters.append(torch.nn.Parameter(torch.zeros(*m.shape)))
        parameters[-1].grad = torch.from_numpy(m.copy())
    step: Step = torch.optim.Muon(parameters).step
    return step


class Row(NamedTuple):
    """Times of one stack, and the rate of a dense product in the same rounds."""

    stack: tuple[int, int, int]
    times: Times
    rate: float

    def cells(self) -> list[str]:
        count, rows, cols = self.stack
        iteration = MUON.iteration
        dense = count * flops(rows, cols, iteration.groups(rows, cols), symmetric=1.0)
        medians = self.times.medians()

        def ratio(slow: str, fast: str) -> str:
            both = slow in medians and fast in medians
            return f"{self.times.ratio(slow, fast):.3g}" if both else "-"

        return [
            f"{count} x ({rows}, {cols})",
            *(f"{1e3 * medians[n]:.3g} ms" if n in medians else "-" for n in CONTENDERS),
            *(ratio(*pair) for pair in RATIOS),
            f"{self.rate / 1e9:.0f}",
            f"{dense / medians['Muon'] / self.rate:.2f}",
            iteration.describe(rows, cols),
        ]


CONTENDERS = ("fo.orthogonalize", "Muon", "Muon, bfloat16", "NumPy", "torch")
RATIOS = (("NumPy", "Muon"), ("torch", "Muon"), ("Muon", "Muon, bfloat16"),
          ("torch", "Muon, bfloat16"))  # fmt: skip
HEAD = ("stack", "fo.orthogonalize", "in Muon", "in Muon, bfloat16", "NumPy", "torch",
        "x NumPy", "x torch", "bfloat16 x float32", "bfloat16 x torch",
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
        "Muon": inside_muon(x, MUON),
        "NumPy": lambda: textbook(x),
        "sgemm": lambda: np.dot(a, b, out=out),
    }
    if UNITS:
        steps["Muon, bfloat16"] = inside_muon(x, SHORT)
    torch = torch_muon(x) if with_torch else None
    if torch:
        steps["torch"] = torch
    times = interleaved(steps, rounds)
    return Row(stack, times, 2 * SIDE**3 / times.medians()["sgemm"])


def whole_step(rounds: int, with_torch: bool) -> Times:
    """A step over GPT-2 small's 148 tensors with Muon and AdamW, and either rule's part of it."""
    rng = np.random.default_rng(0)
    grads = {name: rng.standard_normal(s, np.float32) for name, s in gpt2_small().items()}
    steps: dict[str, Step] = {}
    muon: dict[str, Any] = {}
    for products in ("float32", "bfloat16") if UNITS else ("float32",):
        params = {name: np.zeros_like(g) for name, g in grads.items()}
        optimizer = fo.Optimizer(params, fo.Muon.with_adamw(params, ns_dtype=products))
        matrices = {name for name, states in optimizer.state.items() if len(states) == 1}
        muon = {name: g if name in matrices else None for name, g in grads.items()}
        adamw = {name: None if name in matrices else g for name, g in grads.items()}
        steps[f"all {len(params)} tensors, {products}"] = partial(optimizer.step, grads)
        steps[f"Muon's {len(matrices)}, {products}"] = partial(optimizer.step, muon)
        steps[f"AdamW's {len(params) - len(matrices)}"] = partial(optimizer.step, adamw)
    torch = torch_muon(g for g in muon.values() if g is not None) if with_torch else None
    if torch:
        steps["torch.optim.Muon's"] = torch
    return interleaved(steps, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times of Newton-Schulz iterations.")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each time")
    parser.add_argument("--step", action="store_true", help="a step of GPT-2 small too")
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="leave torch out")
    options = parser.parse_args()
    units = ", ".join(UNITS) or "none"
    print(f"{fo.info()['processor']}, {fo.get_threads()} threads; matrix units: {units};", end=" ")
    print(f"NumPy {np.__version__}\n")
    print("| " + " | ".join(HEAD) + " |")
    print("|" + "---|" * len(HEAD))
    for stack in STACKS:
        row = measure(stack, options.rounds, options.torch)
        print("| " + " | ".join(row.cells()) + " |", flush=True)
    if options.step:
        print("\na step of GPT-2 small")
        for name, seconds in whole_step(options.rounds, options.torch).medians().items():
            print(f"{name}: {1e3 * seconds:.1f} ms")


if __name__ == "__main__":
    main()
