"""Dense arrays whose axes are in any order in memory: images with channels last, turned kernels."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from exactness import Array
from formatted import BACKENDS, arrays_of, assert_same
from fusedopt.arrays.order import axes_of, memory_order, shaped, turned, turned_back

ORDERS = {
    "channels last": (0, 2, 3, 1),
    "turned": (2, 0, 1, 3),
    "with an axis of one": (1, 0, 2, 3),
}
RULES: dict[str, fo.Rule] = {name: rule() for name, rule in fo.RULES.items()}
ELEMENTWISE = sorted(name for name, rule in RULES.items() if rule.program.phases == 1)
MATRICES = sorted(set(RULES) - set(ELEMENTWISE))
SHAPES = {
    "channels last": (8, 5, 12, 11),
    "turned": (4, 12, 10, 12),
    "with an axis of one": (9, 13, 1, 40),
}

STORED: dict[str, tuple[Any, dict[str, Any]]] = {
    "float32": (np.float32, {"clip_norm": 1.0, "ema": 0.5, "stats": True}),
    "float64": (np.float64, {}),
    "float8": (np.float32, {"state_dtype": "float8"}),
    "dynamic4": (ml_dtypes.bfloat16, {"state_dtype": "dynamic4", "rounding": "stochastic"}),
    "masters": (np.float16, {"master": "float32"}),
    "split16": (ml_dtypes.bfloat16, {"master": "split16"}),
    "kahan": (ml_dtypes.bfloat16, {"rounding": "kahan", "state_dtype": "bfloat16"}),
}  # fmt: skip


def lying(x: Array, axes: tuple[int, ...]) -> Array:
    """Return the array with its axes in this order in memory."""
    return np.array(x.transpose(axes), order="C").transpose(np.argsort(axes))


def made(p: Array, name: str, stored: str, **more: Any) -> fo.Optimizer:
    options = {**STORED[stored][1], **more}
    copies = {"w": np.zeros_like(p, np.float32)}
    return fo.Optimizer({"w": p}, RULES[name], copy_out=copies, **options)


def test_every_order_has_a_name_and_a_way_back() -> None:
    for shape in ((), (3,), (2, 3), (1, 4, 1), (2, 3, 4), (2, 1, 3, 4), (2, 0, 3), (2, 2, 2, 2)):
        for axes in permutations(range(len(shape))):
            x = lying(np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape), axes)
            order = memory_order(x)
            assert turned(x, order).flags.c_contiguous
            back = turned_back(turned(x, order), order)
            np.testing.assert_array_equal(back, x)
            flat = turned(x, order).reshape(-1)
            np.testing.assert_array_equal(shaped(flat, shape, order), x)
            assert sorted(axes_of(order, len(shape))) == list(range(len(shape)))
    assert not memory_order(np.zeros((4, 6))[:, ::2])
    assert not memory_order(np.zeros((4, 6, 2))[:, ::-1].transpose(1, 0, 2))
    assert not memory_order(np.broadcast_to(np.zeros(3), (2, 3)))


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("backend", [*BACKENDS, "numba"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_bits_are_those_of_the_transpose(order: str, backend: str, stored: str) -> None:
    """Whose memory is the same; so are all states."""
    if backend == "numba":
        pytest.importorskip("numba")
    axes, shape = ORDERS[order], SHAPES[order]
    dtype, rng = STORED[stored][0], np.random.default_rng(0)
    for name in ELEMENTWISE if backend == "native" else ("adamw", "rprop"):
        start = rng.standard_normal(shape).astype(dtype)
        p, plain = lying(start, axes), np.ascontiguousarray(start.transpose(axes))
        mine = made(p, name, stored, backend=backend)
        theirs = made(plain, name, stored, backend=backend)
        for k in range(4):
            g = rng.standard_normal(shape).astype(np.float32)
            given = [lying(g, axes), g, np.asfortranarray(g), np.repeat(g, 2, 1)[:, ::2]][k]
            one = mine.step({"w": given})
            other = theirs.step({"w": np.ascontiguousarray(g.transpose(axes))})
            assert repr(one) == repr(other)
        assert p.transpose(axes).tobytes() == plain.tobytes()
        for key, a in arrays_of(mine.state["w"]).items():
            b = arrays_of(theirs.state["w"])[key]
            if a.shape == shape:
                assert memory_order(a) == memory_order(p)
                a = a.transpose(axes)
            assert a.tobytes() == b.tobytes(), f"{name}: {key}"


def by_file(opt: fo.Optimizer, fresh: fo.Optimizer, folder: Path) -> fo.Optimizer:
    opt.save(folder / "run")
    fresh.load(folder / "run")
    return fresh


def by_dict(opt: fo.Optimizer, fresh: fo.Optimizer, folder: Path) -> fo.Optimizer:
    fresh.params["w"][...] = opt.params["w"]
    fresh.load_state_dict(opt.state_dict())
    return fresh


def by_copy(opt: fo.Optimizer, fresh: fo.Optimizer, folder: Path) -> fo.Optimizer:
    return copy.deepcopy(opt)


def by_pickled_dict(opt: fo.Optimizer, fresh: fo.Optimizer, folder: Path) -> fo.Optimizer:
    """NumPy unpickles arrays in C order."""
    fresh.params["w"][...] = opt.params["w"]
    fresh.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    return fresh


WAYS: list[Callable[[fo.Optimizer, fo.Optimizer, Path], fo.Optimizer]] = [
    by_file, by_dict, by_copy, by_pickled_dict,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("order", ORDERS)
def test_a_run_goes_on_bit_for_bit(order: str, stored: str, way: Any, tmp_path: Path) -> None:
    rng, axes = np.random.default_rng(0), ORDERS[order]

    def draw() -> Array:
        return lying(rng.standard_normal(SHAPES[order]).astype(STORED[stored][0]), axes)

    opt = made(draw(), "adamw", stored)
    for _ in range(3):
        opt.step({"w": draw()})
    on = way(opt, made(draw(), "adamw", stored), tmp_path)
    assert memory_order(on.params["w"]) == memory_order(opt.params["w"])
    for _ in range(5):
        assert on.fingerprint() == opt.fingerprint()
        g = {"w": draw()}
        opt.step(g)
        on.step(g)
    assert_same(arrays_of(on.state["w"]), arrays_of(opt.state["w"]))


def test_everything_else_that_an_optimizer_does() -> None:
    rng, axes = np.random.default_rng(0), (0, 2, 3, 1)
    shape = (6, 5, 4, 3)
    start, g = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    p, plain = lying(start, axes), np.ascontiguousarray(start.transpose(axes))
    rule = fo.Nesterov(form="lookahead")
    mine, theirs = (fo.Optimizer(a, rule, ema=0.5, verify=True) for a in (p, plain))
    for opt, given in ((mine, g), (theirs, g.transpose(axes).copy())):
        for _ in range(2):
            opt.accumulate(given)
        opt.step(grad_scale=2.0)
        opt.step(given)
    for context in (fo.Optimizer.lookahead, fo.Optimizer.averaged):
        before = p.tobytes("A")
        with context(mine), context(theirs):
            assert p.transpose(axes).tobytes() == plain.tobytes()
            assert p.tobytes("A") != before
        assert p.tobytes("A") == before
    fresh = lying(p, axes)
    mine.rebind(fresh)
    assert not np.shares_memory(fresh, p)
    mine.step(g)
    theirs.step(g.transpose(axes))
    assert fresh.transpose(axes).tobytes() == plain.tobytes()
    with pytest.raises(ValueError, match=r"memory order.*0,2,3,1.*'C'"):
        mine.rebind(np.ascontiguousarray(p))
    with pytest.raises(ValueError, match="memory order 0,2,3,1"):
        fo.Optimizer(p, fo.SGD(), copy_out=np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="not in C order"):
        mine.step(fo.Rows(np.array([1]), g[:1]))
    with pytest.raises(ValueError, match=r"params: shares memory|shares memory with"):
        mine.step(fresh)


def test_functions() -> None:
    axes = (0, 2, 3, 1)
    x = np.random.default_rng(0).standard_normal((6, 5, 4, 3))
    p, plain = lying(x, axes), np.ascontiguousarray(x.transpose(axes))
    rule = fo.AdamW()
    states, others = rule.init(p), rule.init(plain)
    for step in (1, 2):
        fo.update(rule, step, p, x, *states)
        fo.update(rule, step, plain, x.transpose(axes), *others)
    assert p.transpose(axes).tobytes() == plain.tobytes()
    assert fo.global_norm(p) == fo.global_norm(plain)
    with pytest.raises(ValueError, match="in p's memory order"):
        fo.update(rule, 3, p, x, *map(np.ascontiguousarray, states))


@pytest.mark.parametrize("name", MATRICES)
def test_a_rule_for_matrices_names_the_transpose(name: str) -> None:
    p = lying(np.ones((8, 3, 3, 4), np.float32), (0, 2, 3, 1))
    with pytest.raises(ValueError, match=r"params: .*a\.transpose\(0, 2, 3, 1\)"):
        fo.Optimizer(p, RULES[name])
    turned = p.transpose(0, 2, 3, 1)
    fo.Optimizer(turned, RULES[name]).step(np.ones_like(p).transpose(0, 2, 3, 1))
    assert p.max() < 1


def test_a_pickle_which_would_lose_the_order_is_refused() -> None:
    opt = fo.Optimizer({"w": lying(np.ones((2, 3, 4)), (1, 0, 2))}, fo.SGD())
    with pytest.raises(TypeError, match=r"params\['w'\]: .*order.*1,0,2; use save\(\)"):
        pickle.dumps(opt)


def test_gaps_are_refused_still() -> None:
    with pytest.raises(ValueError, match="is not dense"):
        fo.Optimizer(np.ones((4, 3, 6), np.float32)[:, :, ::2].transpose(1, 0, 2), fo.SGD())
