"""Dion against a loop of its own in float64, and what sets it apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from fusedopt.backends import matrices
from fusedopt.rules import dion
from of_matrices import draw, stepped_with_all_options

SHAPES = [(6, 10), (10, 6), (7, 7), (1, 5), (5, 1), (4, 3, 2)]
BACKENDS = ["native", "numba", "reference"]


def orthonormal(a: np.ndarray) -> np.ndarray:
    """By Gram and Schmidt, twice: any basis of these nested spaces does."""
    columns: list[np.ndarray] = []
    for x in a.T:
        for each in 2 * columns:
            x = x - (each @ x) * each
        columns.append(x / np.linalg.norm(x))
    return np.stack(columns, axis=1)


class Plain:
    """The paper's algorithm for one process."""

    def __init__(self, p: np.ndarray, rule: Any) -> None:
        self.x, self.rule = p.reshape(len(p), -1).copy(), rule
        rank = max(1, math.ceil(rule.rank_fraction * min(self.x.shape)))
        self.m = np.zeros_like(self.x)
        self.q = np.random.default_rng(0).standard_normal((self.x.shape[1], rank))

    def step(self, g: np.ndarray) -> None:
        g, rule = g.reshape(self.x.shape), self.rule
        if rule.maximize:
            g = -g
        if rule.decay == "l2":
            g = g + rule.weight_decay * self.x
        b = self.m + g
        basis = orthonormal(b @ self.q)
        r = b.T @ basis
        self.m = b - (1 - rule.momentum) * basis @ r.T
        self.q = r / (np.linalg.norm(r, axis=0) + rule.eps)
        rows, cols = g.shape
        decayed = rule.lr * rule.weight_decay * self.x if rule.decay == "decoupled" else 0
        self.x = self.x - decayed - rule.lr * math.sqrt(rows / cols) * basis @ self.q.T


SETTINGS: list[dict[str, Any]] = [
    {},
    {"rank_fraction": 0.25, "momentum": 0.8},
    {"rank_fraction": 0.5, "eps": 0.1, "decay": "l2", "maximize": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_plain_form(settings: Any, shape: Any, order: Any, backend: str) -> None:
    rule = fo.Dion(**{"lr": 0.1, "weight_decay": 0.1, **settings})
    p = np.asarray(draw(shape, 1, seed=1)[0], order=order)
    plain = Plain(p, rule)
    optimizer = fo.Optimizer(p, rule, backend=backend)
    for g in draw(shape, 12):
        optimizer.step(np.asarray(g, order=order))
        plain.step(g)
    np.testing.assert_allclose(p.reshape(plain.x.shape), plain.x, rtol=1e-7, atol=1e-9)
    m = optimizer.state["params"]["m"].reshape(plain.x.shape)
    np.testing.assert_allclose(m, plain.m, rtol=1e-7, atol=1e-7)


def test_float32_stays_near() -> None:
    runs = []
    for dtype in (np.float32, np.float64):
        p = np.ones((40, 60), dtype)
        optimizer = fo.Optimizer(p, fo.Dion(lr=1.0, rank_fraction=0.25))
        for g in draw(p.shape, 8):
            optimizer.step(g.astype(dtype))
        runs.append(p)
    np.testing.assert_allclose(runs[0], runs[1], atol=1e-4)


@pytest.mark.parametrize(("fraction", "rank"), [(0.0, 1), (0.25, 3), (0.3, 3), (1.0, 9)])
def test_a_step_has_the_rank_and_what_it_leaves_stays(fraction: float, rank: int) -> None:
    p = np.zeros((9, 14))
    rule = fo.Dion(lr=1.0, rank_fraction=fraction, weight_decay=0.0, eps=0.0)
    optimizer = fo.Optimizer(p, rule)
    assert optimizer.state["params"]["Q"].shape == (14, rank)
    assert f"rank {rank}" in optimizer.describe()
    for g in draw(p.shape, 5):
        before, m = p.copy(), optimizer.state["params"]["m"].copy()
        optimizer.step(g)
        step = before - p
        assert np.linalg.matrix_rank(step, tol=1e-8) == rank
        # rank directions, each of one unit on the side of P.
        np.testing.assert_allclose(np.linalg.norm(step) ** 2, rank * 9 / 14, rtol=1e-9)
        left = np.linalg.svd(step)[0][:, :rank]
        taken = left @ left.T @ (m + g)  # what of M lies in the columns of P
        expected = m + g - 0.05 * taken
        np.testing.assert_allclose(optimizer.state["params"]["m"], expected, atol=1e-9)


def test_of_a_steady_gradient_the_directions_become_the_largest() -> None:
    rng = np.random.default_rng(3)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (8, 12))
    g = left @ np.diag([10.0, 9, 1, 0.9, 0.8, 0.7, 0.6, 0.5]) @ right[:8]
    p = np.zeros((8, 12))
    # With mu = 0 all that a step takes is gone.
    optimizer = fo.Optimizer(p, fo.Dion(lr=1.0, momentum=0.0, weight_decay=0.0, rank_fraction=0.25))
    optimizer.step(g)
    for _ in range(60):
        before = p.copy()
        optimizer.step(g)
    step = before - p
    sizes = np.linalg.svd(step)[1]
    assert (sizes[2:] < 1e-12).all()
    # Nothing is left for good: what one step does not take, a later one does.
    assert np.linalg.norm(optimizer.state["params"]["m"]) < 60 * np.linalg.norm(g) / 4


@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "float8", "dynamic8", "dynamic4"])
def test_formats_clipping_and_averages(state_dtype: Any) -> None:
    optimizer = stepped_with_all_options(fo.Dion(), state_dtype)
    assert optimizer.leaf_state("w")[0].sides["Q"].data.dtype == np.float32


