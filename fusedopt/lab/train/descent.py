"""The trainer's step: gradients of one batch or several, curvature where it is due, the update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from time import perf_counter

import numpy as np

import fusedopt as fo

from ...arrays.trees import Tree
from ...system.interrupts import deferred
from . import gpt, text
from .history import History
from .options import DTYPES
from .setup import Setup, cast


def descend(setup: Setup, history: History) -> Iterator[int]:
    """Train on batch after batch; yields the number of steps done, all of them in `history`.

    An interrupt during a step is raised after it, so that parameters, generators and history are
    of one moment. Raises FloatingPointError, before the update, at a loss that is not finite.
    """
    while True:
        with deferred():
            _step(setup, history)
        yield len(history.losses)


def check_finite(loss: float, step: int) -> None:
    """FloatingPointError, with the remedy, where the loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"loss: expected a finite number, got {loss} at step {step}; take a smaller --lr"
        )


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Add the time spent inside."""
    start = perf_counter()
    yield
    seconds[what] += perf_counter() - start


def _step(setup: Setup, history: History) -> None:
    options, optimizer, seconds = setup.options, setup.optimizer, history.seconds
    done, micro = len(history.losses), options.accumulate
    refreshing = options.takes_hessian and done % options.refresh == 0
    losses, estimate = [], None
    for _ in range(micro):
        batch = next(setup.batches)
        with timed(seconds, "model"):
            params = setup.weights()
            with np.errstate(over="ignore", invalid="ignore"):  # the loss tells
                scores, cache = gpt.forward(params, batch[0], setup.config)
                loss, dlogits = gpt.cross_entropy(scores, batch[1])
                loss = setup.ranks.mean(loss)
                check_finite(loss, done + 1)
                grads = gpt.backward(params, cache, dlogits, setup.config)
                grads = cast(grads, DTYPES[options.dtype])
        losses.append(loss)
        if refreshing:
            with timed(seconds, "hessian"):
                estimate = _mean(estimate, _curvature(setup, params, batch, scores, cache), micro)
        if micro > 1:
            with timed(seconds, "optimizer"):
                optimizer.accumulate(grads)
    with timed(seconds, "optimizer"):
        if micro > 1:
            info = optimizer.step(grad_scale=micro, hessian=estimate)
        else:
            info = optimizer.step(grads, hessian=estimate)
    history.losses.append(fmean(losses))
    if isinstance(info.grad_norm, float):
        history.grad_norms.append(info.grad_norm)
    if info.stats is not None:
        history.win_rates.append(_win_rate(setup, info.stats))


def _curvature(
    setup: Setup,
    params: gpt.Params,
    batch: tuple[text.Ids, text.Ids],
    scores: gpt.Array,
    cache: gpt.Cache,
) -> gpt.Params:
    def at_labels(drawn: gpt.Array) -> gpt.Params:
        _, dlogits = gpt.cross_entropy(scores, drawn)
        return gpt.backward(params, cache, dlogits, setup.config)

    def gradient() -> gpt.Params:
        return gpt.loss_and_grads(params, *batch, setup.config)[1]

    estimate: gpt.Params
    if setup.options.curvature == "hutchinson":
        estimate = fo.hessian.hutchinson(gradient, params, setup.labels)
    else:
        estimate = fo.hessian.gauss_newton_bartlett(scores, at_labels, setup.labels)
    return estimate


def _mean(so_far: gpt.Params | None, estimate: gpt.Params, count: int) -> gpt.Params:
    """Add a micro-batch's share to the mean of `count`."""
    for leaf in Tree(estimate).leaves:
        leaf.value[...] /= count
    if so_far is None:
        return estimate
    for total, leaf in zip(Tree(so_far).leaves, Tree(estimate).leaves, strict=True):
        total.value[...] += leaf.value
    return so_far


def _win_rate(setup: Setup, stats: Mapping[str, dict[str, float]]) -> float:
    """The share of all elements whose update was not clipped."""
    sizes = {leaf.path: leaf.value.size for leaf in Tree(setup.params).leaves}
    wins = [sizes[path] * found["win_rate"] for path, found in stats.items()]
    return math.fsum(wins) / setup.parameters
