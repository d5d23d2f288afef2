"""The two estimates that Sophia takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fusedopt as fo


def test_bartlett_labels_follow_the_softmax() -> None:
    rng = np.random.default_rng(0)
    logits = np.log(np.broadcast_to([0.2, 0.3, 0.5], (100_000, 3))) + 7.0

    def backward(labels: np.ndarray) -> dict[str, Any]:
        assert labels.shape == (100_000,)
        return {"counts": np.bincount(labels, minlength=3)}

    counts = fo.hessian.gauss_newton_bartlett(logits, backward, rng)["counts"]
    # Five standard deviations of a count are at most 790.
    np.testing.assert_allclose(counts, [20_000, 30_000, 50_000], atol=800)


def test_bartlett_estimates_the_diagonal_of_a_softmax_regression() -> None:
    """B times the squared mean gradient has the Gauss-Newton diagonal as its expectation."""
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((8, 4)), rng.standard_normal((4, 3))
    logits = x @ w
    q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)

    def backward(labels: np.ndarray) -> np.ndarray:
        return np.asarray(x.T @ (q - np.eye(3)[labels]) / len(x))

    draws = [fo.hessian.gauss_newton_bartlett(logits, backward, rng) for _ in range(20_000)]
    estimate = len(x) * np.mean(np.square(draws), axis=0)
    diagonal = (x * x).T @ (q * (1 - q)) / len(x)
    np.testing.assert_allclose(estimate, diagonal, rtol=0.1)


def test_hutchinson_finds_the_diagonal_and_restores_the_bits() -> None:
    rng = np.random.default_rng(2)
    a = rng.standard_normal((6, 6))
    hessian = a @ a.T - 2 * np.eye(6)  # indefinite
    params: Any = {"x": [rng.standard_normal(6)], "frozen": np.ones(2)}
    before = params["x"][0].copy()

    def gradient() -> dict[str, Any]:
        return {"x": [hessian @ params["x"][0]], "frozen": None}

    draws = [fo.hessian.hutchinson(gradient, params, rng) for _ in range(4000)]
    np.testing.assert_array_equal(params["x"][0], before)
    assert draws[0]["frozen"] is None
    mean = np.mean([d["x"][0] for d in draws], axis=0)
    spread = np.std([d["x"][0] for d in draws], axis=0) / 4000**0.5
    assert (np.abs(mean - np.diag(hessian)) < 5 * spread).all()

    def failing() -> Any:
        assert (params["x"][0] != before).any()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fo.hessian.hutchinson(failing, params, rng)
    np.testing.assert_array_equal(params["x"][0], before)


def test_gradients_may_be_written_over_each_other() -> None:
    params, out = [np.array([1.0, 2.0])], np.empty(2)

    def gradient() -> list[np.ndarray]:
        np.multiply(params[0], [3.0, 5.0], out=out)
        return [out]

    draws = [
        fo.hessian.hutchinson(gradient, params, np.random.default_rng(k))[0] for k in range(200)
    ]
    noise = [np.random.default_rng(k).standard_normal(2) for k in range(200)]
    np.testing.assert_allclose(draws, np.square(noise) * [3.0, 5.0], atol=1e-9)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (fo.Sophia(bs=10), 0.01 * 0.09),
        (fo.Sophia(bs=10, form="paper"), 0.01 * 10 * 0.09),
        (fo.Sophia(bs=10, form="paper", estimator="hutchinson"), 0.01 * -0.3),
    ],
)
def test_refresh(rule: fo.Rule, expected: float, backend: str) -> None:
    p = np.ones(3)
    opt = fo.Optimizer(p, rule, backend=backend)
    opt.step(np.ones(3), hessian=np.full(3, -0.3))
    np.testing.assert_allclose(opt.state["params"]["h"], expected, rtol=1e-13)
    # The refresh comes after the update: h was still zero, and the step the clipped one.
    np.testing.assert_allclose(p, 1 - 1e-4 - 1e-5, rtol=1e-13)
    opt.step(np.ones(3))
    np.testing.assert_allclose(opt.state["params"]["h"], expected, rtol=1e-13)


def test_a_step_without_an_estimate_after_one_of_the_other_dtype() -> None:
    p = np.ones(1000, np.float32)
    opt = fo.Optimizer({"p": p, "q": np.ones(3)}, fo.Sophia())
    g = {"p": np.ones(1000), "q": np.ones(3)}
    opt.step(g, hessian=g)
    h = opt.state["p"]["h"].copy()
    opt.step(g, hessian={"p": None, "q": np.ones(3)})
    opt.step(g)
    np.testing.assert_array_equal(opt.state["p"]["h"], h)
