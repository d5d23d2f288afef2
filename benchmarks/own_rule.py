"""AdamW written as a rule of one's own, and the Numba backend, against the compiled core's AdamW.

Run it as `python benchmarks/own_rule.py [--rounds N]`. Fails where the rule of one's own has less
than 0.9 of the built-in one's speed, or the backend less than 0.85, beyond the caches.
"""

from __future__ import annotations

import argparse
from math import sqrt
from typing import Any

import numpy as np

import fusedopt as fo
from fusedopt.lab.bench.measure import interleaved
from fusedopt.lab.bench.problems import Step

ACCEPTED = {"own rule, native": 0.9, "own rule, numba": 0.85, "AdamW, numba": 0.85}
SIZES = {"in cache": (1, 1 << 14), "beyond cache": (16, 1 << 21)}


class OwnAdamW(fo.CustomRule):
    """The README's rule."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        b1, b2, c1, c2 = self.beta1, self.beta2, 1 - self.beta1**t, 1 - self.beta2**t
        return b1, 1 - b1, b2, 1 - b2, lr * sqrt(c2) / c1, self.eps * sqrt(c2)

    @staticmethod
    def element(p: Any, g: Any, m: Any, v: Any, b1: Any, d1: Any, b2: Any, d2: Any, step: Any,
                eps: Any) -> Any:  # fmt: skip
        m = b1 * m + d1 * g
        v = b2 * v + d2 * (g * g)
        return step * m / (sqrt(v) + eps), m, v


def contenders(count: int, size: int) -> dict[str, Step]:
    """Steps over so many tensors of so many elements."""
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(size, np.float32) for _ in range(count)]
    grads = [rng.standard_normal(size, np.float32) for _ in range(count)]
    settings: dict[str, Any] = {"lr": 1e-6, "weight_decay": 0.01, "decay": "decoupled"}
    made = {
        "AdamW, native": fo.Optimizer(params, fo.AdamW(**settings), backend="native"),
        "own rule, native": fo.Optimizer(params, OwnAdamW(**settings), backend="native"),
        "own rule, numba": fo.Optimizer(params, OwnAdamW(**settings), backend="numba"),
        "AdamW, numba": fo.Optimizer(params, fo.AdamW(**settings), backend="numba"),
    }
    return {name: lambda o=o: o.step(grads) for name, o in made.items()}  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description="AdamW as a rule of one's own.")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each time")
    rounds = parser.parse_args().rounds
    slow = []
    for where, (count, size) in SIZES.items():
        times = interleaved(contenders(count, size), rounds)
        print(f"{where}: {count} x {size} elements of float32, {fo.get_threads()} threads")
        for name, seconds in times.medians().items():
            speed = times.ratio("AdamW, native", name)
            print(f"  {name:<18} {1e6 * seconds:>10.1f} us  {speed:.2f} of the built-in speed")
            if where == "beyond cache" and speed < ACCEPTED.get(name, 0.0):
                slow.append(f"{name}: {speed:.2f}, accepted from {ACCEPTED[name]}")
    if slow:
        raise SystemExit("too slow: " + "; ".join(slow))


if __name__ == "__main__":
    main()
