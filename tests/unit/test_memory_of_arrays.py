"""Arrays that change after they were handed over, and arrays that share memory."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from exactness import Array
from own_rules import OwnLARS

BACKEND = pytest.mark.parametrize("backend", ["native", "numba", "reference"])
N = 20000

# ---------------------------------------------------------------- other memory, dtype or shape


def resize(a: Array) -> None:
    """Gives an array other memory, of the same shape, and its old memory to others."""
    shape = a.shape
    a.resize((*shape[:-1], 50 * shape[-1]), refcheck=False)
    a.resize(shape, refcheck=False)


def base_of(a: Array) -> None:
    assert a.base is not None
    resize(a.base)


def as_integers(a: Array) -> None:
    a.dtype = np.dtype(f"i{a.itemsize}")  # type: ignore[misc]


def as_float16(a: Array) -> None:
    a.dtype = np.dtype(np.float16 if a.itemsize == 2 else np.float64)  # type: ignore[misc]


def flat(a: Array) -> None:
    a.shape = (a.size,)


def read_only(a: Array) -> None:
    a.flags.writeable = False


class Subclass(np.ndarray):
    """The core does not read these itself."""


def own() -> Array:
    a = Subclass((2, N), np.float32)
    a[...] = 1
    return a


KINDS: dict[str, Callable[[], Array]] = {
    "array": lambda: np.ones((2, N), np.float32),
    "bfloat16": lambda: np.ones((2, N), ml_dtypes.bfloat16),
    "subclass": own,
    "view of a subclass": lambda: np.ones((2, N), np.float32).view(Subclass),
    "view": lambda: np.ones((2, N), np.float32)[:],
}
CHANGES: dict[str, tuple[Callable[[Array], None], tuple[str, ...]]] = {
    "resized": (resize, ("array", "bfloat16", "subclass")),
    "base resized": (base_of, ("view of a subclass", "view")),
    "integers": (as_integers, ("array", "bfloat16", "view")),
    "other floats": (as_float16, ("array", "bfloat16", "view")),
    "other shape": (flat, ("array", "bfloat16", "view")),
    "read-only": (read_only, ("array", "bfloat16", "view")),
}
USES: dict[str, Callable[[fo.Optimizer, Any], object]] = {
    "step": lambda o, g: o.step(g),
    "clipped": lambda o, g: o.step(g, grad_scale=2.0),
    "save": lambda o, g: o.save("/nowhere"),
    "averaged": lambda o, g: o.averaged().__enter__(),
}


CASES = [
    (change, kind, use)
    for change, (_, kinds) in CHANGES.items()
    for kind in kinds
    for use in USES
    if change != "read-only" or use in ("step", "clipped")  # only a step need write
]


@pytest.mark.parametrize(("change", "kind", "use"), CASES, ids=map("-".join, CASES))
@BACKEND
def test_arrays_that_are_not_what_they_were(backend: str, change: str, kind: str, use: str) -> None:
    p = KINDS[kind]()
    g = np.ones(p.shape, np.float32)
    optimizer = fo.Optimizer(p, fo.SGD(lr=0.1), backend=backend, ema=0.5)
    optimizer.step(g)
    step = optimizer.step_count
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        CHANGES[change][0](p)
    others = [np.full(2 * N, 7, np.float32) for _ in range(8)]
    with pytest.raises((TypeError, ValueError), match="params"):
        USES[use](optimizer, g)
    assert optimizer.step_count == step
    assert all((a == 7).all() for a in others)


@BACKEND
@pytest.mark.parametrize("kind", ["array", "bfloat16", "subclass"])
def test_rebind_takes_other_memory(kind: str, backend: str) -> None:
    p = KINDS[kind]()
    g = np.ones(p.shape, np.float32)
    options: dict[str, Any] = {"master": "float32"} if kind == "bfloat16" else {}
    optimizer = fo.Optimizer(p, fo.SGD(lr=0.5), backend=backend, **options)
    optimizer.step(g)
    resize(p)
    p[...] = 3
    optimizer.rebind(p)
    optimizer.step(g)
    assert (np.asarray(p) == 2.5).all()


class Acting(OwnLARS):
    """A rule whose numbers, when sums have been measured, are found after `action`, once."""

    action: ClassVar[Callable[[], None] | None] = None

    def measured(self, t: int, lr: float, sums: tuple[float, ...]) -> tuple[float, ...]:
        action, Acting.action = Acting.action, None
        if action is not None:
            action()
        return super().measured(t, lr, sums)


@pytest.mark.parametrize("change", ["resized", "integers", "other floats", "other shape"])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0, "stats": True}])
def test_a_parameter_that_changes_while_a_rule_reads_sums(options: Any, change: str) -> None:
    p, q, g = np.ones((2, N), np.float32), np.ones(5, np.float32), np.ones(5, np.float32)
    optimizer = fo.Optimizer([p, q], Acting(lr=0.1), **options)
    optimizer.step([np.ones_like(p), g])
    before = q.copy()
    Acting.action = lambda: CHANGES[change][0](p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises((TypeError, ValueError), match="params"):
            optimizer.step([np.ones((2, N), np.float32), g])
    assert vars(Acting)["action"] is None
    assert optimizer.step_count == 1
    assert q.tobytes() == before.tobytes()


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0, "stats": True}])
def test_a_gradient_that_changes_while_a_rule_reads_sums(options: Any) -> None:
    """The step is taken with the array as it is, from the beginning."""
    found = []
    for early in (True, False):
        p, g = np.ones((2, N), np.float32), np.full((2, N), 2.0, np.float32)
        optimizer = fo.Optimizer(p, Acting(lr=0.1), **options)
        optimizer.step(g)
        if early:
            resize(g)
        else:
            Acting.action = functools.partial(resize, g)
        optimizer.step(g)
        assert vars(Acting)["action"] is None
        found.append(optimizer.fingerprint())
    assert found[0] == found[1]


class Key(str):
    """A key whose comparison runs `action`, once."""

    __hash__ = str.__hash__
    action: Callable[[], None] | None = None

    def __eq__(self, other: object) -> bool:
        action, Key.action = Key.action, None
        if action is not None:
            action()
        return str.__eq__(self, other)


@BACKEND
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"zero_grads": True}])
@pytest.mark.parametrize("what", ["parameter", "gradient", "dtype"])
def test_what_a_comparison_of_keys_does(what: str, options: dict[str, Any], backend: str) -> None:
    others: list[Array] = []
    p, g = np.ones(N, np.float32), np.ones(N, np.float32)

    def act() -> None:
        if what == "dtype":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                p.dtype = np.dtype(np.int32)  # type: ignore[misc,assignment]
        else:
            resize(p if what == "parameter" else g)
        others.extend(np.full(N, 7, np.float32) for _ in range(8))

    optimizer = fo.Optimizer({"v": np.ones(3), "w": p}, fo.SGD(lr=0.1), backend=backend, **options)
    Key.action = act
    grads = {Key("v"): np.ones(3), Key("w"): g}
    if what == "gradient":
        optimizer.step(grads)
    else:
        with pytest.raises((TypeError, ValueError), match="params"):
            optimizer.step(grads)
    assert all((a == 7).all() for a in others)
    Key.action = None


@pytest.mark.parametrize("backend", ["native", "numba"])
def test_what_a_rule_of_ones_own_does(backend: str) -> None:
    others: list[Array] = []
    p, g = np.ones(N, np.float32), np.ones(N, np.float32)

    class Moving(fo.SGD):
        def scalars(self, t: int, lr: float) -> tuple[float, ...]:
            if t > 1 and not others:
                resize(p)
                others.extend(np.full(N, 7, np.float32) for _ in range(8))
            return super().scalars(t, lr)

    optimizer = fo.Optimizer(p, Moving(lr=0.1), backend=backend)
    optimizer.step(g)
    with pytest.raises(ValueError, match="params"):
        optimizer.step(g)
    assert others
    assert all((a == 7).all() for a in others)


def test_indices_that_another_thread_changes_stay_inside() -> None:
    # What Python checked before the plan reads it again.
    from fusedopt.arrays.rows import UniqueRows

    p = np.ones((4, 2), np.float32)
    optimizer = fo.Optimizer(p, fo.SGD(lr=1.0))
    values = np.ones((2, 2), np.float32)
    for rows, places in (([0, 4], [0, 1]), ([0, 1], [0, 2]), ([-1, 1], [0, 1])):
        given = UniqueRows(np.array(rows), np.array(places), values)
        plan = optimizer._assembly.plan
        assert plan.step_leaves([given], None) is None
    assert (p == 1).all()


# ---------------------------------------------------------------- shared memory


class Block:
    """Arrays of 400 elements that may share memory: a parameter, and what overlaps its end."""

    def __init__(self, backend: str, rule: fo.Rule, **options: Any) -> None:
        self.memory = np.ones(4000, np.float32)
        self.p = self.memory[400:800].reshape(40, 10)
        self.copy = self.memory[2000:2400].reshape(40, 10)
        self.before, self.after = (self.memory[k : k + 400].reshape(40, 10) for k in (200, 600))
        self.apart = self.memory[1200:1600].reshape(40, 10)
        self.optimizer = fo.Optimizer(
            self.p, rule, backend=backend, copy_out=self.copy, ema=0.5, **options
        )

    def forbidden(self) -> dict[str, Array]:
        state = self.optimizer.state["params"]
        return {
            "parameter": self.p,
            "its beginning": self.before,
            "its end": self.after,
            "copy_out": self.copy,
            "the end of copy_out": self.memory[2200:2600].reshape(40, 10),
            **{name: a for name, a in state.items() if a.shape == (40, 10)},
        }


def some(a: Array) -> fo.Rows:
    return fo.Rows(np.array([3, 1]), a[:2])


Given = Callable[[fo.Optimizer, Array], object]
WAYS: dict[str, Given] = {
    "gradient": lambda o, a: o.step(a),
    "scaled": lambda o, a: o.step(a, grad_scale=2.0),
    "rows": lambda o, a: o.step(fo.Rows(np.arange(40), a)),
    "hessian": lambda o, a: o.step(np.ones((40, 10)), hessian=a),
    "part": lambda o, a: o.step_part(["params"], [a]),
    "accumulated": lambda o, a: o.accumulate(a),
    "accumulated rows": lambda o, a: o.accumulate(fo.Rows(np.arange(40), a)),
}


@BACKEND
@pytest.mark.parametrize("first", ["nothing", "dense", "rows", "of the same address"])
@pytest.mark.parametrize("zero_grads", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_is_no_input(way: str, zero_grads: bool, first: str, backend: str) -> None:
    block = Block(backend, fo.Sophia(lr=0.1), zero_grads=zero_grads)
    optimizer = block.optimizer
    if first == "dense":
        optimizer.step(block.apart)
    for name, a in block.forbidden().items():
        if first == "rows":
            optimizer.step(some(block.apart))
        if first == "of the same address" and np.shares_memory(a, block.memory):
            begin = (
                a.__array_interface__["data"][0] - block.memory.__array_interface__["data"][0]
            ) // 4
            if begin == 200:  # the first rows lie before the parameter
                optimizer.step(some(a))
        before = optimizer.fingerprint(), block.memory.tobytes()
        with pytest.raises(ValueError, match="shares memory with"):
            WAYS[way](optimizer, a)
        assert (optimizer.fingerprint(), block.memory.tobytes()) == before, name


@BACKEND
def test_rebind_takes_no_state(backend: str) -> None:
    block = Block(backend, fo.AdamW())
    optimizer = block.optimizer
    optimizer.step(block.apart)
    for name, a in optimizer.state["params"].items():
        with pytest.raises(ValueError, match="shares memory with"):
            optimizer.rebind(a)
        with pytest.raises(ValueError, match="shares memory with"):
            optimizer.rebind(block.copy)
        assert optimizer.params is block.p, name
    optimizer.step(block.apart)


@BACKEND
def test_a_state_dict_of_live_arrays(backend: str) -> None:
    # Each state is loaded with what another one held before.
    block = Block(backend, fo.AdamW())
    optimizer = block.optimizer
    optimizer.step(block.apart)
    live, saved = optimizer.state["params"], optimizer.state_dict()
    names = list(live)
    held = {name: live[name].copy() for name in names}
    turned = dict(zip(names, [*names[1:], names[0]], strict=True))
    saved["leaves"]["params"]["state"] = {name: live[turned[name]] for name in names}
    optimizer.load_state_dict(saved)
    for name in names:
        assert live[name].tobytes() == held[turned[name]].tobytes(), name


def test_update_takes_apart_arrays_alone() -> None:
    memory = np.ones(1000, np.float32)
    p, m, v, g = (memory[k : k + 100] for k in (100, 300, 500, 700))
    overlapping = [p, m, memory[50:150], memory[150:250], memory[250:350], memory[350:450]]
    for a in overlapping:
        before = memory.tobytes()
        for gradient, state in ((a, v), (g, a)):
            with pytest.raises(ValueError, match="shares memory with"):
                fo.update(fo.AdamW(), 1, p, gradient, m, state)
        assert memory.tobytes() == before
