"""This file alone shows that an installed package works: it needs NumPy, pytest and nothing else.

Every rule takes the steps that it took when the digests below were recorded, with the same bits.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import fusedopt as fo

WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "float32": (np.float32, {}),
    "float64": (np.float64, {"clip_value": 0.5}),
    "bfloat16": (ml_dtypes.bfloat16, {"master": "split16", "state_dtype": "bfloat16", "ema": 0.75}),
    "8-bit": (ml_dtypes.bfloat16, {"state_dtype": "dynamic8", "rounding": "stochastic", "seed": 7}),
}
"""How parameters and states are stored."""

DIGESTS: dict[str, str] = {
    "sgd": "049a2ac761b000db",
    "momentum": "ca4ee0aea96026fd",
    "nesterov": "91ea339ebe595fda",
    "adagrad": "440c9c38490d268d",
    "rmsprop": "1e95be2d6eeed43b",
    "adam": "c1cc6ccb3bb81399",
    "adamw": "b2c098e779028eb6",
    "adamw cautious": "a20d33dd65a41efd",
    "lion": "0130b724611af389",
    "lion cautious": "c25d92f2c7fae643",
    "sophia": "e6371e31efce25dc",
    "adamax": "01063fb4ecd8c46e",
    "adadelta": "3e0ace15f91275fe",
    "nadam": "96ef179cdf908a5d",
    "radam": "ea4bae068feca588",
    "rprop": "100375a965f05e78",
    "signum": "19582814aed7aafb",
    "adabelief": "cc1a20871afea92c",
    "adopt": "e1fc84474acd6574",
    "ademamix": "724a98d9d34a676e",
    "grams": "20bdffc2009d6e17",
    "laprop": "4a49956232fa0efb",
    "adan": "ad16bc2eb31de7f1",
    "lars": "8013a912cf867479",
    "lamb": "7a16fef9074ab2d5",
    "cautiousadamw": "0214114cecd230d5",
    "cautiouslion": "05b54e846f828b18",
    "tiger": "17e08a4d64710941",
    "mars": "adb3e39c6cb75e40",
    "prodigy": "871134f486a03460",
    "dadaptadam": "bfd987e82365f7b8",
    "dadaptsgd": "13a180c3461c5b66",
    "schedulefreeadamw": "4dc442cb9ad60f5d",
    "schedulefreesgd": "a1c2763de1ceb715",
}
"""The digest of each rule, over all ways; only matrix products may differ between machines."""


def draw(seed: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Numbers in (-1, 1), the same on every machine."""
    bits = np.random.default_rng(seed).integers(-(2**23), 2**23, shape)
    return np.asarray(bits * 2.0**-23).astype(dtype)


def digest(rule: fo.Rule, threads: int | None = None) -> str:
    found = hashlib.sha256()
    for dtype, options in WAYS.values():
        # Longer than what is done in one thread; a quantised state begins at 4096 elements.
        shapes = {"long": (90_001,), "matrix": (70, 80), "short": (3,), "none": (0,)}
        params = {k: draw(n, shape, dtype) for n, (k, shape) in enumerate(shapes.items())}
        opt = fo.Optimizer(params, rule, backend="native", threads=threads, **options)
        for step in range(3):
            grads = {
                k: draw(10 * step + n, p.shape, dtype) for n, (k, p) in enumerate(params.items())
            }
            opt.step(grads, hessian=grads if rule.takes_hessian and step == 1 else None)
        found.update(opt.fingerprint().encode())
    return found.hexdigest()[:16]


def rule_of(name: str) -> fo.Rule:
    rule, *decay = name.split()
    form: Any = {"decay": decay[0]} if decay else {}
    return fo.RULES[rule](lr=0.125, weight_decay=0.0625, **form)


ELEMENTWISE = [name for name in fo.RULES if not rule_of(name).program.matrices]
ELEMENTWISE += ["adamw cautious", "lion cautious"]


def test_the_compiled_core_is_there() -> None:
    info = fo.info()
    print(info)
    assert info["backend"] == "native"
    assert info["isa"] == info["isas"][-1]
    assert info["threads"] >= 1


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_recorded_bits_on_every_instruction_set(name: str) -> None:
    before = fo.get_isa()
    try:
        for isa in fo.info()["isas"]:
            fo.set_isa(isa)
            found = digest(rule_of(name))
            assert found == DIGESTS.get(name), f"{isa}; of a new rule {found!r} is to be in DIGESTS"
        assert digest(rule_of(name), threads=1) == DIGESTS.get(name), "one thread"
    finally:
        fo.set_isa(before)


@pytest.mark.parametrize("name", fo.RULES)
def test_every_element_agrees_with_the_reference(name: str) -> None:
    p = draw(0, (70, 80), np.float32)
    opt = fo.Optimizer(p, rule_of(name), verify=True)
    for step in range(2):
        opt.step(draw(step + 1, (70, 80), np.float32))
    assert opt.step_count == 2


def test_a_run_goes_on_from_a_file_and_from_a_pickle(tmp_path: Path) -> None:
    p, g = draw(0, (5000,), np.float32), draw(1, (5000,), np.float32)
    opt = fo.Optimizer(p, fo.AdamW(), state_dtype="dynamic8", clip_norm=1.0)
    opt.step(g)
    opt.save(tmp_path / "run.safetensors")
    other = fo.Optimizer(np.zeros_like(p), fo.AdamW(), state_dtype="dynamic8", clip_norm=1.0)
    other.load(tmp_path / "run.safetensors")
    third = pickle.loads(pickle.dumps(opt))
    for each in (opt, other, third):
        each.step(g)
    assert opt.fingerprint() == other.fingerprint() == third.fingerprint()


def test_what_does_not_fit_is_refused() -> None:
    p = np.zeros((3, 4), np.float32)
    opt = fo.Optimizer(p, fo.SGD())
    with pytest.raises(ValueError, match="shape"):
        opt.step(np.zeros((4, 3), np.float32))
    with pytest.raises(TypeError, match="float"):
        opt.step(np.zeros((3, 4), np.int32))
    assert opt.step_count == 0
    assert not p.any()
