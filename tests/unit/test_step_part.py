"""A step in parts, and arrays of other libraries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from fusedopt.rules.base import Rule

SHAPES = {"a": (5, 7), "b": (3,), "c": (300,)}


def draw(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}


@pytest.mark.parametrize("rule", [fo.AdamW(), fo.SGD(lr=fo.schedules.Linear(0.1, 20)), fo.Lion()])
@pytest.mark.parametrize("zero_grads", [False, True])
def test_parts_make_the_whole_step(rule: Rule, zero_grads: bool) -> None:
    whole, parted = draw(0), draw(0)
    a, b = (fo.Optimizer(p, rule, zero_grads=zero_grads) for p in (whole, parted))
    for step in range(20):
        grads, same = draw(1 + step), draw(1 + step)
        info = a.step(grads)
        assert b.step_part(["c"], [same["c"]]).lr == info.lr
        assert b.step_count == step
        assert b.step_part(["a", "b"], [same["a"], same["b"]], last=True).step == step + 1
        assert all((same[k] == 0).all() == zero_grads for k in same)
    assert a.fingerprint() == b.fingerprint()


def test_an_empty_part_can_end_a_step() -> None:
    opt = fo.Optimizer(draw(0), fo.AdamW())
    opt.step_part(["a"], [draw(1)["a"]])
    assert opt.step_part([], [], last=True).step == opt.step_count == 1


def test_what_does_not_fit_a_step_in_parts() -> None:
    params, g = draw(0), draw(1)
    opt = fo.Optimizer(params, fo.AdamW())
    opt.step_part(["a"], [g["a"]])
    before = opt.fingerprint()
    with pytest.raises(ValueError, match="twice"):
        opt.step_part(["a"], [g["a"]])
    with pytest.raises(ValueError, match="'d'"):
        opt.step_part(["d"], [g["a"]])
    with pytest.raises(ValueError, match="shape"):
        opt.step_part(["b"], [g["a"]])
    for call in (lambda: opt.step(g), opt.state_dict):
        with pytest.raises(RuntimeError, match="in parts"):
            call()
    assert opt.fingerprint() == before
    options: list[dict[str, Any]] = [{"clip_norm": 1.0}, {"skip_nonfinite": True}, {"exact": True}]
    for chosen in options:
        with pytest.raises(ValueError, match="all gradients"):
            fo.Optimizer(draw(0), fo.AdamW(), **chosen).step_part(["a"], [g["a"]])


class Exchanged:
    """An array that offers nothing but DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **asked: Any) -> Any:
        return self._array.__dlpack__(**asked)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


class Described:
    """An array that offers nothing but NumPy's interface."""

    def __init__(self, array: np.ndarray) -> None:
        self.__array_interface__ = array.__array_interface__
        self._array = array


@pytest.mark.parametrize("kind", [Exchanged, Described])
@pytest.mark.parametrize("zero_grads", [False, True])
def test_arrays_of_other_libraries_are_taken(kind: Any, zero_grads: bool) -> None:
    ours, theirs = draw(0), draw(0)
    a = fo.Optimizer(ours, fo.AdamW(), zero_grads=zero_grads)
    b = fo.Optimizer({k: kind(p) for k, p in theirs.items()}, fo.AdamW(), zero_grads=zero_grads)
    for step in range(5):
        grads, same = draw(1 + step), draw(1 + step)
        foreign = {k: kind(g) for k, g in same.items()}
        assert fo.global_norm(foreign) == fo.global_norm(grads)
        b.accumulate(foreign)
        a.accumulate(grads)
        a.step()
        b.step()
        if zero_grads:
            assert not any(g.any() for g in same.values())
    assert a.fingerprint() == b.fingerprint()
    m = fo.Lion().init(kind(ours["a"]))
    n = fo.Lion().init(theirs["a"])
    fo.update(fo.Lion(), 1, kind(ours["a"]), kind(draw(9)["a"]), *m)
    fo.update(fo.Lion(), 1, theirs["a"], draw(9)["a"], *n)
    assert ours["a"].tobytes() == theirs["a"].tobytes()


def test_parameters_that_nobody_may_write_are_refused_with_a_remedy() -> None:
    array = np.ones(3, np.float32)
    array.flags.writeable = False
    with pytest.raises(ValueError, match=r"lets nobody write it; keep the parameters as ndarrays"):
        fo.Optimizer(Described(array), fo.AdamW())
