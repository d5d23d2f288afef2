"""Rules that PyTorch, optax and Keras lack, against loops written from their papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fusedopt as fo

STEPS = 12
SHAPES = [(7, 5), (11,), (1,)]


def trajectory(rule: fo.Rule, backend: str) -> list[np.ndarray]:
    """The parameters after all steps, whose gradients turn now and then."""
    rng = np.random.default_rng(3)
    params = [rng.standard_normal(shape) for shape in SHAPES]
    opt = fo.Optimizer(params, rule, backend=backend)
    for _ in range(STEPS):
        opt.step([rng.standard_normal(p.shape) for p in params])
    return params


def expected(step: Callable[..., np.ndarray]) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    params = [rng.standard_normal(shape) for shape in SHAPES]
    memory: list[dict[str, Any]] = [{"m": 0.0, "v": 0.0, "prev": 0.0} for _ in params]
    for t in range(1, STEPS + 1):
        grads = [rng.standard_normal(p.shape) for p in params]
        params = [step(p, g, s, t) for p, g, s in zip(params, grads, memory, strict=True)]
    return params


def cautious_adamw(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    s["m"] = 0.8 * s["m"] + 0.2 * g
    s["v"] = 0.9 * s["v"] + 0.1 * g**2
    u = s["m"] / (1 - 0.8**t) / (np.sqrt(s["v"] / (1 - 0.9**t)) + 1e-6)
    mask = u * g > 0
    return p * (1 - 0.05 * 0.3) - 0.05 * u * mask / max(mask.mean(), 1e-3)


def cautious_lion(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    u = np.sign(0.8 * s["m"] + 0.2 * g)
    s["m"] = 0.9 * s["m"] + 0.1 * g
    mask = u * g > 0
    return p - 0.05 * u * mask / max(mask.mean(), 1e-3) - 0.05 * 0.3 * p


def tiger(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    s["m"] = 0.8 * s["m"] + 0.2 * g
    return p - 0.05 * np.sqrt(np.mean(p**2)) * (np.sign(s["m"]) + 0.3 * p)


def mars(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    c = g + 0.5 * (0.8 / 0.2) * (g - s["prev"])
    s["prev"] = g
    if np.linalg.norm(c) > 1:
        c = c / np.linalg.norm(c)
    s["m"] = 0.8 * s["m"] + 0.2 * c
    s["v"] = 0.9 * s["v"] + 0.1 * c**2
    u = s["m"] / (1 - 0.8**t) / (np.sqrt(s["v"] / (1 - 0.9**t)) + 1e-6)
    return p - 0.05 * (u + 0.3 * p)


def cautious_decay(p: Any, u: Any) -> Any:
    """Chen et al. 2025: p := p - lr (u + lambda p [u p >= 0])."""
    return p - 0.05 * (u + 0.3 * p * (u * p >= 0))


def adamw_of_cautious_decay(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    s["m"] = 0.8 * s["m"] + 0.2 * g
    s["v"] = 0.9 * s["v"] + 0.1 * g**2
    u = s["m"] / (1 - 0.8**t) / (np.sqrt(s["v"] / (1 - 0.9**t)) + 1e-6)
    return cautious_decay(p, u)


def lion_of_cautious_decay(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    u = np.sign(0.8 * s["m"] + 0.2 * g)
    s["m"] = 0.9 * s["m"] + 0.1 * g
    return cautious_decay(p, u)


def momentum_of_cautious_decay(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    s["m"] = 0.9 * s["m"] - 0.1 * g  # maximised
    return cautious_decay(p, s["m"])


COMMON: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.3}
BETAS: dict[str, Any] = {**COMMON, "betas": (0.8, 0.9)}
PAIRS: list[tuple[fo.Rule, Callable[..., Any]]] = [
    (fo.CautiousAdamW(eps=1e-6, **BETAS), cautious_adamw),
    (fo.CautiousLion(**BETAS), cautious_lion),
    (fo.AdamW(eps=1e-6, decay="cautious", **BETAS), adamw_of_cautious_decay),
    (fo.Lion(decay="cautious", **BETAS), lion_of_cautious_decay),
    (
        fo.Momentum(momentum=0.9, maximize=True, decay="cautious", **COMMON),
        momentum_of_cautious_decay,
    ),
    (fo.Tiger(beta=0.8, **COMMON), tiger),
    (fo.MARS(eps=1e-6, gamma=0.5, decay="decoupled", **BETAS), mars),
]


@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
@pytest.mark.parametrize(("rule", "step"), PAIRS, ids=lambda x: getattr(x, "name", ""))
def test_trajectories(rule: fo.Rule, step: Callable[..., Any], backend: str) -> None:
    if backend == "numba":
        pytest.importorskip("numba")
    for got, want in zip(trajectory(rule, backend), expected(step), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_a_parameter_of_zeros_moves() -> None:
    p = np.zeros(3)
    fo.Optimizer(p, fo.Tiger(lr=0.5)).step(np.array([1.0, -1.0, 0.0]))
    assert p.tolist() == [-0.5, 0.5, 0.0]


def test_where_nothing_agrees_nothing_moves() -> None:
    p = np.ones(4, np.float32)
    opt = fo.Optimizer(p, fo.CautiousLion(lr=0.5))
    opt.step(np.full(4, 1.0, np.float32))
    before = p.copy()
    opt.step(np.full(4, -1e-3, np.float32))  # the momentum still points the other way
    assert np.array_equal(p, before)


# Schedule-Free: the average, at which it is evaluated, and z, which its states do not hold.


@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
@pytest.mark.parametrize("weights", [{}, {"warmup_steps": 5, "r": 0.5, "weight_lr_power": 1.0}])
@pytest.mark.parametrize("adam", [False, True])
def test_schedule_free(adam: bool, weights: dict[str, Any], backend: str) -> None:
    if backend == "numba":
        pytest.importorskip("numba")
    beta, rng = 0.7, np.random.default_rng(5)
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.2, **weights}
    rule = (
        fo.ScheduleFreeAdamW(betas=(beta, 0.9), eps=1e-6, **options)
        if adam
        else fo.ScheduleFreeSGD(momentum=beta, **options)
    )
    y = rng.standard_normal(9)
    opt = fo.Optimizer({"w": y}, rule, backend=backend)
    z, x = y.copy(), y.copy()
    v, total = np.zeros(9), 0.0
    for t in range(1, 15):
        g, at = rng.standard_normal(9), (1 - beta) * z + beta * x
        np.testing.assert_allclose(y, at, rtol=1e-10, atol=1e-12)
        v = 0.9 * v + 0.1 * g**2
        u = (g / (np.sqrt(v / (1 - 0.9**t)) + 1e-6) if adam else g) + 0.2 * at
        rate = 0.1 * min(1.0, t / weights.get("warmup_steps", 1))
        weight = t ** weights.get("r", 0.0) * rate ** weights.get("weight_lr_power", 2.0)
        total += weight
        z = z - rate * u
        x = (1 - weight / total) * x + weight / total * z
        opt.step({"w": g})
        before = y.tobytes()
        with opt.averaged() as params:
            assert params["w"] is y
            np.testing.assert_allclose(y, x, rtol=1e-9, atol=1e-11)
        assert y.tobytes() == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float8", "dynamic8"])
def test_schedule_free_in_low_precision_has_an_average_and_restores_it(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal(5000).astype(np.float32), "b": np.ones(3, np.float32)}
    rules = {"w": fo.ScheduleFreeAdamW(lr=0.01), "b": fo.SGD()}
    opt = fo.Optimizer(params, rules, state_dtype=dtype)
    for _ in range(30):
        opt.step({k: p.copy() for k, p in params.items()})  # of half the square
    before = {k: p.tobytes() for k, p in params.items()}
    with opt.averaged():
        assert params["w"].tobytes() != before["w"]
        assert params["b"].tobytes() == before["b"]  # its rule has no average
    assert {k: p.tobytes() for k, p in params.items()} == before


def test_a_run_of_schedule_free_goes_on_from_a_file(tmp_path: Any) -> None:
    rule = fo.ScheduleFreeAdamW(lr=0.1, warmup_steps=4, r=0.5)
    grads = np.random.default_rng(1).standard_normal((8, 6))
    p, q = np.ones(6), np.ones(6)
    opt = fo.Optimizer(p, rule)
    for g in grads[:3]:
        opt.step(g)
    opt.save(tmp_path / "run.safetensors")
    other = fo.Optimizer(q, fo.ScheduleFreeAdamW(lr=0.1, warmup_steps=4, r=0.5))
    other.load(tmp_path / "run.safetensors")
    for g in grads[3:]:
        opt.step(g)
        other.step(g)
    assert opt.fingerprint() == other.fingerprint()


def test_refusals_of_schedule_free() -> None:
    with pytest.raises(ValueError, match="stands for a schedule and takes none"):
        fo.ScheduleFreeAdamW(lr=fo.schedules.Cosine(1e-3, 10))
    with pytest.raises(ValueError, match="needs a momentum above 0"):
        fo.ScheduleFreeSGD(momentum=0.0)
    with pytest.raises(ValueError, match="take ScheduleFreeAdamW"):
        fo.Optimizer(np.ones(3), fo.SGD()).averaged()
