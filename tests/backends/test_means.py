"""Gradients that are the mean of several arrays: the bits of a step that is given the average."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from fusedopt.arrays.formats import compute_dtype
from fusedopt.system.extension import Mean, reason

pytestmark = pytest.mark.skipif(reason is not None, reason="the compiled core takes means")

BF16 = ml_dtypes.bfloat16
SIZES = (1, 255, 256, 16384 + 300, 3 * 16384)


def parts_of(size: int, dtypes: list[Any], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    parts = [rng.standard_normal(size).astype(dtype) for dtype in dtypes]
    awkward = np.array([0.0, -0.0, 1e-40, -1e-45, 3e38, -np.inf, np.nan, 65504.0], np.float64)
    with np.errstate(all="ignore"):
        for k, part in enumerate(parts):
            n = min(size // 2, awkward.size)
            part[:n] = np.roll(awkward, k)[:n].astype(part.dtype)
    return parts


def average(parts: list[np.ndarray], divisor: float, dtype: Any) -> np.ndarray:
    with np.errstate(all="ignore"):
        total = parts[0].astype(dtype)
        for part in parts[1:]:
            total = total + part.astype(dtype)
        mean: np.ndarray = total / np.dtype(dtype).type(divisor)
        return mean


@pytest.mark.parametrize("divisor", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", SIZES)
def test_means_have_the_bits_of_the_average(size: int, dtype: Any, divisor: float) -> None:
    for dtypes in ([dtype], [dtype] * 3, [BF16, np.float16], [np.float64, dtype, BF16, np.float32]):
        parts = parts_of(size, dtypes)
        out = np.full(size, 7, dtype)
        assert Mean(parts, divisor).write(out)
        np.testing.assert_array_equal(out, average(parts, divisor, dtype))  # NaN equals NaN
        finite = np.isfinite(out)
        assert out[finite].tobytes() == average(parts, divisor, dtype)[finite].tobytes()


@pytest.mark.parametrize(
    ("rule", "dtype", "options"),
    [
        (fo.AdamW(weight_decay=0.1), np.float32, {}),
        (fo.Lion(weight_decay=0.1), np.float32, {"state_dtype": "dynamic8"}),
        (fo.Momentum(weight_decay=0.1), np.float64, {}),
        (fo.AdamW(), BF16, {"master": "float32"}),
        (fo.AdamW(), BF16, {"rounding": "stochastic", "state_dtype": "bfloat16", "seed": 3}),
        (fo.LAMB(), np.float32, {}),
        (fo.Adan(), np.float32, {"clip_norm": 0.1, "stats": True}),
    ],
    ids=str,
)
def test_steps_have_the_bits_of_steps_with_the_average(
    rule: Any, dtype: Any, options: dict[str, Any]
) -> None:
    shapes = {"a": (37, 1000), "b": (1,), "c": (70000,)}
    trees = [
        {
            name: np.asarray(np.full(shape, 0.5) + np.arange(np.prod(shape)).reshape(shape) % 7 / 8)
            .astype(dtype)
            for name, shape in shapes.items()
        }
        for _ in range(2)
    ]  # fmt: skip
    for tree in trees:
        tree["a"] = np.asfortranarray(tree["a"])
    opts = [fo.Optimizer(tree, rule, **options) for tree in trees]
    for step in range(3):
        parts = {
            name: [
                np.random.default_rng((step, k, len(name))).standard_normal(p.size).astype(p.dtype)
                for k in range(3)
            ]
            for name, p in trees[0].items()
        }
        averages = {}
        for name, p in trees[0].items():
            mean = average(parts[name], 3.0, compute_dtype(p.dtype))
            averages[name] = mean.reshape(p.shape, order="F" if name == "a" else "C")
        told = [
            opts[0].step({name: Mean(each, 3.0) for name, each in parts.items()}),
            opts[1].step(averages),
        ]
        assert told[0].grad_norm == told[1].grad_norm
        assert opts[0].fingerprint() == opts[1].fingerprint()


def test_what_does_not_fit_is_refused() -> None:
    flat = np.ones(300, np.float32)
    for arrays in ([], [flat, flat[1:]], [flat.reshape(3, 100)], [flat[::2]], [flat.astype(int)]):
        with pytest.raises(ValueError, match="a mean is of"):
            Mean(arrays, 2.0)
    assert not Mean([flat], 2.0).write(np.empty(299, np.float32))
    assert not Mean([flat], 2.0).write(np.empty(300, BF16))
    for parts in ([flat[1:]], "overlapping"):
        params = {"w": np.ones(300, np.float32)}
        opt = fo.Optimizer(params, fo.SGD())
        before = opt.fingerprint()
        with pytest.raises(RuntimeError, match="refused"):
            opt.step({"w": Mean([params["w"]] if parts == "overlapping" else parts, 2.0)})
        assert opt.fingerprint() == before
