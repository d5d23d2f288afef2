"""Hyperparameters: defaults, ranges, and the registry."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import typing
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from fusedopt.programs.arithmetic import correction, textbook_correction
from fusedopt.verify import STORAGES
from hyperparameters import others

ALL = list(fo.RULES.values())


def test_registry() -> None:
    assert list(fo.RULES)[:3] == ["sgd", "momentum", "nesterov"]
    assert all(getattr(fo, cls.__name__) is cls for cls in ALL)
    assert all(cls.name == name == cls.__name__.lower() for name, cls in fo.RULES.items())
    assert all(1950 < (cls.year or 0) < 2100 for cls in ALL)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (fo.SGD(), {"lr": 1e-2}),
        (fo.Momentum(), {"lr": 1e-2, "momentum": 0.9, "form": "ema", "dampening": 0.0}),
        (fo.Nesterov(), {"lr": 1e-2, "momentum": 0.9, "form": "rearranged"}),
        (fo.AdaGrad(), {"lr": 1e-2, "eps_root": 1e-16, "eps": 0.0, "initial_accumulator": 0.0}),
        (fo.RMSProp(), {"lr": 1e-3, "rho": 0.9, "eps_root": 1e-16, "eps": 0.0}),
        (fo.Adam(), {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "decay": "l2"}),
        (fo.AdamW(), {"lr": 1e-3, "weight_decay": 0.01, "decay": "decoupled"}),
        (fo.Lion(), {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}),
        (fo.Sophia(), {"lr": 1e-4, "betas": (0.965, 0.99), "rho": 0.04, "weight_decay": 0.1}),
        (fo.Muon(), {"lr": 0.02, "momentum": 0.95, "nesterov": True, "scale": "original"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, fo.Rule) else "",
)
def test_own_defaults(rule: fo.Rule, expected: dict[str, Any]) -> None:
    assert {name: getattr(rule, name) for name in expected} == expected


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_out_of_range(cls: type[fo.Rule], name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{cls.__name__}\({name}\): expected a number >= 0, got"):
        cls(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fo.Adam(betas=(0.9, 1.0)), r"Adam\(betas\)\[1\]: expected a number in \[0, 1\)"),
        (lambda: fo.Lion(betas=(math.nan, 0.9)), r"Lion\(betas\)\[0\]"),
        (lambda: fo.Momentum(momentum=1.0), r"Momentum\(momentum\)"),
        (lambda: fo.Momentum(dampening=0.1), r"Momentum\(dampening\): form 'ema' has none"),
        (lambda: fo.Momentum(form="polyak"), r"expected one of \('ema', 'heavy_ball', 'buffer'\)"),  # type: ignore[arg-type]
        (lambda: fo.RMSProp(rho=1.5), r"RMSProp\(rho\)"),
        (lambda: fo.RMSProp(nesterov=True), r"needs momentum > 0"),
        (lambda: fo.AdaGrad(eps=-1.0), r"AdaGrad\(eps\)"),
        (lambda: fo.RAdam(threshold=3.9), r"RAdam\(threshold\): expected a number >= 4"),
        (lambda: fo.Rprop(etas=(1.2, 0.5)), r"Rprop\(etas\): expected 0 < etas\[0\] < 1 <"),
        (lambda: fo.Rprop(step_sizes=(1.0, 0.5)), r"Rprop\(step_sizes\): expected the smallest"),
        (lambda: fo.Adam(amsgrad="raw", nesterov=True), r"does not go with nesterov"),
        (lambda: fo.Adam(amsgrad="corrected", hat=True), r"does not go with hat"),
        (lambda: fo.Adam(amsgrad=True), r"expected one of \(False, 'raw', 'corrected'\)"),  # type: ignore[arg-type]
        (lambda: fo.Sophia(estimator="hutchinson"), r"take form='paper'"),
        (lambda: fo.Sophia(bs=0), r"expected an integer >= 1"),
        (lambda: fo.Sophia(bs=10**400), r"Sophia\(bs\): .* >= 1 that float64 can hold"),
        (lambda: fo.Muon(ns_steps=0), r"Muon\(ns_steps\)"),
        (lambda: fo.Muon(form="heavy_ball", bias_correction=True), r"only the form 'ema'"),
        (lambda: fo.SGD(decay="l1"), r"SGD\(decay\): expected one of"),  # type: ignore[arg-type]
        (lambda: fo.SGD(lr=abs, decay="independent"), r"attribute `base`"),
    ],
)
def test_refused_values(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: fo.SGD(lr="fast"),  # type: ignore[arg-type]
        lambda: fo.SGD(maximize=1),  # type: ignore[arg-type]
        lambda: fo.Adam(betas=0.9),  # type: ignore[arg-type]
        lambda: fo.Adam(betas=(0.9, 0.99, 0.999)),  # type: ignore[arg-type]
        lambda: fo.Sophia(bs=1.5),  # type: ignore[arg-type]
        lambda: fo.SGD(0.1),  # type: ignore[call-arg]
        lambda: fo.SGD(momentum=0.9),  # type: ignore[call-arg]
    ],
)
def test_refused_kinds(make: Any) -> None:
    with pytest.raises(TypeError):
        make()


def test_numbers_of_numpy_are_widened() -> None:
    # A float32 scalar would drag 1 - beta down to float32: off by 1e-5 at .999.
    narrow: Any = np.float32(0.5), np.float64(0.999)
    rule = fo.Adam(betas=narrow, lr=narrow[0])
    assert all(type(value) is float for value in (*rule.betas, rule.lr))


@pytest.mark.parametrize("cls", ALL)
def test_rules_are_values(cls: type[fo.Rule]) -> None:
    for example in cls.examples:
        rule = cls(**example)
        _ = rule.program  # what is cached must not travel
        for twin in (pickle.loads(pickle.dumps(rule)), copy.deepcopy(rule), cls(**example)):
            assert twin == rule
            assert hash(twin) == hash(rule)
        with pytest.raises(AttributeError):
            rule.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("t", [1, 2, 1000, 10**6])
def test_bias_corrections(beta: float, t: int) -> None:
    exact = float(1 - Decimal(beta) ** t)
    assert correction(beta, t) == pytest.approx(exact, rel=1e-15)
    assert textbook_correction(beta, t) == exact


def test_schedules_are_checked_when_they_speak() -> None:
    opt = fo.Optimizer(p := np.ones(3), fo.SGD(lr=lambda step: math.nan if step == 2 else 0.1))
    opt.step(np.ones(3))
    before = p.copy()
    with pytest.raises(ValueError, match=r"SGD\(lr\) at step 2: expected a number >= 0, got nan"):
        opt.step(np.ones(3))
    assert opt.step_count == 1
    np.testing.assert_array_equal(p, before)


class Halving:
    """A schedule with the base that independent decay asks for."""

    base = 0.1

    def __call__(self, step: int) -> float:
        return self.base * 0.5**step


@pytest.mark.parametrize(
    ("decay", "shrinks_by"),
    [
        ("decoupled", 0.05 * 0.2),
        ("decoupled_first", 0.05 * 0.2),
        ("cautious", 0.05 * 0.2),
        ("independent", 0.5 * 0.2),
    ],
)
def test_decay_without_a_gradient(decay: Any, shrinks_by: float) -> None:
    for cls in ALL:
        if hasattr(cls, "warmup_steps"):  # takes no schedule
            continue
        p = np.full((2, 2), 3.0)
        opt = fo.Optimizer(p, cls(lr=Halving(), weight_decay=0.2, decay=decay))
        opt.step(np.zeros((2, 2)))
        np.testing.assert_allclose(p, 3.0 * (1 - shrinks_by), rtol=1e-14)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("cls", ALL)
def test_zero_gradients_move_nothing(cls: type[fo.Rule], backend: str) -> None:
    """In every storage format, with a Hessian of zeros where one is taken, and no NaN is left
    behind: later gradients move the parameter as ever."""
    start = np.random.default_rng(5).standard_normal((64, 70))  # enough for quantised states
    later = np.random.default_rng(6).standard_normal(start.shape)
    for storage, (dtype, options) in STORAGES.items():
        for example in cls.examples:
            rule = cls(**{**example, "weight_decay": 0.0})
            if "state_dtype" in options and not rule.states:
                continue
            p = start.astype(dtype)
            opt = fo.Optimizer(p, rule, backend=backend, **options)
            zero = np.zeros_like(p)
            before = p.tobytes()
            for t in range(12):
                opt.step(zero, hessian=zero if rule.takes_hessian and t % 2 else None)
            assert p.tobytes() == before, (storage, example)
            for state in opt.state["params"].values():
                values = state if isinstance(state, np.ndarray) else state.dequantize()
                assert np.isfinite(values.astype(np.float64)).all(), (storage, example)
            for t in range(60):  # rules that find their learning rate begin with small steps
                if t > 1 and (p != start.astype(dtype)).any():
                    break
                opt.step(later.astype(dtype), hessian=zero if rule.takes_hessian else None)
            moved = p.astype(np.float64)
            assert np.isfinite(moved).all(), (storage, example)
            assert (moved != start.astype(dtype)).any(), (storage, example)


def test_l2_decay_is_in_the_gradient() -> None:
    for cls in ALL:
        a, b = np.full((2, 2), 3.0), np.full((2, 2), 3.0)
        g = np.array([[0.5, -0.25], [0.125, 0.0]])
        fo.Optimizer(a, cls(weight_decay=0.5, decay="l2")).step(g)
        fo.Optimizer(b, cls(weight_decay=0.0)).step(g + 0.5 * b)
        np.testing.assert_array_equal(a, b)


def test_maximize_is_a_sign_before_l2_decay() -> None:
    for cls in ALL:
        a, b = np.full((2, 2), 3.0), np.full((2, 2), 3.0)
        g = np.array([[0.5, -0.25], [0.125, 0.0]])
        fo.Optimizer(a, cls(weight_decay=0.5, decay="l2", maximize=True)).step(g)
        fo.Optimizer(b, cls(weight_decay=0.5, decay="l2")).step(-g)
        np.testing.assert_array_equal(a, b)


def test_states_start_as_the_rule_says() -> None:
    v = fo.AdaGrad(initial_accumulator=0.1).init(np.ones((2, 3), np.float32, order="F"))[0]
    assert v.dtype == np.float32
    assert v.flags.f_contiguous
    np.testing.assert_array_equal(v, np.float32(0.1))
    b, v, a = fo.RMSProp(momentum=0.9, centered=True, initial_accumulator=1.0).init(np.ones(2))
    np.testing.assert_array_equal((b, v, a), [[0, 0], [1, 1], [0, 0]])


def trajectory(rule: fo.Rule) -> list[bytes]:
    """All bits after each of three steps, or more where the rule has later branches; the first two
    bring a Hessian where one is taken."""
    rng = np.random.default_rng(3)
    p = rng.standard_normal((4, 3))
    opt = fo.Optimizer(p, rule)
    bits = []
    for t in range(max(3, rule.branches)):
        # Toward zero, where the length of the way is to be found.
        g = p.copy() if rule.kept else rng.standard_normal((4, 3)) * 10.0**-t
        opt.step(g, hessian=g if rule.takes_hessian and t < 2 else None)
        bits.append(opt.fingerprint().encode())
    return bits


@pytest.mark.parametrize("cls", ALL)
def test_no_hyperparameter_is_ignored(cls: type[fo.Rule]) -> None:
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name == "ns_dtype" and not fo.info()["matrix_units"]:
            continue
        changed = set()
        for example in cls.examples:
            rule = cls(**{"weight_decay": 0.1, **example})
            for k, other in enumerate(others(kinds[field.name], getattr(rule, field.name))):
                try:
                    changed_rule = dataclasses.replace(rule, **{field.name: other})
                except ValueError:  # not with these others
                    continue
                if trajectory(changed_rule) != trajectory(rule):
                    changed.add(k)
        assert changed, f"{cls.__name__}({field.name}) changes nothing"
        if isinstance(getattr(rule, field.name), tuple):
            assert len(changed) == len(getattr(rule, field.name)), field.name
