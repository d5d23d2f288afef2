"""The optimizer: many tensors, one rule or several, one step in place."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from .arrays import Fit, check_apart, check_parameter, memory_order
from .backends import Layout, get_backend
from .checkpoint import Snapshot
from .groups import RuleChoice, assign
from .interrupts import deferred
from .rules import Nesterov
from .states import allocate
from .threads import check_threads
from .trees import Tree


class StepInfo(NamedTuple):
    """What a step did.

    step: its number, 1 for the first. lr: the learning rate that it used; with several rules a
    dict of them, by pattern (or by rule name where a callable chose).
    """

    step: int
    lr: float | dict[str, float]


new_tuple = tuple.__new__


class Options(NamedTuple):
    """The keyword arguments of an optimizer."""

    backend: str
    threads: int | None
    verify: bool


class Optimizer:
    """Updates nested parameters in place, all of them in one fused pass.

    params: a float32 or float64 ndarray, or any nesting of dicts, lists and tuples of them: dense
    (C or Fortran order), aligned, writable, none overlapping another. Empty and zero-dimensional
    arrays are legal. rule: a rule for all; a mapping of path patterns to rules, of which the first
    that matches a leaf's dotted path (`block.0.w`) takes it; or a callable of path and array.

    backend: "auto", "native" or "reference". threads: at most so many, where the process may use
    more. verify: run every step on copies first, compare with the float64 reference, and commit
    only what agrees (`VerificationError` otherwise).

    Raises TypeError for a value of the wrong kind, ValueError for one that does not fit,
    RuntimeError where the backend cannot be used.
    """

    def __init__(
        self,
        params: Any,
        rule: RuleChoice,
        *,
        backend: str = "auto",
        threads: int | None = None,
        verify: bool = False,
    ) -> None:
        self.params = params
        self.rule = rule
        self._backend = get_backend(backend)
        if not isinstance(verify, bool):
            raise TypeError(f"verify: expected True or False, got {verify!r}")
        threads = None if threads is None else check_threads("threads", threads)
        self._options = Options(backend, threads, verify)
        self._tree = Tree(params)
        leaves = self._tree.leaves
        self._groups, self._group_of = assign(leaves, rule)
        self._scheduled = any(callable(group.rule.lr) for group in self._groups)
        self._rates = np.zeros(len(self._groups))
        if not self._scheduled:
            self._set_rates(1)
        self._counters = np.zeros(1 + len(leaves), np.int64)
        parameters = self._check_parameters()
        self._states = allocate(list(zip(self._rules, parameters, strict=True)))
        self._shifted = False
        self._lock = threading.Lock()
        self._prepare(parameters)

    @property
    def _rules(self) -> list[Any]:
        return [self._groups[k].rule for k in self._group_of]

    def _check_parameters(self) -> list[np.ndarray]:
        leaves = self._tree.leaves
        parameters = [
            check_parameter(leaf.label, leaf.value, rule)
            for leaf, rule in zip(leaves, self._rules, strict=True)
        ]
        check_apart([leaf.label for leaf in leaves], parameters)
        return parameters

    def _prepare(self, parameters: Sequence[np.ndarray]) -> None:
        self._parameters = parameters
        self._arrays = [(p, *states) for p, states in zip(parameters, self._states, strict=True)]
        self._fit = Fit([leaf.label for leaf in self._tree.leaves], parameters, self._arrays)
        layout = Layout(
            self._tree.spec,
            self._arrays,
            self._groups,
            self._group_of,
            self._rates,
            self._counters,
            self._options.threads,
        )
        if self._options.verify:
            from .verify import VerifiedPlan  # an optimizer may run without the module

            self._plan: Any = VerifiedPlan(self._backend, layout, self._tree.leaves)
        else:
            self._plan = self._backend.plan(layout)
        self._plan_step = self._plan.step
        # Of the usual optimizer, found once; 0 is as good as not found.
        self._only_rate = float(self._rates[0]) if len(self._groups) == 1 else 0.0
        # One native call guards itself, and is a whole; whatever more there is must be made so.
        native = self._backend.native and not self._options.verify
        one_phase = all(group.rule.program.phases == 1 for group in self._groups)
        self._simple = native and one_phase and not self._scheduled

    def step(self, grads: Any, *, hessian: Any = None) -> StepInfo:
        """One step, in place.

        grads: nested like the parameters, float32 or float64, of their shapes; a None leaf leaves
        its parameter, its states and its step count alone. Read-only; gradients may overlap each
        other but not a parameter or state. A gradient in another memory layout than its
        parameter's is copied first. hessian: for Sophia, Hessian estimates nested likewise.

        Raises TypeError or ValueError for what does not fit, RuntimeError inside of `lookahead`
        or while another thread steps this optimizer; nothing has changed then.
        """
        if self._shifted:
            raise RuntimeError("step inside of lookahead(): leave the context first")
        if not self._simple:
            return self._guarded_step(grads, hessian)
        number = self._plan_step(grads, hessian, False)
        if number is None:
            number = self._explained_step(grads, hessian)
        rate = self._only_rate or self._rates_by_label()
        return new_tuple(StepInfo, (number, rate))  # 0.08 us less than StepInfo(number, rate)

    def _guarded_step(self, grads: Any, hessian: Any) -> StepInfo:
        with deferred():
            if not self._lock.acquire(blocking=False):
                raise RuntimeError(
                    "this optimizer is stepping in another thread: give each thread its own"
                    " optimizer"
                )
            try:
                if self._scheduled:
                    self._set_rates(self.step_count + 1)
                number = self._plan.step(grads, hessian, False)
                if number is None:
                    number = self._explained_step(grads, hessian)
                return StepInfo(number, self._rates_by_label())
            finally:
                self._lock.release()

    def _explained_step(self, grads: Any, hessian: Any) -> int:
        """What the plan did not take: refused with the reason, or laid out so that it will be."""
        self._fit.check_unmoved()
        fitted = self._fitted(grads, "grads")
        estimates = None
        if hessian is not None:
            estimates = self._fitted(hessian, "hessian")
            for leaf, rule, e in zip(self._tree.leaves, self._rules, estimates, strict=True):
                if e is not None and not rule.takes_hessian:
                    raise ValueError(
                        f"hessian: {leaf.label} is updated by {type(rule).__name__}, which takes"
                        " none; give None there"
                    )
        number = self._plan.step(fitted, estimates, True)
        if number is None:
            raise RuntimeError(
                "the core refused arrays that passed the checks; if a parameter was resized, call"
                " rebind(params), otherwise please report this"
            )
        return int(number)

    def _fitted(self, tree: Any, what: str) -> list[np.ndarray | None]:
        values = self._tree.flatten(tree, what)
        labels = [what + leaf.label.removeprefix("params") for leaf in self._tree.leaves]
        return [
            self._fit.gradient(k, label, value)
            for k, (label, value) in enumerate(zip(labels, values, strict=True))
        ]

    def _set_rates(self, step: int) -> None:
        self._rates[:] = [group.rule.lr_at(step) for group in self._groups]

    def _rates_by_label(self) -> float | dict[str, float]:
        rates: list[float] = self._rates.tolist()
        if len(rates) == 1:
            return rates[0]
        return {group.label: lr for group, lr in zip(self._groups, rates, strict=True)}

    @property
    def lr(self) -> float | dict[str, float]:
        """The learning rate of the next step; with several rules a dict, as in `StepInfo`."""
        if self._scheduled:
            rates = {g.label: g.rule.lr_at(self.step_count + 1) for g in self._groups}
            return next(iter(rates.values())) if len(rates) == 1 else rates
        return self._rates_by_label()

    @property
    def step_count(self) -> int:
        """How many steps have been taken."""
        return int(self._counters[0])

    @property
    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """The live state arrays: path -> name -> array."""
        return {
            leaf.path: dict(zip(rule.states, states, strict=True))
            for leaf, rule, states in zip(self._tree.leaves, self._rules, self._states, strict=True)
        }

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
        if self._shifted:
            raise RuntimeError("lookahead(): already inside of one")
        backup = [self._parameters[k].copy(order="A") for k in moving]
        self._shifted = True
        try:
            for k in moving:
                self._backend.shift(self._rules[k], *self._arrays[k])
            yield
        finally:
            with deferred():
                for k, original in zip(moving, backup, strict=True):
                    self._parameters[k][...] = original
                self._shifted = False

    def rebind(self, params: Any) -> None:
        """Takes new arrays in place of the old ones, for trainers that write `W = W - ...`.

        params: nested as before, with the same shapes, dtypes and memory orders. Raises TypeError
        or ValueError where they differ; the optimizer keeps the old ones then.
        """
        tree = Tree(params)
        fresh = [leaf.value for leaf in tree.leaves]
        self._tree.flatten(params, "params")
        for leaf, value, old, rule in zip(
            tree.leaves, fresh, self._parameters, self._rules, strict=True
        ):
            p = check_parameter(leaf.label, value, rule)
            expected, got = ((a.shape, a.dtype.name, memory_order(a)) for a in (old, p))
            if got != expected:
                raise ValueError(
                    f"{leaf.label}: expected (shape, dtype, memory order) {expected}, got {got};"
                    " make a new optimizer for other arrays"
                )
        check_apart([leaf.label for leaf in tree.leaves], fresh)
        self._tree, self.params = tree, params
        self._prepare(self._check_parameters())

    def describe(self) -> str:
        """A table of what updates which leaf, and of the memory that it takes."""
        rows = [("path", "shape", "dtype", "rule", "states")]
        for leaf, p, rule in zip(self._tree.leaves, self._parameters, self._rules, strict=True):
            states = ", ".join(f"{name} {p.dtype}" for name in rule.states) or "-"
            rows.append((leaf.path, str(p.shape), p.dtype.name, rule.summary(), states))
        widths = [max(len(row[k]) for row in rows) for k in range(5)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        if self._backend.native:
            pairs = zip(self._parameters, self._rules, strict=True)
            lines += dict.fromkeys(filter(None, (rule.note(p.shape) for p, rule in pairs)))
        held = sum(p.nbytes for p in self._parameters)
        states_held = sum(a.nbytes for states in self._states for a in states)
        lines.append(
            f"{held} bytes of parameters, {states_held} of states, {self._plan.work_bytes} of work"
            f" space; backend {self._backend.name} ({self._backend.describe()}), step"
            f" {self.step_count}"
        )
        return "\n".join(line.rstrip() for line in lines)

    def fingerprint(self) -> str:
        """A digest of parameters, states and counters: equal where all bits are.

        Any NaN counts as any other. The same on every machine, in hexadecimal digits.
        """
        import hashlib  # 3 ms, for this alone

        digest = hashlib.sha256()
        for leaf, arrays, t in zip(
            self._tree.leaves, self._arrays, self._counters[1:], strict=True
        ):
            digest.update(f"{leaf.path} {arrays[0].shape} {t}".encode())
            for a in arrays:
                canonical = np.where(np.isnan(a), np.nan, a).astype(a.dtype.newbyteorder("<"))
                digest.update(canonical.tobytes())
        digest.update(str(self.step_count).encode())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Counters and copies of the states; the parameters are the caller's to keep.

        {"format": 1, "step": ..., "leaves": {path: {"rule", "t", "shape", "dtype", "state"}}}
        """
        return self._snapshot.take()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`, copying its arrays; with equal parameters, bit for bit.

        Raises ValueError that lists every difference in paths, rules, shapes, dtypes and states;
        nothing has changed then.
        """
        with deferred():
            self._snapshot.restore(state)

    @property
    def _snapshot(self) -> Snapshot:
        return Snapshot(self._tree.leaves, self._rules, self._arrays, self._counters)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled or deep-copied together with a tree that holds the same arrays, both copies go
        # on sharing them; on its own, an optimizer takes its arrays along.
        if self._shifted:
            raise RuntimeError("an optimizer inside of lookahead() cannot be copied")
        return _rebuild, (self.params, self.rule, self._options, self.state_dict())

    def __copy__(self) -> Optimizer:
        raise TypeError(
            "two optimizers would update the same arrays; copy.deepcopy makes one with its own"
        )


def _rebuild(params: Any, rule: Any, options: Options, state: dict[str, Any]) -> Optimizer:
    optimizer = Optimizer(params, rule, **options._asdict())
    optimizer.load_state_dict(state)
    return optimizer
