"""Unscaling, clipping, skipping and statistics: one transaction with the step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from exactness import DEFAULTS, DTYPES, STEPS, Array, assert_same_bits, case, stepped
from fusedopt.verify import STORAGES

N = 20_011
BACKENDS = ("native", "numba", "reference")

rng = np.random.default_rng(3)
default_rules = pytest.mark.parametrize("rule", DEFAULTS.values(), ids=DEFAULTS)


def scaled(rule: fo.Rule, dtype: Any, change: Callable[[Array], Array], **options: Any) -> None:
    """Steps with options have the bits of steps on changed gradients without."""
    plain = case(rule, N, dtype)
    got = stepped(rule, [plain], **options)[0]
    changed = type(plain)(plain.p, plain.states, tuple(map(change, plain.grads)), plain.hessians)
    want = stepped(rule, [changed])[0]
    assert_same_bits(got, want, f"{rule} {options}")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@default_rules
def test_clip_norm_has_the_bits_of_multiplied_gradients(rule: fo.Rule, dtype: Any) -> None:
    def clipped(g: Array) -> Array:
        norm = fo.global_norm(g)
        return g * g.dtype.type(0.37 / norm) if norm > 0.37 else g

    scaled(rule, dtype, clipped, clip_norm=0.37)
    scaled(rule, dtype, lambda g: g, clip_norm=1e9)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@default_rules
def test_clip_value_has_the_bits_of_clipped_gradients(rule: fo.Rule, dtype: Any) -> None:
    limit = float(dtype(0.02))
    scaled(rule, dtype, lambda g: np.clip(g, dtype(-limit), dtype(limit)), clip_value=limit)
    ascending = type(rule)(maximize=True)
    scaled(ascending, dtype, lambda g: np.clip(g, dtype(-limit), dtype(limit)), clip_value=limit)


@default_rules
def test_everything_at_once_changes_no_bit_of_a_step(rule: fo.Rule) -> None:
    plain = case(rule, N, np.float32)
    results = []
    for options in ({}, {"stats": True, "ema": 0.9, "skip_nonfinite": True}):
        p = plain.p.copy()
        opt = fo.Optimizer(p, rule, **options)  # type: ignore[arg-type]
        for g, h in zip(plain.grads, plain.hessians, strict=True):
            opt.step(g, hessian=h)
        results.append((p, *(opt.state["params"][name] for name in rule.states)))
    assert_same_bits(results[1], results[0], str(rule))


@pytest.mark.parametrize("scale", [2.0**16, 3.0, 1e-3])
def test_grad_scale_divides(scale: float) -> None:
    g = rng.standard_normal(N).astype(np.float32)
    p, q = np.ones(N, np.float32), np.ones(N, np.float32)
    info = fo.Optimizer(p, fo.Adam(), stats=True, clip_norm=1.0).step(g, grad_scale=scale)
    norm = fo.global_norm(g) / scale
    assert info.grad_norm == pytest.approx(norm, rel=1e-14)
    clip_scale = min(1.0, 1.0 / norm)
    assert info.clip_scale == pytest.approx(clip_scale, rel=1e-14)
    fo.Optimizer(q, fo.Adam()).step(g * np.float32(clip_scale / scale))
    np.testing.assert_allclose(p, q, rtol=1e-6)
    # The next step without a scale is not affected.
    plain = fo.Optimizer(q, fo.SGD(lr=1.0))
    plain.step(g, grad_scale=2.0)
    q[:] = 0
    plain.step(g)
    np.testing.assert_array_equal(q, -g)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, 1e-320])
def test_no_scale_that_cannot_divide(value: float) -> None:
    opt = fo.Optimizer(np.ones(3), fo.SGD())
    with pytest.raises(ValueError, match="grad_scale: expected a number"):
        opt.step(np.ones(3), grad_scale=value)
    with pytest.raises(TypeError, match="grad_scale: expected a number, got '2'"):
        opt.step(np.ones(3), grad_scale="2")  # type: ignore[arg-type]
    assert opt.step_count == 0


def tensors(dtype: Any = np.float32) -> tuple[dict[str, Array], dict[str, Array]]:
    shapes = {"a.w": (130, 200), "a.b": (200,), "c": (70_000,), "d": ()}
    draw: Callable[[Any], Array] = lambda s: np.asarray(rng.standard_normal(s)).astype(dtype)  # noqa: E731
    return {k: draw(s) for k, s in shapes.items()}, {k: draw(s) for k, s in shapes.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("verify", [False, True])
def test_a_skipped_step_changes_nothing(backend: str, bad: float, verify: bool) -> None:
    params, grads = tensors()
    opt = fo.Optimizer(
        params, fo.AdamW(), skip_nonfinite=True, zero_grads=True, ema=0.9, backend=backend,
        verify=verify,
    )  # fmt: skip
    opt.step({k: g.copy() for k, g in grads.items()})
    before = opt.fingerprint()
    grads["c"][65_000] = grads["d"][()] = bad
    kept = copy.deepcopy(grads)
    info = opt.step(grads)
    assert info.skipped
    assert info.bad_leaves == ("c", "d")
    assert (info.step, opt.step_count, info.clip_scale) == (1, 1, 1.0)
    assert not math.isfinite(info.grad_norm)  # type: ignore[arg-type]
    assert opt.fingerprint() == before
    for k, g in kept.items():
        assert grads[k].tobytes() == g.tobytes()
    grads["c"][65_000] = grads["d"][()] = 1.0
    info = opt.step(grads)
    assert (info.step, info.skipped, info.bad_leaves) == (2, False, ())
    assert all(not g.any() for g in grads.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_refuses_what_has_no_norm(backend: str) -> None:
    params, grads = tensors()
    opt = fo.Optimizer(params, fo.AdamW(), clip_norm=1.0, backend=backend)
    before = opt.fingerprint()
    grads["a.b"][7] = math.nan
    with pytest.raises(FloatingPointError, match=r"NaN or infinity in a\.b; nothing has changed"):
        opt.step(grads)
    assert opt.fingerprint() == before
    grads["a.b"][7] = 0
    assert opt.step(grads).step == 1


def test_without_a_norm_a_nan_goes_its_way() -> None:
    p = np.ones(4, np.float32)
    opt = fo.Optimizer(p, fo.SGD(), stats=True)
    info = opt.step(np.array([1, math.nan, 1, 1], np.float32))
    assert math.isnan(p[1])
    assert math.isnan(info.grad_norm)  # type: ignore[arg-type]
    assert not info.skipped


def test_groups_clip_each_on_its_own() -> None:
    params, grads = tensors()
    twin = copy.deepcopy(params)
    rules = {"a*": fo.SGD(lr=1.0), "c": fo.SGD(lr=0.5), "*": fo.SGD(lr=0.25)}
    limits = {"a*": 0.5, "c": None, "*": 1e9}
    info = fo.Optimizer(params, rules, clip_norm=limits).step(grads)
    norms = {
        "a*": fo.global_norm([grads["a.w"], grads["a.b"]]),
        "c": fo.global_norm(grads["c"]),
        "*": fo.global_norm(grads["d"]),
    }
    assert info.grad_norm == norms
    assert info.clip_scale == {"a*": 0.5 / norms["a*"], "c": 1.0, "*": 1.0}
    factor = np.float32(0.5 / norms["a*"])
    np.testing.assert_array_equal(params["a.w"], twin["a.w"] - factor * grads["a.w"])
    np.testing.assert_array_equal(params["c"], twin["c"] - np.float32(0.5) * grads["c"])


def test_leaves_without_a_gradient_do_not_count() -> None:
    params, grads = tensors()
    opt = fo.Optimizer(params, fo.SGD(), clip_norm=1.0, stats=True)
    opt.step(grads)
    info = opt.step({**grads, "c": None})
    assert info.grad_norm == fo.global_norm([g for k, g in grads.items() if k != "c"])
    assert info.stats is not None
    assert set(info.stats) == {"a.w", "a.b", "d"}


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_order_change_no_bit(threads: int) -> None:
    found = set()
    for order in (1, -1):
        rng = np.random.default_rng(5)
        sizes = [40_000, 100_000, 3, 17_000][::order]
        data = {n: rng.standard_normal((2, n)).astype(np.float32) for n in sorted(sizes)}
        params = {str(n): data[n][0] for n in sizes}
        opt = fo.Optimizer(params, fo.AdamW(), clip_norm=0.1, threads=threads)
        info = opt.step({str(n): data[n][1] for n in sizes})
        found.add((info.grad_norm, b"".join(params[str(n)].tobytes() for n in sorted(sizes))))
    assert len(found) == 1
    FOUND.setdefault("threads", set()).update(found)
    assert len(FOUND["threads"]) == 1


FOUND: dict[str, set[Any]] = {}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("dtype", [*DTYPES, ml_dtypes.bfloat16], ids=lambda d: d.__name__)
def test_statistics(dtype: Any, clip: float | None, backend: str) -> None:
    params, grads = tensors(dtype)
    before = {k: p.astype(np.float64) for k, p in params.items()}
    opt = fo.Optimizer(
        params, fo.AdamW(lr=0.1), stats=True, clip_norm=clip, master=None, backend=backend
    )
    info = opt.step(grads, grad_scale=4.0)
    assert info.stats is not None
    loose = 0.1 if dtype is ml_dtypes.bfloat16 else 1e-6  # the update there is not rounded yet
    for k, found in info.stats.items():
        norm = np.linalg.norm(grads[k].astype(np.float64)) / 4.0
        assert found["grad_norm"] == pytest.approx(norm, rel=1e-12)
        change = np.linalg.norm(params[k].astype(np.float64) - before[k])
        ratio = change / np.linalg.norm(before[k])
        assert found["update_ratio"] == pytest.approx(ratio, rel=loose)
    total = math.sqrt(sum(found["grad_norm"] ** 2 for found in info.stats.values()))
    assert info.grad_norm == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["official", "paper"])
def test_sophias_win_rate(form: Any, backend: str) -> None:
    rule = fo.Sophia(form=form, bs=4, eps=1e-12)
    p, opt_g = np.ones(N, np.float32), rng.standard_normal(N).astype(np.float32)
    opt = fo.Optimizer(p, rule, stats=True, backend=backend)
    opt.step(opt_g, hessian=np.abs(rng.standard_normal(N)).astype(np.float32) * 3)
    h = opt.state["params"]["h"].astype(np.float64)
    info = opt.step(opt_g)  # which reads h before any refresh
    m = opt.state["params"]["m"].astype(np.float64)
    if form == "official":
        r = m / (rule.rho * 4 * h + rule.eps)
    else:
        r = m / np.maximum(rule.rho * h, rule.eps)
    assert info.stats is not None
    share = info.stats["params"]["win_rate"]
    assert 0.01 < share < 0.99
    assert share == pytest.approx(np.mean(np.abs(r) < 1), abs=2 / N)


def test_huge_float64_gradients_clip() -> None:
    p = np.zeros(3)
    info = fo.Optimizer(p, fo.SGD(lr=1.0), clip_norm=10.0).step(np.array([3e250, 0, 4e250]))
    assert info.grad_norm == pytest.approx(5e250)
    np.testing.assert_allclose(p, [-6.0, 0.0, -8.0], rtol=1e-14)


@pytest.mark.parametrize("way", STORAGES)
def test_every_storage_verified_with_everything_on(way: str) -> None:
    name, options = STORAGES[way]
    dtype = ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
    params, grads = tensors(dtype)
    opt = fo.Optimizer(
        params, fo.AdamW(weight_decay=0.1), verify=True, ema=0.7, stats=True, **options,
        clip_norm=0.3,
    )  # fmt: skip
    for _ in range(STEPS):
        opt.step(grads, grad_scale=3.0)


@pytest.mark.parametrize("name", fo.RULES)
def test_every_rule_verified_with_clipped_values(name: str) -> None:
    rule = fo.RULES[name](weight_decay=0.1)
    shape = (97, 130) if rule.program.matrices else (N,)
    p, g = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    opt = fo.Optimizer(p, rule, verify=True, clip_value=0.5, ema=0.5, stats=True)
    for _ in range(STEPS):
        opt.step(g, grad_scale=0.7)


def test_a_wrong_norm_is_seen_by_verification() -> None:
    params, grads = tensors()
    opt = fo.Optimizer(params, fo.SGD(), clip_norm=1.0, verify=True)
    opt.step(grads)
    inner = opt._assembly.plan._plan.step_leaves

    def wrong(*arguments: Any) -> Any:
        number = inner(*arguments)
        opt._assembly.results[2, 0] *= 1 + 1e-9
        return number

    opt._assembly.plan._plan.step_leaves = wrong
    before = opt.fingerprint()
    with pytest.raises(fo.VerificationError, match=r"params\['c'\]: the norm of its gradient"):
        opt.step(grads)
    assert opt.fingerprint() == before


def test_loss_scaling_recovers() -> None:
    params = np.ones(1000, np.float16)
    opt = fo.Optimizer(params, fo.AdamW(lr=1e-2), master="float32", skip_nonfinite=True)
    scaler = fo.LossScaler(scale=2.0**20, growth_interval=3)
    skipped = []
    for _ in range(12):
        with np.errstate(over="ignore"):
            grads = (params.astype(np.float32) * np.float32(scaler.scale)).astype(np.float16)
        info = opt.step(grads, grad_scale=scaler.scale)
        scaler.update(info.skipped)
        skipped.append(info.skipped)
    assert skipped[:5] == [True] * 5  # 2^20 ... 2^16 are beyond float16
    assert not any(skipped[5:8])
    assert opt.step_count == skipped.count(False)
    assert float(params[0]) < 1.0


def test_pickles_keep_the_options() -> None:
    params, grads = tensors()
    opt = fo.Optimizer(params, fo.AdamW(), clip_norm=0.5, ema=0.9, stats=True)
    opt.step(grads)
    twin = copy.deepcopy(opt)
    assert opt.step(grads) == twin.step(grads)
    assert opt.fingerprint() == twin.fingerprint()


@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
@pytest.mark.parametrize("scale", [1e-39, 1e-300, 1e46, 1e300])
def test_a_scale_whose_inverse_leaves_float32_is_refused(scale: float, backend: str) -> None:
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
        p = np.ones(3, dtype)
        opt = fo.Optimizer([p, np.ones(3)], fo.SGD(lr=1.0), backend=backend)
        before = opt.fingerprint()
        with pytest.raises(ValueError, match="neither 0 nor infinite in float32"):
            opt.step([np.zeros(3, dtype), np.zeros(3)], grad_scale=scale)
        assert opt.fingerprint() == before
    wide = np.ones(3)
    fo.Optimizer(wide, fo.SGD(lr=1.0), backend=backend).step(np.zeros(3), grad_scale=scale)
    assert (wide == 1.0).all()


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_numbers_beyond_float64_get_the_errors_of_the_package(value: int) -> None:
    p = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"SGD\(lr\): expected a number"):
        fo.SGD(lr=value)
    with pytest.raises(ValueError, match="grad_scale: expected a number"):
        fo.Optimizer(p, fo.SGD()).step(p.copy(), grad_scale=value)
    with pytest.raises(ValueError, match="clip_norm"):
        fo.Optimizer(p, fo.SGD(), clip_norm=value)
    with pytest.raises(ValueError, match="threads: expected an integer"):
        fo.Optimizer(p, fo.SGD(), threads=value)
    with pytest.raises(ValueError, match="threads: expected an integer"):
        fo.Optimizer(p, fo.SGD(), threads=2**31)
