"""Slow weights, to which parameters return every k steps."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from exactness import DEFAULTS, Array

N = 33_333
BACKENDS = ("native", "numba", "reference")


def problem(dtype: Any, shape: Any = N) -> tuple[Array, list[Array]]:
    rng = np.random.default_rng(5)
    p = rng.standard_normal(shape).astype(dtype)
    return p, [rng.standard_normal(shape).astype(dtype) for _ in range(7)]


def moved(slow: Array, p: Array, alpha: float) -> Array:
    """The kernel's arithmetic, in plain NumPy."""
    result: Array = slow + slow.dtype.type(alpha) * (p - slow)
    return result


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", DEFAULTS)
def test_bits_of_slow_weights(name: str, dtype: Any) -> None:
    rule = DEFAULTS[name]
    p, grads = problem(dtype, (111, 300) if rule.program.matrices else N)
    twin, slow = p.copy(), p.copy()
    opt = fo.Optimizer(p, rule, slow_weights=fo.Lookahead(k=3, alpha=0.3))
    plain = fo.Optimizer(twin, rule)
    for step, g in enumerate(grads, 1):
        opt.step(g)
        plain.step(g)
        if step % 3 == 0:
            twin[...] = slow = moved(slow, twin, 0.3)
        assert p.tobytes() == twin.tobytes(), step
        assert opt.state["params"]["slow_weights"].tobytes() == slow.tobytes(), step


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "stochastic"},
        {"rounding": "kahan"},
        {"master": "float32"},
        {"master": "split16", "state_dtype": "bfloat16"},
        {"state_dtype": "float8", "clip_value": 0.5, "stats": True, "ema": 0.9},
    ],
)
def test_backends_have_the_same_bits(options: dict[str, Any], order: Any) -> None:
    found = set()
    for backend in ("native", "numba"):
        p, grads = problem(ml_dtypes.bfloat16, (111, 300))
        w = p.astype(p.dtype, order=order)
        opt = fo.Optimizer(
            {"w": w, "b": p[0].copy()},
            {"w": fo.AdamW(lr=0.1, weight_decay=0.1), "b": fo.Momentum(lr=0.1, weight_decay=0.1)},
            slow_weights=fo.Lookahead(k=2, alpha=0.75),
            backend=backend,
            **options,
        )
        for g in grads:
            info = opt.step({"w": g, "b": g[0].copy()})
        found.add((opt.fingerprint(), repr(info.stats)))
    assert len(found) == 1


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_reference_agrees(dtype: Any, reset: bool) -> None:
    p, grads = problem(dtype)
    rule = fo.AdamW(lr=0.01, weight_decay=0.1)
    slow = fo.Lookahead(k=2, alpha=0.3, reset=reset)
    verified = fo.Optimizer(p, rule, slow_weights=slow, ema=0.9, verify=True)
    for g in grads:
        verified.step(g)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_trajectory_of_optax(backend: str, reset: bool) -> None:
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    k, alpha, lr = 3, 0.5, 0.05
    p = np.random.default_rng(2).standard_normal(101).astype(np.float32)
    curvature = np.linspace(0.1, 2.0, 101, dtype=np.float32)
    with jax.default_device(jax.devices("cpu")[0]):
        theirs = optax.lookahead(optax.adam(lr), k, alpha, reset_state=reset)
        params = optax.LookaheadParams.init_synced(jax.numpy.array(p))
        state = theirs.init(params)
        opt = fo.Optimizer(
            p,
            fo.Adam.like("optax", lr=lr),
            slow_weights=fo.Lookahead(k=k, alpha=alpha, reset=reset),
            backend=backend,
        )
        for _ in range(8):
            updates, state = theirs.update(params.fast * curvature, state, params)
            params = optax.apply_updates(params, updates)
            opt.step(p * curvature)
            np.testing.assert_allclose(p, params.fast, rtol=0, atol=1e-5)
        ours = opt.state["params"]["slow_weights"]
        np.testing.assert_allclose(ours, params.slow, rtol=0, atol=1e-5)


def test_a_reset_begins_anew() -> None:
    p, grads = problem(np.float32, (64, 128))
    slow = fo.Lookahead(k=2, alpha=0.5, reset=True)
    rules = {"a": fo.AdaGrad(initial_accumulator=0.5), "b": fo.SOAP()}
    params = {"a": p.copy(), "b": p.copy()}
    opt = fo.Optimizer(params, rules, slow_weights=slow, state_dtype="float8")
    fresh = fo.Optimizer({k: q.copy() for k, q in params.items()}, rules, state_dtype="float8")
    for step in range(1, 5):
        opt.step({"a": grads[step], "b": grads[step]})
        saved = opt.state_dict()["leaves"]
        for path, leaf in fresh.state_dict()["leaves"].items():
            same = all(
                a.tobytes() == saved[path]["state"][name].tobytes()
                for name, a in leaf["state"].items()
            )
            assert same == (step % 2 == 0)
            assert saved[path]["t"] == step % 2


