"""An optimizer's steps on a device: one launch for all leaves of a rule, format and step count."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from operator import is_
from typing import Any, NamedTuple

import numpy as np

from ...arrays import device_interface
from ...arrays.formats import FLOAT32, FLOAT64, PLAIN_OF, compute_dtype
from ...arrays.rows import UniqueRows, values_of
from ...arrays.trees import Fixed, opened
from ...plan.extras import Extras
from ...plan.interface import ExclusiveUse
from ...plan.spec import PlanSpec
from ...programs.program import Operation, Program, narrowed
from ...rules.groups import Group, only_numbers_differ
from ...system.interrupts import deferred
from .arrays import DeviceArray, Producer
from .buffers import Memory, on_device, synchronize, wait_for
from .clipping import DeviceClipper
from .kernels import Step, Variant, operations_of
from .launching import Launch, Place, Sums, table_row
from .matrices import Bases, DeviceMatrices
from .rows import table_rows
from .stages import operations_at
from .stats import SumLaunch

_LARGEST = {dtype: float(np.finfo(dtype).max) for dtype in (FLOAT32, FLOAT64)}


@dataclass
class Bound:
    """The launches of a step for the same inputs.

    active: the leaves that take part; touched: elements of each. ahead: of each phase that products
    of `matrices` follow its launches, which write nothing but work space; commit: the launches
    that write parameters and states. sums: of squares, where a norm is wanted; table: what the
    `DeviceClipper` wants to know of them. stream: which alone may use their memory. others: the
    producers of all arrays that the step reads or writes, whose streams wait for the step, and the
    step for them; the arrays themselves are not kept alive.
    """

    active: np.ndarray
    touched: list[int]
    ahead: list[list[Queued]]
    matrices: list[int]
    commit: list[Queued]
    sums: Sums | None
    table: Memory | None
    stream: int
    others: set[Producer]


class Queued(NamedTuple):
    """A launch, its operations, the group of its leaves, and one of them, whose step count all
    have."""

    launch: Launch | SumLaunch
    operations: Sequence[Operation]
    group: int
    leaf: int


def _leaves(spec: Any, tree: Any) -> list[Any]:
    """Return the values at the leaves of a `Tree.spec`, in its order.

    A tree of another shape gives something else than one of that shape did.
    """
    if isinstance(spec, tuple):
        keys, children = spec
        fits = isinstance(tree, dict) and len(tree) == len(keys)
        nodes: Any = [tree.get(key, tree) for key in keys] if fits else []
    elif isinstance(spec, list):
        children = spec
        nodes = tree if isinstance(tree, (list, tuple)) and len(tree) == len(spec) else []
    else:  # a leaf, or None, which is no leaf
        return [] if spec is None and tree is None else [tree]
    found: list[Any] = []
    for child, node in zip(children, nodes, strict=False):
        if isinstance(child, int):
            found.append(node)
        else:
            found += _leaves(child, node)
    return found


class Known:
    """An input of the step before, which is not kept alive."""

    def __init__(self, g: DeviceArray) -> None:
        self._array, self._address = weakref.ref(g.owner), g.address
        self._tensor: Any = None
        library = device_interface.library_of(g.owner)
        if library == "torch":
            self._tensor = g.owner.dtype, g.owner.shape, g.owner.stride()
        elif library != g.library or not hasattr(g.owner, "__cuda_array_interface__"):
            raise TypeError("only its own exchange knows when this array may be read")

    def again(self, x: Any) -> bool:
        """Return whether this is the same array, or a tensor in its place, in the same memory."""
        if x is None:  # as a reference to what is gone is
            return False
        same = self._array() is x
        if self._tensor is None:
            return same
        if not same:  # backward has made a new one, where the old one was
            kind = device_interface.library_of(x) == "torch" and x.is_cuda
            same = kind and (x.dtype, x.shape, x.stride()) == self._tensor
        return same and bool(x.data_ptr() == self._address)


class Seen:
    """The inputs of the step before, None where a leaf had none."""

    def __init__(self, inputs: Sequence[DeviceArray | None]) -> None:
        self._known = [None if g is None else Known(g) for g in inputs]
        tensors = [
            g for g in inputs if g is not None and device_interface.library_of(g.owner) == "torch"
        ]
        whole = len(tensors) == len(inputs)
        self._references = [weakref.ref(g.owner) for g in tensors] if whole else []
        self._addresses = [g.address for g in tensors]

    def again(self, given: Sequence[Any]) -> bool:
        """Return whether these are the same arrays in the same memory."""
        if len(given) != len(self._known):
            return False
        # The usual case, without the checks of each array that the last line makes.
        same = map(is_, given, [reference() for reference in self._references])
        if self._references and all(same):
            with suppress(AttributeError):  # None, as a reference to what is gone is
                return [x.data_ptr() for x in given] == self._addresses
        pairs = zip(self._known, given, strict=True)
        return all(x is None if known is None else known.again(x) for known, x in pairs)


def selected_size(g: Any) -> int:
    """The number of elements that a gradient touches."""
    if isinstance(g, UniqueRows):
        return len(g.rows) * prod(g.values.shape[1:])
    return int(g.size)


class CudaPlan(ExclusiveUse):
    """One optimizer on a CUDA device."""

    def __init__(self, spec: PlanSpec, programs: Sequence[Program]) -> None:
        super().__init__()
        self._spec, self._programs = spec, programs
        self._parameters: list[Any] = [memory.caller for memory in spec.leaves]
        self._first = self._parameters[0]
        self._dtypes = [compute_dtype(m.parameter.format.dtype) for m in spec.leaves]
        tensors = [p for p in self._parameters if device_interface.library_of(p.owner) == "torch"]
        self._watched = [p.owner for p in tensors]
        self._watched_at = [p.address for p in tensors]
        outputs: Any = [a for memory in spec.leaves for a in memory.written]
        self._producers: set[Producer] = {a.producer for a in outputs}
        self._blocks = [block for block in self._producers if isinstance(block, Memory)]
        self._bound: Bound | None = None
        self._key: Any = None
        self._fixed: weakref.ref[Fixed] | None = None
        self._seen: Seen | None = None
        with on_device(self._first.device):
            self._matrices = DeviceMatrices(spec, programs, self._dtypes)
        self.work_bytes = self._matrices.nbytes
        self._places = [self._places_of(k) for k in range(len(spec.leaves))]
        self._clipper: DeviceClipper | None = None
        if spec.decide is not None and not spec.wait:
            clipper: Any = spec.decide
            with on_device(self._first.device):
                self._clipper = DeviceClipper(
                    spec, clipper, self._first, self._first.current_stream
                )

    def adopt(self, groups: Sequence[Group], extras: Extras) -> bool:
        """Take other rules for the groups; False if a new plan is needed."""
        programs = [extras.program(group.rule) for group in groups]
        pairs = zip(programs, self._programs, strict=True)
        if self._matrices.works and not only_numbers_differ(
            self._spec.groups, [g.rule for g in groups]
        ):
            return False
        if not all(new.fits(old) for new, old in pairs):
            return False
        self._spec = replace(self._spec, groups=groups, extras=extras)
        self._programs = programs
        self._bound = self._key = self._seen = self._fixed = None
        return True

    def step_alone(self, grads: Any, hessian: Any) -> int | None:
        """Take a whole step, which needs nothing around it, of the arrays of the step before."""
        with deferred():
            token = object()
            self.take(token)
            try:
                return self.step(grads, hessian)
            finally:
                self.give(token)

    def step(self, grads: Any, hessian: Any) -> int | None:
        """Take a step with the arrays of the step before; None where these are others."""
        with on_device(self._first.device):
            self._look(idle=False)
            if not self._known(grads, hessian):
                return None
            if hessian is None and isinstance(grads, Fixed):
                self._fixed = weakref.ref(grads)
            return self._run()

    def step_leaves(self, grads: Sequence[Any], hessian: Sequence[Any] | None) -> int | None:
        with on_device(self._first.device):
            self._look(idle=False)
            self._bind(grads, hessian)
            return self._run()

    def synchronize(self) -> None:
        with on_device(self._first.device):
            synchronize()  # also for steps on a stream that was the current one before
            self._look(idle=True)

    def _look(self, idle: bool) -> None:
        """Raise FloatingPointError where the device has refused a step."""
        if self._clipper is None:
            return
        try:
            self._clipper.look(idle)
        except FloatingPointError:
            # Leaves of one launch need not have the same step count any more.
            self._bound = self._key = self._seen = self._fixed = None
            raise

    # ---------------------------------------------------------------- what is given

    def _known(self, grads: Any, hessian: Any) -> bool:
        """Return whether these are the arrays, places and stream of the step before."""
        if self._bound is None or self._bound.stream != self._first.current_stream:
            return False
        fixed = self._fixed and self._fixed()
        if fixed is not None and grads is fixed and hessian is None:
            return True
        tree, seen = self._spec.tree, self._seen
        if seen is None or [p.data_ptr() for p in self._watched] != self._watched_at:
            return False
        given = _leaves(tree, opened(grads))
        if hessian is not None:
            given += _leaves(tree, opened(hessian))
        return seen.again(given)

    def _bind(self, grads: Sequence[Any], hessian: Sequence[Any] | None) -> None:
        estimates = [None] * len(grads) if hessian is None else hessian
        self._seen = self._fixed = None
        inputs = [values_of(g) for g in (*grads, *estimates) if g is not None]
        some = any(isinstance(g, UniqueRows) for g in grads)
        offsets = self._spec.counters[1:] - self._spec.counters[0]
        stream = self._first.current_stream
        key = (
            stream,
            [g if g is None else (g.address, g.dtype) for g in map(values_of, grads)],
            [g if g is None else (g.address, g.dtype) for g in map(values_of, estimates)],
            offsets.tobytes(),
        )
        if some or key != self._key:
            self._bound, self._key = None, None
            self._bound = self._bound_to(grads, estimates, inputs, stream)
            self._key = None if some else key  # other rows of the same address are another step
        if some:
            return
        with suppress(TypeError):  # what no weak reference can be made to is looked at every time
            self._seen = Seen([*grads, *(hessian or ())])

    def _bound_to(
        self, grads: Sequence[Any], estimates: Sequence[Any], inputs: Any, stream: int
    ) -> Bound:
        active = [k for k, g in enumerate(grads) if g is not None]
        matrices = [k for k in active if k in self._matrices.works]
        phases = max((self._programs[self._spec.group_of[k]].phases for k in matrices), default=1)
        inputs_of = active, grads, estimates, stream
        ahead = [self._launches(phase, True, *inputs_of) for phase in range(phases - 1)]
        commit = [q for phase in range(phases) for q in self._launches(phase, False, *inputs_of)]
        sums = table = None
        if self._spec.decide is not None:
            sums = Sums({k: grads[k] for k in active}, self._dtypes, stream)
            table = self._clipper.table(sums, stream) if self._clipper else None
        others = self._producers | {g.producer for g in inputs}
        if not isinstance(self._first.producer, Memory):  # whose stream is the step's
            others.discard(self._first.producer)
        took_part = np.array(active, np.int64)
        touched = [selected_size(grads[k]) for k in active]
        return Bound(took_part, touched, ahead, matrices, commit, sums, table, stream, others)

    def _launches(
        self,
        phase: int,
        ahead: bool,
        active: Sequence[int],
        grads: Any,
        estimates: Any,
        stream: int,
    ) -> list[Queued]:
        """The launches of a phase. ahead: those that write work space, otherwise the others.

        Nothing is written to a parameter or a state before the last of the library's products,
        which may fail.
        """
        spec = self._spec
        alike: dict[Any, list[int]] = {}
        for k in active:
            variant = self._variant(k, phase, ahead, grads[k], estimates[k])
            if variant.steps:
                key = variant, spec.group_of[k], int(spec.counters[k + 1])
                alike.setdefault(key, []).append(k)
        made = []
        for (variant, group, _), members in alike.items():
            refreshed = estimates[members[0]] is not None
            made += self._sums(variant, phase, members, grads, estimates, stream)
            operations, _ = operations_at(self._programs[group], phase, ahead, refreshed)
            rows: list[list[int]] = []
            for k in members:
                rows += self._rows(k, variant, grads[k], estimates[k])
            launch = Launch(variant, rows, self._first.device, stream)
            made.append(Queued(launch, operations, group, members[0]))
        return made

    def _sums(
        self,
        variant: Variant,
        phase: int,
        members: Sequence[int],
        grads: Any,
        estimates: Any,
        stream: int,
    ) -> list[Queued]:
        """The sums of a phase over the leaves of one launch, which come before it."""
        group, refreshed = self._spec.group_of[members[0]], estimates[members[0]] is not None
        program = self._programs[group]
        operations = operations_of(program, phase, refreshed, sums=True)
        names = [op.operands[0] for op in operations if op.loop == "sum"]
        if not names:
            return []
        steps = tuple(Step.of(program, op) for op in operations)
        variant = Variant(steps, program.temporaries, variant.dtype, variant.formats)
        leaves = {}
        for k in members:
            places = self._places_with(k, grads[k], estimates[k])
            leaves[k] = grads[k], [places[name] for name, _ in variant.arrays]
        columns = [3 + program.sums.index(name) for name in names]
        launch = SumLaunch(variant, leaves, columns, self._first.device, stream)
        return [Queued(launch, operations, group, members[0])]

    def _variant(self, k: int, phase: int, ahead: bool, g: Any, estimate: Any) -> Variant:
        program, memory = self._programs[self._spec.group_of[k]], self._spec.leaves[k]
        formats = [("g", PLAIN_OF[values_of(g).dtype]), ("p", memory.parameter.format)]
        if estimate is not None:
            formats.append(("hessian", PLAIN_OF[values_of(estimate).dtype]))
        formats += [(name, state.format) for name, state in memory.states.items()]
        works = self._matrices.works.get(k, ())
        formats += [(name, PLAIN_OF[self._dtypes[k]]) for name in works]
        _, steps = operations_at(program, phase, ahead, estimate is not None)
        return Variant(
            steps,
            program.temporaries,
            self._dtypes[k],
            tuple(formats),
            tuple(PLAIN_OF[a.dtype] for a in memory.mirrors),
            self._spec.zero_grads,
            self._clipper is not None,
        )

    def _places_of(self, k: int) -> dict[str, Place]:
        """The places of all arrays of a leaf but its inputs."""
        memory, keys = self._spec.leaves[k], self._spec.keys[k]
        own = {"p": memory.parameter, **memory.states}
        found = {n: Place.of(a, key.key) for (n, a), key in zip(own.items(), keys, strict=True)}
        found |= {name: Place.of(a) for name, a in self._matrices.works.get(k, {}).items()}
        return found | {f"copy{j}": Place.of(a) for j, a in enumerate(memory.mirrors)}

    def _places_with(self, k: int, g: Any, estimate: Any) -> dict[str, Place]:
        """The places of all arrays of a leaf."""
        inputs = {"g": Place.of(values_of(g))}
        if estimate is not None:
            inputs["hessian"] = Place.of(values_of(estimate))
        return self._places[k] | inputs

    def _rows(self, k: int, variant: Variant, g: Any, estimate: Any) -> list[list[int]]:
        """Return the rows of a launch's table for a leaf."""
        places = self._places_with(k, g, estimate)
        first_tile = self._spec.keys[k][0].first_tile
        if isinstance(g, UniqueRows):
            numbers = {"p": g.rows, "g": g.places}
            if estimate is not None:
                numbers["hessian"] = estimate.places
            return table_rows(variant, places, numbers, prod(g.values.shape[1:]), first_tile)
        own = [places[name] for name, _ in variant.arrays]
        return [table_row(g.size, own, first_tile)]

    # ---------------------------------------------------------------- the step

    def _run(self) -> int:
        assert self._bound is not None
        bound, spec, stream = self._bound, self._spec, self._bound.stream
        others = {producer.written_on for producer in bound.others} - {stream}
        for other in others:
            wait_for(stream, other)
        for block in self._blocks:
            block.written_on = stream
        number = int(spec.counters[0]) + 1
        bases = {k: self._bases(k, stream) for k in bound.matrices}
        if bound.sums is not None:
            spec.results[...] = 0
            bound.sums.queue(stream)
            if self._clipper is not None and bound.table is not None:
                self._clipper.queue(bound.sums, bound.table, number, stream)
            elif not self._decided(bound.sums, stream):
                return number - 1
        # All that may fail comes before the first that writes a parameter or a state.
        commit = self._prepared(bound.commit)
        if bound.matrices:
            self._multiply(bound, bases, stream)
        for launch, values, more in commit:
            launch.run(values, stream, *more)
        for other in others:
            wait_for(other, stream)
        if spec.extras.stats:
            self._read_sums(bound, stream)
        counters = spec.counters
        if bound.active.size == len(self._parameters):
            counters += 1
        else:
            counters[1:][bound.active] += 1
            counters[0] = number
        if self._clipper is not None:
            self._clipper.note(number, bound.active, stream)
        return number

    def _read_sums(self, bound: Bound, stream: int) -> None:
        """Fill in the results of a step, when they are there."""
        results = self._spec.results
        if bound.sums is None:
            results[...] = 0
            results[bound.active, 1] = 1
        results[bound.active, 2] = bound.touched
        for launch, *_ in chain(*bound.ahead, bound.commit):
            if isinstance(launch, SumLaunch):
                launch.read(results, stream)

    def _prepared(self, launches: Sequence[Queued]) -> list[tuple[Any, list[float], list[int]]]:
        """Launches with the scalars and the further words of a step."""
        spec, clipper = self._spec, self._clipper
        prepared = []
        for launch, operations, group, leaf in launches:
            lr, program = float(spec.rates[group]), self._programs[group]
            # A clipper's kernel applies the factor, which it alone knows.
            factor = 1.0 if clipper else float(spec.factors[group])
            t = int(spec.counters[leaf + 1]) + 1
            values: list[float] = []
            for op in operations:
                own = program.scalars(op, t, lr, factor)
                if not sum(map(abs, own)) <= _LARGEST[launch.dtype]:  # looked at one by one
                    narrowed(own, launch.dtype, op, t, lr)
                values += own
            more = [clipper.factor(group, launch.dtype)] if clipper else []
            prepared.append((launch, values, more + [t - 1] * launch.random))
        return prepared

    def _bases(self, k: int, stream: int) -> Mapping[str, DeviceArray]:
        """The side states of a leaf that are found on the host before a step."""
        spec, t = self._spec, int(self._spec.counters[k + 1]) + 1
        rule: Any = spec.groups[spec.group_of[k]].rule
        return self._matrices.bases(k, rule, t, lambda: self._look(idle=True), stream)

    def _multiply(self, bound: Bound, bases: Bases, stream: int) -> None:
        """Do all that comes before the last phase of rules for matrices, and write side states."""
        spec, new = self._spec, []
        rules: dict[int, Any] = {k: spec.groups[spec.group_of[k]].rule for k in bound.matrices}
        with self._matrices.on_stream(stream):
            for phase, launches in enumerate(bound.ahead):
                self._matrices.begin(phase, bound.matrices)
                for launch, values, more in self._prepared(launches):
                    launch.run(values, stream, *more)
                new += self._matrices.between(phase, rules, bases, self._clipper)
            for side, value in new:
                side[...] = value

    def _decided(self, sums: Sums, stream: int) -> bool:
        """Return what `decide` says to sums that were queued: the one place where a step waits."""
        self._spec.results[sums.leaves, :2] = sums.found(stream)
        assert self._spec.decide is not None
        return self._spec.decide()
