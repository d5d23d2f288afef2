"""Very large arrays, very many arrays, very many steps."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest

import fusedopt as fo
from exactness import DTYPES, Array
from fusedopt.rules.base import correction

BETAS = (0.9, 0.999, 0.99999)


def available_gibibytes() -> float:
    """Memory that can be had without swapping; 0 where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            kibibytes = next(int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return 0.0
    return kibibytes / 2**20


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