def test_steps_that_are_skipped_and_leaves_without_gradients() -> None:
    p, grads = problem(np.float32, 1000)
    params = {"a": p.copy(), "b": p.copy()}
    slow = fo.Lookahead(k=2, alpha=0.5)
    opt = fo.Optimizer(params, fo.SGD(lr=0.1), slow_weights=slow, skip_nonfinite=True)
    opt.step({"a": grads[0], "b": grads[0]})
    before = opt.fingerprint()
    assert opt.step({"a": np.full(1000, np.nan, np.float32), "b": None}).skipped
    assert opt.fingerprint() == before
    apart = params["b"].copy()
    opt.step({"a": grads[1], "b": None})
    state = opt.state
    assert params["a"].tobytes() == state["a"]["slow_weights"].tobytes()
    assert params["b"].tobytes() == apart.tobytes()
    assert state["b"]["slow_weights"].tobytes() == p.tobytes()


@pytest.mark.parametrize("reset", [False, True])
def test_parts_and_accumulated_steps(reset: bool) -> None:
    p, grads = problem(np.float32, 5000)
    slow = fo.Lookahead(k=2, alpha=0.5, reset=reset)
    made = [
        fo.Optimizer({"a": p.copy(), "b": p.copy()}, fo.AdamW(), slow_weights=slow)
        for _ in range(3)
    ]
    whole, parts, summed = made
    for g in grads:
        whole.step({"a": g, "b": g})
        parts.step_part(["b"], [g])
        parts.step_part(["a"], [g], last=True)
        summed.accumulate({"a": g, "b": g})
        summed.step()
    assert len({opt.fingerprint() for opt in made}) == 1


@pytest.mark.parametrize("reset", [False, True])
def test_it_travels(tmp_path: Path, reset: bool) -> None:
    slow = fo.Lookahead(k=3, alpha=0.5, reset=reset)

    def made(p: Array) -> fo.Optimizer:
        return fo.Optimizer(p, fo.AdamW(), slow_weights=slow)

    p, grads = problem(np.float32)
    opt = made(p)
    for g in grads[:4]:
        opt.step(g)
    opt.save(tmp_path / "file")
    loaded = made(np.zeros_like(p))
    loaded.load(tmp_path / "file")
    copies = [loaded, pickle.loads(pickle.dumps(opt))]
    for g in grads[4:]:
        for each in (opt, *copies):
            each.step(g)
    assert {each.fingerprint() for each in copies} == {opt.fingerprint()}
    with pytest.raises(ValueError, match="slow_weights"):
        fo.Optimizer(p.copy(), fo.AdamW()).load(tmp_path / "file")
    on_disk = fo.Optimizer(p, fo.AdamW(), slow_weights=slow, state_path=tmp_path / "states")
    on_disk.load_state_dict(opt.state_dict())
    for each in (opt, on_disk):
        each.step(grads[0])
    estimate = fo.estimate(p, fo.AdamW(), slow_weights=slow)
    assert estimate.states == sum(a.nbytes for a in opt.state["params"].values())
    assert "slow_weights float32" in opt.describe()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"k": 0}, ValueError),
        ({"k": 2.5}, TypeError),
        ({"alpha": 0.0}, ValueError),
        ({"alpha": 1.0}, ValueError),
        ({"reset": 1}, TypeError),
    ],
)
def test_values_that_do_not_fit(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"Lookahead\({next(iter(arguments))}\)"):
        fo.Lookahead(**arguments)


def test_options_that_do_not_go_together() -> None:
    p = np.ones((4, 256), np.float32)
    reset = fo.Lookahead(reset=True)
    with pytest.raises(TypeError, match=r"slow_weights: expected fo\.Lookahead"):
        fo.Optimizer(p, fo.SGD(), slow_weights=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="slow_weights, rounding"):
        fo.Optimizer(p, fo.SGD(), slow_weights=reset, rounding="stochastic")
    with pytest.raises(ValueError, match="slow_weights, exact"):
        fo.Optimizer(p, fo.SGD(), slow_weights=fo.Lookahead(), exact=True)
    opt = fo.Optimizer(p, fo.SGD(), slow_weights=fo.Lookahead())
    with pytest.raises(ValueError, match="return to their slow weights as a whole"):
        opt.step(fo.Rows(np.array([1]), p[:1].copy()))
    assert opt.step_count == 0
    assert (p == 1).all()
