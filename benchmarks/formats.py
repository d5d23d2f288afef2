"""Measures AdamW in every storage format and prints one table.

`python benchmarks/formats.py [--rounds N] [--only WAY ...] [--json FILE]`. For each way to store:
bytes that a step moves per parameter; over GPT-2 small the step's time, as a share of the limit of
its own bytes and against float32's; in cache on one core, nanoseconds per 8 elements; and from
these two, as a model and not as a measurement, what binds with how many cores. It needs about 3 GB
of memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fusedopt as fo
from fusedopt.arrays.formats import BFLOAT16
from fusedopt.lab.bench.contenders import pytorch
from fusedopt.lab.bench.formats import WAYS, Stored
from fusedopt.lab.bench.measure import interleaved
from fusedopt.lab.bench.problems import Array, gpt2_small, tensors
from limit import TILE, Streams
from targets import machine

RULE = fo.AdamW(lr=1e-4, weight_decay=0.1)
IN_CACHE = 1 << 14

# At most, over float32's time in cache, and over GPT-2 small; at least, of the limit there.
IN_CACHE_TARGETS = {
    "all bfloat16": 1.3,
    "all bfloat16, stochastic": 2,
    "all float16": 1.3,
    "bfloat16, split16": 1.3,
    "float32, bfloat16 gradient and copy": 1.15,
    "float8 states": 1.8,
    "dynamic8 states": 2.2,
    "dynamic4 states": 2,
}
OVER_FLOAT32_TARGETS = {name: 0.6 if name == "all bfloat16" else 1.0 for name in WAYS}
LIMIT_TARGETS = {"float32, bfloat16 gradient and copy": 0.83}


def streams(stored: Stored) -> Streams:
    """The reads and writes of a step."""
    leaves = []
    for name, g in stored.grads.items():
        if g.size < 4096:  # their states are in float32: another pattern, and no weight
            continue
        memory, _ = stored.optimizer.leaf_state(name)
        own = [a for one in memory.operands for a in one.arrays]
        pattern = [(g, 0), *((a, 1) for a in own), *((a, 2) for a in memory.mirrors)]
        leaves.append((g.size, [(a, _tile_bytes(a, g.size), kind) for a, kind in pattern]))
    return Streams(leaves, fo.get_threads())


def _tile_bytes(a: Array, n: int) -> int:
    """Bytes of a tile of an array that belongs to n elements."""
    return round(a.nbytes / -(-n // TILE))


@dataclass(frozen=True)
class Row:
    """The figures of one way to store.

    Bytes moved per parameter; seconds of a step over GPT-2 small, of a loop with the same reads and
    writes, and of PyTorch's fused step; in cache on one core, ns per 8 elements and the time over
    float32's.
    """

    way: str
    bytes: float
    step_s: float
    limit_s: float
    torch_s: float | None
    over_float32: float
    cached_ns: float
    cached_over_float32: float

    def binding(self, cores: int, elements: int) -> str:
        """What a step over so many elements is bound by on so many cores, by the model."""
        compute = self.cached_ns * 1e-9 / 8 * elements / cores
        what = "memory" if compute < self.limit_s else "compute"
        return f"{1e3 * max(compute, self.limit_s):.0f} ms, {what}"


def rows(rounds: int, ways: Collection[str] = WAYS) -> Iterator[Row]:
    """Every way in turn with float32."""
    shapes = gpt2_small()
    plain = Stored(WAYS["float32"], shapes, RULE)
    small = Stored(WAYS["float32"], tensors(1, IN_CACHE), RULE)
    for name in ways:
        way = WAYS[name]
        arrays = plain if name == "float32" else Stored(way, shapes, RULE)
        arrays.check()
        sweep = streams(arrays)
        steps: dict[str, Callable[[], object]] = {"step": arrays.step, "limit": sweep}
        if name != "float32":
            steps["float32"] = plain.step
        if name in ("float32", "all bfloat16") and pytorch():
            steps["torch"] = torch_step(arrays)
        times = interleaved(steps, rounds)
        threads = fo.get_threads()
        fo.set_threads(1)
        cached = {"way": Stored(way, tensors(1, IN_CACHE), RULE).step, "float32": small.step}
        in_cache = interleaved(cached, rounds)
        fo.set_threads(threads)
        yield Row(
            name,
            sweep.bytes,
            times.median("step"),
            times.median("limit"),
            times.median("torch") if "torch" in steps else None,
            times.ratio("step", "float32") if name != "float32" else 1.0,
            in_cache.median("way") / IN_CACHE * 8e9,
            in_cache.ratio("way", "float32"),
        )


def torch_step(arrays: Stored) -> Callable[[], object]:
    """PyTorch's fused AdamW on copies of the same arrays, in the same dtype."""
    torch: Any = pytorch()

    def tensor(a: Array) -> Any:
        if a.dtype == BFLOAT16:
            return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(a)

    params = []
    for name, p in arrays.params.items():
        params.append(tensor(p.copy()).requires_grad_())
        params[-1].grad = tensor(arrays.grads[name])
    torch.set_num_threads(fo.get_threads())
    step: Callable[[], object] = torch.optim.AdamW(params, lr=1e-4, fused=True).step
    return step


HEAD = (
    "stored", "bytes", "GPT-2 small", "limit", "of the limit", "over float32", "over torch fused",
    "in cache, 1 core, per 8", "over float32", "1 core", "2", "8", "32",
)  # fmt: skip


def cells(row: Row, elements: int) -> Iterator[str]:
    """A line of the table; targets in brackets."""
    yield from (row.way, f"{row.bytes:.1f}")
    yield from (f"{1e3 * seconds:.1f} ms" for seconds in (row.step_s, row.limit_s))
    least = LIMIT_TARGETS.get(row.way)
    yield f"{row.limit_s / row.step_s:.2f}" + (f" (>= {least})" if least else "")
    yield f"{row.over_float32:.2f} (<= {OVER_FLOAT32_TARGETS[row.way]})"
    wanted = " (>= 1.3)" if row.way == "all bfloat16" else ""
    yield f"{row.torch_s / row.step_s:.2f} x as fast{wanted}" if row.torch_s else ""
    most = IN_CACHE_TARGETS.get(row.way)
    yield f"{row.cached_ns:.1f} ns"
    yield f"{row.cached_over_float32:.2f}" + (f" (<= {most})" if most else "")
    yield from (row.binding(cores, elements) for cores in (1, 2, 8, 32))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures every storage format.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    about = machine()
    elements = sum(int(np.prod(shape)) for shape in gpt2_small().values())
    print(", ".join(f"{key} {value}" for key, value in about.items()), "\n", flush=True)
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    done = []
    for row in rows(options.rounds, options.only):
        print(f"| {' | '.join(cells(row, elements))} |", flush=True)
        done.append(asdict(row))
    print(
        "\nThe last four columns are a model: the time in cache shared between so many cores, or"
        " the measured limit of the bytes, whichever is longer, with this machine's memory."
    )
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "rows": done}, indent=1) + "\n")


if __name__ == "__main__":
    main()
