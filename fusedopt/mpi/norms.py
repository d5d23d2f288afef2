"""Norms of gradients that are spread over ranks, with the bits that they have in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays.formats import FLOAT64, SEGMENT
from ..arrays.rows import Rows, unique_rows
from .ranks import Ranks
from .shares import Cut, flat


class Norms:
    """The sums of squares of all leaves, which every rank finds alike.

    An optimizer's plan adds up a leaf segment by segment. Shares are cut between segments, so that
    each rank sums its own and all ranks add up the sums in the plan's order.
    """

    def __init__(
        self, ranks: Ranks, parameters: Sequence[np.ndarray], cuts: Sequence[Cut], backend: Any
    ) -> None:
        self._ranks, self._parameters, self._cuts = ranks, parameters, cuts
        self._backend = backend
        self._rows = np.zeros((len(cuts), 2))

    def __call__(self, results: np.ndarray) -> None:
        """Put what `measure` found into a plan's results."""
        results[:, :2] = self._rows

    def measure(self, shares: Sequence[Any], active: Sequence[int]) -> None:
        """Take the sums of this rank's shares of the leaves that have a gradient."""
        mine = [
            np.array(self._sums(k, shares[k]), np.float64).reshape(-1)
            for k in active
            if shares[k] is not None
        ]
        counts = {k: [2 * -(-n // SEGMENT) for n in self._cuts[k].sizes] for k in active}
        sizes = [sum(counts[k][rank] for k in active) for rank in range(self._ranks.size)]
        found = self._ranks.gather_arrays(np.concatenate([np.empty(0), *mine]), sizes)
        places = [0] * self._ranks.size
        self._rows[...] = 0.0
        for k in active:
            parts = []
            for rank, count in enumerate(counts[k]):
                parts.append(found[rank][places[rank] : places[rank] + count])
                places[rank] += count
            sums, scales = np.concatenate(parts).reshape(-1, 2).T
            self._rows[k] = _total(sums, scales, self._parameters[k].dtype)

    def _sums(self, k: int, share: Any) -> Sequence[tuple[float, float]]:
        """Return each segment's sum of squares, of its elements times a scale, and the scale."""
        if isinstance(share, Rows):
            part = self._cuts[k].part(self._parameters[k], self._ranks.rank)
            share = unique_rows("grads", share, part).dense(part.shape)
        elements = flat(share)
        segments = [elements[a : a + SEGMENT] for a in range(0, elements.size, SEGMENT)]
        found: Sequence[tuple[float, float]] = self._backend.sums_of_squares(segments)
        return found


def _total(sums: np.ndarray, scales: np.ndarray, dtype: np.dtype) -> tuple[float, float]:
    """(sum, scale) of a leaf, as the core chooses them: see csrc/norms.hpp."""
    with np.errstate(all="ignore"):
        total = _in_order(sums / scales / scales)
        if dtype != FLOAT64 or 2.0**-900 <= total <= 2.0**1023:
            return total, 1.0
        scale = 2.0**600 if total < 1.0 else 2.0**-600
        return _in_order(sums * (scale / scales) * (scale / scales)), scale


def _in_order(values: np.ndarray) -> float:
    return float(np.cumsum(values)[-1]) if values.size else 0.0
