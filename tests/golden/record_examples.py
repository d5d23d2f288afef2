"""Records trajectories of the optimizers of optax that ``fusedopt.examples`` has too into
``examples.json``, as ``record.py`` does for the registry:

    cd tests && python -m golden.record_examples
"""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from golden import problem

FILE = Path(__file__).with_name("examples.json")
B1, B3, ALPHA, WARMUP = 0.8, 0.99, 4.0, 12


def share(count: Any) -> Any:
    """Return the share of the warmup in the step after `count` others."""
    numpy = importlib.import_module("jax").numpy
    return numpy.minimum(numpy.float64(count + 1) / WARMUP, 1.0)


def warmed_b3(count: Any) -> Any:
    """The paper's scheduler of beta_3."""
    low, high = math.log(B1), math.log(B3)
    part = share(count)
    return importlib.import_module("jax").numpy.exp(low * high / ((1 - part) * high + part * low))


# (fusedopt's class and arguments, optax's function and arguments)
CASES: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("AdaBelief", {"lr": 0.01}, "adabelief", {"learning_rate": 0.01}),
    (
        "AdaBelief",
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "eps_root": 1e-9},
        "adabelief",
        {"learning_rate": 0.01, "b1": 0.8, "b2": 0.95, "eps": 1e-6, "eps_root": 1e-9},
    ),
    ("ADOPT", {"lr": 0.01}, "adopt", {"learning_rate": 0.01}),
    (
        "ADOPT",
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4},
        "adopt",
        {"learning_rate": 0.01, "b1": 0.8, "b2": 0.95, "eps": 1e-4},
    ),
    (
        "AdEMAMix",
        {"lr": 0.01, "weight_decay": 0.1, "decay": "decoupled"},
        "ademamix",
        {"learning_rate": 0.01, "weight_decay": 0.1},
    ),
    (
        "AdEMAMix",
        {"lr": 0.01, "b1": B1, "b3": B3, "alpha": ALPHA, "warmup": WARMUP},
        "ademamix",
        {
            "learning_rate": 0.01,
            "b1": B1,
            "b3": warmed_b3,
            "alpha": lambda count: ALPHA * share(count),
        },
    ),
]


def record(function: str, arguments: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The parameters after some of the steps."""
    jax, optax = (importlib.import_module(name) for name in ("jax", "optax"))
    jax.config.update("jax_enable_x64", True)
    contrib = importlib.import_module("optax.contrib")
    make = getattr(optax, function, None) or getattr(contrib, function)
    optimizer = make(**arguments)
    params = {name: jax.numpy.array(p) for name, p in problem.parameters("").items()}
    state = optimizer.init(params)
    after: dict[int, dict[str, Any]] = {}
    for t in range(1, problem.STEPS + 1):
        updates, state = optimizer.update(problem.gradients("", t), state, params)
        params = optax.apply_updates(params, updates)
        if t in problem.SNAPSHOTS:
            assert all(p.dtype == np.float64 for p in params.values())
            after[t] = {name: np.array(p).tolist() for name, p in params.items()}
    return after


def main() -> None:
    """Writes the file, a line for each case."""
    version = importlib.import_module("optax").__version__
    lines = [
        json.dumps({"rule": rule, "arguments": own, "optax": version, "after": record(f, a)})
        for rule, own, f, a in CASES
    ]
    FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
