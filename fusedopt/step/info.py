"""The information that a step returns."""

from __future__ import annotations

from typing import NamedTuple

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
    stats : dict or None
        With `stats=True`, by path of each leaf that took part, a dict of "grad_norm",
        "update_ratio" (the norm of the parameter's change over the parameter's own) and what the
        rule adds, such as Sophia's "win_rate", the share of elements that were not clipped. Of
        `Rows` only the rows that were touched count.

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
    stats: dict[str, dict[str, float]] | None = None


class StepInfoBuilder:
    """Builder of the `StepInfo` of a step from the results of the plan and the clipping."""

    def __init__(self, tree: Tree, spec: PlanSpec, clipper: GradientClipper) -> None:
        self._paths = [leaf.path for leaf in tree.leaves]
        self._spec, self._clipper = spec, clipper
        programs = [spec.extras.program(group.rule) for group in spec.groups]
        # The leaves whose programs have the same sums, by the names of these.
        self.alike: dict[tuple[str, ...], list[int]] = {}
        for k, group in enumerate(spec.group_of):
            self.alike.setdefault(programs[group].told, []).append(k)

    def info(self, number: int, lr: float | dict[str, float]) -> StepInfo:
        """Return the information of the step that was taken last."""
        clipper, stats = self._clipper, None
        if self._spec.extras.stats and not clipper.skipped:
            stats = self._stats()
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

    def _stats(self) -> dict[str, dict[str, float]]:
        results = self._spec.results
        found: dict[str, dict[str, float]] = {}
        for names, leaves in self.alike.items():
            rows = results[leaves]
            sums = dict(zip(names, rows[:, 3:].T, strict=False))
            if "gradient" in sums:
                results[leaves, 0] = rows[:, 0] = sums.pop("gradient")
            with np.errstate(all="ignore"):
                norms = np.sqrt(rows[:, 0]) / rows[:, 1] * self._clipper.factor
                update, weight = np.sqrt(sums.pop("update")), np.sqrt(sums.pop("weight"))
                ratios = np.where(update == 0, 0.0, update / weight)
                columns = {"grad_norm": norms, "update_ratio": ratios}
                columns |= {n: total / np.maximum(rows[:, 2], 1.0) for n, total in sums.items()}
            values = zip(*(column.tolist() for column in columns.values()), strict=True)
            for k, took_part, row in zip(leaves, rows[:, 1].tolist(), values, strict=True):
                if took_part:
                    found[self._paths[k]] = dict(zip(columns, row, strict=True))
        return found
