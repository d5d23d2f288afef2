"""A step of fusedopt.jax against optax's, both under `jax.jit` with donated arguments.

    python benchmarks/jax_step.py

On the tensors of GPT-2 small: `step`, which returns new parameters, and optax's `update` with
`apply_updates`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fusedopt.jax
from fusedopt.lab.bench.problems import gpt2_small

ROUNDS = 7


def applied(opt: Any) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """The two calls of optax in one."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def milliseconds(opt: Any, step: Callable[[Any, Any, Any], Any]) -> float:
    """The median time of a step."""
    source = np.random.default_rng(1)
    shapes = gpt2_small()
    params = {
        n: jnp.asarray(source.standard_normal(shape, np.float32)) for n, shape in shapes.items()
    }
    grads = {n: jnp.full(p.shape, 1e-3) for n, p in params.items()}
    state = opt.init(params)
    compiled = jax.jit(step, donate_argnums=(0, 1))
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        params, state = jax.block_until_ready(compiled(params, state, grads))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * 1e3


def main() -> None:
    ours, theirs = fusedopt.jax.adamw(1e-4), optax.adamw(1e-4)
    ways = {
        "fusedopt.jax, step": (ours, ours.step),
        "optax": (theirs, applied(theirs)),
    }
    for label, (opt, step) in ways.items():
        print(f"{label}: {milliseconds(opt, step):.0f} ms")


if __name__ == "__main__":
    main()
