"""A whole step in one native call has the bits, `StepInfo` and errors of Python's decisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedopt as fo
from fusedopt import schedules
from fusedopt.schedules import formula_of

DTYPES = (np.float32, np.float64, ml_dtypes.bfloat16, np.float16)

SCHEDULES = {
    "constant": schedules.Constant(0.1),
    "warm constant": schedules.Constant(0.3, warmup=7.5),
    "linear": schedules.Linear(0.1, steps=900, warmup=13, final=0.07),
    "linear without a warm-up": schedules.Linear(0.1, steps=901),
    "polynomial": schedules.Polynomial(1e-3, steps=777, warmup=2.5, final=0.01, power=1.7),
    "flat polynomial": schedules.Polynomial(1e-3, steps=777, power=0.0),
    "cosine": schedules.Cosine(3e-4, steps=1000, warmup=100, final=0.1),
    "cosine without a warm-up": schedules.Cosine(3e-4, steps=997),
    "linear decay": schedules.WarmupStableDecay(0.2, steps=800, warmup=20, decay=300),
    "cosine decay": schedules.WarmupStableDecay(0.2, steps=800, decay=333.3, form="cosine"),
    "root decay": schedules.WarmupStableDecay(0.2, steps=800, decay=90, form="sqrt", final=0.03),
    "one cycle": schedules.OneCycle(0.7, steps=950),
    "restarts": schedules.CosineRestarts(0.2, period=10, growth=1.3, final=0.2),
    "equal restarts": schedules.CosineRestarts(0.2, period=17),
    "stair": schedules.Step(0.1, every=37, factor=0.83),
    "stair to nothing": schedules.Step(0.1, every=500, factor=0.0),
    "exponential": schedules.Exponential(0.1, factor=0.95, every=3),
    "inverse square root": schedules.InverseSqrt(0.02, warmup=40),
    "product": schedules.Constant(0.1, warmup=50) * schedules.Cosine(0.9, steps=1000),
    "sequence": schedules.Sequential(
        (
            schedules.Linear(0.1, steps=100),
            2.0 * schedules.Exponential(0.3, factor=0.99),
            schedules.CosineRestarts(0.1, period=30),
        ),
        at=(100, 345),
    ),
}
"""Every kind that the core knows, with every branch of it."""


def test_there_is_a_schedule_of_every_kind() -> None:
    kinds = {type(schedule) for schedule in SCHEDULES.values()}
    named = {cls for cls in vars(schedules).values() if isinstance(cls, type)}
    named = {cls for cls in named if issubclass(cls, schedules.Schedule) and cls.__name__[0] != "_"}
    assert named - kinds == {schedules.Schedule, schedules.ReduceOnPlateau}


def whole(optimizer: fo.Optimizer) -> Any:
    step = optimizer._assembly.whole_step
    assert step is not None
    return step


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_have_pythons_bits(name: str) -> None:
    schedule = SCHEDULES[name]
    optimizer = fo.Optimizer(np.zeros(1), fo.SGD(lr=schedule))
    step, g, counters = whole(optimizer), np.zeros(1), optimizer._assembly.counters
    for t in [*range(1, 1500), *np.random.default_rng(0).integers(1, 10**7, 300).tolist()]:
        counters[0] = t - 1
        info = step(g, None, 1.0, None)
        assert (info.step, info.lr) == (t, schedule(t))


class Halved(schedules.Cosine):
    def __call__(self, step: int) -> float:
        return super().__call__(step) / 2


def test_what_only_python_knows_is_asked_of_python() -> None:
    changed = Halved(0.1, steps=9)
    plateau = schedules.ReduceOnPlateau(0.1, patience=0)
    assert all(formula_of(s) is None for s in (changed, plateau, changed * 0.5, lambda step: 0.1))
    optimizer = fo.Optimizer(np.zeros(3), fo.SGD(lr=changed))
    assert [optimizer.step(np.ones(3)).lr for _ in range(3)] == [changed(t) for t in (1, 2, 3)]
    optimizer.lr = plateau
    for loss in (1.0, 2.0, 3.0):
        plateau.tell(loss)
    assert optimizer.step(np.ones(3)).lr == pytest.approx(1e-3)


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"stats": True}])
def test_a_schedule_of_ones_own_is_asked_once_a_step(options: dict[str, Any]) -> None:
    asked = []

    def lr(step: int) -> float:
        asked.append(step)
        return 0.1 * step

    optimizer = fo.Optimizer(np.zeros(3), fo.SGD(lr=lr), skip_nonfinite=True, **options)
    for g in (np.ones(3), np.full(3, np.nan), np.ones(3)[::-1], np.ones(3, np.float32)):
        optimizer.step(g)
    assert asked == [1, 2, 2, 3]


def test_a_learning_rate_that_is_none_is_refused() -> None:
    large = schedules.Constant(1e200) * schedules.Constant(1e200)
    optimizer = fo.Optimizer(np.zeros(3), fo.SGD(lr=large))
    with pytest.raises(ValueError, match=r"SGD\(lr\) at step 1: .* got inf"):
        optimizer.step(np.ones(3))
    assert optimizer.step_count == 0


@pytest.mark.parametrize("scale", [0, -1.0, np.nan, np.inf, 1e-300, True, "2", None, 10**400])
def test_scales_are_refused_as_python_refuses_them(scale: Any) -> None:
    p = np.zeros(3, np.float32)
    optimizer = fo.Optimizer(p, fo.SGD())
    assert whole(optimizer)(p.copy(), None, scale, None) is None
    with pytest.raises((TypeError, ValueError), match="grad_scale"):
        optimizer.step(p.copy(), grad_scale=scale)


# ---------------------------------------------------------------- drawn optimizers

LRS: list[Any] = [0.01, SCHEDULES["cosine"], SCHEDULES["sequence"], lambda step: 0.1 / step]
RULES: list[Callable[[Any], fo.Rule]] = [
    lambda lr: fo.AdamW(lr=lr),
    lambda lr: fo.SGD(lr=lr, weight_decay=0.1),
    lambda lr: fo.Sophia(lr=lr),
    lambda lr: fo.Lion(lr=lr, maximize=True),
    # Of sums over a parameter, and, with numbers that are kept, over all.
    lambda lr: fo.LAMB(lr=lr, weight_decay=0.1),
    lambda lr: fo.CautiousAdamW(lr=lr),
    lambda lr: fo.Prodigy(lr=lr, d0=0.1),
]
SIZES = (0, 1, 5, 300)
UNITS = (1.0, 1e-3, 1e-30, 5e-324, 1e-160, 1e30, 1e160, 1e300, 0.0)
WRONG = (np.nan, np.inf, -np.inf)


@st.composite
def gradients(draw: st.DrawFn, params: dict[str, np.ndarray]) -> dict[str, Any]:
    """A gradient for each parameter: None, Rows, in another layout or dtype, NaN, of any size."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    found: dict[str, Any] = {}
    for name, p in params.items():
        kind = draw(st.sampled_from(["plain"] * 6 + ["none", "rows", "wrong", "turned"]))
        with np.errstate(all="ignore"):
            unit = draw(st.sampled_from(UNITS))
            g = (rng.standard_normal(p.shape) * unit).astype(
                draw(st.sampled_from([p.dtype, np.dtype("f")]))
            )
        if kind == "none":
            found[name] = None
        elif kind == "rows" and p.ndim == 2 and p.size:
            found[name] = fo.Rows(np.array([1, 0]), g[:2].copy())
        elif kind == "turned":
            found[name] = np.asfortranarray(g)
        else:
            if kind == "wrong" and p.size:
                g.flat[p.size // 2] = draw(st.sampled_from(WRONG))
            found[name] = g
    return found


@st.composite
def optimizers(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], Any, dict[str, Any]]:
    """Parameters, a rule or several, and options."""
    rng = np.random.default_rng(0)
    params = {}
    for k in range(draw(st.integers(1, 5))):
        size = draw(st.sampled_from(SIZES))
        shape = (size,) if draw(st.booleans()) else (2, size)
        params[f"{'ab'[k % 2]}{k}"] = rng.standard_normal(shape).astype(
            draw(st.sampled_from(DTYPES))
        )
    rules = [draw(st.sampled_from(RULES))(draw(st.sampled_from(LRS))) for _ in range(2)]
    several = len(params) > 1 and draw(st.booleans())
    limits = st.sampled_from([None, 0.5, 1e-300, 1e200])
    options: dict[str, Any] = {
        name: draw(st.booleans()) for name in ("skip_nonfinite", "stats", "zero_grads")
    }
    clip = draw(st.sampled_from(["none", "norm", "groups", "value"]))
    if clip == "norm":
        options["clip_norm"] = draw(limits)
    elif clip == "groups" and several:
        options["clip_norm"] = {"a*": draw(limits), "b*": draw(limits)}
    elif clip == "value":
        options["clip_value"] = 0.5
    if draw(st.booleans()):
        options["ema"] = 0.9
    if draw(st.booleans()):
        options["slow_weights"] = fo.Lookahead(k=2)
    return params, dict(zip(("a*", "b*"), rules, strict=True)) if several else rules[0], options


