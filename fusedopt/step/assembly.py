"""What an optimizer is made of: leaves, rules, states and counters, and the plan of its steps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays.checks import memory_order
from ..arrays.foreign import Watch
from ..arrays.formats import RandomKey, compute_dtype
from ..arrays.storage import synchronize
from ..arrays.trees import Leaf, Tree
from ..backends import get_backend
from ..plan.options import Options, check_grad_scale, check_seed
from ..plan.spec import PlanSpec, results_for
from ..rules import Rule
from ..rules.groups import RuleChoice, assign, check_successor
from ..system.interrupts import deferred
from ..verification.plan import VerifiedPlan
from .accumulate import ACCUMULATED, Accumulator
from .checkpoint import HALFWAY, Snapshot
from .clipping import GradientClipper
from .gradients import GradientReader
from .info import StepInfo, StepInfoBuilder
from .lazy_rows import LazyRows
from .rates import Rates

if TYPE_CHECKING:
    from ..arrays.state_file import StateFile

Arrays = tuple[list[np.ndarray], list[np.ndarray | None]]


class Assembly:
    """The parts of an optimizer, put together from its parameters, rules and options.

    first_tiles: where the leaves begin in those that they are parts of, for random bits; None:
    they are whole. Raises as `Optimizer` does.

    `narrowest` is the narrowest type that gradients are computed in. `step_alone` is the plan's
    single call for a whole step, or None where a step needs more than that. `exchanged` names the
    context in which the parameters are something else. `parted` are the leaves that have had their
    part of the step under way.
    """

    def __init__(
        self,
        params: Any,
        rule: RuleChoice,
        options: Options,
        state_path: str | os.PathLike[str] | None,
        first_tiles: Sequence[int] | None,
    ) -> None:
        self.options = options = options.checked()
        self.seed, self._first_tiles = check_seed(options.seed), first_tiles
        self.storage = options.storage()
        self.tree = Tree(params)
        leaves = self.tree.leaves
        self.backend = get_backend(options.backend, [leaf.value for leaf in leaves])
        self.device = self.backend.device
        self.device.check_options(options, state_path)
        self.groups, self.group_of = assign(leaves, rule)
        self.rates = Rates(self.groups)
        clip = options.clip_by_group([group.label for group in self.groups])
        self.counters = np.zeros(1 + len(leaves), np.int64)
        parameters, copies = self.checked_arrays(self.tree)
        labels, dtypes = [leaf.label for leaf in leaves], [p.dtype for p in parameters]
        self.storage.check(labels, dtypes, self.rules)
        wide = any(dtype == np.float64 for dtype in dtypes)
        self.narrowest = min(map(compute_dtype, dtypes), key=lambda d: d.itemsize)
        self.decides = options.decides(wide)
        self.extras = options.extras(wide)
        programs = [self.extras.program(group.rule) for group in self.groups]
        self.results = results_for(programs, len(leaves))
        self.clipper = GradientClipper(
            self.paths,
            [group.label for group in self.groups],
            self.group_of,
            self.results,
            self.rates.factors,
            clip,
            options.skip_nonfinite,
        )
        self.clipper.begin(1.0)
        self.parted: list[int] = []
        self.exchanged = ""
        self.sums: Accumulator | None = None
        self.lazy_rows: LazyRows | None = None
        with _state_file(state_path) as self.state_file:
            block = (self.state_file.reserve,) if self.state_file else ()
            self.leaf_states = self.device.allocate(
                self.storage, self.rules, parameters, copies, self.extras.states, *block
            )
            self.prepare(parameters)
            if self.state_file:
                saved = zip(self.paths, self.leaf_states, strict=True)
                self.state_file.note({path: held.saved for path, held in saved})
                self.state_file.release()
        self.plan.give()

    @property
    def paths(self) -> list[str]:
        """The dotted path of each leaf."""
        return [leaf.path for leaf in self.tree.leaves]

    @property
    def rules(self) -> list[Any]:
        """The rule of each leaf."""
        return [self.groups[k].rule for k in self.group_of]

    @property
    def snapshot(self) -> Snapshot:
        """The state that travels."""
        return Snapshot(
            self.tree,
            self.groups,
            self.group_of,
            self.parameters,
            self.leaf_states,
            self.counters,
            self.seed,
            self.rates,
        )

    def keys(self) -> list[list[RandomKey]]:
        """Return, for each leaf, the keys of its parameter's and states' random bits."""
        return self.storage.keys(self.seed, self.paths, self.leaf_states, self._first_tiles)

    # ---------------------------------------------------------------- the plan

    def prepare(self, parameters: Sequence[np.ndarray]) -> None:
        """Make the plan anew, for these arrays and the states and rules that there are."""
        self.parameters = parameters
        self.watch = Watch(self.tree.leaves) or None
        gradient_checks = self.device.GradientChecks(
            [leaf.label for leaf in self.tree.leaves],
            parameters,
            [held.written for held in self.leaf_states],
            [len(held.copies) for held in self.leaf_states],
        )
        spec = PlanSpec(
            tree=self.tree.spec,
            leaves=self.leaf_states,
            groups=self.groups,
            group_of=self.group_of,
            rates=self.rates.values,
            factors=self.rates.factors,
            counters=self.counters,
            keys=self.keys(),
            results=self.results,
            extras=self.extras,
            decide=self.clipper if self.decides else None,
            zero_grads=self.options.zero_grads,
            threads=self.options.threads,
            wait=self.options.wait,
            state_file=self.state_file,
        )
        plan: Any
        if self.options.verify:
            plan = VerifiedPlan(self.backend, spec, self.tree.leaves)
        else:
            plan = self.backend.plan(spec)
        plan.take()  # until all is ready; the old one stays taken, should a thread still have it
        self.plan = plan
        if self.lazy_rows is not None:
            self.lazy_rows.moved(spec, plan)
        elif self.options.exact:
            self.lazy_rows = LazyRows(self.tree, spec, plan)
        self.reader = GradientReader(
            self.tree, gradient_checks, self.device.unique_rows, spec, plan, self.lazy_rows
        )
        self.info_builder = StepInfoBuilder(self.tree, spec, self.clipper)
        self.settle_rates()

    def settle_rates(self) -> None:
        """Take what a step needs to know of the rules' learning rates."""
        self.rates.settle(self.groups)
        self.settle_simple()

    def settle_simple(self) -> None:
        """Find the plan's own whole step, which guards itself."""
        alone = None if self.options.verify else getattr(self.plan, "step_alone", None)
        one_phase = all(group.rule.program.phases == 1 for group in self.groups)
        asked = self.decides or self.options.stats or self.options.exact or self.state_file
        simple = one_phase and not self.rates.scheduled and not asked
        simple = simple and not self.accumulated and not self.parted
        simple = simple and self.counters[0] != HALFWAY
        self.step_alone: Any = alone if simple else None

    def adopt(self, rules: Sequence[Rule]) -> None:
        """Put rules in the place of the groups' own, all of them or none."""
        with self.exclusively("hyperparameters", settled=False):
            self.check_caught_up("hyperparameters")
            old = self.groups
            kept = [check_successor(group, rule) for group, rule in zip(old, rules, strict=True)]
            self.groups = [replace(g, rule=rule) for g, rule in zip(old, rules, strict=True)]
            try:
                # For 1000 tensors a new plan takes 20 ms, other rules in the old one 0.1.
                if all(kept) or (self.lazy_rows is None and self.plan.adopt(rules)):
                    self.settle_rates()
                else:
                    self.plan.synchronize()
                    self.prepare(self.checked_arrays(self.tree)[0])
            except BaseException:
                self.groups = old
                raise

    def rebind(self, params: Any) -> None:
        """Take new arrays in place of the old ones: see `Optimizer.rebind`."""
        tree = Tree(params)
        self.tree.flatten(params, "params")
        for leaf, old, rule in zip(tree.leaves, self.parameters, self.rules, strict=True):
            p = self.device.check_parameter(leaf.label, leaf.value, rule)
            expected, got = ((a.shape, a.dtype.name, memory_order(a)) for a in (old, p))
            if got != expected:
                raise ValueError(
                    f"{leaf.label}: expected (shape, dtype, memory order) {expected}, got {got};"
                    " make a new optimizer for other arrays"
                )
        parameters = self.checked_arrays(tree)[0]
        self.tree = tree
        for k, (old, p) in enumerate(zip(self.parameters, parameters, strict=True)):
            moved = self.leaf_states[k] = self.leaf_states[k].rebound(p)
            if moved.extra is not None and not self.device.same(old, p):
                synchronize(moved)
        if self.sums is not None:
            self.sums.watch(parameters)
        self.prepare(parameters)

    @contextmanager
    def loading(self, what: str) -> Iterator[None]:
        """Keep everything else out while another state is taken, be it in part (`HALFWAY`)."""
        with self.exclusively(what):
            try:
                yield
            finally:
                self.settle_simple()

    def go_on(self, seed: int) -> None:
        """Begin anew after another state was loaded: what rows missed and sums are gone."""
        self.seed, self.lazy_rows, self.parted = seed, None, []
        if self.sums is not None:
            self.sums.clear()
        self.prepare(self.parameters)

    # ---------------------------------------------------------------- steps

    def step(self, grads: Any, grad_scale: float, hessian: Any) -> StepInfo:
        """Take a step of any kind: see `Optimizer.step`."""
        with self._one_step("step", grad_scale):
            return self._told(self._stepped(grads, hessian))

    def step_part(
        self, paths: Sequence[str], grads: Sequence[Any], grad_scale: float, last: bool
    ) -> StepInfo:
        """Take a step of some leaves: see `Optimizer.step_part`."""
        options = self.options
        if options.clip_norm is not None or options.skip_nonfinite or options.exact:
            raise ValueError(
                "step_part: clip_norm, skip_nonfinite and exact need all gradients of a step at"
                " once; call step() with them"
            )
        with self._one_step("step_part", grad_scale):
            if self.accumulated:
                raise RuntimeError("step_part: accumulated gradients are waiting; call step()")
            leaves = self._numbers(paths)
            number = self.reader.part(leaves, grads)
            if last:
                self.parted = []
            else:
                self.counters[0] -= 1
                self.parted += leaves
            self.settle_simple()
            return self._told(number)

    @contextmanager
    def _one_step(self, what: str, grad_scale: float) -> Iterator[None]:
        scale = check_grad_scale(grad_scale, self.narrowest)
        with self.exclusively(what, settled=False):
            self.rates.begin(int(self.counters[0]) + 1)
            self.clipper.begin(scale)
            try:
                yield
            finally:
                self.rates.end()

    def _told(self, number: int) -> StepInfo:
        return self.info_builder.info(number, self.rates.used())

    def _stepped(self, grads: Any, hessian: Any) -> int:
        if self.parted:
            raise RuntimeError("step: a step in parts is under way; end it with last=True")
        if grads is not ACCUMULATED:
            if self.accumulated:
                raise RuntimeError(
                    "step(grads): accumulated gradients are waiting; call step() without gradients"
                )
            return self.reader.step(grads, hessian)
        if self.sums is None or self.sums.empty:
            raise RuntimeError("step(): nothing was accumulated; call accumulate(grads) first")
        try:
            number = self.reader.summed(self.sums.sums, hessian)
        except FloatingPointError:
            self._clear_sums()
            raise
        self._clear_sums()
        return number

    def _numbers(self, paths: Sequence[str]) -> list[int]:
        """The leaves of paths, which have had no part of this step yet."""
        known = {path: k for k, path in enumerate(self.paths)}
        for path in paths:
            if path not in known:
                raise ValueError(f"step_part: expected one of the paths {self.paths}, got {path!r}")
        numbers = [known[path] for path in paths]
        if len({*numbers, *self.parted}) < len(numbers) + len(self.parted):
            raise ValueError(f"step_part: a path comes twice in one step: {list(paths)}")
        return numbers

    @property
    def accumulated(self) -> bool:
        """Whether accumulated gradients wait for their step."""
        return self.sums is not None and not self.sums.empty

    def accumulate(self, grads: Any) -> int:
        """Add gradients to the sums, and return the number of micro-batches there."""
        with self.exclusively("accumulate", settled=False):
            if self.sums is None:
                self.sums = Accumulator(
                    self.backend,
                    self.tree,
                    self.parameters,
                    self.options.zero_grads,
                    self.options.threads,
                )
            count = self.sums.add(grads)
            self.settle_simple()
        return count

    def _clear_sums(self) -> None:
        if self.sums is not None:
            self.sums.clear()
        self.settle_simple()

    # ---------------------------------------------------------------- what must hold

    @contextmanager
    def exclusively(self, what: str, *, settled: bool = True) -> Iterator[None]:
        """Keep interrupts and other threads out; the parameters are themselves.

        settled: all steps are done.
        """
        self.check_at_home(what)
        with deferred():
            self.plan.take()
            try:
                if settled:
                    self.plan.synchronize()
                yield
            finally:
                self.plan.give()

    def check_at_home(self, what: str) -> None:
        """RuntimeError unless the parameters are themselves and the states this process's."""
        if self.state_file:
            self.state_file.check_owner()
        if self.exchanged:
            raise RuntimeError(f"{what} inside of {self.exchanged}(): leave the context first")
        if self.counters[0] == HALFWAY and not what.startswith("load"):
            raise RuntimeError(
                f"{what}: a file could not be read to its end, and the parameters and states are"
                " only in part those that were in it; load a whole file first"
            )

    def check_settled(self, what: str) -> None:
        """RuntimeError unless there is nothing but parameters, states and counters."""
        if self.accumulated:
            raise RuntimeError(f"{what}: accumulated gradients would be lost; call step() first")
        if self.parted:
            raise RuntimeError(f"{what}: a step in parts is under way; end it with last=True")
        self.check_caught_up(what)

    def check_caught_up(self, what: str) -> None:
        """RuntimeError where rows have missed steps."""
        behind = self.lazy_rows.behind if self.lazy_rows is not None else ()
        if behind:
            raise RuntimeError(
                f"{what}: rows of {', '.join(behind)} have missed steps; call catch_up() first"
            )

    def checked_arrays(self, tree: Tree) -> Arrays:
        """Return a tree's parameters, and the copies of them, checked."""
        return checked_arrays(self.device, tree, self.rules, self.options.copy_out)


