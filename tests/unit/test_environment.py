"""What a process sets beside the library: floating point, threads and their stacks, its exit."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from exactness import DEFAULTS, SERIAL, Array, run_python
from fusedopt import _core

BACKENDS = ("native", "numba", "reference")

# ---------------------------------------------------------------- floating point

X86 = platform.machine().lower() in ("x86_64", "amd64")
# Flushes denormal results and operands, and rounds towards zero.
ODD = 0x1F80 | 0x8040 | 0x6000 if X86 else 1 << 24 | 3 << 22


@pytest.fixture
def odd() -> Iterator[None]:
    """This thread, and those that it makes, have another floating-point environment."""
    before = _core.floating_point(ODD)
    yield
    assert _core.floating_point(before) & ~0x3F == ODD & ~0x3F


def in_new_thread(action: Callable[[], Any], control: int | None = None) -> Any:
    """What an action returns in a thread of its own, and so with a team of OpenMP's of its own."""
    results: list[Any] = []

    def run() -> None:
        _core.floating_point(control)
        results.append(action())
        _core.floating_point()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def tiny(rule: fo.Rule, dtype: Any, n: int) -> tuple[Array, Array]:
    """A parameter and a gradient, many of whose elements, sums and products are denormal."""
    rng = np.random.default_rng(7)
    shape = (n // 256, 256) if rule.program.matrices else (n,)
    limit = np.log(np.finfo(dtype).tiny)
    p, g = (np.exp(limit + rng.uniform(-9, 3, shape)).astype(dtype) for _ in range(2))
    return p, g * rng.choice([-1, 1], shape).astype(dtype)


def stepped(
    rule: fo.Rule, arrays: tuple[Array, Array], backend: str, **options: Any
) -> Callable[[], str]:
    def run() -> str:
        p, g = (a.copy() for a in arrays)
        optimizer = fo.Optimizer(p, rule, backend=backend, **options)
        for _ in range(3):
            optimizer.step(g)
        return optimizer.fingerprint()

    return run


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DEFAULTS)
def test_flushing_and_rounding_of_a_thread_are_no_concern_of_a_step(
    name: str, backend: str, dtype: Any
) -> None:
    rule = DEFAULTS[name]
    n = 2 * SERIAL if backend == "native" and name in ("sgd", "adamw") else 1024
    run = stepped(rule, tiny(rule, dtype, n), backend)
    assert in_new_thread(run, ODD) == in_new_thread(run)


@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 1e-38},
        {"stats": True, "ema": 0.5},
        {"state_dtype": "bfloat16", "rounding": "stochastic"},
        {"state_dtype": "float8"},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nor_of_its_options(backend: str, options: dict[str, Any]) -> None:
    run = stepped(fo.AdamW(), tiny(fo.AdamW(), np.float32, 8192), backend, **options)
    assert in_new_thread(run, ODD) == in_new_thread(run)


THREADS = """
import os, sys
import numpy as np, fusedopt as fo
from fusedopt import _core
from unit.test_environment import ODD, stepped, tiny

fo.set_threads(2)
n = 1 << 20
arrays = tiny(fo.AdamW(), np.float32, n)
found = []
for control in (ODD, None):  # workers that are made now have it, and stay
    _core.floating_point(control)
    for backend in ("native", "numba"):
        for threads in (1, 2):
            found.append(stepped(fo.AdamW(), arrays, backend, threads=threads)())
print(len(set(found)))
"""


