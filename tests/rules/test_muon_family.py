"""NorMuon, AdaMuon and SOAP against plain float64 forms of their own, and what sets them apart.

What is asked of all rules with side states is asked of Shampoo, Dion and Adafactor too.
"""

from __future__ import annotations

import copy
import pickle
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from fusedopt.backends import matrices

FAMILY = {
    "normuon": fo.NorMuon(),
    "adamuon": fo.AdaMuon(),
    "soap": fo.SOAP(),
    "shampoo": fo.Shampoo(precondition_frequency=2),
    "dion": fo.Dion(momentum=0.8),
    "adafactor": fo.Adafactor(),
}
FLATTENED = {name: rule for name, rule in FAMILY.items() if rule.refuses(np.ones(3))}
SHAPES = [(6, 10), (10, 6), (7, 7), (1, 5), (5, 1), (4, 3, 2)]
BACKENDS = ["native", "reference"]

every_rule = pytest.mark.parametrize("rule", FAMILY.values(), ids=FAMILY)


def keller(g: np.ndarray, steps: int = 5) -> Any:
    x = g / np.linalg.norm(g)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(steps):
        xx = x @ x.T
        x = a * x + b * xx @ x + c * xx @ xx @ x
    return x


class NorMuon:
    def __init__(self, p: np.ndarray) -> None:
        self.m, self.v = np.zeros_like(p), np.zeros(len(p))

    def delta(self, g: np.ndarray, lr: float) -> Any:
        self.m = 0.95 * self.m + 0.05 * g
        o = keller(0.05 * g + 0.95 * self.m)
        self.v = 0.95 * self.v + 0.05 * np.mean(o**2, axis=1)
        n = o / np.sqrt(self.v)[:, None]
        rows, cols = g.shape
        return lr * max(1, rows / cols) ** 0.5 * n * np.linalg.norm(o) / np.linalg.norm(n)


class AdaMuon:
    def __init__(self, p: np.ndarray) -> None:
        self.m, self.v, self.t = np.zeros_like(p), np.zeros_like(p), 0

    def delta(self, g: np.ndarray, lr: float) -> Any:
        self.t += 1
        self.m = 0.95 * self.m + 0.05 * g
        o = keller(0.05 * g + 0.95 * self.m)
        self.v = 0.999 * self.v + 0.001 * o**2
        n = o / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)
        return 0.2 * lr * np.sqrt(n.size) * n / np.linalg.norm(n)


class SOAP:
    """As the authors have it: the columns of the bases are sorted in each refinement, and v is
    sorted with them. Longer sides have no basis: of a gradient of low rank that would be
    arbitrary."""

    def __init__(self, p: np.ndarray) -> None:
        self.m, self.v, self.t = np.zeros_like(p), np.zeros_like(p), 0
        self.moments = [np.zeros((n, n)) for n in p.shape]
        self.bases: list[np.ndarray] = []
        self.chosen = [n == min(p.shape) for n in p.shape]

    def delta(self, g: np.ndarray, lr: float) -> Any:
        if self.t:
            left, right = self.bases
            self.m = 0.95 * self.m + 0.05 * g
            self.v = 0.95 * self.v + 0.05 * (left.T @ g @ right) ** 2
            n = (left.T @ self.m @ right) / (np.sqrt(self.v) + 1e-8)
            c = 1 - 0.95**self.t
            step = lr * left @ n @ right.T * np.sqrt(c) / c
        else:
            step = np.zeros_like(g)
        for moment, outer in zip(self.moments, (g @ g.T, g.T @ g), strict=True):
            moment *= 0.95
            moment += 0.05 * outer
        if self.t == 0:
            self.bases = [
                np.linalg.eigh(a)[1][:, ::-1] if chosen else np.eye(len(a))
                for a, chosen in zip(self.moments, self.chosen, strict=True)
            ]
        elif self.t % 10 == 0:
            for axis, a in enumerate(self.moments):
                if not self.chosen[axis]:
                    continue
                q = self.bases[axis]
                order = np.argsort(-np.diag(q.T @ a @ q))
                self.v = np.take(self.v, order, axis=axis)
                shifted = a + 1e-7 * np.trace(a) * np.eye(len(a))
                self.bases[axis] = np.linalg.qr(shifted @ q[:, order])[0]
        self.t += 1
        return step