def _state_file(
    path: str | os.PathLike[str] | None,
) -> AbstractContextManager[StateFile | None]:
    if path is None:
        return nullcontext()
    from ..arrays.state_file import state_file_in  # 5 ms, for this alone

    return state_file_in(path)


def checked_arrays(device: Any, tree: Tree, rules: Sequence[Rule], copy_out: Any) -> Arrays:
    """The parameters, and of each the array that gets a copy of it, or None.

    device: the backend's. Raises TypeError or ValueError where one does not fit, or where two share
    memory.
    """
    parameters = [
        device.check_parameter(leaf.label, leaf.value, rule)
        for leaf, rule in zip(tree.leaves, rules, strict=True)
    ]
    copies = _copies(device, tree, parameters, copy_out)
    named = [(leaf.label, p) for leaf, p in zip(tree.leaves, parameters, strict=True)]
    named += [
        (_label(leaf), copied)
        for leaf, copied in zip(tree.leaves, copies, strict=True)
        if copied is not None
    ]
    device.check_apart([label for label, _ in named], [a for _, a in named])
    return parameters, copies


def _copies(
    device: Any, tree: Tree, parameters: Sequence[np.ndarray], copy_out: Any
) -> list[np.ndarray | None]:
    if copy_out is None:
        return [None] * len(parameters)
    copies: list[np.ndarray | None] = []
    given = tree.flatten(copy_out, "copy_out")
    for leaf, p, array in zip(tree.leaves, parameters, given, strict=True):
        if array is None:
            copies.append(None)
            continue
        copied = device.check_target(_label(leaf), array)
        if copied.shape != p.shape or memory_order(copied) != memory_order(p):
            raise ValueError(
                f"{_label(leaf)}: expected the shape {p.shape} and memory order {memory_order(p)}"
                f" of {leaf.label}, got {copied.shape} and {memory_order(copied)}"
            )
        copies.append(copied)
    if all(copied is None for copied in copies):
        raise ValueError("copy_out: has an array for no leaf; leave it out")
    return copies


def _label(leaf: Leaf) -> str:
    return "copy_out" + leaf.label.removeprefix("params")
