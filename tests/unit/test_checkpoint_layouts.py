"""Every array of a checkpoint in its own order and shape, by every way out and in."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo

WEIGHT_DECAY = 0.1

ROWS, COLS = 96, 64  # enough elements to be quantised, and not square

STORED: dict[str, tuple[Any, dict[str, Any]]] = {
    "float32": (np.float32, {}),
    "float64": (np.float64, {"ema": 0.5}),
    "float8": (np.float32, {"state_dtype": "float8", "ema": 0.5}),
    "dynamic8": (ml_dtypes.bfloat16, {"state_dtype": "dynamic8", "rounding": "stochastic"}),
    "dynamic4": (np.float32, {"state_dtype": "dynamic4"}),
    "masters": (np.float16, {"master": "float32", "ema": 0.5}),
    "split16": (ml_dtypes.bfloat16, {"master": "split16"}),
    "kahan": (ml_dtypes.bfloat16, {"rounding": "kahan", "state_dtype": "bfloat16"}),
}


def by_file(opt: fo.Optimizer, fresh: fo.Optimizer, folder: Path) -> fo.Optimizer:
    opt.save(folder / "run")
    fresh.load(folder / "run")
    return fresh


def by_file_of_states(opt: fo.Optimizer, fresh: fo.Optimizer, folder: Path) -> fo.Optimizer:
    opt.save(folder / "run", parameters=False)
    for name, p in opt.params.items():
        fresh.params[name][...] = p
    fresh.load(folder / "run", parameters=False)
    return fresh


def by_dict(opt: fo.Optimizer, fresh: fo.Optimizer, folder: Path) -> fo.Optimizer:
    for name, p in opt.params.items():
        fresh.params[name][...] = p
    fresh.load_state_dict(opt.state_dict())
    return fresh


def by_pickle(opt: fo.Optimizer, fresh: fo.Optimizer, folder: Path) -> fo.Optimizer:
    found: fo.Optimizer = pickle.loads(pickle.dumps(opt))
    return found


def by_copy(opt: fo.Optimizer, fresh: fo.Optimizer, folder: Path) -> fo.Optimizer:
    return copy.deepcopy(opt)


WAYS: dict[str, Callable[[fo.Optimizer, fo.Optimizer, Path], fo.Optimizer]] = {
    "file": by_file,
    "file of states": by_file_of_states,
    "dict": by_dict,
    "pickle": by_pickle,
    "copy": by_copy,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", fo.RULES)
def test_a_run_goes_on_bit_for_bit(name: str, stored: str, way: str, tmp_path: Path) -> None:
    rule = fo.RULES[name](weight_decay=WEIGHT_DECAY)
    dtype, options = STORED[stored]
    rng = np.random.default_rng(0)

    def draw() -> dict[str, np.ndarray]:
        c = rng.standard_normal((ROWS, COLS)).astype(dtype)
        f = np.asfortranarray(rng.standard_normal((COLS, ROWS)).astype(dtype))
        square = np.asfortranarray(rng.standard_normal((7, 7)).astype(dtype))
        return {"c": c, "f": f, "square": square}

    def made(params: dict[str, np.ndarray]) -> fo.Optimizer:
        copies = {k: np.zeros_like(p, np.float32) for k, p in params.items()}
        return fo.Optimizer(params, rule, copy_out=copies, **options)

    opt = made(draw())
    for _ in range(3):
        opt.step(draw())
    on = WAYS[way](opt, made(draw()), tmp_path)
    assert on.fingerprint() == opt.fingerprint()
    for _ in range(5):
        grads = draw()
        opt.step(grads)
        on.step(grads)
    assert on.fingerprint() == opt.fingerprint()