PLAIN: dict[str, Any] = {"normuon": NorMuon, "adamuon": AdaMuon, "soap": SOAP}


def gradients(shape: tuple[int, ...], count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for _ in range(count)]


@pytest.mark.parametrize("rule", [FAMILY[name] for name in PLAIN], ids=PLAIN)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_plain_form(rule: Any, shape: Any, order: Any, backend: str) -> None:
    rows = shape[0]
    p = np.asarray(np.random.default_rng(1).standard_normal(shape), order=order)
    expected = p.copy().reshape(rows, -1)
    plain = PLAIN[rule.name](expected)
    if rule.name == "soap":
        rule = fo.SOAP(max_precond_dim=min(expected.shape))
    optimizer = fo.Optimizer(p, rule, backend=backend)
    for g in gradients(shape, 25):
        lr = rule.lr
        optimizer.step(np.asarray(g, order=order))
        expected = (
            expected - lr * rule.weight_decay * expected - plain.delta(g.reshape(rows, -1), lr)
        )
    np.testing.assert_allclose(p.reshape(rows, -1), expected, rtol=1e-7, atol=1e-8)


SCALED = [
    *(fo.Muon(scale=name) for name in ("original", "match_rms_adamw", "spectral", "none")),
    *FLATTENED.values(),
]


