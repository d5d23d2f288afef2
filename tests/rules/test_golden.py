"""Steps whose results are known from elsewhere, number by number.

p0 = (1, -2, .5, 0) and three gradients; the values were computed in float64 by independent code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fusedopt as fo

GRADIENTS = ((0.1, -0.2, 0.3, -0.4), (0.05, 0.1, -0.2, 0.0), (-0.3, 0.2, 0.1, 0.4))

CASES: dict[str, tuple[fo.Rule, tuple[float, ...]]] = {
    "sgd": (fo.SGD(lr=0.1), (1.015, -2.01, 0.48, 0)),
    "sgd l2": (
        fo.SGD(lr=0.1, weight_decay=0.1),
        (0.985548, -1.950896, 0.4655465, -0.000796),
    ),
    "ema": (fo.Momentum(lr=0.1), (0.99934, -1.99848, 0.49467, 0.00684)),
    "heavy ball": (
        fo.Momentum(lr=0.1, form="heavy_ball"),
        (0.9934, -1.9848, 0.4467, 0.0684),
    ),
    "buffer": (fo.Momentum(lr=0.1, form="buffer"), (0.9934, -1.9848, 0.4467, 0.0684)),
    "dampening": (
        fo.Momentum(lr=0.1, form="buffer", dampening=0.1),
        (0.99135, -1.9809, 0.4439, 0.0724),
    ),
    "nesterov": (fo.Nesterov(lr=0.1), (1.00906, -1.99632, 0.43203, 0.06156)),
    "nesterov keras": (
        fo.Nesterov.like("keras", lr=0.1),
        (1.00906, -1.99632, 0.43203, 0.06156),
    ),
    "adagrad": (
        fo.AdaGrad(lr=0.1, eps_root=1e-8),
        (0.948982960901, -2.01138803054, 0.428743899808, 0.0292893198612),
    ),
    "adagrad torch": (
        fo.AdaGrad.like("torch", lr=0.1),
        (0.948982897694, -2.01138802622, 0.428743895456, 0.0292893218688),
    ),
    "adagrad optax": (
        fo.AdaGrad.like("optax", lr=0.1),
        (1.02160841623, -2.01825078578, 0.452465761426, 0.0167251063324),
    ),
    "rmsprop keras": (
        fo.RMSProp.like("keras", lr=0.01),
        (0.98358273801, -2.00528907279, 0.477388341621, 0.00811769362663),
    ),
    "rmsprop torch": (
        fo.RMSProp.like("torch", lr=0.01),
        (0.948905599783, -2.01190234998, 0.42872531584, 0.0289348767246),
    ),
    "rmsprop centered momentum": (
        fo.RMSProp.like("torch", lr=0.01, centered=True, momentum=0.9),
        (0.73546206105, -1.88007098555, 0.306457766791, 0.201300010162),
    ),
    "adam": (
        fo.Adam(lr=0.01),
        (0.984150440673, -1.99006359802, 0.485769706083, 0.0158419049362),
    ),
    "adam l2": (
        fo.Adam(lr=0.01, weight_decay=0.1),
        (0.978306152092, -1.97532532945, 0.482167551942, 0.015796107203),
    ),
    "adam hat": (
        fo.Adam.like("keras", lr=0.01),
        (0.984150984358, -1.99006376455, 0.485769847209, 0.0158417781443),
    ),
    "adamw": (
        fo.AdamW(lr=0.01, weight_decay=0.1),
        (0.981182751466, -1.98409224939, 0.484292640788, 0.0158152143544),
    ),
    "adamw torch": (
        fo.AdamW.like("torch", lr=0.01, weight_decay=0.1),
        (0.981182751466, -1.98409224939, 0.484292640788, 0.0158152143544),
    ),
    "lion": (
        fo.Lion(lr=0.01, weight_decay=0.1),
        (0.987032989, -2.004015988, 0.4885114895, 0.00997001),
    ),
}


def run(
    rule: fo.Rule, dtype: Any = np.float64, backend: str = "auto", hessian: Any = None
) -> np.ndarray:
    p = np.array([1, -2, 0.5, 0], dtype)
    opt = fo.Optimizer(p, rule, backend=backend)
    for t, g in enumerate(GRADIENTS, 1):
        opt.step(np.array(g, dtype), hessian=hessian if t == 1 else None)
    return p


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_three_steps(name: str, backend: str) -> None:
    rule, expected = CASES[name]
    np.testing.assert_allclose(run(rule, backend=backend), expected, rtol=2e-11, atol=2e-14)
    np.testing.assert_allclose(run(rule, np.float32, backend), expected, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("form", "last"), [("raw", 0.0158385538072), ("corrected", 0.0140357347433)]
)
def test_amsgrad(form: Any, last: float) -> None:
    assert run(fo.Adam(lr=0.01, amsgrad=form))[-1] == pytest.approx(last, rel=1e-11)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_sophia_refreshes_after_the_step(backend: str) -> None:
    rule = fo.Sophia(lr=0.01, rho=0.04, bs=100, weight_decay=0.1)
    p = run(rule, backend=backend, hessian=np.array([0.1, 0.2, 0.3, 0.4]))
    expected = (0.987032989, -1.984035988, 0.469828802, 0.018465556875)
    np.testing.assert_allclose(p, expected, rtol=1e-10)


def valley(form: Any) -> np.ndarray:
    """Five steps on (x^2 + 10 y^2) / 2 from (1, 1)."""
    w = np.array([1.0, 1.0])
    opt = fo.Optimizer(w, fo.Nesterov(lr=0.05, momentum=0.9, form=form))
    for _ in range(5):
        if form == "lookahead":
            with opt.lookahead():
                g = np.array([1.0, 10.0]) * w
        else:
            g = np.array([1.0, 10.0]) * w
        opt.step(g)
    return w - 0.9 * opt.state["params"]["v"] if form == "lookahead" else w


def test_look_ahead_and_rearranged_forms_are_one_path() -> None:
    np.testing.assert_allclose(valley("rearranged"), (0.31594231, -0.01113719), rtol=1e-6)
    np.testing.assert_allclose(valley("lookahead"), valley("rearranged"), rtol=1e-12)


def test_newton_schulz() -> None:
    # Keller's five steps on [[1, 2, 3], [4, 5, 6]] over its norm.
    for backend in ("native", "reference"):
        p = np.zeros((2, 3))
        opt = fo.Optimizer(p, fo.Muon(lr=1.0, nesterov=False), backend=backend)
        opt.step(np.array([[1.0, 2, 3], [4, 5, 6]]))
        expected = [
            [-0.5682900921, 0.0577419433, 0.6837739786],
            [0.5633546843, 0.4056128236, 0.2478709628],
        ]
        np.testing.assert_allclose(-p, expected, atol=5e-10)
