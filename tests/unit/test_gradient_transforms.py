"""Gradients that are centralised, and clipped by rows or leaf, before a step."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from exactness import Array

SHAPES: dict[str, Any] = {
    "w": (37, 301),
    "conv": (5, 3, 3, 2),
    "b": (77,),
    "scale": (),
    "no": (0, 4),
}
BACKENDS = ("native", "numba", "reference")
OPTIONS: dict[str, dict[str, Any]] = {
    "leaf": {"clip_leaf": 2.0},
    "adaptive": {"clip_adaptive": 0.05},
    "centralized": {"centralize": True},
    "all": {"clip_leaf": 2.0, "clip_adaptive": 0.05, "centralize": True},
}


def draw(
    seed: int, dtype: Any = np.float32, scale: float = 1.0, order: Any = "F"
) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    made = {k: np.asarray(scale * rng.standard_normal(s)) for k, s in SHAPES.items()}
    made["w"][::3] *= 1e-3  # rows within their limits
    made["w"] = np.asarray(made["w"], order=order)
    return {k: a.astype(dtype) for k, a in made.items()}


def norms(a: Array) -> Any:
    """Return the norm of each row, as a column; of an array with one axis, that of all."""
    axes = tuple(range(1, a.ndim)) if a.ndim > 1 else None
    return np.sqrt(np.sum(a.astype(np.float64) ** 2, axis=axes, keepdims=a.ndim > 1))


def transformed(p: Array, g: Array, options: dict[str, Any], scale: float) -> Array:
    """The gradient as the papers have it, in float64, and unscaled."""
    made = g.astype(np.float64) / scale
    if options.get("centralize") and g.ndim > 1 and g.size:
        made -= made.mean(axis=tuple(range(1, g.ndim)), keepdims=True)
    if "clip_adaptive" in options:
        limit = options["clip_adaptive"] * np.maximum(norms(p), 1e-3)
        made = made * np.minimum(1.0, limit / np.maximum(norms(made), 1e-300))
    if "clip_leaf" in options:
        made = made * min(1.0, options["clip_leaf"] / max(float(np.sqrt(np.sum(made**2))), 1e-300))
    return made


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["C", "F"])
def test_values(order: str, backend: str, dtype: Any, options: dict[str, Any]) -> None:
    params, grads = draw(0, dtype, order=order), draw(1, np.float32, 8.0, order)
    start = {k: p.astype(np.float64) for k, p in params.items()}
    before = {k: g.tobytes() for k, g in grads.items()}
    opt = fo.Optimizer(params, fo.SGD(lr=0.5), backend=backend, **options)
    opt.step(grads, grad_scale=4.0)
    for k, p in params.items():
        want = start[k] - 0.5 * transformed(start[k], grads[k], options, 4.0)
        np.testing.assert_allclose(p, want, rtol=0, atol=3e-6)
        assert grads[k].tobytes() == before[k]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("order", ["C", "F"])
def test_backends_have_the_same_bits(order: str, dtype: Any, options: dict[str, Any]) -> None:
    found = set()
    for backend, threads in (("native", 1), ("native", 2), ("numba", 2)):
        params = draw(0, dtype, order=order)
        opt = fo.Optimizer(
            params, fo.AdamW(lr=0.1, weight_decay=0.1), clip_norm=1.5, stats=True,
            backend=backend, threads=threads, **options,
        )  # fmt: skip
        for seed in range(3):
            info = opt.step(draw(seed + 1, dtype, 3.0, order))
        found.add((opt.fingerprint(), repr(info)))
    assert len(found) == 1


def large(seed: int, dtype: Any, scale: float = 1.0) -> dict[str, Array]:
    """Rows beyond a segment, many rows, tails, and leaves that no limit changes."""
    rng = np.random.default_rng(seed)
    shapes: Any = {"long": (3, 40_001), "many": (2000, 39), "flat": (70_001,), "thin": (9, 1)}
    made = {k: scale * rng.standard_normal(s) for k, s in shapes.items()}
    made["many"][1::2] *= 1e-6
    return {k: a.astype(dtype) for k, a in made.items()} | {"zero": np.zeros((4, 3), dtype)}


KINDS: list[tuple[Any, Any, float]] = [
    (np.float32, np.float32, 1.0),
    (np.float32, np.float16, 1.0),
    (ml_dtypes.bfloat16, ml_dtypes.bfloat16, 1.0),
    (np.float64, np.float64, 1.0),
    (np.float64, np.float32, 1.0),
    (np.float64, np.float64, 1e-200),
    (np.float64, np.float64, 1e200),
]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("dtype", "given", "scale"), KINDS)
def test_the_core_has_the_bits_of_numpy(
    dtype: Any, given: Any, scale: float, options: dict[str, Any]
) -> None:
    """One call of the core, on one thread and two, and NumPy's passes before Numba's step."""
    found = []
    for more in (
        {"threads": 1},
        {"threads": 2},
        {"threads": 2, "zero_grads": True},
        {"backend": "numba"},
        {"stats": True},
    ):
        params = large(0, dtype, scale)
        arguments: dict[str, Any] = {"clip_leaf": scale} | options | dict(more)
        opt = fo.Optimizer(
            params, fo.SGD(lr=0.25), clip_norm=scale * 3.0, skip_nonfinite=True, **arguments
        )
        norms = []
        for seed in (1, 2, 3):
            grads = large(seed, given, scale * (1e-3 if seed == 2 else 5.0))
            before = {k: g.tobytes() for k, g in grads.items()}
            norms.append(opt.step(grads, grad_scale=2.0).grad_norm)
            for k, g in grads.items():
                assert not g.any() if "zero_grads" in more else g.tobytes() == before[k]
            grads["long"][1, 2] = np.nan
            assert opt.step(grads).skipped
            assert np.isnan(grads["long"][1, 2])  # not zeroed
        found.append((opt.fingerprint(), norms))
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step_that_is_not_taken_leaves_gradients(options: dict[str, Any]) -> None:
    params, grads = draw(0, order="C"), draw(1, np.float32, 3.0, "C")
    opt = fo.Optimizer(params, fo.AdamW(), clip_norm=1.0, zero_grads=True, **options)
    opt.step(draw(2, np.float32, 3.0, "C"))
    mark, before = opt.fingerprint(), {k: g.copy() for k, g in grads.items()}
    grads["w"][5, 7] = before["w"][5, 7] = np.inf
    with pytest.raises(FloatingPointError, match="in w"):
        opt.step(grads)
    assert opt.fingerprint() == mark
    assert all(g.tobytes() == before[k].tobytes() for k, g in grads.items())
    grads["w"][5, 7] = 1.0
    opt.step(grads)
    assert not any(g.any() for g in grads.values())


def test_one_call_of_the_core() -> None:
    """Where rows are dense; masters and other orders are NumPy's."""
    options: Any = {"clip_leaf": 1.0, "clip_adaptive": 0.1, "centralize": True}
    plain, turned = np.ones((4, 3), np.float32), np.ones((4, 3), np.float32, order="F")
    half = np.ones((4, 3), ml_dtypes.bfloat16)
    for p, more, alone in (
        (plain, {}, True),
        (plain[0], {}, True),
        (half, {"state_dtype": "bfloat16"}, True),
        (turned, {}, False),
        (half, {"master": "float32"}, False),
    ):
        opt = fo.Optimizer(p.copy(order="K"), fo.AdamW(), **(options | more))
        assert (opt._assembly.whole_step is not None) == alone


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_step_is_that_of_the_transformed_gradient(options: dict[str, Any]) -> None:
    """To the bits, where all limits are powers of two and rows have norms that are such."""
    p = np.ones((4, 16), np.float32)
    g = np.repeat(np.array([[2], [1], [0.25], [0]], np.float32), 16, axis=1)
    g[:, ::2] *= -1  # centred, with norms of 8, 4, 1 and 0
    twin, want = p.copy(), g.copy()
    if "clip_adaptive" in options:
        options = options | {"clip_adaptive": 0.5}  # of norms of 4
        want[:2] = np.sign(g[:2]) * 0.5
    if "clip_leaf" in options:
        norm = np.sqrt(np.sum(want.astype(np.float64) ** 2))
        want *= np.float32(2.0 / norm)
    fo.Optimizer(p, fo.AdamW(), **options).step(g)
    fo.Optimizer(twin, fo.AdamW()).step(want)
    assert p.tobytes() == twin.tobytes()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ways_to_step(options: dict[str, Any]) -> None:
    """Parts, accumulated gradients, verified steps and zeroed gradients."""
    made = []
    for more in ({}, {}, {}, {"verify": True}, {"zero_grads": True}):
        arguments: dict[str, Any] = {**options, **more}
        made.append(fo.Optimizer(draw(0), fo.Momentum(lr=0.1), **arguments))
    whole, parts, summed, verified, zeroing = made
    for seed in range(1, 4):
        grads = draw(seed, scale=3.0)
        whole.step(grads)
        verified.step(grads)
        for k in reversed(SHAPES):
            parts.step_part([k], [grads[k]])
        parts.step_part([], [], last=True)
        summed.accumulate(grads)
        summed.step()
        zeroing.step(grads)
        assert not any(g.any() for g in grads.values())
    assert len({opt.fingerprint() for opt in made}) == 1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(bad: float, options: dict[str, Any]) -> None:
    params, grads = draw(0), draw(1, scale=3.0)
    grads["w"][5, 7] = bad
    opt = fo.Optimizer(params, fo.AdamW(), skip_nonfinite=True, **options)
    mark = opt.fingerprint()
    info = opt.step(grads)
    assert info.skipped
    assert info.bad_leaves == ("w",)
    assert opt.fingerprint() == mark
    with pytest.raises(FloatingPointError, match="in w"):
        fo.Optimizer(params, fo.AdamW(), clip_norm=1.0, **options).step(grads)
    assert opt.fingerprint() == mark


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_some_rows_are_refused(options: dict[str, Any]) -> None:
    params = {"w": np.ones((9, 4), np.float32), "b": np.ones(3, np.float32)}
    opt = fo.Optimizer(params, fo.SGD(), **options)
    mark = opt.fingerprint()
    rows = fo.Rows(np.array([2]), np.ones((1, 4), np.float32))
    with pytest.raises(ValueError, match=r"grads\['w'\]: .* need all rows"):
        opt.step({"w": rows, "b": np.ones(3, np.float32)})
    assert opt.fingerprint() == mark
    with pytest.raises(ValueError, match="leave out exact"):
        fo.Optimizer(params, fo.SGD(), exact=True, **options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"clip_leaf": 0.0}, ValueError),
        ({"clip_leaf": "1"}, TypeError),
        ({"clip_adaptive": -1.0}, ValueError),
        ({"clip_adaptive": True}, TypeError),
        ({"centralize": 1}, TypeError),
    ],
)
def test_values_that_do_not_fit(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        fo.Optimizer(np.ones(3), fo.SGD(), **options)
