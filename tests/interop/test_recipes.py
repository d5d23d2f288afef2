"""The pages of docs/ways-in run, and what they train is trained."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when Keras is imported
os.environ.setdefault("DEV", "PYTHON")  # tinygrad's device that needs no compiler
PAGES = Path(__file__).parents[2] / "docs" / "ways-in"
pytestmark = pytest.mark.filterwarnings("ignore")  # of the clients


def recipes() -> Iterator[Any]:
    """(page and heading, code) of each piece of Python."""
    for page in ("jax", "numpy-frameworks", "pytorch", "spacy"):
        heading = page
        text = (PAGES / f"{page}.md").read_text()
        for found in re.finditer(r"^#+ ([^\n]*)$|```python\n(.*?)```", text, re.M | re.S):
            if found[1]:
                heading = found[1]
            else:
                yield pytest.param(found[2], id=f"{page}: {heading}")


def run(code: str) -> dict[str, Any]:
    """What the code defines; skips where its framework is not installed."""
    for name in re.findall(r"^(?:import|from) (\w+)", code, re.M):
        if name != "fusedopt":
            pytest.importorskip(name)
    if "fusedopt.jax" in code:
        pytest.importorskip("fusedopt._jax")
    found: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "recipe", "exec", dont_inherit=True), found)
    return found


@pytest.mark.parametrize("code", list(recipes()))
def test_it_runs(code: str) -> None:
    assert run(code)


@pytest.mark.parametrize("code", list(recipes()))
def test_it_is_short(code: str) -> None:
    lines = [line for line in code.splitlines() if line and not re.match("import|from", line)]
    assert 2 <= len(lines) <= 12


def recipe(heading: str) -> str:
    (code,) = [r.values[0] for r in recipes() if r.id.endswith(f": {heading}")]
    return str(code)


def test_autograd_is_its_own_adam() -> None:
    found = run(recipe("autograd"))
    from autograd import grad
    from autograd.misc.optimizers import adam

    start = {"w": np.ones((3, 2)), "b": np.zeros(2)}
    gradient = grad(found["loss"])
    expected = adam(lambda p, _: gradient(p, np.eye(3)), start, num_iters=50, step_size=0.1)
    assert all(np.allclose(found["params"][k], expected[k], rtol=1e-9) for k in start)


def test_the_mlp_is_its_own_adam() -> None:
    found = run(recipe("scikit-learn's MLP"))
    from sklearn.neural_network import MLPRegressor
    from sklearn.neural_network._stochastic_optimizers import AdamOptimizer

    x, y = found["x"], found["y"]
    model = MLPRegressor(hidden_layer_sizes=(8,), batch_size=64, random_state=0)
    model.partial_fit(x, y)
    model._optimizer = AdamOptimizer(model.coefs_ + model.intercepts_)
    for _ in range(20):
        model.partial_fit(x, y)
    for p, q in zip(found["model"].coefs_, model.coefs_, strict=True):
        assert np.allclose(p, q, rtol=1e-9)


def test_mlx_is_its_own_adam() -> None:
    found = run(recipe("MLX"))
    mx = found["mx"]
    optimizers = pytest.importorskip("mlx.optimizers")

    params = {"w": mx.ones((3, 2)), "b": mx.zeros(2)}
    opt = optimizers.Adam(0.1, bias_correction=True)
    for _ in range(50):
        params = opt.apply_gradients(found["gradient"](params), params)
        mx.eval(params)
    for name, p in found["params"].items():
        assert np.allclose(np.array(p), np.array(params[name]), rtol=1e-4, atol=1e-6)


def test_pennylane_is_its_own_adam() -> None:
    found = run(recipe("PennyLane"))
    opt = found["qml"].AdamOptimizer(0.05)
    angles = found["pnp"].array([0.5, 0.1], requires_grad=True)
    for _ in range(20):
        angles = opt.step(found["circuit"], angles)
    assert np.allclose(found["angles"], angles, rtol=1e-9)


def test_keras_is_its_own_adam() -> None:
    found = run(recipe("Keras 3 on torch"))
    keras, torch = found["keras"], found["torch"]
    keras.utils.set_random_seed(0)
    net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    opt = keras.optimizers.Adam(1e-2)
    for _ in range(50):
        net.zero_grad()
        (net(torch.eye(3)) ** 2).sum().backward()
        with torch.no_grad():
            opt.apply([v.value.grad for v in net.trainable_variables], net.trainable_variables)
    for p, v in zip(found["params"], net.trainable_variables, strict=True):
        assert torch.allclose(p, v.value, rtol=1e-4, atol=1e-6)


def test_tinygrad_sees_the_steps() -> None:
    found = run(recipe("tinygrad"))
    from tinygrad import Context, Tensor
    from tinygrad.nn.optim import Adam

    w = Tensor(np.ones((3, 2), np.float32)).realize()
    opt = Adam([w], lr=0.1)
    with Context(TRAINING=1):
        for _ in range(10):
            opt.zero_grad()
            (w.tanh() ** 2).sum().backward()
            opt.step()
    # Its corrections are in float32: 1 - 0.999 has four digits there.
    assert np.allclose(found["w"].numpy(), w.numpy(), rtol=0, atol=1e-4)


def test_evolution_arrives() -> None:
    assert np.allclose(run(recipe("Evolution strategies"))["theta"], 1.0, atol=0.2)


def test_pymc_finds_the_mode() -> None:
    assert np.allclose(run(recipe("PyMC"))["point"]["mu"], 6 / 3.01, atol=1e-2)
