"""Arrays of other libraries on the host wherever arrays are taken, to the same bits."""

from __future__ import annotations

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


GIVEN: list[Callable[[np.ndarray], Any]] = [Exchanged, Interfaced, by_torch, by_jax]
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
