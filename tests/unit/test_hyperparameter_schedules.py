"""Schedules of hyperparameters other than the learning rate, and learning rates of one step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from fusedopt.backends import BACKENDS, ON_HOST
from fusedopt.rules.hyperparameters import number_names
from fusedopt.schedules import EmaDebiased, EmaWarmup

STEPS = 5
rng = np.random.default_rng(3)
HOST = [name for name in ON_HOST if BACKENDS[name].unavailable() is None]


@dataclass(frozen=True)
class Near:
    """Values round one that a rule takes."""

    value: float
    spread: float = 0.03

    def __call__(self, step: int) -> float:
        return self.value * (1.0 - self.spread * (step % 3))


def base_of(rule: fo.Rule, name: str) -> Any:
    """A value to vary: the rule's own, or a small one in the place of 0."""
    value = getattr(rule, name)
    return value if isinstance(value, tuple) else value or 0.01


def varied() -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every rule, in all its examples, with each number that it may change."""
    for name, cls in fo.RULES.items():
        seen = set()
        for example in cls.examples:
            for field in number_names(cls):
                if field != "lr" and field not in cls.settled and (field, cls) not in seen:
                    try:
                        scheduled(cls(**example), field)
                    except ValueError:  # such as Momentum's dampening in its other forms
                        continue
                    seen.add((field, cls))
                    yield name, dict(example), field


def scheduled(rule: fo.Rule, field: str) -> fo.Rule:
    value = base_of(rule, field)
    near = tuple(map(Near, value)) if isinstance(value, tuple) else Near(value)
    values = {f.name: getattr(rule, f.name) for f in fields(rule)}
    return type(rule)(**{**values, field: near})


CASES = list(varied())


def test_every_number_of_every_rule_is_there() -> None:
    found = {(name, field) for name, _, field in CASES}
    for name, cls in fo.RULES.items():
        for field in number_names(cls):
            assert (name, field) in found or field in cls.settled or field == "lr", (name, field)


def tensors(rule: fo.Rule, dtype: Any = np.float32) -> tuple[Any, list[Any]]:
    shape = (7, 5) if rule.program.matrices else (35,)
    drawn = [
        {name: rng.standard_normal(shape).astype(dtype) for name in "ab"} for _ in range(STEPS + 1)
    ]
    return drawn[0], drawn[1:]


def copied(params: Any) -> Any:
    return {name: a.copy() for name, a in params.items()}


@pytest.mark.parametrize("backend", HOST)
@pytest.mark.parametrize(("name", "example", "field"), CASES, ids=lambda v: str(v)[:40])
def test_a_schedule_is_the_rule_replaced_in_each_step(
    name: str, example: dict[str, Any], field: str, backend: str
) -> None:
    rule = scheduled(fo.RULES[name](**example), field)
    params, gradients = tensors(rule)
    other = copied(params)
    opt = fo.Optimizer(params, rule, backend=backend)
    saved = opt.state_dict()
    for step, grads in enumerate(gradients, 1):
        opt.step(grads)
        anew = fo.Optimizer(other, rule.at(step), backend=backend)
        anew.load_state_dict(saved, strict=False)
        anew.step(grads)
        saved = anew.state_dict()
        assert opt.fingerprint() == anew.fingerprint(), step


@pytest.mark.parametrize("backend", HOST)
def test_with_verification_guards_and_several_groups(backend: str) -> None:
    rules = {
        "a": fo.AdamW(
            weight_decay=Near(0.1), betas=(Near(0.9), 0.999), lr=fo.schedules.Linear(0.01, 9)
        ),
        "b": fo.Lion(weight_decay=Near(0.3), lr=0.001),
    }
    params, gradients = tensors(rules["a"])
    other = copied(params)
    options: dict[str, Any] = {"clip_norm": 1.0, "skip_nonfinite": True, "ema": EmaWarmup(0.9)}
    opt = fo.Optimizer(params, rules, backend=backend, verify=True, stats=True, **options)
    plain = fo.Optimizer(other, rules, backend=backend, **options)
    for grads in gradients:
        assert opt.step(grads).lr == plain.step(grads).lr
    assert opt.fingerprint() == plain.fingerprint()
    assert opt.rule == rules


@pytest.mark.parametrize("backend", HOST)
@pytest.mark.parametrize("own", [False, True], ids=["ready-made", "own"])
@pytest.mark.parametrize("way", ["step", "accumulate"])
def test_a_skipped_step_advances_no_schedule(backend: str, own: bool, way: str) -> None:
    """Neither the learning rate's, nor another hyperparameter's, nor the average's; a run with
    steps that are skipped is one without them."""
    kept, asked = fo.schedules.Cosine(0.1, 9, warmup=2), []

    def schedule(step: int) -> float:
        asked.append(step)
        return kept(step)

    lr = schedule if own else kept
    rule = fo.AdamW(lr=lr, weight_decay=fo.schedules.Linear(0.1, 9), betas=(Near(0.9), 0.999))
    params, gradients = tensors(rule)
    other = copied(params)
    options: dict[str, Any] = {"backend": backend, "skip_nonfinite": True, "ema": EmaWarmup(0.9)}
    opt = fo.Optimizer(params, rule, **options)
    plain = fo.Optimizer(other, rule, **options)
    expected = []
    for k, grads in enumerate(gradients):
        bad = copied(grads)
        bad["b"][k] = (np.nan, np.inf, -np.inf)[k % 3]
        for _ in range(k):
            before, lr_before = opt.fingerprint(), opt.lr
            if way == "accumulate":
                opt.accumulate(grads)
                opt.accumulate(bad)
            info = opt.step() if way == "accumulate" else opt.step(bad)
            assert info.skipped
            assert (opt.step_count, opt.lr) == (k, lr_before)
            assert opt.fingerprint() == before
        info = opt.step(grads)
        assert info == plain.step(grads)
        assert (info.step, info.lr) == (k + 1, kept(k + 1))
        expected.append(k + 1)
        assert opt.fingerprint() == plain.fingerprint()
    assert set(asked) <= {*expected, STEPS + 1}


def test_a_checkpoint_compares_what_a_schedule_prints() -> None:
    rule = fo.AdamW(weight_decay=fo.schedules.Linear(0.1, 9), betas=(Near(0.9), 0.999))
    params, gradients = tensors(rule)
    whole, half = copied(params), copied(params)
    opt = fo.Optimizer(whole, rule)
    first = fo.Optimizer(half, rule)
    for grads in gradients[:2]:
        opt.step(grads)
        first.step(grads)
    saved = first.state_dict()
    assert saved["leaves"]["a"]["hyperparameters"]["weight_decay"].startswith("Linear(")
    with pytest.raises(ValueError, match="weight_decay"):
        fo.Optimizer(copied(half), fo.AdamW(betas=rule.betas)).load_state_dict(saved)
    second = fo.Optimizer(half, rule)
    second.load_state_dict(saved)
    for grads in gradients[2:]:
        opt.step(grads)
        second.step(grads)
    assert opt.fingerprint() == second.fingerprint()


@pytest.mark.parametrize("backend", HOST)
def test_one_schedule_in_the_place_of_another(backend: str) -> None:
    first, second = fo.schedules.Cosine(0.5, steps=9), fo.schedules.Cosine(0.25, steps=9)
    p, q = np.ones(5), np.ones(5)
    opt = fo.Optimizer(p, fo.AdamW(weight_decay=first), backend=backend)
    plain = fo.Optimizer(q, fo.AdamW(weight_decay=0.5), backend=backend)
    for t in range(1, 6):
        schedule = first if t < 4 else second
        if t == 4:
            opt.replace(weight_decay=schedule)
        plain.replace(weight_decay=schedule(t))
        opt.step(p / 2)
        plain.step(q / 2)
        assert p.tobytes() == q.tobytes()


@pytest.mark.parametrize("backend", HOST)
def test_rows_that_missed_steps_have_the_values_of_these(backend: str) -> None:
    rule = fo.AdamW(weight_decay=Near(0.1), betas=(Near(0.9), Near(0.99)), lr=0.01)
    table = rng.standard_normal((6, 4)).astype(np.float32)
    lazy, whole = table.copy(), table.copy()
    opt = fo.Optimizer(lazy, rule, backend=backend, exact=True, ema=EmaDebiased(0.9))
    dense = fo.Optimizer(whole, rule, backend=backend, ema=EmaDebiased(0.9))
    for step in range(STEPS):
        rows = np.array([step % 3])
        values = rng.standard_normal((1, 4)).astype(np.float32)
        full = np.zeros_like(table)
        full[rows] = values
        opt.catch_up({"params": rows})
        opt.step(fo.Rows(rows, values))
        dense.step(full)
    opt.catch_up()
    # Rows that no gradient has ever touched are caught up as well.
    assert lazy.tobytes() == whole.tobytes()
    assert opt.fingerprint() == dense.fingerprint()


@pytest.mark.parametrize("backend", HOST)
def test_the_lr_of_one_step(backend: str) -> None:
    rules = {"a": fo.SGD(lr=0.5), "b": fo.SGD(lr=fo.schedules.Constant(0.25))}
    params = {"a": np.zeros(3), "b": np.zeros(3)}
    ones = {"a": np.ones(3), "b": np.ones(3)}
    opt = fo.Optimizer(params, rules, backend=backend)
    assert opt.step(ones, lr={"a": 1.0, "b": 2.0}).lr == {"a": 1.0, "b": 2.0}
    assert opt.step(ones, lr=4.0).lr == {"a": 4.0, "b": 4.0}
    assert opt.step(ones).lr == {"a": 0.5, "b": 0.25}
    assert (params["a"].tolist(), params["b"].tolist()) == ([-5.5] * 3, [-6.25] * 3)
    wrong: list[tuple[Any, Any]] = [(-1.0, ValueError), ("x", TypeError), ({"a": 1.0}, ValueError)]
    for lr, kind in wrong:
        before = opt.fingerprint()
        with pytest.raises(kind, match="step"):
            opt.step(ones, lr=lr)
        assert opt.fingerprint() == before
        assert opt.lr == {"a": 0.5, "b": 0.25}
    p = np.zeros(3)
    fo.update(fo.SGD(lr=1.0), 1, p, np.ones(3), lr=0.5)
    assert p.tolist() == [-0.5] * 3
    with pytest.raises(ValueError, match="lr: expected a number >= 0"):
        fo.update(fo.SGD(lr=1.0), 1, p, np.ones(3), lr=-0.5)


def test_update_has_the_values_of_its_step() -> None:
    rule = fo.AdamW(weight_decay=Near(0.1), betas=(Near(0.9), 0.999))
    p = rng.standard_normal(9)
    q, g = p.copy(), np.ones(9)
    states, others = rule.init(p), rule.init(q)
    for step in (1, 2, 3):
        fo.update(rule, step, p, g, *states)
        fo.update(rule.at(step), step, q, g, *others)
    assert p.tobytes() == q.tobytes()


def test_groups_by_label() -> None:
    params = {"x": {"w": np.ones(3)}, "b": np.ones(3)}
    opt = fo.Optimizer(params, {"*.w": fo.AdamW(lr=0.1), "*": fo.SGD(lr=0.2)})
    group = opt.groups["*.w"]
    group.lr = 0.5
    group.betas = (0.8, 0.9)
    assert (group.lr, group.betas, group.paths, group.label) == (0.5, (0.8, 0.9), ["x.w"], "*.w")
    assert opt.lr == {"*.w": 0.5, "*": 0.2}
    with pytest.raises(AttributeError, match="SGD has no hyperparameter 'betas'"):
        opt.groups["*"].betas = (0.8, 0.9)
    with pytest.raises(ValueError, match="lr"):
        group.lr = -1.0
    assert group.lr == 0.5


@pytest.mark.parametrize("backend", HOST)
def test_debiased_averages(backend: str) -> None:
    p, decay = np.zeros(4), 0.9
    opt = fo.Optimizer(p, fo.SGD(lr=0.5), ema=EmaDebiased(decay), backend=backend)
    seen = []
    for _ in range(STEPS):
        opt.step(rng.standard_normal(4))
        seen.append(p.copy())
    weights = decay ** np.arange(STEPS)[::-1]
    expected = np.average(seen, axis=0, weights=weights)
    assert np.allclose(opt.averaged().params, expected, rtol=1e-13, atol=1e-15)


def test_values_that_do_not_fit_are_refused_in_their_step() -> None:
    p, g = np.ones(3), np.ones(3)
    opt = fo.Optimizer(p, fo.AdamW(betas=(lambda step: 0.9 if step < 2 else 1.5, 0.999)))
    opt.step(g)
    before = opt.fingerprint()
    with pytest.raises(ValueError, match=r"AdamW\(betas\) at step 2\[0\]: expected a number"):
        opt.step(g)
    assert opt.fingerprint() == before
    opt = fo.Optimizer(p, fo.RMSProp(momentum=lambda step: 0.5 if step < 2 else 0.0))
    opt.step(g)
    with pytest.raises(ValueError, match="a schedule cannot add or drop states"):
        opt.step(g)
    with pytest.raises(ValueError, match="ema at step 1"):
        fo.Optimizer(p, fo.SGD(), ema=lambda step: 2.0 * step)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"betas": (lambda step: 0.9,)}, TypeError),
        ({"betas": (lambda step: 0.9, 2.0)}, ValueError),
        ({"betas": (lambda step: 0.9, "x")}, TypeError),
    ],
)
def test_rules_that_do_not_fit(arguments: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind, match="betas"):
        fo.AdamW(**arguments)


def test_what_says_what_the_states_are_takes_no_schedule() -> None:
    with pytest.raises(ValueError, match="takes no schedule"):
        fo.AdaGrad(initial_accumulator=Near(0.1))
