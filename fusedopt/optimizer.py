"""The optimizer: many tensors, one rule or several, one step in place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays.checks import memory_order
from .arrays.foreign import Watch
from .arrays.formats import RandomKey, compute_dtype
from .arrays.storage import Master, Rounding, StateDtype, synchronize
from .arrays.stored import AVERAGE, LeafState
from .arrays.trees import Tree
from .backends import get_backend
from .plan.options import ClipNorm, Options, check_grad_scale, check_seed
from .plan.spec import PlanSpec, results_for
from .rules import Nesterov, Rule
from .rules.groups import (
    RateChoice,
    RuleChoice,
    assign,
    check_successor,
    with_hyperparameters,
    with_rates,
)
from .step.accumulate import ACCUMULATED, Accumulator
from .step.assembly import checked_arrays
from .step.checkpoint import Snapshot
from .step.clipping import GradientClipper
from .step.exchange import Averaged
from .step.gradients import GradientReader
from .step.info import StepInfo, StepInfoBuilder
from .step.lazy_rows import LazyRows
from .step.summary import digest, table
from .system.interrupts import deferred
from .verification.plan import VerifiedPlan

if TYPE_CHECKING:
    from .arrays.state_file import StateFile


new_tuple = tuple.__new__
NOTHING_ASKED = tuple(StepInfo._field_defaults.values())  # the rest of a simple step's StepInfo


class Optimizer:
    """Updates nested parameters in place, all of them in one fused pass.

    params: an ndarray of float32, float64, bfloat16 (of ml_dtypes) or float16, or any nesting of
    dicts, lists and tuples of them: dense (C or Fortran order), aligned, writable, none overlapping
    another. Empty and zero-dimensional arrays are legal. A float64 parameter is updated in float64
    arithmetic, any other in float32. rule: a rule for all; a mapping of path patterns to rules, of
    which the first that matches a leaf's dotted path (`block.0.w`) takes it; or a callable of path
    and array.

    clip_norm: gradients are multiplied by min(1, clip_norm / norm), where norm is that of all
    (unscaled) gradients together; or a mapping with a limit, or None, for each rule's pattern (or
    name, as in `lr`), whose gradients are then clipped on their own. A norm that is NaN or infinite
    raises, before anything is written. clip_value: every element of the (unscaled) gradients is
    kept within +- clip_value instead. skip_nonfinite: a step with a NaN or infinity in any gradient
    does nothing, and says so.

    zero_grads: the step sets the gradients to zero. state_dtype: what states are stored in, one
    name for all or a mapping from states' names: "float32", "float64", "bfloat16", "float16", or,
    from 4096 elements on, quantised in blocks, "float8" (e4m3; e5m3 for second moments; 1.02 bytes
    per element), "dynamic8" (the map of bitsandbytes) and "dynamic4" (torchao's, 0.53 bytes);
    without it float64 for float64 parameters, float32 for others. A NaN or infinity makes its whole
    block NaN. master: of bfloat16 and float16 parameters, "float32" keeps separate masters and
    writes the parameter in the same pass; "split16" keeps 16 more bits beside each bfloat16, which
    together are a float32. copy_out: arrays nested like the parameters, of their shapes and any
    supported dtype, or None, into which the same pass writes a copy of the new parameters.
    rounding: to bfloat16 and float16, of parameters without masters and of states: "nearest",
    "stochastic" (unbiased, also in quantised states; its bits depend on `seed`, the leaf's step and
    path, state and element alone), or "kahan", which compensates bfloat16 parameters. What masters
    are written to and copies are rounded to the nearest. An average such as v, rounded to the
    nearest bfloat16, moves only where a step changes it by half a unit: take "stochastic" there.
    seed: a non-negative integer.

    ema: keep an average of each parameter (of its master, where there is one), average := average
    + (1 - ema) (parameter - average) in every step, in float32 (float64 for float64), beginning as
    the parameter: see `averaged`. stats: measure what `StepInfo.stats` tells, in the same passes.
    exact: rows that a gradient of `Rows` left out are updated later, as if their gradient had been
    zero: see `catch_up`.
    state_path: an empty or new directory, on a disk, for states larger than memory. All that is in
    `state` is in a file there, reserved as a whole at once, and a step has no more than 32 MiB of
    it in memory at a time (native backend, on Linux, without `verify`). The file is scratch, not a
    checkpoint: it goes with the optimizer or its process, and nothing can go on from one that a
    killed process has left. Such an optimizer cannot be pickled, copied or used in a forked child.

    backend: "auto", "native", "numba", "reference", or, for arrays of CuPy, PyTorch and Numba on a
    CUDA device, "cuda" ("auto" takes it by itself), which refuses what it does not have; states are
    arrays of the device there, with `__cuda_array_interface__`. threads: at most so many, where the
    process may use more. verify: run every step on copies first, compare with the float64
    reference, and commit only what agrees (`VerificationError` otherwise, also where parameters
    with masters were overwritten without `sync`).

    wait: with False, on a CUDA device, no step waits for the norm that `clip_norm` needs.
    `StepInfo.grad_norm` and `clip_scale` are arrays of the device then, without dimensions, whose
    `float()` waits. Where a norm is NaN or infinite (or squares of float64 gradients leave the
    range, which a step that waits would look into) the device takes neither that step nor a later
    one; the next step that knows, or whatever else waits (`synchronize`, `state_dict`, `save`,
    `load`, `fingerprint`, ...), raises FloatingPointError, and counters are those before that step.
    Until then `step_count` and schedules count it. `clip_scale` is NaN of a step that was not
    taken. Not with `skip_nonfinite`; gradients that `zero_grads` zeroes must have their parameters'
    memory order.

    An optimizer is for one thread at a time: where two meet, RuntimeError says so to the later one,
    and nothing has changed; only looking (`describe`, `state`, `fingerprint`) is not guarded.

    Raises TypeError for a value of the wrong kind, ValueError for one that does not fit,
    RuntimeError where the backend cannot be used, FileExistsError where `state_path` is in use or
    holds anything else, OSError where it cannot be made or has no room.
    """

    _first_tiles: Sequence[int] | None = None
    """Where the leaves begin in those that they are parts of, for random bits; None: whole."""

    def __init__(
        self,
        params: Any,
        rule: RuleChoice,
        *,
        clip_norm: ClipNorm = None,
        clip_value: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        state_dtype: StateDtype = None,
        rounding: Rounding = "nearest",
        master: Master | None = None,
        copy_out: Any = None,
        ema: float | None = None,
        stats: bool = False,
        exact: bool = False,
        state_path: str | os.PathLike[str] | None = None,
        seed: int = 0,
        backend: str = "auto",
        threads: int | None = None,
        verify: bool = False,
        wait: bool = True,
    ) -> None:
        self.params = params
        self.rule = rule
        self._options = Options(
            clip_norm,
            clip_value,
            skip_nonfinite,
            zero_grads,
            state_dtype,
            rounding,
            master,
            copy_out,
            ema,
            stats,
            exact,
            seed,
            backend,
            threads,
            verify,
            wait,
        ).checked()
        self._seed = check_seed(seed)
        self._storage = self._options.storage()
        self._tree = Tree(params)
        leaves = self._tree.leaves
        self._backend = get_backend(backend, [leaf.value for leaf in leaves])
        self._device = self._backend.device
        self._device.check_options(self._options, state_path)
        self._groups, self._group_of = assign(leaves, rule)
        self._rates = np.ones(len(self._groups))
        self._factors = np.ones(len(self._groups))
        clip = self._options.clip_by_group([group.label for group in self._groups])
        self._counters = np.zeros(1 + len(leaves), np.int64)
        parameters, copies = checked_arrays(self._device, self._tree, self._rules, copy_out)
        labels, dtypes = [leaf.label for leaf in leaves], [p.dtype for p in parameters]
        self._storage.check(labels, dtypes, self._rules)
        self._wide = any(p.dtype == np.float64 for p in parameters)
        self._narrowest = min(
            (compute_dtype(p.dtype) for p in parameters), key=lambda d: d.itemsize
        )
        self._extras = self._options.extras(self._wide)
        programs = [self._extras.program(group.rule) for group in self._groups]
        self._results = results_for(programs, len(leaves))
        self._clipper = GradientClipper(
            [leaf.path for leaf in leaves],
            [group.label for group in self._groups],
            self._group_of,
            self._results,
            self._factors,
            clip,
            skip_nonfinite,
        )
        self._clipper.begin(1.0)
        self._parted: list[int] = []  # the leaves that have had their part of the step under way
        self._numbers: dict[str, int] = {}
        self._exchanged = ""  # the context, if parameters are not themselves
        self._sums: Accumulator | None = None
        self._lazy_rows: LazyRows | None = None
        state_file: AbstractContextManager[StateFile | None] = nullcontext()
        if state_path is not None:
            from .arrays.state_file import state_file_in  # 5 ms, for this alone

            state_file = state_file_in(state_path)
        with state_file as self._state_file:
            block = (self._state_file.reserve,) if self._state_file else ()
            self._leaves = self._device.allocate(
                self._storage, self._rules, parameters, copies, self._extras.states, *block
            )
            self._prepare(parameters)
            if self._state_file:
                self._state_file.note(
                    {x.path: m.saved for x, m in zip(leaves, self._leaves, strict=True)}
                )
                self._state_file.release()
        self._plan.give()

    @property
    def _paths(self) -> list[str]:
        return [leaf.path for leaf in self._tree.leaves]

    @property
    def _rules(self) -> list[Any]:
        return [self._groups[k].rule for k in self._group_of]

    def _checked(self, tree: Tree) -> list[np.ndarray]:
        """A tree's parameters, beside the copies that there are."""
        copy_out = self._options.copy_out
        return checked_arrays(self._device, tree, self._rules, copy_out)[0]

    def _prepare(self, parameters: Sequence[np.ndarray]) -> None:
        self._parameters = parameters
        self._watch = Watch(self._tree.leaves) or None
        labels = [leaf.label for leaf in self._tree.leaves]
        written = [leaf_state.written for leaf_state in self._leaves]
        copies = [len(leaf_state.copies) for leaf_state in self._leaves]
        gradient_checks = self._device.GradientChecks(labels, parameters, written, copies)
        spec = PlanSpec(
            tree=self._tree.spec,
            leaves=self._leaves,
            groups=self._groups,
            group_of=self._group_of,
            rates=self._rates,
            factors=self._factors,
            counters=self._counters,
            keys=self._keys(),
            results=self._results,
            extras=self._extras,
            decide=self._clipper if self._options.decides(self._wide) else None,
            zero_grads=self._options.zero_grads,
            threads=self._options.threads,
            wait=self._options.wait,
            state_file=self._state_file,
        )
        if self._options.verify:
            plan: Any = VerifiedPlan(self._backend, spec, self._tree.leaves)
        else:
            plan = self._backend.plan(spec)
        plan.take()  # until all is ready; the old one stays taken, should a thread still have it
        self._plan = plan
        if self._lazy_rows is not None:
            self._lazy_rows.moved(spec, self._plan)
        elif self._options.exact:
            self._lazy_rows = LazyRows(self._tree, spec, self._plan)
        self._gradient_reader = GradientReader(
            self._tree, gradient_checks, self._device.unique_rows, spec, self._plan, self._lazy_rows
        )
        self._info_builder = StepInfoBuilder(self._tree, spec, self._clipper)
        self._settle_rates()

    def _settle_rates(self) -> None:
        """What `step` needs to know of the rules' rates."""
        self._scheduled = any(callable(group.rule.lr) for group in self._groups)
        if not self._scheduled:
            self._set_rates(1)
        # Of the usual optimizer, found once; 0 is as good as not found.
        self._only_rate = float(self._rates[0]) if len(self._groups) == 1 else 0.0
        self._settle_simple()

    def _settle_simple(self) -> None:
        """Find the plan's own whole step, which guards itself; None where there is more to a step
        than that, or where the plan has none."""
        alone = None if self._options.verify else getattr(self._plan, "step_alone", None)
        one_phase = all(group.rule.program.phases == 1 for group in self._groups)
        options = self._options
        asked = options.decides(self._wide) or options.stats or options.exact or self._state_file
        simple = one_phase and not self._scheduled and not asked
        simple = simple and not self._accumulated and not self._parted
        self._step_alone: Any = alone if simple else None

    def step(
        self, grads: Any = ACCUMULATED, *, grad_scale: float = 1.0, hessian: Any = None
    ) -> StepInfo:
        """One step, in place.

        grads: nested like the parameters, of their shapes, in any dtype that a parameter may have;
        a None leaf leaves its parameter, its states and its step count alone. Left as they are,
        unless `zero_grads`; gradients may overlap each other, unless `zero_grads`, but not a
        parameter or state. A gradient in another memory layout than its parameter's is copied
        first. Without it, those that `accumulate` added up, which are consumed, also where the
        step is skipped or finds no finite norm. grad_scale: divides the gradients, before they are
        examined and clipped: the scale of the loss, or the number of micro-batches. hessian: for
        Sophia, Hessian estimates nested like the gradients, as they are.

        Raises TypeError or ValueError for what does not fit, FloatingPointError where `clip_norm`
        finds a norm that is NaN or infinite (with `wait=False` in a step before), RuntimeError
        inside of `lookahead` and `averaged` or while another thread uses this optimizer; nothing
        has changed then.
        """
        if self._exchanged:
            raise RuntimeError(f"step inside of {self._exchanged}(): leave the context first")
        if self._watch is not None:
            self._watch.check()
        step = self._step_alone
        if step is None or grad_scale != 1.0 or grads is ACCUMULATED:
            return self._guarded_step(grads, grad_scale, hessian)
        number = step(grads, hessian)
        if number is None:
            return self._guarded_step(grads, grad_scale, hessian)
        rate = self._only_rate or self._rates_by_label()
        # 0.08 us less than StepInfo(number, rate)
        return new_tuple(StepInfo, (number, rate, *NOTHING_ASKED))

    def _guarded_step(self, grads: Any, grad_scale: float, hessian: Any) -> StepInfo:
        scale = check_grad_scale(grad_scale, self._narrowest)
        with self._exclusively("step", settled=False):
            if self._scheduled:
                self._set_rates(self.step_count + 1)
            self._clipper.begin(scale)
            try:
                number = self._number_of_step(grads, hessian)
            finally:
                self._factors[:] = 1.0  # the simple way leaves them alone
            return self._info_builder.info(number, self._rates_by_label())

    def step_part(
        self,
        paths: Sequence[str],
        grads: Sequence[Any],
        *,
        grad_scale: float = 1.0,
        last: bool = False,
    ) -> StepInfo:
        """Take a step of some leaves alone, such as those whose gradients have just been found.

        All parts have the number, and so the learning rate, of one step, and each leaf its bits of
        a whole step; the part that is `last` ends it. A leaf without a part is left alone.

        Parameters
        ----------
        paths : sequence of str
            The leaves' dotted paths; none of them twice in a step.
        grads : sequence of arrays
            Their gradients, as `step` takes them.
        grad_scale : float, default 1.0
            As in `step`.
        last : bool, default False
            Whether this part ends the step. It may be empty.

        Returns
        -------
        StepInfo
            Its `step` is the number of the whole step.

        Raises
        ------
        ValueError
            If a path is unknown or comes twice, or if the optimizer was made with `clip_norm`,
            `skip_nonfinite` or `exact`, which need all gradients. Nothing has changed then.
        """
        options = self._options
        if options.clip_norm is not None or options.skip_nonfinite or options.exact:
            raise ValueError(
                "step_part: clip_norm, skip_nonfinite and exact need all gradients of a step at"
                " once; call step() with them"
            )
        if self._watch is not None:
            self._watch.check()
        with self._exclusively("step_part", settled=False):
            if self._accumulated:
                raise RuntimeError("step_part: accumulated gradients are waiting; call step()")
            numbers = [self._number_of(path) for path in paths]
            if len({*numbers, *self._parted}) < len(numbers) + len(self._parted):
                raise ValueError(f"step_part: a path comes twice in one step: {list(paths)}")
            if self._scheduled:
                self._set_rates(self.step_count + 1)
            self._clipper.begin(check_grad_scale(grad_scale, self._narrowest))
            try:
                number = self._gradient_reader.part(numbers, grads)
            finally:
                self._factors[:] = 1.0
            if last:
                self._parted = []
            else:
                self._counters[0] -= 1
                self._parted += numbers
            self._settle_simple()
            return self._info_builder.info(number, self._rates_by_label())

    def _number_of(self, path: str) -> int:
        if not self._numbers:
            self._numbers = {path: k for k, path in enumerate(self._paths)}
        if path not in self._numbers:
            raise ValueError(f"step_part: expected one of the paths {self._paths}, got {path!r}")
        return self._numbers[path]

    def _number_of_step(self, grads: Any, hessian: Any) -> int:
        if self._parted:
            raise RuntimeError("step: a step in parts is under way; end it with last=True")
        if grads is not ACCUMULATED:
            if self._accumulated:
                raise RuntimeError(
                    "step(grads): accumulated gradients are waiting; call step() without gradients"
                )
            return self._gradient_reader.step(grads, hessian)
        if not self._accumulated:
            raise RuntimeError("step(): nothing was accumulated; call accumulate(grads) first")
        assert self._sums is not None
        try:
            number = self._gradient_reader.summed(self._sums.sums, hessian)
        except FloatingPointError:
            self._clear_sums()
            raise
        self._clear_sums()
        return number

    @property
    def _accumulated(self) -> bool:
        return self._sums is not None and not self._sums.empty

    def _clear_sums(self) -> None:
        if self._sums is not None:
            self._sums.clear()
        self._settle_simple()

    def accumulate(self, grads: Any) -> int:
        """Adds the gradients of a micro-batch to those that the next `step()` will take.

        grads: as for `step`; a leaf that is None every time takes no part in the step. Summed in
        float32 (float64 for float64 parameters), in arrays that are allocated at the first call;
        divide by their number with `step(grad_scale=n)`. With `zero_grads` they are set to zero.
        Returns how many micro-batches there are now. Raises as `step` does; a `state_dict` cannot
        be taken before the step.
        """
        with self._exclusively("accumulate", settled=False):
            if self._sums is None:
                self._sums = Accumulator(
                    self._backend,
                    self._tree,
                    self._parameters,
                    self._options.zero_grads,
                    self._options.threads,
                )
            count = self._sums.add(grads)
            self._settle_simple()
        return count

    @contextmanager
    def _exclusively(self, what: str, *, settled: bool = True) -> Iterator[None]:
        """No interrupt inside, and no other thread; the parameters are themselves. settled: all
        steps are done."""
        self._check_at_home(what)
        with deferred():
            self._plan.take()
            try:
                if settled:
                    self._plan.synchronize()
                yield
            finally:
                self._plan.give()

    def _set_rates(self, step: int) -> None:
        self._rates[:] = [group.rule.lr_at(step) for group in self._groups]

    def _use_rates(self, rates: Sequence[float]) -> None:
        """Set the groups' learning rates from the next step on, and leave their rules alone."""
        self._rates[:] = rates
        self._only_rate = float(rates[0]) if len(rates) == 1 else 0.0

    def _rates_by_label(self) -> float | dict[str, float]:
        rates: list[float] = self._rates.tolist()
        if len(rates) == 1:
            return rates[0]
        return {group.label: lr for group, lr in zip(self._groups, rates, strict=True)}

    @property
    def lr(self) -> float | dict[str, float]:
        """The learning rate of the next step; with several rules a dict, as in `StepInfo`.

        Can be set, from the next step on, to a number or a schedule, or with several rules to a
        mapping with all labels of that dict; errors as `replace` raises them. What is set is the
        new base value of "independent" weight decay.
        """
        if self._scheduled:
            rates = {g.label: g.rule.lr_at(self.step_count + 1) for g in self._groups}
            return next(iter(rates.values())) if len(rates) == 1 else rates
        return self._rates_by_label()

    @lr.setter
    def lr(self, lr: RateChoice) -> None:
        self._adopt(with_rates(self._groups, lr))

    def replace(self, label: str | None = None, /, **hyperparameters: Any) -> None:
        """Other hyperparameters from the next step on: `opt.replace(weight_decay=0.05)`.

        label: the pattern, or name of a rule as in `lr`, that alone is meant; without it each
        hyperparameter goes to all rules that have it. States and counters stay. What a `state_dict`
        or a file is loaded into must have been given the same; pickles and deep copies have it.

        Raises TypeError for a name that no rule meant has or a value of the wrong kind, ValueError
        for an unknown label, a value out of range, or one that the states (amsgrad) or parameters
        do not fit, RuntimeError inside of `lookahead`; nothing has changed then.
        """
        self._adopt(with_hyperparameters(self._groups, label, hyperparameters))

    def _adopt(self, rules: Sequence[Rule]) -> None:
        """Puts rules in the place of the groups' own, all of them or none."""
        with self._exclusively("hyperparameters", settled=False):
            self._check_caught_up("hyperparameters")
            old = self._groups
            kept = [check_successor(group, rule) for group, rule in zip(old, rules, strict=True)]
            self._groups = [replace(g, rule=rule) for g, rule in zip(old, rules, strict=True)]
            try:
                # For 1000 tensors a new plan takes 20 ms, other rules in the old one 0.1.
                if all(kept) or (self._lazy_rows is None and self._plan.adopt(rules)):
                    self._settle_rates()
                else:
                    self._plan.synchronize()
                    self._prepare(self._checked(self._tree))
            except BaseException:
                self._groups = old
                raise
            if isinstance(self.rule, Rule):
                self.rule = rules[0]
            elif isinstance(self.rule, Mapping):
                self.rule = dict(zip(self.rule, rules, strict=True))

    @property
    def step_count(self) -> int:
        """How many steps have been taken."""
        return int(self._counters[0])

    @property
    def state(self) -> dict[str, dict[str, Any]]:
        """The live states: path -> name -> array, or `Quantized` object.

        Beside the rule's states there are "master", of master="float32"; "low", of "split16", the
        uint16 below a bfloat16; "compensation", of rounding="kahan".
        """
        return {
            leaf.path: {
                **{name: state.visible for name, state in leaf_state.states.items()},
                **{name: side.data for name, side in leaf_state.sides.items()},
                **dict([leaf_state.extra] if leaf_state.extra else []),
            }
            for leaf, leaf_state in zip(self._tree.leaves, self._leaves, strict=True)
        }

    def leaf_state(self, path: str) -> tuple[LeafState, list[RandomKey]]:
        """All that a step writes of a leaf, and the keys of its random bits: for verification."""
        k = [leaf.path for leaf in self._tree.leaves].index(path)
        return self._leaves[k], self._keys()[k]

    def _keys(self) -> list[list[RandomKey]]:
        return self._storage.keys(self._seed, self._paths, self._leaves, self._first_tiles)

    def sync(self) -> None:
        """Takes the masters anew from the parameters, after these were written by the caller.

        Without it the next step goes on from the masters, and what was written is lost. Does
        nothing where there are no masters.
        """
        with self._exclusively("sync"):
            self._check_caught_up("sync")
            for leaf_state in self._leaves:
                synchronize(leaf_state)
            if self._options.verify:
                self._plan.accept()

    def synchronize(self) -> None:
        """Waits until a CUDA device has done all steps; on the host they are done already.

        Raises FloatingPointError where one of them, with `wait=False`, found a norm that is NaN or
        infinite: neither it nor a step after it has changed anything, counters included.
        """
        with self._exclusively("synchronize"):
            pass

    def flush(self) -> None:
        """Writes the states in `state_path` to the disk, waits, and frees all memory they take.

        The system does the same in its own time; this is for when memory is needed at once. Does
        nothing without `state_path`. Raises OSError where the disk failed.
        """
        if self._state_file:
            self._state_file.flush()

    def _check_owner(self) -> None:
        if self._state_file:
            self._state_file.check_owner()

    @contextmanager
    def lookahead(self) -> Iterator[None]:
        """Moves the parameters to p - mu v, where Nesterov's look-ahead form wants its gradient.

        On leaving, by an exception too, their exact bits are restored. Leaves of other rules stay
        where they are. Raises ValueError where no leaf has that form, RuntimeError when nested.
        """
        moving = [
            k
            for k, rule in enumerate(self._rules)
            if isinstance(rule, Nesterov) and rule.form == "lookahead"
        ]
        if not moving:
            raise ValueError("lookahead(): no leaf is updated by Nesterov(form='lookahead')")
        with self._exchange("lookahead", moving):
            for k in moving:
                velocity = self._leaves[k].states["v"].values
                self._backend.shift(self._rules[k], self._parameters[k], velocity)
            yield

    def averaged(self) -> Averaged:
        """The averages of `ema`: `averaged().params` is nested like the parameters.

        `with opt.averaged():` puts them in the place of the parameters, rounded to their dtypes; on
        leaving, by an exception too, the parameters' exact bits are restored. Raises ValueError
        where there are no averages, RuntimeError on entering inside of another such context.
        """
        if self._options.ema is None:
            raise ValueError("averaged(): there are no averages; make the optimizer with ema=0.999")
        self._check_caught_up("averaged")
        averages = [leaf_state.states[AVERAGE].data for leaf_state in self._leaves]
        return Averaged(self._tree.build(averages), self._in_place_of_parameters(averages))

    @contextmanager
    def _in_place_of_parameters(self, averages: Sequence[np.ndarray]) -> Iterator[Any]:
        with self._exchange("averaged", range(len(self._parameters))):
            for p, average in zip(self._parameters, averages, strict=True):
                with np.errstate(over="ignore"):
                    p[...] = average
            yield self.params

    @contextmanager
    def _exchange(self, name: str, leaves: Sequence[int]) -> Iterator[None]:
        """Inside, these parameters may be anything; after it they have their own bits again."""
        if self._exchanged:
            raise RuntimeError(f"{name}(): already inside of {self._exchanged}()")
        backup: list[np.ndarray] = []
        taken = False
        try:
            with deferred():
                self._plan.take()  # all the while, for a thread that comes past the checks
                taken = True
                self._plan.synchronize()
                backup += (self._parameters[k].copy(order="A") for k in leaves)
                self._exchanged = name
            yield
        finally:
            with deferred():
                for k, original in zip(leaves, backup, strict=False):
                    self._parameters[k][...] = original
                if taken:
                    self._exchanged = ""
                    self._plan.give()

    def catch_up(self, rows: Mapping[str, np.ndarray] | None = None) -> None:
        """Replays the steps that rows missed because no gradient touched them.

        For `exact=True`: before the forward pass, with the rows that it will read and that the next
        gradient will have; without an argument all rows of all leaves, before evaluation, saving
        or a change of hyperparameters. After it they have the bits that steps with a gradient of
        zero would have given them. The cost is that of these steps.

        rows: path of a leaf -> indices, integers in any order. Raises TypeError or ValueError for
        what is no path or no index, RuntimeError where the optimizer was made without
        `exact=True`.
        """
        if self._lazy_rows is None:
            raise RuntimeError("catch_up(): make the optimizer with exact=True")
        with self._exclusively("catch_up"):
            self._clipper.begin(1.0)
            self._lazy_rows.catch_up(rows)

    def _check_caught_up(self, what: str) -> None:
        behind = self._lazy_rows.behind if self._lazy_rows is not None else ()
        if behind:
            raise RuntimeError(
                f"{what}: rows of {', '.join(behind)} have missed steps; call catch_up() first"
            )

    def rebind(self, params: Any) -> None:
        """Takes new arrays in place of the old ones, for trainers that write `W = W - ...`.

        params: nested as before, with the same shapes, dtypes and memory orders. Masters are taken
        anew where the values differ from the old arrays'. Raises TypeError or ValueError where
        something does not fit; the optimizer keeps the old ones then.
        """
        with self._exclusively("rebind"):
            tree = Tree(params)
            self._tree.flatten(params, "params")
            self._check_alike(tree)
            parameters = self._checked(tree)
            self._tree, self.params = tree, params
            for k, (old, p) in enumerate(zip(self._parameters, parameters, strict=True)):
                moved = self._leaves[k] = self._leaves[k].rebound(p)
                if moved.extra is not None and not self._device.same(old, p):
                    synchronize(moved)
            if self._sums is not None:
                self._sums.watch(parameters)
            self._prepare(parameters)

    def _check_alike(self, tree: Tree) -> None:
        """ValueError where a leaf cannot take the place of the one that there is."""
        for leaf, old, rule in zip(tree.leaves, self._parameters, self._rules, strict=True):
            p = self._device.check_parameter(leaf.label, leaf.value, rule)
            expected, got = ((a.shape, a.dtype.name, memory_order(a)) for a in (old, p))
            if got != expected:
                raise ValueError(
                    f"{leaf.label}: expected (shape, dtype, memory order) {expected}, got {got};"
                    " make a new optimizer for other arrays"
                )

    def describe(self) -> str:
        """A table of what updates which leaf, and of the memory that it takes."""
        lines = table(self._storage, self._paths, self._parameters, self._rules, self._leaves)
        if self._backend.name != "reference":
            pairs = zip(self._parameters, self._rules, strict=True)
            lines += dict.fromkeys(filter(None, (rule.note(p.shape) for p, rule in pairs)))
        held = sum(p.nbytes for p in self._parameters)
        states_held = sum(
            a.nbytes for leaf_state in self._leaves for a in leaf_state.saved.values()
        )
        s = self._state_file
        where = f" in {s.directory} (scratch; a step has {s.window} in memory)" if s else ""
        lines.append(
            f"{held} bytes of parameters, {states_held} of states{where}, {self._plan.work_bytes}"
            f" of work space; backend {self._backend.name} ({self._backend.describe()}), step"
            f" {self.step_count}"
        )
        return "\n".join(lines)

    def fingerprint(self) -> str:
        """A digest of parameters, states and counters: equal where all bits are.

        Any NaN counts as any other. The same on every machine, in hexadecimal digits.
        """
        if not self._options.wait and not self._exchanged:
            self.synchronize()
        return digest(
            self._paths, self._parameters, (m.saved for m in self._leaves), self._counters
        )

    def state_dict(self) -> dict[str, Any]:
        """Counters and copies of the states; the parameters are the caller's to keep.

        {"format": 1, "step": ..., "seed": ..., "leaves": {path: {"rule", "hyperparameters", "t",
        "shape", "dtype", "order", "formats", "state"}}}. A quantised state m is there as "m.codes"
        and "m.scales". The hyperparameters are there to be compared, not to be taken over.
        """
        with self._exclusively("state_dict"):
            self._check_settled("state_dict")
            return self._snapshot.take()

    def load_state_dict(self, state: dict[str, Any], *, strict: bool = True) -> None:
        """Goes on from a `state_dict`, copying its arrays; with equal parameters, bit for bit.

        Put the parameters back first: masters come from the `state_dict`, not from them. strict:
        hyperparameters must be equal too (of schedules what they print; any two other callables
        count as equal). With strict=False this optimizer's own hold from here on, and only those
        that say what the states hold, such as `amsgrad` or `form`, must be equal.

        Raises ValueError that lists every difference in paths, rules, hyperparameters, shapes,
        dtypes, memory orders, formats and states, RuntimeError inside of `lookahead` and
        `averaged`; nothing has changed then. Accumulated gradients are forgotten.
        """
        with self._exclusively("load_state_dict"):
            self._go_on(self._snapshot.restore(state, strict=strict))

    def save(
        self, path: str | os.PathLike[str], *, parameters: bool = True, metadata: Any = None
    ) -> None:
        """Writes states, counters and parameters to one safetensors file: all that a run needs.

        parameters: also the parameters and the arrays of `copy_out`; without them the file is a
        `state_dict`. The parameter of the leaf `block.0.w` is called `p:block.0.w` there, its state
        m `m:block.0.w`; arrays in Fortran order lie there transposed. Every bit is kept.
        metadata: whatever else of the run must be of the same moment, such as the state of a random
        generator, in the types of JSON: `load` returns it.

        A file at `path` is replaced at once when the new one is whole and on the disk: a process
        killed at any moment leaves the old file or the new one. No other copy is made in memory.
        Raises OSError where the file cannot be written, TypeError or ValueError for metadata that
        JSON does not take or that a file cannot hold, RuntimeError inside of `lookahead` and
        `averaged`, and between `accumulate` and `step`.
        """
        with self._exclusively("save"):
            self._check_settled("save")
            self._snapshot.save(path, parameters, metadata)

    def load(
        self, path: str | os.PathLike[str], *, parameters: bool = True, strict: bool = True
    ) -> Any:
        """Goes on from a file of `save`, bit for bit: parameters and states are written in place.

        parameters: with False those of the file are left there; the caller's must be in place.
        strict: as in `load_state_dict`. The file is mapped, and nothing is allocated by its word.
        Returns the metadata that `save` was given, tuples as lists.

        Raises OSError where it cannot be read, ValueError where it is not whole, of another version
        or without parameters, or that lists every difference as `load_state_dict` does,
        RuntimeError inside of `lookahead` and `averaged`; nothing has changed then. Accumulated
        gradients are forgotten.
        """
        with self._exclusively("load"):
            seed, metadata = self._snapshot.load(path, strict=strict, parameters=parameters)
            self._go_on(seed)
        return metadata

    def _go_on(self, seed: int) -> None:
        """After another state was loaded: what rows had missed, and sums of gradients, are gone."""
        self._seed, self._lazy_rows, self._parted = seed, None, []
        if self._sums is not None:
            self._sums.clear()
        self._prepare(self._parameters)

    def _check_at_home(self, what: str) -> None:
        """The parameters are themselves, and states are this process's."""
        self._check_owner()
        if self._exchanged:
            raise RuntimeError(f"{what} inside of {self._exchanged}(): leave the context first")

    def _check_settled(self, what: str) -> None:
        """There is nothing but parameters, states and counters."""
        if self._accumulated:
            raise RuntimeError(f"{what}: accumulated gradients would be lost; call step() first")
        if self._parted:
            raise RuntimeError(f"{what}: a step in parts is under way; end it with last=True")
        self._check_caught_up(what)

    @property
    def _snapshot(self) -> Snapshot:
        return Snapshot(
            self._tree.leaves,
            self._rules,
            self._parameters,
            self._leaves,
            self._counters,
            self._seed,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled or deep-copied together with a tree that holds the same arrays, both copies go
        # on sharing them; on its own, an optimizer takes its arrays along.
        if self._exchanged:
            raise RuntimeError(f"an optimizer inside of {self._exchanged}() cannot be copied")
        if self._state_file:
            raise TypeError(
                f"an optimizer with state_path {self._state_file.directory} cannot be copied or"
                " pickled, since both would use that directory; take its state_dict()"
            )
        rules = [group.rule for group in self._groups]  # those of a callable may be replaced
        return _rebuild, (self.params, self.rule, self._options, rules, self.state_dict())

    def __copy__(self) -> Optimizer:
        raise TypeError(
            "two optimizers would update the same arrays; copy.deepcopy makes one with its own"
        )


def _rebuild(
    params: Any, rule: Any, options: Options, rules: Sequence[Rule], state: dict[str, Any]
) -> Optimizer:
    optimizer = Optimizer(params, rule, **options._asdict())
    optimizer._adopt(rules)
    optimizer.load_state_dict(state)
    return optimizer
