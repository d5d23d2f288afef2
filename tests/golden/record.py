"""Records trajectories of the optimizers of PyTorch, optax and Keras into ``libraries.json``.

Run it in an environment that holds the libraries (torch, jax, optax, keras) and NumPy:

    cd tests && python -m golden.record [RULE ...]

With names of rules only their cases are recorded, and the others stay as they are. The tests read
only the file. Each case names the library's own function and arguments, and the hyperparameters,
in fusedopt's names, that are to give the same trajectory.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from golden import problem
from golden.cases import CASES, Case

FILE = Path(__file__).with_name("libraries.json")

KEY = ("library", "rule", "variant")

Step = Callable[[int, problem.Tree], problem.Tree]


def torch_step(case: Case, start: problem.Tree) -> Step:
    """A step of an optimizer of ``torch.optim`` on float64 tensors."""
    torch = importlib.import_module("torch")
    tensors = {name: torch.tensor(p) for name, p in start.items()}
    optimizer = getattr(torch.optim, case.function)(tensors.values(), **case.arguments())

    def step(t: int, grads: problem.Tree) -> problem.Tree:
        if case.schedule:
            optimizer.param_groups[0]["lr"] = case.lr(t)
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(grads[name])
        optimizer.step()
        return {name: tensor.numpy().copy() for name, tensor in tensors.items()}

    return step


def optax_transformation(case: Case) -> Any:
    """The transformation of ``optax`` or ``optax.contrib``, for float64 arrays."""
    jax = importlib.import_module("jax")
    optax = importlib.import_module("optax")
    contrib = importlib.import_module("optax.contrib")
    jax.config.update("jax_enable_x64", True)
    arguments = case.arguments()
    if case.schedule:
        rates = jax.numpy.array([case.lr(t + 1) for t in range(problem.STEPS)])
        arguments["learning_rate"] = rates.__getitem__
    if case.rule == "sophia":
        hook = optax.GradientTransformationExtraArgs(
            lambda params: optax.EmptyState(),
            lambda updates, state, params, *, curvature: (curvature, state),
        )
        arguments |= {"hessian_diagonal_fn": hook, "update_interval": problem.HESSIAN_EVERY}
    if case.rule == "muon":
        # Matrices are (output, input) here, as they are in PyTorch; optax takes the reverse.
        axes = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
        arguments["muon_weight_dimension_numbers"] = dict.fromkeys(problem.MATRICES, axes)
    make = getattr(optax, case.function, None) or getattr(contrib, case.function)
    return make(**arguments)


def optax_step(case: Case, start: problem.Tree) -> Step:
    """A step of such a transformation."""
    optimizer = optax_transformation(case)
    jax = importlib.import_module("jax")
    optax = importlib.import_module("optax")
    params = {name: jax.numpy.array(p) for name, p in start.items()}
    state = optimizer.init(params)

    def step(t: int, grads: problem.Tree) -> problem.Tree:
        nonlocal params, state
        extra = {"curvature": problem.curvature(case.rule, t)} if case.rule == "sophia" else {}
        updates, state = optimizer.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return {name: np.array(p) for name, p in params.items()}

    return step


def keras_step(case: Case, start: problem.Tree) -> Step:
    """A step of an optimizer of ``keras.optimizers`` on float64 variables, on the JAX backend."""
    os.environ["KERAS_BACKEND"] = "jax"
    importlib.import_module("jax").config.update("jax_enable_x64", True)
    keras = importlib.import_module("keras")
    keras.config.set_floatx("float64")
    variables = {name: keras.Variable(p, dtype="float64") for name, p in start.items()}
    optimizer = getattr(keras.optimizers, case.function)(**case.arguments())
    optimizer.build(list(variables.values()))

    def step(t: int, grads: problem.Tree) -> problem.Tree:
        if case.schedule:
            optimizer.learning_rate = case.lr(t)
        optimizer.apply([keras.ops.convert_to_tensor(grads[name]) for name in variables])
        return {name: np.array(variable.value) for name, variable in variables.items()}

    return step


MAKERS = {"torch": torch_step, "optax": optax_step, "keras": keras_step}


def record(case: Case) -> dict[str, Any]:
    """Run a case and return its entry of the file."""
    step = MAKERS[case.library](case, problem.parameters(case.rule))
    after: dict[int, dict[str, Any]] = {}
    for t in range(1, problem.STEPS + 1):
        params = step(t, problem.gradients(case.rule, t))
        assert all(p.dtype == np.float64 for p in params.values())
        if t in problem.SNAPSHOTS:
            after[t] = {name: p.tolist() for name, p in params.items()}
    call = ", ".join(f"{name}={value!r}" for name, value in case.arguments().items())
    return {
        "library": case.library,
        "version": importlib.import_module(case.library).__version__,
        "call": f"{case.function}({call})",
        "rule": case.rule,
        "variant": case.variant,
        "hyperparameters": case.hyperparameters,
        "schedule": case.schedule,
        "tolerance": case.tolerance,
        "after": after,
    }


def main(rules: Sequence[str]) -> None:
    """Write the file, one line for every value of a case."""
    known = {tuple(entry[name] for name in KEY): entry for entry in json.loads(FILE.read_text())}
    entries = []
    for case in CASES:
        anew = not rules or case.rule in rules
        entry = record(case) if anew else known[tuple(getattr(case, name) for name in KEY)]
        lines = [f'"{name}": {json.dumps(value)}' for name, value in entry.items()]
        entries.append("{" + ",\n ".join(lines) + "}")
    FILE.write_text("[\n" + ",\n".join(entries) + "\n]\n")


if __name__ == "__main__":
    main(sys.argv[1:])
