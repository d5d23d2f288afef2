"""Between an optimizer's arguments and its plan: what is taken, what is refused, what is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..arrays.checks import Fit
from ..arrays.foreign import host_array
from ..arrays.rows import Rows, Touched, as_rows, refuses_rows, touched, values_of
from ..arrays.trees import Tree
from ..plan.interface import Layout, Plan
from ..system.interrupts import deferred
from .clipping import Guard
from .lazy_rows import Ledger


class StepInfo(NamedTuple):
    """What a step did.

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


class Stepper:
    """Runs an optimizer's plan, and finds the reason where it takes something only after a look.

    fit: of the tree's leaves. ledger: of rows that miss steps, where these are to be replayed.
    """

    def __init__(
        self, tree: Tree, fit: Fit, layout: Layout, plan: Plan, ledger: Ledger | None = None
    ) -> None:
        self._tree, self._fit, self._layout, self._plan = tree, fit, layout, plan
        self._rules = [layout.groups[k].rule for k in layout.group_of]
        self._ledger = ledger

    def step(self, grads: Any, hessian: Any) -> int:
        """One step; its number."""
        if self._ledger is not None:  # which wants to see the leaves
            return self.explained(grads, hessian)
        number = self._plan.step(grads, hessian, False)
        return self.explained(grads, hessian) if number is None else number

    def explained(self, grads: Any, hessian: Any) -> int:
        """What the plan did not take: refused with the reason, or laid out so that it will be."""
        self._fit.check_unmoved()
        fitted = self._fitted(grads, "grads")
        estimates = None if hessian is None else self.estimates(hessian, fitted)
        if not self._layout.zero_grads:
            return self.flat(fitted, estimates)
        return self._zeroing(fitted, estimates, self.flatten(grads, "grads"))

    def estimates(self, hessian: Any, grads: Sequence[Any]) -> list[np.ndarray | Touched | None]:
        """The leaves of a tree of Hessian estimates, checked; grads: those that go with them, which
        are of the same rows."""
        estimates = self._fitted(hessian, "hessian")
        for k, (leaf, rule, e) in enumerate(
            zip(self._tree.leaves, self._rules, estimates, strict=True)
        ):
            if e is None:
                continue
            if not rule.takes_hessian:
                raise ValueError(
                    f"hessian: {leaf.label} is updated by {type(rule).__name__}, which takes none;"
                    " give None there"
                )
            estimates[k] = self._same_rows(k, e, grads)
        return estimates

    def _same_rows(self, k: int, e: Any, grads: Sequence[Any]) -> Any:
        """A leaf's estimate, with its rows where those of the gradient are."""
        g = grads[k]
        if g is None or not (isinstance(g, Touched) or isinstance(e, Touched)):
            return e
        if type(g) is not type(e) or not np.array_equal(g.rows, e.rows):
            raise ValueError(
                f"{self._labels('hessian')[k]}: expected Rows of the gradient's indices, or both as"
                " whole arrays"
            )
        values = np.zeros(g.values.shape, e.values.dtype)
        values[g.places] = e.gathered
        return Touched(g.rows, g.places, values)

    def summed(self, sums: Sequence[Any], hessian: Any) -> int:
        """A step with accumulated gradients; their number."""
        fitted = [
            self.fit_leaf(k, "grads", g) if isinstance(g, Rows) else g for k, g in enumerate(sums)
        ]
        return self.flat(fitted, None if hessian is None else self.estimates(hessian, fitted))

    def part(self, numbers: Sequence[int], grads: Sequence[Any]) -> int:
        """Take a step with the gradients of some leaves, by their numbers; return its number."""
        labels = self._labels("grads")
        given: list[Any] = [None] * len(labels)
        fitted = list(given)
        for k, g in zip(numbers, grads, strict=True):
            given[k] = host_array(g)
            fitted[k] = self.fit_leaf(k, labels[k], given[k])
        if self._layout.zero_grads:
            return self._zeroing(fitted, None, given)
        return self.flat(fitted, None)

    def flat(self, grads: Sequence[Any], hessian: Sequence[Any] | None) -> int:
        """A step with leaves that passed all checks."""
        if self._ledger is not None:
            self._ledger.check(grads)
        before = int(self._layout.counters[0])
        number = self._plan.step(grads, hessian, True)
        if number is None:
            raise RuntimeError(
                "the core refused arrays that passed the checks; if a parameter was resized, call"
                " rebind(params), otherwise please report this"
            )
        if self._ledger is not None and number > before:
            self._ledger.record(grads, hessian)
        return int(number)

    def _zeroing(self, fitted: Any, estimates: Any, given: Sequence[Any]) -> int:
        self.check_exclusive(given, estimates)
        copied = self._fit.copied(given, fitted)
        if copied and not self._layout.wait:
            raise ValueError(
                f"{self._labels('grads')[copied[0]]}: zero_grads with wait=False needs it in the"
                " memory order of its parameter, or a step that is not taken would zero it; pass a"
                " dense copy in that order"
            )
        before = int(self._layout.counters[0])
        with deferred():
            number = self.flat(fitted, estimates)
            for k in copied if number > before else ():
                values_of(given[k])[...] = 0  # the step has zeroed the copy
        return number

    def check_exclusive(self, given: Sequence[Any], estimates: Sequence[Any] | None) -> None:
        """ValueError where gradients cannot be zeroed without harm."""
        inputs = list(zip(self._labels("grads"), map(values_of, given), strict=True))
        if estimates is not None:
            inputs += zip(self._labels("hessian"), map(values_of, estimates), strict=True)
        self._fit.check_exclusive(inputs, len(given))

    def flatten(self, tree: Any, what: str) -> list[Any]:
        """The leaves of a tree that is like the parameters' own."""
        return list(map(host_array, self._tree.flatten(self._fit.opened(what, tree), what)))

    def _fitted(self, tree: Any, what: str) -> list[np.ndarray | Touched | None]:
        values = self.flatten(tree, what)
        return [
            self.fit_leaf(k, label, value)
            for k, (label, value) in enumerate(zip(self._labels(what), values, strict=True))
        ]

    def fit_leaf(self, k: int, label: str, value: Any) -> Any:
        """The k-th leaf's gradient as the plan takes it; raises where it does not fit."""
        rows = as_rows(label, value)
        if rows is None:
            return self._fit.gradient(k, label, value)
        memory, rule = self._layout.leaves[k], self._rules[k]
        taken = touched(label, rows, memory.caller)
        refusal = refuses_rows(rule, memory)
        if refusal:
            raise ValueError(f"{label}: {refusal}; give the whole gradient")
        self._fit.check_apart(label, taken.values)
        return taken

    def _labels(self, what: str) -> list[str]:
        """How messages call the leaves of another tree."""
        return [what + leaf.label.removeprefix("params") for leaf in self._tree.leaves]


