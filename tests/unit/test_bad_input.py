"""What is refused, how the refusal reads, and that nothing has changed then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from exactness import Array
from fusedopt.system.extension import core

BACKENDS = ["native", "reference"]


def unaligned(n: int) -> np.ndarray:
    return np.frombuffer(bytearray(4 * n + 1), np.float32, n, 1)


def swapped(values: Any) -> np.ndarray:
    return np.array(values, np.dtype(np.float32).newbyteorder())


def read_only() -> np.ndarray:
    a = np.ones(3)
    a.flags.writeable = False
    return a


class Foreign:
    """An array of a library that gives copies only."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
        return np.ones(2)


SHARED = np.ones(10)

BAD_PARAMETERS: dict[str, tuple[Any, type[Exception], str]] = {
    "int": (np.ones(3, np.int64), TypeError, r"got int64; pass an array of one of these dtypes"),
    "integer": (np.ones(3, np.int32), TypeError, r"expected float32, .* or float16, got int32"),
    "longdouble": (np.ones(3, np.longdouble), TypeError, r"expected float32, float64, bfloat16"),
    "complex": (np.ones(3, np.complex64), TypeError, r"got complex64"),
    "object": (np.array([1.0, None]), TypeError, r"got object"),
    "bytes swapped": (swapped([1, 2]), TypeError, r"expected native byte order, got >f4"),
    "a list of numbers": ([1.0, 2.0], TypeError, r"params\['w'\]\[0\]: expected an ndarray"),
    "a scalar": (1.0, TypeError, r"expected an ndarray, got a float; keep the parameters as ndarr"),
    "NumPy's scalar": (np.float32(1), TypeError, r"got a float32; keep .* would be a copy\)"),
    "another library's": (
        Foreign(),
        TypeError,
        r"as ndarrays, .*, and make what \w+ needs of them",
    ),
    "None": (None, ValueError, r"found no arrays"),
    "masked": (np.ma.masked_equal([1.0, 2.0], 2.0), TypeError, r"masks are not supported"),
    "read-only": (read_only(), ValueError, r"params\['w'\]: is read-only"),
    "strided": (np.ones(10)[::2], ValueError, r"is not dense \(shape \(5,\), strides \(16,\)\)"),
    "reversed": (np.ones(4)[::-1], ValueError, r"is not dense"),
    "broadcast": (np.broadcast_to(np.ones(1), (4,)), ValueError, r"is read-only"),
    "unaligned": (unaligned(5), ValueError, r"is not aligned"),
    "overlapping": (
        [SHARED[:6], SHARED[5:]],
        ValueError,
        r"params\['w'\]\[1\]: shares memory with params\['w'\]\[0\]",
    ),
    "twice": ([SHARED, SHARED], ValueError, r"shares memory with"),
    "two views": ([SHARED, SHARED.reshape(2, 5)], ValueError, r"shares memory with"),
    "colliding keys": (
        {"a": {"b": np.ones(1)}, "a.b": np.ones(1)},
        ValueError,
        r"params\['w'\]\['a.b'\]: has the path 'w.a.b' of params\['w'\]\['a'\]\['b'\]; rename",
    ),
    "colliding numbers": ({1: np.ones(1), "1": np.ones(1)}, ValueError, r"has the path 'w.1'"),
    "nothing": ({}, ValueError, r"found no arrays"),
}


