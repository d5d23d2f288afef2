"""Masters, compensation, copies of the new parameters, and gradients that are zeroed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from exactness import Array
from formatted import (
    BACKENDS,
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    RULES,
    arrays_of,
    assert_same,
    draw,
    held,
    on_each_isa,
    shaped,
)

rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
backends = pytest.mark.parametrize("backend", BACKENDS)
MASTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "float32": (F16, {"master": "float32"}),
    "split16": (BF16, {"master": "split16"}),
    "kahan": (BF16, {"rounding": "kahan"}),
}
masters = pytest.mark.parametrize(("dtype", "options"), MASTERS.values(), ids=MASTERS)


def joined(high: Array, low: Array) -> Array:
    """The float32 of a bfloat16 and the 16 bits below it, which have a sign."""
    bits = high.view(np.uint16).astype(np.int64) * 65536 + low.view(np.int16)
    return bits.astype(np.uint32).view(np.float32)


def rounded_away(x: Array) -> Array:
    """float32 to the nearest bfloat16; half ways to the one farther from zero."""
    bits = x.view(np.uint32)
    near = (bits + np.uint32(0x8000)) >> np.uint32(16)
    return np.where(np.isnan(x), x.astype(BF16), near.astype(np.uint16).view(BF16))


@pytest.mark.parametrize("special", [False, True], ids=["finite", "special"])
@rules
def test_masters_go_the_way_of_float32(rule: fo.Rule, special: bool) -> None:
    shape = shaped(rule, 5003)
    for isa in on_each_isa():
        p = draw(0, shape, BF16)
        params = {"float32": p.astype(np.float32), "split": p.copy(), "narrow": p.copy()}
        plain = fo.Optimizer(params["float32"], rule)
        split = fo.Optimizer(params["split"], rule, master="split16")
        narrow = fo.Optimizer(params["narrow"], rule, master="float32")
        for t in range(4):
            g = draw(10 + t, shape, BF16, special=special)
            estimate = draw(20 + t, shape, BF16) if rule.takes_hessian else None
            for opt in (plain, split, narrow):
                opt.step(g, hessian=estimate)
            want = params["float32"]
            low = split.state["params"]["low"].reshape(shape)
            assert_same({"p": joined(params["split"], low)}, {"p": want}, isa)
            assert_same({"p": params["split"]}, {"p": rounded_away(want)}, isa)
            assert_same({"p": narrow.state["params"]["master"]}, {"p": want}, isa)
            with np.errstate(invalid="ignore"):
                assert_same({"p": params["narrow"]}, {"p": want.astype(BF16)}, isa)


@pytest.mark.parametrize(
    ("options", "end", "within"),
    [
        ({}, 1.0, 0.0),
        ({"rounding": "kahan"}, 0.823, 0.002),
        ({"master": "split16"}, 0.79973, 1e-5 + 2**-9),
        ({"master": "float32"}, 0.79973, 1e-5 + 2**-9),
        ({"rounding": "stochastic"}, 0.8, 0.002),
    ],
)
def test_updates_below_the_spacing(options: dict[str, Any], end: float, within: float) -> None:
    """20000 updates by 1e-5 from 1, next to which 0.996 is the nearest bfloat16; exactly, 0.8."""
    p, g = np.ones(4099, BF16), np.ones(4099, BF16)
    opt = fo.Optimizer(p, fo.SGD(lr=1e-5), **options)
    for _ in range(20_000):
        opt.step(g)
    values = p.astype(np.float64)
    assert abs(values.mean() - end) <= within
    if options.get("rounding") == "stochastic":
        assert 0.01 < values.std() < 0.05
    else:
        assert values.std() == 0
    for master in arrays_of(opt.state["params"]).values():
        if "master" in options:
            exact = master if master.dtype == F32 else joined(p, master)
            np.testing.assert_allclose(exact, 0.79973, atol=1e-5)


def test_kahan_by_hand() -> None:
    """The parameter and what it fell short by, both bfloat16: their sum moves by the update."""
    p, c = draw(0, 5003, BF16), np.zeros(5003, BF16)
    q = p.copy()
    opt = fo.Optimizer(p, fo.SGD(lr=0.001), rounding="kahan")
    for t in range(5):
        g = draw(t, 5003, F32)
        opt.step(g)
        new = q.astype(np.float32) + c.astype(np.float32) - np.float32(0.001) * g
        q = new.astype(BF16)
        c = (new - q.astype(np.float32)).astype(BF16)
        got = {"p": p, "compensation": opt.state["params"]["compensation"]}
        assert_same(got, {"p": q, "compensation": c})


# ---------------------------------------------------------------- parameters that the user writes


@masters
@backends
def test_sync(dtype: Any, options: dict[str, Any], backend: str) -> None:
    rule, g = fo.AdamW(lr=0.01, weight_decay=0.1), draw(1, 5003, dtype)
    p = draw(0, 5003, dtype)
    opt = fo.Optimizer(p, rule, backend=backend, **options)
    opt.step(g)
    saved = opt.state_dict()
    p[...] = draw(2, 5003, dtype)
    start = p.copy()
    opt.sync()
    opt.step(g)
    fresh = fo.Optimizer(start, rule, backend=backend, **options)
    kept = fresh.state_dict()["leaves"]["params"]["state"]
    name = next(iter(set(kept) - {"m", "v"}))
    saved["leaves"]["params"]["state"][name] = kept[name]
    fresh.load_state_dict(saved)
    fresh.step(g)
    assert_same(held(opt), held(fresh))


@masters
@pytest.mark.parametrize("copied", [False, True], ids=["", "copy_out"])
@backends
def test_a_forgotten_sync_is_noticed(
    dtype: Any, options: dict[str, Any], copied: bool, backend: str
) -> None:
    p, g = draw(0, 5003, dtype), draw(1, 5003, dtype)
    copy = np.zeros(5003, BF16)
    if copied:
        options = {**options, "copy_out": {"w": copy}}
    opt = fo.Optimizer({"w": p}, fo.AdamW(), verify=True, backend=backend, **options)
    opt.step({"w": g})
    copy[...] = 7  # is nobody's master
    opt.step({"w": g})
    p[4711] = 3.0
    before = held(opt)
    with pytest.raises(fo.VerificationError, match=r"params\['w'\]: was written .* call sync\(\)"):
        opt.step({"w": g})
    assert_same(held(opt), before)
    assert opt.step_count == 2
    opt.sync()
    opt.step({"w": g})
    assert abs(float(p[4711]) - 3) < 0.1


@masters
def test_rebind(dtype: Any, options: dict[str, Any]) -> None:
    """Equal values keep their masters; others are taken as they are."""
    rule, grads = fo.AdamW(lr=1e-4), [draw(k, 5003, dtype) for k in (1, 2)]
    stay, moved = draw(0, 5003, dtype), draw(0, 5003, dtype)
    one, other = (fo.Optimizer(p, rule, **options) for p in (stay, moved))
    for opt in (one, other):
        opt.step(grads[0])
    other.rebind(moved.copy())
    for opt in (one, other):
        opt.step(grads[1])
    assert_same(held(other), held(one))
    kept = moved.copy()
    fresh = stay + np.asarray(1, dtype)
    one.rebind(fresh)
    other.params[...] = fresh
    other.sync()
    for opt in (one, other):
        opt.step(grads[0])
    assert_same(held(other), held(one))
    np.testing.assert_array_equal(moved, kept)


# ---------------------------------------------------------------- copies


@backends
@pytest.mark.parametrize("verify", [False, True], ids=["", "verified"])
@pytest.mark.parametrize("copied", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_copies_of_every_dtype(dtype: Any, copied: Any, verify: bool, backend: str) -> None:
    params = {"a": draw(0, 5003, dtype), "b": draw(1, 4097, dtype), "c": draw(2, (3, 7), dtype)}
    copies = {"a": np.ones(5003, copied), "c": np.ones((3, 7), copied)}
    opt = fo.Optimizer(
        params,
        fo.AdamW(weight_decay=0.1),
        copy_out={**copies, "b": None},
        verify=verify,
        backend=backend,
    )
    for t in range(2):
        opt.step({key: draw(3 + t, p.shape, F32) for key, p in params.items()})
    for key, copy in copies.items():
        p = params[key]
        if dtype in (F32, F64):  # else it is of what the parameter was before it was rounded
            by_way = p.astype(np.float32) if copied in (BF16, F16) else p
            assert_same({key: copy}, {key: by_way.astype(copied)})
        near = np.abs(copy.astype(np.float64) - p.astype(np.float64))
        assert (near <= 2.0**-8 * np.abs(p.astype(np.float64)) + 1e-7).all(), key


@pytest.mark.parametrize("options", [{}, {"rounding": "stochastic"}], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("copied", DTYPES.values(), ids=DTYPES)
def test_backends_agree_on_copies(copied: Any, options: dict[str, Any]) -> None:
    results = []
    for backend in BACKENDS:
        p, copy = draw(0, 5003, BF16), np.zeros(5003, copied)
        opt = fo.Optimizer(p, fo.SGD(lr=1.0), backend=backend, copy_out=copy, **options)
        opt.step(draw(1, 5003, F32))
        results.append({"p": p, "copy": copy})
    assert_same(results[0], results[1])


@pytest.mark.parametrize("master", ["float32", "split16"])
def test_copies_are_of_masters(master: Any) -> None:
    p, copy = draw(0, 5003, BF16), np.zeros(5003, F32)
    opt = fo.Optimizer(p, fo.AdamW(), master=master, copy_out=copy)
    opt.step(draw(1, 5003, BF16))
    own = arrays_of(opt.state["params"])
    want = own["master"] if master == "float32" else joined(p, own["low"])
    assert_same({"copy": copy}, {"copy": want})


P = {"a": np.ones((60, 80), np.float32), "b": np.ones(5003, np.float32)}
BAD_COPIES: dict[str, tuple[Any, type[Exception], str]] = {
    "none": ({"a": None, "b": None}, ValueError, r"copy_out: has an array for no leaf"),
    "shape": (
        {"a": np.ones((80, 60), BF16), "b": None},
        ValueError,
        r"copy_out\['a'\]: expected the shape \(60, 80\) .* got \(80, 60\)",
    ),
    "order": (
        {"a": np.ones((60, 80), BF16, order="F"), "b": None},
        ValueError,
        r"copy_out\['a'\]: .* memory order C of params\['a'\], got \(60, 80\) and F",
    ),
    "dtype": (
        {"a": None, "b": np.ones(5003, np.int32)},
        TypeError,
        r"copy_out\['b'\]: expected float32, float64, bfloat16 .*, got int32",
    ),
    "strided": (
        {"a": None, "b": np.ones(10006, BF16)[::2]},
        ValueError,
        r"copy_out\['b'\]: is not dense",
    ),
    "read-only": (
        {"a": None, "b": np.broadcast_to(np.ones(1, BF16), (5003,))},
        ValueError,
        r"copy_out\['b'\]: is read-only",
    ),
    "parameter": ({"a": None, "b": P["b"]}, ValueError, r"copy_out\['b'\]: shares memory with"),
    "no array": ({"a": None, "b": 1.0}, TypeError, r"copy_out\['b'\]: expected an ndarray, got"),
    "missing": ({"a": None}, ValueError, r"copy_out: .*missing \['b'\]"),
}


@pytest.mark.parametrize("name", BAD_COPIES)
def test_copies_that_do_not_fit(name: str) -> None:
    value, kind, message = BAD_COPIES[name]
    with pytest.raises(kind, match=message):
        fo.Optimizer(P, fo.AdamW(), copy_out=value)


def test_gradients_that_overlap_what_is_written() -> None:
    for copies in (np.zeros(5003, F32), None):
        p = draw(0, 5003, F32)
        opt = fo.Optimizer(p, fo.AdamW(), copy_out=copies)
        named = {"params": p} if copies is None else {"params": p, "copy_out": copies}
        before = held(opt)
        for name, array in named.items():
            with pytest.raises(ValueError, match=f"grads: shares memory with {name},"):
                opt.step(array)
        for state in opt.state["params"].values():
            with pytest.raises(ValueError, match="grads: shares memory with a state of params,"):
                opt.step(state)
        assert_same(held(opt), before)


# ---------------------------------------------------------------- gradients that are zeroed


def layouts(values: Array) -> dict[str, Array]:
    """Gradients of equal values in memory that fits the parameter's, and in others."""
    wide = np.full((*values.shape, 2), 5, values.dtype)
    wide[..., 0] = values
    return {
        "C": values.copy(),
        "F": np.asfortranarray(values),
        "strided": wide[..., 0],
        "backwards": values[::-1, ::-1].copy()[::-1, ::-1],
        "float64": values.astype(np.float64),
        "bfloat16": values.astype(BF16),
        "float16": values.astype(np.float16),
    }


