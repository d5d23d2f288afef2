"""An exception from outside, at each bytecode of the package's Python: a whole action or none."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
import fusedopt.functional
from exactness import Array
from fusedopt.backends import BACKENDS

PACKAGE = str(Path(fo.__file__).parent)
WAIT = 60.0


class FromOutside(BaseException):
    """What a handler of a signal may raise, or another thread."""


class At:
    """A tracer that raises at a bytecode, counted over the package's own frames in this thread."""

    def __init__(self, place: int) -> None:
        self.left = place

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                raise FromOutside
        return self


def interrupted_at(place: int, action: Callable[[], object]) -> bool:
    """Whether an action was interrupted at a bytecode; it has fewer otherwise."""
    tracer, previous = At(place), sys.gettrace()
    sys.settrace(tracer)
    try:
        action()
    except FromOutside:
        return True
    finally:
        sys.settrace(previous)
    assert tracer.left > 0, "the exception was lost"
    return False


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


BACKEND = pytest.mark.parametrize("backend", ["native", "numba", "reference"])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_norm": 1.0},
    "measured": {"stats": True, "ema": 0.5},
    "zeroing": {"zero_grads": True},
    "masters": {"master": "float32"},
    "verified": {"verify": True},
}


@BACKEND
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step(options: dict[str, Any], backend: str) -> None:
    check(lambda: tables(fo.AdamW(lr=scheduled), backend, **options), step)


@BACKEND
@pytest.mark.parametrize("rule", [fo.Muon(), fo.NorMuon(), fo.AdaMuon(), fo.SOAP()])
def test_a_step_of_matrices(rule: fo.Rule, backend: str) -> None:
    check(lambda: matrices(rule, backend), step)


@BACKEND
@pytest.mark.parametrize("name", [n for n, cls in fo.RULES.items() if cls().program.phases == 1])
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


@BACKEND
def test_a_step_of_sums(backend: str) -> None:
    def make() -> tuple[fo.Optimizer, Any]:
        optimizer, grads = tables(fo.AdamW(), backend)
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


@BACKEND
def test_states_that_come_and_go(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    other, grads = tables(fo.AdamW(), backend)
    other.step(grads)
    other.save(path)
    before = path.read_bytes()
    state = other.state_dict()

    def make() -> tuple[fo.Optimizer, Any]:
        return tables(fo.AdamW(), backend)

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


@BACKEND
@pytest.mark.parametrize("kind", ["averaged", "lookahead"])
def test_parameters_come_back(kind: str, backend: str) -> None:
    rule = fo.Nesterov(form="lookahead")

    def make() -> tuple[fo.Optimizer, Any]:
        optimizer, grads = tables(rule, backend, ema=0.5)
        optimizer.step(grads)
        return optimizer, grads

    def enter(optimizer: fo.Optimizer, grads: Any) -> None:
        own = contents(optimizer)
        with getattr(optimizer, kind)():
            assert contents(optimizer) != own

    check(make, enter)


@BACKEND
@pytest.mark.parametrize("rule", [fo.AdamW(), fo.Muon()], ids=lambda rule: rule.name)
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
