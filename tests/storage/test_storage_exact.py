"""Every storage: the same bits for instruction sets, threads, batching and entry points."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from exactness import SERIAL, Array, Guards, run_python
from formatted import (
    BF16,
    BLOCKED,
    DTYPES,
    F16,
    F32,
    F64,
    RULES,
    WAYS,
    Way,
    arrays_of,
    assert_same,
    draw,
    on_each_isa,
    run,
    shaped,
)
from fusedopt.arrays.stored import Quantized

rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@ways
@rules
def test_instruction_sets(rule: fo.Rule, way: Way) -> None:
    for special in (False, True):
        go = partial(run, rule, way, {"a": 4096, "b": 5003, "c": 4097}, special=special)
        results = {isa: go() for isa in on_each_isa()}
        for isa, got in results.items():
            assert_same(got, results["baseline"], f"{isa}, {rule}")


def check_thread_counts() -> None:
    """Run where the environment allows so many: this process may have been granted fewer."""
    from fusedopt import _core

    leaves = {"a": 5, "b": 100_003, "c": 257, "d": SERIAL - 1, "e": 4097}
    for way in WAYS.values():
        for rule in (RULES["adamw"], RULES["rmsprop"], RULES["muon"]):
            results = {}
            for threads in (1, 2, 7):
                _core.set_threads(threads)
                results[threads] = run(rule, way, leaves, steps=2)
                assert_same(results[threads], results[1], f"{threads} threads, {way}, {rule}")


@pytest.mark.slow
def test_threads() -> None:
    done = run_python(
        "from storage import test_storage_exact as t; t.check_thread_counts()",
        {"OMP_NUM_THREADS": "7"},
    )
    assert done.returncode == 0, done.stderr


@ways
@rules
def test_one_optimizer_over_many_is_one_for_each(rule: fo.Rule, way: Way) -> None:
    leaves = {"a": 4097, "b": 300, "c": 5003, "d": 0, "e": 4096, "f": 1}
    together = run(rule, way, leaves)
    for name, n in leaves.items():
        alone = run(rule, way, {name: n})
        assert_same(alone, {key: together[key] for key in alone}, name)


@ways
@rules
def test_guard_bytes(rule: fo.Rule, way: Way) -> None:
    leaves = {"a": 4097, "b": 61, "c": 5003}
    want = run(rule, way, leaves)
    for first in range(4):
        guards = Guards(first)
        assert_same(run(rule, way, leaves, place=guards.place), want)
        assert guards.intact()


@ways
@rules
def test_fortran_order(rule: fo.Rule, way: Way) -> None:
    """A matrix and its transpose hold the same memory, and so does what is stored."""
    if rule.program.phases > 1:
        pytest.skip("has its own idea of rows")

    def results(order: Any) -> dict[str, Array]:
        def lay(a: Array) -> Array:
            return a.reshape((51, 83) if order == "C" else (83, 51), order=order)

        copies = None if way.copies is None else lay(draw(1, 4233, way.copies))
        p = lay(draw(2, 4233, way.p))
        opt = fo.Optimizer(p, rule, copy_out=copies, **way.arguments(rule))
        for t in range(2):
            estimate = lay(draw(5 + t, 4233, way.g)) if rule.takes_hessian else None
            opt.step(lay(draw(3 + t, 4233, way.g)), hessian=estimate)
        found = {"p": p, **arrays_of(opt.state["params"])}
        found |= {} if copies is None else {"copy": copies}
        return {name: a.reshape(-1, order="A") for name, a in found.items()}

    assert_same(results("F"), results("C"))


NEAREST = {name: way for name, way in WAYS.items() if not {"master", "rounding"} & {*way.options}}


@pytest.mark.parametrize("way", NEAREST.values(), ids=NEAREST)
@rules
@pytest.mark.parametrize("n", [4095, 4096, 4097, 5003])
def test_update_is_the_optimizers_step(rule: fo.Rule, way: Way, n: int) -> None:
    way = replace(way, copies=None)
    state_dtype = way.arguments(rule).get("state_dtype")
    want = run(rule, way, {"a": n}, zero_grads=False)
    p = draw(ord("a"), shaped(rule, n), way.p)
    guards = Guards(1)
    states: list[Any] = []
    for state in rule.init(p, state_dtype=state_dtype):
        if isinstance(state, Quantized):
            assert state.aux is not None
            codes, scales = guards.place(state.data), guards.place(state.aux)
            states.append(replace(state, data=codes, aux=scales))
        else:
            states.append(guards.place(state))
    for t in range(3):
        estimate = None
        if rule.takes_hessian and t % 2 == 0:
            estimate = draw(100 * (20 + t) + ord("a"), p.shape, way.g)
        fo.update(
            rule, t + 1, p, draw(100 * (10 + t) + ord("a"), p.shape, way.g), *states,
            hessian=estimate,
        )  # fmt: skip
    named = arrays_of(dict(zip(rule.states, states, strict=True)))
    assert_same({"a": p, **{f"a/{name}": a for name, a in named.items()}}, want)
    assert guards.intact()


def test_every_pair_of_dtypes() -> None:
    """Operands of any dtypes: what is computed is the float32 step of the values that they hold."""
    rule = fo.AdamW(lr=0.01, weight_decay=0.1)
    for p_dtype in (F32, BF16, F16):
        for g_dtype in DTYPES.values():
            p, g = draw(0, 5003, p_dtype), draw(1, 5003, g_dtype)
            wide, states = p.astype(np.float32), rule.init(p)
            alike = rule.init(wide)
            fo.update(rule, 1, p, g, *states)
            fo.update(rule, 1, wide, g.astype(np.float32), *alike)
            got = dict(zip("pmv", (p, *states), strict=True))
            want = dict(zip("pmv", (wide.astype(p_dtype), *alike), strict=True))
            assert_same(got, want, f"{p_dtype} {g_dtype}")
    with np.errstate(over="ignore"):
        p, g = draw(0, 5003, F64), draw(1, 5003, BF16)
    twin, states, alike = p.copy(), rule.init(p), rule.init(p)
    fo.update(rule, 1, p, g, *states)
    fo.update(rule, 1, twin, g.astype(np.float64), *alike)
    assert_same({"p": p, "m": states[0]}, {"p": twin, "m": alike[0]})


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float16", *BLOCKED])
def test_the_update_uses_states_that_are_not_rounded(state_dtype: str) -> None:
    rule = fo.AdamW(lr=0.01, weight_decay=0.1)
    p, g = draw(0, 5003, F32), draw(1, 5003, F32)
    runs = []
    for chosen in (state_dtype, None):
        runs.append(p.copy())
        fo.Optimizer(runs[-1], rule, state_dtype=chosen).step(g)
    assert_same({"p": runs[0]}, {"p": runs[1]})


@ways
def test_gradients_of_changing_dtypes(way: Way) -> None:
    """Each step reads its gradient in its own dtype, whatever the last one's was."""
    values = [draw(k, 5003, BF16) for k in range(5)]  # exact in all but float16
    plain = [v.astype(np.float32) for v in values]
    results = []
    for dtypes in ([F32] * 5, [F64, BF16, F32, BF16, F64]):
        p = draw(9, 5003, way.p)
        opt = fo.Optimizer(p, fo.AdamW(weight_decay=0.1), **way.arguments(fo.AdamW()))
        for g, dtype in zip(plain, dtypes, strict=True):
            opt.step(g.astype(dtype))
        results.append({"p": p, **arrays_of(opt.state["params"])})
    assert_same(results[1], results[0])


def test_every_dtype_in_one_optimizer() -> None:
    """Leaves of every dtype side by side, the smaller ones with states in float32."""
    params = {f"{n}{name}": draw(n, n, d) for n in (100, 5003) for name, d in DTYPES.items()}
    grads = {key: draw(1, p.shape, BF16) for key, p in params.items()}
    opt = fo.Optimizer(params, fo.AdamW(), state_dtype="float8", master="float32", verify=True)
    for _ in range(2):
        opt.step(grads)
    for key, state in opt.state.items():
        assert isinstance(state["v"], Quantized) == key.startswith("5003")
        assert ("master" in state) == key.endswith("float16")
