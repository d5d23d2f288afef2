"""Newton-Schulz with products of bfloat16: accuracy, bits, refusals, and what is round it."""

from __future__ import annotations

import pickle
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import fusedopt as fo
from exactness import Guards
from fusedopt.linalg.coefficients import Coefficients, coefficient_set
from fusedopt.system.extension import core

Array = npt.NDArray[Any]

UNITS: list[str] = fo.info()["matrix_units"]
RULES = (fo.Muon, fo.NorMuon, fo.AdaMuon)
SETS = {"keller": 5, "you": 5, "polar_express": 8}
SHAPES = [(1, 1), (1, 40), (3, 5), (32, 32), (33, 31), (64, 64), (200, 65), (90, 300)]

with_units = pytest.mark.skipif(not UNITS, reason="no matrix units for bfloat16 here")
each_unit = pytest.mark.parametrize("unit", UNITS)


def exact(u: Array, coefficients: Coefficients) -> Array:
    """The iteration in float64."""
    if u.shape[0] > u.shape[1]:
        return exact(u.T, coefficients).T
    x = u.astype(np.float64)
    x = x / (coefficients.prescale * np.linalg.norm(x) or 1.0)
    for a, b, c in coefficients.rows:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def rounded(x: Array) -> Array:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def all_in_bfloat16(u: Array, coefficients: Coefficients) -> Array:
    """The iteration with arrays of bfloat16, each product and each sum with one rounding."""
    if u.shape[0] > u.shape[1]:
        return all_in_bfloat16(u.T, coefficients).T
    x = rounded(u)
    x = rounded(x / (np.float32(coefficients.prescale) * np.linalg.norm(x)))
    for row in coefficients.rows:
        a, b, c = (np.float32(each) for each in row)
        gram = rounded(x @ x.T)
        x = rounded(a * x + rounded(b * gram + c * (gram @ gram)) @ x)
    return x


