"""What tests of several rules for matrices share."""

from __future__ import annotations

from typing import Any

import numpy as np

import fusedopt as fo


def draw(shape: tuple[int, ...], count: int, seed: int = 0) -> list[np.ndarray]:
    """Arrays of normal numbers."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for _ in range(count)]


def stepped_with_all_options(rule: fo.Rule, state_dtype: Any) -> fo.Optimizer:
    """An optimizer after some verified steps with clipping, averages, and a gradient with a NaN."""
    params = {"w": np.ones((80, 64), np.float32), "f": np.ones((8, 3, 5), np.float32, order="F")}
    options: dict[str, Any] = {"state_dtype": state_dtype, "skip_nonfinite": True, "ema": 0.5}
    optimizer = fo.Optimizer(params, rule, verify=True, clip_norm=1.0, **options)
    rng = np.random.default_rng(0)
    for t in range(5):
        grads = {k: rng.standard_normal(p.shape).astype(np.float32) for k, p in params.items()}
        if t == 3:
            grads["w"][5, 5] = np.nan
            before = optimizer.fingerprint()
            assert optimizer.step(grads).skipped
            assert optimizer.fingerprint() == before
            continue
        info: Any = optimizer.step(grads)
        assert info.clip_scale < 1
    return optimizer
