"""Muon: how parameters become matrices, scales, work space, and its company."""

from __future__ import annotations

import copy
import tracemalloc
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from fusedopt.backends import matrices
from fusedopt.linalg.newton_schulz import BATCH, SMALL
from fusedopt.system.extension import core
from fusedopt.system.threads import most


def textbook(u: np.ndarray, **settings: Any) -> np.ndarray:
    return fo.Muon(scale="none", **settings).orthogonalized(u.astype(np.float64))


def gradients(params: list[np.ndarray]) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.standard_normal(p.shape).astype(p.dtype) for p in params]


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (5, 3, 3, 3), (2, 3, 4), (7, 7), (1, 1)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_filters_are_flattened(shape: tuple[int, ...], order: Any, backend: str) -> None:
    g = np.asarray(np.random.default_rng(1).standard_normal(shape), order=order)
    p = np.zeros(shape, order=order)
    fo.Optimizer(p, fo.Muon(lr=1.0, nesterov=False), backend=backend).step(g)
    rows = shape[0]
    cols = g.size // rows
    expected = max(1, rows / cols) ** 0.5 * textbook(g.reshape(rows, cols))
    np.testing.assert_allclose(-p.reshape(rows, cols), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("scale", "factor"),
    [("original", 2.0), ("match_rms_adamw", 0.2 * 4.0), ("spectral", 2.0), ("none", 1.0)],
)
def test_scales(scale: Any, factor: float) -> None:
    assert fo.Muon(scale=scale).factor(16, 4) == pytest.approx(factor)
    assert fo.Muon(scale="original").factor(4, 16) == 1.0
    assert fo.Muon(scale="spectral").factor(4, 16) == 0.5


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("norm", ["frobenius", "aol"])
def test_a_split_parameter_is_several_matrices(order: Any, backend: str, norm: Any) -> None:
    g = np.asarray(np.random.default_rng(1).standard_normal((12, 5)), order=order)
    p = np.zeros((12, 5), order=order)
    rule = fo.Muon(lr=1.0, nesterov=False, split=3, norm=norm)
    fo.Optimizer(p, rule, backend=backend).step(g)
    for k in range(0, 12, 4):
        expected = textbook(g[k : k + 4], norm=norm)
        np.testing.assert_allclose(-p[k : k + 4], expected, rtol=1e-9, atol=1e-12)


def test_a_split_must_fit() -> None:
    with pytest.raises(ValueError, match=r"Muon\(split=5\) splits the first axis .* \(12, 5\)"):
        fo.Optimizer(np.zeros((12, 5)), fo.Muon(split=5))


def alone(rule: fo.Rule, p: np.ndarray, g: np.ndarray) -> np.ndarray:
    q = np.zeros_like(p)
    fo.Optimizer(q, rule).step(g)
    return q


def test_small_matrices_of_one_shape_come_together() -> None:
    shape = (16, 40)
    together = BATCH // (16 * 40)
    params: list[np.ndarray] = [np.zeros(shape, np.float32) for _ in range(together + 3)]
    params += [np.zeros(shape, np.float32, order="F") for _ in range(2)]
    params += [np.zeros(shape), np.zeros(shape)]
    batches: list[tuple[int, ...]] = []

    class Watched(fo.Muon):
        def between(self, phase: int, works: Any, workspace: Any, members: Any) -> None:
            batches.append(works[0].shape)
            super().between(phase, works, workspace, members)

    rules = {"0": fo.Muon(lr=2.0), "*": Watched()}
    opt = fo.Optimizer(params, rules)
    grads: list[Any] = gradients(params)
    grads[5] = None
    opt.step(grads)
    assert batches == [(n, *shape) for n in (together, 2, 2, 2)]  # the first leaf has its own rule
    assert not params[5].any()
    for k, (p, g) in enumerate(zip(params, grads, strict=True)):
        if g is not None:
            expected = alone(rules["0"] if k == 0 else fo.Muon(), p, g)
            np.testing.assert_allclose(p, expected, atol=2e-6)
    grads[5] = gradients(params)[5]
    opt.step(grads)
    np.testing.assert_allclose(params[5], alone(fo.Muon(), params[5], grads[5]), atol=2e-6)


def test_large_matrices_come_alone() -> None:
    side = int(SMALL**0.5) + 1
    params = [np.zeros((side, side), np.float32) for _ in range(3)]
    opt = fo.Optimizer(params, fo.Muon())
    opt.step(gradients(params))
    assert opt._assembly.plan.work_bytes == 4 * 5 * side**2


def test_buffers_are_made_once_and_shared() -> None:
    # Shapes of one matrix each, but for the last: a split that is the largest of them.
    shapes = [(8, 200), (100, 5), (12, 12), (12, 12), (60, 40)]
    rules = {"4": fo.Muon(split=3), "*": fo.Muon()}
    params = [np.zeros(s, np.float32) for s in shapes]
    opt = fo.Optimizer(params, rules)
    stacks = [(1, 8, 200), (1, 100, 5), (2, 12, 12), (3, 20, 40)]
    workspace = max(
        min(c, most()) * core.orthogonalize_space(*s) if core else 0 for c, *s in stacks
    )
    expected = 4 * (2 * 60 * 40 + 3 * 20 * 20 + workspace)
    assert opt._assembly.plan.work_bytes == fo.estimate(params, rules).work == expected
    grads = gradients(params)
    opt.step(grads)
    for k, (p, g) in enumerate(zip(params, grads, strict=True)):
        expected_p = alone(fo.Muon(split=3) if k == 4 else fo.Muon(), p, g)
        np.testing.assert_allclose(p, expected_p, atol=2e-6)


