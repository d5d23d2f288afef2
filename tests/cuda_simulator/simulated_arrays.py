"""Which arrays the CUDA backend takes, on Numba's simulator: `test_cuda.py` runs this too."""

from __future__ import annotations

import gc
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from devices import Exported, OnDevice, Tensor
from exactness import Array, assert_same_bits
from formatted import draw
from fusedopt.backends.cuda import buffers, launching, toolkit
from fusedopt.backends.cuda.plan import Known
from fusedopt.step.gradients import GradientReader

DTYPES: list[Any] = [np.float32, np.float64, ml_dtypes.bfloat16, np.float16]


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


def test_what_is_fixed_is_not_looked_into_again(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q, g = (np.ones(4, np.float32) for _ in range(3))
    grads = fo.Fixed([OnDevice(g), {"b": OnDevice(g.copy())}])
    optimizer = fo.Optimizer([OnDevice(p), {"b": OnDevice(q)}], fo.SGD(lr=0.25))
    for _ in range(2):
        optimizer.step(grads)
    with monkeypatch.context() as patch:
        patch.setattr(Known, "again", None)
        optimizer.step(grads)
        assert (p == 0.25).all()
        with pytest.raises(TypeError, match="NoneType"):
            optimizer.step(fo.Fixed(grads.tree))
    optimizer.step([grads.tree[0], {"b": None}])
    optimizer.step(grads)
    assert (p == -0.25).all()
    assert (q == 0).all()
    with pytest.raises(ValueError, match=r"grads: expected a list or tuple of length 2"):
        optimizer.step(fo.Fixed([]))


def test_places_without_a_parameter() -> None:
    p, g = np.ones(4, np.float32), np.ones(4, np.float32)
    optimizer = fo.Optimizer({"a": None, "b": [OnDevice(p), None]}, fo.SGD(lr=0.25))
    grads = {"a": None, "b": [OnDevice(g), None]}
    for _ in range(2):
        optimizer.step(grads)
    for _ in range(3):
        optimizer.step(fo.Fixed(grads))
    assert (p == -0.25).all()
    for wrong in ({**grads, "a": OnDevice(g)}, fo.Fixed({**grads, "a": [None]})):
        with pytest.raises(TypeError, match=r"grads\['a'\]: expected None"):
            optimizer.step(wrong)
    assert optimizer.step_count == 5


def test_what_is_fixed_is_kept_alive_by_itself_alone() -> None:
    optimizer = fo.Optimizer(OnDevice(host()), fo.SGD())
    grads = fo.Fixed(OnDevice(host()))
    seen = weakref.ref(grads.tree)
    for _ in range(3):
        optimizer.step(grads)
    assert seen() is not None
    del grads
    assert seen() is None
    assert optimizer.step(None).step == 4  # which is not what is gone
    assert optimizer.state_dict()["leaves"]["params"]["t"] == 3


@pytest.mark.parametrize("kind", [OnDevice, Tensor])
def test_none_is_not_the_gradient_that_is_gone(kind: Any, torch: list[int]) -> None:
    p, q = host(), host()
    optimizer = fo.Optimizer([kind(p), kind(q)], fo.SGD(lr=0.5))
    other = kind(host())
    optimizer.step([kind(host()), other])
    optimizer.step([None, other])
    assert (p == 0.5).all()
    assert (q == 0).all()


def calls_of(method: str, count: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """How many functions are called, Python's own and others, by a method with gradients of so many
    tensors; kernels are not run."""
    monkeypatch.setattr(toolkit.Kernel, "launch", lambda *given: None)
    monkeypatch.setattr(launching.Sums, "read", lambda sums, stream: np.ones(sums.leaves.size))
    params, grads = ([Tensor(host()) for _ in range(count)] for _ in range(2))
    optimizer = fo.Optimizer(params, fo.AdamW(), **options)
    fixed, calls = fo.Fixed(grads), [0]
    take = getattr(optimizer, method)
    for _ in range(4):
        take(fixed)

    def counted(frame: Any, event: str, *rest: Any) -> None:
        calls[0] += event in ("call", "c_call")

    gc.disable()  # which would call finalisers of others
    sys.setprofile(counted)
    try:
        take(fixed)
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls[0]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("step", {}),
        ("step", {"clip_norm": 1.0}),
        ("step", {"clip_norm": 1.0, "wait": False}),
        ("accumulate", {}),
    ],
)
def test_what_a_step_costs_the_host_does_not_depend_on_the_count(
    method: str, options: Any, torch: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (calls_of(method, n, monkeypatch, **options) for n in (2, 200))
    assert few == many


def test_they_are_known_by_their_keys() -> None:
    a, b = np.ones(4, np.float32), np.ones(4, np.float32)
    x, y = OnDevice(np.full(4, 0.5, np.float32)), OnDevice(np.full(4, 0.25, np.float32))
    optimizer = fo.Optimizer({"a": OnDevice(a), "b": [OnDevice(b)]}, fo.SGD(lr=1.0))
    optimizer.step({"a": x, "b": [y]})
    optimizer.step({"b": [x], "a": y})
    assert (a == 0.25).all()
    assert (b == 0.25).all()
    with pytest.raises(ValueError, match="missing"):
        optimizer.step({"a": x, "c": [y]})
    with pytest.raises(TypeError, match="expected one array"):
        optimizer.step({"a": [x], "b": [y]})


def test_gradients_are_not_kept_alive() -> None:
    optimizer = fo.Optimizer(OnDevice(np.ones(4, np.float32)), fo.SGD(), clip_norm=1.0)
    g = OnDevice(np.ones(4, np.float32))
    seen = weakref.ref(g)
    optimizer.step(g)
    del g
    assert seen() is None


def test_steps_over_new_arrays_allocate_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = fo.Optimizer(OnDevice(host()), fo.SGD(), clip_norm=1.0, wait=False)
    old = []
    for k in range(6):
        g = OnDevice(host())
        old.append(g)  # or the next would be in its place
        if k == 3:
            monkeypatch.setattr(buffers.Memory, "new", None)
        optimizer.step(g)
    with pytest.raises(TypeError):
        buffers.Memory.reused(1 << 20, 0)


def test_memory_that_is_held_is_not_given_again() -> None:
    first, second = (buffers.Memory.reused(300, 0) for _ in range(2))
    assert first.address != second.address
    assert first.size == 300
    address = first.address
    del first
    assert buffers.Memory.reused(512, 7).address != address
    assert buffers.Memory.reused(400, 0).address == address


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
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_tensors(dtype: Any, axes: Any, torch: list[int]) -> None:
    p = np.ascontiguousarray(draw(0, (6, 7, 5), dtype).transpose(axes)).transpose(np.argsort(axes))
    q, grads = p.copy(order="K"), [draw(k, (6, 7, 5), dtype) for k in range(3)]
    mine, theirs = fo.Optimizer(Tensor(p), fo.Adam()), fo.Optimizer(q, fo.Adam())
    for g in grads:
        mine.step(Tensor(g))
        theirs.step(g)
    assert_same_bits((p,), (q,), "tensors")
    for name, state in theirs.state["params"].items():
        found = mine.state["params"][name].copy()
        assert found.strides == state.strides
        np.testing.assert_array_equal(found, state)
    assert set(torch) == {0}


def test_new_tensors_where_the_old_ones_were(
    torch: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    p, g = np.ones(40, np.float32), np.ones(40, np.float32)
    optimizer = fo.Optimizer([Tensor(p)], fo.SGD(lr=0.5))
    optimizer.step([Tensor(g)])
    explained = GradientReader.explained
    looked: list[int] = []

    def watched(self: GradientReader, *rest: Any) -> int:
        looked.append(1)
        return explained(self, *rest)

    monkeypatch.setattr(GradientReader, "explained", watched)
    optimizer.step([Tensor(g)])
    assert not looked
    assert (p == 0).all()
    optimizer.step([Tensor(g.copy())])
    optimizer.step([Tensor(np.ones(40, np.float16))])
    assert len(looked) == 2
    assert (p == -1).all()
    with pytest.raises(ValueError, match="expected the shape"):
        optimizer.step([Tensor(g[:39])])


def test_another_stream_has_tables_of_its_own(
    torch: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    queues: list[int] = []
    launch = toolkit.Kernel.launch

    def watched(self: Any, blocks: int, threads: int, queue: tuple[int, int], *rest: Any) -> None:
        queues.append(queue[1])
        launch(self, blocks, threads, queue, *rest)

    monkeypatch.setattr(toolkit.Kernel, "launch", watched)
    p, grads = np.ones(4, np.float32), fo.Fixed(Tensor(host()))
    optimizer = fo.Optimizer(Tensor(p), fo.SGD(lr=0.125))
    for stream in (7, 7, 7, 8, 8, 8, 7):
        current = SimpleNamespace(cuda_stream=stream)
        cuda = SimpleNamespace(current_stream=lambda device, current=current: current)
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        optimizer.step(grads)
        bound: Any = optimizer._assembly.plan._bound
        assert (bound.stream, queues[-1]) == (stream, stream)
    assert (p == 0.125).all()


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


def host(n: int = 4) -> Array:
    return np.ones(n, np.float32)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "host": (
        lambda: fo.Optimizer([OnDevice(host()), host()], fo.SGD()),
        TypeError, "host's memory; move it",
    ),
    "forced": (
        lambda: fo.Optimizer(OnDevice(host()), fo.SGD(), backend="native"),
        TypeError, "only the backend 'cuda' takes it",
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
    "sums": (
        lambda: fo.Optimizer(OnDevice(host()), fo.LARS()),
        ValueError, "LARS, which measures: is not supported by the backend 'cuda'; take fo.AdamW",
    ),
    "rows and columns": (
        lambda: fo.Optimizer(OnDevice(host()), fo.Adafactor()),
        ValueError, "Adafactor: is not supported by the backend 'cuda'; take fo.Muon or fo.SOAP",
    ),
    "matrices": (
        lambda: fo.Optimizer(OnDevice(host().reshape(2, 2)), fo.Shampoo()),
        ValueError, "Shampoo: is not supported by the backend 'cuda'; take fo.Muon or fo.SOAP",
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
    "update on the host": (
        lambda: fo.update(fo.SGD(), 1, OnDevice(host()), host()),  # type: ignore[arg-type]
        TypeError, "g: expected an array on a CUDA device",
    ),
    "update of the host": (
        lambda: fo.update(fo.SGD(), 1, host(), OnDevice(host())),  # type: ignore[arg-type]
        TypeError, "g: is on a CUDA device, where only the backend 'cuda' takes it",
    ),
    "norm with the host": (
        lambda: fo.global_norm([OnDevice(host()), host()]),
        TypeError, r"grads\[1\]: expected an array on a CUDA device",
    ),
    "norm of rows": (
        lambda: fo.global_norm([OnDevice(host()), fo.Rows(np.array([1]), np.ones((1, 2)))]),
        TypeError, r"grads\[1\]: expected an array on a CUDA device, got a Rows",
    ),
    "norm of strides": (
        lambda: fo.global_norm(OnDevice(host(8)[::2])),
        ValueError, "grads: is not dense",
    ),
    "norm of devices": (
        lambda: fo.global_norm([Exported(host()), Exported(host(), 1)]),
        ValueError, "are on several devices",
    ),
    **{
        name: (
            lambda options=options: fo.Optimizer(
                OnDevice(np.ones(5000, ml_dtypes.bfloat16)), fo.Adam(), **options
            ),
            ValueError, f"{name}.*not supported by the backend 'cuda'",
        )
        for name, options in {
            "stats with wait": {"stats": True, "wait": False},
            "verify": {"verify": True},
            "threads": {"threads": 2},
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
