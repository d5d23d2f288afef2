"""The loss scaler, against GradScaler's rules written out by hand."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest

from fusedopt.loss_scale import HIGHEST, LOWEST, LossScaler


def test_defaults() -> None:
    assert LossScaler() == LossScaler(
        scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, good_steps=0
    )


def test_by_hand() -> None:
    scaler = LossScaler(scale=8.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=3)
    # A skip backs off and starts the count anew; three good steps in a row grow.
    skips = [False, False, True, False, False, False, False, False, True, True, False]
    scales = [8.0, 8.0, 2.0, 2.0, 2.0, 8.0, 8.0, 8.0, 2.0, 0.5, 0.5]
    seen = []
    for skipped in skips:
        scaler.update(skipped)
        seen.append(scaler.scale)
    assert seen == scales
    assert scaler.good_steps == 1


def test_any_history() -> None:
    rng = np.random.default_rng(0)
    skips = (rng.random(500) < 0.1).tolist()
    scaler = LossScaler(growth_interval=5)
    for k, skipped in enumerate(skips):
        scaler.update(skipped)
        runs = "".join("x" if skip else "." for skip in skips[: k + 1]).split("x")
        exponent = sum(len(run) // 5 for run in runs) - (len(runs) - 1)
        assert math.log2(scaler.scale) == 16 + exponent


def test_the_scale_stays_in_range() -> None:
    scaler = LossScaler(growth_interval=1)
    for _ in range(300):
        scaler.update(False)
    assert scaler.scale == HIGHEST / 2
    assert np.isfinite(np.float32(scaler.scale))
    for _ in range(300):
        scaler.update(True)
    assert scaler.scale == LOWEST == float(np.finfo(np.float32).smallest_normal)
    scaler.update(False)
    assert scaler.scale == 2 * LOWEST


def test_it_travels() -> None:
    scaler = LossScaler(growth_interval=4, backoff_factor=0.125)
    for skipped in (True, False, False):
        scaler.update(skipped)
    resumed = LossScaler()
    resumed.load_state_dict(scaler.state_dict())
    printed = eval(repr(scaler), {"LossScaler": LossScaler})
    for twin in (resumed, printed, pickle.loads(pickle.dumps(scaler)), copy.deepcopy(scaler)):
        assert twin == scaler
        twin.update(False)
        twin.update(False)
        assert (twin.scale, twin.good_steps) == (2.0**14, 0)
    assert scaler.good_steps == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", 0.0),
        ("scale", HIGHEST),
        ("scale", math.nan),
        ("growth_factor", 0.5),
        ("backoff_factor", 1.0),
        ("backoff_factor", 0.0),
        ("growth_interval", 0),
        ("good_steps", -1),
    ],
)
def test_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"LossScaler\({name}\): expected"):
        LossScaler(**{name: value})  # type: ignore[arg-type]
    scaler = LossScaler()
    with pytest.raises(ValueError, match=rf"LossScaler\({name}\): expected"):
        scaler.load_state_dict(scaler.state_dict() | {name: value})
    assert scaler == LossScaler()


def test_refusals() -> None:
    scaler = LossScaler()
    wrong: list[Any] = [1, None, "no"]
    for skipped in wrong:
        with pytest.raises(TypeError, match="skipped: expected True or False"):
            scaler.update(skipped)
    states: list[Any] = [{}, None, scaler.state_dict() | {"more": 1}]
    for state in states:
        with pytest.raises(ValueError, match="state_dict: expected a dict with scale"):
            scaler.load_state_dict(state)
    assert scaler == LossScaler()
    assert [f.name for f in dataclasses.fields(scaler)] == list(scaler.state_dict())
