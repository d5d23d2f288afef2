"""A step of fusedopt.jax against optax's, both under `jax.jit` with donated arguments.

    python benchmarks/jax_step.py

On the tensors of GPT-2 small: `step`, which returns new parameters; optax's `update` with
`apply_updates`; and why there is no fused `update`. That one would read parameters, states and
gradients, and write the states, and the updates in the gradients' memory, which are read again to
be applied. Its place is taken by a pass over the same arrays that moves the same bytes, with the
parameters and the gradients in each other's roles: its numbers mean nothing, its time is that of
an `update`. All arrays are donated and returned, so that nothing is copied or allocated. With
`--computed` each step computes its gradients, a small product for each, in memory that XLA
allocates for it.
"""

from __future__ import annotations

import argparse
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

ROUNDS = 25

Held = tuple[Any, Any, Any]
"""Parameters, state and gradients."""

ours, theirs = fusedopt.jax.adamw(1e-4), optax.adamw(1e-4)


def fused_step(params: Any, state: Any, grads: Any) -> Held:
    return *ours.step(params, state, grads), grads


def optax_step(params: Any, state: Any, grads: Any) -> Held:
    updates, state = theirs.update(grads, state, params)
    return optax.apply_updates(params, updates), state, grads


def returned_updates(params: Any, state: Any, grads: Any) -> Held:
    updates, state = ours.step(grads, state, params)
    return optax.apply_updates(params, updates), state, updates


PASS = 28
"""Bytes that a pass of fusedopt moves for an element: it reads four arrays and writes three."""
WAYS = {
    "fusedopt.jax, step": (fused_step, PASS),
    "optax, update and apply_updates": (optax_step, 0),
    "a fused pass that returns updates, and apply_updates": (returned_updates, PASS),
}
"""What takes a step, and the bytes of it that XLA does not count."""


def computing(way: Callable[..., Held]) -> Callable[..., Held]:
    """The step with gradients that it computes, and neither takes nor returns."""

    def gradient(p: Any) -> Any:
        return 1e-3 * (jnp.dot(p[:, :4], p[:4]) if p.ndim > 1 else p)

    def step(params: Any, state: Any, grads: Any) -> Held:
        return *way(params, state, jax.tree.map(gradient, params))[:2], grads

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--computed", action="store_true")
    wrapped = computing if parser.parse_args().computed else lambda way: way
    source = np.random.default_rng(1)
    params, grads = (
        {n: jnp.asarray(source.random(shape, np.float32)) for n, shape in gpt2_small().items()}
        for _ in range(2)
    )
    elements = sum(p.size for p in params.values())
    held: Held = (params, ours.init(params), grads)
    steps = {
        label: jax.jit(wrapped(way), donate_argnums=(0, 1, 2)).lower(*held).compile()
        for label, (way, _) in WAYS.items()
    }
    times: dict[str, list[float]] = {label: [] for label in WAYS}
    for k in range(ROUNDS + 1):
        for label, step in steps.items():
            start = time.perf_counter()
            held = jax.block_until_ready(step(*held))
            if k:
                times[label].append((time.perf_counter() - start) * 1e3)
    _, base, _ = times.values()
    for label, step in steps.items():
        moved = WAYS[label][1] + step.cost_analysis()["bytes accessed"] / elements
        ratio = statistics.median(a / b for a, b in zip(base, times[label], strict=True))
        print(
            f"{label}: {statistics.median(times[label]):.0f} ms, {ratio:.2f} times as fast as"
            f" optax, {moved:.0f} bytes an element"
        )


if __name__ == "__main__":
    main()
