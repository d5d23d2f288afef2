"""No bias: rounded states are right in the mean, and the sign of the gradients does not matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from exactness import Array
from formatted import BLOCKED, F32, on_each_isa, stored
from fusedopt.arrays import formats
from fusedopt.arrays.formats import QUANTIZED, QUANTIZED_STOCHASTIC, STOCHASTIC, Blocks, Format

LIMITS = np.finfo(np.float32)
DRAWS = 2000
ROUNDINGS = pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
HALVES = ["bfloat16", "float16"]
names = pytest.mark.parametrize("name", BLOCKED)
every_name = pytest.mark.parametrize("name", [*BLOCKED, *HALVES])
SIGNED = [signed for signed, _ in (*QUANTIZED.values(), *QUANTIZED_STOCHASTIC.values())]
UNSIGNED = [unsigned.codec for _, unsigned in QUANTIZED_STOCHASTIC.values()]
ELEMENTWISE = [n for n, rule in fo.RULES.items() if not rule().program.matrices and rule().states]


def blocks_of(seed: int, size: int = 256) -> dict[str, Array]:
    """Blocks of elements, by what is special about them."""
    rng = np.random.default_rng(seed)
    heavy = rng.standard_cauchy(size)
    sign = np.where(np.arange(size) % 2, -1.0, 1.0)
    near = rng.uniform(0.98, 1.0, size)
    kinds = {
        "constant": np.full(size, 0.7),
        "alternating": 0.7 * sign,
        "two magnitudes": np.where(sign < 0, -0.7, 0.6999),
        "nearly as large": near * sign,
        "decaying": 0.9 ** np.arange(size) * sign,
        "heavy-tailed": heavy,
        "one outlier": np.where(np.arange(size) == 3, 40.0, rng.standard_normal(size)),
        "huge": 3e38 * near * sign,
    }
    return {name: x.astype(np.float32) for name, x in kinds.items()}


def gaps(format: Blocks, x: Array, scales: Array) -> Array:
    """How far apart the two values are that an element lies between."""
    values = np.sort(np.unique(format.map.astype(np.float64)))
    spread = np.repeat(scales.astype(np.float64), format.block)[: x.size]
    upper = np.searchsorted(values, x / spread).clip(1, values.size - 1)
    gap: Array = (values[upper] - values[upper - 1]) * np.abs(spread)
    return gap


@names
@pytest.mark.parametrize("kind", blocks_of(0))
@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_of_what_is_stored_is_the_element(name: str, kind: str, sign: int) -> None:
    """Within five standard deviations and half of a random bit; but what is below an unsigned
    format's least value becomes that value."""
    x = sign * blocks_of(1)[kind]
    for format, elements in zip(QUANTIZED_STOCHASTIC[name], (x, np.abs(x)), strict=True):
        _, scales = format.encode(elements)
        read = format.decode(*format.encode(np.tile(elements, DRAWS), 7)).reshape(DRAWS, -1)
        got = read.mean(axis=0, dtype=np.float64)
        gap, wide = gaps(format, elements, scales), elements.astype(np.float64)
        low = np.zeros(x.size, bool)
        if format.map.min() >= 0:
            values = np.sort(np.unique(format.map))
            least = values[values > 0][0] * np.repeat(scales, format.block)[: x.size]
            low = elements < least
            assert (read[:, low] == least[low]).all()
        bound = gap * (2.5 / DRAWS**0.5 + 2.0**-17) + 4 * LIMITS.eps * np.abs(wide)
        np.testing.assert_array_less(np.abs(got - wide)[~low], bound[~low] + 1e-300)
        assert not low.all()


RANDOM = [*STOCHASTIC.values(), *(f for pair in QUANTIZED_STOCHASTIC.values() for f in pair)]


