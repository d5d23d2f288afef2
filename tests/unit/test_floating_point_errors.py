"""What rounds on purpose raises nothing under `np.seterr(all="raise")`, which careful users set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo

LOW: tuple[Any, ...] = (np.float16, ml_dtypes.bfloat16)
TINY, HUGE = np.float64(1e-300), np.float64(1e300)


@pytest.fixture(autouse=True)
def errors_raise() -> Iterator[None]:
    with np.errstate(all="raise"):
        yield


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", LOW)
def test_averages_that_underflow_in_their_parameters(dtype: Any, backend: str) -> None:
    p = np.full(100, 6e-8, dtype)
    opt = fo.Optimizer(p, fo.SGD(lr=1.0), ema=0.9, backend=backend)
    opt.step(p.copy())  # the average is now a value that the dtype does not have
    before = p.tobytes()
    with opt.averaged():
        assert np.isfinite(p.astype(np.float32)).all()
    assert p.tobytes() == before


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("g", [TINY, HUGE])
def test_norms_of_gradients_beyond_the_computed_type(backend: str, g: np.float64) -> None:
    p = {"a": np.ones(4), "b": np.ones(4)}
    opt = fo.Optimizer(p, fo.SGD(lr=1.0), clip_norm=1.0, backend=backend)
    info = opt.step({"a": np.full(4, g), "b": np.full(4, 1.0)})
    assert isinstance(info.grad_norm, float)
    np.testing.assert_allclose(info.grad_norm, 2.0 * max(g, 1.0), rtol=1e-12)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_float64_gradients_that_underflow_in_float32(backend: str) -> None:
    p = np.ones(4, np.float32)
    opt = fo.Optimizer(p, fo.SGD(lr=1.0), clip_norm=1.0, backend=backend)
    info = opt.step(np.full(4, 1e-60))
    assert info.grad_norm == 0.0
    np.testing.assert_array_equal(p, 1.0)
