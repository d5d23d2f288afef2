"""Adafactor: what it keeps of matrices, vectors and stacks, and what it moves them by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from fusedopt.rules import adafactor
from of_matrices import draw, stepped_with_all_options

BACKENDS = ["native", "numba", "reference"]
SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (70, 33),
    "stack": (2, 3, 5, 4),
    "vector": (300,),
    "scalar": (),
    "row": (1, 9),
    "column": (9, 1),
    "none": (0, 4),
    "no stack": (0, 3, 4),
}


def gradients(t: int, dtype: Any = np.float64, order: Any = "C") -> dict[str, Any]:
    rng = np.random.default_rng(100 + t)
    return {
        name: np.array(rng.standard_normal(shape) * 10.0**-t, dtype, order=order)
        for name, shape in SHAPES.items()
    }


def parameters(dtype: Any = np.float64, order: Any = "C") -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {k: np.array(rng.standard_normal(s), dtype, order=order) for k, s in SHAPES.items()}


def written_from_the_paper(start: np.ndarray, rule: Any, steps: int, name: str) -> np.ndarray:
    """Algorithms 4 to 6 in NumPy, on one parameter, with PyTorch's order of the decay."""
    p, sign = start.copy(), -1 if rule.maximize else 1
    factored = p.ndim > 1 and min(p.shape[-2:]) >= rule.min_dim
    row, col = np.zeros(p.shape[:-1]), np.zeros((*p.shape[:-2], *p.shape[-1:]))
    v = np.zeros(p.shape)
    for t in range(1, steps + 1):
        g = sign * gradients(t)[name]
        g = g + rule.weight_decay * p * (rule.decay == "l2")
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
        if rule.decay == "decoupled_first":
            p = p - rule.lr * rule.weight_decay * p
        size = max(rule.eps_scale, np.sqrt(np.mean(p**2))) if rule.scale_parameter else 1.0
        if rule.decay == "decoupled":
            p = p - rule.lr * rule.weight_decay * p
        p = p - rho * size * u
    return p


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rule",
    [
        fo.Adafactor(lr=0.5),
        fo.Adafactor(lr=0.6, clip=0.25, beta2_decay=0.5, weight_decay=0.1),
        fo.Adafactor(lr=0.6, eps_scale=2.0, weight_decay=0.3, decay="decoupled_first"),
        fo.Adafactor(lr=0.05, scale_parameter=False, relative_step=False, clip=100.0),
        fo.Adafactor(lr=0.3, min_dim=5, weight_decay=0.1, decay="l2", maximize=True),
    ],
    ids=repr,
)
def test_the_papers_algorithms(rule: fo.Adafactor, backend: str, order: Any) -> None:
    p, start = parameters(order=order), parameters()
    opt = fo.Optimizer(p, rule, backend=backend)
    for t in range(1, 9):
        opt.step(gradients(t, order=order))
    for name, x in p.items():
        if x.size:
            want = written_from_the_paper(start[name], rule, 8, name)
            np.testing.assert_allclose(x, want, rtol=1e-12, atol=1e-13, err_msg=name)


def test_what_is_kept() -> None:
    opt = fo.Optimizer(parameters(), fo.Adafactor(), state_dtype="bfloat16")
    shapes = {path: {k: a.shape for k, a in s.items()} for path, s in opt.state.items()}
    assert shapes == {
        "matrix": {"row": (70, 1), "col": (1, 33)},
        "stack": {"row": (2, 3, 5, 1), "col": (2, 3, 1, 4)},
        "vector": {"v": (300,)},
        "scalar": {"v": ()},
        "row": {"row": (1, 1), "col": (1, 9)},
        "column": {"row": (9, 1), "col": (1, 1)},
        "none": {"v": (0, 4)},
        "no stack": {"row": (0, 3, 1), "col": (0, 1, 4)},
    }
    assert opt.state["matrix"]["row"].dtype == np.float64
    long = fo.Optimizer({"w": np.ones((127, 300))}, fo.Adafactor(min_dim=128))
    assert set(long.state["w"]) == {"v"}


def test_its_memory() -> None:
    p = np.ones((1000, 800), np.float32)
    found = fo.estimate({"w": p}, fo.Adafactor())
    assert found.states == 4 * 1800
    assert found.work < 3 * p.nbytes + 10_000


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("example", fo.Adafactor.examples, ids=repr)
def test_native_and_numba_have_the_same_bits(example: dict[str, Any], dtype: Any) -> None:
    rule = fo.Adafactor(**{"weight_decay": 0.1, **example})
    found = []
    for options in ({"backend": "native"}, {"backend": "numba"}, {"verify": True}, {"threads": 1}):
        p = parameters(dtype)
        given: Any = {"clip_norm": 1.0, "ema": 0.9, "stats": True, **options}
        opt = fo.Optimizer(p, rule, **given)
        for t in range(1, 4):
            grads = gradients(t, dtype)
            opt.step({**grads, "vector": None} if t == 2 else grads)
        found.append(opt.fingerprint())
    assert len(set(found)) == 1


