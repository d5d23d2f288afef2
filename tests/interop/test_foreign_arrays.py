"""Arrays of other libraries on the host wherever arrays are taken, to the same bits.

What cannot be taken is refused with a remedy, which works.
"""

from __future__ import annotations

import array
import dataclasses
import os
import types
from collections import UserDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fusedopt as fo

SHAPES = ((7, 5), (3,), (300,))


class Exchanged:
    """An array of a library that offers DLPack alone."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **how: Any) -> Any:
        return self.array.__dlpack__(**how)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class Interfaced:
    """One of a library that offers NumPy's array interface alone."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.__array_interface__ = array.__array_interface__


def by_torch(array: np.ndarray) -> Any:
    return pytest.importorskip("torch").from_numpy(array)


def by_jax(array: np.ndarray) -> Any:
    return pytest.importorskip("jax").numpy.array(array)


def by_mlx(array: np.ndarray) -> Any:
    return pytest.importorskip("mlx.core").array(array)


GIVEN: list[Callable[[np.ndarray], Any]] = [Exchanged, Interfaced, by_torch, by_jax, by_mlx]
WRITABLE: list[Callable[[np.ndarray], Any]] = [Exchanged, Interfaced, by_torch]


def arrays(seed: int) -> list[np.ndarray]:
    source = np.random.default_rng(seed)
    return [source.standard_normal(shape).astype(np.float32) for shape in SHAPES]