@pytest.mark.parametrize("name", BAD_PARAMETERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters(name: str, backend: str) -> None:
    value, kind, message = BAD_PARAMETERS[name]
    with pytest.raises(kind, match=message):
        fo.Optimizer({"w": value}, fo.AdamW(), backend=backend)


@pytest.fixture(params=BACKENDS)
def opt(request: pytest.FixtureRequest) -> Iterator[fo.Optimizer]:
    """An optimizer after one step; whatever the test does with it must leave it as it was."""
    params = {"a": np.ones((3, 4), np.float32), "b": [np.ones(5), np.full((), 2.0)]}
    optimizer = fo.Optimizer(params, fo.AdamW(weight_decay=0.1), backend=request.param)
    optimizer.step(gradients())
    before = optimizer.fingerprint()
    yield optimizer
    assert optimizer.fingerprint() == before


def gradients(**replaced: Any) -> dict[str, Any]:
    return {"a": np.ones((3, 4), np.float32), "b": [np.ones(5), np.ones(())]} | replaced


BAD_GRADIENTS: dict[str, tuple[Any, type[Exception], str]] = {
    "dtype": (
        gradients(a=np.ones((3, 4), int)),
        TypeError,
        r"grads\['a'\]: expected float32, .* or float16, got int64",
    ),
    "byte order": (gradients(a=swapped(np.ones((3, 4)))), TypeError, r"native byte order"),
    "masked": (gradients(a=np.ma.ones((3, 4))), TypeError, r"masks are not supported"),
    "shape": (
        gradients(a=np.ones((4, 3), np.float32)),
        ValueError,
        r"grads\['a'\]: expected the shape \(3, 4\) of params\['a'\], got \(4, 3\)",
    ),
    "flat": (gradients(a=np.ones(12)), ValueError, r"expected the shape \(3, 4\)"),
    "one element": (gradients(b=[np.ones(5), np.ones(1)]), ValueError, r"grads\['b'\]\[1\]"),
    "number": (gradients(b=[np.ones(5), 1.0]), TypeError, r"expected an ndarray, got a float"),
    "missing key": ({"a": np.ones((3, 4))}, ValueError, r"missing \['b'\], unknown \[\]"),
    "unknown key": (gradients(c=np.ones(1)), ValueError, r"missing \[\], unknown \['c'\]"),
    "short list": (gradients(b=[np.ones(5)]), ValueError, r"length 2, got a list of length 1"),
    "None for many": (gradients(b=None), TypeError, r"list or tuple of length 2, got None"),
    "array for many": (gradients(b=np.ones(2)), TypeError, r"got a ndarray"),
    "list for an array": (gradients(a=[np.ones(4)] * 3), TypeError, r"expected one array, got"),
    "one array": (np.ones(3), TypeError, r"grads: expected a dict with the keys \['a', 'b'\]"),
    "None": (None, TypeError, r"grads: expected a dict"),
    "fixed": (
        fo.Fixed(gradients()),
        TypeError,
        r"grads: Fixed is for arrays on a CUDA device; for arrays on the host pass the tree",
    ),
}


@pytest.mark.parametrize("name", BAD_GRADIENTS)
def test_gradients(name: str, opt: fo.Optimizer) -> None:
    value, kind, message = BAD_GRADIENTS[name]
    with pytest.raises(kind, match=message):
        opt.step(value)


def test_the_last_leaf_is_as_good_a_reason_as_the_first(opt: fo.Optimizer) -> None:
    with pytest.raises(ValueError, match=r"grads\['b'\]\[1\]"):
        opt.step(gradients(b=[np.ones(5), np.ones(3)]))


def test_gradients_that_are_parameters_or_states(opt: fo.Optimizer) -> None:
    p = opt.params["a"]
    for g, what in (
        (p, r"shares memory with params\['a'\]"),
        (opt.state["a"]["m"], r"shares memory with a state of params\['a'\]"),
        (np.lib.stride_tricks.as_strided(p, (3, 4), (4, 12)), r"shares memory"),
    ):
        with pytest.raises(ValueError, match=what):
            opt.step(gradients(a=g))
    with pytest.raises(ValueError, match=r"grads\['b'\]\[0\]: shares memory with params\['a'\]"):
        opt.step(gradients(b=[p.reshape(-1)[:5], np.ones(())]))


def test_gradients_may_overlap_each_other() -> None:
    params = [np.ones(6), np.ones(6)]
    g = np.arange(8.0)
    fo.Optimizer(params, fo.SGD(lr=1.0)).step([g[:6], g[2:]])
    np.testing.assert_array_equal(params, [1 - g[:6], 1 - g[2:]])


def test_parameters_made_unfit_later(opt: fo.Optimizer) -> None:
    p = opt.params["a"]
    p.flags.writeable = False
    with pytest.raises(ValueError, match=r"params\['a'\]: is read-only"):
        opt.step(gradients())
    p.flags.writeable = True


@pytest.mark.filterwarnings("ignore:Setting the shape")
def test_parameters_reshaped_later() -> None:
    p = np.ones((3, 4))
    opt = fo.Optimizer(p, fo.SGD(lr=1.0))
    p.resize((4, 4), refcheck=False)
    with pytest.raises((ValueError, RuntimeError), match=r"shape|rebind"):
        opt.step(np.ones((3, 4)))


def test_hessian_where_there_is_no_use_for_one(opt: fo.Optimizer) -> None:
    with pytest.raises(
        ValueError, match=r"hessian: params\['a'\] is updated by AdamW, which takes"
    ):
        opt.step(gradients(), hessian=gradients())


@pytest.mark.parametrize("backend", BACKENDS)
def test_hessian_of_another_shape(backend: str) -> None:
    p = np.ones(3)
    opt = fo.Optimizer(p, fo.Sophia(), backend=backend)
    with pytest.raises(ValueError, match=r"hessian: expected the shape \(3,\) of params, got"):
        opt.step(np.ones(3), hessian=np.ones(4))
    assert opt.step_count == 0
    np.testing.assert_array_equal(p, 1)


BAD_RULES: dict[str, tuple[Any, type[Exception], str]] = {
    "a name": ("adamw", TypeError, r"expected a rule, a mapping of patterns to rules or"),
    "a class": ({"*": fo.AdamW}, TypeError, r"rule\['\*'\]: .*call the class"),
    "a class alone": (fo.AdamW, TypeError, r"takes 1 positional argument"),
    "no match": (
        {"x.*": fo.SGD(), "a": fo.SGD()},
        ValueError,
        r"rule\['x.\*'\]: matches no leaf; the leaves are 'a', 'b.0'",
    ),
    "left over": ({"a": fo.SGD()}, ValueError, r"params\['b'\]\[0\]: no pattern of \['a'\]"),
    "callable": (lambda path, a: None, TypeError, r"rule\('a', array\): expected a rule"),
    "vectors to Muon": (
        fo.Muon(),
        ValueError,
        r"params\['b'\]\[0\]: Muon updates arrays of two dimensions or more, got shape \(3,\);"
        r" send it to AdamW by a pattern",
    ),
}


@pytest.mark.parametrize("name", BAD_RULES)
def test_rules(name: str) -> None:
    rule, kind, message = BAD_RULES[name]
    with pytest.raises(kind, match=message):
        fo.Optimizer({"a": np.ones((2, 2)), "b": [np.ones(3)]}, rule)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"threads": 0}, ValueError, r"threads: expected an integer >= 1 and below 2\^31, got 0"),
        ({"threads": 1.5}, TypeError, r"threads"),
        ({"backend": "fast"}, ValueError, r"auto, native, numba, reference, cuda; got 'fast'"),
        ({"clip": 1.0}, TypeError, r"clip"),
        ({"clip_norm": 0.0}, ValueError, r"clip_norm: expected a number > 0, got 0.0"),
        ({"clip_norm": "1"}, TypeError, r"clip_norm: expected a number, got .1."),
        ({"clip_norm": {"x": 1.0}}, ValueError, r"clip_norm: .* for each of \['sgd'\]"),
        ({"clip_value": -1.0}, ValueError, r"clip_value: expected a number > 0"),
        ({"clip_value": 1.0, "clip_norm": 1.0}, ValueError, r"give one of them"),
        ({"ema": 1.5}, ValueError, r"ema: expected a number in \[0, 1\]"),
        ({"ema": 10**400}, ValueError, r"ema: expected a number in \[0, 1\]"),
        ({"ema": "0.9"}, TypeError, r"ema"),
        ({"stats": 1}, TypeError, r"stats"),
        ({"skip_nonfinite": None}, TypeError, r"skip_nonfinite"),
        ({"verify": "yes"}, TypeError, r"verify: expected True or False, got 'yes'"),
    ],
)
def test_options(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fo.Optimizer(np.ones(3), fo.SGD(), **options)


def test_update() -> None:
    rule = fo.Momentum()
    p, g, (v,) = np.ones(3), np.ones(3), rule.init(np.ones(3))
    bad: list[tuple[Any, type[Exception], str]] = [
        (lambda: fo.update(rule, 0, p, g, v), ValueError, r"step: expected an integer >= 1"),
        (lambda: fo.update(rule, True, p, g, v), ValueError, r"step"),
        (lambda: fo.update("sgd", 1, p, g), TypeError, r"rule: expected"),  # type: ignore[arg-type]
        (lambda: fo.update(rule, 1, p, g), TypeError, r"states: Momentum has 1 \(v\), got 0"),
        (lambda: fo.update(fo.SGD(), 1, p, g, v), TypeError, r"SGD has 0, got 1"),
        (
            lambda: fo.update(rule, 1, p, g, v.astype(np.int64)),
            TypeError,
            r"v: expected float32, .* got int64",
        ),
        (lambda: fo.update(rule, 1, p, g, np.ones(4)), ValueError, r"v: expected"),
        (lambda: fo.update(rule, 1, p, g, p), ValueError, r"v: shares memory with p"),
        (lambda: fo.update(rule, 1, p, p, v), ValueError, r"g: shares memory with p"),
        (lambda: fo.update(rule, 1, p, v, v), ValueError, r"g: shares memory with a state of p"),
        (lambda: fo.update(rule, 1, p, np.ones(4), v), ValueError, r"g: expected the shape"),
        (lambda: fo.update(rule, 1, p, None, v), TypeError, r"g: expected an ndarray, got None"),  # type: ignore[arg-type]
        (lambda: fo.update(rule, 1, np.ones(6)[::2], g, v), ValueError, r"p: is not dense"),
        (lambda: fo.update(rule, 1, p, g, v, hessian=g), ValueError, r"Momentum takes none"),
        (lambda: fo.update(fo.Muon(), 1, p, g, v), ValueError, r"p: Muon updates arrays of two"),
    ]
    for call, kind, message in bad:
        with pytest.raises(kind, match=message):
            call()
    np.testing.assert_array_equal((p, g, v), (np.ones(3), np.ones(3), np.zeros(3)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_zero_dimensional_arrays(backend: str) -> None:
    params = {"none": np.ones((0, 3)), "scalar": np.full((), 3.0), "some": np.ones(2)}
    opt = fo.Optimizer(params, fo.AdamW(lr=0.1, weight_decay=0.0), backend=backend)
    opt.step({"none": np.ones((0, 3)), "scalar": np.full((), -2.0), "some": np.ones(2)})
    assert params["scalar"] == pytest.approx(3.1)
    assert params["some"] == pytest.approx(0.9)
    matrices = [np.ones((0, 3)), np.ones((3, 0)), np.ones((1, 1))]
    fo.Optimizer(matrices, fo.Muon(lr=0.1), backend=backend).step([m.copy() for m in matrices])
    assert matrices[2][0, 0] != 1.0


def test_unusual_but_legal_arrays() -> None:
    class Sub(np.ndarray):
        pass

    tagged = np.dtype(np.float32, metadata={"unit": "m"})
    makers: list[Any] = [
        lambda: np.ones((2, 3), np.float32).view(Sub),
        lambda: np.ones((2, 3), tagged),
        lambda: np.ones((2, 3), np.float32, order="F"),
        lambda: np.asfortranarray(np.ones((2, 3), tagged)).view(Sub),
        lambda: np.lib.stride_tricks.as_strided(np.ones(6, np.float32), (1, 6), (400, 4)),
    ]
    for make in makers:
        for make_gradient in makers:
            p, g = make(), make_gradient().reshape(make().shape)
            fo.Optimizer(p, fo.SGD(lr=0.5)).step(g)
            np.testing.assert_array_equal(p, 0.5)


def test_tuples_of_arrays_are_no_rows() -> None:
    # The core takes rows, once these are checked, as such tuples: a caller's own must not pass.
    p = np.zeros((3, 4), np.float32)
    optimizer = fo.Optimizer({"w": p}, fo.SGD())
    beyond = (np.array([2]), np.array([1 << 40]), np.ones((1, 4), np.float32))
    for leaf in (beyond, (np.array([1 << 40]), np.array([0]), beyond[2])):
        with pytest.raises(TypeError, match="w"):
            optimizer.step({"w": leaf})
        with pytest.raises(TypeError, match="w"):
            optimizer.accumulate({"w": leaf})
    assert not p.any()


def test_a_key_that_takes_the_tree_of_a_native_step_apart() -> None:
    others: list[Any] = []

    class Key:
        def __hash__(self) -> int:
            return hash("v")

        def __eq__(self, other: object) -> bool:
            grads.clear()  # nothing but the walk holds the dict, whose memory is soon in use again
            others.extend({"v": np.full(3, 9.0), "w": np.full(3, 9.0)} for _ in range(100))
            return other == "v"

    grads: list[Any] = [{Key(): np.ones(3), "w": np.ones(3)}]
    params = [{"v": np.ones(3), "w": np.ones(3)}]
    fo.Optimizer(params, fo.SGD(lr=1.0), backend="native").step(grads)
    assert others
    assert params[0]["v"].tolist() == params[0]["w"].tolist() == [0.0] * 3


SPOILT_PLANS: dict[str, tuple[str, Any]] = {
    "a tree that is none": ("tree", "g"),
    "a dict of fewer keys than children": ("tree", (["w"], [0, 1])),
    "no program": ("programs", [None]),
    "a parameter of an empty tuple": ("arrays", [[()], [np.ones(3)]]),
    "counters in another dtype": ("counters", np.zeros(3, np.int8)),
    "too few counters": ("counters", np.zeros(2, np.int64)),
    "too many rates": ("rates", np.zeros(2)),
    "too many factors": ("factors", np.ones(2)),
    "rates that are none": ("rates", None),
    "results in another dtype": ("results", np.zeros((2, 3), np.float32)),
    "results that lie apart": ("results", np.zeros((2, 6))[:, ::2]),
    "no array beside": ("beside", [None]),
}


@pytest.mark.parametrize("name", SPOILT_PLANS)
def test_native_plans(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # None of our code makes such a plan; one that did should hear of it, and not write elsewhere.
    make, spoilt = core.Plan, dict([SPOILT_PLANS[name]])
    monkeypatch.setattr(core, "Plan", lambda description: make(description._replace(**spoilt)))
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        fo.Optimizer({"w": np.ones(3), "v": np.ones(3)}, fo.SGD(), backend="native")


@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_gradients_may_be_scalars_of_numpy(dtype: Any, backend: str) -> None:
    """NumPy's reductions give them for parameters without dimensions."""
    runs = []
    for scalar in (dtype(0.75), np.full((), 0.75, dtype)):
        params = {"w": np.ones(3, np.float32), "bias": np.zeros((), np.float32)}
        opt = fo.Optimizer(params, fo.Adam(), backend=backend, clip_norm=1.0)
        grads = {"w": np.ones(3), "bias": scalar}
        opt.step(grads)
        opt.accumulate(grads)
        opt.step()
        bias = np.zeros((), np.float32)
        fo.update(fo.SGD(), 1, bias, scalar)
        runs.append((opt.fingerprint(), bias.tobytes(), fo.global_norm(grads)))
    assert runs[0] == runs[1]


def test_scalars_of_numpy_cannot_be_zeroed() -> None:
    p = np.zeros(())
    opt = fo.Optimizer(p, fo.SGD(), zero_grads=True)
    with pytest.raises(ValueError, match="read-only"):
        opt.step(np.float64(1))
    assert p == opt.step_count == 0
