"""Averages of weights: their bits, and the exchange with the parameters."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from exactness import DEFAULTS, Array

N = 33_333
rng = np.random.default_rng(11)


def blended(average: Array, p: Array, ema: float) -> Array:
    """The kernel's arithmetic, in plain NumPy."""
    kind = average.dtype.type
    blend: Array = average + kind(1.0 - ema) * (p.astype(average.dtype) - average)
    return blend


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", DEFAULTS)
def test_bits_of_an_average(name: str, dtype: Any) -> None:
    rule = DEFAULTS[name]
    shape = (111, 300) if rule.program.matrices else (N,)
    p = rng.standard_normal(shape).astype(dtype)
    opt = fo.Optimizer(p, rule, ema=0.97)
    expected = p.copy()
    for _ in range(3):
        opt.step(rng.standard_normal(shape).astype(dtype))
        expected = blended(expected, p, 0.97)
        assert opt.state["params"]["average"].tobytes() == expected.tobytes()


def test_it_follows_the_master() -> None:
    p = rng.standard_normal(N).astype(ml_dtypes.bfloat16)
    opt = fo.Optimizer(p, fo.AdamW(lr=1e-3), ema=0.9, master="float32")
    expected = opt.state["params"]["master"].copy()
    for _ in range(3):
        opt.step(rng.standard_normal(N).astype(np.float32))
        expected = blended(expected, opt.state["params"]["master"], 0.9)
    average = opt.state["params"]["average"]
    assert average.dtype == np.float32
    assert average.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_exchange_is_exact(dtype: Any) -> None:
    params = {
        "w": np.asfortranarray(rng.standard_normal((60, 70))).astype(dtype),
        "b": np.ones(3, dtype),
    }
    grads = {k: rng.standard_normal(p.shape).astype(dtype) for k, p in params.items()}
    grads["b"] = None
    opt = fo.Optimizer(params, fo.Lion(lr=0.1), ema=0.5)
    opt.step(grads)
    own = {k: p.copy() for k, p in params.items()}
    for k, average in opt.averaged().params.items():
        assert average is opt.state[k]["average"]
    with suppress(KeyError), opt.averaged() as inside:
        assert inside is params
        for k, p in params.items():
            want = opt.state[k]["average"].astype(dtype)
            assert p.tobytes("A") == want.tobytes("A")
        assert params["w"].tobytes() != own["w"].tobytes()
        for refused in (
            lambda: opt.step(grads),
            lambda: opt.accumulate(grads),
            opt.sync,
            lambda: opt.averaged().__enter__(),
        ):
            with pytest.raises(RuntimeError, match=r"inside of averaged\(\)"):
                refused()
        raise KeyError
    for k, p in params.items():
        assert p.tobytes() == own[k].tobytes()
    opt.step(grads)


@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("ema", [0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999])
def test_an_average_of_what_does_not_move_stays(backend: str, dtype: Any, ema: float) -> None:
    p = np.random.default_rng(0).standard_normal(5000).astype(dtype)
    opt = fo.Optimizer(p, fo.SGD(lr=0.0), ema=ema, backend=backend)
    for _ in range(50):
        opt.step(np.ones(5000, dtype))
    average = opt.state["params"]["average"]
    assert average.tobytes() == p.astype(average.dtype).tobytes()


def test_without_averages_there_are_none() -> None:
    p = np.full(5, 0.3, np.float32)
    with pytest.raises(ValueError, match=r"make the optimizer with ema=0\.999"):
        fo.Optimizer(p, fo.SGD()).averaged()


def test_it_travels_with_the_state() -> None:
    p, g = np.ones(9, np.float32), np.ones(9, np.float32)
    opt = fo.Optimizer(p, fo.Adam(), ema=0.9)
    opt.step(g)
    saved, there = opt.state_dict(), p.copy()
    opt.step(g)
    q = there.copy()
    twin = fo.Optimizer(q, fo.Adam(), ema=0.9)
    twin.load_state_dict(saved)
    twin.step(g)
    assert twin.fingerprint() == opt.fingerprint()
    with pytest.raises(ValueError, match="average"):
        fo.Optimizer(q, fo.Adam()).load_state_dict(saved)
    estimate = fo.estimate(p, fo.Adam(), ema=0.9)
    assert estimate.states == sum(a.nbytes for a in opt.state["params"].values())
