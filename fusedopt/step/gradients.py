"""Between an optimizer's arguments and its plan: what is taken, what is refused, what is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..arrays.checks import GradientChecks
from ..arrays.foreign import host_array
from ..arrays.rows import Rows, UniqueRows, as_rows, cut_by_slices, values_of
from ..arrays.stored import SLOW, LeafState
from ..arrays.trees import Tree
from ..plan.interface import Plan
from ..plan.spec import PlanSpec
from ..rules.base import Rule
from .gradient_transforms import GradientTransforms
from .lazy_rows import LazyRows


class GradientReader:
    """Reader of gradients, which runs an optimizer's plan or finds why it refuses them.

    gradient_checks: of the tree's leaves. unique_rows: checks `Rows`, see `arrays.rows`. lazy_rows:
    of rows that miss steps, where these are to be replayed. transforms: of the gradients of a step,
    before anything else.
    """

    def __init__(
        self,
        tree: Tree,
        gradient_checks: GradientChecks,
        unique_rows: Callable[..., UniqueRows],
        spec: PlanSpec,
        plan: Plan,
        lazy_rows: LazyRows | None = None,
        transforms: GradientTransforms | None = None,
    ) -> None:
        self._unique_rows = unique_rows
        self._tree, self._checks, self._spec, self._plan = tree, gradient_checks, spec, plan
        self._rules = [spec.groups[k].rule for k in spec.group_of]
        self._lazy_rows, self._transforms = lazy_rows, transforms

    def step(self, grads: Any, hessian: Any) -> int:
        """One step; its number."""
        if self._lazy_rows is not None or self._transforms is not None:  # which want the leaves
            return self.explained(grads, hessian)
        number = self._plan.step(grads, hessian)
        return self.explained(grads, hessian) if number is None else number

    def explained(self, grads: Any, hessian: Any) -> int:
        """Refuse what the plan did not take, with the reason, or lay it out anew."""
        self._checks.check_unmoved()
        self._spec.check_unmoved()
        fitted = self.fitted(grads, "grads")
        estimates = None if hessian is None else self.estimates(hessian, fitted)
        if not self._spec.zero_grads:
            return self.flat(fitted, estimates)
        return self._zeroing(fitted, estimates, self.flatten(grads, "grads"))

    def estimates(self, hessian: Any, grads: Sequence[Any]) -> list[np.ndarray | UniqueRows | None]:
        """The leaves of a tree of Hessian estimates, checked; grads: those that go with them, which
        are of the same rows."""
        estimates = self.fitted(hessian, "hessian")
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
        if g is None or not (isinstance(g, UniqueRows) or isinstance(e, UniqueRows)):
            return e
        if type(g) is not type(e) or not np.array_equal(g.rows, e.rows):
            raise ValueError(
                f"{self._labels('hessian')[k]}: expected Rows of the gradient's indices, or both as"
                " whole arrays"
            )
        if not isinstance(e.values, np.ndarray):  # a device has the places of each
            return e
        values = np.zeros(g.values.shape, e.values.dtype)
        values[g.places] = e.gathered
        return UniqueRows(g.rows, g.places, values)

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
        if self._spec.zero_grads:
            return self._zeroing(fitted, None, given)
        return self.flat(fitted, None)

    def flat(self, grads: Sequence[Any], hessian: Sequence[Any] | None) -> int:
        """A step with leaves that passed all checks."""
        if self._lazy_rows is not None:
            self._lazy_rows.check(grads)
        before = int(self._spec.counters[0])
        taken = grads
        if self._transforms is not None:
            callers = [leaf_state.caller for leaf_state in self._spec.leaves]
            taken = self._transforms(self._labels("grads"), callers, grads)
        number = self._plan.step_leaves(taken, hessian)
        if number is None:
            raise RuntimeError(
                "the core refused arrays that passed the checks; if another thread has changed them"
                " meanwhile, keep it from that, otherwise please report this"
            )
        if self._lazy_rows is not None and number > before:
            self._lazy_rows.record(grads, hessian)
        if self._spec.zero_grads and number > before:
            for given, own in zip(grads, taken, strict=True):
                if own is not given:  # the step has zeroed a new array
                    given[...] = 0
        return int(number)

    def _zeroing(self, fitted: Any, estimates: Any, given: Sequence[Any]) -> int:
        self.check_exclusive(given, estimates)
        copied = self._checks.copied(given, fitted)
        if copied and not self._spec.wait:
            raise ValueError(
                f"{self._labels('grads')[copied[0]]}: zero_grads with wait=False needs it in the"
                " memory order of its parameter, or a step that is not taken would zero it; pass a"
                " dense copy in that order"
            )
        before = int(self._spec.counters[0])
        number = self.flat(fitted, estimates)
        for k in copied if number > before else ():
            values_of(given[k])[...] = 0  # the step has zeroed the copy
        return number

    def check_exclusive(self, given: Sequence[Any], estimates: Sequence[Any] | None) -> None:
        """Raise ValueError where gradients cannot be zeroed without harm."""
        inputs = list(zip(self._labels("grads"), map(values_of, given), strict=True))
        if estimates is not None:
            inputs += zip(self._labels("hessian"), map(values_of, estimates), strict=True)
        self._checks.check_exclusive(inputs, len(given))

    def flatten(self, tree: Any, what: str) -> list[Any]:
        """The leaves of a tree that is like the parameters' own."""
        return list(map(host_array, self._tree.flatten(self._checks.opened(what, tree), what)))

    def fitted(self, tree: Any, what: str) -> list[np.ndarray | UniqueRows | None]:
        """The leaves of a tree of gradients or estimates as the plan takes them; raises where one
        does not fit."""
        values = self.flatten(tree, what)
        return [
            self.fit_leaf(k, label, value)
            for k, (label, value) in enumerate(zip(self._labels(what), values, strict=True))
        ]

    def fit_leaf(self, k: int, label: str, value: Any) -> Any:
        """The k-th leaf's gradient as the plan takes it; raises where it does not fit."""
        rows = as_rows(label, value)
        if rows is None:
            return self._checks.gradient(k, label, value)
        leaf_state, rule = self._spec.leaves[k], self._rules[k]
        taken = self._unique_rows(label, rows, leaf_state.caller)
        refusal = refuses_rows(rule, leaf_state)
        if refusal:
            raise ValueError(f"{label}: {refusal}; give the whole gradient")
        self._checks.check_apart(label, taken.values)
        return taken

    def _labels(self, what: str) -> list[str]:
        """Return the names of the leaves of another tree, for messages."""
        return [what + leaf.label.removeprefix("params") for leaf in self._tree.leaves]


def refuses_rows(rule: Rule, leaf_state: LeafState) -> str | None:
    """Return why a leaf takes no gradient of some rows, or None."""
    p = leaf_state.caller
    if rule.program.phases > 1 and (rule.program.axis != 0 or not rule.program.slices(p.shape)):
        what = "measures parameters" if rule.program.measures else "updates matrices"
        return f"{type(rule).__name__} {what} as a whole, not some of their rows"
    if SLOW in leaf_state.states:
        return "parameters return to their slow weights as a whole, not some of their rows"
    if not p.flags.c_contiguous:
        return "rows of a parameter that is not in C order are not dense"
    stored = {"the parameter": leaf_state.parameter, **leaf_state.states}
    return cut_by_slices(p.shape, {name: each.format for name, each in stored.items()})
