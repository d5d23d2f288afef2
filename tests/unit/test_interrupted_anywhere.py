"""An exception from outside, at each bytecode of the package's Python: a whole action or none."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
import fusedopt.functional
from exactness import Array, run_python
from fusedopt.backends import BACKENDS
from fusedopt.rules.matrix import MatrixRule
from interrupting import FromOutside, interrupted_at

WAIT = 60.0


def matrices(rule: fo.Rule, backend: str, **options: Any) -> tuple[fo.Optimizer, Any]:
    """An optimizer of a vector and two batches of matrices, and gradients."""
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 6), "b": (6, 4), "c": (5,)}
    params, grads = ({k: rng.standard_normal(s) for k, s in shapes.items()} for _ in range(2))
    rules = {"c": fo.AdamW(), "*": rule}
    return fo.Optimizer(params, rules, backend=backend, **options), grads


def tables(rule: fo.Rule, backend: str, **options: Any) -> tuple[fo.Optimizer, Any]:
    """An optimizer of a table, a low-precision and a plain array, and gradients."""
    rng = np.random.default_rng(0)
    params = {
        "a": rng.standard_normal((4, 3)).astype(np.float32),
        "b": rng.standard_normal(5).astype(ml_dtypes.bfloat16),
    }
    grads = {"a": rng.standard_normal((4, 3)), "b": rng.standard_normal(5).astype(np.float32)}
    return fo.Optimizer(params, rule, backend=backend, **options), grads


def rows(grads: Any) -> Any:
    """Gradients of which that of the table is of some rows."""
    return {**grads, "a": fo.Rows(np.array([2, 0, 2]), np.ones((3, 3), np.float32))}


def scheduled(step: int) -> float:
    return 0.1 / step


Make = Callable[[], tuple[fo.Optimizer, Any]]
Action = Callable[[fo.Optimizer, Any], object]


def step(optimizer: fo.Optimizer, grads: Any) -> object:
    return optimizer.step(grads)


def accumulated(optimizer: fo.Optimizer, grads: Any) -> object:
    optimizer.accumulate(grads)
    return optimizer.step(grad_scale=2.0)


def contents(optimizer: fo.Optimizer) -> bytes:
    """All that an optimizer holds and updates, sums of gradients included."""
    assembly = optimizer._assembly
    arrays = [*assembly.parameters, *(a for held in assembly.leaf_states for a in held.written)]
    sums = assembly.sums.sums if assembly.sums is not None else []
    given = [np.asarray(getattr(s, "values", s)) for s in sums if s is not None]
    return b"".join(a.tobytes() for a in [assembly.counters, *arrays, *given])


def check(make: Make, action: Action, again: Action = step, stride: int = 1) -> None:
    """At each bytecode: what there is then is what was before the action or is after it."""
    optimizer, grads = make()
    whole = [contents(optimizer)]
    action(optimizer, grads)
    whole.append(contents(optimizer))
    seen = set()
    for place in itertools.count(1, stride):
        optimizer, grads = make()
        if not interrupted_at(place, lambda o=optimizer, g=grads: action(o, g)):  # type: ignore[misc]
            break
        found = contents(optimizer)
        assert found in whole, f"half an action, at bytecode {place}"
        seen.add(whole.index(found))
        if found == whole[0]:  # nothing of it is left behind
            action(optimizer, grads)
            assert contents(optimizer) == whole[1], f"bytecode {place}"
        else:
            again(optimizer, grads)
    assert 0 in seen


BACKEND = pytest.mark.parametrize(
    "backend", ["native", pytest.param("numba", marks=pytest.mark.slow), "reference"]
)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_norm": 1.0},
    "measured": {"stats": True, "ema": 0.5},
    "zeroing": {"zero_grads": True},
    "transforming": {"clip_leaf": 0.1, "centralize": True},
    "looking ahead": {"slow_weights": fo.Lookahead(k=1, reset=True)},
    "masters": {"master": "float32"},
    "verified": {"verify": True},
}


@BACKEND
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step(options: dict[str, Any], backend: str) -> None:
    check(lambda: tables(fo.AdamW(lr=scheduled), backend, **options), step)


@BACKEND
@pytest.mark.parametrize(
    "rule",
    [fo.Muon(), fo.NorMuon(), fo.AdaMuon(), fo.SOAP(), fo.Shampoo(), fo.Dion(), fo.Adafactor()],
)
def test_a_step_of_matrices(rule: fo.Rule, backend: str) -> None:
    check(lambda: matrices(rule, backend), step)


@BACKEND
@pytest.mark.parametrize("name", [n for n, cls in fo.RULES.items() if not cls().program.matrices])
def test_a_step_of_every_rule(name: str, backend: str) -> None:
    check(lambda: tables(fo.RULES[name](), backend), step)


@BACKEND
def test_a_step_of_some_rows(backend: str) -> None:
    check(lambda: tables(fo.AdamW(), backend), lambda o, g: o.step(rows(g)))


@pytest.mark.parametrize("backend", ["native", "numba"])
def test_a_step_that_rows_miss(backend: str) -> None:
    def make() -> tuple[fo.Optimizer, Any]:
        optimizer, grads = tables(fo.AdamW(), backend, exact=True)
        optimizer.step(rows(grads))
        return optimizer, grads

    check(make, lambda o, g: o.catch_up())


KINDS: dict[str, Callable[..., tuple[fo.Optimizer, Any]]] = {
    "elements": partial(tables, fo.AdamW()),
    "estimates": partial(tables, fo.Sophia()),
    "look-ahead": partial(tables, fo.Nesterov(form="lookahead")),
    "matrices": partial(matrices, fo.Muon()),
    "sides": partial(matrices, fo.SOAP()),
}
KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.mark.slow
@BACKEND
@KIND
def test_a_step_of_sums(kind: Any, backend: str) -> None:
    def make() -> tuple[fo.Optimizer, Any]:
        optimizer, grads = kind(backend)
        optimizer.accumulate(grads)
        return optimizer, grads

    check(make, lambda o, g: o.accumulate(g), lambda o, g: o.step())
    check(make, lambda o, g: o.step())


@BACKEND
def test_a_step_in_parts(backend: str) -> None:
    def make() -> tuple[fo.Optimizer, Any]:
        return tables(fo.AdamW(), backend)

    check(
        make, lambda o, g: o.step_part(["a"], [g["a"]]), lambda o, g: o.step_part([], [], last=True)
    )


@pytest.mark.slow
@BACKEND
@KIND
def test_states_that_come_and_go(kind: Any, backend: str, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    other, grads = kind(backend)
    other.step(grads)
    other.save(path)
    before = path.read_bytes()
    state = other.state_dict()

    def make() -> tuple[fo.Optimizer, Any]:
        made: tuple[fo.Optimizer, Any] = kind(backend)
        return made

    check(make, lambda o, g: o.load(path))
    check(make, lambda o, g: o.load_state_dict(state))
    check(make, lambda o, g: o.state_dict())
    check(make, lambda o, g: o.save(path))
    assert path.read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@BACKEND
def test_hyperparameters_and_arrays(backend: str) -> None:
    def make() -> tuple[fo.Optimizer, Any]:
        optimizer, grads = tables(fo.AdamW(), backend, master="float32")
        optimizer.step(grads)
        return optimizer, grads

    def replace(optimizer: fo.Optimizer, grads: Any) -> None:
        optimizer.replace(weight_decay=0.5)

    def rebind(optimizer: fo.Optimizer, grads: Any) -> None:
        optimizer.rebind({k: a.copy() for k, a in optimizer.params.items()})

    check(make, replace)
    check(make, rebind)
    check(make, lambda o, g: o.sync())


@BACKEND
@pytest.mark.parametrize(
    "change",
    [lambda o: setattr(o, "lr", 0.5), lambda o: o.replace(lr=0.5, weight_decay=0.25)],
    ids=["lr", "replace"],
)
def test_hyperparameters_and_what_is_told_of_them(
    change: Callable[[fo.Optimizer], object], backend: str
) -> None:
    """The step after an interrupted change is that of the rule which the optimizer shows."""
    for place in itertools.count(1):
        optimizer, grads = tables(fo.AdamW(), backend)
        done = not interrupted_at(place, lambda o=optimizer: change(o))  # type: ignore[misc]
        twin, _ = tables(optimizer.rule, backend)  # type: ignore[arg-type]
        assert optimizer.lr == twin.lr
        assert optimizer.step(grads) == twin.step(grads), f"bytecode {place}"
        assert contents(optimizer) == contents(twin), f"bytecode {place}"
        if done:
            break
    assert optimizer.lr == 0.5


@pytest.mark.slow
@BACKEND
@pytest.mark.parametrize(
    ("kind", "context"), [*((kind, "averaged") for kind in KINDS), ("look-ahead", "lookahead")]
)
def test_parameters_come_back(kind: str, context: str, backend: str) -> None:
    def make() -> tuple[fo.Optimizer, Any]:
        optimizer, grads = KINDS[kind](backend, ema=0.5)
        optimizer.step(grads)
        return optimizer, grads

    def enter(optimizer: fo.Optimizer, grads: Any) -> None:
        own = contents(optimizer)
        with getattr(optimizer, context)():
            assert contents(optimizer) != own

    check(make, enter)


@BACKEND
@pytest.mark.parametrize(
    "rule",
    [fo.AdamW(), pytest.param(fo.Muon(), marks=pytest.mark.slow)],
    ids=lambda rule: rule.name,
)
def test_an_update(rule: fo.Rule, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = BACKENDS[backend]
    monkeypatch.setattr(fusedopt.functional, "default_backend", lambda: chosen)
    g = np.random.default_rng(0).standard_normal((3, 4))

    def fresh() -> tuple[Array, ...]:
        return np.ones((3, 4)), *rule.init(g)

    def bits(arrays: tuple[Array, ...]) -> list[bytes]:
        return [a.tobytes() for a in arrays]

    after = fresh()
    fo.update(rule, 1, after[0], g, *after[1:])
    for place in itertools.count(1):
        arrays = fresh()
        if not interrupted_at(place, lambda a=arrays: fo.update(rule, 1, a[0], g, *a[1:])):  # type: ignore[misc]
            break
        assert bits(arrays) in (bits(fresh()), bits(after)), f"bytecode {place}"


# ---------------------------------------------------------------- without a tracer


def alarmed(optimizer: fo.Optimizer, grads: Any, delay: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, delay)
    while True:
        optimizer.step(grads)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers")
@pytest.mark.parametrize("number", ["SIGALRM", "SIGTERM", "SIGUSR1"])
@BACKEND
def test_handlers_of_signals_that_raise(backend: str, number: str) -> None:
    def handler(*details: Any) -> None:
        raise FromOutside

    def pass_on(*details: Any) -> None:
        signal.raise_signal(getattr(signal, number))

    optimizer, grads = matrices(fo.Muon(), backend)
    shadow, _ = matrices(fo.Muon(), backend)
    previous = {n: signal.getsignal(n) for n in (signal.SIGALRM, getattr(signal, number))}
    try:
        signal.signal(signal.SIGALRM, pass_on)
        signal.signal(getattr(signal, number), handler)
        for k in range(10):
            with pytest.raises(FromOutside):
                alarmed(optimizer, grads, 0.002 + 1e-4 * k)
            while shadow.step_count < optimizer.step_count:
                shadow.step(grads)
            assert optimizer.fingerprint() == shadow.fingerprint()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for n, handler_before in previous.items():
            signal.signal(n, handler_before)


def until_stopped(optimizer: fo.Optimizer, grads: Any, ended: threading.Event) -> None:
    try:
        while True:
            optimizer.step(grads)
    except FromOutside:
        ended.set()


@BACKEND
def test_exceptions_of_other_threads(backend: str) -> None:
    import ctypes

    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    optimizer, grads = matrices(fo.SOAP(), backend)
    shadow, _ = matrices(fo.SOAP(), backend)
    for k in range(10):
        ended = threading.Event()

        thread = threading.Thread(target=until_stopped, args=(optimizer, grads, ended))
        thread.start()
        time.sleep(0.002 + 1e-3 * k)
        assert thread.ident is not None
        raise_in(ctypes.c_ulong(thread.ident), ctypes.py_object(FromOutside))
        thread.join(WAIT)
        assert ended.is_set()
        while shadow.step_count < optimizer.step_count:
            shadow.step(grads)
        assert optimizer.fingerprint() == shadow.fingerprint()


# ---------------------------------------------------------------- errors between matrices


SHORT = """
import resource
import numpy as np, fusedopt as fo

