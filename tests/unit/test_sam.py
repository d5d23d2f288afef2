"""Sharpness-aware minimisation around an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from exactness import Array

SHAPES = {"w": (301, 111), "b": (77,), "scale": ()}
EPS: dict[Any, float] = {
    np.float32: 2.0**-23,
    np.float64: 2.0**-52,
    np.float16: 2.0**-10,
    ml_dtypes.bfloat16: 2.0**-7,
}
BACKENDS = ("native", "numba", "reference")


def problem(dtype: Any = np.float32, seed: int = 3) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    made = {k: np.asarray(rng.standard_normal(s)).astype(dtype) for k, s in SHAPES.items()}
    made["w"] = np.asfortranarray(made["w"])
    return made


def loss_of(params: dict[str, Array]) -> Callable[[], dict[str, Array]]:
    """The gradients of a loss whose curvature differs from element to element."""
    curvature = problem(seed=4)

    def gradients() -> dict[str, Array]:
        wide = {k: p.astype(np.float64) for k, p in params.items()}
        return {k: (p + curvature[k] ** 2 * p**3).astype(np.float32) for k, p in wide.items()}

    return gradients


def uphill(params: dict[str, Array], grads: dict[str, Array], rho: float, adaptive: bool) -> Any:
    """The move as the papers have it, in float64."""
    p = {k: a.astype(np.float64) for k, a in params.items()}
    g = {k: a.astype(np.float64) for k, a in grads.items()}
    if adaptive:
        norm = np.sqrt(sum(float(np.sum((p[k] * g[k]) ** 2)) for k in p))
        return {k: p[k] + rho * p[k] ** 2 * g[k] / norm for k in p}
    norm = np.sqrt(sum(float(np.sum(a**2)) for a in g.values()))
    return {k: p[k] + rho * g[k] / norm for k in p}


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_move_and_its_end(backend: str, dtype: Any, adaptive: bool) -> None:
    params = problem(dtype)
    grads = loss_of(params)()
    opt = fo.Optimizer(params, fo.AdamW(weight_decay=0.1), backend=backend)
    mark, own = opt.fingerprint(), {k: p.copy() for k, p in params.items()}
    want = uphill(params, grads, 3.0, adaptive)
    with fo.SAM(opt, rho=3.0, adaptive=adaptive).perturbed(grads):
        for k, p in params.items():
            size = np.maximum(np.maximum(abs(want[k]), abs(own[k])), 2.0**-14)
            assert (abs(p.astype(np.float64) - want[k]) <= (EPS[dtype] + 1e-6) * size).all()
        assert opt.fingerprint() != mark
    assert opt.fingerprint() == mark


@pytest.mark.parametrize("adaptive", [False, True])
def test_backends_have_the_same_bits(adaptive: bool) -> None:
    found = set()
    for backend, threads in (("native", 1), ("native", 2), ("numba", 2)):
        params = problem()
        opt = fo.Optimizer(
            params, fo.AdamW(lr=0.01, weight_decay=0.1), backend=backend, threads=threads,
            clip_norm=1.0,
        )  # fmt: skip
        for _ in range(3):
            fo.SAM(opt, rho=0.5, adaptive=adaptive).step(loss_of(params), lr=0.02)
        found.add(opt.fingerprint())
    assert len(found) == 1


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("options", [{}, {"verify": True}, {"slow_weights": fo.Lookahead(k=2)}])
def test_steps_are_those_with_the_gradient_there(options: dict[str, Any], adaptive: bool) -> None:
    params, twins = problem(), problem()
    opt = fo.Optimizer(params, fo.Momentum(lr=0.1), **options)
    plain = fo.Optimizer(twins, fo.Momentum(lr=0.1), **options)
    sam = fo.SAM(opt, rho=0.5, adaptive=adaptive)
    closure = loss_of(params)
    for _ in range(4):
        with sam.perturbed(closure()):
            grads = closure()
        plain.step(grads, grad_scale=2.0)
        sam.step(closure, grad_scale=2.0)
        assert opt.fingerprint() == plain.fingerprint()


def test_trajectory_of_the_authors_form() -> None:
    """A PyTorch SAM as the paper's algorithm 1 has it, over torch.optim's SGD."""
    torch = pytest.importorskip("torch")
    start = np.random.default_rng(0).standard_normal(501).astype(np.float32)
    curvature = torch.linspace(0.1, 3.0, 501)
    w = torch.tensor(start.copy(), requires_grad=True)
    base = torch.optim.SGD([w], lr=0.05, momentum=0.9)
    p = start.copy()
    sam = fo.SAM(fo.Optimizer(p, fo.Momentum.like("torch", lr=0.05, momentum=0.9)), rho=0.3)
    for _ in range(10):
        w.grad = (w * curvature).detach()
        with torch.no_grad():
            e = 0.3 * w.grad / (w.grad.norm() + 1e-12)
            w += e
            w.grad = w * curvature
            w -= e
        base.step()
        sam.step(lambda: p * curvature.numpy())
        np.testing.assert_allclose(p, w.detach().numpy(), rtol=0, atol=3e-6)


def test_rows_and_leaves_without_gradients() -> None:
    params = {"table": np.ones((50, 4), np.float32), "w": np.ones(3, np.float32)}
    opt = fo.Optimizer(params, fo.SGD(lr=0.1))
    values = np.array([[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 1]], np.float32)
    rows = fo.Rows(np.array([7, 9, 7]), values)  # row 7 has (0, 0, 0, 2), and the norm is sqrt(8)
    with fo.SAM(opt, rho=8**0.5).perturbed({"table": rows, "w": None}):
        want = np.ones((50, 4), np.float32)
        want[[7, 9], 3] = 3.0
        np.testing.assert_allclose(params["table"], want, rtol=1e-6)
        assert (params["w"] == 1).all()
    assert (params["table"] == 1).all()
    with pytest.raises(ValueError, match="adaptive"):
        fo.SAM(opt, adaptive=True).perturbed({"table": rows, "w": None})


@pytest.mark.parametrize("adaptive", [False, True])
def test_nothing_is_left_behind(adaptive: bool) -> None:
    params = problem()
    opt = fo.Optimizer(params, fo.AdamW())
    sam = fo.SAM(opt, adaptive=adaptive)
    closure = loss_of(params)
    sam.step(closure)
    mark, calls = opt.fingerprint(), 0

    def fails() -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            assert opt.fingerprint() != mark
            raise KeyError
        return closure()

    with pytest.raises(KeyError):
        sam.step(fails)
    assert (opt.fingerprint(), calls) == (mark, 2)
    refusals: list[Callable[[], Any]] = [lambda: opt.step(closure()), lambda: sam.step(closure)]
    with sam.perturbed(closure()):
        for refused in refusals:
            with pytest.raises(RuntimeError, match=r"inside of perturbed\(\)"):
                refused()
    assert opt.fingerprint() == mark
    bad = closure() | {"b": np.full(77, np.nan, np.float32)}
    with pytest.raises(FloatingPointError, match="norm is nan"):
        sam.step(lambda: bad)
    with pytest.raises(ValueError, match="shape"):
        sam.step(lambda: closure() | {"b": np.ones(76, np.float32)})
    with pytest.raises(FloatingPointError):
        sam.step(lambda: closure() | {"b": np.full(77, np.inf, np.float32)})
    assert opt.fingerprint() == mark
    skipping = fo.SAM(fo.Optimizer(params, fo.AdamW(), skip_nonfinite=True), adaptive=adaptive)
    info = skipping.step(lambda: bad)
    assert info.skipped
    assert info.bad_leaves == ("b",)


def test_gradients_of_zero_move_nothing() -> None:
    params = problem()
    opt = fo.Optimizer(params, fo.SGD())
    mark = opt.fingerprint()
    with fo.SAM(opt).perturbed({k: np.zeros_like(p) for k, p in params.items()}):
        assert opt.fingerprint() == mark


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"rho": -0.1}, ValueError), ({"rho": "a"}, TypeError), ({"adaptive": 1}, TypeError)],
)
def test_values_that_do_not_fit(arguments: dict[str, Any], error: type[Exception]) -> None:
    opt = fo.Optimizer(np.ones(3), fo.SGD())
    with pytest.raises(error, match=next(iter(arguments))):
        fo.SAM(opt, **arguments)
    with pytest.raises(TypeError, match="optimizer"):
        fo.SAM(fo.SGD())  # type: ignore[arg-type]
