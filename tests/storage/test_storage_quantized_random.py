"""Stochastic rounding of quantised states: the NumPy form's bits, unbiased, and verifiable."""

from __future__ import annotations

import numpy as np
import pytest

import fusedopt as fo
from fusedopt.arrays.formats import QUANTIZED, QUANTIZED_STOCHASTIC
from fusedopt.system.isa import isas

N = 5003
each = pytest.mark.parametrize("name", QUANTIZED)


@each
@pytest.mark.parametrize("squares", [False, True], ids=["signed", "unsigned"])
def test_the_core_draws_as_numpy_does(name: str, squares: bool) -> None:
    x = np.random.default_rng(0).standard_normal(N).astype(np.float32)
    # Both store what comes: the gradient, and its square.
    rule: fo.Rule = fo.RMSProp(rho=0.0) if squares else fo.Momentum(momentum=0.0)
    before = fo.get_isa()
    try:
        for isa in isas():
            fo.set_isa(isa)
            opt = fo.Optimizer(
                np.zeros(N, np.float32), rule, state_dtype=name, rounding="stochastic", seed=3
            )
            opt.step(x)
            state, (_, keys) = opt.state["params"]["v"], opt.leaf_state("params")
            format = QUANTIZED_STOCHASTIC[name][squares]
            values = x * x if squares else x
            codes, scales = format.encode(values, keys[1].after(0))
            np.testing.assert_array_equal(state.codes, codes, isa)
            np.testing.assert_array_equal(state.scales, scales, isa)
            assert (codes != QUANTIZED[name][squares].encode(values)[0]).any()
    finally:
        fo.set_isa(before)


@each
def test_the_mean_is_right(name: str) -> None:
    """Within five standard deviations, each at most half of the widest gap between two values."""
    x = np.random.default_rng(1).uniform(0.2, 0.9, 256).astype(np.float32)
    x[0] = x[128] = 1.0  # the scales
    draws = 4000
    for format in QUANTIZED_STOCHASTIC[name]:
        got = np.stack([format.decode(*format.encode(x, key)) for key in range(draws)])
        gap = float((got.max(axis=0) - got.min(axis=0)).max())
        off = np.abs(got.astype(np.float64).mean(axis=0) - x)
        assert off.max() < 5 * gap / 2 / draws**0.5
        assert (got.std(axis=0) > 0).mean() > 0.8


@each
def test_larger_elements_never_get_smaller_codes(name: str) -> None:
    for format in QUANTIZED_STOCHASTIC[name]:
        scales = np.ones(-(-N // format.block), np.float32)
        base = np.random.default_rng(2).uniform(0, format.largest, N)
        low = base.astype(np.float32)
        high = (low * np.float32(1.01)).clip(max=format.largest)
        ends = [format.decode(format.encode(v, 7, scales)[0], scales)[:N] for v in (low, high)]
        assert (ends[0] <= ends[1]).all()


@pytest.mark.slow
@each
def test_verified_steps_pass(name: str) -> None:
    rng = np.random.default_rng(3)
    p = rng.standard_normal(200_003).astype(np.float32)
    opt = fo.Optimizer(p, fo.AdamW(), state_dtype=name, rounding="stochastic", verify=True)
    for _ in range(3):
        opt.step(rng.standard_normal(p.size).astype(np.float32))
