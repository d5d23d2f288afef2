"""`StepInfo.stats` on Numba's CUDA simulator: `test_cuda.py` runs this in another process."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from devices import OnDevice
from exactness import DEFAULTS
from formatted import BLOCKED, RULES, draw, shaped
from fusedopt.arrays import storage
from fusedopt.arrays.formats import SEGMENT

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(autouse=True)
def prepared(monkeypatch: pytest.MonkeyPatch, halved: None) -> None:
    """Leaves of 500 elements are quantised, and matrix products are elementwise."""
    monkeypatch.setattr(storage, "QUANTIZED_FROM", 500)


def run(rule: fo.Rule, backend: str, p: Any, g: Any, sizes: tuple[int, ...], **options: Any) -> Any:
    """What three steps tell, and the fingerprint after them."""
    wrap: Any = OnDevice if backend == "cuda" else lambda a: a
    params = [wrap(draw(k, shaped(rule, n), p)) for k, n in enumerate(sizes)]
    optimizer = fo.Optimizer(params, rule, stats=True, backend=backend, **options)
    told = []
    for t in range(3):
        grads: list[Any] = [wrap(draw(10 + t, a.array.shape if wrap is OnDevice else a.shape, g))
                            for a in params]  # fmt: skip
        if t == 1:
            grads[0] = None
        estimates = None
        if rule.takes_hessian and t < 2:
            estimates = [None if x is None else wrap(np.array(x.array if wrap is OnDevice else x))
                         for x in grads]  # fmt: skip
        told.append(optimizer.step(grads, grad_scale=2.0, hessian=estimates))
    return told, optimizer.fingerprint()


def compared(
    rule: fo.Rule, p: Any, g: Any, sizes: tuple[int, ...] = (75, 40, 0), **more: Any
) -> None:
    found = run(rule, "cuda", p, g, sizes, **more)
    wanted = run(rule, "native", p, g, sizes, **more)
    assert found == wanted
    assert all(info.stats for info in found[0])


@pytest.mark.parametrize("rule", DEFAULTS.values(), ids=DEFAULTS)
def test_every_rule(rule: fo.Rule) -> None:
    compared(rule, np.float32, np.float32)


@pytest.mark.parametrize(
    ("p", "g", "options"),
    [
        (np.float64, np.float64, {}),
        (np.float64, np.float32, {"clip_norm": 0.5}),
        (BF16, BF16, {"rounding": "stochastic", "state_dtype": "bfloat16"}),
        (BF16, np.float32, {"rounding": "kahan", "clip_value": 0.25}),
        (BF16, BF16, {"master": "split16", "clip_norm": 0.5}),
        (np.float16, np.float16, {"master": "float32", "skip_nonfinite": True}),
    ],
)
def test_storage(p: Any, g: Any, options: dict[str, Any]) -> None:
    compared(fo.AdamW(weight_decay=0.1), p, g, ema=0.9, **options)


@pytest.mark.parametrize("format", BLOCKED)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_quantized_states(format: str, rounding: str) -> None:
    compared(RULES["sophia"], np.float32, BF16, (517, 40), state_dtype=format, rounding=rounding)


def test_several_segments() -> None:
    """More than one of a leaf, in the order of their indices."""
    compared(fo.SGD(), np.float32, np.float32, (2 * SEGMENT + 77, 3))


@pytest.mark.parametrize("length", [37, 6000])
def test_rows(length: int) -> None:
    found = []
    wraps: tuple[Any, Any] = (OnDevice, lambda a: a)
    for wrap in wraps:
        p = draw(0, (9, length), np.float32)
        optimizer = fo.Optimizer(wrap(p), fo.Sophia(), stats=True)
        for t, rows in enumerate(([7, 0, 3], [2, 7, 2], [])):
            indices = np.array(rows, np.int64)
            values, estimates = (draw(5 + t + k, (len(rows), length), np.float32) for k in (0, 9))
            given = fo.Rows(indices, wrap(values))
            info = optimizer.step(given, hessian=fo.Rows(indices, wrap(estimates)))
            found.append((info, optimizer.fingerprint()))
    assert found[:3] == found[3:]