def test_a_zero_gradient_leaves_q_as_it_is() -> None:
    p = np.ones((6, 8))
    optimizer = fo.Optimizer(p, fo.Dion(eps=0.0, weight_decay=0.0), verify=True)
    for _ in range(3):
        optimizer.step(np.zeros_like(p))
    np.testing.assert_array_equal(p, 1)
    np.testing.assert_array_equal(optimizer.state["params"]["Q"], dion.first((8, 6)))


def test_a_step_has_what_q_has_no_numbers_for() -> None:
    p, (g,) = np.zeros((4, 3), np.float32), draw((4, 3), 1)
    optimizer = fo.Optimizer(p, fo.Dion(lr=3.0, eps=1e-3, weight_decay=0.0), verify=True)
    optimizer.step((1e-43 * g).astype(np.float32))
    assert not optimizer.state["params"]["Q"].any()
    assert np.abs(p).max() > 1e-40


def test_the_rank_is_settled() -> None:
    optimizer = fo.Optimizer(np.ones((4, 4)), fo.Dion())
    with pytest.raises(ValueError, match=r"Dion\(rank_fraction\): the states of .* were begun"):
        optimizer.replace(rank_fraction=0.5)
    with pytest.raises(ValueError, match=r"Dion\(rank_fraction\): .* takes no schedule"):
        fo.Dion(rank_fraction=lambda t: 0.5)  # type: ignore[arg-type]
    optimizer.replace(momentum=0.5, eps=0.0)


def test_memory_that_is_missing_is_missed_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [np.ones((400, 300)), np.ones((5, 5))]
    optimizer = fo.Optimizer(params, fo.Dion())
    grads = [draw(p.shape, 1)[0] for p in params]
    optimizer.step(grads)
    before, empty = optimizer.fingerprint(), np.empty
    asked = []

    def limited(shape: Any, *arguments: Any, **more: Any) -> Any:
        if arguments == (np.uint8,):
            asked.append(shape)
            raise MemoryError
        return empty(shape, *arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(np, "empty", limited)
        with pytest.raises(MemoryError):
            optimizer.step(grads)
    assert asked == [matrices.RESERVE + fo.Dion().reserve((400, 300))]
    assert optimizer.fingerprint() == before
    optimizer.step(grads)


@pytest.mark.parametrize("shift", [1e-3, -1e-3])
@pytest.mark.parametrize("of", ["sqrt", "qr", "einsum"])
def test_mutants_are_seen(of: str, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale, a basis and norms that are off by a thousandth, on the way that steps take."""
    rule = fo.Dion(lr=1.0, rank_fraction=0.25)
    grads = [g.astype(np.float32) for g in draw((20, 30), 3)]

    def run() -> None:
        optimizer = fo.Optimizer(np.ones((20, 30), np.float32), rule, verify=True)
        for g in grads:
            optimizer.step(g)

    run()
    between, scale = fo.Dion.between, 1 + shift

    def mutated(self: Any, *arguments: Any) -> None:
        with monkeypatch.context() as patched:
            if of == "sqrt":
                sqrt = math.sqrt
                patched.setattr(math, "sqrt", lambda x: scale * sqrt(x))
            elif of == "qr":
                qr = np.linalg.qr
                patched.setattr(np.linalg, "qr", lambda a: (scale * qr(a)[0],))
            else:
                einsum = np.einsum
                patched.setattr(np, "einsum", lambda *a: scale * einsum(*a))
            between(self, *arguments)

    monkeypatch.setattr(fo.Dion, "between", mutated)
    with pytest.raises(fo.VerificationError):
        run()
