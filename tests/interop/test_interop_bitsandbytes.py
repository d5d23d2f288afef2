"""The layouts of bitsandbytes as recorded from them, without the libraries."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from formatted import draw, published_map, refused
from fusedopt import interop

B = np.array([5.0, 6.0])
N = 5003
BNB_GROUP = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01, "params": [0, 1]}
BNB_RULE = fo.AdamW(lr=0.1, betas=(0.9, 0.99))


def eight_bit(seed: int, suffix: int, block: int) -> tuple[dict[str, Any], Any]:
    """One state in their layout, and its values."""
    rng = np.random.default_rng(seed)
    qmap = published_map("dynamic8" if suffix == 1 else "dynamic8_unsigned").astype(np.float32)
    codes = rng.integers(0, 256, N, dtype=np.uint8)
    absmax = 10 ** rng.uniform(-6, 0, -(-N // block)).astype(np.float32)
    values = qmap[codes] * np.repeat(absmax, block)[:N]
    return {f"state{suffix}": codes, f"qmap{suffix}": qmap, f"absmax{suffix}": absmax}, values


def bnb_state(block: int = 256, nested: bool = False) -> tuple[dict[str, Any], Any, Any]:
    (first, m), (second, v) = eight_bit(0, 1, block), eight_bit(1, 2, block)
    large: dict[str, Any] = {**first, **second}
    if nested:
        large = {"__bnb_optimizer_quant_state__": large}
    small = {"step": 6, "state1": B.astype(np.float32), "state2": 2 * B.astype(np.float32)}
    state = {0: {"step": 6, **large}, 1: small}
    return {"state": state, "param_groups": [dict(BNB_GROUP)]}, m, v


def bnb_optimizer(rule: Any = BNB_RULE, **options: Any) -> fo.Optimizer:
    return fo.Optimizer({"w": draw(0, N, np.float32), "b": B.astype(np.float32)}, rule, **options)


@pytest.mark.parametrize("nested", [False, True])
def test_codes_of_bitsandbytes_are_taken_as_they_are(nested: bool) -> None:
    state, m, v = bnb_state(nested=nested)
    opt = bnb_optimizer(state_dtype="dynamic8")
    interop.from_bitsandbytes(opt, state)
    found = opt.state["w"]
    entry = bnb_state()[0]["state"][0]
    for name, suffix, values in (("m", 1, m), ("v", 2, v)):
        np.testing.assert_array_equal(found[name].codes, entry[f"state{suffix}"])
        np.testing.assert_array_equal(found[name].scales, entry[f"absmax{suffix}"])
        np.testing.assert_allclose(found[name].dequantize(), values, rtol=1e-6)
    np.testing.assert_array_equal(opt.state["b"]["v"], (2 * B).astype(np.float32))
    assert opt.step_count == 6
    opt.step({"w": draw(1, N, np.float32), "b": B})


@pytest.mark.parametrize("block", [256, 2048])
def test_codes_of_bitsandbytes_are_decoded_exactly(block: int) -> None:
    state, m, v = bnb_state(block)
    opt = bnb_optimizer()
    interop.from_bitsandbytes(opt, state)
    np.testing.assert_array_equal(opt.state["w"]["m"], m)
    np.testing.assert_array_equal(opt.state["w"]["v"], v)
    again = bnb_optimizer(state_dtype={"m": "float32", "v": "dynamic8"})
    other = copy.deepcopy(state)
    other["state"][0]["qmap2"] = np.linspace(0, 1, 256, dtype=np.float32)
    interop.from_bitsandbytes(again, other)  # another map: encoded anew
    values = other["state"][0]["qmap2"][state["state"][0]["state2"]]
    values = values * np.repeat(state["state"][0]["absmax2"], block)[:N]
    # Half of the gap between the map's values, where the least of these lies.
    np.testing.assert_allclose(again.state["w"]["v"].dequantize(), values, rtol=0.15)


def test_other_optimizers_of_bitsandbytes() -> None:
    one, m = eight_bit(0, 1, 256)
    group = {**BNB_GROUP, "weight_decay": 0.0, "params": [0]}
    state = {"state": {0: {"step": 3, **one}}, "param_groups": [group]}
    for rule, name in (
        (fo.Lion(lr=0.1, betas=(0.9, 0.99)), "m"),
        (fo.Momentum.like("torch", lr=0.1, momentum=0.9), "v"),
    ):
        opt = fo.Optimizer(draw(0, N, np.float32), rule)
        interop.from_bitsandbytes(opt, state)
        np.testing.assert_array_equal(opt.state["params"][name], m)


def test_what_does_not_fit_bitsandbytes() -> None:
    opt = bnb_optimizer(state_dtype="dynamic8")

    def spoilt(**changes: Any) -> Any:
        state = bnb_state()[0]
        entry = state["state"][0]
        for name, value in changes.items():
            entry.pop(name) if value is None else entry.update({name: value})
        return partial(interop.from_bitsandbytes, opt, state)

    refused(spoilt(absmax1=None), opt, "w: state1 is not in blocks; make it with block_wise=True")
    refused(spoilt(absmax1=np.ones(7)), opt, "w: state1 has (7,) blocks and a map of (256,)")
    refused(spoilt(qmap2=np.ones(16)), opt, "w: state2 has (20,) blocks and a map of (16,)")
    refused(spoilt(state2=None), opt, "w: has no state2")
    refused(spoilt(state1=np.ones((2, N), np.uint8)), opt, f"state1 has shape (2, {N}) there")
    state = bnb_state()[0]
    state["param_groups"][0]["betas"] = (0.9, 0.95)
    betas = "w: betas (0.9, 0.99) here, (0.9, 0.95) there"
    refused(lambda: interop.from_bitsandbytes(opt, state), opt, betas, betas.replace("w", "b", 1))
    other = bnb_optimizer(fo.Sophia())
    act = partial(interop.from_bitsandbytes, other, state)
    refused(act, other, "has other states than the rules of bitsandbytes")
    lion = bnb_optimizer(fo.Lion(lr=0.1, betas=(0.9, 0.95), weight_decay=0.01))
    act = partial(interop.from_bitsandbytes, lion, state)
    refused(act, lion, "weight_decay 0.01 there, which the backends of lion treat differently")
