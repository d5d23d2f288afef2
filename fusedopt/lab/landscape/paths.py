"""Paths over a landscape: what the fused kernels make of an objective's gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

import fusedopt as fo

from .objectives import Array, Objective, Sampled


@dataclass(frozen=True, kw_only=True)
class Run:
    """One rule on an objective.

    label: its name in the picture. batch: samples in each gradient, drawn anew without repetition;
    None takes the whole gradient. colour, width: of its line, in
    points.
    """

    label: str
    rule: fo.Rule
    colour: str
    width: float = 1.8
    batch: int | None = None


@dataclass(frozen=True, kw_only=True)
class Path:
    """The path of a run of T steps, all float64.

    run: whose path this is. points: (T + 1, 2), the start first. probes: (T, 2), where each
    gradient was taken: the point itself, but for the look-ahead form. gradients: (T, 2). losses:
    (T + 1,), of the whole objective.
    """

    run: Run
    points: Array
    probes: Array
    gradients: Array
    losses: Array

    @property
    def moves(self) -> Array:
        """The displacement of each step, (T, 2)."""
        return np.diff(self.points, axis=0)

    @property
    def lengths(self) -> Array:
        """The lengths of the steps, (T,)."""
        lengths: Array = np.linalg.norm(self.moves, axis=1)
        return lengths


def walk(
    objective: Objective, run: Run, start: tuple[float, float], steps: int, *, seed: int = 0
) -> Path:
    """Take `steps` steps of `fo.Optimizer` from `start`.

    seed: of the samples in each batch, and of the estimates of curvature where the rule takes
    them (Hutchinson's, at every step). Raises FloatingPointError where the path leaves for
    infinity.
    """
    w = np.array(start, np.float64)
    optimizer = fo.Optimizer(w, run.rule)
    rng = np.random.default_rng(seed)
    gradient = _gradient(objective, run.batch, rng)
    ahead = isinstance(run.rule, fo.Nesterov) and run.rule.form == "lookahead"
    points, probes, gradients = [w.copy()], [], []
    for step in range(1, steps + 1):
        with optimizer.lookahead() if ahead else nullcontext():
            probes.append(w.copy())
            gradients.append(gradient(w))
        hessian = None
        if run.rule.takes_hessian:
            hessian = fo.hessian.hutchinson(lambda: gradient(w), w, rng)
        optimizer.step(gradients[-1], hessian=hessian)
        if not np.isfinite(w).all():
            raise FloatingPointError(
                f"{run.label}: expected finite weights, got {w} at step {step}; take a smaller lr"
            )
        points.append(w.copy())
    path = np.array(points)
    return Path(
        run=run,
        points=path,
        probes=np.array(probes),
        gradients=np.array(gradients),
        losses=objective.value(path),
    )


def _gradient(
    objective: Objective, batch: int | None, rng: np.random.Generator
) -> Callable[[Array], Any]:
    if batch is None:
        return objective.gradient
    sampled = cast(Sampled, objective)
    return lambda w: sampled.pull(w, rng.choice(sampled.count, batch, replace=False))
