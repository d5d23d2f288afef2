"""Schedules against closed forms written anew, and against torch's values."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from fusedopt import schedules
from fusedopt.schedules import (
    Constant,
    Cosine,
    Linear,
    OneCycle,
    Polynomial,
    Product,
    Schedule,
    Sequential,
    Step,
    WarmupStableDecay,
)

STEPS = [*range(1, 46), 10**6]  # the schedules below end at 40 or before


def wave(x: float) -> float:
    """From 1 at 0 to 0 at 1 along half a cosine, by the half angle."""
    return 1 - math.sin(math.pi * x / 2) ** 2


def one_cycle(t: int) -> float:
    if t < 12:  # the peak: .3 of 40
        return 0.02 + 0.48 * (1 - wave((t - 1) / 11))
    return 0.005 + 0.495 * wave(min(1, (t - 12) / 28))


def stepwise(t: int) -> float:
    rate = 0.5
    for _ in range(7, t, 7):
        rate *= 0.3
    return rate if t < 1000 else 0.0


CASES: dict[str, tuple[Schedule, Any]] = {
    "constant": (Constant(0.5), lambda t: 0.5),
    "warm": (Constant(0.5, warmup=8), lambda t: np.interp(t, [0, 8], [0, 0.5])),
    "fractional": (Constant(0.5, warmup=2.5), lambda t: np.interp(t, [0, 2.5], [0, 0.5])),
    "linear": (Linear(0.5, 40), lambda t: np.interp(t, [0, 40], [0.5, 0])),
    "linear-warm": (
        Linear(0.5, steps=40, warmup=10, final=0.1),
        lambda t: np.interp(t, [0, 10, 40], [0, 0.5, 0.05]),
    ),
    "cosine": (Cosine(0.5, 40), lambda t: 0.5 * wave(min(t, 40) / 40)),
    "cosine-warm": (
        Cosine(0.5, steps=40, warmup=10, final=0.1),
        lambda t: t / 20 if t < 10 else 0.05 + 0.45 * wave(min(1, (t - 10) / 30)),
    ),
    "polynomial": (Polynomial(0.5, 40), lambda t: np.interp(t, [0, 40], [0.5, 0])),
    "polynomial-warm": (
        Polynomial(0.5, steps=40, warmup=4, final=0.2, power=3),
        lambda t: t / 8 if t < 4 else 0.1 + 0.4 * (max(0, 40 - t) / 36) ** 3,
    ),
    "stable": (
        WarmupStableDecay(0.5, steps=40, warmup=5, decay=10, final=0.1),
        lambda t: np.interp(t, [0, 5, 30, 40], [0, 0.5, 0.5, 0.05]),
    ),
    "stable-cosine": (
        WarmupStableDecay(0.5, steps=40, decay=10, form="cosine"),
        lambda t: 0.5 if t < 30 else 0.5 * wave(min(1, (t - 30) / 10)),
    ),
    "stable-sqrt": (
        WarmupStableDecay(0.5, steps=40, decay=10, form="sqrt"),
        lambda t: 0.5 if t < 30 else 0.5 - 0.5 * math.sqrt(min(1, (t - 30) / 10)),
    ),
    "stable-cut": (
        WarmupStableDecay(0.5, steps=40, decay=0, final=0.1),
        lambda t: 0.5 if t < 40 else 0.05,
    ),
    "cycle": (OneCycle(0.5, steps=40, start=0.04, final=0.01), one_cycle),
    "step": (Step(0.5, every=7, factor=0.3), stepwise),
    "product": (
        Constant(0.5, warmup=10) * Linear(2.0, 40),
        lambda t: np.interp(t, [0, 10], [0, 0.5]) * np.interp(t, [0, 40], [2, 0]),
    ),
    "scaled": (3 * Constant(0.5, warmup=10), lambda t: np.interp(t, [0, 10], [0, 1.5])),
    "sequential": (
        Sequential((Constant(0.5), Linear(0.5, 10), Constant(0.2, warmup=4)), at=(20, 30)),
        lambda t: np.interp(t, [20, 30], [0.5, 0]) + np.interp(t, [30, 34], [0, 0.2]),
    ),
}
every_case = pytest.mark.parametrize(("schedule", "closed"), CASES.values(), ids=CASES)


def test_every_schedule_is_tested() -> None:
    concrete = {getattr(schedules, name) for name in schedules.__all__} - {Schedule}
    assert {type(schedule) for schedule, _ in CASES.values()} == concrete


@every_case
def test_closed_form(schedule: Schedule, closed: Any) -> None:
    rates = [schedule(t) for t in STEPS]
    np.testing.assert_allclose(rates, [closed(t) for t in STEPS], rtol=1e-13, atol=1e-16)
    assert all(type(rate) is float and 0 <= rate <= schedule.base for rate in rates)


@every_case
def test_values(schedule: Schedule, closed: Any) -> None:
    printed = eval(repr(schedule), vars(schedules))
    for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule), printed):
        assert twin == schedule
        assert hash(twin) == hash(schedule)
        assert twin.base == schedule.base
        assert [twin(t) for t in STEPS] == [schedule(t) for t in STEPS]
    assert [other for other, _ in CASES.values()].count(schedule) == 1
    with pytest.raises(AttributeError):
        schedule.base = 1.0  # type: ignore[misc]


def test_bases_of_compositions() -> None:
    assert (Constant(0.5) * Linear(0.2, 3) * 4).base == pytest.approx(0.4)
    assert Sequential((Constant(0.1), Step(0.7, every=2)), at=(3,)).base == 0.7
    assert (np.float64(2.0) * Constant(0.5)) == Constant(0.5) * 2 == Constant(0.5) * Constant(2.0)


# Values of torch 2.13.0; entry k is what its scheduler has after k calls of `step()`, with which
# torch takes step k + 1.
TORCH_COSINE = [
    0.1,
    0.0965745789630079,
    0.08681980515339463,
    0.07222075445642905,
    0.055,
    0.03777924554357096,
    0.023180194846605363,
    0.013425421036992097,
    0.01,
]
TORCH_POLYNOMIAL = [0.1, 0.064, 0.036, 0.016, 0.004, 0.0, 0.0]
TORCH_LINEAR = [0.1, 0.08125, 0.0625, 0.04375, 0.025, 0.025]
TORCH_STEP = [0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025, 0.025]
TORCH_SEQUENTIAL = [0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.025]
TORCH_ONE_CYCLE = [
    0.004,
    0.052,
    0.1,
    0.09504846320134738,
    0.0811745653949763,
    0.06112620219362893,
    0.03887419780637107,
    0.0188258346050237,
    0.004951936798652629,
    4e-07,
]


@pytest.mark.parametrize(
    ("schedule", "recorded", "first"),
    [
        # CosineAnnealingLR(T_max=8, eta_min=0.01), PolynomialLR(total_iters=5, power=2),
        # LinearLR(1.0, 0.25, total_iters=4): their step is one later than ours
        (Cosine(0.1, 8, final=0.1), TORCH_COSINE, 0),
        (Polynomial(0.1, 5, power=2), TORCH_POLYNOMIAL, 0),
        (Linear(0.1, 4, final=0.25), TORCH_LINEAR, 0),
        # StepLR(3, gamma=0.5), OneCycleLR(0.1, total_steps=10), SequentialLR of ConstantLR(1.0)
        # and StepLR(2, 0.5) with milestones=[3]: step for step
        (Step(0.1, every=3, factor=0.5), TORCH_STEP, 1),
        (OneCycle(0.1, 10), TORCH_ONE_CYCLE, 1),
        (
            Sequential((Constant(0.1), Step(0.1, every=2, factor=0.5)), at=(3,)),
            TORCH_SEQUENTIAL,
            1,
        ),
    ],
)
def test_torch(schedule: Schedule, recorded: list[float], first: int) -> None:
    rates = [schedule(first + k) for k in range(len(recorded))]
    np.testing.assert_allclose(rates, recorded, rtol=1e-14, atol=1e-17)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs(steps: int) -> None:
    assert Cosine(0.1, steps)(steps) == 0.0
    assert OneCycle(0.1, steps, final=0.0)(steps) == 0.0
    assert WarmupStableDecay(0.1, steps, decay=steps)(steps) == 0.0


# In an optimizer


@every_case
def test_in_an_optimizer(schedule: Schedule, closed: Any) -> None:
    p = np.ones(3)
    opt = fo.Optimizer(p, fo.SGD(lr=schedule))
    for t in (1, 2, 3):
        assert opt.lr == schedule(t)
        assert opt.step(np.zeros(3))[:2] == (t, schedule(t))
    twin = pickle.loads(pickle.dumps(opt))
    assert twin.rule == opt.rule
    assert twin.step(np.zeros(3))[:2] == (4, schedule(4))


@every_case
def test_independent_decay_has_the_shape_alone(schedule: Schedule, closed: Any) -> None:
    p = np.full(3, 2.0)
    opt = fo.Optimizer(p, fo.AdamW(lr=schedule, weight_decay=0.1, decay="independent"))
    expected = 2.0
    for t in (1, 2, 3):
        opt.step(np.zeros(3))
        expected *= 1 - 0.1 * closed(t) / schedule.base
    np.testing.assert_allclose(p, expected, rtol=1e-13)


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(-1.0), r"Constant\(base\): expected a number >= 0, got -1.0"),
        (lambda: Constant(math.nan), r"Constant\(base\)"),
        (lambda: Constant(0.1, warmup=-1), r"Constant\(warmup\): expected a number >= 0"),
        (lambda: Linear(0.1, 0), r"Linear\(steps\): expected an integer >= 1, got 0"),
        (lambda: Linear(0.1, 9, warmup=9), r"Linear\(warmup\): expected less than steps=9, got 9"),
        (lambda: Cosine(0.1, 9, final=1.0), r"Cosine\(final\): expected a number in \[0, 1\)"),
        (lambda: Polynomial(0.1, 9, power=-1), r"Polynomial\(power\)"),
        (lambda: WarmupStableDecay(0.1, 9, decay=-1), r"WarmupStableDecay\(decay\)"),
        (lambda: WarmupStableDecay(0.1, 9, warmup=5, decay=6), r"at most 4, .* got 6"),
        (lambda: WarmupStableDecay(0.1, 9, decay=1, form="root"), r"\(form\): expected one of"),  # type: ignore[arg-type]
        (lambda: OneCycle(0.1, 9, rise=1.0), r"OneCycle\(rise\)"),
        (lambda: Step(0.1, every=0), r"Step\(every\): expected an integer >= 1"),
        (lambda: Step(0.1, every=2, factor=1.0), r"Step\(factor\)"),
        (lambda: Constant(0.1) * -1, r"Constant\(base\): expected a number >= 0, got -1"),
        (lambda: Sequential((), ()), r"Sequential\(at\): .* \(0\), got \(\)"),
        (lambda: Sequential((Constant(0.1),), (1,)), r"one fewer than there are parts \(1\)"),
        (lambda: Sequential((Constant(0.1),) * 3, (5, 5)), r"expected rising steps"),
        (lambda: Sequential((Constant(0.1),) * 2, (0,)), r"Sequential\(at\)\[0\]: .* >= 1, got 0"),
    ],
)
def test_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constant("fast"),  # type: ignore[arg-type]
        lambda: Constant(0.1) * "fast",  # type: ignore[operator]
        lambda: Linear(0.1, 9.5),  # type: ignore[arg-type]
        lambda: Linear(0.1, 9, 2),  # type: ignore[call-arg]
        lambda: Step(0.1),  # type: ignore[call-arg]
        lambda: Product(Constant(0.1), 0.5),  # type: ignore[arg-type]
        lambda: Sequential(Constant(0.1), ()),  # type: ignore[arg-type]
        lambda: Sequential((Constant(0.1), abs), (1,)),  # type: ignore[arg-type]
        lambda: Schedule(0.1),  # type: ignore[abstract]
    ],
)
def test_wrong_kinds(make: Any) -> None:
    with pytest.raises(TypeError):
        make()
