"""Shampoo against a loop of its own in float64, and what sets it apart."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from fusedopt.rules import shampoo
from of_matrices import draw, stepped_with_all_options

SHAPES = [(6, 10), (10, 6), (7, 7), (1, 5), (5, 1), (4, 3, 2)]
BACKENDS = ["native", "numba", "reference"]
GRAFTINGS = ["adam", "rmsprop", "adagrad", "sgd", "none"]


def parts(n: int, most: int) -> list[slice]:
    """As few parts as there can be, all of one length but for the last."""
    count = -(-n // most)
    length = -(-n // count)
    return [slice(k, min(k + length, n)) for k in range(0, n, length)]


def root(a: np.ndarray, eps: float) -> Any:
    values, vectors = np.linalg.eigh(a + eps * np.eye(len(a)))
    return vectors @ np.diag(values**-0.25) @ vectors.T


class Block:
    """A block as the distributed implementation has it, but that the gradient of a step is in the
    roots of the next, and eps in all eigenvalues."""

    def __init__(self, shape: tuple[int, ...], rule: Any) -> None:
        self.rule, self.t = rule, 0
        self.m, self.v = np.zeros(shape), np.zeros(shape)
        self.factors = [np.zeros((n, n)) for n in shape]
        self.roots: list[np.ndarray] | None = None

    def direction(self, g: np.ndarray) -> Any:
        rule, (b1, b2), b = self.rule, self.rule.betas, self.rule.shampoo_beta
        if self.t and self.t % rule.precondition_frequency == 0:
            c = 1 if b == 1 else 1 - b**self.t
            self.roots = [root(a / c, rule.eps) for a in self.factors]
        self.t += 1
        for k, outer in enumerate((g @ g.T, g.T @ g)):
            self.factors[k] = b * self.factors[k] + (1 if b == 1 else 1 - b) * outer
        self.m = b1 * self.m + (1 - b1) * g
        mean = self.m / (1 - b1**self.t)
        if rule.grafting == "adagrad":
            self.v = self.v + g**2
        else:
            self.v = b2 * self.v + (1 - b2) * g**2
        c2 = 1 - b2**self.t if rule.grafting == "adam" else 1
        plain = rule.grafting in ("sgd", "none")
        grafted = mean if plain else mean / (np.sqrt(self.v / c2) + rule.grafting_eps)
        if self.roots is None:
            return grafted
        s = self.roots[0] @ mean @ self.roots[1]
        if rule.grafting != "none":
            s = s * np.linalg.norm(grafted) / np.linalg.norm(s)
        return s


class Plain:
    def __init__(self, p: np.ndarray, rule: Any) -> None:
        self.p, self.rule = p.reshape(len(p), -1).copy(), rule
        sides = [parts(n, rule.max_precond_dim) for n in self.p.shape]
        self.blocks = {(r.start, c.start): (r, c) for r, c in product(*sides)}
        self.states = {at: Block(self.p[own].shape, rule) for at, own in self.blocks.items()}

    def step(self, g: np.ndarray) -> None:
        g, rule = g.reshape(self.p.shape), self.rule
        if rule.maximize:
            g = -g
        if rule.decay == "l2":
            g = g + rule.weight_decay * self.p
        moved = np.zeros_like(self.p)
        for at, own in self.blocks.items():
            moved[own] = self.states[at].direction(g[own])
        decayed = rule.weight_decay if rule.decay == "decoupled" else 0.0
        self.p = self.p - rule.lr * moved - rule.lr * decayed * self.p


# Eigenvalues that are zero but for rounding are far below these eps.
SETTINGS: list[dict[str, Any]] = [
    *({"grafting": name, "eps": 1e-6} for name in GRAFTINGS),
    {"shampoo_beta": 0.9, "eps": 1e-4, "precondition_frequency": 1},
    {"max_precond_dim": 4, "eps": 1e-6, "precondition_frequency": 5},
    {"max_precond_dim": 3, "grafting": "sgd", "eps": 1e-4, "betas": (0.0, 0.9)},
    {"decay": "l2", "maximize": True, "eps": 1e-6, "precondition_frequency": 1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_plain_form(settings: Any, shape: Any, order: Any, backend: str) -> None:
    rule = fo.Shampoo(**{"lr": 0.01, "weight_decay": 0.1, "precondition_frequency": 3, **settings})
    p = np.asarray(draw(shape, 1, seed=1)[0], order=order)
    plain = Plain(p, rule)
    optimizer = fo.Optimizer(p, rule, backend=backend)
    for g in draw(shape, 16):
        optimizer.step(np.asarray(g, order=order))
        plain.step(g)
    np.testing.assert_allclose(p.reshape(plain.p.shape), plain.p, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("most", [1024, 50])
def test_float32_stays_near(most: int) -> None:
    shape = (64, 90)
    rule: Any = fo.Shampoo(eps=1e-3, precondition_frequency=2, max_precond_dim=most)
    runs = []
    for dtype in (np.float32, np.float64):
        p = np.ones(shape, dtype)
        optimizer = fo.Optimizer(p, rule)
        for g in draw(shape, 8):
            optimizer.step(g.astype(dtype))
        runs.append(p)
    np.testing.assert_allclose(runs[0], runs[1], atol=1e-3 * rule.lr)
    assert np.abs(runs[1] - 1).max() > 2 * rule.lr


def test_what_comes_before_the_first_roots_is_adam() -> None:
    p, q = np.ones((5, 7)), np.ones((5, 7))
    optimizer = fo.Optimizer(p, fo.Shampoo(precondition_frequency=4))
    adam = fo.Optimizer(q, fo.Adam(lr=1e-3))
    for t, g in enumerate(draw(p.shape, 5)):
        optimizer.step(g)
        adam.step(g)
        if t < 4:
            np.testing.assert_allclose(p, q, rtol=1e-12)
    assert np.abs(p - q).max() > 1e-4


@pytest.mark.parametrize("grafting", GRAFTINGS)
def test_before_the_first_roots_an_element_that_is_not_finite_stays_alone(grafting: Any) -> None:
    p, (g,) = np.ones((5, 7), np.float32), draw((5, 7), 1)
    rule = fo.Shampoo(grafting=grafting, max_precond_dim=4, precondition_frequency=2)
    optimizer = fo.Optimizer(p, rule, verify=True)
    g[1, 6], g[4, 3] = np.inf, np.nan
    for _ in range(2):
        optimizer.step(g.astype(np.float32))
    np.testing.assert_array_equal(np.isfinite(p), np.isfinite(g))
    optimizer.step(g.astype(np.float32))
    blocks = np.zeros(p.shape, bool)
    blocks[:3, 4:] = blocks[3:, :4] = True
    np.testing.assert_array_equal(~np.isfinite(p), blocks)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_norms_are_right_where_squares_overflow(dtype: Any) -> None:
    small, large = (1e-6, 1e16) if dtype == np.float32 else (1e-12, 1e150)
    p, grads = np.zeros((5, 7), dtype), draw((5, 7), 2)
    rule = fo.Shampoo(grafting="sgd", lr=1.0, precondition_frequency=1, betas=(0.0, 0.9), eps=0.0)
    optimizer = fo.Optimizer(p, rule, verify=True)
    optimizer.step((small * grads[0]).astype(dtype))
    before = p.copy()
    optimizer.step((large * grads[1]).astype(dtype))
    norm = np.linalg.norm((p.astype(np.float64) - before) / large)
    assert norm == pytest.approx(np.linalg.norm(grads[1]), rel=1e-5)


def test_a_step_has_the_norm_of_the_grafted_rule() -> None:
    p, q = np.zeros((6, 9)), np.zeros((6, 9))
    optimizer = fo.Optimizer(p, fo.Shampoo(precondition_frequency=1))
    adam = fo.Optimizer(q, fo.Adam(lr=1e-3))
    for g in draw(p.shape, 5):
        before = p.copy(), q.copy()
        optimizer.step(g)
        adam.step(g)
        norms = (np.linalg.norm(after - old) for after, old in zip((p, q), before, strict=True))
        assert len({round(float(norm), 12) for norm in norms}) == 1


def test_without_grafting_one_gradient_becomes_orthogonal() -> None:
    # L^(-1/4) G R^(-1/4) of G's own L and R has the singular values 1.
    (g,) = draw((5, 5), 1)
    p = np.zeros((5, 5))
    rule = fo.Shampoo(lr=1.0, grafting="none", betas=(0.0, 0.0), precondition_frequency=1)
    optimizer = fo.Optimizer(p, rule)
    optimizer.step(g)
    before = p.copy()
    optimizer.step(g)
    np.testing.assert_allclose(np.linalg.svd(before - p)[1], 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("most", "blocks", "left", "right"),
    [(1024, (), 10, 21), (8, (2, 3), 5, 7), (10, (1, 3), 10, 7), (21, (), 10, 21)],
)
def test_blocks(most: int, blocks: tuple[int, ...], left: int, right: int) -> None:
    rule = fo.Shampoo(max_precond_dim=most, precondition_frequency=2)
    p = np.ones((10, 3, 7), np.float32)
    optimizer = fo.Optimizer(p, rule, verify=True)
    state = optimizer.state["params"]
    assert state["L"].shape == state["PL"].shape == (*blocks, left, left)
    assert state["R"].shape == state["PR"].shape == (*blocks, right, right)
    assert ("blocks of at most" in optimizer.describe()) == bool(blocks)
    for g in draw(p.shape, 6):
        optimizer.step(g.astype(np.float32))


def test_one_block_does_not_reach_another() -> None:
    p = np.ones((8, 8))
    optimizer = fo.Optimizer(p, fo.Shampoo(max_precond_dim=4, precondition_frequency=1))
    for t, g in enumerate(draw(p.shape, 6)):
        g[1, 2] = np.inf if t == 2 else g[1, 2]
        optimizer.step(g)
    assert np.isnan(p[:4, :4]).all()
    assert np.isfinite(p[4:]).all()
    assert np.isfinite(p[:, 4:]).all()


@pytest.mark.parametrize("grafting", GRAFTINGS)
def test_a_zero_gradient_and_eps_zero(grafting: Any) -> None:
    p = np.ones((4, 6), np.float32)
    rule = fo.Shampoo(eps=0.0, grafting_eps=0.0, precondition_frequency=1, grafting=grafting)
    optimizer = fo.Optimizer(p, rule, verify=True)
    for _ in range(3):
        optimizer.step(np.zeros_like(p))
    np.testing.assert_array_equal(p, 1)


@pytest.mark.parametrize("grafting", GRAFTINGS)
@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "float8", "dynamic8", "dynamic4"])
def test_formats_clipping_and_averages(grafting: Any, state_dtype: Any) -> None:
    """All that goes with other rules goes with this one; every element is compared."""
    rule = fo.Shampoo(grafting=grafting, precondition_frequency=1, max_precond_dim=50, eps=1e-4)
    optimizer = stepped_with_all_options(rule, state_dtype)
    sides = optimizer.leaf_state("w")[0].sides
    assert all(side.data.dtype == np.float32 for side in sides.values())


def test_roots_are_settled() -> None:
    optimizer = fo.Optimizer(np.ones((4, 4)), fo.Shampoo())
    for name, value in {
        "precondition_frequency": 3,
        "max_precond_dim": 3,
        "grafting": "sgd",
    }.items():
        with pytest.raises(ValueError, match=rf"Shampoo\({name}\): the states of .* were begun"):
            optimizer.replace(**{name: value})
    optimizer.replace(shampoo_beta=0.5, eps=1e-3, grafting_eps=0.0)


@pytest.mark.parametrize("value", [-0.1, 1.01, float("nan")])
def test_shampoo_beta_lies_between_zero_and_one(value: float) -> None:
    message = r"Shampoo\(shampoo_beta\): expected a number in \[0, 1\], got"
    with pytest.raises(ValueError, match=message):
        fo.Shampoo(shampoo_beta=value)
    assert fo.Shampoo(shampoo_beta=1).shampoo_beta == 1.0


def test_memory_that_is_missing_is_missed_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [np.ones((4, 4)), np.ones((5, 5))]
    optimizer = fo.Optimizer(params, fo.Shampoo(precondition_frequency=1))
    grads = [draw(p.shape, 1)[0] for p in params]
    optimizer.step(grads)
    before, calls, roots = optimizer.fingerprint(), [0], shampoo.inverse_roots

    def limited(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise MemoryError
        return roots(*arguments)

    monkeypatch.setattr(shampoo, "inverse_roots", limited)
    with pytest.raises(MemoryError):
        optimizer.step(grads)
    assert optimizer.fingerprint() == before
    optimizer.step(grads)
    assert optimizer.fingerprint() != before


MUTANTS = {
    "no product": ("accumulate", lambda moment, *_: None),
    "a product too small": (
        "accumulate", lambda moment, x, spare, keep, gain: moment.__iadd__(0.99 * gain * x @ x.T)
    ),
    "one root left out": ("multiply", lambda left, x, right, spare: np.copyto(x, left @ x)),
    "roots of another size": (
        "multiply", lambda left, x, right, spare: np.copyto(x, left @ left @ x @ right)
    ),
    "another norm": ("_norm", lambda x, spare: float(np.abs(x).sum())),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_seen(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = fo.Shampoo(precondition_frequency=1, eps=1e-3)
    grads = [g.astype(np.float32) for g in draw((20, 30), 3)]

    def run() -> None:
        optimizer = fo.Optimizer(np.ones((20, 30), np.float32), rule, verify=True)
        for g in grads:
            optimizer.step(g)

    run()
    monkeypatch.setattr(shampoo, *mutant)
    with pytest.raises(fo.VerificationError):
        run()