def used():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

rng = np.random.default_rng(0)
params = {k: rng.standard_normal((40, 30)).astype(np.float32) for k in "abc"}
grads = {k: rng.standard_normal((40, 30)).astype(np.float32) for k in "abc"}
optimizer = fo.Optimizer(params, fo.RULE(), backend="BACKEND")
optimizer.step(grads)
before = optimizer.fingerprint()
resource.setrlimit(resource.RLIMIT_AS, (used() + (1 << 19), resource.RLIM_INFINITY))
try:
    optimizer.step(grads)
except MemoryError:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    assert optimizer.fingerprint() == before
    print("refused")
optimizer.step(grads)
assert optimizer.step_count == 2
"""
MATRIX_RULES = [cls for cls in fo.RULES.values() if issubclass(cls, MatrixRule)]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory as Linux does")
@pytest.mark.parametrize("backend", ["native", "numba"])
@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_a_step_begins_only_with_the_memory_that_it_needs(rule: type, backend: str) -> None:
    one = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = run_python(SHORT.replace("RULE", rule.__name__).replace("BACKEND", backend), one)
    assert done.stdout == "refused\n", done.stderr


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("failing", range(1, 4))
@pytest.mark.parametrize("backend", ["native", "numba"])
@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_half_a_step_is_neither_saved_nor_gone_on_with(
    rule: Any, backend: str, failing: int, verify: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where the products between the phases fail, as no memory that was free before explains."""
    optimizer, grads = matrices(rule(), backend, verify=verify)
    optimizer.step(grads)
    optimizer.save(tmp_path / "whole")
    before, calls, between = optimizer.fingerprint(), [0], rule.between

    def limited(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == failing:
            raise MemoryError
        between(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(rule, "between", limited)
        with pytest.raises(MemoryError) if failing <= calls_of(rule) else nullcontext():
            optimizer.step(grads)
    unwritten = failing == 1 and not rule().sides((3, 4))  # the work space alone has changed
    if verify or unwritten or failing > calls_of(rule):  # on copies, or without a failure
        assert (optimizer.fingerprint() == before) == (failing <= calls_of(rule))
        optimizer.step(grads)
        return
    for action in (
        lambda: optimizer.step(grads),
        lambda: optimizer.accumulate(grads),
        lambda: optimizer.save(tmp_path / "half"),
        optimizer.state_dict,
        lambda: optimizer.lookahead().__enter__(),
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"load a whole file|no leaf is upd"):
            action()
    optimizer.load(tmp_path / "whole")
    assert optimizer.fingerprint() == before
    assert optimizer.step(grads).step == 2


def calls_of(rule: Any) -> int:
    """How often a step of `matrices` calls `between`."""
    phases: int = rule().program.phases
    return 2 * (phases - 1)