@pytest.mark.parametrize("format", RANDOM, ids=[f.codec for f in RANDOM])
def test_the_mean_over_all_random_bits(format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right to half a step of the 16 bits, of 2^-16 of what separates two values: exactly so in
    bfloat16, cut off among float16's denormals. Smaller elements are lost."""
    monkeypatch.setattr(formats, "random_bits", lambda key, n: np.arange(n, dtype=np.uint32))
    for y in np.geomspace(1e-9, 0.88, 60):
        for sign in (1,) if format.codec in UNSIGNED else (1, -1):
            x = np.full(2**16, sign * y, np.float32)
            if not isinstance(format, Blocks):
                mean = format.decode(*format.encode(x)).mean(dtype=np.float64)
                short = sign * (x[0].astype(np.float64) - mean)
                assert 0 <= short <= (2.0**-40 if format.name == "float16" else 0)
                continue
            x *= np.float32(format.largest)
            scales = np.ones(2**16 // format.block, np.float32)
            read = format.decode(*format.encode(x, scales=scales)).astype(np.float64)
            if format.codec in UNSIGNED and x[0] < format.smallest:
                np.testing.assert_allclose(read, format.smallest, rtol=1e-6)
            else:
                bound = gaps(format, x[:1], scales[:1]) * 2.0**-17 + LIMITS.eps * abs(x[0])
                assert abs(read.mean() - x[0]) <= bound


@pytest.mark.parametrize("format", SIGNED, ids=[f"{f.codec}" for f in SIGNED])
@pytest.mark.parametrize("kind", blocks_of(0))
def test_no_element_is_cut_off(format: Blocks, kind: str) -> None:
    """Every element is between the least and the largest value, whatever the signs in its block."""
    for x in (blocks_of(2)[kind], -blocks_of(2)[kind]):
        codes, scales = format.encode(x, 5)
        y = x / np.repeat(scales, format.block).astype(np.float64)
        few = 4 * LIMITS.eps * format.largest
        assert -format.opposite - few <= y.min()
        assert y.max() <= format.largest + few
        assert np.abs(y).reshape(-1, format.block).max(axis=1).min() >= format.opposite - few
        if kind in ("constant", "alternating"):
            np.testing.assert_allclose(format.decode(codes, scales), x, rtol=5e-7)


@pytest.mark.parametrize("format", SIGNED, ids=[f"{f.codec}" for f in SIGNED])
def test_a_scale_stays_finite(format: Blocks) -> None:
    x = LIMITS.max * np.where(np.arange(256) % 2, -1, 1).astype(np.float32)
    for isa in on_each_isa():
        state = stored(format, np.tile(x, 16))
        np.testing.assert_allclose(state.dequantize(), np.tile(x, 16), rtol=0.12, err_msg=isa)


def values_of(state: Any) -> Array:
    """The values of a state."""
    values: Array = state if isinstance(state, np.ndarray) else state.dequantize()
    return values.astype(np.float64)


def gradients(kind: str, t: int, n: int) -> Array:
    """The t-th gradient of a run of this kind; block after block of another magnitude."""
    rng = np.random.default_rng(t)
    alternating = np.where(np.arange(n) % 2, -1.0, 1.0)
    scale = 10.0 ** (np.arange(n) // 256 % 5 - 2)
    values = {
        "constant": np.ones(n),
        "negative": -np.ones(n),
        "alternating": alternating,
        "turning": np.full(n, (-1.0) ** t),
        "decaying": 0.97**t * alternating,
        "heavy-tailed": 0.3 * alternating + rng.standard_t(2.0, n),
        "heavy-tailed, negative": -1.0 + rng.standard_t(2.0, n),
    }
    found: Array = (scale * values[kind]).astype(np.float32)
    return found


KINDS = (
    "constant",
    "negative",
    "alternating",
    "turning",
    "decaying",
    "heavy-tailed",
    "heavy-tailed, negative",
)


@every_name
@pytest.mark.parametrize("kind", KINDS)
def test_averages_over_a_run_are_those_of_float32(name: str, kind: str) -> None:
    """Elements of either sign within six standard errors of what their averages are without
    rounding, in units of their block's largest."""
    n, steps = 20 * 256, 300
    rule = fo.Momentum(momentum=0.98)
    p = {"q": np.zeros(n, np.float32)}
    opt = fo.Optimizer(p, rule, state_dtype=name, rounding="stochastic", seed=4)
    exact = np.zeros(n)
    for t in range(steps):
        g = gradients(kind, t, n)
        opt.step({"q": g})
        exact = 0.98 * exact + 0.02 * g.astype(np.float64)
    largest = np.repeat(np.abs(exact).reshape(-1, 256).max(axis=1), 256)
    off = (values_of(opt.state["q"]["v"]) - exact) / largest
    for chosen in (exact > 0, exact < 0):
        if chosen.any():
            error = off[chosen].std() / chosen.sum() ** 0.5
            assert abs(off[chosen].mean()) < 6 * error + 1e-4


@every_name
@pytest.mark.parametrize("kind", KINDS)
def test_averages_of_squares_over_a_run_are_those_of_float32(name: str, kind: str) -> None:
    """States without a sign have that mean too, but where a block's elements lie below a format's
    least value: these may come out larger, by that value at most."""
    n, steps = 20 * 256, 150
    p = {"q": np.zeros(n, np.float32)}
    rule = fo.RMSProp(rho=0.98)
    opt = fo.Optimizer(p, rule, state_dtype=name, rounding="stochastic", seed=4)
    exact = np.zeros(n)
    for t in range(steps):
        g = gradients(kind, t, n).clip(-200, 200)  # squares that float16 can hold
        opt.step({"q": g})
        exact = 0.98 * exact + 0.02 * g.astype(np.float64) ** 2
    largest = np.repeat(np.abs(exact).reshape(-1, 256).max(axis=1), 256)
    off = (values_of(opt.state["q"]["v"]) - exact) / largest
    least = 0.0
    if name in QUANTIZED:
        format = QUANTIZED[name][True]
        least = format.smallest / format.largest
    above = least if (exact < 2 * least * largest).any() else 0.0
    error = off.std() / n**0.5
    assert -6 * error - 1e-4 < off.mean() < above + 6 * error + 1e-4
    assert above == 0 or (name, kind.partition(",")[0]) == ("dynamic4", "heavy-tailed")


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_move_as_those_in_float32(name: str, kind: str) -> None:
    """By steps far below what separates two values, those of either sign and in the mean."""
    n, steps, lr = 20 * 256, 100, 2.0**-14
    sign = np.where(np.arange(n) // 2 % 2, -1.0, 1.0)
    start = sign * np.random.default_rng(5).uniform(1.0, 2.0, n)
    p = start.astype(name)
    opt = fo.Optimizer(p, fo.SGD(lr=lr), rounding="stochastic", seed=4)
    exact = p.astype(np.float64)
    for t in range(steps):
        g = gradients(kind, t, n).clip(-200, 200)
        opt.step(g)
        exact -= lr * g.astype(np.float64)
    off = p.astype(np.float64) - exact
    for chosen in (start > 0, start < 0):
        error = off[chosen].std() / chosen.sum() ** 0.5
        assert abs(off[chosen].mean()) < 6 * error + 1e-5


@names
@ROUNDINGS
def test_a_constant_gradient_of_either_sign_is_its_own_average(name: str, rounding: str) -> None:
    """Also where both signs are in one block: for each, the average comes to the gradient."""
    options: dict[str, Any] = {"state_dtype": name, "rounding": rounding}
    for beta in (0.9, 0.99):
        for g in (gradients(kind, 0, 4096) for kind in ("constant", "negative", "alternating")):
            p = np.zeros(4096, np.float32)
            opt = fo.Optimizer(p, fo.Lion(betas=(0.9, beta)), **options)
            for _ in range(700):
                opt.step(g)
            np.testing.assert_allclose(opt.state["params"]["m"].dequantize(), g, rtol=1e-3)


def _run(rule: fo.Rule, sign: int, **options: Any) -> tuple[Array, dict[str, Array]]:
    rng = np.random.default_rng(8)
    p = sign * rng.standard_normal(5003).astype(np.float32)
    opt = fo.Optimizer(p, rule, backend="native", **options)
    for _ in range(3):
        g = sign * rng.standard_t(2.0, p.size).astype(np.float32)
        curvature = abs(g) if rule.takes_hessian else None
        opt.step(g, hessian=curvature)
    states = opt.state["params"]
    return p, {k: values_of(s) for k, s in states.items()}


@every_name
@ROUNDINGS
@pytest.mark.parametrize("rule", ELEMENTWISE)
def test_negated_gradients_negate_states_and_steps(rule: str, name: str, rounding: str) -> None:
    made = fo.RULES[rule](weight_decay=0.1)
    for isa in on_each_isa():
        p, states = _run(made, 1, state_dtype=name, rounding=rounding)
        q, turned = _run(made, -1, state_dtype=name, rounding=rounding)
        np.testing.assert_array_equal(p, -q, isa)
        for key, values in states.items():
            either = key in made.kept or bool((values >= 0).all())
            same = np.array_equal(values, turned[key]) and either
            assert same or np.array_equal(values, -turned[key]), f"{isa}: {key}"


@pytest.mark.parametrize("format", SIGNED, ids=[f"{f.codec}" for f in SIGNED])
def test_codes_of_negated_elements(format: Format) -> None:
    x = np.random.default_rng(9).standard_cauchy(5003).astype(F32)
    read, turned = (format.decode(*format.encode(a, 3))[:5003] for a in (x, -x))
    np.testing.assert_array_equal(read, -turned)
