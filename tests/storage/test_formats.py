"""Each storage format of the compiled core, element by element and block by block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from exactness import Array
from formatted import (
    BF16,
    F16,
    F32,
    F64,
    SIZES,
    assert_same,
    loaded,
    on_each_isa,
    published_map,
    quantized,
    stored,
)
from fusedopt.arrays.formats import QUANTIZED, Format

SMALLEST = np.finfo(np.float32).smallest_normal
HALVES = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
FORMATS = [format for pair in QUANTIZED.values() for format in pair]
formats = pytest.mark.parametrize("format", FORMATS, ids=[f.codec for f in FORMATS])
floats = pytest.mark.parametrize(
    "format", QUANTIZED["float8"], ids=[f.codec for f in QUANTIZED["float8"]]
)

# ---------------------------------------------------------------- two bytes that stand alone


def patterns(dtype: Any) -> Array:
    return np.arange(1 << 16, dtype=np.uint16).view(dtype)


def awkward(dtype: Any) -> Array:
    """float32: all that the dtype has, half ways between, and the next numbers to each side."""
    with np.errstate(invalid="ignore"):
        values = patterns(dtype).astype(np.float32)
    finite = np.unique(values[np.isfinite(values)]).astype(np.float64)
    last = finite[-1] + (finite[-1] - finite[-2]) / 2  # from here on it is infinity
    middles = np.append((finite[1:] + finite[:-1]) / 2, last)
    halfway = np.concatenate((middles, -middles)).astype(np.float32)
    limits = np.finfo(np.float32)
    more = np.array([1e5, 65535.99, 65536, limits.max, np.inf, np.nan, 1e-45, SMALLEST], F32)
    return np.concatenate(
        (
            values,
            halfway,
            np.nextafter(halfway, np.float32(np.inf)),
            np.nextafter(halfway, np.float32(-np.inf)),
            more,
            -more,
        )
    )


@HALVES
@pytest.mark.parametrize("wide", [F32, F64], ids=["float32", "float64"])
def test_every_pattern_is_decoded_as_by_a_cast(dtype: Any, wide: Any) -> None:
    g = patterns(dtype)
    # With p = -1 in the second half, a zero's sign cannot be seen in either.
    start = np.repeat(np.array([0, -1], wide), [g.size, g.size])
    for isa in on_each_isa():
        p = start.copy()
        fo.Optimizer(p, fo.SGD(lr=1.0)).step(np.tile(g, 2))
        with np.errstate(invalid="ignore"):
            want = start - np.tile(g, 2).astype(wide)
        assert_same({"p": p}, {"p": want}, isa)


@HALVES
def test_every_pattern_is_itself_again(dtype: Any) -> None:
    for isa in on_each_isa():
        p, copy = patterns(dtype), np.ones(1 << 16)
        fo.Optimizer(p, fo.SGD(lr=1.0), copy_out=copy).step(np.zeros(1 << 16))
        with np.errstate(invalid="ignore"):
            want = {"p": patterns(dtype), "copy": patterns(dtype).astype(np.float64)}
        assert_same({"p": p, "copy": copy}, want, isa)


@HALVES
def test_nearest_is_that_of_a_cast(dtype: Any) -> None:
    x = awkward(dtype)
    assert x.size > 4 * 65000
    with np.errstate(all="ignore"):
        want = {"p": (np.float32(0) - x).astype(dtype), "copy": x.astype(dtype)}
    for isa in on_each_isa():
        p, q, copy = np.zeros(x.size, dtype), x.copy(), np.ones(x.size, dtype)
        fo.Optimizer(p, fo.SGD(lr=1.0)).step(x)
        fo.Optimizer(q, fo.SGD(lr=1.0), copy_out=copy).step(np.zeros(x.size, dtype))
        assert_same({"p": p, "copy": copy}, want, isa)


@HALVES
def test_from_float64_by_way_of_float32(dtype: Any) -> None:
    with np.errstate(invalid="ignore"):
        near = awkward(dtype).astype(np.float64)
    x = np.concatenate((near * (1 + 2**-40), near * (1 - 2**-40), near, [1e300, 1e-300]))
    with np.errstate(all="ignore"):
        want = {"copy": x.astype(np.float32).astype(dtype)}
    for isa in on_each_isa():
        copy = np.ones(x.size, dtype)
        fo.Optimizer(x.copy(), fo.SGD(lr=1.0), copy_out=copy).step(np.zeros(x.size))
        assert_same({"copy": copy}, want, isa)


# ---------------------------------------------------------------- blocks


def blocks(format: Format, n: int, seed: int = 0) -> Array:
    """float32 values, each block of another magnitude; some of equal values, some of zeros."""
    rng = np.random.default_rng(seed)
    kinds = -(-n // format.block)
    scale = np.repeat(10.0 ** rng.uniform(-36, 37, kinds), format.block)[:n]
    spread = np.repeat(rng.choice([0.1, 1, 4, 12], kinds), format.block)[:n]
    x = scale * 10.0 ** (-np.abs(rng.standard_normal(n)) * spread)
    x *= rng.choice([-1.0, 1.0], n)
    kind = np.repeat(np.arange(kinds), format.block)[:n]
    x[kind % 16 == 3] = 0.0
    x[kind % 16 == 5] = 1.5 * SMALLEST
    x[kind % 16 == 7] = 3e38
    x[rng.random(n) < 0.03] = 0.0
    x = x.astype(np.float32)
    if format in [unsigned for _, unsigned in QUANTIZED.values()]:
        x = np.abs(x)
    return np.where(np.abs(x) < SMALLEST, np.float32(0), x)


@formats
@pytest.mark.parametrize("n", SIZES)
def test_codes_and_scales_are_those_of_numpy(format: Format, n: int) -> None:
    x = blocks(format, n)
    codes, scales = format.encode(x)
    for isa in on_each_isa():
        for values in (x, x.astype(np.float64)):
            got = stored(format, values)
            assert_same(
                {"codes": got.codes, "scales": got.scales},
                {"codes": codes, "scales": scales},
                f"{isa} {values.dtype}",
            )
        np.testing.assert_array_equal(got.dequantize(), format.decode(codes, scales)[:n])


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize(
    ("rule", "signed"), [(fo.Momentum(momentum=0.0), True), (fo.RMSProp(rho=0.0), False)]
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_optimizers_choose_the_format_by_sign(
    rule: fo.Rule, signed: bool, name: str, backend: str
) -> None:
    format = QUANTIZED[name][0 if signed else 1]
    x = blocks(format, 5003) if signed else np.sqrt(blocks(format, 5003))
    optimizer = fo.Optimizer(np.zeros_like(x), rule, state_dtype=name, backend=backend)
    optimizer.step(x)
    state = optimizer.state["params"]["v"]
    codes, scales = format.encode(x if signed else x * x)
    want = {"codes": codes, "scales": scales}
    assert_same({"codes": state.codes, "scales": state.scales}, want)
    assert repr(state) == f"Quantized({name}, shape=(5003,), {state.nbytes} bytes)"


@formats
def test_every_code_has_its_published_value(format: Format) -> None:
    count = 1 << format.bits
    scales = np.array([1.0, 2.0**-90, 0.1, 2.0**100], np.float32)
    state = quantized(format, scales.size * format.block)
    state.scales[...] = scales
    codes = np.tile(np.arange(count, dtype=np.uint8), state.size // count)
    if format.codec == "e4m3":
        codes[codes & 127 == 127] = 0  # the two codes of NaN, which it never stores
    want = published_map(format.codec)[codes] * np.repeat(scales, format.block).astype(np.float64)
    state.codes[...] = codes if format.bits == 8 else codes[::2] << 4 | codes[1::2]
    np.testing.assert_allclose(state.dequantize(), want, rtol=1e-6, atol=0)
    kept = state.codes.copy()
    for isa in on_each_isa():
        state.codes[...], state.scales[...] = kept, scales
        with np.errstate(all="raise"):
            np.testing.assert_array_equal(loaded(state), format.decode(kept, scales), isa)


def unpacked(format: Format, codes: Array, n: int) -> Array:
    both = np.stack((codes >> 4, codes & 15), axis=-1).reshape(-1)
    return codes if format.bits == 8 else both[:n]


@formats
@pytest.mark.parametrize("n", SIZES[:3])
def test_each_code_is_the_nearest(format: Format, n: int) -> None:
    x = blocks(format, n, seed=1)
    state = stored(format, x)
    scales = np.repeat(state.scales, format.block)[:n].astype(np.float64)
    live = scales != 0
    values = published_map(format.codec)
    y = x[live] / scales[live]
    distance = np.abs(y[:, None] - values)
    distance = np.where(np.isnan(distance), np.inf, distance)
    if format.codec in ("e5m3", "dynamic8_unsigned"):  # only zero becomes zero
        distance[:, 0] = np.where(y == 0, -1.0, np.inf)
    codes = unpacked(format, state.codes, n)[live]
    best, got = distance.min(axis=1), distance[np.arange(y.size), codes]
    np.testing.assert_array_less(got - best, 4e-7 * np.abs(y) + 1e-300)


@formats
def test_nothing_unsigned_that_is_not_zero_becomes_zero(format: Format) -> None:
    x = blocks(format, 5003)
    state = stored(format, x)
    values = state.dequantize()
    unsigned = format.zero == 0 and format.codec != "e4m3"
    # But in blocks of which a code would be a denormal: they are zero altogether.
    scales = np.repeat(state.scales, format.block)[: x.size]
    kept = scales != 0
    assert kept.any()
    assert not kept.all()
    assert ((values == 0) & (x != 0) & kept).any() == (not unsigned)
    if format.codec != "dynamic4_unsigned":  # whose zeros are 1/16 of the block's largest
        assert not values[x == 0].any()
    if format.codec != "e4m3":  # which has a zero of either sign
        np.testing.assert_array_equal(np.signbit(values[values == 0]), scales[values == 0] < 0)


@floats
def test_float8_is_stored_again_unchanged(format: Format) -> None:
    state = stored(format, blocks(format, 100_003))
    again = stored(format, state.dequantize())
    # A zero may lose its sign on the way: 0 v + g is +0 for -0.
    zero = state.dequantize() == 0
    np.testing.assert_array_equal(again.codes[~zero], state.codes[~zero])
    np.testing.assert_allclose(again.scales, state.scales, rtol=1e-6)


@formats
def test_averages_do_not_get_stuck(format: Format) -> None:
    """Growing as an average does from zero, and decaying, by less than a code's spacing a step.

    A scale that moved in steps of its own would leave the codes where they are.
    """
    state, p = quantized(format, 4096), np.zeros(4096, np.float32)
    rule = fo.Momentum(momentum=0.99)
    # One code for all, so that the scale alone has to move.
    for t in range(1, 1001):
        fo.update(rule, t, p, np.ones(4096, np.float32), state)
    np.testing.assert_allclose(state.dequantize(), 1.0, rtol=0.01)
    for t in range(100):
        fo.update(rule, t + 1001, p, np.zeros(4096, np.float32), state)
    np.testing.assert_allclose(state.dequantize(), 0.99**100, rtol=0.01)


@formats
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", SIZES[:3])
def test_a_bad_element_spoils_its_block_and_no_other(format: Format, bad: float, n: int) -> None:
    x = np.abs(np.random.default_rng(0).standard_normal(n)).astype(np.float32)
    want = stored(format, x).dequantize()
    for at in (0, format.block, 1000, n - 1):
        spoilt = x.copy()
        spoilt[at] = bad
        first = at // format.block * format.block
        expected = want.copy()
        expected[first : first + format.block] = np.nan
        for isa in on_each_isa():
            state = stored(format, spoilt)
            np.testing.assert_array_equal(state.dequantize(), expected, isa)
            assert_same({"p": loaded(state)}, {"p": expected}, isa)


@formats
@pytest.mark.parametrize("n", SIZES[:3])
def test_blocks_of_zeros(format: Format, n: int) -> None:
    for values in (np.zeros(n), np.full(n, -0.0)):
        for isa in on_each_isa():
            state = stored(format, values.astype(np.float32))
            assert not state.scales.any(), isa
            assert (state.codes == format.zero).all(), isa
            assert not loaded(state).any(), isa
            assert not state.dequantize().any(), isa
            assert not np.signbit(state.dequantize()).any(), isa


@pytest.mark.parametrize("format", QUANTIZED["dynamic4"], ids=["signed", "unsigned"])
def test_an_odd_last_element_has_half_a_byte(format: Format) -> None:
    x = blocks(format, 4097, seed=2)
    x[-1] = 0.25
    state = stored(format, x)
    assert state.codes.size == 2049
    assert state.codes[-1] & 15 == format.zero & 15
    assert state.dequantize()[-1] == 0.25  # the largest of its block


@formats
def test_float64_below_float32s_range(format: Format) -> None:
    # States of float64 parameters may be smaller than any number that the format has.
    x = np.abs(np.random.default_rng(3).standard_normal(5003)) * 1e-40
    x[::3] = 0.0
    for isa in on_each_isa():
        values = stored(format, x).dequantize()
        denormal = (values != 0) & (np.abs(values) < SMALLEST)
        assert not denormal.any(), isa
