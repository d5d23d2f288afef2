"""Transforms of each gradient before a step: centralisation, and clipping by rows or leaf."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..arrays.formats import compute_dtype
from ..arrays.order import memory_order, slices_are_dense
from ..arrays.rows import UniqueRows
from ..arrays.stored import LeafState
from ..plan.interface import Backend

LEAST_ROW = 1e-3
"""The least norm that a row of a parameter is taken to have, so that one of zeros can move."""

LANES = 16
"""Sums of a row, each of every 16th element, which are added up last."""


class GradientTransforms:
    """Centralisation of gradients, adaptive clipping of their rows, and clipping of each leaf.

    clip_leaf, clip_adaptive, centralize: as `Optimizer` has them. factor: the inverse of the scale
    of the gradients. A gradient that is not finite stays that, for those that look for it. Where a
    whole step is one call of the core, it does the same (csrc/gradient_transforms.hpp).
    """

    def __init__(
        self,
        backend: Backend,
        clip_leaf: float | None,
        clip_adaptive: float | None,
        centralize: bool,
        factor: Callable[[], float],
    ) -> None:
        self._backend, self._factor = backend, factor
        self._clip_leaf, self._clip_adaptive = clip_leaf, clip_adaptive
        self._centralize = centralize

    @property
    def numbers(self) -> tuple[float, float, bool]:
        """Return clip_leaf, clip_adaptive, either or both 0.0 for none, and centralize."""
        return self._clip_leaf or 0.0, self._clip_adaptive or 0.0, self._centralize

    def __call__(
        self, labels: Sequence[str], parameters: Sequence[np.ndarray], grads: Sequence[Any]
    ) -> list[Any]:
        """Return the gradients that a step takes: those that were given, or new arrays.

        ValueError for gradients of some rows.
        """
        transformed = []
        for label, p, g in zip(labels, parameters, grads, strict=True):
            if isinstance(g, UniqueRows):
                raise ValueError(
                    f"{label}: clip_leaf, clip_adaptive and centralize need all rows of a gradient;"
                    " give the whole gradient"
                )
            transformed.append(None if g is None else self._transformed(p, g))
        return transformed

    def _transformed(self, p: np.ndarray, g: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            if self._centralize and g.ndim > 1 and g.size:
                g = _centralized(g, compute_dtype(p.dtype))
            if self._clip_adaptive is not None:
                limits = self._clip_adaptive * np.maximum(self._norms(_rows(p)), LEAST_ROW)
                g = self._clipped(p, g, limits, _rows(g))
            if self._clip_leaf is not None:
                g = self._clipped(p, g, np.array([self._clip_leaf]), [g])
        return g

    def _clipped(
        self, p: np.ndarray, g: np.ndarray, limits: np.ndarray, parts: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Return the gradient with each part's norm within its limit; p: its parameter."""
        norms = self._norms(parts) * self._factor()
        beyond = np.isfinite(norms) & (norms > limits)
        if not beyond.any():
            return g
        dtype = compute_dtype(p.dtype)
        factors = np.where(beyond, limits / norms, 1.0).astype(dtype)
        if len(factors) > 1:
            factors = factors.reshape(-1, *[1] * (g.ndim - 1))
        clipped: np.ndarray = g.astype(dtype, order="K", copy=True)
        clipped *= factors if len(norms) > 1 else factors[0]
        return clipped

    def _norms(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        found = self._backend.sums_of_squares(list(parts))
        sums, scales = np.array(found, np.float64).reshape(-1, 2).T
        norms: np.ndarray = np.sqrt(sums) / scales
        return norms


def rows_in_place(leaf_state: LeafState) -> bool:
    """Return whether the rows of a parameter are dense, and stored without anything beside them."""
    p, arrays = leaf_state.caller, leaf_state.parameter.arrays
    alone = len(arrays) == 1 and arrays[0] is p
    return alone and (p.ndim < 2 or not p.size or slices_are_dense(p.shape, memory_order(p), 0))


def _rows(a: np.ndarray) -> list[np.ndarray]:
    """Return the parts of an array along its first axis; the array itself where it has one axis."""
    if a.ndim < 2 or not a.size:
        return [a]
    return list(np.ascontiguousarray(a))


def _centralized(g: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the gradient less the mean of each row, whose sum has an order that is always the
    same."""
    rows = np.ascontiguousarray(g).reshape(g.shape[0], -1)
    count = rows.shape[1]
    whole = count - count % LANES
    lanes = np.zeros((g.shape[0], LANES))
    for at in range(0, whole, LANES):
        lanes += rows[:, at : at + LANES]
    lanes[:, : count - whole] += rows[:, whole:]
    sums = lanes[:, 0].copy()
    for lane in range(1, LANES):
        sums += lanes[:, lane]
    means = (sums / count).astype(dtype).reshape(-1, *[1] * (g.ndim - 1))
    centralized: np.ndarray = g.astype(dtype, order="K", copy=True)
    centralized -= means
    return centralized
