"""`fo.orthogonalize`: its accuracy in both forms, on every kind of matrix."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import fusedopt as fo
from exactness import Guards
from fusedopt.linalg import newton_schulz
from fusedopt.linalg.coefficients import NAMES, coefficient_set
from fusedopt.linalg.newton_schulz import SMALL, Iteration, Workspace, flops
from fusedopt.system.extension import core
from fusedopt.system.isa import isas

Array = npt.NDArray[Any]

EPSILONS = 8.0
"""An element may differ from the float64 iteration by so many machine epsilons, times the slope of
the set's map at zero, times the largest element. Measured, in both forms and with four kinds of
OpenBLAS kernels: at most 4 for rank one, 2.1 for low rank, 1.4 for power laws, 1 for the others;
in the compiled core at most 3.3 for rank one."""

SETS = {"keller": 5, "you": 5, "cans": 5, "polar_express": 8}


def matrices(n: int, m: int, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((n, n)))[0]
    right = np.linalg.qr(rng.standard_normal((m, n)))[0].T
    order = np.arange(1.0, n + 1)
    gaussian = rng.standard_normal((n, m))
    return {
        "gaussian": gaussian,
        "power law 0.5": left * order**-0.5 @ right,
        "power law 1": left * order**-1.0 @ right,
        "power law 1.5": left * order**-1.5 @ right,
        "power law 3": left * order**-3.0 @ right,
        "low rank": rng.standard_normal((n, 5)) @ rng.standard_normal((5, m)),
        "rank one": np.outer(rng.standard_normal(n), rng.standard_normal(m)),
        "orthonormal": right,
        "tiny": gaussian * 1e-20,
        "least": gaussian * 1e-38,
        "huge": gaussian * 1e30,
        "huge rank one": np.outer(rng.standard_normal(n), rng.standard_normal(m)) * 1e36,
    }


KINDS = list(matrices(8, 16, 0))


def textbook(u: Array, **settings: Any) -> Array:
    rule = fo.Muon(scale="none", ns_steps=settings.pop("ns_steps", 5), **settings)
    return rule.orthogonalized(u.astype(np.float64))


def share(got: Array, expected: Array, slope: float, dtype: Any) -> float:
    unit = float(np.finfo(dtype).eps) * slope * float(np.abs(expected).max())
    return float(np.abs(got - expected).max()) / unit


@pytest.fixture
def blas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices are treated as large ones are."""
    monkeypatch.setattr(newton_schulz, "SMALL", 0)