@pytest.mark.parametrize("rule", SCALED, ids=lambda r: f"{r.name}-{getattr(r, 'scale', '')}")
@pytest.mark.parametrize("shape", [(20, 3, 2, 2), (5, 3, 3, 3), (3, 2, 4)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_filter_is_scaled_as_its_flattened_matrix(rule: Any, shape: Any, backend: str) -> None:
    """Not by the two last sides, nor by the two first: the bits are those of the matrix."""
    p = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    matrix = p.copy().reshape(shape[0], -1)
    filters = fo.Optimizer(p, rule, backend=backend)
    flat = fo.Optimizer(matrix, rule, backend=backend)
    for g in gradients(shape, 12):
        g = g.astype(np.float32)
        filters.step(g)
        flat.step(g.reshape(matrix.shape))
    assert p.tobytes() == matrix.tobytes()


@pytest.mark.parametrize("rule", [FAMILY["normuon"], FAMILY["adamuon"]], ids=lambda rule: rule.name)
def test_float32_stays_near(rule: Any) -> None:  # SOAP's bases of near eigenvalues need not
    grads = gradients((12, 20), 15)
    runs = []
    for dtype in (np.float32, np.float64):
        p = np.ones((12, 20), dtype)
        optimizer = fo.Optimizer(p, rule)
        for g in grads:
            optimizer.step(g.astype(dtype))
        runs.append(p)
    np.testing.assert_allclose(runs[0], runs[1], atol=20 * 1e-3 * rule.lr)


@every_rule
def test_a_small_problem_is_solved(rule: Any) -> None:
    rng = np.random.default_rng(0)
    a, target = rng.standard_normal((40, 8)), rng.standard_normal((8, 6))
    x = np.zeros((8, 6))
    falling = replace(rule, lr=lambda t: 0.3 * max(0.0, 1 - t / 300), weight_decay=0.0)
    optimizer = fo.Optimizer(x, falling)
    start = np.sum((a @ (x - target)) ** 2)
    for _ in range(300):
        optimizer.step(a.T @ a @ (x - target))
    assert np.sum((a @ (x - target)) ** 2) < 1e-3 * start


@every_rule
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_no_step(rule: Any, dtype: Any, backend: str) -> None:
    p = np.ones((4, 6), dtype)
    optimizer = fo.Optimizer(p, rule.__class__(weight_decay=0.0), backend=backend)
    for _ in range(13):
        optimizer.step(np.zeros_like(p))
    np.testing.assert_array_equal(p, 1)
    assert all(np.isfinite(s).all() for s in optimizer.state["params"].values())
    optimizer.step(np.asarray(gradients((4, 6), 1)[0], dtype))
    assert np.isfinite(p).all()


@every_rule
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_with_its_leaf(rule: Any, value: float, backend: str) -> None:
    def run(spoilt: bool) -> list[np.ndarray]:
        params = [np.ones((5, 5)) for _ in range(3)]
        optimizer = fo.Optimizer(params, rule, backend=backend)
        for t, g in enumerate(gradients((5, 5), 14)):
            bad = g.copy()
            bad[1, 2] = value if t == 4 else bad[1, 2]
            optimizer.step([g, bad if spoilt else g, g])
        return params

    good, spoilt = run(False), run(True)
    assert np.isnan(spoilt[1]).all()
    for k in (0, 2):
        np.testing.assert_allclose(spoilt[k], good[k], rtol=1e-12)


@every_rule
def test_leaves_without_a_gradient_keep_all_their_bits(rule: Any) -> None:
    params = [np.ones((5, 5)) for _ in range(3)]
    optimizer = fo.Optimizer(params, rule)
    grads: list[Any] = gradients((5, 5), 3)
    for _ in range(3):
        optimizer.step(grads)
    before = copy.deepcopy(optimizer.state_dict()["leaves"]["1"])
    kept = params[1].copy()
    for _ in range(12):
        optimizer.step([grads[0], None, grads[2]])
    after = optimizer.state_dict()["leaves"]["1"]
    assert params[1].tobytes() == kept.tobytes()
    assert before["t"] == after["t"] == 3
    for name, state in before["state"].items():
        assert state.tobytes() == after["state"][name].tobytes(), name


@every_rule
def test_saved_and_loaded_it_goes_on_bit_for_bit(rule: Any, tmp_path: Path) -> None:
    grads = gradients((6, 9), 30)
    p = np.ones((6, 9), np.float32)
    optimizer = fo.Optimizer(p, rule)
    for g in grads[:14]:
        optimizer.step(g)
    optimizer.save(tmp_path / "run")
    twin = pickle.loads(pickle.dumps(optimizer))
    other = fo.Optimizer(np.zeros((6, 9), np.float32), rule)
    other.load(tmp_path / "run")
    assert optimizer.fingerprint() == twin.fingerprint() == other.fingerprint()
    for g in grads[14:]:
        for each in (optimizer, twin, other):
            each.step(g)
    assert optimizer.fingerprint() == twin.fingerprint() == other.fingerprint()


@every_rule
def test_side_states_are_counted_and_shown(rule: Any, tmp_path: Path) -> None:
    params = {"w": np.ones((6, 9), np.float32)}
    optimizer = fo.Optimizer(params, rule, state_path=tmp_path / "states")
    sides = rule.sides((6, 9))
    memory, _ = optimizer.leaf_state("w")
    assert {name: s.data.shape for name, s in memory.sides.items()} == sides
    assert fo.estimate(params, rule).states == sum(a.nbytes for a in memory.saved.values())
    assert fo.estimate(params, rule).work == optimizer._assembly.plan.work_bytes
    assert all(f"{name} {shape}" in optimizer.describe() for name, shape in sides.items())
    in_memory = fo.Optimizer({"w": np.ones((6, 9), np.float32)}, rule)
    for g in gradients((6, 9), 3):
        for each in (optimizer, in_memory):
            each.step({"w": g})
    assert optimizer.fingerprint() == in_memory.fingerprint()


@every_rule
@pytest.mark.parametrize("state_dtype", ["bfloat16", "dynamic8"])
def test_formats_are_for_states_of_the_parameters_shape(rule: Any, state_dtype: str) -> None:
    p = np.ones((80, 64), np.float32)
    optimizer = fo.Optimizer(p, rule, state_dtype=state_dtype, verify=True)
    for g in gradients(p.shape, 4):
        optimizer.step(g)
    memory, _ = optimizer.leaf_state("params")
    assert all(s.format.name.startswith(state_dtype) for s in memory.states.values())
    assert all(s.data.dtype == np.float32 for s in memory.sides.values())


@every_rule
def test_functional_steps(rule: Any) -> None:
    p, q = np.ones((5, 7)), np.ones((5, 7))
    optimizer, states = fo.Optimizer(p, rule), rule.init(q)
    for t, g in enumerate(gradients((5, 7), 13)):
        optimizer.step(g)
        fo.update(rule, t + 1, q, g, *states)
    assert p.tobytes() == q.tobytes()
    if rule.sides(q.shape):
        short = [*states[:-1], np.zeros(3)]
        with pytest.raises(ValueError, match=r"expected shape .* in C order and float64, got \(3,"):
            fo.update(rule, 14, q, q.copy(), *short)
    with pytest.raises(TypeError, match="states: "):
        fo.update(rule, 14, q, q.copy())


@every_rule
def test_matrices_alone_get_the_rule(rule: Any) -> None:
    params = {name: np.ones((6, 9)) for name in ("w", "lm_head")} | {"b": np.ones(9)}
    rules = rule.with_adamw(params, fo.AdamW(), lr=0.5)
    assert rules == {"w": type(rule)(lr=0.5), "*": fo.AdamW()}
    fo.Optimizer(params, rules).step({name: p.copy() for name, p in params.items()})


@pytest.mark.parametrize("rule", FLATTENED.values(), ids=FLATTENED)
def test_vectors_are_refused(rule: Any) -> None:
    own = type(rule).__name__
    with pytest.raises(ValueError, match=rf"{own} updates arrays of two.*fo.{own}\(\)"):
        fo.Optimizer(np.ones(3), rule)


@every_rule
def test_hyperparameters_can_be_replaced(rule: Any) -> None:
    optimizer = fo.Optimizer(np.ones((4, 4)), rule)
    optimizer.step(np.eye(4))
    optimizer.replace(lr=0.5, weight_decay=0.25)
    assert optimizer.lr == 0.5
    optimizer.step(np.eye(4))
    if rule.name == "soap":
        with pytest.raises(ValueError, match="were begun with 10000, got 3"):
            optimizer.replace(max_precond_dim=3)


@every_rule
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_comes_between_needs_no_memory(
    rule: Any, order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far less than a step makes sure of before it begins."""
    reserve = matrices.RESERVE
    monkeypatch.setattr(matrices, "RESERVE", 0)
    p = np.zeros((300, 200), np.float32, order=order)
    optimizer = fo.Optimizer(p, rule)
    g = np.asarray(gradients(p.shape, 1)[0], np.float32, order=order)
    for _ in range(3):
        optimizer.step(g)
    tracemalloc.start()
    optimizer.step(g)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - rule.reserve(p.shape) < 100_000 < min(p.nbytes, reserve)


def test_a_gradient_may_not_be_a_side_state() -> None:
    optimizer = fo.Optimizer(p := np.ones((4, 4)), fo.SOAP())
    with pytest.raises(ValueError, match="shares memory with a state of params"):
        optimizer.step(optimizer.state["params"]["L"])
    np.testing.assert_array_equal(p, 1)


def test_a_failing_decomposition_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [np.ones((4, 4)), np.ones((5, 5))]
    optimizer = fo.Optimizer(params, fo.SOAP(lr=0.5))
    grads = [gradients(p.shape, 1)[0] for p in params]
    optimizer.step(grads)
    before, calls, eigh = optimizer.fingerprint(), [0], np.linalg.eigh

    def limited(a: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise MemoryError
        return eigh(a)

    monkeypatch.setattr(np.linalg, "eigh", limited)
    with pytest.raises(MemoryError):
        optimizer.step(grads)
    assert optimizer.fingerprint() == before
    optimizer.step(grads)
    assert optimizer.fingerprint() != before


def test_where_lapack_finds_no_basis_soap_is_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(a: Any) -> Any:
        raise np.linalg.LinAlgError

    monkeypatch.setattr(np.linalg, "eigh", none)
    grads = gradients((4, 6), 5)
    p, q = np.ones((4, 6)), np.ones((4, 6))
    optimizer = fo.Optimizer(p, fo.SOAP(weight_decay=0.0))
    plain = fo.Optimizer(q, fo.SOAP(weight_decay=0.0, max_precond_dim=1))
    for g in grads:
        optimizer.step(g)
        plain.step(g)
    np.testing.assert_allclose(p, q, rtol=1e-12)
    adam = fo.Optimizer(r := np.ones((4, 6)), fo.Adam(lr=3e-3, betas=(0.95, 0.95), hat=True))
    for g in grads[1:]:
        adam.step(g)
    np.testing.assert_allclose(q, r, rtol=1e-6)


@pytest.mark.parametrize(
    ("most", "names"),
    [(20, {"L", "R", "QL", "QR"}), (8, {"L", "QL"}), (5, set())],
)
def test_long_sides_have_no_basis(most: int, names: set[str]) -> None:
    rule = fo.SOAP(max_precond_dim=most)
    assert set(rule.sides((6, 10))) == names
    p = np.ones((6, 10))
    optimizer = fo.Optimizer(p, rule, verify=True)
    for g in gradients(p.shape, 13):
        optimizer.step(g)


def test_the_bases_diagonalise() -> None:
    # Of a steady gradient's moments, refined every other step.
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((6, 6)), rng.standard_normal((9, 9))
    optimizer = fo.Optimizer(np.zeros((6, 9)), fo.SOAP(precondition_frequency=1))
    for _ in range(300):
        optimizer.step(a @ rng.standard_normal((6, 9)) @ b)
    state = optimizer.state["params"]
    for moment, basis in (("L", "QL"), ("R", "QR")):
        q = state[basis]
        np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=1e-12)
        turned = q.T @ state[moment] @ q
        rest = turned - np.diag(np.diag(turned))
        assert np.linalg.norm(rest) < 0.2 * np.linalg.norm(turned)


def test_second_moments_stay_with_their_basis_vectors() -> None:
    """Also while the order of the eigenvalues turns round, on which no vector changes its place."""
    rng = np.random.default_rng(4)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (5, 7))
    rule = fo.SOAP(betas=(0.9, 0.7), shampoo_beta=0.7, precondition_frequency=1)
    optimizer = fo.Optimizer(np.zeros((5, 7)), rule)
    state = optimizer.state["params"]
    sizes = np.geomspace(1.0, 100.0, 5)
    orders = set()
    for t in range(60):
        middle = np.diag(sizes if t < 15 else sizes[::-1]) @ np.eye(5, 7)
        g = left @ (middle + 0.01 * rng.standard_normal((5, 7))) @ right
        before, basis = state["v"].copy(), state["QL"].copy()
        optimizer.step(g)
        if t == 0:
            continue
        turned = state["QL"].T @ g @ state["QR"]
        np.testing.assert_allclose(state["v"], 0.7 * before + 0.3 * turned**2, rtol=1e-9)
        if t > 1:
            assert (np.abs(np.sum(basis * state["QL"], axis=0)) > 0.9).all()
        orders.add(tuple(np.argsort(np.diag(state["QL"].T @ state["L"] @ state["QL"]))))
    assert len(orders) > 1


def test_directions_that_no_gradient_had_stay() -> None:
    g = np.zeros((6, 6))
    g[:2, :2] = [[2.0, 1.0], [0.5, -1.0]]
    optimizer = fo.Optimizer(np.zeros((6, 6)), fo.SOAP(precondition_frequency=1))
    for _ in range(2):
        optimizer.step(g)
    before = optimizer.state["params"]["QL"].copy()
    for _ in range(20):
        optimizer.step(g)
    after = optimizer.state["params"]["QL"]
    np.testing.assert_allclose(np.abs(after[2:, 2:]), np.abs(before[2:, 2:]), atol=1e-9)