def test_nor_are_those_of_its_workers() -> None:
    done = run_python(THREADS, {"OMP_NUM_THREADS": "2", "FUSEDOPT_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]


@pytest.mark.usefixtures("odd")
def test_functions_without_an_optimizer_have_it_too() -> None:
    for rule in (fo.AdamW(), fo.Lion()):
        p, g = tiny(rule, np.float32, 1000)
        odd = p.copy()
        fo.update(rule, 1, odd, g, *rule.init(p))
        own = _core.floating_point()
        fo.update(rule, 1, p, g, *rule.init(p))
        norm = fo.global_norm(g)
        _core.floating_point(own)
        assert odd.tobytes() == p.tobytes()
        assert fo.global_norm(g) == norm
        rows = fo.Rows(np.zeros(1000, np.int64), g.reshape(-1, 1))
        twice = np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32)
        fo.Optimizer(twice[0], fo.SGD(lr=1.0)).step(rows)
        _core.floating_point()
        fo.Optimizer(twice[1], fo.SGD(lr=1.0)).step(rows)
        _core.floating_point(own)
        assert twice[0].tobytes() == twice[1].tobytes()


# ---------------------------------------------------------------- threads


@pytest.mark.skipif(_core.parallel != "openmp", reason="built without OpenMP")
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")
@pytest.mark.parametrize("places", ["", "cores", "threads"])
@pytest.mark.parametrize("bind", ["false", "true", "close", "spread", "master"])
def test_threads_that_openmp_binds(bind: str, places: str) -> None:
    code = (
        "import os; before = len(os.sched_getaffinity(0)); import fusedopt as fo;"
        "from fusedopt.system.threads import available; print(before, available()['affinity'])"
    )
    environment = {"OMP_PROC_BIND": bind, "OMP_NUM_THREADS": "", "FUSEDOPT_THREADS": ""}
    done = run_python(code, {**environment, **({"OMP_PLACES": places} if places else {})})
    assert done.returncode == 0, done.stderr
    before, found = done.stdout.split()
    assert found == before


POOL = """
import os
granted = os.sched_getaffinity(0)
import fusedopt as fo
from fusedopt.backends.numba.pool import _workers
print(_workers().submit(os.sched_getaffinity, 0).result() == granted)
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")
def test_workers_of_numba_are_not_bound() -> None:
    done = run_python(POOL, {"OMP_PROC_BIND": "true", "OMP_PLACES": "threads"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]


STACK = """
import threading
import numpy as np, fusedopt as fo

def run():
    n = 1 << 18
    for options in (
        {"stats": True, "clip_norm": 1.0},
        {"state_dtype": "float8", "ema": 0.9},
        {"state_dtype": "dynamic4"},
        {"state_dtype": "bfloat16", "rounding": "stochastic"},
    ):
        p, g = np.ones((2, n), np.float32)
        fo.Optimizer(p, fo.AdamW(), **options).step(g)
    matrices = {k: np.eye(64, 64, k) for k in range(8)}
    fo.Optimizer(matrices, fo.Muon()).step({k: np.ones((64, 64)) for k in matrices})
    print(p[0] < 1)

fo.set_threads(2)
run()
"""


@pytest.mark.parametrize("size", ["16k", "32k", "64k"])
def test_small_stacks(size: str) -> None:
    done = run_python(STACK, {"OMP_STACKSIZE": size, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]


# ---------------------------------------------------------------- the end of the process

EXIT = """
import threading, time
import numpy as np, fusedopt as fo

rng = np.random.default_rng(0)
def looped(action):
    def loop():
        while True:
            action()
    threading.Thread(target=loop, daemon=True).start()

def optimizer(rule, shape, **options):
    p, g = np.ones(shape, np.float32), rng.standard_normal(shape).astype(np.float32)
    return fo.Optimizer(p, rule, **options), g


{action}
time.sleep(0.1)
"""

ENDED = {
    "a long step": "o, g = optimizer(fo.AdamW(), 1 << 19); looped(lambda: o.step(g))",
    "a short step": "o, g = optimizer(fo.AdamW(), 8); looped(lambda: o.step(g))",
    "a decision": "o, g = optimizer(fo.AdamW(), 1 << 14, clip_norm=1.0); looped(lambda: o.step(g))",
    "matrices": "o, g = optimizer(fo.Muon(), (256, 256)); looped(lambda: o.step(g))",
    "small matrices": "o, g = optimizer(fo.SOAP(), (16, 16)); looped(lambda: o.step(g))",
    "numba": "o, g = optimizer(fo.AdamW(), 1 << 19, backend='numba'); looped(lambda: o.step(g))",
    "rows": "o, g = optimizer(fo.AdamW(), (4096, 64)); i = rng.integers(0, 4096, 40000);"
    "v = np.ones((40000, 64), np.float32); looped(lambda: o.step(fo.Rows(i, v)))",
    "a norm": "g = np.ones(1 << 20, np.float32); looped(lambda: fo.global_norm(g))",
    "an average": "o, g = optimizer(fo.AdamW(), 1 << 16, ema=0.9)\ndef enter():\n"
    "    with o.averaged():\n        pass\nlooped(enter)",
}


SHORT = ("a short step",)


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(action, id=name, marks=[] if name in SHORT else pytest.mark.slow)
        for name, action in ENDED.items()
    ],
)
def test_daemon_threads_at_exit(action: str) -> None:
    for _ in range(2):
        done = run_python(EXIT.format(action=action), timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
