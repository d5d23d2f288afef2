"""Tests of the CUDA backend on Numba's simulator: `test_cuda.py` runs them in another process.

The "device" is the host's memory. Blocks and chunks are small, so that a small tensor has several.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import exactness
import fusedopt as fo
from exactness import STEPS, Array, Case, Result, assert_same_bits, case, operands, stepped
from formatted import assert_same, draw
from fusedopt.cuda import kernels, launching, toolkit
from fusedopt.cuda.arrays import DeviceArray
from fusedopt.cuda.matrices import Library
from fusedopt.stepping import Stepper

DTYPES: list[Any] = [np.float32, np.float64, ml_dtypes.bfloat16, np.float16]


class OnDevice:
    """An array of a library that has the array interface. dtype: as the library has it."""

    def __init__(self, array: Array, **more: Any) -> None:
        self.array, self.dtype, self._more = array, array.dtype, more

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        told = {k: v for k, v in self.array.__array_interface__.items() if k != "descr"}
        typestr = "<V2" if self.dtype == ml_dtypes.bfloat16 else told["typestr"]
        return {**told, "typestr": typestr, "version": 3, **self._more}

    def __setitem__(self, key: Any, value: Any) -> None:
        self.array[key] = value


class Exported:
    """An array that is exchanged by DLPack alone. number: of its device."""

    def __init__(self, array: Array, number: int = 0) -> None:
        self.array, self.dtype, self._number = array, array.dtype, number
        self.streams: list[Any] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self._number

    def __dlpack__(self, *, stream: Any) -> Any:
        self.streams.append(stream)
        return self.array.__dlpack__()


class Tensor:
    """PyTorch's tensor, as far as it is looked at."""

    is_cuda = True
    device = SimpleNamespace(index=0)

    def __init__(self, array: Array) -> None:
        self.array = array

    @property
    def dtype(self) -> str:
        return f"torch.{self.array.dtype.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def ndim(self) -> int:
        return self.array.ndim

    def element_size(self) -> int:
        return self.array.itemsize

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def data_ptr(self) -> int:
        return int(self.array.__array_interface__["data"][0])

    def contiguous(self) -> Tensor:
        return Tensor(np.ascontiguousarray(self.array))

    def permute(self, axes: tuple[int, ...]) -> Tensor:
        return Tensor(self.array.transpose(axes))


Tensor.__module__ = "torch"


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands for PyTorch; the streams that it was asked for, by device."""
    asked: list[int] = []

    def current_stream(device: int) -> Any:
        asked.append(device)
        return SimpleNamespace(cuda_stream=7)

    cuda = SimpleNamespace(current_stream=current_stream)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    return asked


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four threads to a block, and 32 elements to a chunk."""
    assert toolkit.SIMULATED
    kernels.step_kernel.cache_clear()
    for module in (kernels, launching):
        monkeypatch.setattr(module, "THREADS", 4)
        monkeypatch.setattr(module, "CHUNK", 32)
    yield
    kernels.step_kernel.cache_clear()


