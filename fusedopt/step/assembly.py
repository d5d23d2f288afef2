"""The parts of an optimizer: leaves, rules, states and counters, and the plan of its steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..arrays import host
from ..arrays.formats import RandomKey, compute_dtype
from ..arrays.order import memory_order
from ..arrays.storage import synchronize
from ..arrays.trees import Leaf, Tree
from ..arrays.watch import Watch
from ..backends import get_backend
from ..plan.extras import Extras
from ..plan.interface import Policy
from ..plan.options import Options, check_grad_scale, check_seed
from ..plan.spec import HALFWAY, PlanSpec, results_for
from ..rules.base import Rule, numbers_of
from ..rules.groups import Group, RuleChoice, assign, at_step, check_successor
from ..schedules import formula_of
from ..system.interrupts import directly, uninterrupted
from ..verification.plan import VerifiedPlan
from .accumulate import ACCUMULATED, Accumulator
from .checkpoint import Snapshot
from .clipping import GradientClipper
from .gradient_transforms import GradientTransforms, rows_in_place
from .gradients import GradientReader
from .info import StepInfo, StepInfoBuilder
from .lazy_rows import LazyRows
from .rates import Rates, StepRate

if TYPE_CHECKING:
    from ..arrays.state_file import StateFile

T = TypeVar("T")

Arrays = tuple[list[np.ndarray], list[np.ndarray | None]]


class Assembly:
    """The parts of an optimizer, put together from its parameters, rules and options.

    first_tiles: where the leaves begin in those that they are parts of, for random bits; None:
    they are whole. Raises as `Optimizer` does.

    `narrowest` is the narrowest type that gradients are computed in. `whole_step` is a single call
    for a whole step, of (grads, hessian, grad_scale, ask), which gives None where there is more to
    a step; None where there always is. `ask` finds the learning rates that only Python knows, or is
    None. `exchanged` names the context in which the parameters are something else. `parted` are the
    leaves that have had their part of the step under way.
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
        groups, self.group_of = assign(leaves, rule)
        self.rates = Rates(groups)
        clip = options.clip_by_group([group.label for group in self.groups])
        self.counters = np.zeros(1 + len(leaves), np.int64)
        parameters, copies = self.checked_arrays(self.tree)
        labels, dtypes = [leaf.label for leaf in leaves], [p.dtype for p in parameters]
        self._layouts = [(p.shape, p.dtype.name, memory_order(p)) for p in parameters]
        self.storage.check(labels, dtypes, [p.shape for p in parameters], self.rules)
        wide = any(dtype == np.float64 for dtype in dtypes)
        self.narrowest = min(map(compute_dtype, dtypes), key=lambda d: d.itemsize)
        self.decides = options.decides(wide)
        self.rates.be_around(options.extras(wide))
        programs = [self.extras.program(group.rule) for group in self.current]
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
        self._transforms = None
        if options.transforms:
            self._transforms = GradientTransforms(
                self.backend,
                options.clip_leaf,
                options.clip_adaptive,
                options.centralize,
                lambda: self.clipper.factor,
            )
        self.parted: list[int] = []
        self._shared_out = False
        self.exchanged = ""
        self.sums: Accumulator | None = None
        self.lazy_rows: LazyRows | None = None
        self._token = object()
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
        self.plan.give(self._token)

    @property
    def paths(self) -> list[str]:
        """The dotted path of each leaf."""
        return [leaf.path for leaf in self.tree.leaves]

    @property
    def groups(self) -> list[Group]:
        """The parameter groups with their rules as these were given."""
        return self.rates.groups

    @property
    def current(self) -> list[Group]:
        """The parameter groups with the values that schedules gave the step begun last."""
        return self.rates.current

    @property
    def extras(self) -> Extras:
        """The work that is fused round the rules, with the values of that step."""
        return self.rates.extras

    @property
    def rules(self) -> list[Any]:
        """The rule of each leaf, with the values of the step that was begun last."""
        return [self.current[k].rule for k in self.group_of]

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
        watched = self.tree.leaves
        if self.options.copy_out is not None:
            copies = self.tree.flatten(self.options.copy_out, "copy_out")
            pairs = zip(self.tree.leaves, copies, strict=True)
            watched = [*watched, *(Leaf(leaf.path, _label(leaf), a) for leaf, a in pairs)]
        self.watch = Watch(watched)
        gradient_checks = self.device.GradientChecks(
            [leaf.label for leaf in self.tree.leaves],
            parameters,
            [held.written for held in self.leaf_states],
            [len(held.copies) for held in self.leaf_states],
        )
        spec = PlanSpec(
            tree=self.tree.spec,
            leaves=self.leaf_states,
            groups=self.current,
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
            watch=self.watch,
        )
        plan: Any
        if self.options.verify:
            plan = VerifiedPlan(self.backend, spec, self.tree.leaves)
        else:
            plan = self.backend.plan(spec)
        # Taken until all is ready; the old one stays taken, should a thread still have it.
        plan.take(self._token)
        self.plan, self._spec = plan, spec
        if self.lazy_rows is not None:
            self.lazy_rows.moved(spec, plan)
        elif self.options.exact:
            self.lazy_rows = LazyRows(self.tree, spec, plan)
        self.reader = GradientReader(
            self.tree,
            gradient_checks,
            self.device.unique_rows,
            spec,
            plan,
            self.lazy_rows,
            self._transforms,
        )
        self.info_builder = StepInfoBuilder(self.tree, spec, self.clipper)
        self._one_phase = all(group.rule.program.phases == 1 for group in self.current)
        more = self.options.exact or self.state_file or not self._one_phase
        self._renumbers = hasattr(plan, "renumber") and not more
        self._settled: tuple[list[Any], list[Any]] | None = None  # what the plan has been told
        self.settle_rates()

    def settle_rates(self) -> None:
        """Take what a step needs to know of the rules' learning rates and schedules."""
        self.rates.settle()
        numbers = [
            {name: formula_of(getattr(group.rule, name)) for name in group.rule.scheduled}
            for group in self.groups
        ]
        self._scheduled = any(numbers) or self.rates.extras_given.scheduled
        formulas = [formula_of(group.rule.lr) for group in self.groups]
        known = all(
            formula is not None or not callable(group.rule.lr)
            for formula, group in zip(formulas, self.groups, strict=True)
        )
        self.ask = None if known else self.rates.begin
        self._whole: Any = self._whole_step(formulas, numbers)
        self.settle_simple()

    def settle_simple(self) -> None:
        """Take a whole step in one call where nothing is under way."""
        halfway = self.accumulated or self.parted or self.counters[0] == HALFWAY
        self.whole_step = None if halfway else self._whole

    def share_out(self) -> None:
        """Leave norms and sums, which are of all ranks, to Python."""
        self._shared_out = True
        self.settle_rates()

    def _whole_step(self, formulas: list[Any], numbers: list[dict[str, Any]]) -> Any:
        options, plan = self.options, self.plan
        if options.slow_weights and options.slow_weights.reset:
            return None
        if self._transforms and not all(map(rows_in_place, self.leaf_states)):
            return None
        if options.exact or options.verify or self.state_file or self._shared_out:
            return None
        if not self._one_phase and not self._only_measures(any(numbers)):
            return None
        if hasattr(plan, "settle"):
            if self._settled != (formulas, numbers):
                plan.settle(self._policy(formulas, numbers))
                self._settled = formulas, numbers
            return plan.whole_step
        asked = self.decides or options.stats or options.transforms
        simple = not (asked or self.rates.scheduled or self._scheduled)
        return self._simple_step if simple and hasattr(plan, "step_alone") else None

    def _only_measures(self, scheduled: bool) -> bool:
        """Whether all that Python does within a step comes before anything is written: it makes
        numbers of sums that were measured.

        scheduled: hyperparameters are; the core cannot renew those of rules whose sums are pooled.
        """
        rules = [group.rule for group in self.current]
        if self._transforms or (scheduled and any(rule.pooled for rule in rules)):
            return False
        return all(rule.program.phases == 1 or rule.program.measures for rule in rules)

    def _policy(self, formulas: list[Any], numbers: list[dict[str, Any]]) -> Policy:
        options = self.options
        return Policy(
            info=StepInfo,
            labels=[group.label for group in self.groups],
            paths=self.paths,
            schedules=formulas,
            limits=self.clipper.limits,
            by_group=self.clipper.by_group,
            measures=self.decides,
            clips=options.clip_norm is not None,
            skips=options.skip_nonfinite,
            narrow=self.narrowest == np.float32,
            refusal=self.clipper.refusal,
            stats=self.info_builder.stats if options.stats else None,
            gradient_sums=self.info_builder.gradient_sums if options.stats else [],
            rates=self.rates,
            numbers=[numbers_of(type(group.rule)) for group in self.groups],
            scheduled=numbers,
            moving=self.rates.extras_given.scheduled,
            transforms=self._transforms.numbers if self._transforms else None,
        )

    @property
    def _values(self) -> tuple[list[Group], Extras]:
        """The groups and what is beside them, with the values of the next step."""
        return at_step(self.groups, self._upcoming), self.rates.extras_given.at(self._upcoming)

    def _simple_step(self, grads: Any, hessian: Any, grad_scale: Any, ask: Any) -> StepInfo | None:
        """Take a step that a plan makes by itself but does not tell of."""
        number = None if grad_scale != 1.0 else self.plan.step_alone(grads, hessian)
        return None if number is None else StepInfo(number, self.rates.used())

    def take_rules(self, rules: Sequence[Rule], *, settled: bool = True) -> None:
        """Take other rules for the groups."""
        adopt = partial(self.adopt, rules)
        self.whole("hyperparameters", adopt, settled=settled, moved=True)

    def adopt(self, rules: Sequence[Rule]) -> None:
        """Put rules in the place of the groups' own, all of them or none."""
        self.check_caught_up("hyperparameters")
        rates = self.rates
        old, before = rates.groups, rates.current
        kept = [check_successor(group, rule) for group, rule in zip(old, rules, strict=True)]
        rates.groups = [g._replace(rule=rule) for g, rule in zip(old, rules, strict=True)]
        try:
            current = at_step(self.groups, self._upcoming)
            if all(kept):  # plans take learning rates from elsewhere
                rates.current = current
            else:
                self._use(current, self.extras)
            if not all(map(_same_rate, old, self.groups)):
                self.settle_rates()
        except BaseException:
            rates.groups, rates.current = old, before
            raise

    def sync(self) -> None:
        """Take the masters anew from the parameters: see `Optimizer.sync`."""
        self.check_caught_up("sync")
        for leaf_state in self.leaf_states:
            synchronize(leaf_state)
        if self.options.verify:
            self.plan.accept()

    def catch_up(self, rows: Mapping[str, np.ndarray] | None) -> None:
        """Replay what rows have missed: see `Optimizer.catch_up`."""
        assert self.lazy_rows is not None
        self.clipper.begin(1.0)
        self.lazy_rows.catch_up(rows)

    def renumber(self, given: Sequence[Mapping[str, Any]]) -> bool:
        """Take numbers for each group's rule, from the next step on, in one call of the plan.

        No interrupt arrives in it. False, and nothing has changed, where there is more to be done,
        or something to be refused: see `take_rules`.
        """
        if not self._renumbers or self.exchanged or self.counters[0] == HALFWAY:
            return False
        changed: bool = self.plan.renumber(given)
        return changed

    @property
    def _upcoming(self) -> int:
        return int(self.counters[0]) + 1

    def _use(self, current: Sequence[Group], extras: Extras) -> None:
        """Let the plan have other rules and other numbers beside them."""
        before = self.current, self.extras
        if (current, extras) == before:
            return
        adopted = self.plan.adopt(current, extras)
        self.rates.current, self.rates.extras = list(current), extras
        # For 1000 tensors a new plan takes 20 ms, other rules in the old one 0.1.
        if adopted:
            self._spec = replace(self._spec, groups=self.current, extras=extras)
            if self.lazy_rows is not None:
                self.lazy_rows.moved(self._spec, self.plan)
            return
        try:
            self.plan.synchronize()
            self.prepare(self.checked_arrays(self.tree)[0])
        except BaseException:
            self.rates.current, self.rates.extras = before
            raise

    def rebind(self, params: Any) -> None:
        """Take new arrays in place of the old ones: see `Optimizer.rebind`."""
        tree = self.tree.successor(params)
        for leaf, expected, rule in zip(tree.leaves, self._layouts, self.rules, strict=True):
            p = self.device.check_parameter(leaf.label, leaf.value, rule)
            got = p.shape, p.dtype.name, memory_order(p)
            if got != expected:
                raise ValueError(
                    f"{leaf.label}: expected (shape, dtype, memory order) {expected}, got {got};"
                    " make a new optimizer for other arrays"
                )
        parameters = self.checked_arrays(tree)[0]
        states = [a for held in self.leaf_states for a in held.saved.values()]
        self.device.check_apart(
            [*("the states" for _ in states), *(leaf.label for leaf in tree.leaves)],
            [*states, *parameters],
        )
        self.tree = tree
        kept = not self.watch.moved()  # otherwise the old arrays may lie in memory that is free
        for k, (old, p) in enumerate(zip(self.parameters, parameters, strict=True)):
            held = self.leaf_states[k] = self.leaf_states[k].rebound(p)
            if held.extra is not None and not (kept and self.device.same(old, p)):
                synchronize(held)
        if self.sums is not None:
            self.sums.watch(parameters, self.leaf_states)
        self.prepare(parameters)

    def loaded(self, what: str, load: Callable[[], T]) -> T:
        """Take another state, be it in part (`HALFWAY`), with everything else kept out."""

        def settled() -> T:
            try:
                return load()
            finally:
                self.settle_simple()

        return self.whole(what, settled)

    def go_on(self, seed: int) -> None:
        """Begin anew after another state was loaded: what rows missed and sums are gone."""
        self.seed, self.lazy_rows, self.parted = seed, None, []
        if self.sums is not None:
            self.sums.clear()
        self.prepare(self.parameters)

    # ---------------------------------------------------------------- steps

    def step(
        self, grads: Any, grad_scale: float, hessian: Any, lr: StepRate | None = None
    ) -> StepInfo:
        """Take a step of any kind: see `Optimizer.step`."""
        scale = check_grad_scale(grad_scale, self.narrowest)

        def step() -> StepInfo:
            return self.told(self._stepped(grads, hessian))

        return self.one_step("step", scale, step, lr)

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
        for rule in self.rules:
            if rule.pooled:
                raise ValueError(
                    f"step_part: {type(rule).__name__} takes sums over all gradients of a step;"
                    " call step() with them"
                )

        def step() -> StepInfo:
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
            return self.told(number)

        return self.one_step("step_part", check_grad_scale(grad_scale, self.narrowest), step)

    def one_step(
        self,
        what: str,
        scale: float,
        step: Callable[[], StepInfo],
        lr: StepRate | None = None,
    ) -> StepInfo:
        """Call a function that takes a step, with the step's learning rates and factors."""

        def begun() -> StepInfo:
            if self._scheduled:
                self._use(*self._values)
            self.clipper.begin(scale)
            before = int(self.counters[0])
            try:
                self.rates.begin(self._upcoming, lr)
                info = step()
                if self.counters[0] > before:
                    self._reset_states()
                return info
            finally:
                self.rates.end()

        return self.whole(what, begun, settled=False)

    def _reset_states(self) -> None:
        """Begin anew, if asked, after a step in which parameters returned to slow weights."""
        slow = self.options.slow_weights
        if slow is None or not slow.reset or not slow.share(int(self.counters[0])):
            return
        step, self.counters[0] = self.counters[0], HALFWAY  # for want of memory, for example
        for rule, leaf_state in zip(self.rules, self.leaf_states, strict=True):
            for name in rule.states:
                leaf_state.states[name].fill(rule.initial(name))
            for side in leaf_state.sides.values():
                side.fill(0.0)
        self.counters[1:] = 0
        self.counters[0] = step

    def told(self, number: int) -> StepInfo:
        """Return the information of a step that has just been taken."""
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
        known = self._places
        for path in paths:
            if path not in known:
                raise ValueError(f"step_part: expected one of the paths {self.paths}, got {path!r}")
        numbers = [known[path] for path in paths]
        if len({*numbers, *self.parted}) < len(numbers) + len(self.parted):
            raise ValueError(f"step_part: a path comes twice in one step: {list(paths)}")
        return numbers

    @cached_property
    def _places(self) -> dict[str, int]:
        return {path: k for k, path in enumerate(self.paths)}

    @property
    def accumulated(self) -> bool:
        """Whether accumulated gradients wait for their step."""
        return self.sums is not None and not self.sums.empty

    def accumulate(self, grads: Any) -> int:
        """Add gradients to the sums, and return the number of micro-batches there."""
        return self.whole("accumulate", partial(self._accumulate, grads), settled=False)

    def _accumulate(self, grads: Any) -> int:
        if self.sums is None:
            self.sums = Accumulator(
                self.backend,
                self.tree,
                self.parameters,
                self.leaf_states,
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

    def whole(
        self, what: str, action: Callable[[], T], *, settled: bool = True, moved: bool = False
    ) -> T:
        """Call an action as a whole or not at all, with other threads kept out.

        settled: all steps are done, and the parameters are where they were; unless `moved`.
        """
        self.check_at_home(what)

        def taken() -> T:
            token = object()
            self.plan.take(token)
            self._token = token
            try:
                if settled:
                    self.plan.synchronize()
                    if not moved:
                        self.watch.check()
                return action()
            finally:
                self.plan.give(token)

        return self.run(taken)

    @property
    def run(self) -> Callable[[Callable[[], T]], T]:
        """The function that runs an action as a whole; CUDA keeps to one thread."""
        return uninterrupted if self.device is host else directly

    def check_at_home(self, what: str) -> None:
        """Raise RuntimeError unless the parameters are themselves and the states this process's."""
        self.check_owner()
        if self.exchanged:
            raise RuntimeError(f"{what} inside of {self.exchanged}(): leave the context first")
        if self.counters[0] == HALFWAY and not what.startswith("load"):
            raise RuntimeError(
                f"{what}: a file could not be read to its end, or a step of matrices failed"
                " half-way, and the parameters and states are of no one step; load a whole file"
                " first"
            )

    def check_owner(self) -> None:
        """RuntimeError in a forked child, of which states in a file are not."""
        if self.state_file:
            self.state_file.check_owner()

    def check_settled(self, what: str) -> None:
        """Raise RuntimeError unless there is nothing but parameters, states and counters."""
        if self.accumulated:
            raise RuntimeError(f"{what}: accumulated gradients would be lost; call step() first")
        if self.parted:
            raise RuntimeError(f"{what}: a step in parts is under way; end it with last=True")
        self.check_caught_up(what)

    def check_caught_up(self, what: str) -> None:
        """Raise RuntimeError where rows have missed steps."""
        behind = self.lazy_rows.behind if self.lazy_rows is not None else ()
        if behind:
            raise RuntimeError(
                f"{what}: rows of {', '.join(behind)} have missed steps; call catch_up() first"
            )

    def checked_arrays(self, tree: Tree) -> Arrays:
        """Return a tree's parameters, and the copies of them, checked."""
        return checked_arrays(self.device, tree, self.rules, self.options.copy_out)


def _same_rate(a: Group, b: Group) -> bool:
    """Whether groups have the same learning rate, and the same schedules of other numbers."""
    names = ("lr", *a.rule.scheduled)
    return a.rule.scheduled == b.rule.scheduled and all(
        getattr(a.rule, name) is getattr(b.rule, name) for name in names
    )


def _state_file(
    path: str | os.PathLike[str] | None,
) -> AbstractContextManager[StateFile | None]:
    if path is None:
        return nullcontext()
    from ..arrays.state_file import state_file_in  # 5 ms of import, for this alone

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
