"""Verified steps of every storage: right ones pass, and wrong ones leave everything as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedopt as fo
from exactness import Array, shape_of
from formatted import (
    BACKENDS,
    BF16,
    BLOCKED,
    DTYPES,
    F16,
    F64,
    WAYS,
    Way,
    assert_same,
    draw,
    grads,
    held,
    made,
)
from fusedopt.verification.judge import judge
from fusedopt.verify import variants


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failed_verification_changes_nothing(
    way: Way, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = np.zeros(5003, way.copies)
    copies = {"a": copy, "b": [None]} if way.copies else None
    opt = made(way, verify=True, backend=backend, copy_out=copies)
    given = grads(way, 10)
    opt.step(grads(way, 5))
    before = held(opt, copy)
    calls: list[fo.Rule] = []

    def wrong(rule: fo.Rule, *args: Any, lr: float, **others: Any) -> Any:
        calls.append(rule)
        return judge(rule, *args, lr=2 * lr if len(calls) == 2 else lr, **others)

    with monkeypatch.context() as patched:
        patched.setattr("fusedopt.verification.plan.judge", wrong)
        with pytest.raises(fo.VerificationError, match=r"params\['b'\]\[0\]: p\["):
            opt.step(given)
    assert_same(held(opt, copy), before)
    assert opt.step_count == 1
    assert_same({"g": given["a"]}, {"g": grads(way, 10)["a"]})
    opt.step(given)
    assert opt.step_count == 2


EVERY_RULE = [rule for cls in fo.RULES.values() for rule in variants(cls)]
SHAPES = st.sampled_from(
    [(), (0,), (0, 3), (1,), (5,), (3, 4), (64, 64), (4097,), (5003,), (61, 83)]
)
dtypes = st.sampled_from([*DTYPES.values()])
MIXTURES: list[dict[str, Any]] = [
    {},
    *({"state_dtype": name} for name in ("bfloat16", "float16", "float64", *BLOCKED)),
    {"rounding": "stochastic"},
    {"rounding": "stochastic", "state_dtype": "bfloat16"},
    {"rounding": "kahan", "state_dtype": "dynamic8"},
    {"master": "float32", "state_dtype": "float8"},
    {"master": "split16", "state_dtype": "bfloat16"},
]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(EVERY_RULE),
    st.sampled_from(MIXTURES),
    st.lists(st.tuples(SHAPES, dtypes, st.sampled_from("CF")), min_size=1, max_size=4),
    st.lists(dtypes, min_size=3, max_size=3),
    st.sampled_from([0, 0, -5, -10, -14, -20]),
    st.booleans(),
    st.integers(0, 999),
)
def test_verified_steps_pass(
    rule: fo.Rule,
    options: Any,
    leaves: Any,
    of_grads: Any,
    exponent: int,
    zeroing: bool,
    seed: int,
) -> None:
    def gradient(k: int, shape: tuple[int, ...], dtype: Any) -> Array:
        with np.errstate(over="ignore"):
            scaled: Array = draw(k, shape, F64) * 10.0**exponent
            return scaled.astype(dtype)

    if options.get("master") == "split16":
        leaves = [(shape, BF16 if dtype == F16 else dtype, o) for shape, dtype, o in leaves]
    if rule.program.matrices:
        leaves = [(s if len(s) > 1 else shape_of(rule, 7), d, o) for s, d, o in leaves]
    if options:  # nothing is refused for lack of use
        leaves = [((1, 9), BF16, "C"), *leaves]
    params = [np.array(draw(seed + k, s, d), order=o) for k, (s, d, o) in enumerate(leaves)]
    opt = fo.Optimizer(params, rule, verify=True, zero_grads=zeroing, **options)
    for t, dtype in enumerate(of_grads):
        given: list[Array | None] = [
            np.array(gradient(seed + 10 * t + k, p.shape, dtype), order=o)
            for k, (p, (_, _, o)) in enumerate(zip(params, leaves, strict=True))
        ]
        if t == 1:
            given[0] = None
        estimates = [None if g is None else np.array(abs(g)) for g in given]
        opt.step(given, hessian=estimates if rule.takes_hessian else None)
    assert opt.step_count == 3
