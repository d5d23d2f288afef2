"""Gradients added up over micro-batches."""

from __future__ import annotations

import copy
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from exactness import Array

DTYPES = (np.float32, np.float64, ml_dtypes.bfloat16, np.float16)
BACKENDS = ("native", "numba", "reference")
rng = np.random.default_rng(2)


def tensors(dtype: Any) -> dict[str, Array]:
    shapes = {"w": (130, 200), "b": (70_001,), "s": ()}
    return {k: np.asarray(rng.standard_normal(s)).astype(dtype) for k, s in shapes.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_a_step_takes_the_sum(dtype: Any, backend: str) -> None:
    params = tensors(dtype)
    twin = copy.deepcopy(params)
    opt = fo.Optimizer(params, fo.AdamW(), clip_norm=1.0, backend=backend)
    want = fo.Optimizer(twin, fo.AdamW(), clip_norm=1.0, backend=backend)
    wide = np.float64 if dtype is np.float64 else np.float32
    for _ in range(3):
        batches = [tensors(dtype) for _ in range(3)]
        assert [opt.accumulate(b) for b in batches] == [1, 2, 3]
        total = {k: batches[0][k].astype(wide) for k in params}
        for batch in batches[1:]:
            total = {k: np.asarray(t + batch[k].astype(wide)) for k, t in total.items()}
        assert opt.step(grad_scale=3) == want.step(total, grad_scale=3)
        assert opt.fingerprint() == want.fingerprint()


def test_leaves_that_had_no_gradient_take_no_part() -> None:
    params = tensors(np.float32)
    opt = fo.Optimizer(params, fo.SGD(lr=1.0))
    before = copy.deepcopy(params)
    one, two = tensors(np.float32), tensors(np.float32)
    opt.accumulate({**one, "w": None, "s": None})
    opt.accumulate({**two, "w": None})
    opt.step()
    assert params["w"].tobytes() == before["w"].tobytes()
    assert params["s"] == before["s"] - two["s"]
    np.testing.assert_array_equal(params["b"], before["b"] - (one["b"] + two["b"]))


def test_a_skipped_step_and_a_refused_one_consume_them() -> None:
    good, bad = tensors(np.float32), tensors(np.float32)
    bad["b"][3] = math.inf
    for options in ({"skip_nonfinite": True}, {"clip_norm": 1.0}):
        params = tensors(np.float32)
        opt = fo.Optimizer(params, fo.SGD(lr=1.0), **options)
        before = opt.fingerprint()
        opt.accumulate(bad)
        if "clip_norm" in options:
            with pytest.raises(FloatingPointError, match="b"):
                opt.step()
        else:
            assert opt.step().bad_leaves == ("b",)
        assert opt.fingerprint() == before
        opt.accumulate(good)  # what was there, NaN or not, is of no account
        opt.step()
        assert all(np.isfinite(p).all() for p in params.values())


def test_zero_grads_zeroes_what_was_added() -> None:
    params, one, two = tensors(np.float32), tensors(np.float32), tensors(np.float32)
    twin = copy.deepcopy(params)
    opt = fo.Optimizer(params, fo.SGD(lr=1.0), zero_grads=True)
    total = {k: np.asarray(one[k] + two[k]) for k in one}
    opt.accumulate(one)
    opt.accumulate(two)
    assert not any(g.any() for g in (*one.values(), *two.values()))
    opt.step()
    fo.Optimizer(twin, fo.SGD(lr=1.0)).step(total)
    for k, p in params.items():
        assert p.tobytes() == twin[k].tobytes()
    with pytest.raises(ValueError, match="shares memory with params"):
        opt.accumulate(params)
    assert params["w"].any()


def test_what_does_not_go_together() -> None:
    params, grads = tensors(np.float32), tensors(np.float32)
    opt = fo.Optimizer(params, fo.Adam())
    with pytest.raises(RuntimeError, match=r"nothing was accumulated; call accumulate\(grads\)"):
        opt.step()
    opt.step(grads)
    opt.accumulate(grads)
    with pytest.raises(RuntimeError, match=r"accumulated gradients are waiting"):
        opt.step(grads)
    with pytest.raises(RuntimeError, match=r"accumulated gradients would be lost"):
        opt.state_dict()
    with pytest.raises(ValueError, match=r"grads\['b'\]: expected the shape \(70001,\)"):
        opt.accumulate({**grads, "b": np.ones(3, np.float32)})
    opt.step()
    opt.step(grads)
    assert opt.step_count == 3


def test_arrays_may_move_in_between() -> None:
    params, grads = tensors(np.float32), tensors(np.float32)
    opt = fo.Optimizer(params, fo.SGD(lr=1.0))
    opt.accumulate(grads)
    moved = {k: p.copy() for k, p in params.items()}
    opt.rebind(moved)
    opt.accumulate(grads)
    opt.step()
    for k, p in moved.items():
        np.testing.assert_array_equal(p, params[k] - (grads[k] + grads[k]))


def test_sophia_takes_its_estimate_with_the_sum() -> None:
    p, q, g, h = (rng.standard_normal(5000).astype(np.float32) for _ in range(4))
    q[:] = p
    opt, want = fo.Optimizer(p, fo.Sophia()), fo.Optimizer(q, fo.Sophia())
    opt.accumulate(g)
    opt.step(hessian=h)
    want.step(g, hessian=h)
    assert opt.fingerprint() == want.fingerprint()
