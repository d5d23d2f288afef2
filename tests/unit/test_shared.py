"""Several threads: of one optimizer one thread is served at a time, of many each gets its own."""

from __future__ import annotations

import copy
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from exactness import SERIAL, Array, run_python
from fusedopt.system import threads

WAIT = 60.0
"""Seconds after which something that should have happened counts as hanging."""

N = SERIAL + 999
IN_USE = "in use in another thread: give each thread its own optimizer"


class Held:
    """A rule whose steps, once `hold` is set, wait in their middle until `leave` is."""

    def __init__(self) -> None:
        self.hold = hold = threading.Event()
        self.entered = entered = threading.Event()
        self.leave = leave = threading.Event()

        class HeldNesterov(fo.Nesterov):
            def scalars(self, t: int, lr: float) -> tuple[float, ...]:
                if hold.is_set():
                    entered.set()
                    assert leave.wait(WAIT)
                return super().scalars(t, lr)

        self.rule = HeldNesterov(form="lookahead")


USES: dict[str, Callable[[fo.Optimizer, dict[str, Array], Path], object]] = {
    "step": lambda o, g, f: o.step(g),
    "scaled step": lambda o, g, f: o.step(g, grad_scale=2.0),
    "accumulate": lambda o, g, f: o.accumulate(g),
    "lr": lambda o, g, f: setattr(o, "lr", 0.5),
    "replace": lambda o, g, f: o.replace(momentum=0.5),
    "rebind": lambda o, g, f: o.rebind(copy.deepcopy(o.params)),
    "sync": lambda o, g, f: o.sync(),
    "lookahead": lambda o, g, f: o.lookahead().__enter__(),
    "averaged": lambda o, g, f: o.averaged().__enter__(),
    "catch_up": lambda o, g, f: o.catch_up(),
    "state_dict": lambda o, g, f: o.state_dict(),
    "deepcopy": lambda o, g, f: copy.deepcopy(o),
    "load_state_dict": lambda o, g, f: o.load_state_dict({}),
    "save": lambda o, g, f: o.save(f),
    "load": lambda o, g, f: o.load(f),
}


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"stats": True}], ids=str)
def test_a_step_keeps_every_other_use_away(options: dict[str, Any], tmp_path: Path) -> None:
    held = Held()
    params, grads = {"a": np.ones(5), "b": np.ones(3)}, {"a": np.ones(5), "b": np.ones(3)}
    optimizer = fo.Optimizer(params, held.rule, ema=0.9, backend="native", **options)
    optimizer.save(tmp_path / "run")
    held.hold.set()
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(optimizer.step, grads)
        try:
            assert held.entered.wait(WAIT)
            before = optimizer.fingerprint()
            for name, use in USES.items():
                if name != "catch_up" or "exact" in options:
                    with pytest.raises(RuntimeError, match=IN_USE):
                        use(optimizer, grads, tmp_path / "run")
                assert optimizer.fingerprint() == before, name
        finally:
            held.leave.set()
        assert step.result(WAIT).step == 1
    assert optimizer.params is params
    assert optimizer.step(grads).step == 2


@pytest.mark.parametrize("context", ["lookahead", "averaged"])
def test_a_context_keeps_late_steps_away(context: str) -> None:
    # A thread that has come past the check for contexts when another one enters it.
    p, g = np.ones(5), np.ones(5)
    optimizer = fo.Optimizer(p, fo.Nesterov(form="lookahead"), ema=0.9)
    late = optimizer._assembly.whole_step
    assert late is not None
    with getattr(optimizer, context)(), pytest.raises(RuntimeError, match=IN_USE):
        late(g, None, 1.0, None)
    assert p.tolist() == [1.0] * 5
    assert optimizer.step(g).step == 1


def test_a_context_that_is_refused_restores_nothing() -> None:
    held = Held()
    held.hold.set()
    p, g = np.ones(5), np.ones(5)
    optimizer = fo.Optimizer(p, held.rule, backend="native")
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(optimizer.step, g)
        try:
            assert held.entered.wait(WAIT)
            with pytest.raises(RuntimeError, match=IN_USE), optimizer.lookahead():
                pytest.fail("entered during a step")
        finally:
            held.leave.set()
        assert step.result(WAIT).step == 1
    with optimizer.lookahead():
        pass