class Report:
    """Makes the `StepInfo` of a step from what the plan and the guard found."""

    def __init__(self, tree: Tree, layout: Layout, guard: Guard) -> None:
        self._paths = [leaf.path for leaf in tree.leaves]
        self._layout, self._guard = layout, guard
        programs = [layout.around.program(group.rule) for group in layout.groups]
        # By their sums' names the leaves that have these.
        self._alike: dict[tuple[str, ...], list[int]] = {}
        for k, group in enumerate(layout.group_of):
            self._alike.setdefault(programs[group].sums, []).append(k)

    def info(self, number: int, lr: float | dict[str, float]) -> StepInfo:
        """Of the step that was taken last."""
        guard, stats = self._guard, None
        if self._layout.around.stats and not guard.skipped:
            stats = self._stats()
            if self._layout.decide is None:
                guard.take_norm()
        return StepInfo(
            number, lr, guard.grad_norm, guard.clip_scale, guard.skipped, guard.bad_leaves, stats
        )

    def _stats(self) -> dict[str, dict[str, float]]:
        results = self._layout.results
        found: dict[str, dict[str, float]] = {}
        for names, leaves in self._alike.items():
            rows = results[leaves]
            sums = dict(zip(names, rows[:, 3:].T, strict=False))
            if "gradient" in sums:
                results[leaves, 0] = rows[:, 0] = sums.pop("gradient")
            with np.errstate(all="ignore"):
                norms = np.sqrt(rows[:, 0]) / rows[:, 1] * self._guard.factor
                update, weight = np.sqrt(sums.pop("update")), np.sqrt(sums.pop("weight"))
                ratios = np.where(update == 0, 0.0, update / weight)
                columns = {"grad_norm": norms, "update_ratio": ratios}
                columns |= {n: total / np.maximum(rows[:, 2], 1.0) for n, total in sums.items()}
            values = zip(*(column.tolist() for column in columns.values()), strict=True)
            for k, took_part, row in zip(leaves, rows[:, 1].tolist(), values, strict=True):
                if took_part:
                    found[self._paths[k]] = dict(zip(columns, row, strict=True))
        return found