def outcome(optimizer: fo.Optimizer, grads: Any, scale: Any) -> tuple[str, str]:
    """What a step returned or raised, with every bit of its numbers, and every bit of the rest."""
    try:
        result = repr(optimizer.step(grads, grad_scale=scale))
    except (FloatingPointError, ValueError) as error:
        result = str(error)
    return result, optimizer.fingerprint()


def copied(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: g.copy(order="K") if isinstance(g, np.ndarray) else g for name, g in tree.items()}


@pytest.mark.parametrize("name", fo.RULES)
def test_every_rule_but_those_of_matrices_is_one_call(name: str) -> None:
    rule = fo.RULES[name]()
    p = np.ones((4, 3))
    alone = fo.Optimizer({"p": p}, rule, clip_norm=1.0, stats=True)
    assert (alone._assembly.whole_step is None) == rule.program.matrices
    if rule.program.measures:
        assert fo.Optimizer({"p": p}, rule, centralize=True)._assembly.whole_step is None


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_native_step_is_that_of_python(data: st.DataObject) -> None:
    params, rule, options = data.draw(optimizers())
    one = fo.Optimizer(copied(params), rule, **options)
    two = fo.Optimizer(copied(params), rule, **options)
    assert one._assembly.whole_step is not None
    two._assembly._whole = two._assembly.whole_step = None
    for _ in range(3):
        grads = data.draw(gradients(params))
        others = {
            name: fo.Rows(g.indices, g.values.copy()) if isinstance(g, fo.Rows) else g
            for name, g in copied(grads).items()
        }
        scale = data.draw(st.sampled_from([1.0, 1.0, 2, 0.37, np.float64(3.0), np.float32(1e-3)]))
        assert outcome(one, grads, scale) == outcome(two, others, scale)
        for g, other in zip(grads.values(), others.values(), strict=True):
            a, b = (x.values if isinstance(x, fo.Rows) else x for x in (g, other))
            assert (a is None and b is None) or a.tobytes() == b.tobytes()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([1, 30, 500]))
def test_norms_of_many_leaves_do_not_depend_on_their_order(
    seed: int, count: int, spread: int
) -> None:
    # Squares are added up exactly and rounded once; with a large spread they leave the range.
    rng = np.random.default_rng(seed)
    exponents = rng.integers(-spread, spread, count)
    leaves = [np.ldexp(rng.uniform(0.5, 1.0, 1), e) for e in exponents]
    optimizer = fo.Optimizer([np.zeros(1) for _ in leaves], fo.SGD(lr=0.0), skip_nonfinite=True)
    step = whole(optimizer)
    expected = fo.global_norm(leaves)
    for order in (leaves, leaves[::-1], sorted(leaves, key=np.sum)):
        assert step(order, None, 1.0, None).grad_norm == expected
