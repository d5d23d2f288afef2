"""The backend "cuda" on a GPU: verified and timed in one command, as one table.

    python benchmarks/gpu.py [--elements 1000000000] [--rounds 21] [--json FILE]

Needs a CUDA device and PyTorch, whose arrays are used and whose fused and foreach steps, with
apex's and bitsandbytes' where they are installed, are timed beside. First every rule takes three
steps on the device and on the CPU, and the bits are compared (of Muon the values); then come
bandwidths as shares of that of a copy, steps over GPT-2 small and over 1000 small tensors, clipped
ones that wait for their norm and that do not, and the microseconds that the host takes to queue a
step, of gradients that it looks at and of those that are `Fixed`.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain, product
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

RULES = {
    name: cls
    for name, cls in fo.RULES.items()
    if cls().program.phases <= 2 and not cls().sides((2, 2))
}
"""Those that the backend has."""

SMALL = {f"{k}": (1000,) for k in range(1000)}

Step = Callable[[], object]


# ---------------------------------------------------------------- verified


def verify(torch: Any) -> list[str]:
    """What differs from the CPU: nothing, or lines that say what."""
    wrong = []
    for name, cls in RULES.items():
        for dtype, example in product(DTYPES, cls.examples):
            rule = cls(**{"weight_decay": 0.1, **example})
            allowed = 0.0 if rule.program.phases == 1 else 0.05
            for wait in (True, False):
                difference = compare(torch, rule, dtype, wait)
                if not difference <= allowed:
                    wrong.append(f"{rule} in {dtype}, {wait=}: differs by up to {difference}")
        print(f"verified {name}", file=sys.stderr, flush=True)
    return [*wrong, *what_a_nan_changes(torch)]


def what_a_nan_changes(torch: Any) -> list[str]:
    """Of a step that does not wait, and those after it: nothing, or a line that says so."""
    p = torch.ones(100_000, device="cuda")
    optimizer = fo.Optimizer(p, fo.AdamW(), clip_norm=1.0, wait=False)
    good, bad = torch.ones_like(p), torch.full_like(p, float("nan"))
    optimizer.step(good)
    before = optimizer.fingerprint()
    try:
        for g in (bad, good, good):
            optimizer.step(g)
        optimizer.synchronize()
    except FloatingPointError:
        same = optimizer.fingerprint() == before
        return [] if same else ["a step that found NaN changed something"]
    return ["a step that found NaN was not told of"]


def compare(torch: Any, rule: fo.Rule, dtype: str, wait: bool) -> float:
    """The largest difference between device and CPU after three clipped steps."""
    rng = np.random.default_rng(0)
    shapes = [(257, 129), (1, 5), (64, 1024)]
    here = [rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes]
    there = [on_device(torch, a) for a in here]
    cpu = fo.Optimizer(here, rule, clip_norm=1.0)
    gpu = fo.Optimizer(there, rule, clip_norm=1.0, wait=wait)
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


def arrays_moved(rule: fo.Rule) -> int:
    """How many arrays a step reads and how many it writes, together."""
    from fusedopt.cuda import kernels  # 0.7 s, and not everywhere

    operations = kernels.operations_of(rule.program, 0, refreshed=False)
    steps = [kernels.Step.of(rule.program, op) for op in operations]
    read = {name for step in steps for name in step.operands}
    return len(read) + len({name for step in steps for name in step.written})


def made(torch: Any, shapes: Sequence[tuple[int, ...]], dtype: str) -> tuple[list[Any], list[Any]]:
    """Parameters and gradients."""
    kind = getattr(torch, dtype)
    return tuple(  # type: ignore[return-value]
        [torch.randn(shape, device="cuda").to(kind) for shape in shapes] for _ in range(2)
    )


def ours(p: list[Any], g: Any, rule: fo.Rule, **options: Any) -> Step:
    """A function that takes a step."""
    optimizer = fo.Optimizer(p, rule, **options)
    return lambda: optimizer.step(g)


def rivals(torch: Any, p: list[Any], g: list[Any]) -> Iterator[tuple[str, Step]]:
    """AdamW of others over the same arrays."""
    for a, b in zip(p, g, strict=True):
        a.grad = b
    makers: dict[str, Callable[[], Any]] = {
        "torch fused": lambda: torch.optim.AdamW(p, fused=True),
        "torch foreach": lambda: torch.optim.AdamW(p, foreach=True),
        "apex": lambda: importlib.import_module("apex.optimizers").FusedAdam(p),
        "bitsandbytes": lambda: importlib.import_module("bitsandbytes").optim.AdamW32bit(p),
    }
    for name, make in makers.items():
        try:
            optimizer = make()
        except (ImportError, AttributeError, RuntimeError) as error:
            print(f"without {name}: {error}", file=sys.stderr)
            continue
        yield name, optimizer.step
        if name == "torch fused":
            yield f"{name}, clipped", clipped(torch, p, optimizer)
        del optimizer


def clipped(torch: Any, p: list[Any], optimizer: Any) -> Step:
    """PyTorch's two calls."""

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(p, 1.0)
        optimizer.step()

    return step


