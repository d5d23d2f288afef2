"""Norms of gradients, and what a step does about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

SHOWN = 5
"""The largest number of paths of bad leaves that a message names."""


def combined(rows: np.ndarray) -> float:
    """The norm of all leaves, in whatever order they stand.

    rows: of each leaf the sum of the squares of its elements times scale, and that scale; 0 for a
    leaf that does not count.
    """
    # Sums of zero were taken again, in vain; their scales must not show either.
    sums, scales = rows[(rows != 0).all(axis=1)].T
    if not np.all(np.isfinite(sums)):
        return math.nan if np.any(np.isnan(sums)) else math.inf
    if np.all(scales == 1.0):
        total = _exact_sum(sums)
        if math.isfinite(total):
            return math.sqrt(total)
    with np.errstate(all="ignore"):
        norms = np.sqrt(sums) / scales
        largest = float(np.max(norms, initial=0.0))
        if largest == 0.0 or math.isinf(largest):
            return largest
        return largest * math.sqrt(_exact_sum((norms / largest) ** 2))


def _exact_sum(values: np.ndarray) -> float:
    """Rounded once, so that no order shows."""
    try:
        return math.fsum(values.tolist())
    except OverflowError:
        return math.inf


class GradientClipper:
    """Asked between the reading of the gradients and the step: whether to go on, and how.

    paths: of the leaves. labels: of the groups; group_of: of each leaf its group. results: the
    plan's, of which the first two columns are read. factors: on the groups' gradients, which
    are set here. clip_norm: the largest norm of all gradients
    together, or by label of those of each group (None: any), or None. skip_nonfinite: a NaN or an
    infinity skips the step; otherwise it raises where there is a norm to clip to.

    After each call: grad_norm, clip_scale (by label where groups clip each on its own), skipped
    and bad_leaves.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[str],
        group_of: Sequence[int],
        results: np.ndarray,
        factors: np.ndarray,
        clip_norm: float | Mapping[str, float | None] | None,
        skip_nonfinite: bool,
    ) -> None:
        self._paths, self._labels = paths, labels
        self._members = [np.asarray(group_of) == k for k in range(len(labels))]
        self._results, self._factors = results, factors
        self._clip_norm, self._skip = clip_norm, skip_nonfinite
        self.factor = 1.0
        self.agree: Callable[[np.ndarray], None] | None = None
        """Puts what all ranks found into the results, where each reads a share of gradients."""

    def begin(self, grad_scale: float) -> None:
        """Before a step whose gradients are grad_scale times too large."""
        self.factor = 1.0 / grad_scale
        self._factors[:] = self.factor
        self.grad_norm: Any = None
        self.clip_scale: Any = 1.0
        self.skipped = False
        self.bad_leaves: tuple[str, ...] = ()

    def __call__(self) -> bool:
        if self.agree is not None:
            self.agree(self._results)
        norms = self.take_norm()
        if not all(map(math.isfinite, norms)):
            refusal = self.refusal(np.flatnonzero(~np.isfinite(self._results[:, 0])).tolist())
            if self._skip:
                self.skipped = True
                return False
            if self._clip_norm is not None:
                raise refusal
        if isinstance(self._clip_norm, Mapping):
            for k, (label, norm) in enumerate(zip(self._labels, norms, strict=True)):
                limit = self._clip_norm[label]
                self.clip_scale[label] = 1.0 if limit is None else clip_scale(limit, norm)
                self._factors[k] = self.factor * self.clip_scale[label]
        elif self._clip_norm is not None:
            self.clip_scale = clip_scale(self._clip_norm, norms[0])
            self._factors[:] = self.factor * self.clip_scale
        return True

    def refusal(self, bad: Sequence[int]) -> FloatingPointError:
        """Note the leaves whose gradients are not finite, and return the error of their step."""
        self.bad_leaves = tuple(self._paths[k] for k in bad)
        return FloatingPointError(
            f"grads: {self._complaint()}; nothing has changed; skip_nonfinite=True skips such steps"
        )

    @property
    def by_group(self) -> bool:
        """Whether each group has its own norm."""
        return isinstance(self._clip_norm, Mapping)

    @property
    def limits(self) -> list[float]:
        """The limits on the norm of all, or of each group; infinite where there is none."""
        clip = self._clip_norm
        found = [clip[label] for label in self._labels] if isinstance(clip, Mapping) else [clip]
        return [math.inf if limit is None else limit for limit in found]

    def told(self, norms: Sequence[Any], scales: Sequence[Any]) -> None:
        """Take the results that a device will find, in the order of `limits`."""
        self.grad_norm, self.clip_scale = norms[0], scales[0]
        if isinstance(self._clip_norm, Mapping):
            self.grad_norm = dict(zip(self._labels, norms, strict=True))
            self.clip_scale = dict(zip(self._labels, scales, strict=True))

    def stopped(self, number: int, bad: Sequence[int]) -> FloatingPointError:
        """Tells of a step that a device did not take, because of these leaves."""
        self.bad_leaves = tuple(self._paths[k] for k in bad)
        return FloatingPointError(
            f"grads: {self._complaint('no finite sum of squares')}, in step {number}; neither that"
            f" step nor one after it has changed anything, and step_count is {number - 1} again"
        )

    def take_norm(self) -> list[float]:
        """Find `grad_norm` from the results: of all, or of each group."""
        rows = self._results[:, :2]
        if not isinstance(self._clip_norm, Mapping):
            self.grad_norm = combined(rows) * self.factor
            return [self.grad_norm]
        norms = [combined(rows[members]) * self.factor for members in self._members]
        self.grad_norm = dict(zip(self._labels, norms, strict=True))
        self.clip_scale = dict.fromkeys(self._labels, 1.0)
        return norms

    def _complaint(self, found: str = "NaN or infinity") -> str:
        names, more = self.bad_leaves[:SHOWN], len(self.bad_leaves) - SHOWN
        if not names:
            return "their norm overflows float64"
        return f"{found} in {', '.join(names)}" + (f" and {more} more" if more > 0 else "")


def clip_scale(limit: float, norm: float) -> float:
    """min(1, limit / norm)."""
    return limit / norm if norm > limit else 1.0
