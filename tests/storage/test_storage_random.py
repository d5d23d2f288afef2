"""Stochastic rounding: unbiased, to one of two neighbours, and the same bits everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from exactness import SERIAL, Array, run_python
from formatted import BF16, F16, assert_same, draw, held, on_each_isa
from fusedopt.arrays.formats import STOCHASTIC, random_bits

N = 100_003
HALVES = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
COPY = fo.Momentum(momentum=0.0)
"""A rule whose state is the gradient, which is stored."""


def optimizer(p: Any, dtype: Any, rule: fo.Rule = COPY, **options: Any) -> fo.Optimizer:
    options = {"backend": "native", "rounding": "stochastic", **options}
    return fo.Optimizer(p, rule, state_dtype=np.dtype(dtype).name, **options)


def rounded(x: Array, dtype: Any, steps: int = 1, **options: Any) -> list[Array]:
    """float32 values as they are stored in each of some steps."""
    opt = optimizer(np.zeros_like(x), dtype, **options)
    results = []
    for _ in range(steps):
        opt.step(x)
        results.append(np.array(opt.state["params"]["v"]))
    return results


def neighbours(x: Array, dtype: Any) -> tuple[Array, Array]:
    """The numbers of a dtype next to finite ones: towards zero and away from it, in float64."""
    near = x.astype(dtype)
    code = near.view(np.uint16)
    beyond = np.abs(near.astype(np.float64)) > np.abs(x)
    towards = np.where(beyond, code - np.uint16(1), code)
    exact = towards.view(dtype).astype(np.float64) == x
    away = np.where(exact, towards, towards + np.uint16(1))
    return towards.view(dtype).astype(np.float64), away.view(dtype).astype(np.float64)


def between(dtype: Any) -> Array:
    """float32 values between neighbours, of every magnitude, and of both signs."""
    rng = np.random.default_rng(0)
    limits = np.finfo(np.float16) if dtype == F16 else np.finfo(np.float32)
    magnitudes = [0.01, 0.7, 3.3, 1e3, float(limits.max) / 3, 2 * float(limits.smallest_normal)]
    if dtype == F16:  # float32's own smallest ones are not stored at all
        magnitudes += [2.0**-14 - 2.0**-27, 3e-6, 2e-7, 4e-8, 1e-8]
    values = np.repeat(magnitudes, 4) * rng.uniform(0.9, 1.1, 4 * len(magnitudes))
    signed: Array = values * np.tile([1, -1], values.size // 2)
    return signed.astype(np.float32)


@HALVES
def test_unbiased_between_the_two_neighbours(dtype: Any) -> None:
    """Ten steps: |z| < 5 of each value's mean fails for one right generator in 30000."""
    values = between(dtype)
    x = np.resize(values, N)
    low, high = neighbours(x, dtype)
    assert (low != high).all()
    away = np.zeros(N)
    for result in rounded(x, dtype, steps=10):
        got = result.astype(np.float64)
        assert ((got == low) | (got == high)).all()
        away += got == high
    for k, value in enumerate(values):
        share = (value.astype(np.float64) - low[k]) / (high[k] - low[k])
        trials = 10 * away[k :: values.size].size
        z = (away[k :: values.size].sum() - trials * share) / np.sqrt(trials * share * (1 - share))
        assert abs(z) < 5, f"{value}: {z}"


def test_bits_are_not_correlated() -> None:
    """Half way, so that every bit counts: over places, steps, states and leaves; |z| < 5."""
    x = np.full(N, 1 + 2.0**-8, np.float32)
    opt = optimizer({"a": np.zeros_like(x), "b": np.zeros_like(x)}, BF16, fo.Lion(betas=(0.0, 0.0)))
    signs = []
    for _ in range(2):
        opt.step({"a": x, "b": x})
        signs += [np.where(s["m"] > 1, 1.0, -1.0) for s in opt.state.values()]
    signs += [np.where(rounded(x, BF16, seed=1)[0] > 1, 1.0, -1.0)]
    pairs = [(signs[i], signs[j]) for i in range(5) for j in range(i)]
    pairs += [(s[k:], s[:-k]) for s in signs for k in (1, 2, 8, 16, 64, 256, 512, 4096)]
    pairs += [(s, np.ones(N)) for s in signs]
    for a, b in pairs:
        assert abs((a * b).sum() / np.sqrt(a.size)) < 5


@HALVES
@pytest.mark.parametrize("n", [4097, N])
def test_bits_are_those_of_the_generator(dtype: Any, n: int) -> None:
    x = np.resize(np.concatenate((between(dtype), draw(0, 1000, np.float32))), n)
    x = np.where(np.abs(x) < np.finfo(np.float32).smallest_normal, np.float32(0), x)
    for isa in on_each_isa():
        opt = optimizer(np.zeros_like(x), dtype, seed=3)
        for t in range(3):
            opt.step(x)
            key = opt.leaf_state("params")[1][1].after(t)
            want, _ = STOCHASTIC[dtype.name].encode(x, key)
            assert_same({"v": opt.state["params"]["v"]}, {"v": want}, f"{isa}, step {t}")
        if dtype == BF16:
            by_hand = (x.view(np.uint32) + random_bits(key, n)) >> np.uint32(16)
            np.testing.assert_array_equal(want.view(np.uint16), by_hand)