def bandwidths(torch: Any, elements: int, rounds: int) -> Iterator[Row]:
    """Every rule over one large tensor, as a share of a copy's bandwidth."""
    for dtype in ("float32", "bfloat16"):
        width = np.dtype(DTYPES[dtype]).itemsize
        (p,), (g,) = made(torch, [(elements,)], dtype)
        copying = seconds(torch, lambda p=p, g=g: g.copy_(p), rounds)  # type: ignore[misc]
        rate = 2 * elements * width / copying
        for name, cls in RULES.items():
            rule = cls()
            if rule.program.phases > 1:
                continue
            step = ours([p], [g], rule, state_dtype=dtype)
            taken = seconds(torch, step, rounds)
            share = arrays_moved(rule) * elements * width / taken / rate
            medians = {"fusedopt": taken, "copy": copying}
            what = f"{name}, {elements:.0e} in {dtype}: share of copy ({rate / 1e12:.2f} TB/s)"
            yield Row(what, share, SHARE_OF_COPY, medians)
            del step
            gc.collect()  # of states that are some gigabytes


def lists(torch: Any, rounds: int) -> Iterator[Row]:
    """AdamW over GPT-2 small and over many small tensors, with and without clipping."""
    problems: dict[str, Any] = {
        "GPT-2 small": list(gpt2_small().values()),
        "1000 of 1000": list(SMALL.values()),
    }
    pairs = (
        ("fusedopt", "torch fused"),
        ("fusedopt, clipped, not waiting", "torch fused, clipped"),
    )
    for problem, shapes in problems.items():
        for dtype in ("float32", "bfloat16"):
            p, g = made(torch, shapes, dtype)
            medians, host = steps_of_all(torch, p, g, dtype, rounds)
            what = f"{problem}, {dtype}"
            for name, rival in pairs:
                value = medians[rival] / medians[name]
                yield Row(f"{what}: {name}, times as fast as {rival}", value, 1.0, medians)
            limit = host["torch fused"] * 1e6
            for name in ("fusedopt", "fusedopt, Fixed", "fusedopt, clipped, not waiting"):
                told = f"{what}: microseconds of the host, {name}"
                yield Row(told, host[name] * 1e6, limit, host, at_least=False, unit="us")


def steps_of_all(
    torch: Any, p: list[Any], g: list[Any], dtype: str, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the device, and of the host, of a step of AdamW in several ways."""
    norm, fixed = {"clip_norm": 1.0}, fo.Fixed(g)
    steps: dict[str, Any] = {
        "fusedopt": (g, {}),
        "fusedopt, Fixed": (fixed, {}),
        "fusedopt, clipped": (g, norm),
        "fusedopt, clipped, not waiting": (fixed, {**norm, "wait": False}),
    }
    medians, host = {}, {}
    mine = (
        (name, ours(p, given, fo.AdamW(), state_dtype=dtype, **options))
        for name, (given, options) in steps.items()
    )
    for name, step in chain(mine, rivals(torch, p, g)):
        medians[name], host[name] = seconds(torch, step, rounds), host_seconds(torch, step, rounds)
    return medians, host


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
    if torch is None or not torch.cuda.is_available():
        print("nothing can be measured here: there is no PyTorch for CUDA", file=sys.stderr)
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