@backends
@pytest.mark.parametrize("verify", [False, True], ids=["", "verified"])
@pytest.mark.parametrize("rule", {**RULES, "muon": fo.Muon(weight_decay=0.1)}.values(), ids=RULES)
def test_gradients_are_zeroed(rule: fo.Rule, verify: bool, backend: str) -> None:
    values = draw(0, (61, 83), F32)
    values[:3, :3] = [[-0.0, np.nan, np.inf], [0, -np.inf, 1], [-1, -0.0, 2]]
    for kind, g in layouts(values).items():
        runs = []
        for zeroing in (True, False):
            p = draw(1, (61, 83), F32)
            opt = fo.Optimizer(p, rule, zero_grads=zeroing, verify=verify, backend=backend)
            given, surrounding = g.copy(order="K"), g.base
            opt.step(g if zeroing else given)
            if zeroing:
                assert not np.any(g), kind
                assert not np.signbit(g).any(), kind
                assert surrounding is None or kind != "strided" or (surrounding[..., 1] == 5).all()
                g[...] = given
            runs.append(held(opt))
        assert_same(runs[0], runs[1], kind)


@backends
@pytest.mark.parametrize("verify", [False, True], ids=["", "verified"])
def test_gradients_that_cannot_be_zeroed(verify: bool, backend: str) -> None:
    params = {"a": np.ones(5003, F32), "b": np.ones(5003, F32)}
    opt = fo.Optimizer(params, fo.Sophia(), zero_grads=True, verify=verify, backend=backend)
    opt.step({"a": np.ones(5003, F32), "b": None})
    buffer = np.ones(12_000, F32)
    fixed = np.ones(5003, F32)
    fixed.flags.writeable = False
    one, other = buffer[:5003], buffer[5000:10003]
    bad: list[tuple[Any, Any, str]] = [
        ({"a": one, "b": fixed}, None, r"grads\['b'\]: is read-only, and zero_grads"),
        ({"a": one, "b": other}, None, r"grads\['b'\]: shares memory with grads\['a'\]"),
        ({"a": one, "b": one}, None, r"grads\['b'\]: shares memory with grads\['a'\]"),
        ({"a": one, "b": buffer[:10006:2]}, None, r"grads\['b'\]: shares memory with"),
        ({"a": one, "b": np.ones(3, F32)}, None, r"grads\['b'\]: expected the shape"),
        ({"a": one, "b": params["a"]}, None, r"grads\['b'\]: shares memory with params\['a'\]"),
        # Another thread may have zeroed it by the time that it is read.
        ({"a": one, "b": None}, {"a": None, "b": other}, r"hessian\['b'\]: shares memory with"),
        ({"a": one, "b": None}, {"a": buffer[1:5004], "b": None}, r"hessian\['a'\]: shares memory"),
    ]
    before = held(opt)
    for grads, hessian, message in bad:
        with pytest.raises(ValueError, match=message):
            opt.step(grads, hessian=hessian)
        assert_same(held(opt), before)
        assert (buffer == 1).all()
        assert (fixed == 1).all()
    assert opt.step_count == 1


@pytest.mark.parametrize("name", ["split16", "float32"])
def test_zeroed_gradients_with_masters_and_none(name: str) -> None:
    dtype, options = MASTERS[name]
    params = {key: np.ones(5003, dtype) for key in "abc"}
    grads: dict[str, Any] = {key: np.ones(5003, dtype) for key in "abc"}
    grads["b"] = None
    fo.Optimizer(params, fo.AdamW(), zero_grads=True, **options).step(grads)
    assert not grads["a"].any()
    assert not grads["c"].any()
    assert (params["b"] == 1).all()
