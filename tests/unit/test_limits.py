"""Very large arrays, very many arrays, very many steps."""

from __future__ import annotations

import math
import sys
import tracemalloc
from decimal import Decimal, localcontext

import numpy as np
import pytest

import fusedopt as fo
from exactness import DTYPES, Array, run_python
from fusedopt.programs.arithmetic import correction

BETAS = (0.9, 0.999, 0.99999)


def available_gibibytes() -> float:
    """Memory that can be had without swapping; 0 where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            kibibytes = next(int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return 0.0
    return kibibytes / 2**20


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    if available_gibibytes() < 12:
        pytest.skip("needs 12 GiB of free memory")
    n = 2**31 + 1000
    p = np.zeros(n, np.float32)
    g = np.zeros(n, np.float32)  # takes no memory but where it is written
    places = [0, 1, 2**30, *range(2**31 - 2, 2**31 + 3), n - 2, n - 1]
    values = np.arange(1, len(places) + 1, dtype=np.float32)
    g[places] = values
    for step, threads in enumerate((1, 2), start=1):  # in one piece, and in parts
        optimizer = fo.Optimizer(p, fo.SGD(lr=0.5), threads=threads)
        optimizer.step(g)
        assert p[places].tolist() == (-0.5 * step * values).tolist()
    assert np.count_nonzero(p) == len(places)


@pytest.mark.slow
def test_many_tiny_arrays() -> None:
    n = 100_000
    start, gradients = np.random.default_rng(0).standard_normal((2, n), np.float32)
    rule = fo.AdamW(weight_decay=0.1)
    params = [start[k : k + 1].copy() for k in range(n)]
    optimizer = fo.Optimizer(params, rule)
    for _ in range(2):
        optimizer.step([gradients[k : k + 1] for k in range(n)])
    whole = start.copy()
    states = rule.init(whole)
    for t in (1, 2):
        fo.update(rule, t, whole, gradients, *states)
    assert np.concatenate(params).tobytes() == whole.tobytes()


def exact_correction(beta: float, t: int) -> Decimal:
    with localcontext(prec=60):
        return 1 - Decimal(beta) ** t


@pytest.mark.parametrize("t", [1, 2, 10, 1000, 10**6])
@pytest.mark.parametrize("beta", BETAS)
def test_bias_corrections_are_accurate(beta: float, t: int) -> None:
    want = exact_correction(beta, t)
    with localcontext(prec=60):
        error = abs(Decimal(correction(beta, t)) - want) / want
    # The logarithm is rounded once, and t times that is what the power sees: where the power is
    # not negligible itself, t |log beta| is small.
    assert error < 4 * np.finfo(np.float64).eps


@pytest.mark.parametrize("t", [1, 1000, 10**6])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("beta", BETAS)
def test_steps_are_as_accurate_after_a_million(beta: float, dtype: type, t: int) -> None:
    # From zero states: m = (1 - beta) g and v = (1 - beta) g^2, with equal betas.
    rule = fo.Adam(lr=0.25, betas=(beta, beta), eps=0.0)
    p: Array = np.zeros(1, dtype)
    g: Array = np.full(1, 0.375, dtype)
    fo.update(rule, t, p, g, *rule.init(p))
    with localcontext(prec=60):
        one_beta, c = 1 - Decimal(beta), exact_correction(beta, t)
        want = -Decimal("0.25") * (one_beta / c) / (one_beta / c).sqrt()
        error = abs(Decimal(p.item()) / want - 1)
    # Seven roundings; a correction made in float32 would be off by 1e-5 to 1e-3.
    assert error < 4 * np.finfo(dtype).eps


def test_counters_beyond_two_to_the_31() -> None:
    p, g = np.zeros(3), np.ones(3)
    optimizer = fo.Optimizer(p, fo.Adam())
    state = optimizer.state_dict()
    state["step"] = state["leaves"]["params"]["t"] = 2**31
    optimizer.load_state_dict(state)
    assert optimizer.step(g).step == 2**31 + 1
    assert all(math.isfinite(x) and x < 0 for x in p)


@pytest.mark.slow
def test_a_million_steps() -> None:
    # Every sum is exact: a lost step or one taken twice would show, as would memory that grows.
    p, g = np.zeros(2, np.float64), np.array([1.0, -3.0])
    optimizer = fo.Optimizer(p, fo.SGD(lr=0.5), threads=1)
    sums = fo.Optimizer(np.ones(2), fo.Adam(), threads=1)
    for _ in range(1000):
        optimizer.step(g)
        sums.step(g)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(10**6 - 1000):
        optimizer.step(g)
    for _ in range(20_000):
        sums.step(g)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert optimizer.step_count == 10**6
    assert p.tolist() == [-0.5e6, 1.5e6]
    assert grown < 4096


SHORT_OF_MEMORY = """
import resource
import numpy as np, fusedopt as fo

n, mib = 1 << 24, 1 << 20
p, g = np.ones(n, np.float32), np.full(n, 0.5, np.float32)
small, h = np.ones(1000, np.float32), np.ones(1000, np.float32)
stepping = fo.Optimizer(small, fo.Adam())
stepping.step(h)
large = fo.Optimizer(p, fo.SGD(lr=0.5))
large.step(g)

def used():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

def refused(action):
    before = [small.tobytes(), p.tobytes()[:64], p[-1], large.fingerprint(), large.step_count]
    resource.setrlimit(resource.RLIMIT_AS, (used() + 32 * mib, resource.RLIM_INFINITY))
    try:
        action()
    except MemoryError:
        pass
    else:
        raise AssertionError("was not refused")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert before == [
        small.tobytes(), p.tobytes()[:64], p[-1], large.fingerprint(), large.step_count
    ]

refused(lambda: fo.Optimizer(p, fo.AdamW()))  # its states
refused(lambda: fo.Optimizer({"a": p, "b": small}, fo.AdamW(), verify=True))
refused(lambda: large.accumulate(g))  # the sums
refused(lambda: large.step(np.full(2 * n, 0.5, np.float32)[::2]))  # a copy of another layout
refused(lambda: large.state_dict() and p.copy())
verified = fo.Optimizer(p, fo.SGD(lr=0.5), master=None)
refused(lambda: verified.rebind(p + 1))
with_average = fo.Optimizer(p, fo.SGD(lr=0.5), ema=0.5)
refused(lambda: with_average.averaged().__enter__())  # the backup
refused(lambda: fo.global_norm(np.ones(4 * n)))

# Nothing is stuck.
for optimizer, gradient in ((stepping, h), (large, g), (verified, g), (with_average, g)):
    count = optimizer.step_count
    assert optimizer.step(gradient).step == count + 1
large.accumulate(g)
large.step()
with with_average.averaged():
    pass
print("done")
"""


@pytest.mark.slow
def test_running_out_of_memory() -> None:
    if not sys.platform.startswith("linux") or available_gibibytes() < 2:
        pytest.skip("needs Linux and 2 GiB of free memory")
    done = run_python(SHORT_OF_MEMORY, {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