@pytest.fixture(params=["core", "blas"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small matrices as they are treated, then as large ones are."""
    if request.param == "blas":
        monkeypatch.setattr(newton_schulz, "SMALL", 0)
    return str(request.param)


@pytest.mark.parametrize("norm", ["frobenius", "aol"])
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_accuracy(kind: str, name: str, norm: Any, either: str) -> None:
    slope = coefficient_set(name, SETS[name]).slope_at_zero
    for n, m in ((96, 384), (130, 70)):
        u = matrices(min(n, m), max(n, m), 1)[kind].astype(np.float32)
        u = u if n < m else u.T
        expected = textbook(u, ns_coefficients=name, ns_steps=SETS[name], norm=norm)
        settings: dict[str, Any] = {"coefficients": name, "steps": SETS[name], "norm": norm}
        for gram in (False, True) if either == "blas" else (False,):
            got = fo.orthogonalize(u, gram=gram, **settings)
            assert got.dtype == np.float32
            assert share(got, expected, slope, np.float32) <= EPSILONS


@pytest.mark.parametrize("kind", ["gaussian", "power law 1", "rank one", "tiny"])
def test_float64_is_as_accurate_in_its_own_precision(kind: str, either: str) -> None:
    # Against NumPy's widest float, where that is wider.
    u = matrices(40, 100, 2)[kind]
    x = u.astype(np.longdouble)
    x /= np.sqrt(np.sum(x * x))
    a, b, c = (np.longdouble(v) for v in (3.4445, -4.7750, 2.0315))
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    for gram in (False, True):
        got = fo.orthogonalize(u, gram=gram, eps=0.0)
        assert share(got, x.astype(float), 485, float) <= EPSILONS


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gram_form_is_at_most_twice_as_inaccurate(kind: str, name: str, blas: None) -> None:
    settings: dict[str, Any] = {"coefficients": name, "steps": SETS[name]}
    for n, m in ((64, 128), (96, 384), (160, 480)):
        u = matrices(n, m, 3)[kind].astype(np.float32)
        expected = textbook(u, ns_coefficients=name, ns_steps=SETS[name])
        standard, gram = (
            np.linalg.norm(fo.orthogonalize(u, gram=g, **settings) - expected)
            for g in (False, True)
        )
        assert gram <= 2 * standard


@pytest.mark.parametrize("kind", ["gaussian", "power law 0.5", "orthonormal", "tiny", "huge"])
@pytest.mark.parametrize("name", SETS)
def test_singular_values_end_in_the_range_of_the_set(kind: str, name: str) -> None:
    low, high = {
        "keller": (0.682, 1.134),
        "you": (0.978, 1.032),
        "cans": (0.884, 1.120),
        "polar_express": (1.0, 1.0),
    }[name]
    u = matrices(48, 150, 4)[kind].astype(np.float32)
    s = np.linalg.svd(u.astype(np.float64), compute_uv=False)
    assert (s / np.linalg.norm(s)).min() > 0.01  # of such values the range is stated
    for gram in (False, True):
        o = fo.orthogonalize(u, coefficients=name, steps=SETS[name], gram=gram)
        values = np.linalg.svd(o, compute_uv=False)
        assert low - 1e-3 < values.min() <= values.max() < high + 1e-3


def test_the_polar_factor() -> None:
    x = np.array([[1.0, 2, 3], [4, 5, 6]])
    # Computed in float64 by independent code.
    polar = [[-0.5777918268, 0.1151166951, 0.808025217], [0.706746021, 0.5657574391, 0.4247688571]]
    keller = [
        [-0.5682900921, 0.0577419433, 0.6837739786],
        [0.5633546843, 0.4056128236, 0.2478709628],
    ]
    got = fo.orthogonalize(x, coefficients="polar_express", steps=8)
    np.testing.assert_allclose(got, polar, atol=1e-10)
    np.testing.assert_allclose(fo.orthogonalize(x.T).T, keller, atol=1e-10)


@pytest.mark.parametrize("norm", ["frobenius", "aol"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (40, 300), (3, 5, 5)])
def test_zero_stays_zero_and_nan_shows(
    shape: tuple[int, ...], dtype: Any, norm: Any, either: str
) -> None:
    u = np.zeros(shape, dtype)
    for eps in (1e-30, 0.0, 1e-300):
        np.testing.assert_array_equal(fo.orthogonalize(u, norm=norm, eps=eps), 0)
    for bad in (np.nan, np.inf, -np.inf):
        u[..., 1, 1] = bad
        assert np.isnan(fo.orthogonalize(u, norm=norm)).all()
    least = np.full(shape, np.finfo(dtype).smallest_subnormal)
    assert (fo.orthogonalize(least, norm=norm) > 0).all()


def test_a_zero_row_stays_zero_under_its_own_norm(either: str) -> None:
    u = np.random.default_rng(5).standard_normal((6, 9)).astype(np.float32)
    u[2] = 0
    got = fo.orthogonalize(u, norm="aol", eps=0.0)
    np.testing.assert_array_equal(got[2], 0)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("gram", [True, False])
def test_what_was_in_the_buffers_does_not_matter(gram: bool) -> None:
    iteration = Iteration(coefficient_set("keller", 5), "frobenius", gram, 1e-30)
    u = np.random.default_rng(6).standard_normal((30, 100)).astype(np.float32)
    workspace = Workspace([(1, 30, 100)], [], u.dtype)
    results = []
    for garbage in (0.0, np.nan, np.inf, 1e38):
        for buffer in (
            workspace.direction,
            workspace._other,
            *workspace._squares,
            workspace._slots,
        ):
            buffer.fill(garbage)
        x = workspace.direction.reshape(u.shape)
        x[...] = u
        workspace.orthogonalize(x, (1, 30, 100), iteration, 1.0)
        results.append(x.copy())
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("shape", [(7, 20, 30), (3, 2, 30, 20), (300, 24, 24), (2, 130, 140)])
def test_a_stack_is_its_matrices(shape: tuple[int, ...]) -> None:
    u = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    u.reshape(-1, *shape[-2:])[0] *= 1e-25  # one that needs its own scaling
    u.reshape(-1, *shape[-2:])[1] = 0
    got = fo.orthogonalize(u)
    assert got.shape == shape
    for x, o in zip(u.reshape(-1, *shape[-2:]), got.reshape(-1, *shape[-2:]), strict=True):
        np.testing.assert_allclose(o, fo.orthogonalize(x), atol=1e-5)
    assert np.linalg.norm(got.reshape(-1, *shape[-2:])[0]) > 1


def test_any_layout_and_nothing_else_is_touched() -> None:
    u = np.random.default_rng(8).standard_normal((30, 50)).astype(np.float32)
    want = fo.orthogonalize(u)
    before = u.copy()
    for same in (np.asfortranarray(u), np.repeat(u, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(fo.orthogonalize(same), want)
    np.testing.assert_array_equal(u, before)
    assert fo.orthogonalize(np.zeros((0, 3))).shape == (0, 3)
    assert fo.orthogonalize(np.zeros((0, 3, 3))).shape == (0, 3, 3)


def test_the_form_that_takes_fewer_operations_is_chosen() -> None:
    coefficients = coefficient_set("keller", 5)
    auto, gram, standard = (
        Iteration(coefficients, "frobenius", g, 1e-30) for g in ("auto", True, False)
    )
    for shape in ((768, 768), (768, 1024), (1500, 768), (32, 1024)):
        assert auto.groups(*shape) == standard.groups(*shape)
    for shape in ((768, 3072), (3072, 768), (768, 2304)):
        assert auto.groups(*shape) == gram.groups(*shape)
    assert [len(group) for group in standard.groups(768, 3072)] == [1] * 5
    assert [len(group) for group in gram.groups(768, 768)] == [2, 1, 2]
    n, m = 10, 40
    # Products with x: two for an iteration, one of them symmetric; of n x n: one symmetric, and
    # three more in a pair.
    assert flops(n, m, standard.groups(n, m)) == 5 * (3 * n * n * m + n**3)
    assert flops(n, m, gram.groups(n, m)) == 3 * 3 * n * n * m + 5 * n**3 + 2 * 6 * n**3
    assert flops(n, m, standard.groups(n, m), symmetric=1) == 5 * (4 * n * n * m + 2 * n**3)
    assert auto.describe(768, 768) == "standard form"
    assert auto.describe(768, 3072) == (
        "Gram form, resets (2, 3), 0.82 of the standard form's operations"
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x: expected an ndarray of float32 or float64, got list"),
        ({"x": np.ones((2, 2), int)}, TypeError, "x: expected .* got int64"),
        ({"x": np.ones(3)}, ValueError, r"x: expected a matrix or a stack .* shape \(3,\)"),
        ({"steps": 0}, ValueError, r"orthogonalize\(steps\): expected an integer >= 1, got 0"),
        ({"coefficients": "cams"}, ValueError, r"orthogonalize\(coefficients\): expected one of"),
        ({"coefficients": 3.4}, TypeError, r"orthogonalize\(coefficients\): expected the name"),
        ({"coefficients": (1.0, 2.0)}, TypeError, "expected 3 numbers"),
        ({"coefficients": [(1, 2, 3)]}, ValueError, "1 triples for 5 steps"),
        ({"norm": "spectral"}, ValueError, r"orthogonalize\(norm\): expected one of"),
        ({"gram": 1}, ValueError, r"orthogonalize\(gram\): expected one of"),
        ({"eps": -1.0}, ValueError, r"orthogonalize\(eps\): expected a number >= 0"),
    ],
)
def test_refusals(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fo.orthogonalize(**{"x": np.ones((2, 3)), **settings})


# ---------------------------------------------------------------- in the compiled core


def in_core(stack: Array, workspace: Array, threads: int = 1, by_row: bool = False) -> None:
    rows = coefficient_set("keller", 5).rows
    triples = [value for row in rows for value in row]
    core.orthogonalize(stack, workspace, triples, 1.0, 1e-30, 0.5, by_row, threads)


def space_for(stack: Array, threads: int) -> int:
    return threads * core.orthogonalize_space(*stack.shape[1:])


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (1, 40),
        (40, 1),
        (3, 5),
        (15, 16),
        (16, 17),
        (33, 31),
        (64, 64),
        (63, 130),
        (200, 65),
    ],
)
def test_the_bits_are_the_same_everywhere(shape: tuple[int, int], dtype: Any, by_row: bool) -> None:
    rng = np.random.default_rng(10)
    u = rng.standard_normal((5, *shape)).astype(dtype)
    u[1] *= 1e-25
    u[2] = 0
    u[3] = np.outer(u[3, :, 0], u[3, 0])
    guards, results = Guards(1), []
    before = fo.get_isa()
    try:
        for isa in isas():
            fo.set_isa(isa)
            for threads, slots, offset in ((1, 1, 0), (2, 2, 1), (7, 7, 3), (7, 2, 5)):
                room = guards.place(np.full(space_for(u, slots) + offset, np.nan, dtype))
                stack = guards.place(u)
                in_core(stack, room[offset:], threads, by_row)
                results.append(stack.copy())
    finally:
        fo.set_isa(before)
    assert guards.intact()
    assert {result.tobytes() for result in results} == {results[0].tobytes()}
    settings: dict[str, Any] = {"norm": "aol"} if by_row else {}
    expected = 0.5 * np.stack([textbook(matrix, **settings) for matrix in u])
    assert share(results[0], expected, 485, dtype) <= EPSILONS


def test_small_matrices_are_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    side = int(SMALL**0.5)
    iteration = Iteration(coefficient_set("keller", 5), "frobenius", "auto", 1e-30)
    assert iteration.in_core(side, side)
    assert iteration.in_core(1, SMALL)
    assert not iteration.in_core(side, side + 1)
    assert not Iteration(iteration.coefficients, "frobenius", True, 1e-30).in_core(4, 4)
    monkeypatch.setattr(newton_schulz, "core", None)
    assert not iteration.in_core(side, side)
    u = np.random.default_rng(11).standard_normal((3, 20, 30))
    np.testing.assert_allclose(fo.orthogonalize(u), np.stack(list(map(textbook, u))), atol=1e-12)


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (None, fo.get_threads())])
def test_a_stack_has_the_threads_of_its_optimizer(
    asked: int | None, given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    spy = SimpleNamespace(
        orthogonalize=lambda *arguments: seen.append(arguments[-1]),
        orthogonalize_space=core.orthogonalize_space,
    )
    monkeypatch.setattr(newton_schulz, "core", spy)
    params = [np.zeros((8, 8)) for _ in range(3)]
    fo.Optimizer(params, fo.Muon(), threads=asked).step([np.ones((8, 8)) for _ in params])
    assert seen == [given]  # the three are one stack


@pytest.mark.parametrize(
    ("stack", "workspace", "error"),
    [
        (np.ones((2, 3, 4)), np.ones(1), ValueError),
        (np.ones((2, 3, 4), np.float32), np.ones(9999), TypeError),
        (np.ones((2, 3, 4), np.float16), np.ones(9999, np.float16), TypeError),
        (np.ones((3, 4)), np.ones(9999), TypeError),
        (np.ones((2, 4, 3)).transpose(0, 2, 1), np.ones(9999), TypeError),
        (np.ones((2, 3, 4)), np.ones(19998)[::2], TypeError),
        (np.broadcast_to(np.ones(4), (2, 3, 4)), np.ones(9999), TypeError),
    ],
)
def test_what_the_core_would_write_beyond_is_refused(
    stack: Array, workspace: Array, error: type[Exception]
) -> None:
    before = stack.copy()
    with pytest.raises(error, match="orthogonalize: "):
        in_core(stack, workspace)
    np.testing.assert_array_equal(stack, before)


def test_the_core_writes_nothing_that_is_read_only() -> None:
    stack = np.ones((2, 3, 4))
    stack.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        in_core(stack, np.ones(9999))


def test_lists_of_triples_are_accepted() -> None:
    x = np.random.default_rng(9).standard_normal((5, 8))
    rows = [list(row) for row in coefficient_set("you", 5).rows]
    got = fo.orthogonalize(x, coefficients=rows)  # type: ignore[arg-type]
    np.testing.assert_array_equal(got, fo.orthogonalize(x, coefficients="you"))
    assert len(NAMES) == len(SETS)
