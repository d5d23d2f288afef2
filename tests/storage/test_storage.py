"""Every storage: its memory, its contracts, what it must survive, and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from formatted import (
    ADAMW,
    BACKENDS,
    BF16,
    BLOCKED,
    F16,
    F32,
    F64,
    RULES,
    WAYS,
    Way,
    arrays_of,
    assert_same,
    draw,
    grads,
    held,
    made,
)
from fusedopt.arrays.stored import Quantized

ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
backends = pytest.mark.parametrize("backend", BACKENDS)


# ---------------------------------------------------------------- memory


@ways
@pytest.mark.parametrize("rule", [ADAMW, RULES["rmsprop"], fo.SGD()], ids=lambda r: r.name)
@pytest.mark.parametrize("n", [4095, 4096, 4097, 100_003])
def test_what_is_held_is_what_was_estimated(way: Way, rule: fo.Rule, n: int) -> None:
    options = way.arguments(rule)
    options.pop("zero_grads", None)
    p = np.zeros(n, way.p)
    opt = fo.Optimizer(p, rule, **options)
    there = sum(a.nbytes for a in arrays_of(opt.state["params"]).values())
    estimate = fo.estimate(p, rule, **options)
    assert (estimate.parameters, estimate.states, estimate.work) == (p.nbytes, there, 0)
    assert f"{p.nbytes} bytes of parameters, {there} of states, 0 of work" in opt.describe()
    for name, state in opt.state["params"].items():
        if isinstance(state, Quantized):
            assert n >= 4096
            assert state.nbytes == state.codes.nbytes + state.scales.nbytes
            assert state.dequantize().shape == p.shape
        elif name in rule.states:
            assert state.shape == p.shape


@pytest.mark.parametrize(
    ("state_dtype", "most"), [("float8", 2.1), ("dynamic8", 2.1), ("dynamic4", 1.1)]
)
@pytest.mark.parametrize("n", [4096, 4097, 100_003])
def test_bytes_for_each_parameter(state_dtype: str, most: float, n: int) -> None:
    assert fo.estimate(np.zeros(n, BF16), fo.AdamW(), state_dtype=state_dtype).states <= most * n


def test_small_leaves_say_that_they_are_not_quantised() -> None:
    params = {"small": np.zeros(4095, BF16), "large": np.zeros(4096, F32), "d": np.zeros(9)}
    opt = fo.Optimizer(params, fo.AdamW(), state_dtype={"m": "bfloat16", "v": "float8"})
    small, large, double = opt.describe().splitlines()[1:4]
    assert small.endswith("m bfloat16, v float32 (below 4096 elements)")
    assert large.endswith("m bfloat16, v float8")
    assert double.endswith("m bfloat16, v float64 (below 4096 elements)")
    assert opt.state["small"]["v"].dtype == np.float32
    assert opt.state["large"]["v"].codes.dtype == np.uint8


# ---------------------------------------------------------------- contracts


@ways
@backends
def test_resuming_gives_the_bits_of_not_stopping(way: Way, backend: str) -> None:
    straight, resumed = (made(way, seed=s, backend=backend) for s in (0, 50))
    for t in (10, 20):
        straight.step(grads(way, t))
    saved = straight.state_dict()
    kept, travelled = copy.deepcopy(saved), pickle.loads(pickle.dumps(saved))
    other = fo.Optimizer(
        copy.deepcopy(straight.params), ADAMW, seed=7, backend=backend, **way.arguments(ADAMW)
    )
    other.load_state_dict(travelled)
    assert_same(held(other), held(straight))
    assert other.step_count == 2
    for t in (30, 40):
        straight.step(grads(way, t))
        other.step(grads(way, t))
    assert_same(held(other), held(straight))
    assert other.fingerprint() == straight.fingerprint()
    for there in (saved, travelled):  # neither was written by the steps
        for path, leaf in there["leaves"].items():
            assert_same(leaf["state"], kept["leaves"][path]["state"])
    resumed.load_state_dict(saved)
    assert resumed.state_dict()["seed"] == saved["seed"]


@ways
def test_twins(way: Way) -> None:
    opt = made(way, seed=3)
    opt.step(grads(way, 10))
    before = held(opt)
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert_same(held(twin), before)
        assert twin.fingerprint() == opt.fingerprint()
        twin.step(grads(way, 20))
        assert_same(held(opt), before)
    opt.step(grads(way, 20))
    assert_same(held(twin), held(opt))


@ways
def test_fingerprints_see_every_array(way: Way) -> None:
    opt = made(way)
    opt.step(grads(way, 10))
    seen = {opt.fingerprint()}
    live = [opt.params["a"], *arrays_of(opt.state["a"]).values()]
    for array in live:
        array.view(np.uint8)[3] ^= 1
        seen.add(opt.fingerprint())
    assert len(seen) == 1 + len(live)


def test_state_dicts_of_other_storages_are_refused() -> None:
    for name, way in WAYS.items():
        opt = made(way)
        opt.step(grads(way, 10))
        before = opt.fingerprint()
        for other, another in WAYS.items():
            if (way.p, way.arguments(ADAMW)) == (another.p, another.arguments(ADAMW)):
                continue
            saved = made(another).state_dict()
            if saved["leaves"]["a"]["formats"] == opt.state_dict()["leaves"]["a"]["formats"]:
                continue  # rounding is not a matter of what is stored
            with pytest.raises(ValueError, match="state_dict does not fit: a: ") as raised:
                opt.load_state_dict(saved)
            for part in ("formats",) + ("a: dtype",) * (way.p != another.p):
                assert part in str(raised.value), f"{name}, {other}"
        assert opt.fingerprint() == before


def test_every_misfit_is_named() -> None:
    params = {"a": draw(0, 5003, BF16), "b": draw(1, 5003, BF16)}
    opt = fo.Optimizer(params, fo.AdamW(), state_dtype="float8", master="split16")
    saved = fo.Optimizer(params, fo.AdamW(), state_dtype={"m": "dynamic4"}).state_dict()
    with pytest.raises(ValueError, match="does not fit") as raised:
        opt.load_state_dict(saved)
    for part in (
        "a: formats {'p': 'split16', 'm': 'float8', 'v': 'float8'} here,"
        " {'p': 'bfloat16', 'm': 'dynamic4', 'v': 'float32'} there",
        "a: states ['low', 'm.codes', 'm.scales', 'v.codes', 'v.scales'] here,"
        " ['m.codes', 'm.scales', 'v'] there",
        "a: m.codes: uint8 of shape (5003,) here, uint8 of shape (2502,) there",
        "b: m.scales: float32 of shape (20,) here, float32 of shape (40,) there",
    ):
        assert part in str(raised.value)


# ---------------------------------------------------------------- traps


@pytest.mark.parametrize("n", [1, 7, 4096, 4097, 100_003])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
def test_every_element_trains(dtype: Any, n: int) -> None:
    p = np.ones(n, dtype)
    fo.Optimizer(p, fo.SGD(lr=0.25)).step(np.full(n, 2, dtype))
    assert (p == 0.5).all()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_loading_keeps_states_wider_than_the_parameter(rounding: Any) -> None:
    p = draw(0, 5003, BF16)
    opt = fo.Optimizer(p, ADAMW, rounding=rounding)
    opt.step(draw(1, 5003, F32))
    state = opt.state["params"]["v"]
    assert state.dtype == np.float32
    assert (state != state.astype(BF16)).any()
    other = fo.Optimizer(p.copy(), ADAMW, rounding=rounding)
    other.load_state_dict(opt.state_dict())
    assert_same({"v": other.state["params"]["v"]}, {"v": state})


NARROW = ("float32", "bfloat16", *BLOCKED)


@pytest.mark.parametrize("p_dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("state_dtype", NARROW)
@pytest.mark.parametrize("rule", [ADAMW, fo.RMSProp(rho=0.999), fo.Lion()], ids=lambda r: r.name)
def test_decayed_states_hold_no_denormals(rule: fo.Rule, state_dtype: str, p_dtype: Any) -> None:
    """After a million steps without gradients, which are jumped over: states just above zero."""
    least = float(np.finfo(np.float32).smallest_normal)
    start = least * 2.0 ** np.random.default_rng(0).uniform(0, 12, 5003)
    p = np.zeros(5003, p_dtype)
    opt = fo.Optimizer(p, rule, state_dtype=state_dtype)
    memory, _ = opt.leaf_state("params")
    for name, state in memory.states.items():
        sign = 1 if name in rule.nonnegative else np.resize([1, -1], 5003)
        state.write(state.format.encode((sign * start).astype(np.float32)))
    zero = np.zeros(5003, p_dtype)
    for _ in range(20):
        opt.step(zero)
        for name, state in memory.states.items():
            values = np.abs(state.values)
            assert not ((values > 0) & (values < least)).any(), name
    assert np.isfinite(p).all()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("rule", [ADAMW, fo.Adam(), fo.RMSProp(), fo.AdaGrad()], ids=repr)
def test_constants_keep_their_values_in_narrow_types(rule: fo.Rule, dtype: Any) -> None:
    """eps is no zero beside float16 and betas are no ones beside bfloat16."""
    p = np.full(5003, 0.5, dtype)
    opt = fo.Optimizer(p, rule, state_dtype=dtype.name)
    for _ in range(3):
        opt.step(np.zeros(5003, dtype))
    assert (np.abs(p.astype(np.float64) - 0.5) < 2e-3).all()
    assert not any(state.any() for state in opt.state["params"].values())


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float16", *BLOCKED])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
def test_adams_first_step_is_the_learning_rate(dtype: Any, state_dtype: str) -> None:
    g = draw(0, 100_003, dtype)
    g = np.where(np.abs(g) < 1e-3, np.asarray(0.5, dtype), g)
    p = np.zeros(100_003, dtype)
    fo.Optimizer(p, fo.Adam(lr=0.125), state_dtype=state_dtype).step(g)
    np.testing.assert_array_equal(p, (-0.125 * np.sign(g.astype(F32))).astype(dtype))


# ---------------------------------------------------------------- what is refused

ONES, HALF, BFLOAT = np.ones(5003, F32), np.ones(5003, F16), np.ones(5003, BF16)
NAMES = "float32, float64, bfloat16, float16, float8, dynamic8, dynamic4"
BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "state_dtype": (ONES, {"state_dtype": "int8"}, ValueError, f"expected one of {NAMES}; got 'i"),
    "of a state": (ONES, {"state_dtype": {"m": "fp8"}}, ValueError, f"one of {NAMES}; got 'fp8'"),
    "a dtype": (ONES, {"state_dtype": np.float32}, TypeError, f"one of {NAMES}, or a mapping"),
    "a number": (
        ONES,
        {"state_dtype": {"m": 8}},
        TypeError,
        "a mapping of states to these; got 8",
    ),
    "state": (ONES, {"state_dtype": {"w": "float8"}}, ValueError, r"\['w'\]: .* there are: m, v"),
    "master": (BFLOAT, {"master": "float64"}, ValueError, "expected one of float32, split16; got"),
    "no master": (ONES, {"master": "float32"}, ValueError, "of which there are none"),
    "split16": (HALF, {"master": "split16"}, ValueError, "goes with bfloat16, and params is float"),
    "rounding": (ONES, {"rounding": "up"}, ValueError, "one of nearest, stochastic, kahan; got 'u"),
    "kahan": (HALF, {"rounding": "kahan"}, ValueError, "is for bfloat16 parameters, of which"),
    "both": (BFLOAT, {"rounding": "kahan", "master": "split16"}, ValueError, "with master='split"),
    "stochastic": (
        ONES,
        {"rounding": "stochastic"},
        ValueError,
        "in bfloat16, float16 or quantised, of which",
    ),
    "masters": (
        BFLOAT,
        {"rounding": "stochastic", "master": "float32", "state_dtype": "float32"},
        ValueError,
        "in bfloat16, float16 or quantised, of which there are none",
    ),
    "seed": (BFLOAT, {"seed": -1}, ValueError, "seed: expected an integer >= 0, got -1"),
    "zero_grads": (ONES, {"zero_grads": 1}, TypeError, "zero_grads: expected True or False, got 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_options_that_do_not_fit(name: str) -> None:
    p, options, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        fo.Optimizer(p, fo.AdamW(), **options)
    if not options.keys() & {"seed", "zero_grads"}:
        with pytest.raises(kind, match=message):
            fo.estimate(p, fo.AdamW(), **options)
    if options.keys() == {"state_dtype"}:
        with pytest.raises(kind, match=message):
            fo.AdamW().init(p, **options)
    assert (p == 1).all()


@pytest.mark.parametrize("dtype", ["int8", "int32", "longdouble", "complex64", "float8_e4m3fn"])
def test_other_dtypes_are_refused_by_name(dtype: str) -> None:
    bad = np.ones(5003, dtype)
    message = f"expected float32, float64, bfloat16 .* or float16, got {bad.dtype}"
    with pytest.raises(TypeError, match="params: " + message):
        fo.Optimizer(bad, fo.SGD())
    with pytest.raises(TypeError, match="params: " + message):
        fo.estimate(bad, fo.SGD())
    opt = made(WAYS["bfloat16"])
    before = held(opt)
    with pytest.raises(TypeError, match=r"grads\['a'\]: " + message):
        opt.step({"a": bad, "b": [None]})
    assert_same(held(opt), before)
