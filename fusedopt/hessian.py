"""Hessian estimates for Sophia: what `opt.step(grads, hessian=...)` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .arrays.trees import Tree
from .system.interrupts import uninterrupted


def gauss_newton_bartlett(
    logits: np.ndarray, backward: Callable[[np.ndarray], Any], rng: np.random.Generator
) -> Any:
    """Return the gradient at labels drawn by the model, for Sophia(estimator="gnb").

    Parameters
    ----------
    logits : array, shape (..., classes)
        The model's logits.
    backward : callable
        Maps labels (int64, of shape logits.shape[:-1]) to the tree of gradients of the mean loss.
    rng : numpy.random.Generator
        Source of the draws.

    Returns
    -------
    nested arrays
        The result of `backward`; the refresh squares it.

    References
    ----------
    Liu et al. 2023, algorithm 2.
    """
    # The largest of logits plus independent Gumbel noise is a draw from their softmax.
    return backward(np.argmax(logits + rng.gumbel(size=logits.shape), axis=-1))


def hutchinson(
    gradient: Callable[[], Any], params: Any, rng: np.random.Generator, *, step: float = 1e-3
) -> Any:
    """Return u times the Hessian's product with a random u, for Sophia(estimator="hutchinson").

    Parameters
    ----------
    gradient : callable
        Returns the tree of gradients at the current values of `params`, None where a leaf has
        none.
    params : nested arrays
        The arrays that the model uses. They are shifted in place by plus and minus `step` u, with
        u standard normal, and their exact bits are restored.
    rng : numpy.random.Generator
        Source of u.
    step : float, default 1e-3
        Size of the shift. The product is the central difference of the two gradients.

    Returns
    -------
    nested arrays
        A tree like the gradients.

    References
    ----------
    Liu et al. 2023, algorithm 1, with the product by finite differences.
    """
    tree = Tree(params)
    arrays = [leaf.value for leaf in tree.leaves]
    backup = [a.copy() for a in arrays]
    with np.errstate(all="ignore"):
        noise = [rng.standard_normal(a.shape).astype(a.dtype) for a in arrays]

    def shifted(sign: float) -> list[Any]:
        with np.errstate(all="ignore"):
            for a, original, u in zip(arrays, backup, noise, strict=True):
                a[...] = original + a.dtype.type(sign * step) * u
        # Copies: a trainer may write its next gradients over these.
        leaves = tree.flatten(gradient(), "gradient()")
        return [None if g is None else np.array(g) for g in leaves]

    def restore() -> None:
        for a, original in zip(arrays, backup, strict=True):
            a[...] = original

    try:
        try:
            above, below = shifted(1.0), shifted(-1.0)
        finally:
            uninterrupted(restore)
    except BaseException:  # an interrupt may have come within the `finally`
        uninterrupted(restore)
        raise
    with np.errstate(all="ignore"):
        products = [
            None if g is None else u * ((g - h) / g.dtype.type(2 * step))
            for u, g, h in zip(noise, above, below, strict=True)
        ]
    return tree.build(products)