def on_device(rule: fo.Rule, cases: list[Case], **options: Any) -> list[Result]:
    """`exactness.stepped` on the device."""
    parameters = [c.p.copy(order="K") for c in cases]
    optimizer = fo.Optimizer([OnDevice(p) for p in parameters], rule, **options)
    live = [tuple(states.values()) for states in optimizer.state.values()]
    for states, c in zip(live, cases, strict=True):
        for state, start in zip(states, c.states, strict=True):
            state[...] = start
    for k in range(STEPS):
        estimates = [None if (h := c.hessians[k]) is None else OnDevice(h) for c in cases]
        given = any(h is not None for h in estimates)
        grads = [OnDevice(c.grads[k]) for c in cases]
        optimizer.step(grads, hessian=estimates if given else None)
    return [
        (p, *(state.copy() for state in states)) for p, states in zip(parameters, live, strict=True)
    ]


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `exactness.elementwise` puts in the place of matrix products."""

    def orthogonalize(self: Any, u: Array, *rest: Any) -> None:
        u *= 0.5

    monkeypatch.setattr(Library, "orthogonalize", orthogonalize)


@pytest.mark.parametrize("rule", exactness.RULES.values(), ids=exactness.RULES)
def test_every_variant_has_the_bits_of_the_core(rule: fo.Rule, halved: None) -> None:
    c = case(rule, 67, np.float32, awkward=operands(rule))
    (got,), (want,) = on_device(rule, [c]), stepped(rule, [c])
    assert_same_bits(got, want, str(rule))


@pytest.mark.parametrize("rule", exactness.DEFAULTS.values(), ids=exactness.DEFAULTS)
@pytest.mark.parametrize("n", [(0, 1, 31, 96), (130, 3)])
def test_sizes_in_float64(rule: fo.Rule, n: tuple[int, ...], halved: None) -> None:
    cases = [case(rule, m, np.float64, seed=m) for m in n]
    for got, want in zip(on_device(rule, cases), stepped(rule, cases), strict=True):
        assert_same_bits(got, want, f"{rule} of {n}")


def trees(params: Any, grads: Any, backend: str, copies: Any, **options: Any) -> Any:
    """Parameters, copies, fingerprint and what was told of three steps."""
    device = backend == "cuda"
    wrap = OnDevice if device else lambda a: a
    mine, theirs = ({k: a.copy(order="K") for k, a in tree.items()} for tree in (params, copies))
    optimizer = fo.Optimizer(
        {k: wrap(a) for k, a in mine.items()},
        fo.AdamW(lr=0.01, weight_decay=0.1),
        copy_out={k: wrap(a) for k, a in theirs.items()} if theirs else None,
        **options,
    )
    told = [optimizer.step({k: wrap(a) for k, a in g.items()}, grad_scale=2.0) for g in grads]
    return {**mine, **{f"{k}/copy": a for k, a in theirs.items()}}, told, optimizer.fingerprint()


WAYS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "float32": (np.float32, np.float32, {}),
    "bfloat16": (ml_dtypes.bfloat16, ml_dtypes.bfloat16, {}),
    "float16": (np.float16, np.float16, {}),
    "masters": (ml_dtypes.bfloat16, np.float32, {"master": "float32"}),
    "low states": (np.float32, ml_dtypes.bfloat16, {"state_dtype": "bfloat16"}),
    "wide": (np.float64, np.float32, {"state_dtype": {"m": "float32", "v": "float16"}}),
    "all low": (np.float16, np.float64, {"state_dtype": "float16"}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("besides", ["nothing", "clip_norm", "clip_value"])
def test_formats_and_all_that_a_step_does_besides(way: str, besides: str) -> None:
    p, g, options = WAYS[way]
    shapes: dict[str, Any] = {"a": 75, "b": (), "c": (5, 7), "d": 0}
    params = {k: np.asarray(draw(j, s, p)) for j, (k, s) in enumerate(shapes.items())}
    params["c"] = np.asfortranarray(params["c"])
    grads = [{k: np.asarray(draw(10 + t, s, g), order="K") for k, s in shapes.items()}
             for t in range(3)]  # fmt: skip
    for each in grads:
        each["c"] = np.asfortranarray(each["c"])
    copies = {}
    if besides != "nothing":
        options = {**options, besides: 0.25, "ema": 0.9}
        copies = {k: np.zeros_like(a, np.float16) for k, a in params.items()}
    found = [trees(params, grads, b, copies, **options) for b in ("cuda", "native")]
    assert_same(found[0][0], found[1][0], way)
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize("size", [1.0, 1e-200, 1e200])
def test_norms_of_several_segments(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kernels, launching):
        monkeypatch.setattr(module, "CHUNK", 1 << 15)
    p, g = np.zeros(2 * 16384 + 77), draw(0, 2 * 16384 + 77, np.float64) * size
    infos = []
    for wrap in (OnDevice, lambda a: a):
        optimizer = fo.Optimizer(wrap(p.copy()), fo.SGD(), clip_norm=1.0)
        infos.append(optimizer.step(wrap(g)))
    assert infos[0] == infos[1]


def test_a_step_that_finds_no_number_is_refused_or_skipped() -> None:
    p = np.ones(40, np.float32)
    g = np.full(40, np.nan, np.float32)
    with pytest.raises(FloatingPointError, match="NaN or infinity in params"):
        fo.Optimizer(OnDevice(p), fo.SGD(), clip_norm=1.0).step(OnDevice(g))
    optimizer = fo.Optimizer(OnDevice(p), fo.SGD(), skip_nonfinite=True)
    info = optimizer.step(OnDevice(g))
    assert info.skipped
    assert info.bad_leaves == ("params",)
    assert optimizer.step_count == 0
    assert (p == 1).all()


def test_leaves_without_a_gradient_and_off_the_boundaries() -> None:
    rng = np.random.default_rng(0)
    block = rng.standard_normal(200).astype(np.float32)
    results = []
    for wrap in (OnDevice, lambda a: a):
        mine = block.copy()
        params = [wrap(mine[1:50]), wrap(mine[51:52]), wrap(mine[60:200])]
        optimizer = fo.Optimizer(params, fo.Adam(lr=0.1))
        for t in range(4):
            grads: list[Any] = [wrap(np.full(n, t + 1, np.float32)) for n in (49, 1, 140)]
            if t % 2:
                grads[t // 2] = None
            optimizer.step(grads)
        results.append((mine, optimizer.fingerprint()))
    assert_same_bits(results[0][:1], results[1][:1], "with None")
    assert results[0][1] == results[1][1]


def test_the_same_arrays_again_are_not_looked_at() -> None:
    p, g = np.ones(40, np.float32), np.ones(40, np.float32)
    mine, theirs = OnDevice(p), OnDevice(g)
    optimizer = fo.Optimizer({"w": mine}, fo.SGD(lr=0.5))
    optimizer.step({"w": theirs})
    theirs._more["typestr"] = "<i4"  # nobody asks
    optimizer.step({"w": theirs})
    assert (p == 0).all()
    with pytest.raises(TypeError, match=r"grads\['w'\]: expected float32"):
        optimizer.step({"w": OnDevice(g, typestr="<i4")})


def test_gradients_are_not_kept_alive() -> None:
    import weakref

    optimizer = fo.Optimizer(OnDevice(np.ones(4, np.float32)), fo.SGD(), clip_norm=1.0)
    g = OnDevice(np.ones(4, np.float32))
    seen = weakref.ref(g)
    optimizer.step(g)
    del g
    assert seen() is None


def test_arrays_by_dlpack() -> None:
    for dtype in (np.float32, np.float64, np.float16):
        p = draw(0, (6, 7), dtype)
        q, g = p.copy(), draw(1, (6, 7), dtype)
        exported = Exported(g)
        fo.Optimizer(Exported(p), fo.Lion(lr=0.1)).step(exported)
        fo.Optimizer(q, fo.Lion(lr=0.1)).step(g)
        assert_same_bits((p,), (q,), "DLPack")
        assert exported.streams == [1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_tensors(dtype: Any, order: Any, torch: list[int]) -> None:
    p = np.asarray(draw(0, (6, 7), dtype), order=order)
    q, grads = p.copy(order="K"), [draw(k, (6, 7), dtype) for k in range(3)]
    mine, theirs = fo.Optimizer(Tensor(p), fo.Adam()), fo.Optimizer(q, fo.Adam())
    for g in grads:
        mine.step(Tensor(g))
        theirs.step(g)
    assert_same_bits((p,), (q,), "tensors")
    assert set(torch) == {0}


def test_new_tensors_where_the_old_ones_were(
    torch: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    p, g = np.ones(40, np.float32), np.ones(40, np.float32)
    optimizer = fo.Optimizer([Tensor(p)], fo.SGD(lr=0.5))
    optimizer.step([Tensor(g)])
    explained = Stepper.explained
    looked: list[int] = []

    def watched(self: Stepper, *rest: Any) -> int:
        looked.append(1)
        return explained(self, *rest)

    monkeypatch.setattr(Stepper, "explained", watched)
    optimizer.step([Tensor(g)])
    assert not looked
    assert (p == 0).all()
    optimizer.step([Tensor(g.copy())])
    optimizer.step([Tensor(np.ones(40, np.float16))])
    assert len(looked) == 2
    assert (p == -1).all()
    with pytest.raises(ValueError, match="expected the shape"):
        optimizer.step([Tensor(g[:39])])


def test_a_parameter_that_moved_is_noticed(torch: list[int]) -> None:
    p, g = Tensor(np.ones(4, np.float32)), Tensor(np.ones(4, np.float32))
    optimizer = fo.Optimizer(p, fo.SGD(lr=0.5))
    optimizer.step(g)
    p.array = p.array.copy()
    with pytest.raises(ValueError, match=r"params: has moved in memory; call rebind"):
        optimizer.step(g)
    optimizer.rebind(p)
    optimizer.step(g)
    assert (p.array == 0).all()


def test_zeroed_and_accumulated_gradients() -> None:
    for zeroed in (False, True):
        results: list[Array] = []
        for wrap in (OnDevice, lambda a: a):
            p = draw(0, 50, np.float32)
            grads = [draw(k, 50, ml_dtypes.bfloat16) for k in (1, 2, 3)]
            optimizer = fo.Optimizer(wrap(p), fo.Adam(), zero_grads=zeroed)
            for g in grads[:2]:
                optimizer.accumulate(wrap(g))
            optimizer.step(grad_scale=2.0)
            optimizer.step(wrap(grads[2]))
            assert not zeroed or not any(g.any() for g in grads)
            results.append(p)
        assert_same_bits((results[0],), (results[1],), "accumulated")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_muons_matrix_products(dtype: Any) -> None:
    rules = {
        "c": fo.AdamW(),
        "d": fo.Muon(ns_coefficients="polar_express", ns_steps=8, gram=True, split=2),
        "*": fo.Muon(weight_decay=0.1, norm="aol", ns_coefficients="you", ns_steps=4),
    }
    shapes: dict[str, Any] = {"a": (12, 5), "b": (3, 2, 8), "c": 9, "d": (8, 6), "e": (5, 9)}
    params = {k: draw(j, s, dtype) for j, (k, s) in enumerate(shapes.items())}
    params["e"] = np.asfortranarray(params["e"])
    results = []
    for wrap in (OnDevice, lambda a: a):
        mine = {k: p.copy(order="K") for k, p in params.items()}
        optimizer = fo.Optimizer({k: wrap(p) for k, p in mine.items()}, rules)
        for t in range(2):
            grads = {k: np.asarray(draw(10 + t, s, dtype)) for k, s in shapes.items()}
            grads["e"] = np.asfortranarray(grads["e"])
            grads["a"] *= 1e-25 if t else 1.0
            optimizer.step({k: wrap(g) for k, g in grads.items()})
        results.append(mine)
    for k, p in results[1].items():
        np.testing.assert_allclose(results[0][k], p, rtol=1e-4, atol=1e-5, err_msg=k)


class Halves(fo.CustomRule):
    """A rule of the user's own, with a branch and a state."""

    beta: float = 0.5

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        return self.beta, lr

    @staticmethod
    def element(p: float, g: float, m: float, beta: float, lr: float) -> tuple[float, float]:
        m = beta * m + g
        return (lr if m > 0 else -lr), m


