"""Rules over arrays as they are stored give the bits that tiles give, whatever the values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from exactness import Array
from formatted import BF16, F16, F32, Way, assert_same, held, on_each_isa

RULES: dict[str, fo.Rule] = {
    "sgd": fo.SGD(lr=0.1, weight_decay=0.01, decay="decoupled_first"),
    "momentum": fo.Momentum(lr=0.1),
    "nesterov": fo.Nesterov(lr=0.1, weight_decay=0.01),
    "adam": fo.Adam(weight_decay=0.1, decay="l2"),
    "adamw": fo.AdamW(weight_decay=0.1),
    "lion": fo.Lion(lr=0.01, weight_decay=0.1),
}
WAYS = {
    "bfloat16": Way(BF16, BF16, {"state_dtype": "bfloat16"}),
    "float16": Way(F16, F16, {"state_dtype": "float16"}),
    "master": Way(BF16, BF16, {"master": "float32"}),
    "split16": Way(BF16, BF16, {"master": "split16"}),
    "kahan": Way(BF16, BF16, {"rounding": "kahan"}),
    "copy": Way(F32, BF16, copies=BF16),
}
SPECIAL = (
    0.0,
    -0.0,
    1e-39,
    -1e-39,
    1.2e-38,
    -1.2e-38,
    1e-45,
    np.inf,
    -np.inf,
    np.nan,
    3.3e38,
    1e-6,
)
SIZES = (31, 32, 33, 5003)


def drawn(seed: int, n: int, dtype: Any) -> Array:
    """Ordinary values, zeros, and each special value alone in its chunk and among others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n).astype(F32)
    x[rng.random(n) < 0.1] *= 1e-38
    if n > 2000:
        x[:256] = 0.0
        for k, value in enumerate(SPECIAL):
            x[256 + 64 * k + seed % 64] = value
        x[1200:1800] = rng.choice(np.array(SPECIAL, F32), 600)
    with np.errstate(all="ignore"):
        return x.astype(dtype)


def run(rule: fo.Rule, way: Way, **options: Any) -> dict[str, Array]:
    params = {f"n{n}": drawn(n, n, way.p) for n in SIZES}
    copies = (
        None if way.copies is None else {k: np.zeros_like(p, way.copies) for k, p in params.items()}
    )
    optimizer = fo.Optimizer(
        params, rule, copy_out=copies, backend="native", **way.arguments(rule), **options
    )
    for t in range(4):
        optimizer.step({f"n{n}": drawn(100 * t + n + 1, n, way.g) for n in SIZES})
    return held(optimizer, copies)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_direct_loops_and_tiles(rule: fo.Rule, way: Way) -> None:
    for isa in on_each_isa():
        tiles = run(rule, way, zero_grads=True)  # no direct loop zeroes its gradients
        assert_same(run(rule, way), tiles, f"{isa}, {rule}")