def matrices(n: int, m: int, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((n, n)))[0]
    right = np.linalg.qr(rng.standard_normal((m, n)))[0].T
    order, few = np.arange(1.0, n + 1), max(1, n // 8)
    found = {
        "gaussian": rng.standard_normal((n, m)),
        "1/k": (left / order) @ right,
        "1/k^2": (left / order**2) @ right,
        "low rank": rng.standard_normal((n, few)) @ rng.standard_normal((few, m)),
        "rank one": np.outer(rng.standard_normal(n), rng.standard_normal(m)),
        "ones": np.ones((n, m)),
    }
    return {kind: x.astype(np.float32) for kind, x in found.items()}


def space_for(stack: Array, threads: int) -> int:
    count, rows, cols = stack.shape
    return core.orthogonalize_bfloat16_space(count, rows, cols, threads)


def in_core(stack: Array, unit: str, **settings: Any) -> Array:
    coefficients = settings.get("coefficients", coefficient_set("keller", 5))
    threads, room = settings.get("threads", 1), settings.get("room")
    if room is None:
        size = space_for(stack, threads)
        room = np.full(size, 0xFF, np.uint8)  # NaN in every format
    out = stack.copy()
    core.orthogonalize_bfloat16(
        out,
        room,
        [value for row in coefficients.rows for value in row],
        coefficients.prescale,
        1e-30,
        settings.get("factor", 1.0),
        settings.get("by_row", False),
        threads,
        unit,
    )
    return out


@each_unit
@pytest.mark.parametrize("shape", [(4, 6), (64, 64), (60, 200), (130, 50)])
@pytest.mark.parametrize("name", SETS)
def test_errors_are_below_those_of_arrays_in_bfloat16(
    name: str, shape: tuple[int, int], unit: str
) -> None:
    coefficients = coefficient_set(name, SETS[name])
    wide = shape[0] <= shape[1]
    for kind in matrices(1, 1, 0):
        ours, theirs, size = [], [], 0.0
        for seed in range(8 if max(shape) < 60 else 2):
            u = matrices(min(shape), max(shape), seed)[kind]
            x = u if wide else np.ascontiguousarray(u.T)
            want = exact(x, coefficients)
            size += float(np.linalg.norm(want)) ** 2
            ours.append(in_core(x[None], unit, coefficients=coefficients)[0] - want)
            theirs.append(all_in_bfloat16(x, coefficients) - want)
            # The bound of `verify`.
            assert np.abs(ours[-1]).max() <= 16 / max(shape) ** 0.5, kind
            if kind == "gaussian":
                assert np.abs(ours[-1]).max() <= 0.04 * np.abs(want).max()
                values = np.linalg.svd(x, compute_uv=False)
                mapped = np.sort(coefficients(values / np.linalg.norm(x)))
                found = np.sort(np.linalg.svd(want + ours[-1], compute_uv=False))
                assert np.abs(found - mapped)[1:].max() < 0.05  # the smallest is much amplified
                assert found[-1] < 1.25
        # "ones" have one singular value, with which the one or the other is lucky.
        lucky = 5e-3 * size**0.5
        assert np.linalg.norm(ours) <= 1.1 * np.linalg.norm(theirs) + lucky, kind


@each_unit
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_do_not_depend_on_threads_and_nothing_else_is_touched(
    shape: tuple[int, int], by_row: bool, unit: str
) -> None:
    rng = np.random.default_rng(2)
    stack = rng.standard_normal((5, *shape)).astype(np.float32)
    stack[1] *= 1e-30
    stack[2] *= 1e30
    stack[3] = 0
    guards = Guards(1)
    results = []
    for threads in (1, 2, 7):
        size = space_for(stack, threads)
        for offset in (0, 3):
            room = guards.place(np.full(size + offset, 0xFF, np.uint8))
            own = guards.place(stack)
            results.append(
                in_core(own, unit, by_row=by_row, factor=0.5, threads=threads, room=room[offset:])
            )
    assert guards.intact()
    assert {r.tobytes() for r in results} == {results[0].tobytes()}
    for k, matrix in enumerate(stack):  # a stack is its matrices
        alone = in_core(matrix[None], unit, by_row=by_row, factor=0.5)[0]
        np.testing.assert_array_equal(results[0][k], alone)
    want = 0.5 * np.stack(
        [fo.orthogonalize(x.astype(float), norm="aol" if by_row else "frobenius") for x in stack]
    )
    assert np.abs(results[0] - want).max() <= 0.05
    assert not results[0][3].any()


@each_unit
@pytest.mark.parametrize("shape", [(300, 700), (700, 300), (530, 530)])
def test_large_matrices_are_shared_by_threads(shape: tuple[int, int], unit: str) -> None:
    u = np.random.default_rng(3).standard_normal((2, *shape)).astype(np.float32)
    one, two, many = (in_core(u, unit, threads=t) for t in (1, 2, 5))
    assert one.tobytes() == two.tobytes() == many.tobytes()
    want = fo.orthogonalize(u)
    assert np.abs(one - want).max() <= 0.03 * np.abs(want).max()


@each_unit
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("by_row", [False, True])
def test_what_is_not_finite_is_everywhere_at_once(bad: float, by_row: bool, unit: str) -> None:
    u = np.ones((2, 40, 50), np.float32)
    u[0, 3, 4] = bad
    got = in_core(u, unit, by_row=by_row)
    assert np.isnan(got[0]).all()
    assert np.isfinite(got[1]).all()


@with_units
@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_float64_of_any_size(scale: float) -> None:
    u = np.random.default_rng(4).standard_normal((3, 20, 30))
    got = fo.orthogonalize(scale * u, dtype="bfloat16", eps=0.0)
    assert got.dtype == np.float64
    assert np.abs(got - fo.orthogonalize(u)).max() < 0.03
    # A power of two leaves no trace.
    again = fo.orthogonalize(2.0**40 * scale * u if scale < 1e290 else u, dtype="bfloat16", eps=0.0)
    assert np.abs(got - again).max() < 0.03


@with_units
def test_denormal_matrices() -> None:
    u = np.random.default_rng(4).integers(-99, 99, (20, 30)).astype(np.float32)
    got = fo.orthogonalize(u * np.float32(2.0**-149), dtype="bfloat16", eps=0.0)
    np.testing.assert_array_equal(got, fo.orthogonalize(u, dtype="bfloat16", eps=0.0))


@with_units
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_optimizers(rule: type[fo.Muon], dtype: Any, order: Any) -> None:
    rng = np.random.default_rng(5)
    shapes = [(70, 40), (40, 70), (300, 300), (12, 3, 5, 5)]
    params = [np.zeros(s, dtype, order=order) for s in shapes]
    grads = [np.asarray(rng.standard_normal(s), dtype, order=order) for s in shapes]
    rules = rule(ns_dtype="bfloat16", norm="aol")
    opt = fo.Optimizer(params, rules, verify=True)
    plain = fo.Optimizer([np.zeros_like(p) for p in params], rule(norm="aol"))
    for _ in range(3):
        opt.step(grads)
        plain.step(grads)
    assert fo.estimate(params, rules).work == fo.Optimizer(params, rules)._assembly.plan.work_bytes
    assert "standard form, in bfloat16 by " + UNITS[0] in opt.describe()
    for p, q in zip(params, plain.params, strict=True):
        # The signs of AdaMuon's first step are those of elements near zero too.
        assert np.linalg.norm(p - q) <= (0.15 if rule is fo.AdaMuon else 0.03) * np.linalg.norm(q)


@with_units
def test_a_split_parameter_is_several_matrices() -> None:
    g = np.random.default_rng(6).standard_normal((120, 50)).astype(np.float32)
    p = np.zeros_like(g)
    rule = fo.Muon(lr=1.0, nesterov=False, split=3, scale="none", ns_dtype="bfloat16")
    fo.Optimizer(p, rule).step(g)
    direction = (0.05 * g.astype(np.float64)).astype(np.float32)
    for k in range(0, 120, 40):
        want = fo.orthogonalize(direction[k : k + 40], dtype="bfloat16")
        assert np.abs(-p[k : k + 40] - want).max() < 0.01


@with_units
def test_where_a_lower_instruction_set_is_forced() -> None:
    p, g = np.zeros((40, 30), np.float32), np.ones((40, 30), np.float32)
    opt = fo.Optimizer(p, fo.Muon(ns_dtype="bfloat16"))
    before = fo.get_isa()
    try:
        fo.set_isa("x86_v3")
        assert fo.info()["matrix_units"] == []
        message = "AVX512-BF16, and the instruction set in use is 'x86_v3'; take 'float32', or"
        for refused in (
            lambda: fo.Optimizer(p, fo.NorMuon(ns_dtype="bfloat16")),
            lambda: fo.orthogonalize(g, dtype="bfloat16"),
        ):
            with pytest.raises(ValueError, match=message):
                refused()
        opt.step(g)  # what was found when it was made is there
        assert p.any()
    finally:
        fo.set_isa(before)
    assert fo.info()["matrix_units"] == UNITS


def test_where_there_are_no_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedopt.linalg import newton_schulz

    class Older:
        @staticmethod
        def matrix_units() -> list[str]:
            return []

        @staticmethod
        def levels() -> list[str]:
            return ["baseline"]

    for found, message in (
        (Older, "and the processor or this build has neither; take 'float32'"),
        (None, "and there is no compiled core; take 'float32'"),
    ):
        monkeypatch.setattr(newton_schulz, "core", found)
        with pytest.raises(
            ValueError, match=rf"Muon\(ns_dtype\): 'bfloat16' needs AMX .*{message}"
        ):
            fo.Optimizer(np.zeros((4, 4)), fo.Muon(ns_dtype="bfloat16"), backend="reference")
        with pytest.raises(ValueError, match=rf"orthogonalize\(dtype\): .*{message}"):
            fo.orthogonalize(np.ones((2, 3)), dtype="bfloat16")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gram": True}, "pairs of iterations .* take gram='auto'"),
        (
            {"ns_coefficients": "cans"},
            r"let singular values grow to 2.1e\+17; take 'polar_express'",
        ),
        ({"ns_coefficients": (3.0, 1.0, 1.0)}, "let singular values grow to inf"),
        ({"ns_dtype": "float16"}, r"Muon\(ns_dtype\): expected one of .*'bfloat16'.* 'float16'"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fo.Muon(**{"ns_dtype": "bfloat16", **settings})


def test_the_sets_in_use_have_room_for_rounding() -> None:
    for steps in range(1, 12):
        for name in ("keller", "polar_express"):
            fo.Muon(ns_coefficients=name, ns_steps=steps, ns_dtype="bfloat16")
    for steps in range(1, 6):
        fo.Muon(ns_coefficients="you", ns_steps=steps, ns_dtype="bfloat16")


@each_unit
@pytest.mark.parametrize(
    ("stack", "room", "unit_name", "error"),
    [
        (np.ones((2, 3, 4), np.float32), np.ones(9, np.uint8), None, ValueError),
        (np.ones((2, 3, 4)), np.ones(1 << 20, np.uint8), None, TypeError),
        (np.ones((3, 4), np.float32), np.ones(1 << 20, np.uint8), None, TypeError),
        (np.ones((2, 3, 4), np.float32), np.ones(1 << 20, np.int8), None, TypeError),
        (np.ones((2, 4, 3), np.float32).transpose(0, 2, 1), np.ones(1 << 20, np.uint8), None,
         TypeError),
        (np.ones((2, 3, 4), np.float32), np.ones(1 << 20, np.uint8), "neon", ValueError),
    ],
)  # fmt: skip
def test_what_the_core_would_write_beyond_is_refused(
    stack: Array, room: Array, unit_name: str | None, error: type[Exception], unit: str
) -> None:
    before = stack.copy()
    with pytest.raises(error, match="orthogonalize_bfloat16: "):
        core.orthogonalize_bfloat16(
            stack, room, [1.0, 1.0, 1.0], 1.0, 0.0, 1.0, False, 1, unit_name or unit
        )
    np.testing.assert_array_equal(stack, before)


@with_units
def test_checkpoints() -> None:
    p, g = np.zeros((4, 6), np.float32), np.ones((4, 6), np.float32)
    opt = fo.Optimizer(p, fo.Muon(ns_dtype="bfloat16"))
    opt.step(g)
    state = opt.state_dict()
    with pytest.raises(ValueError, match="ns_dtype 'float32' here, 'bfloat16' there"):
        fo.Optimizer(p.copy(), fo.Muon()).load_state_dict(state)
    fo.Optimizer(p.copy(), fo.Muon()).load_state_dict(state, strict=False)
    fo.Optimizer(p.copy(), fo.Muon(ns_dtype="bfloat16")).load_state_dict(state)


def test_checkpoints_from_before_there_was_a_choice() -> None:
    p, g = np.zeros((4, 6), np.float32), np.ones((4, 6), np.float32)
    opt = fo.Optimizer(p, fo.Muon())
    opt.step(g)
    state = opt.state_dict()
    (entry,) = state["leaves"].values()
    del entry["hyperparameters"]["ns_dtype"]
    fo.Optimizer(p.copy(), fo.Muon()).load_state_dict(state)


@with_units
@pytest.mark.parametrize("name", ["Muon", "NorMuon", "AdaMuon"])
def test_torch_classes(name: str) -> None:
    torch = pytest.importorskip("torch")
    import fusedopt.torch as ft

    w = torch.nn.Parameter(torch.zeros(48, 64))
    w.grad = torch.from_numpy(np.random.default_rng(7).standard_normal((48, 64), np.float32))
    opt = getattr(ft, name)([w], lr=1.0, ns_dtype="bfloat16")
    again = pickle.loads(pickle.dumps(opt))
    opt.step()
    again.load_state_dict(opt.state_dict())
    for one in (opt, again):
        assert one._rule(one.param_groups[0]).ns_dtype == "bfloat16"
    with pytest.raises(ValueError, match="ns_dtype"):
        getattr(ft, name)([w], ns_dtype="float16")
    if name == "Muon":
        other = torch.nn.Parameter(torch.zeros(48, 64))
        other.grad = w.grad.clone()
        theirs = torch.optim.Muon([other], lr=1.0)
        theirs.step()
        difference = (w.detach() - other.detach()).norm() / other.detach().norm()
        assert 0 < float(difference) < 0.03
        theirs.load_state_dict(opt.state_dict())
        opt.load_state_dict(theirs.state_dict())