def test_users_own_rules() -> None:
    c = case(Halves(lr=0.1), 70, np.float32, awkward=("g",))
    assert_same_bits(on_device(Halves(lr=0.1), [c])[0], stepped(Halves(lr=0.1), [c])[0], "own")


def test_what_the_optimizer_keeps_comes_back() -> None:
    p = draw(0, (5, 8), np.float32)
    optimizer = fo.Optimizer({"w": OnDevice(p)}, fo.Adam(), ema=0.5)
    optimizer.step({"w": OnDevice(draw(1, (5, 8), np.float32))})
    before, saved = p.copy(), optimizer.state_dict()
    mark = optimizer.fingerprint()
    assert isinstance(optimizer.state["w"]["m"], DeviceArray)
    with optimizer.averaged():
        np.testing.assert_array_equal(p, saved["leaves"]["w"]["state"]["average"])
    np.testing.assert_array_equal(p, before)
    optimizer.step({"w": OnDevice(draw(2, (5, 8), np.float32))})
    assert optimizer.fingerprint() != mark
    p[...] = before
    optimizer.load_state_dict(saved)
    assert optimizer.fingerprint() == mark
    moved = OnDevice(before)
    optimizer.rebind({"w": moved})
    optimizer.step({"w": OnDevice(before.copy())})
    assert not (before == p).all()


