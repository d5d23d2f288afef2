"""Norms of gradients: values, bits, and arrays that would overflow them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from exactness import PART, SERIAL, Array
from fusedopt.arrays.formats import SEGMENT
from fusedopt.backends import BACKENDS, ON_HOST
from fusedopt.system.extension import core
from fusedopt.system.isa import isas

DTYPES = (np.float32, np.float64, ml_dtypes.bfloat16, np.float16)
HOST = [name for name in ON_HOST if BACKENDS[name].unavailable() is None]
SIZES = (0, 1, 15, 17, 255, 257, SEGMENT - 1, SEGMENT + 1, 100_003, SERIAL + 4321)

rng = np.random.default_rng(7)


def test_segments_are_those_of_the_core() -> None:
    assert core.sizes["SEGMENT"] == SEGMENT


def in_lanes(x: Array) -> float:
    """The sum of squares in the order that csrc/table.h promises, in plain NumPy."""
    total = 0.0
    squares = x.astype(np.float64).ravel("K") ** 2
    for start in range(0, squares.size, SEGMENT):
        lanes = np.zeros(16)
        for row in range(start, min(start + SEGMENT, squares.size), 16):
            part = squares[row : min(row + 16, start + SEGMENT)]
            lanes[: part.size] += part
        while lanes.size > 1:
            lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
        total += lanes[0]
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("isa", isas())
def test_bits_are_those_of_the_promised_order(isa: str, dtype: Any) -> None:
    before = fo.get_isa()
    fo.set_isa(isa)
    try:
        for n in SIZES:
            x = rng.standard_normal(n).astype(dtype)
            assert fo.global_norm(x) == math.sqrt(in_lanes(x)), n
    finally:
        fo.set_isa(before)


def test_bits_do_not_depend_on_threads_or_order() -> None:
    arrays = [rng.standard_normal(n).astype(np.float32) for n in (3, PART + 7, SERIAL, 999, 0)] * 3
    before = fo.get_threads()
    found = set()
    try:
        for threads in (1, 2, 3):
            fo.set_threads(threads)
            for _ in range(4):
                rng.shuffle(arrays)
                found.add(fo.global_norm(arrays))
                found.add(fo.global_norm({"x": arrays[:4], "y": (arrays[4:], None)}))
    finally:
        fo.set_threads(before)
    assert len(found) == 1
    exact = math.sqrt(math.fsum(float(x) ** 2 for a in arrays for x in a))
    assert found.pop() == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("exponent", [-1074, -1022, -600, -500, 0, 400, 511, 512, 700, 1000])
def test_no_float64_overflows_or_vanishes(exponent: int) -> None:
    base = np.rint(rng.standard_normal(2000) * 8)  # a few bits, so that denormals hold them
    x = np.ldexp(base, exponent)
    want = math.sqrt(math.fsum(b * b for b in base))
    found = fo.global_norm([x, np.array([0.0], np.float32), np.zeros(5)])
    assert found == pytest.approx(math.ldexp(want, exponent), rel=1e-14)


def test_leaves_of_very_different_size() -> None:
    small = np.array([1], np.float32)
    assert fo.global_norm([np.array([3e300]), np.array([4e300]), small]) == 5e300
    assert fo.global_norm([np.array([1e-200]), np.array([3, 4], np.float32)]) == 5.0
    assert fo.global_norm([np.full(4, 1.7e308)]) == math.inf  # the norm itself is beyond float64


def test_infinities_and_nans_show() -> None:
    for dtype in DTYPES:
        x = np.ones(1000, dtype)
        x[777] = -np.inf
        assert fo.global_norm([np.ones(3), x]) == math.inf
        x[3] = np.nan
        assert math.isnan(fo.global_norm([np.ones(3), x]))


@pytest.mark.parametrize("backend", HOST)
@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_gradients_of_zero_denormal_and_huge_size_are_clipped_rightly(
    dtype: Any, by_group: bool, backend: str
) -> None:
    """Nothing is divided by a norm of zero, and no square overflows or vanishes."""
    limits: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    least, largest = float(limits.smallest_subnormal), min(float(limits.max), 1e38)
    compute: Any = np.float64 if dtype is np.float64 else np.float32
    for size, n in itertools.product((0.0, least, 100 * least, largest / 2, largest), (1, 1000)):
        g = np.where(np.arange(n) % 2, size, -size).astype(dtype)
        wide: Array = g.astype(np.float64)
        peak = float(np.abs(wide).max())
        norm = peak * math.sqrt(math.fsum((wide / (peak or 1.0)) ** 2))
        for limit in (1.0, 2.0 * norm or 1.0):
            p = {"a": np.zeros(n, compute), "b": np.zeros(3, compute)}
            rules = {name: fo.SGD(lr=1.0) for name in p}
            clip: Any = {"a": limit, "b": 1.0} if by_group else limit
            opt = fo.Optimizer(p, rules, clip_norm=clip, backend=backend)
            info: Any = opt.step({"a": g, "b": np.zeros(3, dtype)})
            found = info.grad_norm["a"] if by_group else info.grad_norm
            scale = info.clip_scale["a"] if by_group else info.clip_scale
            assert found == pytest.approx(norm, rel=1e-14)
            assert scale == (limit / found if found > limit else 1.0)
            if scale == 1.0:
                np.testing.assert_array_equal(p["a"], -wide.astype(compute))
            else:
                # The factor is rounded to the compute type, where it may be denormal.
                ulp = np.finfo(compute)
                bound = 2 * float(ulp.eps) + float(ulp.smallest_subnormal) / scale
                np.testing.assert_allclose(p["a"], -wide * scale, rtol=bound)
            assert not p["b"].any()


def test_any_layout_and_nothing_at_all() -> None:
    x = rng.standard_normal((40, 50)).astype(np.float32)
    for view in (x.T, x[::2, ::3], x[::-1], np.asfortranarray(x), x[:, 3]):
        want = np.linalg.norm(view.astype(np.float64))
        assert fo.global_norm(view) == pytest.approx(want, rel=1e-14)
    assert fo.global_norm({}) == fo.global_norm([None, np.zeros(0)]) == 0.0
    assert fo.global_norm(np.array(-3.0)) == 3.0


def test_what_is_no_gradient() -> None:
    with pytest.raises(TypeError, match=r"grads\['w'\]\[1\]: expected an ndarray, got a float"):
        fo.global_norm({"w": [None, 1.0]})
    with pytest.raises(TypeError, match=r"grads: expected float32.* got int64"):
        fo.global_norm(np.zeros(3, np.int64))
