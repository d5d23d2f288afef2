"""Muon's matrices: shapes, layouts, buffers, and the accuracy of the products."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from fusedopt.bounded import MATRIX_FACTOR
from fusedopt.newton_schulz import Workspace

KELLER = (3.4445, -4.7750, 2.0315)
RNG = np.random.default_rng(0)


def textbook(u: np.ndarray, steps: int = 5) -> np.ndarray:
    return fo.Muon(ns_steps=steps, scale="none").orthogonalized(u.astype(np.float64))


def orthogonalize(u: np.ndarray, steps: int = 5) -> np.ndarray:
    result = u.copy()
    Workspace([u.shape], u.dtype).orthogonalize(result, [KELLER] * steps, 1e-30, 1.0)
    return result


INPUTS: dict[str, np.ndarray] = {
    "gaussian": RNG.standard_normal((96, 384)),
    "square": RNG.standard_normal((200, 200)),
    "rank one": np.outer(RNG.standard_normal(300), RNG.standard_normal(200)),
    "low rank": RNG.standard_normal((128, 5)) @ RNG.standard_normal((5, 256)),
    "power law": (RNG.standard_normal((96, 96)) / np.arange(1, 97) ** 1.5)
    @ RNG.standard_normal((96, 384)),
    "orthonormal": np.linalg.qr(RNG.standard_normal((256, 64)))[0],
    "one row": RNG.standard_normal((1, 50)),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e-36, 1e30])
@pytest.mark.parametrize("transposed", [False, True])
def test_accuracy(name: str, size: float, transposed: bool) -> None:
    u = INPUTS[name] / np.abs(INPUTS[name]).max() * size
    u = (u.T if transposed else u).astype(np.float32)
    expected = textbook(u)
    # Rounding is amplified by the slope of the map at zero, a^5 = 485; see MATRIX_FACTOR.
    bound = MATRIX_FACTOR * 485 * 2.0**-24 * np.abs(expected).max()
    assert np.abs(orthogonalize(u) - expected).max() <= bound


def test_singular_values() -> None:
    values = np.linalg.svd(orthogonalize(INPUTS["gaussian"].astype(np.float32)), compute_uv=False)
    assert 0.68 < values.min() <= values.max() < 1.14


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zero_stays_zero_and_nan_shows(dtype: Any) -> None:
    u = np.zeros((4, 6), dtype)
    np.testing.assert_array_equal(orthogonalize(u), 0)
    for bad in (np.nan, np.inf, -np.inf):
        u[1, 1] = bad
        with np.errstate(invalid="ignore"):
            assert np.isnan(orthogonalize(u)).any()
    tiny = np.full((3, 4), np.finfo(dtype).smallest_subnormal)
    assert (orthogonalize(tiny) > 0).all()  # far below eps: small, and in its direction


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (5, 3, 3, 3), (2, 3, 4), (7, 7), (1, 1)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_filters_are_flattened(shape: tuple[int, ...], order: Any, backend: str) -> None:
    g = np.asarray(np.random.default_rng(1).standard_normal(shape), order=order)
    p = np.zeros(shape, order=order)
    fo.Optimizer(p, fo.Muon(lr=1.0, nesterov=False), backend=backend).step(g)
    rows = shape[0]
    cols = g.size // rows
    expected = max(1, rows / cols) ** 0.5 * textbook(g.reshape(rows, cols))
    np.testing.assert_allclose(-p.reshape(rows, cols), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("scale", "factor"),
    [("original", 2.0), ("match_rms_adamw", 0.2 * 4.0), ("spectral", 2.0), ("none", 1.0)],
)
def test_scales(scale: Any, factor: float) -> None:
    assert fo.Muon(scale=scale).factor(16, 4) == pytest.approx(factor)
    assert fo.Muon(scale="original").factor(4, 16) == 1.0
    assert fo.Muon(scale="spectral").factor(4, 16) == 0.5


def test_buffers_are_made_once_and_shared() -> None:
    shapes = [(8, 20), (30, 5), (12, 12)]
    params = [np.zeros(s, np.float32) for s in shapes]
    opt = fo.Optimizer(params, fo.Muon())
    assert opt._plan.work_bytes == fo.estimate(params, fo.Muon()).work == 4 * (3 * 160 + 2 * 144)
    apart = []
    for s in shapes:
        alone = np.zeros(s, np.float32)
        fo.Optimizer(alone, fo.Muon()).step(np.cos(np.arange(alone.size)).reshape(s))
        apart.append(alone)
    opt.step([np.cos(np.arange(p.size)).reshape(p.shape) for p in params])
    for p, alone in zip(params, apart, strict=True):
        np.testing.assert_array_equal(p, alone)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (40, 10, 5, 5)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_products_allocate_nothing(shape: tuple[int, ...], order: Any) -> None:
    # They come when other matrices have been updated already: too late to run out of memory.
    p = np.zeros(shape, np.float32, order=order)
    opt = fo.Optimizer(p, fo.Muon())
    g = np.asarray(np.random.default_rng(2).standard_normal(shape), np.float32, order=order)
    opt.step(g)
    tracemalloc.start()
    opt.step(g)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000


def test_decay_is_not_scaled_by_the_shape() -> None:
    p = np.ones((16, 4))
    fo.Optimizer(p, fo.Muon(lr=0.5, weight_decay=0.1)).step(np.zeros((16, 4)))
    np.testing.assert_allclose(p, 0.95, rtol=1e-15)