def test_float32_stays_near() -> None:
    """Also of means over many rows, one after the other."""
    runs = []
    for dtype in (np.float32, np.float64):
        p = np.ones((20_000, 6), dtype)
        opt = fo.Optimizer(p, fo.Adafactor())
        for g in draw(p.shape, 5):
            opt.step(g.astype(dtype))
        runs.append(p)
    np.testing.assert_allclose(runs[0], runs[1], rtol=2e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e35])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_whose_squares_leave_the_range(backend: str, size: float) -> None:
    (draws,) = draw((30, 20), 1)
    p, g = (draws * size).astype(np.float32), np.ones((30, 20), np.float32)
    before = p.astype(np.float64)
    fo.Optimizer(p, fo.Adafactor(lr=0.5, eps_scale=0.0), backend=backend).step(g)
    want = before - 0.5 * np.sqrt(np.mean(before**2))
    np.testing.assert_allclose(p, want, rtol=1e-5, atol=1e-6 * size)


def test_a_matrix_among_many_is_as_one_alone() -> None:
    rng = np.random.default_rng(0)
    draws = [rng.standard_normal((2, 40, 30)).astype(np.float32) for _ in range(5)]
    together = [p.copy() for p, _ in draws]
    fo.Optimizer(together, fo.Adafactor(lr=0.1)).step([g for _, g in draws])
    for (p, g), got in zip(draws, together, strict=True):
        fo.Optimizer(p, fo.Adafactor(lr=0.1)).step(g)
        assert p.tobytes() == got.tobytes()


@pytest.mark.parametrize("floor", ["added", "least"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_and_rows_of_zeros(backend: str, floor: Any) -> None:
    p = np.ones((4, 3), np.float32)
    g = np.zeros((4, 3), np.float32)
    opt = fo.Optimizer(p, fo.Adafactor(floor=floor, eps=0.0), backend=backend)
    opt.step(g)
    assert (p == 1).all()
    g[1] = 2.0
    opt.step(g)
    assert (p[1] < 1).all()
    assert (np.delete(p, 1, 0) == 1).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [(6, 4), (9,)])
def test_what_is_not_finite_is_in_the_whole_parameter(value: float, shape: Any) -> None:
    p = np.ones(shape)
    opt = fo.Optimizer(p, fo.Adafactor(), verify=True)
    (g,) = draw(shape, 1)
    g.flat[2] = value
    opt.step(g)
    assert np.isnan(p).all()


@pytest.mark.parametrize("example", fo.Adafactor.examples, ids=repr)
@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "float8", "dynamic8", "dynamic4"])
def test_formats_clipping_and_averages(example: dict[str, Any], state_dtype: Any) -> None:
    """All that goes with other rules goes with this one; every element is compared."""
    opt = stepped_with_all_options(fo.Adafactor(**example), state_dtype)
    sides = opt.leaf_state("w")[0].sides
    assert all(side.data.dtype == np.float32 for side in sides.values())


def test_rows_are_refused() -> None:
    opt = fo.Optimizer(np.ones((4, 3)), fo.Adafactor())
    with pytest.raises(ValueError, match="Adafactor updates matrices as a whole"):
        opt.step(fo.Rows(np.array([1]), np.ones((1, 3))))


def test_which_matrices_are_factored_is_settled() -> None:
    opt = fo.Optimizer(parameters(), fo.Adafactor(lr=0.1))
    with pytest.raises(ValueError, match=r"Adafactor\(min_dim\): the states of .* were begun"):
        opt.replace(min_dim=2)
    opt.replace(eps=1e-6, clip=2.0, floor="least", relative_step=False)


MUTANTS = {
    "no average": ("_average", lambda average, x, w: np.copyto(average, x)),
    "another weight": (
        "_average", lambda average, x, w: np.copyto(average, (1 - w / 2) * average + w / 2 * x)
    ),
    "another size": ("_size", lambda x: float(np.abs(x).mean())),
    "a size too small": ("_size", lambda x: 0.999 * float(np.sqrt(np.mean(x**2)))),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
@pytest.mark.parametrize("shape", [(20, 30), (600,)])
def test_mutants_are_seen(shape: Any, mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = [g.astype(np.float32) for g in draw(shape, 3)]

    def run() -> None:
        for clip in (0.5, 10.0):
            opt = fo.Optimizer(np.ones(shape, np.float32), fo.Adafactor(clip=clip), verify=True)
            for g in grads:
                opt.step(g)

    run()
    monkeypatch.setattr(adafactor, *mutant)
    with pytest.raises(fo.VerificationError):
        run()


@pytest.mark.parametrize("shift", [1e-3, -1e-3])
@pytest.mark.parametrize("shape", [(20, 30), (600,)])
def test_another_root_is_seen(shape: Any, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = fo.Adafactor._roots

    def mutated(self: Any, root: np.ndarray, g: np.ndarray, member: Any) -> None:
        roots(self, root, g, member)
        root *= 1 + shift

    monkeypatch.setattr(fo.Adafactor, "_roots", mutated)
    opt = fo.Optimizer(np.ones(shape, np.float32), fo.Adafactor(clip=10.0), verify=True)
    with pytest.raises(fo.VerificationError):
        opt.step(draw(shape, 1)[0].astype(np.float32))
