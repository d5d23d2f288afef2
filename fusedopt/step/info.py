"""The information that a step returns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..arrays.trees import Tree
from ..plan.spec import PlanSpec
from .clipping import GradientClipper


class StepInfo(NamedTuple):
    """The result of one step.

    Parameters
    ----------
    step : int
        Number of the step, 1 for the first; of a skipped step the number of the step before.
    lr : float or dict
        Learning rate of the step; with several rules a dict by the label of the parameter group.
    grad_norm : float, dict or None
        Norm of the unscaled gradients before any clipping; None where nothing asked for it
        (`clip_norm`, `skip_nonfinite`, `stats`), a dict by label where groups are clipped apart.
    clip_scale : float or dict
        Factor by which `clip_norm` multiplied the gradients.
    skipped : bool
        Whether nothing was done, since a gradient held a NaN or an infinity.
    bad_leaves : tuple of str
        Paths of the leaves with such gradients.
    stats : mapping or None
        With `stats=True`, by path of each leaf that took part, a dict of "grad_norm",
        "update_ratio" (the norm of the parameter's change over the parameter's own) and what the
        rule adds, such as Sophia's "win_rate", the share of elements that were not clipped. Of
        `Rows` only the rows that were touched count. `dict(info.stats)` has all at once.

    Notes
    -----
    With `wait=False`, `grad_norm` and `clip_scale` are arrays of the device: see `Optimizer`.
    """

    step: int
    lr: float | dict[str, float]
    grad_norm: float | dict[str, float] | None = None
    clip_scale: float | dict[str, float] = 1.0
    skipped: bool = False
    bad_leaves: tuple[str, ...] = ()
    stats: Mapping[str, dict[str, float]] | None = None


class Stats(Mapping[str, dict[str, float]]):
    """Statistics of leaves by path, found when one is first asked for.

    To find them takes 0.1 ms for 1000 leaves.
    """

    def __init__(self, find: Callable[[], dict[str, dict[str, float]]]) -> None:
        self._find = find

    @functools.cached_property
    def _found(self) -> dict[str, dict[str, float]]:
        return self._find()

    def __getitem__(self, path: str) -> dict[str, float]:
        return self._found[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        return repr(self._found)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self._found,)


class StepInfoBuilder:
    """Builder of the `StepInfo` of a step from the results of the plan and the clipping."""

    def __init__(self, tree: Tree, spec: PlanSpec, clipper: GradientClipper) -> None:
        self._paths = [leaf.path for leaf in tree.leaves]
        self._spec, self._clipper = spec, clipper
        self.tells_stats = spec.extras.stats
        programs = [spec.extras.program(group.rule) for group in spec.groups]
        # The leaves whose programs have the same sums, by the names of these.
        self.alike: dict[tuple[str, ...], list[int]] = {}
        for k, group in enumerate(spec.group_of):
            self.alike.setdefault(programs[group].told, []).append(k)

    def info(self, number: int, lr: float | dict[str, float]) -> StepInfo:
        """Return the information of the step that was taken last."""
        clipper, stats = self._clipper, None
        if self.tells_stats and not clipper.skipped:
            for column, leaves in self.gradient_sums:
                self._spec.results[leaves, 0] = self._spec.results[leaves, column]
            stats = self.stats(self._spec.results.copy(), clipper.factor)
            if self._spec.decide is None:
                clipper.take_norm()
        return StepInfo(
            number,
            lr,
            clipper.grad_norm,
            clipper.clip_scale,
            clipper.skipped,
            clipper.bad_leaves,
            stats,
        )

    @property
    def gradient_sums(self) -> list[tuple[int, list[int]]]:
        """The columns of results with sums of squares that no pass for the norm has found, and the
        leaves that have them."""
        return [
            (3 + names.index("gradient"), leaves)
            for names, leaves in self.alike.items()
            if "gradient" in names
        ]

    def stats(self, results: np.ndarray, factor: float) -> Stats:
        """Return the statistics of a step that left these results; factor: on its gradients."""
        return Stats(lambda: self._stats(results.reshape(len(self._paths), -1), factor))

    def _stats(self, results: np.ndarray, factor: float) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for names, leaves in self.alike.items():
            rows = results[leaves]
            sums = dict(zip(names, rows[:, 3:].T, strict=False))
            sums.pop("gradient", None)
            with np.errstate(all="ignore"):
                norms = np.sqrt(rows[:, 0]) / rows[:, 1] * factor
                update, weight = np.sqrt(sums.pop("update")), np.sqrt(sums.pop("weight"))
                ratios = np.where(update == 0, 0.0, update / weight)
                columns = {"grad_norm": norms, "update_ratio": ratios}
                columns |= {n: total / np.maximum(rows[:, 2], 1.0) for n, total in sums.items()}
            values = zip(*(column.tolist() for column in columns.values()), strict=True)
            for k, took_part, row in zip(leaves, rows[:, 1].tolist(), values, strict=True):
                if took_part:
                    found[self._paths[k]] = dict(zip(columns, row, strict=True))
        return found
