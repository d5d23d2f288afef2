"""Hyperparameters at the ends of their ranges: a step is refused by name, or it is sound."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

import fusedopt as fo

VALUES = (0.0, 1e-300, 1e-45, 1e-39, 1e-20, 0.5, 1 - 2**-53, 1e20, 1e30, 3e38, 1e39, 1e300)
REFUSAL = "is not finite in float32; take hyperparameters"
TOO_LARGE_A_START = "begins at .*, which float32 cannot hold; take a smaller initial value"


def extremes(cls: type[fo.Rule]) -> Iterator[fo.Rule]:
    """Each hyperparameter of each example at each extreme value that it accepts."""
    for example in cls.examples:
        base = cls(**{"weight_decay": 0.0, **example})
        for field in fields(base):
            given = getattr(base, field.name)
            single = isinstance(given, float) and field.name != "weight_decay"
            places = range(len(given)) if field.name == "betas" else range(1 if single else 0)
            for k in places:
                for value in VALUES:
                    new = value if single else (*given[:k], value, *given[k + 1 :])
                    try:
                        yield cls(**{"weight_decay": 0.0, **example, field.name: new})
                    except ValueError:  # out of the field's own range
                        continue


BACKENDS = [
    "native",
    pytest.param("numba", marks=pytest.mark.slow),
    pytest.param("reference", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", fo.RULES)
def test_zero_gradients_move_nothing_and_make_no_nan(name: str, backend: str) -> None:
    start = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    zero = np.zeros((4, 3), np.float32)
    for rule in extremes(fo.RULES[name]):
        begun = (rule.initial(state) for state in (*rule.states, *rule.kept))
        if max(begun, default=0.0) > 3.4e38:
            with pytest.raises(ValueError, match=TOO_LARGE_A_START):
                fo.Optimizer(start.copy(), rule, backend=backend)
            continue
        opt = fo.Optimizer(p := start.copy(), rule, backend=backend)
        before = opt.fingerprint()
        for step in (1, 2, 3):
            refused = ""
            try:
                opt.step(zero, hessian=zero if rule.takes_hessian else None)
            except ValueError as error:
                refused = str(error)
            if refused:
                assert REFUSAL in refused, rule
                assert opt.step_count == step - 1
                assert step > 1 or opt.fingerprint() == before
                break
        assert np.array_equal(p, start), rule
        for state in opt.state_dict()["leaves"]["params"]["state"].values():
            assert not np.isnan(np.asarray(state, np.float64)).any(), rule


@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
def test_a_number_beyond_float32_is_refused_by_name_before_anything_changes(backend: str) -> None:
    params = {"a": np.ones(3, np.float32), "b": np.ones(3), "c": np.ones(2, np.float32)}
    grads = {k: np.ones_like(p) for k, p in params.items()}
    opt = fo.Optimizer(params, {"c": fo.SGD(), "*": fo.AdamW(lr=1e38)}, backend=backend)
    before = opt.fingerprint()
    message = (
        "AdamW: in step 1, with lr 1e\\+300, a number that the step computes with is not finite in"
        " float32; take hyperparameters whose products and quotients float32 can hold, or float64"
        " parameters"
    )
    with pytest.raises(ValueError, match=message):
        opt.step(grads, lr={"*": 1e300, "c": 0.1})
    assert opt.fingerprint() == before
    opt.step(grads)
    assert opt.step_count == 1


@pytest.mark.parametrize("backend", ["native", "numba"])
def test_a_measured_number_beyond_float32_is_refused(backend: str) -> None:
    params = [np.ones(3, np.float32), np.ones(4, np.float32)]
    opt = fo.Optimizer(params, fo.LARS(lr=1e30, trust=1e30), backend=backend)
    before = opt.fingerprint()
    with pytest.raises(ValueError, match=r"LARS: in step 1, with lr 1e\+30"):
        opt.step([np.ones(3, np.float32), np.full(4, 1e-3, np.float32)])
    assert opt.fingerprint() == before


def test_float64_parameters_take_what_float32_cannot() -> None:
    p = np.zeros(3)
    fo.Optimizer(p, fo.SGD(lr=1e39)).step(np.full(3, -1e-39))
    assert np.allclose(p, 1.0, rtol=1e-15, atol=0)
    with pytest.raises(ValueError, match=r"float64; take hyperparameters whose .* can hold$"):
        fo.Optimizer(p, fo.Adam(lr=1e308, betas=(0.99, 0.9))).step(p.copy())


@pytest.mark.parametrize("dtype", ["float16", "float8", "dynamic8"])
def test_a_state_begins_at_what_its_format_can_hold(dtype: Any) -> None:
    p, value = np.ones(5000, np.float32), 1e5 if dtype == "float16" else 1e39
    with pytest.raises(ValueError, match=f"begins at {value:g}, which {dtype}".replace("+", r"\+")):
        fo.Optimizer(p, fo.AdaGrad(initial_accumulator=value), state_dtype=dtype)
    fo.Optimizer(p, fo.AdaGrad(initial_accumulator=value / 1e5), state_dtype=dtype)


@pytest.mark.parametrize("value", [10**400, -(10**400), math.inf, math.nan])
def test_numbers_that_no_float_holds_get_the_packages_own_errors(value: Any) -> None:
    p = np.ones(3, np.float32)
    opt = fo.Optimizer(p, fo.SGD())
    for call in (
        lambda: fo.SGD(lr=value),
        lambda: fo.AdamW(weight_decay=value),
        lambda: opt.step(p, grad_scale=value),
        lambda: opt.step(p, lr=value),
        lambda: setattr(opt, "lr", value),
        lambda: fo.Optimizer(p, fo.SGD(lr=lambda step: value)).step(p),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
    assert opt.step_count == 0


@pytest.mark.parametrize("value", [2**31, 2**63, 2**64, 10**400, -1])
def test_thread_counts_that_no_machine_has_get_the_packages_own_errors(value: int) -> None:
    for call in (
        lambda: fo.Optimizer(np.ones(3), fo.SGD(), threads=value),
        lambda: fo.set_threads(value),
    ):
        with pytest.raises(ValueError, match="threads"):
            call()


@pytest.mark.parametrize("name", fo.RULES)
def test_verified_steps_of_empty_and_single_elements(name: str) -> None:
    for example in fo.RULES[name].examples:
        rule = fo.RULES[name](**example)
        for shape in ((0, 3), (3, 0), (1, 1), (1, 5), (5, 1)):
            params = [np.ones(shape, np.float32), np.ones((3, 4))]
            opt = fo.Optimizer(params, rule, verify=True)
            rng = np.random.default_rng(0)
            for k in range(3):
                grads = [np.full_like(params[0], k - 1), rng.standard_normal((3, 4))]
                opt.step(grads, hessian=[abs(g) for g in grads] if rule.takes_hessian else None)
            assert opt.step_count == 3
