"""Adafactor: what it keeps of matrices, vectors and stacks, and what it moves them by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fusedopt as fo

pytest.importorskip("numba")

BACKENDS = ["native", "numba", "reference"]
SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (70, 33),
    "stack": (2, 3, 5, 4),
    "vector": (300,),
    "scalar": (),
    "row": (1, 9),
    "column": (9, 1),
    "none": (0, 4),
}


def gradients(t: int, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(100 + t)
    return {k: np.asarray(rng.standard_normal(s) * 10.0**-t, dtype) for k, s in SHAPES.items()}


def parameters(dtype: Any = np.float64, order: Any = "C") -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {k: np.array(rng.standard_normal(s), dtype, order=order) for k, s in SHAPES.items()}


def written_from_the_paper(p: np.ndarray, rule: fo.Adafactor, steps: int, name: str) -> np.ndarray:
    """Algorithms 4 to 6 in NumPy, on one parameter."""
    factored, p = p.ndim > 1, p.copy()
    row, col = np.zeros(p.shape[:-1]), np.zeros((*p.shape[:-2], *p.shape[-1:]))
    v = np.zeros(p.shape)
    for t in range(1, steps + 1):
        g = gradients(t)[name]
        beta = 1 - t**-rule.beta2_decay
        squares = g**2 + rule.eps
        if factored:
            row = beta * row + (1 - beta) * squares.mean(axis=-1)
            col = beta * col + (1 - beta) * squares.mean(axis=-2)
            v = row[..., None] * col[..., None, :] / row.mean(axis=-1)[..., None, None]
        else:
            v = beta * v + (1 - beta) * squares
        u = g / np.sqrt(v)
        u /= max(1.0, np.sqrt(np.mean(u**2)) / rule.clip)
        rho = min(rule.lr, 1 / np.sqrt(t)) if rule.relative_step else rule.lr
        size = max(rule.eps_scale, np.sqrt(np.mean(p**2))) if rule.scale_parameter else 1.0
        p = p - rule.lr * rule.weight_decay * p - rho * size * u
    return p


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rule",
    [
        fo.Adafactor(lr=0.5),
        fo.Adafactor(lr=0.6, clip=0.25, beta2_decay=0.5, weight_decay=0.1),
        fo.Adafactor(lr=0.05, scale_parameter=False, relative_step=False, clip=100.0),
    ],
    ids=repr,
)
def test_the_papers_algorithms(rule: fo.Adafactor, backend: str, order: str) -> None:
    p, start = parameters(order=order), parameters()
    opt = fo.Optimizer(p, rule, backend=backend)
    for t in range(1, 9):
        opt.step(gradients(t))
    for name, x in p.items():
        if x.size:
            want = written_from_the_paper(start[name], rule, 8, name)
            np.testing.assert_allclose(x, want, rtol=1e-12, atol=1e-13, err_msg=name)


def test_what_is_kept() -> None:
    opt = fo.Optimizer(parameters(), fo.Adafactor(), state_dtype="bfloat16")
    shapes = {path: {k: a.shape for k, a in s.items()} for path, s in opt.state.items()}
    assert shapes == {
        "matrix": {"row": (70,), "col": (33,)},
        "stack": {"row": (2, 3, 5), "col": (2, 3, 4)},
        "vector": {"v": (300,)},
        "scalar": {"v": ()},
        "row": {"v": (1, 9)},
        "column": {"v": (9, 1)},
        "none": {"v": (0, 4)},
    }
    long = fo.Optimizer({"w": np.ones((127, 300))}, fo.Adafactor(min_dim=128))
    assert set(long.state["w"]) == {"v"}
    big = fo.estimate({"w": np.ones((1000, 1000), np.float32)}, fo.Adafactor())
    assert big.states == 4 * 2000
    assert opt.state["matrix"]["row"].dtype == np.float64


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("example", range(len(fo.Adafactor.examples)))
def test_native_and_numba_have_the_same_bits(example: int, dtype: Any) -> None:
    rule = fo.Adafactor(**fo.Adafactor.examples[example], weight_decay=0.1)
    found = []
    for options in ({"backend": "native"}, {"backend": "numba"}, {"verify": True}, {"threads": 1}):
        p = parameters(dtype)
        opt = fo.Optimizer(p, rule, clip_norm=1.0, ema=0.9, **options)  # type: ignore[arg-type]
        for t in range(1, 4):
            grads: dict[str, Any] = gradients(t, dtype)
            opt.step({**grads, "vector": None} if t == 2 else grads)
        found.append(opt.fingerprint())
    assert len(set(found)) == 1


def test_a_matrix_among_many_is_as_one_alone() -> None:
    rng = np.random.default_rng(0)
    draws = [rng.standard_normal((2, 40, 30)).astype(np.float32) for _ in range(5)]
    together = [p.copy() for p, _ in draws]
    fo.Optimizer(together, fo.Adafactor(lr=0.1)).step([g for _, g in draws])
    for (p, g), got in zip(draws, together, strict=True):
        fo.Optimizer(p, fo.Adafactor(lr=0.1)).step(g)
        assert p.tobytes() == got.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_and_rows_of_zeros(backend: str) -> None:
    for floor in ("added", "least"):
        p = np.ones((4, 3), np.float32)
        g = np.zeros((4, 3), np.float32)
        opt = fo.Optimizer(p, fo.Adafactor(floor=floor), backend=backend)  # type: ignore[arg-type]
        opt.step(g)
        assert (p == 1).all()
        g[1] = 2.0
        opt.step(g)
        assert (p[1] < 1).all()
        assert (np.delete(p, 1, 0) == 1).all()


def test_only_the_hosts_backends_have_it() -> None:
    pytest.importorskip("numba_cuda")
    from fusedopt.backends.cuda.device import check_rule

    with pytest.raises(ValueError, match="Adafactor: is not supported by the backend 'cuda'"):
        check_rule(fo.Adafactor())


def test_rows_are_refused() -> None:
    opt = fo.Optimizer(np.ones((4, 3)), fo.Adafactor())
    with pytest.raises(ValueError, match="Adafactor updates matrices as a whole"):
        opt.step(fo.Rows(np.array([1]), np.ones((1, 3))))


def test_a_checkpoint(tmp_path: Any) -> None:
    whole = fo.Optimizer(parameters(), fo.Adafactor(lr=0.1))
    other = fo.Optimizer(parameters(), fo.Adafactor(lr=0.1))
    whole.step(gradients(1))
    whole.save(tmp_path / "saved")
    other.load(tmp_path / "saved")
    for opt in (whole, other):
        opt.step(gradients(2))
    assert whole.fingerprint() == other.fingerprint()
    with pytest.raises(ValueError, match="min_dim"):
        fo.Optimizer(parameters(), fo.Adafactor(lr=0.1, min_dim=2)).load(tmp_path / "saved")
