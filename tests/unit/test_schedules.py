"""Schedules against closed forms written anew, and against the values of torch, optax and Keras."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from fusedopt import schedules
from fusedopt.schedules import (
    Constant,
    Cosine,
    CosineRestarts,
    Exponential,
    InverseSqrt,
    Linear,
    OneCycle,
    Polynomial,
    Product,
    ReduceOnPlateau,
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
    if t < 13:  # the peak: .3 of 40 steps after the first
        return 0.02 + 0.48 * (1 - wave((t - 1) / 12))
    return 0.005 + 0.495 * wave(min(1, (t - 13) / 28))


def stepwise(t: int) -> float:
    rate = 0.5
    for _ in range(7, t, 7):
        rate *= 0.3
    return rate if t < 1000 else 0.0


CASES: dict[str, tuple[Schedule, Any]] = {
    "constant": (Constant(0.5), lambda t: 0.5),
    "warm": (Constant(0.5, warmup=8), lambda t: np.interp(t, [0, 8], [0, 0.5])),
    "fractional": (Constant(0.5, warmup=2.5), lambda t: np.interp(t, [0, 2.5], [0, 0.5])),
    "linear": (Linear(0.5, 40), lambda t: np.interp(t, [1, 41], [0.5, 0])),
    "linear-warm": (
        Linear(0.5, steps=40, warmup=10, final=0.1),
        lambda t: np.interp(t, [0, 10, 41], [0, 0.5, 0.05]),
    ),
    "linear-fractional": (
        Linear(0.5, steps=40, warmup=2.5),
        lambda t: np.interp(t, [0, 2.5, 41], [0, 0.5, 0]),
    ),
    "cosine": (Cosine(0.5, 40), lambda t: 0.5 * wave(min(t - 1, 40) / 40)),
    "cosine-warm": (
        Cosine(0.5, steps=40, warmup=10, final=0.1),
        lambda t: t / 20 if t < 10 else 0.05 + 0.45 * wave(min(1, (t - 10) / 31)),
    ),
    "polynomial": (Polynomial(0.5, 40), lambda t: np.interp(t, [1, 41], [0.5, 0])),
    "polynomial-warm": (
        Polynomial(0.5, steps=40, warmup=4, final=0.2, power=3),
        lambda t: t / 8 if t < 4 else 0.1 + 0.4 * (max(0, 41 - t) / 37) ** 3,
    ),
    "stable": (
        WarmupStableDecay(0.5, steps=40, warmup=5, decay=10, final=0.1),
        lambda t: np.interp(t, [0, 5, 31, 41], [0, 0.5, 0.5, 0.05]),
    ),
    "stable-cosine": (
        WarmupStableDecay(0.5, steps=40, decay=10, form="cosine"),
        lambda t: 0.5 if t < 31 else 0.5 * wave(min(1, (t - 31) / 10)),
    ),
    "stable-sqrt": (
        WarmupStableDecay(0.5, steps=40, decay=10, form="sqrt"),
        lambda t: 0.5 if t < 31 else 0.5 - 0.5 * math.sqrt(min(1, (t - 31) / 10)),
    ),
    "stable-cut": (
        WarmupStableDecay(0.5, steps=40, decay=0, final=0.1),
        lambda t: 0.5 if t <= 40 else 0.05,
    ),
    "cycle": (OneCycle(0.5, steps=40, start=0.04, final=0.01), one_cycle),
    "restarts": (
        CosineRestarts(0.5, period=7),
        lambda t: 0.5 * wave((t - 1) % 7 / 7),
    ),
    "exponential": (
        Exponential(0.5, factor=0.3, every=7),
        lambda t: 0.5 * math.exp(math.log(0.3) * (t - 1) / 7),
    ),
    "inverse-sqrt": (
        InverseSqrt(0.5, warmup=10),
        lambda t: 0.5 * math.sqrt(10) * min(t**-0.5, t * 10**-1.5),
    ),
    "plateau": (ReduceOnPlateau(0.5), lambda t: 0.5),
    "step": (Step(0.5, every=7, factor=0.3), stepwise),
    "product": (
        Constant(0.5, warmup=10) * Linear(2.0, 40),
        lambda t: np.interp(t, [0, 10], [0, 0.5]) * np.interp(t, [1, 41], [2, 0]),
    ),
    "scaled": (3 * Constant(0.5, warmup=10), lambda t: np.interp(t, [0, 10], [0, 1.5])),
    "sequential": (
        Sequential((Constant(0.5), Linear(0.5, 10), Constant(0.2, warmup=4)), at=(20, 30)),
        lambda t: 0.5 - max(0, t - 21) / 20 if t <= 30 else min(0.2, 0.05 * (t - 30)),
    ),
}
every_case = pytest.mark.parametrize(("schedule", "closed"), CASES.values(), ids=CASES)


def test_every_schedule_is_tested() -> None:
    named = {getattr(schedules, name) for name in schedules.__all__}
    concrete = {cls for cls in named if issubclass(cls, Schedule)} - {Schedule}
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


# Against the libraries: golden/record_schedules.py names their functions.

RECORDED = json.loads((Path(__file__).parents[1] / "golden/schedules.json").read_text())


@pytest.mark.parametrize(
    ("library", "ours"), [(name, ours) for name in ("torch", "optax") for ours in RECORDED[name]]
)
def test_values_of_the_libraries(library: str, ours: str) -> None:
    schedule = eval(ours, vars(schedules))
    recorded = RECORDED[library][ours]
    rates = [schedule(t) for t in range(1, len(recorded) + 1)]
    # optax's float32 constants, such as its cosines' halves, are seen in the last two digits
    np.testing.assert_allclose(rates, recorded, rtol=1e-13 if library == "torch" else 1e-7)


def keras_cosine(c: int) -> float:
    """Keras's documented CosineDecay(0.02, 16, alpha=0.1, warmup_target=0.1, warmup_steps=4)."""
    if c < 4:
        return 0.02 + c / 4 * (0.1 - 0.02)
    decayed = 0.5 * (1 + math.cos(math.pi * min(c - 4, 16) / 16))
    return 0.1 * ((1 - 0.1) * decayed + 0.1)