@pytest.mark.parametrize("change", ["rebind", "load_state_dict"])
def test_what_was_replaced_is_of_no_use_to_a_late_thread(change: str) -> None:
    p, q, g = np.zeros(5), np.zeros(5), np.ones(5)
    optimizer = fo.Optimizer(p, fo.SGD(lr=1.0))
    late = optimizer._assembly.whole_step
    assert late is not None
    state = optimizer.state_dict()
    argument: Any = {"rebind": q, "load_state_dict": state}[change]
    getattr(optimizer, change)(argument)
    with pytest.raises(RuntimeError, match=IN_USE):
        late(g, None, 1.0, None)
    assert p.tolist() == q.tolist() == [0.0] * 5
    assert optimizer.step(g).step == 1


def test_a_late_thread_steps_with_the_hyperparameters_that_were_replaced() -> None:
    p, g = np.zeros(5), np.ones(5)
    optimizer = fo.Optimizer(p, fo.SGD(lr=1.0))
    late = optimizer._assembly.whole_step
    assert late is not None
    optimizer.replace(weight_decay=0.5)
    assert late(g, None, 1.0, None).step == 1
    assert late(g, None, 1.0, None).step == 2
    assert p.tolist() == [-1.5] * 5  # 0 - 1, and then -1 - (1 - 0.5)


@contextmanager
def frequent_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_steps_and_changes_at_once_are_whole(backend: str) -> None:
    # Every step that was not refused takes one from one of the two arrays.
    arrays, g = [np.zeros(7), np.zeros(7)], np.ones(7)
    optimizer = fo.Optimizer(arrays[0], fo.SGD(lr=1.0), backend=backend)
    taken, stop = [0, 0, 0], threading.Event()

    def stepping(k: int) -> None:
        while not stop.is_set():
            with suppress(RuntimeError):
                optimizer.step(g, grad_scale=1.0 if k else 2.0)
                taken[k] += 1

    def changing() -> None:
        try:
            for k in range(150):
                for change in (
                    lambda k=k: optimizer.rebind(arrays[k % 2]),
                    lambda: optimizer.replace(maximize=False),
                    lambda: setattr(optimizer, "lr", 1.0),
                    lambda: optimizer.state_dict(),
                    lambda: optimizer.load_state_dict(optimizer.state_dict()),
                ):
                    with suppress(RuntimeError):
                        change()
        finally:
            stop.set()

    with frequent_switches(), ThreadPoolExecutor(3) as pool:
        others = [pool.submit(stepping, k) for k in range(2)]
        pool.submit(changing).result(WAIT)
        for other in others:
            other.result(WAIT)
    optimizer.step(g)
    taken[1] += 1
    total = arrays[0] + arrays[1]
    assert total.tolist() == [-(0.5 * taken[0] + taken[1])] * 7


def test_a_hundred_threads() -> None:
    rng = np.random.default_rng(0)
    p, g = rng.standard_normal((2, 3 * N), np.float32)
    start = threading.Barrier(100)

    def work(k: int) -> str:
        # Sizes on either side of where teams begin.
        part = slice(None, N) if k % 10 == 0 else slice(k, 1000)
        optimizer = fo.Optimizer(p[part].copy(), fo.AdamW(), clip_norm=1.0)
        start.wait(WAIT)
        for _ in range(5):
            optimizer.step(g[part])
        return optimizer.fingerprint()

    with ThreadPoolExecutor(100) as pool:
        got = list(pool.map(work, range(100)))
    start = threading.Barrier(1)
    assert got == [work(k) for k in range(100)]


# ---------------------------------------------------------------- forks beside other threads

