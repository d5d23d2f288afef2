"""The information that a step returns."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..arrays.trees import Tree
from ..plan.spec import PlanSpec
from .clipping import GradientClipper


class StepInfo(NamedTuple):
    """The result of one step.

    step: its number, 1 for the first; of a skipped one that of the step before. lr: the learning
    rate that it used; with several rules a dict of them, by pattern (or by rule name where a
    callable chose). grad_norm: of the unscaled gradients, before any clipping; None where nothing
    asked for it (`clip_norm`, `skip_nonfinite`, `stats`). clip_scale: by what `clip_norm`
    multiplied them; where groups clip each on its own, these two are dicts; with `wait=False` their
    numbers are arrays of the device, see `Optimizer`. skipped: whether nothing was done, for a NaN
    or infinity in the gradients of `bad_leaves`, a tuple of paths. stats: with `stats=True`, by
    path of the leaves that took part, a dict of "grad_norm", "update_ratio" (the norm of the
    parameter's change over its own), and what the rule adds ("win_rate" of Sophia: the share of
    elements that were not clipped), of `Rows` those that were touched; else None.
    """

    step: int
    lr: float | dict[str, float]
    grad_norm: float | dict[str, float] | None = None
    clip_scale: float | dict[str, float] = 1.0
    skipped: bool = False
    bad_leaves: tuple[str, ...] = ()
    stats: dict[str, dict[str, float]] | None = None


class StepInfoBuilder:
    """Makes the `StepInfo` of a step from what the plan and the guard found."""

    def __init__(self, tree: Tree, spec: PlanSpec, clipper: GradientClipper) -> None:
        self._paths = [leaf.path for leaf in tree.leaves]
        self._spec, self._clipper = spec, clipper
        programs = [spec.extras.program(group.rule) for group in spec.groups]
        # By their sums' names the leaves that have these.
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
