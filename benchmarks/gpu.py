"""The backend "cuda" on a GPU: verified and timed in one command, as one table.

    python benchmarks/gpu.py [--elements 1000000000] [--rounds 21] [--json FILE]

Needs a CUDA device and PyTorch, whose arrays are used and whose fused and foreach steps, with
apex's and bitsandbytes' where they are installed, are timed beside. First every rule takes three
steps on the device and on the CPU, and the bits are compared (of Muon the values); then come
bandwidths as shares of that of a copy, steps over GPT-2 small and over 1000 small tensors, and the
microseconds that the host takes to queue a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import fusedopt as fo
from fusedopt.bench.contenders import pytorch
from fusedopt.bench.problems import gpt2_small
from targets import Row

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
SHARE_OF_COPY = 0.9
"""The target for 10^9 elements on an H200, of rules in float32, and in bfloat16 throughout."""

SMALL = {f"{k}": (1000,) for k in range(1000)}

Step = Callable[[], object]


# ---------------------------------------------------------------- verified


def verify(torch: Any) -> list[str]:
    """What differs from the CPU: nothing, or lines that say what."""
    wrong = []
    for name, cls in fo.RULES.items():
        for dtype in DTYPES:
            for example in cls.examples:
                rule = cls(**{"weight_decay": 0.1, **example})
                difference = compare(torch, rule, dtype)
                allowed = 0.0 if rule.program.phases == 1 else 0.05
                if not difference <= allowed:
                    wrong.append(f"{rule} in {dtype}: differs by up to {difference}")
        print(f"verified {name}", file=sys.stderr, flush=True)
    return wrong


def compare(torch: Any, rule: fo.Rule, dtype: str) -> float:
    """The largest relative difference between device and CPU after three clipped steps."""
    rng = np.random.default_rng(0)
    shapes = [(257, 129), (1, 5), (64, 1024)]
    here = [rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes]
    there = [on_device(torch, a) for a in here]
    cpu = fo.Optimizer(here, rule, clip_norm=1.0)
    gpu = fo.Optimizer(there, rule, clip_norm=1.0)
    for _ in range(3):
        grads = [rng.standard_normal(a.shape).astype(a.dtype) for a in here]
        moved = [on_device(torch, g) for g in grads]
        second = rule.takes_hessian
        cpu.step(grads, hessian=grads if second else None)
        gpu.step(moved, hessian=moved if second else None)
    if cpu.fingerprint() == gpu.fingerprint():
        return 0.0
    pairs = [(a, np.asarray(t.double().cpu())) for a, t in zip(here, there, strict=True)]
    worst: float = max(float(np.max(np.abs(a.astype(np.float64) - b))) for a, b in pairs)
    return worst or float("inf")  # the parameters agree, and the states do not


def on_device(torch: Any, a: Any) -> Any:
    """A tensor with the same bits on the device."""
    bits = torch.from_numpy(a.view(f"i{a.itemsize}").copy()).cuda()
    return bits.view(getattr(torch, a.dtype.name))


# ---------------------------------------------------------------- timed


def seconds(torch: Any, step: Step, rounds: int) -> float:
    """The median time that the device takes, after three untimed steps."""
    for _ in range(3):
        step()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) / 1e3)
    return statistics.median(times)


def host_seconds(torch: Any, step: Step, rounds: int) -> float:
    """The median time that the host takes to queue a step for an idle device."""
    times = []
    for _ in range(rounds + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times[3:])


def moved_bytes(optimizer: fo.Optimizer, elements: int, width: int) -> int:
    """What a step reads and writes: gradient, parameter and states."""
    states = sum(int(a.nbytes) for state in optimizer.state.values() for a in state.values())
    return 3 * elements * width + 2 * states


def made(torch: Any, shapes: Sequence[tuple[int, ...]], dtype: str) -> tuple[list[Any], list[Any]]:
    """Parameters and gradients."""
    kind = getattr(torch, dtype)
    return tuple(  # type: ignore[return-value]
        [torch.randn(shape, device="cuda").to(kind) for shape in shapes] for _ in range(2)
    )


def ours(torch: Any, p: list[Any], g: list[Any], rule: fo.Rule, **options: Any) -> Any:
    """The optimizer and a function that takes a step."""
    optimizer = fo.Optimizer(p, rule, **options)
    return optimizer, lambda: optimizer.step(g)


def rivals(torch: Any, p: list[Any], g: list[Any]) -> Iterator[tuple[str, Step]]:
    """AdamW of others over the same arrays."""
    for a, b in zip(p, g, strict=True):
        a.grad = b
    makers: dict[str, Callable[[], Any]] = {
        "torch fused": lambda: torch.optim.AdamW(p, fused=True),
        "torch foreach": lambda: torch.optim.AdamW(p, foreach=True),
        "apex": lambda: __import__("apex.optimizers").optimizers.FusedAdam(p),
        "bitsandbytes": lambda: __import__("bitsandbytes").optim.AdamW32bit(p),
    }
    for name, make in makers.items():
        try:
            optimizer = make()
        except (ImportError, AttributeError):
            continue
        yield name, optimizer.step
        del optimizer


def bandwidths(torch: Any, elements: int, rounds: int) -> Iterator[Row]:
    """Every rule over one large tensor, as a share of a copy's bandwidth."""
    for dtype in ("float32", "bfloat16"):
        width = np.dtype(DTYPES[dtype]).itemsize
        (p,), (g,) = made(torch, [(elements,)], dtype)
        copying = seconds(torch, lambda p=p, g=g: g.copy_(p), rounds)  # type: ignore[misc]
        rate = 2 * elements * width / copying
        for name, cls in fo.RULES.items():
            rule = cls()
            if rule.program.phases > 1:
                continue
            optimizer, step = ours(torch, [p], [g], rule, state_dtype=dtype)
            taken = seconds(torch, step, rounds)
            share = moved_bytes(optimizer, elements, width) / taken / rate
            medians = {"fusedopt": taken, "copy": copying}
            what = f"{name}, {elements:.0e} in {dtype}: share of copy ({rate / 1e12:.2f} TB/s)"
            yield Row(what, share, SHARE_OF_COPY, medians)
            del optimizer, step
            torch.cuda.empty_cache()


