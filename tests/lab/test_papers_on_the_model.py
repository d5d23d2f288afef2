"""Lion and Sophia on the model of the race, against loops in PyTorch written from their papers.

They end above plain SGD in a race of small batches: here it shows that this is not a fault.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from fusedopt.arrays.trees import Tree
from fusedopt.lab.race.lanes import Lane
from fusedopt.lab.train import TrainOptions, gpt
from fusedopt.lab.train.setup import Setup

torch = pytest.importorskip("torch")

Leaf = dict[str, Any]


def lion(leaf: Leaf, g: Any, estimate: Any, rule: Any, lr: float) -> None:
    """Chen et al. 2023, algorithm 2."""
    b1, b2 = rule.betas
    update = torch.sign(b1 * leaf["m"] + (1 - b1) * g)
    leaf["p"] -= lr * (update + rule.weight_decay * leaf["p"])
    leaf["m"] = b2 * leaf["m"] + (1 - b2) * g


def sophia(leaf: Leaf, g: Any, estimate: Any, rule: Any, lr: float) -> None:
    """Liu et al. 2023, algorithm 3, with the denominator of the authors' code."""
    b1, b2 = rule.betas
    leaf["m"] = b1 * leaf["m"] + (1 - b1) * g
    ratio = (torch.abs(leaf["m"]) / (rule.rho * rule.bs * leaf["h"] + 1e-15)).clamp(max=1.0)
    leaf["p"] -= lr * (torch.sign(leaf["m"]) * ratio + rule.weight_decay * leaf["p"])
    if estimate is not None:
        leaf["h"] = b2 * leaf["h"] + (1 - b2) * estimate**2


def by_path(tree: Any) -> dict[str, Any]:
    return {leaf.path: torch.from_numpy(leaf.value.copy()) for leaf in Tree(tree).leaves}


def in_torch(options: TrainOptions, step: Callable[..., None], steps: int) -> tuple[Any, Any]:
    """Return the losses and the parameters of a run with the same start, batches and draws."""
    setup = Setup.of(options)
    tree, rule = Tree(setup.params), setup.rules["*"]
    zero = torch.tensor(0.0)
    leaves: dict[str, Leaf] = {
        path: {"p": p, "m": zero, "h": zero} for path, p in by_path(setup.params).items()
    }
    losses = []
    for t in range(1, steps + 1):
        params = tree.build([leaf["p"].numpy() for leaf in leaves.values()])
        x, y = next(setup.batches)
        scores, cache = gpt.forward(params, x, setup.config)
        loss, dlogits = gpt.cross_entropy(scores, y)

        def at(labels: Any, params: Any = params, cache: Any = cache, scores: Any = scores) -> Any:
            drawn = gpt.cross_entropy(scores, labels)[1]
            return gpt.backward(params, cache, drawn, setup.config)

        grads, drawn = by_path(gpt.backward(params, cache, dlogits, setup.config)), {}
        if options.takes_hessian and (t - 1) % options.refresh == 0:
            drawn = by_path(fo.hessian.gauss_newton_bartlett(scores, at, setup.labels))
        for path, leaf in leaves.items():
            step(leaf, grads[path], drawn.get(path), rule, rule.lr_at(t))
        losses.append(loss)
    return losses, [leaf["p"].numpy() for leaf in leaves.values()]


@pytest.mark.parametrize("batch", [8, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("rule", "step"), [("lion", lion), ("sophia", sophia)])
def test_trajectories(rule: str, step: Callable[..., None], batch: int) -> None:
    steps = 60
    options = TrainOptions(
        rule=rule, lr=9e-4, steps=steps, batch=batch, context=32, layers=2, heads=4, width=64,
        stats=False,
    )  # fmt: skip
    lane = Lane(options)
    lane.train(steps)
    losses, params = in_torch(options, step, steps)
    np.testing.assert_allclose(lane.history.losses, losses, rtol=2e-3)
    assert losses[-1] < losses[0] - 0.8  # it has trained
    # A sign that is up to rounding may differ, in few elements.
    own = np.concatenate([leaf.value.ravel() for leaf in Tree(lane.setup.params).leaves])
    apart = np.abs(own - np.concatenate([p.ravel() for p in params]))
    assert np.mean(apart > 1e-4) < 0.02
