"""Hyperparameters that are replaced between steps."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import typing
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

import fusedopt as fo
from fusedopt.backends import get_backend
from fusedopt.rules.hyperparameters import number_names
from fusedopt.schedules import Constant, Linear
from hyperparameters import others

BACKENDS = ["native", "reference"]
ELEMENTWISE = {"*.w": fo.Lion(weight_decay=0.1), "*": fo.AdamW(lr=0.01)}
AROUND = {"clip_value": 0.5, "ema": 0.9, "stats": True}
MIXED = {"*.w": fo.Muon(lr=0.02), "last": fo.Lion(lr=1e-3), "*": fo.AdamW(lr=0.01)}


def tree(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "a": {"w": rng.standard_normal((4, 3)), "b": rng.standard_normal(4)},
        "last": rng.standard_normal(5).astype(np.float32),
    }


def choose(path: str, a: np.ndarray) -> fo.Rule:
    return fo.AdamW(lr=0.01) if a.ndim > 1 else fo.Momentum(lr=0.1)


def assert_goes_on_as(opt: fo.Optimizer, rule: Any) -> None:
    """The next two steps are those of a new optimizer that has the rule and the same states."""
    twin = fo.Optimizer(copy.deepcopy(opt.params), rule)
    twin.load_state_dict(opt.state_dict())
    for seed in (5, 6):
        grads = tree(seed) if isinstance(opt.params, dict) else np.full((2, 2), float(seed))
        assert opt.step(grads) == twin.step(grads)
    assert opt.fingerprint() == twin.fingerprint()


def changes(cls: type[fo.Rule]) -> typing.Iterator[tuple[fo.Rule, str, fo.Rule]]:
    """Rules, and others that differ from them in one hyperparameter."""
    kinds = typing.get_type_hints(cls)
    for example in cls.examples:
        rule = cls(**{"weight_decay": 0.1, **example})
        for field in dataclasses.fields(cls):
            for value in others(kinds[field.name], getattr(rule, field.name)):
                try:
                    yield rule, field.name, dataclasses.replace(rule, **{field.name: value})
                except ValueError:  # not with these others
                    continue


@pytest.mark.parametrize("cls", fo.RULES.values(), ids=list(fo.RULES))
def test_every_hyperparameter_takes_effect_or_is_refused(cls: type[fo.Rule]) -> None:
    taken = set()
    for rule, name, other in changes(cls):
        opt = fo.Optimizer(np.full((2, 2), 3.0), rule)
        opt.step(np.array([[0.5, -0.25], [0.125, 0.0]]))
        before = opt.fingerprint()
        fits = (rule.states, rule.nonnegative, [*map(rule.initial, rule.states)]) == (
            other.states,
            other.nonnegative,
            [*map(other.initial, other.states)],
        )
        if fits and name not in cls.settled:
            opt.replace(**{name: getattr(other, name)})
            assert opt.rule == other
            assert_goes_on_as(opt, other)
            taken.add(name)
            continue
        with pytest.raises(ValueError, match=rf"{cls.__name__}.*make a new optimizer"):
            opt.replace(**{name: getattr(other, name)})
        assert opt.fingerprint() == before
        assert_goes_on_as(opt, rule)
    assert taken | set(cls.settled) | {"centered"} >= {f.name for f in dataclasses.fields(cls)}


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (fo.Adam(), "amsgrad"),
        (fo.Adam(amsgrad="raw"), "amsgrad"),
        (fo.RMSProp(), "centered"),
        (fo.RMSProp(), "momentum"),
        (fo.RMSProp(momentum=0.9), "lr_in_buffer"),
        (fo.Momentum(), "form"),
        (fo.Nesterov(), "form"),
        (fo.Muon(), "form"),
        (fo.Sophia(form="paper"), "estimator"),
        (fo.AdaGrad(), "initial_accumulator"),
    ],
)
def test_what_the_states_were_begun_with(rule: fo.Rule, name: str) -> None:
    opt = fo.Optimizer(np.ones((2, 2)), rule)
    values = {"amsgrad": "corrected", "momentum": 0.5, "initial_accumulator": 0.1}
    values |= {"form": "heavy_ball", "estimator": "hutchinson"}
    with pytest.raises(ValueError, match="make a new optimizer"):
        opt.replace(**{name: values.get(name, True)})
    assert opt.rule is rule


# Learning rates


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", ["decoupled", "independent"])
def test_setting_the_rate(backend: str, decay: Any) -> None:
    rule = fo.AdamW(lr=0.1, weight_decay=0.5, decay=decay)
    opt = fo.Optimizer(tree(), rule, backend=backend)
    opt.step(tree(1))
    schedule = Linear(0.4, steps=10)
    for lr, next_rate in ((0.025, 0.025), (schedule, schedule(3)), (0.0, 0.0), (0.1, 0.1)):
        opt.lr = lr
        assert opt.lr == next_rate
        assert opt.rule == dataclasses.replace(rule, lr=lr)
        twin = fo.Optimizer(copy.deepcopy(opt.params), opt.rule, backend=backend)
        twin.load_state_dict(opt.state_dict())
        assert opt.step(tree(2)) == twin.step(tree(2))
        assert opt.fingerprint() == twin.fingerprint()
        if lr is schedule:
            assert opt.lr == schedule(4)


def test_setting_the_rates_of_several_rules() -> None:
    opt: Any = fo.Optimizer(tree(), MIXED)
    opt.step(tree(1))
    rates = opt.lr
    opt.lr = {**{label: rate / 2 for label, rate in rates.items()}, "last": Constant(0.3, warmup=4)}
    assert opt.lr == pytest.approx({"*.w": 0.01, "last": 0.15, "*": 0.005})
    assert opt.step(tree(1)).lr == pytest.approx({"*.w": 0.01, "last": 0.15, "*": 0.005})
    assert opt.rule["last"] == fo.Lion(lr=Constant(0.3, warmup=4))
    assert_goes_on_as(opt, opt.rule)
    opt.replace("last", lr=1e-3)
    opt.replace("*", lr=0.25)
    assert opt.step(tree(1)).lr == {"*.w": 0.01, "last": 1e-3, "*": 0.25}
    opt.replace(lr=0.5)
    assert opt.lr == {"*.w": 0.5, "last": 0.5, "*": 0.5}


@pytest.mark.parametrize("lr", [0.1, {"*": 0.1}, {"*.w": 1, "last": 1, "*": 1, "more": 1}])
def test_rates_for_several_rules_need_every_label(lr: Any) -> None:
    opt = fo.Optimizer(tree(), MIXED)
    with pytest.raises(ValueError, match=r"lr: expected a mapping with a rate for each of \['\*"):
        opt.lr = lr
    assert opt.rule is MIXED


@pytest.mark.parametrize(
    ("lr", "error"), [(-1.0, ValueError), ("fast", TypeError), ({"adamw": 0.1}, TypeError)]
)
def test_rates_that_are_none(lr: Any, error: type[Exception]) -> None:
    opt = fo.Optimizer(tree(), fo.AdamW(lr=0.1))
    with pytest.raises(error, match=r"AdamW\(lr\): expected a number >= 0, got"):
        opt.lr = lr
    assert opt.step(tree(1)).lr == 0.1


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.5},
        {"lr": Constant(0.5)},
        {"betas": (0.8, 0.9)},
        {"decay": "independent"},
        {"weight_decay": 0.0, "maximize": True},
    ],
)
@pytest.mark.parametrize("options", [{}, {"verify": True}, {"exact": True}], ids=str)
def test_other_numbers_need_no_new_plan(
    change: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = get_backend()
    opt = fo.Optimizer(tree(), fo.AdamW(), **options)
    plan = Mock(wraps=backend.plan)
    monkeypatch.setattr(backend, "plan", plan)
    opt.replace(**change)
    assert plan.call_count == 0
    assert_goes_on_as(opt, fo.AdamW(**change))


def renumbered(rule: fo.Rule, values: dict[str, Any]) -> Any:
    """The rule with other numbers as the core makes it; None where it does not."""
    opt = fo.Optimizer(np.full((2, 2), 3.0), rule)
    done = opt._assembly.renumber([values])
    assert done is (opt.rule is not rule)
    return opt.rule if done else None


@pytest.mark.parametrize("cls", fo.RULES.values(), ids=list(fo.RULES))
def test_whether_a_number_is_zero_is_all_that_selects(cls: type[fo.Rule]) -> None:
    for rule, name, other in changes(cls):
        if rule.program.phases > 1:
            assert renumbered(rule, {name: getattr(other, name)}) is None
            continue
        found = renumbered(rule, {name: getattr(other, name)})
        assert (found is not None) is (
            (name == "lr" or name in number_names(cls))
            and name not in cls.settled
            and bool(getattr(rule, name)) is bool(getattr(other, name))
            and not (name == "lr" and rule.decay == "independent")
        )
        if found is not None:
            assert found == other
            assert repr(found) == repr(other)
            assert (found.states, found.program.form) == (rule.states, rule.program.form)
            folds = [op.scalars(3, 0.1) for op in found.program.operations]
            assert folds == [op.scalars(3, 0.1) for op in other.program.operations]
            assert pickle.loads(pickle.dumps(found)) == other


@pytest.mark.parametrize(
    "value", [1, np.float64(0.25), np.float32(0.25), True, "0.25", None, -0.25]
)
def test_only_plain_numbers_that_fit_are_taken_without_a_check(value: Any) -> None:
    rule = fo.AdamW()
    for values in ({"weight_decay": value}, {"betas": (0.5, value)}, {"lr": value}):
        assert renumbered(rule, values) is None
    for values in ({"weight_decay": 0.25}, {"betas": (0.5, 0.25)}, {"lr": 0.25}):
        assert renumbered(rule, values) == fo.AdamW(**values)
    for values in ({"betas": 0.5}, {"betas": (0.5,)}, {"betas": [0.5, 0.5]}, {"betas": (0.5, 1.0)}):
        assert renumbered(rule, values) is None
    for values in ({"decay": "l2"}, {"amsgrad": "raw"}, {"rho": 0.5}, {"eps": np.inf}, {}):
        assert renumbered(rule, values) is None
    assert renumbered(fo.AdamW(weight_decay=lambda t: 0.1), {"weight_decay": 0.5}) is None


@pytest.mark.parametrize("options", [{}, AROUND], ids=str)
@pytest.mark.parametrize("cls", fo.RULES.values(), ids=list(fo.RULES))
def test_other_numbers_have_the_bits_of_another_rule(
    cls: type[fo.Rule], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rule, name, other in changes(cls):
        if renumbered(rule, {name: getattr(other, name)}) is None:
            continue
        opt = fo.Optimizer(tree(), rule, **options)
        estimates = tree(3) if cls.takes_hessian else None
        opt.step(tree(1), hessian=estimates)
        with monkeypatch.context() as patch:
            patch.setattr(opt._assembly, "whole", Mock(side_effect=AssertionError))
            opt.replace(**{name: getattr(other, name)})
        twin = fo.Optimizer(copy.deepcopy(opt.params), other, **options)
        twin.load_state_dict(opt.state_dict())
        for seed in (5, 6):
            took = [each.step(tree(seed), hessian=estimates) for each in (opt, twin)]
            assert took[0] == took[1]
        assert opt.fingerprint() == twin.fingerprint()


@pytest.mark.parametrize(
    "rule", [fo.AdamW(), fo.RMSProp(momentum=0.5, weight_decay=0.1), ELEMENTWISE], ids=str
)
@pytest.mark.parametrize("options", [{}, AROUND], ids=str)
def test_other_numbers_are_one_call_of_the_core(
    rule: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opt = fo.Optimizer(tree(), rule, **options)
    opt.step(tree(1))
    monkeypatch.setattr(opt._assembly, "whole", Mock(side_effect=AssertionError))
    opt.replace(weight_decay=0.25)
    opt.lr = 0.5 if isinstance(rule, fo.Rule) else dict.fromkeys(rule, 0.5)
    monkeypatch.undo()
    changed: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.25}
    if isinstance(rule, fo.Rule):
        expected: Any = dataclasses.replace(rule, **changed)
    else:
        expected = {key: dataclasses.replace(each, **changed) for key, each in rule.items()}
    assert opt.rule == expected
    twin = fo.Optimizer(copy.deepcopy(opt.params), expected, **options)
    twin.load_state_dict(opt.state_dict())
    for seed in (5, 6):
        assert opt.step(tree(seed)) == twin.step(tree(seed))
    assert opt.fingerprint() == twin.fingerprint()


# All or nothing


def test_names_and_labels() -> None:
    opt: Any = fo.Optimizer(tree(), MIXED)
    opt.replace(betas=(0.5, 0.75), momentum=0.5)  # each where there is such a one
    assert opt.rule == {
        "*.w": fo.Muon(lr=0.02, momentum=0.5),
        "last": fo.Lion(lr=1e-3, betas=(0.5, 0.75)),
        "*": fo.AdamW(lr=0.01, betas=(0.5, 0.75)),
    }
    opt.replace("last", betas=(0.25, 0.75), weight_decay=0.125)
    assert opt.rule["last"] == fo.Lion(lr=1e-3, betas=(0.25, 0.75), weight_decay=0.125)
    assert opt.rule["*"].betas == (0.5, 0.75)
    assert "Lion(lr=0.001, weight_decay=0.125, betas=(0.25, 0.75))" in opt.describe()
    assert_goes_on_as(opt, opt.rule)


@pytest.mark.parametrize(
    ("label", "values", "error", "message"),
    [
        (None, {"lr": 0.5, "rho": 0.9}, TypeError, "replace: none of the rules has rho"),
        ("last", {"lr": 0.5, "eps": 0.1}, TypeError, "the rule of 'last' has no eps"),
        ("b", {"lr": 0.5}, ValueError, r"expected one of \['\*.w', 'last', '\*'\], got 'b'"),
        (None, {"lr": 0.5, "betas": (0.5, 1.0)}, ValueError, r"Lion\(betas\)\[1\]"),
        (None, {"lr": 0.5, "amsgrad": "raw"}, ValueError, r"AdamW\(amsgrad\): .* of '\*' were"),
    ],
)
def test_nothing_changes_where_something_does_not_fit(
    label: str | None, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    opt = fo.Optimizer(tree(), MIXED)
    opt.step(tree(1))
    with pytest.raises(error, match=message):
        opt.replace(label, **values)
    assert opt.rule is MIXED
    assert_goes_on_as(opt, MIXED)


def test_nothing_changes_where_there_is_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = get_backend()
    p = np.ones((2, 2))
    opt = fo.Optimizer(p, fo.Muon(lr=0.1))
    opt.step(p.copy())
    before = opt.describe()
    with monkeypatch.context() as patch:
        patch.setattr(backend, "plan", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            opt.replace(lr=Constant(0.5), split=2)  # which needs a new one
    assert opt.lr == 0.1
    assert opt.describe() == before
    assert_goes_on_as(opt, fo.Muon(lr=0.1))


def test_nothing_changes_where_a_parameter_does_not_fit() -> None:
    opt = fo.Optimizer(np.ones((2, 2)), fo.Muon(lr=0.1))
    with pytest.raises(ValueError, match=r"Muon\(split=3\) splits the first axis"):
        opt.replace(split=3)
    assert_goes_on_as(opt, fo.Muon(lr=0.1))
    opt.replace(split=2)
    assert_goes_on_as(opt, fo.Muon(lr=0.1, split=2))


def test_not_inside_of_lookahead() -> None:
    opt = fo.Optimizer(np.ones(3), fo.Nesterov(lr=0.1, form="lookahead"))
    with opt.lookahead():
        with pytest.raises(RuntimeError, match="leave the context first"):
            opt.replace(momentum=0.5)
        with pytest.raises(RuntimeError, match="leave the context first"):
            opt.lr = 0.5
    assert opt.lr == 0.1


# What travels


@pytest.mark.parametrize(
    ("rule", "label"),
    [(fo.AdamW(), None), (MIXED, "*"), (choose, "adamw")],
    ids=["one rule", "patterns", "callable"],
)
def test_copies_take_them_along(rule: Any, label: str | None) -> None:
    opt: Any = fo.Optimizer(tree(), rule)
    opt.step(tree(1))
    opt.replace(label, weight_decay=0.25, lr=Constant(0.1, warmup=10))
    opt.step(tree(2))
    for twin in (pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)):
        before = opt.fingerprint()
        assert twin.lr == opt.lr
        rates = twin.step(tree(3)).lr
        assert (rates[label] if label else rates) == pytest.approx(0.03)
        assert opt.fingerprint() == before
        assert twin.describe().count("weight_decay=0.25") == opt.describe().count("y=0.25") > 0
    opt.step(tree(3))
    assert opt.fingerprint() == twin.fingerprint()


@pytest.mark.parametrize(
    "options", [{"verify": True}, {"state_dtype": "bfloat16"}, {"backend": "reference"}], ids=str
)
def test_with_other_options(options: dict[str, Any]) -> None:
    results = []
    for changed in (True, False):
        opt = fo.Optimizer(tree(), fo.AdamW(weight_decay=0.0 if changed else 0.5), **options)
        if changed:
            opt.replace(weight_decay=0.5)
        for seed in (1, 2):
            opt.step(tree(seed))
        opt.lr = 0.5
        assert opt.step(tree(3)).lr == 0.5
        results.append(opt.fingerprint())
    assert results[0] == results[1]