def test_masters_are_taken_anew() -> None:
    p = np.ones(40, ml_dtypes.bfloat16)
    optimizer = fo.Optimizer(OnDevice(p), fo.SGD(lr=1.0), master="float32")
    p[...] = 2
    optimizer.sync()
    optimizer.step(OnDevice(np.full(40, 0.5, np.float32)))
    assert (p == 1.5).all()


def test_lookahead() -> None:
    results = []
    for wrap in (OnDevice, lambda a: a):
        p = draw(0, 40, np.float32)
        optimizer = fo.Optimizer(wrap(p), fo.Nesterov(form="lookahead"))
        for _ in range(3):
            with optimizer.lookahead():
                g = p * np.float32(0.5)
            optimizer.step(wrap(g))
        results.append(p)
    assert_same_bits((results[0],), (results[1],), "lookahead")


def host(n: int = 4) -> Array:
    return np.ones(n, np.float32)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "host": (
        lambda: fo.Optimizer([OnDevice(host()), host()], fo.SGD()),
        TypeError, "host's memory; move it",
    ),
    "forced": (
        lambda: fo.Optimizer(OnDevice(host()), fo.SGD(), backend="native"),
        TypeError, "backend='cuda'",
    ),
    "dtype": (
        lambda: fo.Optimizer(OnDevice(np.ones(4, np.int32)), fo.SGD()),
        TypeError, "expected float32, float64",
    ),
    "read-only": (
        lambda: fo.Optimizer(OnDevice((p := host()), data=(p.ctypes.data, True)), fo.SGD()),
        ValueError, "is read-only",
    ),
    "strides": (
        lambda: fo.Optimizer(OnDevice(host(8)[::2]), fo.SGD()),
        ValueError, "is not dense",
    ),
    "devices": (
        lambda: fo.Optimizer([Exported(host()), Exported(host(), 1)], fo.SGD()),
        ValueError, r"is on the device 1, and params\[0\] on 0",
    ),
    "overlap": (
        lambda: fo.Optimizer([OnDevice(p := host()), OnDevice(p[2:])], fo.SGD()),
        ValueError, "shares memory with",
    ),
    "vector": (
        lambda: fo.Optimizer(OnDevice(host()), fo.Muon()),
        ValueError, "two dimensions or more",
    ),
    "shape": (
        lambda: fo.Optimizer(OnDevice(host()), fo.SGD()).step(OnDevice(host(3))),
        ValueError, r"expected the shape \(4,\)",
    ),
    "gradient on the host": (
        lambda: fo.Optimizer(OnDevice(host()), fo.SGD()).step(host()),
        TypeError, "grads: expected an array on a CUDA device",
    ),
    "gradient's strides": (
        lambda: fo.Optimizer(OnDevice(host()), fo.SGD()).step(OnDevice(host(8)[::2])),
        ValueError, "memory order C",
    ),
    "gradient's memory": (
        lambda: fo.Optimizer(OnDevice(p := host()), fo.SGD()).step(OnDevice(p)),
        ValueError, "shares memory with params",
    ),
    "rows": (
        lambda: fo.Optimizer(OnDevice(np.ones((4, 2), np.float32)), fo.SGD()).step(
            fo.Rows(np.array([1]), np.ones((1, 2), np.float32))
        ),
        TypeError, "Rows are not supported",
    ),
    "update": (
        lambda: fo.update(fo.SGD(), 1, OnDevice(host()), host()),  # type: ignore[arg-type]
        TypeError, "backend='cuda'",
    ),
    **{
        name: (
            lambda options=options: fo.Optimizer(
                OnDevice(np.ones(5000, ml_dtypes.bfloat16)), fo.Adam(), **options
            ),
            ValueError, f"{name}.*not supported by the backend 'cuda'",
        )
        for name, options in {
            "stats": {"stats": True},
            "verify": {"verify": True},
            "threads": {"threads": 2},
            "rounding": {"rounding": "stochastic"},
            "master": {"master": "split16"},
            "state_dtype": {"state_dtype": "float8"},
            "state_path": {"state_path": "/nowhere"},
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    call, error, match = REFUSED[name]
    with pytest.raises(error, match=match):
        call()


def test_it_says_what_it_is() -> None:
    assert fo.info()["backends"]["cuda"] == "available"
    assert "Numba's CUDA simulator" in fo.Optimizer(OnDevice(host()), fo.SGD()).describe()