@pytest.mark.parametrize(
    ("schedule", "keras"),
    [
        (Cosine(0.1, 20, warmup=5, final=0.1), keras_cosine),
        # PolynomialDecay(0.1, 20, 0.02, power=2)
        (
            Polynomial(0.1, 20, power=2, final=0.2),
            lambda c: (0.1 - 0.02) * (1 - min(c, 20) / 20) ** 2 + 0.02,
        ),
        # ExponentialDecay(0.1, 6, 0.5), and with staircase=True
        (Exponential(0.1, factor=0.5, every=6), lambda c: 0.1 * 0.5 ** (c / 6)),
        (Step(0.1, factor=0.5, every=6), lambda c: 0.1 * 0.5 ** math.floor(c / 6)),
        # CosineDecayRestarts(0.1, 4, t_mul=2.0, alpha=0.2)
        (
            CosineRestarts(0.1, 4, growth=2, final=0.2),
            lambda c: (
                0.1
                * (
                    (1 - 0.2)
                    * 0.5
                    * (
                        1
                        + math.cos(
                            math.pi
                            * math.modf(
                                (c - 4 * (2 ** (i := math.floor(math.log2(c / 4 + 1))) - 1))
                                / (4 * 2**i)
                            )[0]
                        )
                    )
                    + 0.2
                )
            ),
        ),
    ],
)
def test_formulas_of_keras(schedule: Schedule, keras: Any) -> None:
    counts = range(40)
    rates = [schedule(c + 1) for c in counts]
    np.testing.assert_allclose(rates, [keras(c) for c in counts], rtol=1e-13)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_no_step_is_lost(steps: int) -> None:
    for schedule in (
        Linear(0.1, steps),
        Cosine(0.1, steps),
        Polynomial(0.1, steps),
        OneCycle(0.1, steps, rise=0.0, final=0.0),
        WarmupStableDecay(0.1, steps, decay=steps),
    ):
        assert schedule(1) == 0.1
        assert all(schedule(t) > 0 for t in range(1, steps + 1))
        assert schedule(steps + 1) == 0.0
    for warmed in (Linear(0.1, 9, warmup=steps), InverseSqrt(0.1, warmup=steps)):
        assert warmed(1) == pytest.approx(0.1 / steps)
        assert max(range(1, 9), key=warmed) == steps


# The loss


def reducing(**fields: Any) -> ReduceOnPlateau:
    return ReduceOnPlateau(0.1, factor=0.5, patience=2, threshold=1e-3, **fields)


def test_a_plateau_is_torchs() -> None:
    schedule = reducing(cooldown=1, minimum=0.03)
    for loss, rate in zip(RECORDED["losses"], RECORDED["plateau"], strict=True):
        schedule.tell(loss)
        assert schedule(7) == rate
    assert schedule(7) == 0.03


def test_a_plateau_goes_on_from_its_state() -> None:
    one = reducing(cooldown=1)
    for loss in RECORDED["losses"][:9]:
        one.tell(loss)
    two, three = reducing(cooldown=1), pickle.loads(pickle.dumps(one))
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for loss in RECORDED["losses"][9:]:
        for schedule in (one, two, three):
            schedule.tell(loss)
        assert one.state_dict() == two.state_dict() == three.state_dict()


def test_a_plateau_in_an_optimizer() -> None:
    plateau = ReduceOnPlateau(0.1, factor=0.5, patience=0)
    opt = fo.Optimizer(np.ones(3), fo.SGD(lr=Constant(1.0, warmup=2) * plateau))
    rates = []
    for loss in (1.0, math.nan, 0.5, 0.5):
        rates.append(opt.step(np.zeros(3)).lr)
        plateau.tell(loss)
    assert rates == [0.05, 0.1, 0.05, 0.05]
    assert opt.lr == 0.025


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
        (lambda: Linear(0.1, 10**400), r"Linear\(steps\): .* that float64 can hold"),
        (lambda: Linear(0.1, 9, warmup=9), r"Linear\(warmup\): expected less than steps=9, got 9"),
        (lambda: Cosine(0.1, 9, final=1.0), r"Cosine\(final\): expected a number in \[0, 1\)"),
        (lambda: Polynomial(0.1, 9, power=-1), r"Polynomial\(power\)"),
        (lambda: WarmupStableDecay(0.1, 9, decay=-1), r"WarmupStableDecay\(decay\)"),
        (lambda: WarmupStableDecay(0.1, 9, warmup=5, decay=6), r"at most 4, .* got 6"),
        (lambda: WarmupStableDecay(0.1, 9, decay=1, form="root"), r"\(form\): expected one of"),  # type: ignore[arg-type]
        (lambda: OneCycle(0.1, 9, rise=1.0), r"OneCycle\(rise\)"),
        (lambda: CosineRestarts(0.1, 3, growth=0.5), r"CosineRestarts\(growth\): .* >= 1, got 0.5"),
        (lambda: InverseSqrt(0.1, warmup=0), r"InverseSqrt\(warmup\): expected an integer >= 1"),
        (lambda: ReduceOnPlateau(0.1, patience=-1), r"\(patience\): expected an integer >= 0"),
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
