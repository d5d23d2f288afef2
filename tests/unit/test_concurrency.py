"""Threads, forks and interrupts: a step happens as a whole, or is refused, or has not begun."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import numpy as np
import pytest

import fusedopt as fo
import fusedopt.functional
from exactness import SERIAL, Array, run_python, step_and_digest
from fusedopt.backends import BACKENDS

WAIT = 60.0
"""Seconds after which something that should have happened counts as hanging."""

LARGE = SERIAL + 12345


def make(
    rule: Any = None, n: int = LARGE, backend: str = "native", **options: Any
) -> tuple[fo.Optimizer, Array]:
    """An optimizer of one array, and a gradient."""
    rng = np.random.default_rng(n)
    p, g = rng.standard_normal((2, n), np.float32)
    return fo.Optimizer(p, rule or fo.AdamW(), backend=backend, **options), g


def mixed(backend: str = "native", **options: Any) -> tuple[fo.Optimizer, dict[str, Array]]:
    """An optimizer of a vector and several matrices, whose products come between native calls."""
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 6), "b": (6, 4), "c": (5,), "d": (3, 3)}
    params, grads = ({k: rng.standard_normal(s) for k, s in shapes.items()} for _ in range(2))
    rules = {"c": fo.AdamW(), "*": fo.Muon(weight_decay=0.1)}
    return fo.Optimizer(params, rules, backend=backend, **options), grads


def fingerprints(optimizer: fo.Optimizer, grads: Any, steps: int) -> list[str]:
    """After 0, 1, ..., `steps` steps."""
    prints = [optimizer.fingerprint()]
    for _ in range(steps):
        optimizer.step(grads)
        prints.append(optimizer.fingerprint())
    return prints


# ---------------------------------------------------------------- threads


def test_optimizers_of_several_threads() -> None:
    want = fingerprints(*make(), 10)[-1]
    start = threading.Barrier(4)

    def work(_: int) -> str:
        start.wait(WAIT)
        return fingerprints(*make(), 10)[-1]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [want] * 4


class Pausing:
    """Rules that call `inside` in the middle of a step: natively between the phases of a matrix
    step, on the reference in the textbook.
    """

    def __init__(self, inside: Callable[[], None]) -> None:
        class PausingMuon(fo.Muon):
            def between(self, phase: int, works: Any, workspace: Any, members: Any) -> None:
                inside()

        class PausingSGD(fo.SGD):
            def textbook(self, p: Any, g: Any, states: Any, *, t: int, lr: float) -> Any:
                inside()
                return super().textbook(p, g, states, t=t, lr=lr)

        muon = PausingMuon(lr=0.5)
        self.rules = {"native": muon, "numba": muon, "reference": PausingSGD(lr=0.5)}


@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
def test_one_optimizer_in_two_threads_is_refused(backend: str) -> None:
    entered, leave = threading.Event(), threading.Event()

    def inside() -> None:
        entered.set()
        assert leave.wait(WAIT)

    p, g = np.ones((2, 2)), np.ones((2, 2))
    optimizer = fo.Optimizer(p, Pausing(inside).rules[backend], backend=backend)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(optimizer.step, g)
        try:
            assert entered.wait(WAIT)
            before = optimizer.fingerprint()
            with pytest.raises(RuntimeError, match="give each thread its own optimizer"):
                optimizer.step(g)
            assert optimizer.fingerprint() == before
        finally:
            leave.set()
        assert first.result(WAIT).step == 1
    assert optimizer.step(g).step == 2  # the refusal left nothing behind


@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
def test_one_optimizer_within_its_own_step_is_refused(backend: str) -> None:
    refused: list[bool] = []

    def inside() -> None:
        with pytest.raises(RuntimeError, match="own optimizer"):
            optimizer.step(g)
        refused.append(True)

    p, g = np.ones((2, 2)), np.ones((2, 2))
    optimizer = fo.Optimizer(p, Pausing(inside).rules[backend], backend=backend)
    assert optimizer.step(g).step == 1
    assert refused


@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
def test_a_step_has_its_own_learning_rate(backend: str) -> None:
    # Another thread steps the same optimizer while this one's schedule runs: either may be
    # refused, but no step may be taken with another step's rate.
    calls: list[int] = []
    intruder: list[Any] = []

    def schedule(step: int) -> float:
        calls.append(step)
        if len(calls) == 1:
            intruder.append(pool.submit(optimizer.step, g))
            intruder[0].exception(WAIT)
        return float(step)

    p, g = np.zeros(3), np.ones(3)
    optimizer = fo.Optimizer(p, fo.SGD(lr=schedule), backend=backend)
    infos: list[fo.StepInfo] = []
    with ThreadPoolExecutor(1) as pool:
        with suppress(RuntimeError):
            infos.append(optimizer.step(g))
        with suppress(RuntimeError):
            infos.append(intruder[0].result(WAIT))
    assert [info.lr for info in infos] == [info.step for info in infos]
    assert infos
    assert p.tolist() == [-sum(info.step for info in infos)] * 3


@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
def test_an_exception_within_a_step_changes_nothing(backend: str) -> None:
    # The reference writes when all is computed. The core writes each matrix before it computes the
    # next, so that one work space does for all: there, what comes between must not raise later on.
    calls, last = [], {"native": 1, "numba": 1, "reference": 2}[backend]

    def inside() -> None:
        calls.append(True)
        if len(calls) == last:
            raise ZeroDivisionError("in the middle of the step")

    params, grads = [np.ones((2, 2)), np.ones((2, 3))], [np.ones((2, 2)), np.ones((2, 3))]
    optimizer = fo.Optimizer(params, Pausing(inside).rules[backend], backend=backend)
    before = optimizer.fingerprint()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(grads)
    assert optimizer.fingerprint() == before
    assert optimizer.step(grads).step == 1


@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
def test_numpys_error_state_is_no_concern_of_a_step(backend: str) -> None:
    # Python's part of a step overflows and underflows where the kernels do: both silently.
    optimizer, grads = mixed(backend)
    grads["b"] *= 10.0 ** np.linspace(-300, 300, 24).reshape(6, 4)
    want = fingerprints(optimizer, grads, 2)
    optimizer, _ = mixed(backend)
    with np.errstate(all="raise"):
        assert fingerprints(optimizer, grads, 2) == want


def test_gradients_rearranged_during_a_step() -> None:
    # Each step finds all gradients, or refuses what it does not find; which, the other thread
    # decides. What it takes out, nothing but the step may still hold.
    params = [np.zeros(2), np.zeros(3), np.zeros(4)]
    optimizer = fo.Optimizer({"a": params[:2], "b": {"c": params[2]}}, fo.SGD(lr=1.0))
    grads: dict[str, Any] = {}
    stop = threading.Event()

    def rearrange() -> None:
        while not stop.is_set():
            grads["a"] = [np.ones(2)]
            grads["a"].append(np.ones(3))
            grads["b"] = {"c": np.ones(4)}
            grads["b"]["c"] = np.ones(4)
            grads["a"].clear()
            del grads["b"]

    interval = sys.getswitchinterval()
    rearranger = threading.Thread(target=rearrange)
    rearranger.start()
    try:
        sys.setswitchinterval(1e-6)
        taken, deadline = 0, time.monotonic() + WAIT
        while taken < 50 and time.monotonic() < deadline:
            with suppress(TypeError, ValueError, LookupError, RuntimeError):
                optimizer.step(grads)
                taken += 1
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        rearranger.join(WAIT)
    assert optimizer.step_count == taken > 0
    assert all((p == -taken).all() for p in params)


def test_other_threads_run_during_a_step() -> None:
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(1e-4)

    optimizer, g = make(n=1 << 22, threads=1)
    interval = sys.getswitchinterval()
    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        sys.setswitchinterval(WAIT)  # nothing but the step itself makes way for the other thread
        for _ in range(100):
            before = ticks[0]
            optimizer.step(g)
            if ticks[0] > before:
                break
        else:
            pytest.fail("no other thread ran during 100 long steps")
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        ticker.join(WAIT)


# ---------------------------------------------------------------- processes

FORK = """
import os, warnings
from fusedopt import _core
from unit.test_concurrency import fingerprints, make

warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which this is about
_core.set_threads(2)
optimizer, g = make()
optimizer.step(g)
for generation in range(2):
    child = os.fork()
    if child == 0:
        optimizer.step(g)  # hangs where the parent's threads are waited for
        print(optimizer.fingerprint(), flush=True)
        if generation == 1:
            os._exit(0)  # ... and a child's child
    else:
        _, status = os.waitpid(child, 0)
        if status == 0:
            optimizer.step(g)
            print(optimizer.fingerprint(), flush=True)
        os._exit(status != 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_after_a_parallel_region() -> None:
    done = run_python(FORK, {"OMP_NUM_THREADS": "2"}, timeout=WAIT)
    assert done.returncode == 0, done.stderr
    prints = fingerprints(*make(), 3)
    # The child's step 2, the grandchild's 3, then each parent's own next one.
    assert done.stdout.split() == [prints[2], prints[3], prints[3], prints[2]]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_multiprocessing(method: str) -> None:
    optimizer, g = make()
    optimizer.step(g)
    pool = multiprocessing.get_context(method).Pool(1)
    try:
        theirs = pool.apply_async(step_and_digest, (optimizer, g)).get(WAIT)
    finally:
        pool.terminate()
        pool.join()
    assert step_and_digest(optimizer, g) == theirs


# ---------------------------------------------------------------- interrupts


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, even where the test runner was started with it ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, previous)


