"""The verifier: clean on every kernel, and able to see what it is there to see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from fusedopt.arrays.stored import Stored
from fusedopt.plan.extras import EVERYTHING
from fusedopt.step.accumulate import Accumulation
from fusedopt.verification.judge import compare, judge
from fusedopt.verification.running_error import Bounded
from fusedopt.verify import STORAGES, variants

F32 = np.dtype(np.float32)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("shampoo", "dion") else name
        for name in fo.RULES
    ],
)
def test_every_rule_is_within_its_bound(name: str, storage: str) -> None:
    # Numba's bits are those of the core, which test_numba.py checks.
    checks = fo.verify([name], backends=["native", "reference"], storages=[storage])
    everywhere = storage in ("float32", "float64")
    assert {c.isa for c in checks} == {*(fo.info()["isas"] if everywhere else [fo.get_isa()]), "-"}
    assert {c.storage for c in checks} == {storage}
    for check in checks:
        assert check.passed, f"{check.isa} {check.storage}: {check.worst}, with {check.settings}"
        forms = 8 if fo.RULES[name].scales_decay else 7
        assert check.variants == forms * len(fo.RULES[name].examples)
        # g + lambda p of L2 decay can cancel, and a second moment squares what is left, which the
        # bound knows and units in the last place do not: there half of it, without its slack, will
        # do. ADOPT's v was 1.6 units away, at 0.44 of the bound, AdEMAMix's 2.6, at 0.40; LARS's v,
        # whose rate is a quotient of norms that is rounded first, was 1.6, at 0.44.
        cancels = "decay='l2'" in check.settings and "weight_decay=0.1" in check.settings
        rule = fo.RULES[name]()  # Schedule-Free's step towards the average can cancel the other
        half = cancels or rule.program.measures > 0 or rule.evaluated is not None
        if check.storage in ("float32", "float64"):
            worst = check.worst
            assert worst.ulps >= 0
            assert worst.ulps <= 1.5 or (half and worst.share <= 0.5)


def test_examples_select_every_kernel() -> None:
    from fusedopt.system.extension import core

    used = {
        op.kernel
        for cls in fo.RULES.values()
        for rule in variants(cls)
        for op in (*rule.every_operation(), *EVERYTHING.program(rule).operations)
    }
    used |= {op.kernel for op in Accumulation().operations()}
    assert used == {name for name, *_ in core.operations()}


def test_verify_leaves_the_instruction_set_as_it_was() -> None:
    before = fo.get_isa()
    fo.verify(["sgd"], size=17, steps=1)
    assert fo.get_isa() == before
    with pytest.raises(ValueError, match=r"rules: expected names of sgd, .*; got 'sdg'"):
        fo.verify(["sdg"])
    with pytest.raises(
        ValueError, match="isa 'sse9' is not available on this machine; available: baseline"
    ):
        fo.verify(["sgd"], isas=["sse9"])


def one_step(rule: fo.Rule, change: Any) -> float:
    """The worst share of the bound after one true step whose results were then changed."""
    rng = np.random.default_rng(1)
    shape = (20, 50)
    p, g = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    states = [rng.random(shape).astype(np.float32) for _ in rule.states]
    for side in rule.sides(shape).values():  # a mean of squares, a basis
        states.append(
            np.eye(*side, dtype=np.float32) if len(side) > 1 else np.ones(side, np.float32)
        )
    before = [a.copy() for a in (p, *states)]
    fo.update(rule, 3, p, g, *states)
    after = [p, *states]
    change(after)
    return max(
        w.share
        for w in judge(rule, before, [*map(Stored.plain, after)], g, None, t=3, lr=rule.lr_at(3))
    )


ELEMENTWISE = {name: cls for name, cls in fo.RULES.items() if not cls().program.matrices}


@pytest.mark.parametrize("cls", ELEMENTWISE.values())
def test_one_element_a_few_units_off_is_seen(cls: type[fo.Rule]) -> None:
    rule = cls()
    assert one_step(rule, lambda after: None) <= 1
    for k in range(1 + len(rule.states)):
        if cls.takes_hessian and k == 2:
            continue  # h is not touched without an estimate; see below

        def nudge(after: list[np.ndarray], k: int = k) -> None:
            flat = after[k].reshape(-1)
            flat[777] = flat[777] + 32 * np.spacing(np.abs(flat[777]))

        assert one_step(rule, nudge) > 1


def test_an_untouched_state_must_keep_its_bits() -> None:
    def nudge(after: list[np.ndarray]) -> None:
        after[2][3, 3] = np.nextafter(after[2][3, 3], np.float32(9))

    assert one_step(fo.Sophia(), nudge) > 1


@pytest.mark.parametrize("name", [name for name in fo.RULES if name not in ELEMENTWISE])
def test_a_matrix_rule_off_by_a_thousandth_is_seen(name: str) -> None:
    rule = fo.RULES[name]()

    def nudge(after: list[np.ndarray]) -> None:
        after[0][3, 3] *= 1.001

    assert one_step(rule, lambda after: None) <= 1
    assert one_step(rule, nudge) > 1


def test_bounds_hold_and_are_not_loose() -> None:
    rng = np.random.default_rng(2)
    a, b, c = (rng.standard_normal(10000).astype(np.float32) for _ in range(3))
    exact = [Bounded.exact(x, F32) for x in (a, b, c)]

    def expression(x: Any, y: Any, z: Any) -> Any:
        return np.sqrt(np.maximum(x * y - z, 0.0)) / (np.sqrt(y * y) + 0.1) + 0.3 * z

    got, bounded = expression(a, b, c), expression(*exact)
    assert got.dtype == np.float32
    finite = np.isfinite(bounded.error)
    difference = np.abs(got.astype(np.float64) - bounded.value)
    assert (difference <= bounded.error).all()
    assert finite.mean() > 0.99
    assert np.max(difference[finite] / bounded.error[finite]) > 0.3


def test_a_sign_near_zero_may_be_any_of_its_candidates_and_nothing_else() -> None:
    x = Bounded(np.array([1.0, 1e-9, 0.0]), np.array([1e-8, 1e-8, 0.0]), F32)
    sign = np.sign(x)
    for got, share in (
        ([1, 1, 0], 0),
        ([1, -1, 0], 0),
        ([1, 0, 0], 0),
        ([1, 0.5, 0], np.inf),
        ([-1, 1, 0], np.inf),
        ([1, 1, 1], np.inf),
    ):
        worst = compare("s", Stored.plain(np.array(got, np.float32)), sign)
        assert worst is not None
        assert worst.share == share


def test_infinities_and_nans_must_be_met() -> None:
    reference = Bounded(np.array([np.inf, np.nan, 1.0]), 0.0, F32)
    for got, fine in (
        ([np.inf, np.nan, 1], True),
        ([-np.inf, np.nan, 1], False),
        ([np.inf, 1, 1], False),
        ([np.inf, np.nan, np.nan], False),
        ([3e38, np.nan, 1], False),
    ):
        worst = compare("x", Stored.plain(np.array(got, np.float32)), reference)
        assert worst is not None
        assert (worst.share <= 1) is fine
    # What is beyond float32 overflows there; what a folded constant may move over the edge may.
    assert Bounded(np.array([1e42]), 0.0, F32).value[0] == np.inf
    edge = Bounded(np.array([1e39]), 0.0, F32)
    for any_value in (np.inf, np.nan, 3e38, 0.0):
        worst = compare("x", Stored.plain(np.array([any_value], np.float32)), edge)
        assert worst is not None
        assert worst.share == 0
    empty = Stored.plain(np.empty(0, np.float32))
    assert compare("x", empty, Bounded(np.empty(0), 0.0, F32)) is None


def test_a_sum_of_products_must_be_met_only_where_every_order_gives_it() -> None:
    inf, nan = np.inf, np.nan
    every = inf, -inf, nan, 0.0
    factors = Bounded(np.array([[1.0], [10], [0], [1e-9]]), np.array([[0], [0], [0], [1e-8]]), F32)
    for row, fine in (
        ([inf, 3, 3, 3], (inf,)),
        ([-inf, 3e37, 3, 3], (-inf,)),
        ([inf, -3e38, 3, 3], every),  # the others may have come to -inf before
        ([3e38, -3e38, 3, 3], every),
        ([3, 3, 3, inf], every),  # whose factor may have either sign
        ([inf, -inf, 3, 3], (nan,)),
        ([3, 3, inf, 3], (nan,)),
        ([3e38, 3e38, nan, 3], (nan,)),
        ([3, 3, 3, 3], ()),
    ):
        product = Bounded.exact(np.array([row]), F32) @ factors
        for got in every:
            worst = compare("x", Stored.plain(np.full((1, 1), got, F32)), product)
            assert worst is not None
            assert (worst.share <= 1) is (got in fine), (row, got)
    # What is in a sum with an element that may be anything may be anything as well, but for a NaN.
    factors = Bounded(np.array([[1.0], [5]]), np.array([[0], [np.inf]]), F32)
    for row, fine in (([inf, 3], every), ([0, 3], every), ([3, inf], every), ([nan, 3], (nan,))):
        product = Bounded.exact(np.array([row]), F32) @ factors
        for got in every:
            worst = compare("x", Stored.plain(np.full((1, 1), got, F32)), product)
            assert worst is not None
            assert (worst.share <= 1) is (got in fine), (row, got)


@pytest.mark.parametrize("decay", ["l2", "decoupled", "decoupled_first", "cautious", "independent"])
def test_a_wrong_decay_is_seen(decay: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    true_line = fo.AdamW.decay_line.fget  # type: ignore[attr-defined]
    wrong = property(lambda self: tuple(1.001 * c for c in true_line(self)))
    monkeypatch.setattr(fo.AdamW, "decay_line", wrong)
    rule = fo.AdamW(lr=0.5, weight_decay=0.5, decay=decay)
    assert one_step(rule, lambda after: None) > 1


MAGNITUDES = [1e-46, 1e-43, 1e-40, 1e-37, 1e-30, 1e-21, 1e-19, 1e-9, 1.0, 1e18, 1e19, 1e20, 1e38]


@pytest.mark.parametrize("lr", [1e-9, pytest.param(3.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", fo.RULES)
def test_right_steps_of_every_magnitude_are_accepted(name: str, lr: float) -> None:
    """From denormal gradients to those whose squares overflow."""
    rng = np.random.default_rng(0)
    draws = [rng.standard_normal((4, 3)) for _ in range(3)]
    every = [*variants(fo.RULES[name])]
    for rule in every if lr > 1 else every[:: 1 + len(every) // len(fo.RULES[name].examples)]:
        for magnitude in MAGNITUDES:
            for dtype, start in ((np.float64, 0.0), (np.float32, 1.0)):
                params = np.full((4, 3), start, np.float32)
                opt = fo.Optimizer(params, replace(rule, lr=lr), verify=True)
                for draw in draws:
                    with np.errstate(over="ignore", under="ignore"):
                        g = (magnitude * draw).astype(dtype)
                    try:
                        opt.step(g, hessian=g if rule.takes_hessian else None)
                    except ValueError as error:  # a rate that only denormal gradients make
                        refused = str(error)
                    else:
                        continue
                    assert rule.program.measures
                    assert magnitude < 1e-36
                    assert "is not finite in float32" in refused
                    break


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", [name for name in fo.RULES if name not in ELEMENTWISE])
def test_right_steps_of_matrices_of_changing_magnitude_are_accepted(name: str, dtype: Any) -> None:
    """Whose products BLAS adds up in an order of its own, and with some infinities."""
    rng = np.random.default_rng(0)
    every = [*variants(fo.RULES[name])]
    lowest, highest = np.log10([np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max])
    for _ in range(120):
        rule = replace(every[rng.integers(len(every))], lr=10.0 ** rng.integers(-9, 21))
        params = np.full((5, 7), rng.integers(2), dtype)
        opt = fo.Optimizer(params, rule, verify=True)
        for _ in range(4):
            with np.errstate(over="ignore", under="ignore"):
                magnitude = 10.0 ** rng.uniform(lowest, highest)
                g = (magnitude * rng.standard_normal((5, 7))).astype(dtype)
            if rng.random() < 0.1:
                g[3, 4] = np.inf
            opt.step(g)


@pytest.mark.parametrize("magnitude", [1e-15, 1e-9, 1.0, 1e9, 1e15])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_wrong_steps_of_every_magnitude_are_refused(name: str, magnitude: float) -> None:
    rule = fo.RULES[name](lr=0.1, weight_decay=0.0)
    rng = np.random.default_rng(1)
    g = (magnitude * rng.standard_normal(40)).astype(np.float32)
    p = np.zeros(40, np.float32)
    states = rule.init(p)
    for step in (1, 2, 3):
        before = [a.copy() for a in (p, *states)]
        fo.update(rule, step, p, g, *states)
    after = [Stored.plain(a) for a in (p, *states)]
    assert max(w.share for w in judge(rule, before, after, g, None, t=3, lr=0.1)) <= 1
    k = int(np.argmax(np.abs(p - before[0])))
    p[k] += np.float32(0.001) * (p[k] - before[0][k])
    wrong, *_ = judge(rule, before, after, g, None, t=3, lr=0.1)
    assert wrong.share > 1