@pytest.mark.parametrize("foreign", GIVEN)
def test_gradients(foreign: Callable[[np.ndarray], Any]) -> None:
    """Foreign gradients of a step, of an accumulation, of an update and of a norm."""
    ours, theirs = arrays(0), arrays(0)
    a, b = (fo.Optimizer(p, fo.AdamW(lr=0.1), clip_norm=1.0) for p in (ours, theirs))
    for step in range(3):
        grads = arrays(1 + step)
        given = [foreign(g) for g in grads]
        assert fo.global_norm(given) == fo.global_norm(grads)
        a.step(given)
        b.step(grads)
    for opt, make in ((a, foreign), (b, np.array)):
        for step in range(2):
            opt.accumulate([make(g) for g in arrays(10 + step)])
        opt.step()
    assert a.fingerprint() == b.fingerprint()
    rule = fo.Adam(lr=0.1)
    for params, make in ((ours, foreign), (theirs, np.array)):
        fo.update(rule, 1, params[0], make(arrays(20)[0]), *rule.init(params[0]))
    assert all(np.array_equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("foreign", WRITABLE)
def test_parameters(foreign: Callable[[np.ndarray], Any]) -> None:
    """Foreign parameters of an optimizer and of an update, and states, in the caller's memory."""
    ours, theirs = arrays(0), arrays(0)
    a = fo.Optimizer([foreign(p) for p in ours], fo.AdamW(lr=0.1))
    b = fo.Optimizer(theirs, fo.AdamW(lr=0.1))
    for step in range(3):
        a.step(arrays(1 + step))
        b.step(arrays(1 + step))
    rule = fo.Adam(lr=0.1)
    for params, make in ((ours, foreign), (theirs, np.asarray)):
        p = make(params[0])
        fo.update(rule, 1, p, arrays(20)[0], *rule.init(p))
    assert all(np.array_equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_parameters_that_cannot_be_written_are_refused_with_a_remedy() -> None:
    jax = pytest.importorskip("jax")
    params, rule = jax.numpy.ones(3), fo.Adam()
    for attempt in (
        lambda: fo.Optimizer([params], rule),
        lambda: fo.update(rule, 1, params, np.ones(3, np.float32), *rule.init(np.ones(3))),
    ):
        with pytest.raises(ValueError, match=r"jax.*np\.array\(x\)"):
            attempt()
    locked = np.ones(3, np.float32)
    locked.flags.writeable = False
    for foreign in WRITABLE[:2]:
        with pytest.raises(ValueError, match=r"np\.array\(x\)|pass a copy"):
            fo.Optimizer([foreign(locked)], rule)


# ---------------------------------------------------------------- remedies


@dataclasses.dataclass
class Layer:
    w: Any


@dataclasses.dataclass(slots=True)
class Slotted:
    w: Any


def of_objects(a: np.ndarray) -> np.ndarray:
    found = np.empty(1, object)
    found[0] = a
    return found


def mygrad_tensor(a: np.ndarray) -> Any:
    return pytest.importorskip("mygrad").tensor(a, copy=False)


def torch_module(a: np.ndarray) -> Any:
    torch = pytest.importorskip("torch")
    return torch.nn.ParameterList([torch.nn.Parameter(torch.from_numpy(a))])


# Of an ndarray the object that holds it, and what the message says to pass instead.
FIELDS = "{f.name: getattr(x, f.name) for f in dataclasses.fields(x)}"
HOLDERS: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "dataclass": (Layer, FIELDS),
    "dataclass with slots": (Slotted, FIELDS),
    "namespace": (lambda a: types.SimpleNamespace(w=a), "vars(x)"),
    "mapping proxy": (lambda a: types.MappingProxyType({"w": a}), "dict(x)"),
    "user's dict": (lambda a: UserDict(w=a), "dict(x)"),
    "deque": (lambda a: deque([a]), "list(x)"),
    "values of a dict": (lambda a: {"w": a}.values(), "list(x)"),
    "array of arrays": (of_objects, "a.tolist()"),
    "memory": (lambda a: a.data, "np.asarray(x)"),
    "MyGrad": (mygrad_tensor, "x.data"),
    "PyTorch's module": (torch_module, "dict(x.named_parameters())"),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_remedy_updates_the_array_itself(holder: str) -> None:
    make, remedy = HOLDERS[holder]
    held = np.ones(3, np.float32)
    x = make(held)
    with pytest.raises(TypeError) as refusal:
        fo.Optimizer([x], fo.SGD(lr=0.5))
    assert f"pass {remedy}" in str(refusal.value)
    given = eval(remedy, {"np": np, "dataclasses": dataclasses, "x": x, "a": x})
    fo.Optimizer(given, fo.SGD(lr=0.5)).step(
        {k: np.ones(3, np.float32) for k in given}
        if isinstance(given, dict)
        else [np.ones(3, np.float32)]
        if isinstance(given, list)
        else np.ones(3, np.float32)
    )
    assert (held == 0.5).all()


def test_buffers_of_other_numbers_than_arrays() -> None:
    x = array.array("d", [1.0, 2.0])
    with pytest.raises(TypeError, match=r"pass np\.asarray\(x\), which has the same memory"):
        fo.Optimizer([x], fo.SGD())
    fo.Optimizer(np.asarray(x), fo.SGD(lr=1.0)).step(np.ones(2))
    assert list(x) == [0.0, 1.0]


def test_remedies_for_mlx() -> None:
    mx = pytest.importorskip("mlx.core")
    x = mx.array(np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"pass np\.asarray\(x\)"):
        fo.Optimizer([x], fo.SGD())
    opt = fo.Optimizer([np.asarray(x)], fo.SGD(lr=0.25))
    gradient = x * 1.0
    with pytest.raises(TypeError, match=r"evaluate it with mx\.eval\(x\) first"):
        opt.step([gradient])
    mx.eval(gradient)
    opt.step([gradient])
    assert (np.array(x) == 0.75).all()
    half = mx.ones((2, 3), dtype=mx.bfloat16)
    mx.eval(half)
    with pytest.raises(TypeError, match=r"of bfloat16 pass x\.astype\(mx\.float32\)"):
        opt.step([half])
    half = half.astype(mx.float32)
    mx.eval(half)
    opt.step([half])
    assert (np.array(x) == 0.5).all()


def test_a_remedy_for_tinygrad() -> None:
    os.environ.setdefault("DEV", "PYTHON")  # its device that needs no compiler
    tinygrad = pytest.importorskip("tinygrad")
    x = tinygrad.Tensor(np.ones((2, 3), np.float32))
    with pytest.raises(TypeError, match="the memory of its buffer") as refusal:
        fo.Optimizer([x], fo.SGD())
    remedy = str(refusal.value).partition("its buffer, ")[2].partition(", after x.realize()")[0]
    x.contiguous().realize()
    opt = fo.Optimizer([eval(remedy, {"np": np, "x": x})], fo.SGD(lr=0.5))
    gradient = (x * 1.0).realize()
    with pytest.raises(TypeError, match=r"pass x\.numpy\(\)"):
        opt.step([gradient])
    opt.step([gradient.numpy()])
    assert (x.numpy() == 0.5).all()


def test_remedies_for_gradients() -> None:
    torch = pytest.importorskip("torch")
    w = torch.nn.Parameter(torch.ones(2, 2))
    (w * torch.eye(2)).sum().backward()
    opt = fo.Optimizer([w], fo.SGD(lr=0.5))
    opt.step([w.grad.requires_grad_()])
    with pytest.raises(TypeError, match=r"x\.to_dense\(\)"):
        opt.step([w.grad.detach().to_sparse()])
    opt.step([w.grad.detach().to_sparse().to_dense()])
    assert w.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    with pytest.raises(TypeError, match=r"pass np\.asarray\(x\)"):
        opt.step([1.0])


def test_a_remedy_for_arrays_that_are_locked() -> None:
    a = np.ones(3)
    a.flags.writeable = False
    with pytest.raises(ValueError, match=r"make it writable with a\.flags\.writeable = True"):
        fo.Optimizer(a, fo.SGD())
    a.flags.writeable = True
    fo.Optimizer(a, fo.SGD())