@pytest.mark.parametrize("settings", [{}, {"gram": True}, {"norm": "aol"}, {"split": 4}])
@pytest.mark.parametrize("shape", [(300, 200), (200, 500), (80, 25, 5, 5)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_products_allocate_next_to_nothing(
    shape: tuple[int, ...], order: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = matrices.RESERVE  # of which a step makes sure before it begins
    monkeypatch.setattr(matrices, "RESERVE", 0)
    # They come when other matrices have been updated already: too late to run out of memory.
    p = np.zeros(shape, np.float32, order=order)
    opt = fo.Optimizer(p, fo.Muon(**settings))
    g = np.asarray(np.random.default_rng(2).standard_normal(shape), np.float32, order=order)
    tiny = g * np.float32(1e-20)
    opt.step(g)
    tracemalloc.start()
    opt.step(g)
    opt.step(tiny)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000 < min(p.nbytes, reserve)  # NumPy's own buffers, of 8192 elements


def test_decay_is_not_scaled_by_the_shape() -> None:
    p = np.ones((16, 4))
    fo.Optimizer(p, fo.Muon(lr=0.5, weight_decay=0.1)).step(np.zeros((16, 4)))
    np.testing.assert_allclose(p, 0.95, rtol=1e-15)


def test_the_form_is_described_once_for_each_shape() -> None:
    params = [np.zeros(s) for s in ((8, 40), (8, 40), (200, 1000), (4, 3, 3))]
    lines = fo.Optimizer(params, fo.Muon()).describe().splitlines()[5:-1]
    assert lines == [
        "Muon of shape (8, 40): standard form",
        "Muon of shape (200, 1000): Gram form, resets (2, 3), 0.78 of the standard form's"
        " operations",
        "Muon of shape (4, 3, 3), as 1 of (4, 9): standard form",
    ]
    forced = fo.Optimizer(params[:1], fo.Muon(gram=True, split=2)).describe()
    assert "shape (8, 40), as 2 of (4, 40): Gram form, resets (2, 3), 0.69 of" in forced
    assert "form" not in fo.Optimizer(params, fo.Muon(), backend="reference").describe()


def network() -> dict[str, Any]:
    def block() -> dict[str, Any]:
        return {"w": np.ones((4, 4)), "ln": {"gain": np.ones(4)}, "a[0]": np.ones((2, 3))}

    return {
        "token_embedding": {"w": np.ones((9, 4))},
        "wpe": np.ones((5, 4)),
        "blocks": [block(), block()],
        "lm_head": {"w": np.ones((4, 9))},
        "scale": np.ones(()),
        "proj": np.ones((3, 3)),
    }


def test_with_adamw_sends_matrices_to_muon() -> None:
    params = network()
    rules = fo.Muon.with_adamw(params, lr=0.5, split=1)
    assert {k: type(rule) for k, rule in rules.items()} == {
        "blocks.*.w": fo.Muon,
        "blocks.*.a[[]0]": fo.Muon,
        "proj": fo.Muon,
        "*": fo.AdamW,
    }
    assert rules["proj"] == fo.Muon(lr=0.5)
    assert rules["*"] == fo.AdamW(lr=3e-4, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    opt = fo.Optimizer(params, rules)
    chosen = {line.split()[0] for line in opt.describe().splitlines() if " Muon(" in line}
    assert chosen == {"blocks.0.w", "blocks.0.a[0]", "blocks.1.w", "blocks.1.a[0]", "proj"}
    opt.step(copy.deepcopy(params))


def test_with_adamw_patterns_never_take_what_is_not_theirs() -> None:
    params = {"layers": [{"w": np.ones((2, 2)), "norm": {"w": np.ones(2)}} for _ in range(2)]}
    rules = fo.Muon.with_adamw(params)
    assert list(rules) == ["layers.0.w", "layers.1.w", "*"]  # layers.*.w would match a norm's


def test_with_adamw_names() -> None:
    params = network()
    rules = fo.Muon.with_adamw(params, fo.AdamW(lr=1.0), names=["PROJ", "blocks"])
    assert list(rules) == ["token_embedding.w", "wpe", "lm_head.w", "*"]
    assert rules["*"].lr == 1.0
    with pytest.raises(ValueError, match="names: 'emb' matches no part of a path"):
        fo.Muon.with_adamw(params, names=["emb"])


def test_with_adamw_does_not_flatten_unasked() -> None:
    params = {"conv": np.ones((4, 3, 2, 2)), "b": np.ones(4)}
    with pytest.raises(
        ValueError, match=r"params\['conv'\]: has the shape .*; say filters='matrices'"
    ):
        fo.Muon.with_adamw(params)
    assert list(fo.Muon.with_adamw(params, filters="matrices")) == ["conv", "*"]
    assert list(fo.Muon.with_adamw(params, filters="adamw")) == ["*"]
    assert list(fo.Muon.with_adamw({"w": np.ones((2, 2))})) == ["w"]
    with pytest.raises(ValueError, match=r"with_adamw\(filters\): expected one of"):
        fo.Muon.with_adamw(params, filters="sgd")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"params\['b'\]: expected an array, got 3"):
        fo.Muon.with_adamw({"b": 3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"ns_coefficients": "you", "ns_steps": 6},
            r"Muon\(ns_coefficients\): 'you' has 5 steps",
        ),
        ({"ns_coefficients": "aol"}, r"Muon\(ns_coefficients\): expected one of 'keller'"),
        ({"ns_coefficients": [(1.0, 2.0, 3.0)]}, r"Muon\(ns_coefficients\): 1 triples for 5 steps"),
        ({"norm": "max"}, r"Muon\(norm\)"),
        ({"gram": "yes"}, r"Muon\(gram\)"),
        ({"split": 0}, r"Muon\(split\)"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fo.Muon(**settings)