def lists(torch: Any, rounds: int) -> Iterator[Row]:
    """AdamW over GPT-2 small and over many small tensors, with and without clipping."""
    problems: dict[str, Any] = {
        "GPT-2 small": list(gpt2_small().values()),
        "1000 of 1000": list(SMALL.values()),
    }
    for problem, shapes in problems.items():
        for dtype in ("float32", "bfloat16"):
            p, g = made(torch, shapes, dtype)
            _, step = ours(torch, p, g, fo.AdamW(), state_dtype=dtype)
            medians = {"fusedopt": seconds(torch, step, rounds)}
            host = {"fusedopt": host_seconds(torch, step, rounds)}
            _, clipped = ours(torch, p, g, fo.AdamW(), state_dtype=dtype, clip_norm=1.0)
            medians["fusedopt, clipped"] = seconds(torch, clipped, rounds)
            for name, rival in rivals(torch, p, g):
                medians[name] = seconds(torch, rival, rounds)
                host[name] = host_seconds(torch, rival, rounds)
            value = medians["torch fused"] / medians["fusedopt"]
            yield Row(f"{problem}, {dtype}: times as fast as torch fused", value, 1.0, medians)
            what = f"{problem}, {dtype}: microseconds of the host per step"
            limit = host["torch fused"] * 1e6
            yield Row(what, host["fusedopt"] * 1e6, limit, host, at_least=False, unit="us")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--elements", type=int, default=10**9)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    reason = fo.info()["backends"]["cuda"]
    if reason != "available":
        print(f"nothing can be measured here: {reason}", file=sys.stderr)
        return 2
    torch = pytorch()
    if torch is None:
        print("nothing can be measured here: PyTorch is not installed", file=sys.stderr)
        return 2
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}", file=sys.stderr)
    wrong = verify(torch)
    print("\n".join(wrong) or "all rules have the CPU's bits (Muon: values)", file=sys.stderr)
    rows = [
        *bandwidths(torch, arguments.elements, arguments.rounds),
        *lists(torch, arguments.rounds),
    ]
    print("| target | accepted | measured | met | medians |\n|---|---|---|---|---|")
    for row in rows:
        print("|", " | ".join(row.cells()), "|")
    if arguments.json:
        told = {"wrong": wrong, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(told, indent=1))
    return 1 if wrong or not all(row.met for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
