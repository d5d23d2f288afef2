"""Bits are the same for every instruction set, thread count, batching, alignment, layout, entry."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from exactness import (
    DECAYING,
    DEFAULTS,
    DTYPES,
    PART,
    RULES,
    SERIAL,
    STEPS,
    Array,
    Case,
    Guards,
    Result,
    apart,
    assert_same_bits,
    case,
    operands,
    run_python,
    shape_of,
    sprinkled,
    stepped,
    stepped_on_each_isa,
    updated,
)
from fusedopt.system.isa import isas

SIZES = (0, 1, 2, 255, 256, 257, 1025, PART - 1, PART + 1, 100_003, SERIAL + 4321)

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
default_rules = pytest.mark.parametrize("rule", DEFAULTS.values(), ids=DEFAULTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
several_isas = pytest.mark.skipif(
    len(isas()) < 2, reason="this machine and build have one instruction set in common"
)


def pieces(c: Case, cuts: list[int]) -> list[Case]:
    """The case cut into several along the last axis."""
    ends = zip([0, *cuts], [*cuts, c.p.shape[-1]], strict=True)
    return [c.map(partial(section, low, high)) for low, high in ends]


def section(low: int, high: int, a: Array) -> Array:
    return a[..., low:high].copy()


def joined(results: list[Result]) -> Result:
    return tuple(np.concatenate(arrays, axis=-1) for arrays in zip(*results, strict=True))


# ---------------------------------------------------------------- instruction sets and threads


@several_isas
@every_dtype
@every_rule
def test_instruction_sets(rule: fo.Rule, dtype: type) -> None:
    for awkward in ((), *((name,) for name in operands(rule)), operands(rule)):
        c = case(rule, 259, dtype, awkward=awkward)
        results = stepped_on_each_isa(rule, c)
        for isa, got in results.items():
            assert_same_bits(got, results["baseline"], f"{isa}, awkward {awkward}, {rule}")


@several_isas
@every_dtype
@pytest.mark.parametrize("n", SIZES)
@default_rules
def test_instruction_sets_at_every_size(rule: fo.Rule, n: int, dtype: type) -> None:
    c = case(rule, n, dtype)
    results = stepped_on_each_isa(rule, c)
    for isa, got in results.items():
        assert_same_bits(got, results["baseline"], f"{isa}, {rule}")


@several_isas
@every_dtype
@pytest.mark.parametrize("name", [n for n, rule in DEFAULTS.items() if rule.program.matrices])
def test_instruction_sets_with_matrix_products(name: str, dtype: type) -> None:
    # The products themselves are BLAS's, the same on each: they must get the same operands.
    rule = fo.RULES[name](**DECAYING)
    c = case(rule, (24, 33), dtype)
    results = stepped_on_each_isa(rule, c)
    for isa, got in results.items():
        assert_same_bits(got, results["baseline"], f"{isa}, {rule}")


def check_thread_counts(most: int) -> None:
    """Steps of several leaves, with parts that span them, on 1, 2 and `most` threads.

    Run where the environment allows so many: this process may have been granted fewer.
    """
    from fusedopt import _core

    if _core.parallel == "openmp":
        assert _core.parallel_limit() == most
    sizes = (5, 0, 100_003, 257, SERIAL // 2, 1)
    # Each example has six variants in a row: this takes one of each, and all of them in turn.
    for rule in [*RULES.values()][::5]:
        for dtype in DTYPES:
            cases = [case(rule, n, dtype, seed=k) for k, n in enumerate(sizes)]
            results = {}
            for threads in (1, 2, most):
                _core.set_threads(threads)  # fo.set_threads is capped by the processors
                results[threads] = joined(stepped(rule, cases))
                where = f"{threads} threads, {np.dtype(dtype)}, {rule}"
                assert_same_bits(results[threads], results[1], where)


@pytest.mark.slow
def test_thread_counts() -> None:
    done = run_python(
        "from exact import test_exact; test_exact.check_thread_counts(7)", {"OMP_NUM_THREADS": "7"}
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- batching, order of elements


@every_dtype
@every_rule
def test_one_optimizer_over_many_is_one_for_each(rule: fo.Rule, dtype: type) -> None:
    rule = apart(rule) if rule.over != "parameter" else rule
    cases = [case(rule, n, dtype, seed=n) for n in (0, 1, 300, 256, 7)]
    if not rule.program.matrices:
        cases.append(case(rule, (), dtype, seed=11))
    together = stepped(rule, cases)
    for k, c in enumerate(cases):
        assert_same_bits(together[k], stepped(rule, [c])[0], f"leaf {k}, {rule}")


@every_dtype
@every_rule
def test_each_element_is_alone(rule: fo.Rule, dtype: type) -> None:
    rule = apart(rule)
    # One-element leaves run the code of the vectorised loop's tail.
    n = 67
    for awkward in ((), operands(rule)):
        c = case(rule, n, dtype, awkward=awkward)
        alone = joined(stepped(rule, pieces(c, list(range(1, n)))))
        assert_same_bits(stepped(rule, [c])[0], alone, f"awkward {awkward}, {rule}")


@every_dtype
@pytest.mark.parametrize("n", SIZES)
@default_rules
def test_concatenation(rule: fo.Rule, n: int, dtype: type) -> None:
    rule = apart(rule)
    c = case(rule, n, dtype)
    cuts = sorted({n // 7, n // 3, n // 2, max(0, n - 3)})
    assert_same_bits(stepped(rule, [c])[0], joined(stepped(rule, pieces(c, cuts))), repr(rule))


@every_dtype
@every_rule
def test_permutation(rule: fo.Rule, dtype: type) -> None:
    rule = apart(rule)
    n = 1009
    c = case(rule, n, dtype, awkward=operands(rule))
    order = np.random.default_rng(1).permutation(n)
    want = tuple(a[..., order] for a in stepped(rule, [c])[0])
    assert_same_bits(stepped(rule, [c.map(lambda a: a[..., order])])[0], want, repr(rule))


# ---------------------------------------------------------------- memory


@every_dtype
@every_rule
def test_alignment_and_guard_bytes(rule: fo.Rule, dtype: type) -> None:
    for n in (1, 61, 513):
        c = case(rule, n, dtype)
        want = updated(rule, c.map(np.copy))
        for first in range(4):
            guards = Guards(first)
            got = updated(rule, c.map(guards.place))
            assert_same_bits(got, want, f"{n} elements, offsets from {first}, {rule}")
            assert guards.intact(), f"{n} elements, offsets from {first}, {rule}"


@default_rules
def test_guard_bytes_with_threads(rule: fo.Rule) -> None:
    guards = Guards(1)
    c = case(rule, SERIAL + 77, np.float32)
    got = updated(rule, c.map(guards.place))
    assert guards.intact()
    assert_same_bits(got, stepped(rule, [c])[0], repr(rule))


@every_dtype
@every_rule
def test_fortran_order(rule: fo.Rule, dtype: type) -> None:
    c = case(rule, (3, 5, 19), dtype)
    fortran = c.map(np.asfortranarray)
    want = stepped(rule, [c])[0]
    if rule.program.measures:  # sums go through the memory, which is that of the transpose
        turned = stepped(rule, [c.map(lambda a: np.ascontiguousarray(a.T))])[0]
        want = tuple(a.T for a in turned)
    for got in (stepped(rule, [fortran])[0], updated(rule, fortran)):
        assert got[0].flags.f_contiguous
        assert_same_bits(got, want, repr(rule))


def transposed(a: Array) -> Array:
    return a.T.copy().T


def strided(a: Array) -> Array:
    wide = np.full((*a.shape, 2), np.nan, a.dtype)
    wide[..., 0] = a
    return wide[..., 0]


def backwards(a: Array) -> Array:
    return a[::-1, ::-1].copy()[::-1, ::-1]


@pytest.mark.parametrize("layout", [transposed, strided, backwards])
@every_rule
def test_layout_of_gradients(rule: fo.Rule, layout: Any) -> None:
    c = case(rule, (13, 21), np.float32)
    estimates = tuple(None if h is None else layout(h) for h in c.hessians)
    other = replace(c, grads=tuple(map(layout, c.grads)), hessians=estimates)
    assert not other.grads[0].flags.c_contiguous
    want = stepped(rule, [c])[0]
    assert_same_bits(stepped(rule, [other])[0], want, repr(rule))
    assert_same_bits(updated(rule, replace(other, p=c.p.copy())), want, repr(rule))


@every_dtype
@every_rule
def test_gradients_of_the_other_dtype_are_cast(rule: fo.Rule, dtype: type) -> None:
    other = np.float64 if dtype is np.float32 else np.float32
    for awkward in ((), ("g", "hessian")):
        wide = case(rule, 1025, other, awkward=awkward)  # a batch and one element
        c = case(rule, 1025, dtype)
        mixed = replace(c, grads=wide.grads, hessians=wide.hessians)
        with np.errstate(over="ignore", under="ignore"):
            cast = wide.map(lambda a: a.astype(dtype))
        plain = replace(c, grads=cast.grads, hessians=cast.hessians)
        want = stepped(rule, [plain])[0]
        results = stepped_on_each_isa(rule, mixed)
        for isa, got in results.items():
            assert_same_bits(got, want, f"{isa}, awkward {awkward}, {rule}")


@every_rule
def test_gradients_are_left_alone(rule: fo.Rule) -> None:
    c = case(rule, 300, np.float32, awkward=["g", "hessian"])
    before = c.map(np.copy)
    inputs = [*c.grads, *(h for h in c.hessians if h is not None)]
    for a in inputs:
        a.flags.writeable = False
    stepped(rule, [c])
    after = [*before.grads, *(h for h in before.hessians if h is not None)]
    for a, b in zip(inputs, after, strict=True):
        assert a.tobytes() == b.tobytes()


@every_rule
def test_gradients_may_overlap_each_other(rule: fo.Rule) -> None:
    rule = apart(rule) if rule.over != "parameter" else rule
    first, second = (case(rule, 300, np.float32, seed=seed) for seed in (0, 1))
    shared = replace(second, grads=first.grads, hessians=first.hessians)
    together = stepped(rule, [first, shared])
    assert_same_bits(together[0], stepped(rule, [first])[0], repr(rule))
    own = replace(shared, grads=tuple(map(np.copy, first.grads)))
    assert_same_bits(together[1], stepped(rule, [own])[0], repr(rule))


# ---------------------------------------------------------------- entry points and counters


@every_dtype
@every_rule
def test_update_is_the_optimizers_step(rule: fo.Rule, dtype: type) -> None:
    c = case(rule, 1009, dtype, awkward=operands(rule))
    assert_same_bits(updated(rule, c.map(np.copy)), stepped(rule, [c])[0], repr(rule))


@every_rule
def test_each_leaf_has_its_own_count(rule: fo.Rule) -> None:
    rule = apart(rule) if rule.over != "parameter" else rule
    present = ((1, 1, 1, 1, 1, 1), (0, 1, 0, 0, 1, 1), (0, 0, 0, 0, 0, 1), (1, 0, 1, 0, 1, 0))
    cases = [case(rule, 5, np.float64, seed=k) for k in range(len(present))]
    parameters = [c.p.copy() for c in cases]
    optimizer = fo.Optimizer(parameters, rule)
    for step in range(6):
        optimizer.step(
            [c.grads[0] if on[step] else None for c, on in zip(cases, present, strict=True)]
        )
    for k, (c, states) in enumerate(zip(cases, optimizer.state.values(), strict=True)):
        p, alone = c.p.copy(), rule.init(c.p)
        for t in range(1, sum(present[k]) + 1):
            fo.update(rule, t, p, c.grads[0], *alone)
        got = (parameters[k], *states.values())
        assert_same_bits(got, (p, *alone), f"leaf {k}, {rule}")


@pytest.mark.parametrize("backend", ["native", "numba"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sgd", "lion", "adamw"])
def test_cautious_decay_is_a_decay_of_some_elements(name: str, dtype: Any, backend: str) -> None:
    """An element has the bits of decoupled decay, or of none where it moves away from zero."""
    rule = fo.RULES[name](lr=0.01, weight_decay=0.0)
    c = case(rule, 4201, dtype, awkward=("p", "g"))
    g = c.grads[0].copy()
    g[::7] = 0

    def step(p: Array, decay: float, form: Any) -> Array:
        own = p.copy()
        fo.Optimizer(own, replace(rule, weight_decay=decay, decay=form), backend=backend).step(g)
        return own

    plain, decayed = step(c.p, 0.0, "decoupled"), step(c.p, 0.25, "decoupled")
    away = step(np.zeros_like(c.p), 0.0, "decoupled")
    opposed = (away > 0) & (c.p > 0) | (away < 0) & (c.p < 0)
    assert 1000 < np.count_nonzero(opposed) < 3000
    want = np.where(opposed, plain, decayed)
    assert_same_bits((step(c.p, 0.25, "cautious"),), (want,), repr(rule))


# ---------------------------------------------------------------- powers of two

LINEAR = {"p": 1, "g": 1, "v": 1}
SCALE_FREE = {"g": 1, "m": 1, "v": 2, "G": 2, "x": 2}
SCALING: list[tuple[fo.Rule, dict[str, int]]] = [
    *(
        (fo.SGD(weight_decay=0.1, decay=d), LINEAR)
        for d in ("l2", "decoupled", "decoupled_first", "cautious")
    ),
    *((fo.Momentum(form=f, weight_decay=0.1), LINEAR) for f in ("ema", "heavy_ball", "buffer")),
    *(
        (fo.Nesterov(form=f, weight_decay=0.1), LINEAR)
        for f in ("rearranged", "heavy_ball", "lookahead")
    ),
    (fo.Lion(weight_decay=0.1), SCALE_FREE),
    (fo.AdaGrad(eps_root=0, weight_decay=0.1, decay="decoupled"), SCALE_FREE),
    (fo.RMSProp(eps_root=0, weight_decay=0.1, decay="decoupled"), SCALE_FREE),
    (fo.AdamW(eps=0), SCALE_FREE),
    (fo.AdamW(eps=0, amsgrad="corrected"), SCALE_FREE),
]


@pytest.mark.parametrize(("rule", "powers"), SCALING, ids=[repr(rule) for rule, _ in SCALING])
def test_scaling_by_a_power_of_two(rule: fo.Rule, powers: dict[str, int]) -> None:
    # Exact in floating point: operands that scale by s to these powers give results that do too.
    c, s = case(rule, 1009, np.float32), 2.0**9
    factors = [np.float32(s ** powers.get(name, 0)) for name in ("p", *rule.states)]
    scaled = Case(
        c.p * factors[0],
        tuple(a * f for a, f in zip(c.states, factors[1:], strict=True)),
        tuple(g * np.float32(s) for g in c.grads),
        c.hessians,
    )
    want = tuple(a * f for a, f in zip(stepped(rule, [c])[0], factors, strict=True))
    assert_same_bits(stepped(rule, [scaled])[0], want, repr(rule))


# ---------------------------------------------------------------- denormals


def is_denormal(a: Array) -> Array:
    return np.asarray((a != 0) & (np.abs(a) < np.finfo(a.dtype).smallest_normal))


@pytest.mark.parametrize("backend", ["native", "reference"])
@every_dtype
@every_rule
def test_no_state_is_denormal(rule: fo.Rule, dtype: type, backend: str) -> None:
    c = case(rule, 1009, dtype, awkward=operands(rule))
    assert any(is_denormal(a).any() for a in (c.p, *c.states))
    states = stepped(rule, [c], backend=backend)[0][1:]
    for name, state in zip(rule.states, states, strict=True):
        assert not is_denormal(state).any(), f"{name}, {rule}"


UNDECAYED = {label: rule for label, rule in RULES.items() if not rule.weight_decay}


@every_dtype
@pytest.mark.parametrize("rule", UNDECAYED.values(), ids=UNDECAYED)
def test_states_without_gradients_decay_to_zero(rule: fo.Rule, dtype: type) -> None:
    start = 3 * np.finfo(dtype).smallest_normal
    shape = shape_of(rule, 5)
    p: Array = np.zeros(shape, dtype)
    zero = np.zeros_like(p)
    optimizer = fo.Optimizer(p, rule)
    states = optimizer.state["params"]
    for state in states.values():
        state[...] = start
    # The slowest average forgets a thousandth in a step, or half of that.
    for _ in range(2400 if rule.kept else 1200):
        optimizer.step(zero, hessian=zero if rule.takes_hessian else None)
    for name, state in states.items():
        # A sum or a maximum never shrinks; what decays at all has vanished.
        assert ((state == 0) | (state >= start)).all(), f"{name} is {state}, {rule}"
    assert np.isfinite(p).all(), repr(rule)


def test_decay_to_zero_is_not_vacuous() -> None:
    # The test above allows a state to stay; these may not.
    p, zero = np.zeros(3, np.float32), np.zeros(3, np.float32)
    optimizer = fo.Optimizer(p, fo.Adam(betas=(0.5, 0.5)))
    for state in optimizer.state["params"].values():
        state[...] = 3 * np.finfo(np.float32).smallest_normal
    for _ in range(STEPS):
        optimizer.step(zero)
    assert not any(state.any() for state in optimizer.state["params"].values())


def test_sprinkled_values_hold_every_special_one() -> None:
    values = sprinkled(np.random.default_rng(0), np.ones(2000, np.float32))
    assert np.isnan(values).any()
    assert np.isinf(values).any()
    assert is_denormal(values).any()
    assert np.signbit(values[values == 0]).any()
