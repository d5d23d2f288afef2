"""Side states without denormals, and SOAP as its authors write it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fusedopt as fo

BACKENDS = ["native", "reference"]


def gradients(shape: tuple[int, ...], count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape) for _ in range(count)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rule",
    [
        fo.NorMuon(momentum=0.0, beta2=0.5),
        fo.SOAP(shampoo_beta=0.5),
        fo.Shampoo(shampoo_beta=0.5),
        fo.Dion(momentum=0.5),
        fo.Adafactor(beta2_decay=0.1, eps=0.0),
    ],
)
def test_side_states_are_never_denormal(rule: Any, backend: str) -> None:
    p, normal = np.ones((4, 6), np.float32), np.finfo(np.float32).smallest_normal
    optimizer = fo.Optimizer(p, rule, backend=backend)
    optimizer.step(gradients(p.shape, 1)[0].astype(np.float32))
    for _ in range(150):  # until nothing but denormals would be left
        optimizer.step(np.zeros_like(p))
        for name, state in optimizer.state["params"].items():
            assert not ((state != 0) & (np.abs(state) < normal)).any(), name
    own = {"normuon": ("v",), "dion": ("m",), "adafactor": ("row", "col")}
    for name in own.get(rule.name, ("L", "R")):
        assert not optimizer.state["params"][name].any()


def authors_soap(grads: list[np.ndarray], every: int) -> Any:
    """What SOAP's authors subtract: the first moment is kept turned, the second is sorted."""
    g, *later = grads
    sums = [0.05 * (g @ g.T), 0.05 * (g.T @ g)]
    left, right = (np.linalg.eigh(a)[1][:, ::-1] for a in sums)
    first = second = np.zeros_like(g)
    yield np.zeros_like(g)
    for step, g in enumerate(later, 1):
        seen = left.T @ g @ right
        first, second = 0.95 * first + 0.05 * seen, 0.95 * second + 0.05 * seen**2
        c = 1 - 0.95**step
        yield left @ (first / (np.sqrt(second) + 1e-8)) @ right.T * np.sqrt(c) / c
        first = left @ first @ right.T
        sums = [0.95 * a + 0.05 * b for a, b in zip(sums, (g @ g.T, g.T @ g), strict=True)]
        if step % every == 0:
            orders = [
                np.argsort(-np.diag(q.T @ a @ q)) for q, a in zip((left, right), sums, strict=True)
            ]
            second = second[np.ix_(*orders)]
            left = np.linalg.qr(sums[0] @ left[:, orders[0]])[0]
            right = np.linalg.qr(sums[1] @ right[:, orders[1]])[0]
        first = left.T @ first @ right


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("every", [1, 3, 10])
def test_soap_on_both_sides_is_its_authors(every: int, backend: str) -> None:
    # Square, so that the first gradient has full rank: the basis of nothing is by chance.
    grads = gradients((8, 8), 14)
    p, expected = np.zeros((8, 8)), np.zeros((8, 8))
    rule = fo.SOAP(lr=0.1, weight_decay=0.0, precondition_frequency=every)
    optimizer = fo.Optimizer(p, rule, backend=backend)
    for g, delta in zip(grads, authors_soap(grads, every), strict=True):
        optimizer.step(g)
        expected -= 0.1 * delta
        # Not nearer: what is added to L and R before a decomposition is not the authors'.
        np.testing.assert_allclose(p, expected, atol=2e-4)
