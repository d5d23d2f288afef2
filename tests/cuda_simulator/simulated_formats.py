"""Storage formats on Numba's CUDA simulator: `test_cuda.py` runs this in another process."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from devices import OnDevice
from exactness import Array
from formatted import BLOCKED, RULES, WAYS, Way, arrays_of, assert_same, draw, shaped
from fusedopt.arrays import storage
from fusedopt.arrays.stored import Quantized
from fusedopt.backends.cuda.arrays import DeviceArray, DeviceQuantized

SIZES = {"a": 700, "b": 517, "c": 40}
"""Elements: of several blocks and chunks with a rest, odd, and too few to be quantised."""


@pytest.fixture(autouse=True)
def quantized_early(monkeypatch: pytest.MonkeyPatch, halved: None) -> None:
    """Leaves of 500 elements are quantised, and matrix products are elementwise."""
    monkeypatch.setattr(storage, "QUANTIZED_FROM", 500)


def off(a: Array) -> Array:
    """A copy that begins one element behind a boundary of vectors."""
    block = np.empty(a.size + 64 // a.itemsize + 1, a.dtype)
    first = -block.ctypes.data % 64 // a.itemsize + 1
    there: Array = block[first : first + a.size].reshape(a.shape)
    there[...] = a
    return there


def run(
    rule: fo.Rule, way: Way, backend: str, *, special: bool = False, steps: int = 3, **options: Any
) -> tuple[dict[str, Array], fo.Optimizer]:
    """Everything that a few steps leave, with one leaf off the boundaries."""
    wrap: Any = OnDevice if backend == "cuda" else lambda a: a
    shapes = {name: shaped(rule, n) for name, n in SIZES.items()}

    def tree(kind: int, dtype: Any, special: bool = False) -> dict[str, Array]:
        drawn = {}
        for k, (name, shape) in enumerate(shapes.items()):
            values = draw(100 * kind + k, shape, dtype)
            if special and name == "a":
                values.flat[[300, 690]] = np.inf, np.nan
                values.flat[:128] = 0
            drawn[name] = off(values) if name == "b" else values
        return drawn

    def wrapped(tree: dict[str, Array]) -> dict[str, Any]:
        return {name: wrap(a) for name, a in tree.items()}

    mine = tree(0, way.p)
    copies = None if way.copies is None else tree(1, way.copies)
    optimizer = fo.Optimizer(
        wrapped(mine),
        rule,
        copy_out=copies and wrapped(copies),
        backend=backend,
        **{**way.arguments(rule), **options},
    )
    for t in range(steps):
        estimates = tree(20 + t, way.g) if rule.takes_hessian and t % 2 == 0 else None
        given = wrapped(tree(10 + t, way.g, special))
        optimizer.step(given, hessian=estimates and wrapped(estimates))
    found = dict(mine)
    for path, state in optimizer.state.items():
        found |= {f"{path}/{name}": a.copy() for name, a in arrays_of(state).items()}
    found |= {f"{path}/copy": a for path, a in (copies or {}).items()}
    return found, optimizer


def compared(rule: fo.Rule, way: Way, where: str, **options: Any) -> None:
    found, optimizer = run(rule, way, "cuda", **options)
    wanted, native = run(rule, way, "native", **options)
    assert_same(found, wanted, where)
    assert optimizer.fingerprint() == native.fingerprint()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_store(way: str) -> None:
    compared(RULES["adamw"], WAYS[way], way)


@pytest.mark.parametrize("format", BLOCKED)
@pytest.mark.parametrize("rule", ["amsgrad", "rmsprop", "lion", "sophia", "muon"])
def test_quantized_states_of_other_rules(rule: str, format: str) -> None:
    way = Way(np.dtype(np.float32), options={"state_dtype": format})
    compared(RULES[rule], way, f"{rule} {format}")


@pytest.mark.parametrize("format", BLOCKED)
def test_blocks_that_are_zero_or_not_finite(format: str) -> None:
    way = Way(np.dtype(np.float32), options={"state_dtype": format})
    for rule in (fo.Momentum(), fo.AdamW()):
        compared(rule, way, format, special=True)


@pytest.mark.parametrize("format", BLOCKED)
def test_quantized_states_beside_all_else(format: str) -> None:
    way = Way(np.dtype(ml_dtypes.bfloat16), options={"state_dtype": format}, copies=np.float16)
    options: dict[str, Any] = {"master": "float32", "ema": 0.9, "zero_grads": True}
    compared(RULES["adamw"], way, format, clip_value=0.5, **options)
    for wait in (True, False):
        found, optimizer = run(fo.Lion(), way, "cuda", clip_norm=0.5, wait=wait, **options)
        assert_same(found, run(fo.Lion(), way, "native", clip_norm=0.5, **options)[0], format)
        optimizer.synchronize()


def test_what_a_user_sees_of_a_quantized_state() -> None:
    p, g = draw(0, (25, 30), np.float32), draw(1, (25, 30), np.float32)
    p, g = np.asfortranarray(p), np.asfortranarray(g)
    rule = fo.AdaGrad(initial_accumulator=0.5)
    mine = fo.Optimizer(OnDevice(p.copy(order="F")), rule, state_dtype="dynamic8")
    theirs = fo.Optimizer(p, rule, state_dtype="dynamic8")
    (there,) = mine.state["params"].values()
    (here,) = theirs.state["params"].values()
    assert isinstance(there, DeviceQuantized)
    assert isinstance(here, Quantized)
    for _ in range(2):
        seen: Any = there.dequantize()
        assert isinstance(seen, DeviceArray)
        np.testing.assert_array_equal(seen.copy(), here.dequantize())
        mine.step(OnDevice(g))
        theirs.step(g)
    interface = there.codes.__cuda_array_interface__  # type: ignore[attr-defined]
    assert (interface["typestr"], interface["shape"]) == ("|u1", (750,))
    assert mine.describe().splitlines()[:2] == theirs.describe().splitlines()[:2]
    saved = mine.state_dict()
    theirs.step(g)
    theirs.load_state_dict(saved)
    mine.load_state_dict(theirs.state_dict())
    assert (there.codes.copy() == saved["leaves"]["params"]["state"]["G.codes"]).all()


def test_updates_of_one_tensor_with_quantized_states() -> None:
    p, g = draw(0, 700, np.float32), draw(1, 700, np.float32)
    rule = fo.AdamW()
    mine, theirs = OnDevice(p.copy()), p.copy()
    there = rule.init(mine, "dynamic4")  # type: ignore[arg-type]
    here = rule.init(theirs, "dynamic4")
    for t in (1, 2):
        fo.update(rule, t, mine, OnDevice(g), *there)  # type: ignore[arg-type]
        fo.update(rule, t, theirs, g, *here)
    assert_same({"p": mine.array}, {"p": theirs})
    for a, b in zip(there, here, strict=True):
        assert_same({"codes": a.codes.copy(), "scales": a.scales.copy()},
                    {"codes": b.codes, "scales": b.scales})  # fmt: skip


RANDOM: dict[str, Way] = {
    "bfloat16": Way(np.dtype(ml_dtypes.bfloat16), options={"state_dtype": "bfloat16"}),
    "float16": Way(np.dtype(np.float16), options={"state_dtype": "float16"}, copies=np.float16),
    "wide": Way(np.dtype(np.float64), options={"state_dtype": "bfloat16"}),
    **{
        format: Way(np.dtype(ml_dtypes.bfloat16), options={"state_dtype": format})
        for format in BLOCKED
    },
}


@pytest.mark.parametrize("way", RANDOM)
@pytest.mark.parametrize("rule", ["adamw", "sophia", "muon"])
def test_stochastic_rounding(rule: str, way: str) -> None:
    compared(RULES[rule], RANDOM[way], way, rounding="stochastic", seed=7, clip_value=0.5)


@pytest.mark.parametrize("options", [{"rounding": "kahan"}, {"master": "split16"}], ids=str)
@pytest.mark.parametrize("rule", ["adamw", "sophia", "muon"])
def test_parameters_of_two_parts(rule: str, options: dict[str, Any]) -> None:
    way = Way(np.dtype(ml_dtypes.bfloat16), copies=np.float16)
    compared(RULES[rule], way, rule, special=True, ema=0.9, clip_value=0.5, **options)
    options = {**options, "state_dtype": "dynamic8"}
    compared(RULES[rule], way, rule, ema=0.9, clip_norm=0.5, **options)


def test_random_bits_follow_each_leafs_own_steps() -> None:
    """Also where a step was not taken, and is taken again."""
    found = []
    for wrap in (OnDevice, lambda a: a):
        params = {k: draw(k, 600, ml_dtypes.bfloat16) for k in (0, 1)}
        tree = {str(k): wrap(p) for k, p in params.items()}
        options: dict[str, Any] = {"wait": False} if wrap is OnDevice else {}
        optimizer = fo.Optimizer(
            tree, fo.AdamW(), rounding="stochastic", state_dtype="float8", clip_norm=1.0, **options
        )
        for t, active in enumerate(((0, 1), (1,), (0,), (0, 1))):
            given = {str(k): wrap(draw(9 + t, 600, np.float32)) if k in active else None
                     for k in (0, 1)}  # fmt: skip
            if t == 2:
                spoilt = {"0": wrap(np.full(600, np.nan, np.float32)), "1": None}

                def act(optimizer: Any = optimizer, spoilt: Any = spoilt) -> None:
                    optimizer.step(spoilt)
                    optimizer.synchronize()

                with pytest.raises(FloatingPointError):
                    act()
            optimizer.step(given)
        found.append((params, optimizer.fingerprint()))
    assert_same({str(k): p for k, p in found[0][0].items()},
                {str(k): p for k, p in found[1][0].items()})  # fmt: skip
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("options", [{"rounding": "kahan"}, {"master": "split16"}], ids=str)
def test_what_stands_beside_a_parameter_is_kept(options: dict[str, Any]) -> None:
    found = []
    for wrap in (OnDevice, lambda a: a):
        p = draw(0, (20, 30), ml_dtypes.bfloat16)
        optimizer = fo.Optimizer({"w": wrap(p)}, fo.Lion(lr=1e-3), ema=0.5, **options)
        optimizer.step({"w": wrap(draw(1, (20, 30), np.float32))})
        saved, before = optimizer.state_dict(), p.copy()
        with optimizer.averaged():
            average = p.copy()
        optimizer.step({"w": wrap(draw(2, (20, 30), np.float32))})
        p[...] = before
        optimizer.load_state_dict(saved)
        restored = optimizer.fingerprint()
        p[...] = 1
        optimizer.sync()
        optimizer.step({"w": wrap(draw(3, (20, 30), np.float32))})
        found.append((average.tobytes(), restored, optimizer.fingerprint()))
    assert found[0] == found[1]


def test_parts_of_larger_arrays_take_the_bits_of_these(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = storage.Storage.keys

    def keys(*arguments: Any, **options: Any) -> Any:
        found = whole(*arguments, **options)
        return [[key._replace(first_tile=3) for key in keys] for keys in found]

    before = run(RULES["adamw"], RANDOM["bfloat16"], "cuda", rounding="stochastic")[0]
    monkeypatch.setattr(storage.Storage, "keys", keys)
    compared(RULES["adamw"], RANDOM["bfloat16"], "parts", rounding="stochastic")
    after = run(RULES["adamw"], RANDOM["bfloat16"], "cuda", rounding="stochastic")[0]
    assert (before["a"] != after["a"]).any()