@HALVES
def test_backends_agree(dtype: Any) -> None:
    x = np.resize(between(dtype), N)
    results = [rounded(x, dtype, backend=backend)[0] for backend in ("native", "reference")]
    assert_same({"v": results[0]}, {"v": results[1]})
    runs = []
    for backend in ("native", "reference"):
        p = np.zeros(N, dtype)
        opt = optimizer(p, dtype, fo.SGD(lr=1.0), backend=backend)
        opt.step(x)
        runs.append(p)
    assert_same({"p": runs[0]}, {"p": runs[1]})
    assert (runs[0] != x.astype(dtype)).mean() > 0.2


def run_over(leaves: dict[str, int], threads: int | None = None) -> dict[str, Array]:
    params = {name: draw(ord(name), n, BF16) for name, n in leaves.items()}
    opt = optimizer(params, BF16, fo.AdamW(weight_decay=0.1), threads=threads)
    for t in range(3):
        opt.step({name: draw(ord(name) + t, n, BF16) for name, n in leaves.items()})
    return held(opt)


def check_thread_counts() -> None:
    from fusedopt import _core

    leaves = {"a": 5, "b": N, "c": SERIAL + 4321}
    _core.set_threads(1)
    want = run_over(leaves)
    for threads in (2, 7):
        _core.set_threads(threads)
        assert_same(run_over(leaves), want, f"{threads} threads")


def test_threads() -> None:
    done = run_python(
        "from storage import test_storage_random as t; t.check_thread_counts()",
        {"OMP_NUM_THREADS": "7"},
    )
    assert done.returncode == 0, done.stderr


def test_other_leaves_do_not_matter() -> None:
    together = run_over({"a": 4099, "b": 5003, "c": 257})
    for name, n in {"b": 5003, "c": 257}.items():
        alone = run_over({name: n})
        assert_same(alone, {key: together[key] for key in alone}, name)


def test_seed_step_leaf_and_state_matter() -> None:
    x = np.full(5003, 1 + 2.0**-8, np.float32)
    first, second = rounded(x, BF16, steps=2)
    other = rounded(x, BF16, seed=1)[0]
    opt = optimizer({"a": np.zeros_like(x), "b": np.zeros_like(x)}, BF16)
    opt.step({"a": x, "b": x})
    a, b = (state["v"] for state in opt.state.values())
    p = np.zeros(5003, BF16)
    single = optimizer(p, BF16, fo.Momentum(lr=1.0, momentum=0.0))
    single.step(x)
    runs = [first, second, other, a, b, -p]
    np.testing.assert_array_equal(single.state["params"]["v"], first)
    for k, one in enumerate(runs):
        assert (one > 1).any()
        for another in runs[:k]:
            assert 0.4 < (one != another).mean() < 0.6


def test_a_leafs_own_steps_count() -> None:
    x = np.full(5003, 1 + 2.0**-8, np.float32)
    opt = optimizer({"a": np.zeros_like(x), "b": np.zeros_like(x)}, BF16)
    opt.step({"a": x, "b": None})
    opt.step({"a": None, "b": x})
    alone = optimizer({"b": np.zeros_like(x)}, BF16)
    alone.step({"b": x})
    np.testing.assert_array_equal(opt.state["b"]["v"], alone.state["b"]["v"])


@HALVES
def test_what_is_not_rounded(dtype: Any) -> None:
    """Infinities, NaN, and what is exact; what is below the next power of two is not infinite."""
    largest = 65535.9 if dtype == F16 else float(np.finfo(np.float32).max)
    exact = np.array([0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, np.nan], np.float32)
    x = np.resize(np.append(exact, np.array([largest, -largest], np.float32)), N)
    for seed in range(3):
        got = rounded(x, dtype, seed=seed)[0]
        parts = got[: N // 9 * 9].reshape(-1, 9).astype(np.float32)
        # The state is 0 * v + g, and so a zero is +0.
        np.testing.assert_array_equal(parts[:, :7], np.tile(exact, (len(parts), 1)))
        limit = np.array(0x7BFF if dtype == F16 else 0x7F7F, np.uint16).view(dtype)
        assert (np.abs(parts[:, 7:]) == float(limit)).all()


def test_float64_is_rounded_by_way_of_float32() -> None:
    x = draw(0, 5003, np.float64)
    got = rounded(x, BF16)[0]
    np.testing.assert_array_equal(got, rounded(x.astype(np.float32), BF16)[0])