FORKS = """
import os, threading, warnings
import numpy as np, fusedopt as fo
from fusedopt import _core
from unit.test_shared import N

warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which this is about
_core.set_threads(2)

def make(seed):
    p, g = np.random.default_rng(seed).standard_normal((2, N), np.float32)
    return fo.Optimizer(p, fo.AdamW()), g

other, h = make(1)
stop = threading.Event()
def steps():
    while not stop.is_set():
        other.step(h)

thread = threading.Thread(target=steps)
thread.start()
optimizer, g = make(0)
for _ in range(8):
    optimizer.step(g)
    child = os.fork()
    if child == 0:
        try:
            optimizer.step(g)
            mine, _ = make(2)
            mine.step(g)
            print(optimizer.fingerprint(), flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    optimizer.step(g)
    print(optimizer.fingerprint(), flush=True)
stop.set()
thread.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forks_beside_a_thread_with_a_team() -> None:
    done = run_python(FORKS, {"OMP_NUM_THREADS": "2"}, timeout=WAIT)
    assert done.returncode == 0, done.stderr
    prints = done.stdout.split()
    assert len(prints) == 16
    assert prints[::2] == prints[1::2]
    assert len(set(prints)) == 8


# ---------------------------------------------------------------- how many threads there may be

LIMITS = """
import json, fusedopt as fo
print(json.dumps([fo.get_threads(), fo.info()["thread_limits"]]))
"""


@pytest.mark.parametrize(
    ("environment", "most"),
    [
        ({"FUSEDOPT_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1,4"}, 1),
        ({"OMP_NUM_THREADS": "3", "FUSEDOPT_THREADS": "2"}, 2),
    ],
)
def test_environment_limits_threads(environment: dict[str, str], most: int) -> None:
    done = run_python(LIMITS, {"OMP_NUM_THREADS": "", **environment})
    assert done.returncode == 0, done.stderr
    count, limits = json.loads(done.stdout)
    assert count == min(limits.values()) <= most


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_affinity_limits_threads() -> None:
    done = run_python("import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])" + LIMITS)
    assert done.returncode == 0, done.stderr
    count, limits = json.loads(done.stdout)
    assert (count, limits["affinity"]) == (1, 1)


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "spoilt\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_control_groups_limit_threads(
    files: dict[str, str], limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(control: str) -> str:
        if control not in files:
            raise FileNotFoundError(control)
        return files[control]

    monkeypatch.setattr(threads, "_read", read)
    assert threads.available().get("container") == limit


POOLS = """
import numpy as np, fusedopt as fo
from fusedopt import _core
from threadpoolctl import threadpool_info, threadpool_limits

p = np.ones(3, np.float32)
fo.Optimizer(p, fo.SGD()).step(p.copy())
before = _core.parallel_limit()
assert any(pool["user_api"] == "openmp" for pool in threadpool_info()), threadpool_info()
with threadpool_limits(1, user_api="openmp"):
    assert _core.parallel_limit() == 1
assert _core.parallel_limit() == before
"""


def test_threadpoolctl_sees_and_limits_the_pool() -> None:
    pytest.importorskip("threadpoolctl")
    if fo.info()["parallel"] != "openmp":
        pytest.skip("the core has no OpenMP")
    done = run_python(POOLS, {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr


TOGETHER = """
import importlib, sys
import numpy as np

modules = {name: importlib.import_module(name) for name in ORDER}
from unit.test_shared import N
import fusedopt as fo

rng = np.random.default_rng(0)
p, g = rng.standard_normal((2, N), np.float32)
opt = fo.Optimizer(p, fo.AdamW())
for _ in range(3):
    opt.step(g)
    if "torch" in modules:
        modules["torch"].ones(300, 300) @ modules["torch"].ones(300, 300)
        modules["sklearn.cluster"].KMeans(2, n_init=1).fit(rng.standard_normal((500, 2)))
print(opt.fingerprint())
"""


def test_other_libraries_with_pools_in_one_process() -> None:
    for name in ("torch", "sklearn"):
        pytest.importorskip(name)
    prints = set()
    for order in (["fusedopt"], ["torch", "sklearn.cluster", "fusedopt"],
                  ["fusedopt", "sklearn.cluster", "torch"]):  # fmt: skip
        done = run_python(f"ORDER = {order!r}\n" + TOGETHER, timeout=WAIT)
        assert done.returncode == 0, done.stderr
        prints.add(done.stdout)
    assert len(prints) == 1