def interrupted_at(line: int, action: Callable[[], object]) -> bool:
    """Run the action with an interrupt at the so many'th line of Python, in whatever module;
    False where it has fewer lines.
    """
    remaining = line

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal remaining
        if event == "line":
            remaining -= 1
            if remaining == 0:
                signal.raise_signal(signal.SIGINT)
        return trace

    previous = sys.gettrace()
    gc.disable()  # Python ignores what its callbacks raise, and those of hypothesis have lines
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(previous)
        gc.enable()
    assert remaining > 0, "an interrupt was lost"
    return False


WAYS: dict[str, dict[str, Any]] = {
    "native": {"backend": "native"},
    "numba": {"backend": "numba"},
    "reference": {"backend": "reference"},
    "verified": {"backend": "native", "verify": True},
}


@pytest.mark.slow
@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_interrupt_at_every_line_of_a_step(options: dict[str, Any]) -> None:
    optimizer, grads = mixed(**options)
    whole = fingerprints(optimizer, grads, 2)
    seen = set()
    for line in itertools.count(1):
        optimizer, _ = mixed(**options)
        if not interrupted_at(line, partial(optimizer.step, grads)):
            break
        assert optimizer.fingerprint() == whole[optimizer.step_count], f"line {line}"
        seen.add(optimizer.step_count)
        optimizer.step(grads)
        assert optimizer.fingerprint() == whole[optimizer.step_count], f"after line {line}"
    assert seen == {0, 1}, "interrupts came only before, or only after the step"


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
@pytest.mark.parametrize("rule", [fo.AdamW(), fo.Muon()], ids=lambda rule: rule.name)
def test_interrupt_at_every_line_of_an_update(
    rule: fo.Rule, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = BACKENDS[backend]
    monkeypatch.setattr(fusedopt.functional, "default_backend", lambda: chosen)
    g = np.random.default_rng(0).standard_normal((3, 4))

    def fresh() -> tuple[Array, ...]:
        return np.ones((3, 4)), *rule.init(g)

    before, after = fresh(), fresh()
    fo.update(rule, 1, after[0], g, *after[1:])
    for line in itertools.count(1):
        arrays = fresh()
        if not interrupted_at(line, partial(fo.update, rule, 1, arrays[0], g, *arrays[1:])):
            break
        contents = [a.tobytes() for a in arrays]
        assert contents in ([a.tobytes() for a in before], [a.tobytes() for a in after]), (
            f"line {line}"
        )


def step_until(timer: threading.Timer, optimizer: fo.Optimizer, grads: Any) -> NoReturn:
    timer.start()
    while True:
        optimizer.step(grads)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals between threads")
@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
def test_interrupts_at_any_moment(backend: str) -> None:
    # The same without a tracer, so that they also arrive inside of native calls.
    optimizer, grads = mixed(backend)
    shadow, _ = mixed(backend)
    main = threading.main_thread().ident
    assert main is not None
    for k in range(20):
        timer = threading.Timer(0.002 + 1e-4 * k, signal.pthread_kill, (main, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            step_until(timer, optimizer, grads)
        timer.join(WAIT)
        while shadow.step_count < optimizer.step_count:
            shadow.step(grads)
        assert optimizer.fingerprint() == shadow.fingerprint()
