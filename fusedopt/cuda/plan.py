"""An optimizer's steps on a device: one launch for all leaves of a rule, format and step count."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..backends.base import HEAD, Layout, Turn
from ..formats import PLAIN, compute_dtype
from ..rules.base import Operation, Program
from ..states import Wanted
from ..trees import Fixed, opened
from . import foreign
from .arrays import DeviceArray, Producer
from .guard import DeviceGuard
from .kernels import Step, Variant, operations_of
from .launching import Launch, Place, Sums
from .matrices import Library
from .memory import Memory, on_device, synchronize, wait_for
from .space import new_arrays


@dataclass
class Bound:
    """What a step launches for the same inputs.

    active: the leaves that take part. before, after: launches, in whose midst are the products of
    `matrices`. sums: of squares, where a norm is wanted; table: what the `DeviceGuard` wants to
    know of them. stream: which alone may use their memory. others: the producers of all arrays that
    the step reads or writes, whose streams wait for the step, and the step for them; the arrays
    themselves are not kept alive.
    """

    active: np.ndarray
    before: list[Queued]
    matrices: list[int]
    after: list[Queued]
    sums: Sums | None
    table: Memory | None
    stream: int
    others: set[Producer]


class Queued(NamedTuple):
    """A launch, its operations, the group of its leaves, and one of them, whose step count all
    have."""

    launch: Launch
    operations: list[Operation]
    group: int
    leaf: int


def _leaves(spec: Any, tree: Any) -> Iterator[Any]:
    """What stands at the leaves of a `Tree.spec`, in its order; where the tree has another shape,
    something else than there was in one of its shape."""
    if isinstance(spec, tuple):
        fits = isinstance(tree, dict) and len(tree) == len(spec[0])
        for key, child in zip(*spec, strict=True) if fits else ():
            yield from _leaves(child, tree.get(key, tree))
    elif isinstance(spec, list):
        fits = isinstance(tree, (list, tuple)) and len(tree) == len(spec)
        for child, x in zip(spec, tree, strict=True) if fits else ():
            yield from _leaves(child, x)
    else:
        yield tree


class Known:
    """An input of the step before, which is not kept alive."""

    def __init__(self, g: DeviceArray) -> None:
        self._array, self._address = weakref.ref(g.owner), g.address
        self._tensor: Any = None
        library = foreign.library_of(g.owner)
        if library == "torch":
            self._tensor = g.owner.dtype, g.owner.shape, g.owner.stride()
        elif library != g.library or not hasattr(g.owner, "__cuda_array_interface__"):
            raise TypeError("only its own exchange knows when this array may be read")

    def again(self, x: Any) -> bool:
        """Whether this is the same array, or a tensor in its place, in the same memory."""
        if x is None:  # as a reference to what is gone is
            return False
        same = self._array() is x
        if self._tensor is None:
            return same
        if not same:  # backward has made a new one, where the old one was
            kind = foreign.library_of(x) == "torch" and x.is_cuda
            same = kind and (x.dtype, x.shape, x.stride()) == self._tensor
        return same and bool(x.data_ptr() == self._address)


class CudaPlan(Turn):
    """One optimizer on a CUDA device."""

    def __init__(self, layout: Layout, programs: Sequence[Program]) -> None:
        super().__init__()
        self._layout, self._programs = layout, programs
        self._parameters: list[Any] = [memory.caller for memory in layout.leaves]
        self._first = self._parameters[0]
        self._dtypes = [compute_dtype(m.parameter.format.dtype) for m in layout.leaves]
        self._watched = [p for p in self._parameters if foreign.library_of(p.owner) == "torch"]
        outputs: Any = [a for memory in layout.leaves for a in memory.written]
        self._producers: set[Producer] = {a.producer for a in outputs}
        self._bound: Bound | None = None
        self._key: Any = None
        self._fixed: weakref.ref[Fixed] | None = None
        self._seen: list[Known | None] | None = None
        self._make_work_space()
        self._places = [self._places_of(k) for k in range(len(layout.leaves))]
        self._guard: DeviceGuard | None = None
        if layout.decide is not None and not layout.wait:
            guard: Any = layout.decide
            with on_device(self._first.device):
                self._guard = DeviceGuard(layout, guard, self._first, self._first.current_stream)

    def _make_work_space(self) -> None:
        """Directions of the leaves whose rule has two phases."""
        phased = [k for k, g in enumerate(self._layout.group_of) if self._programs[g].phases > 1]
        library = Library(self._first.library) if phased else None
        wanted = [Wanted(PLAIN[self._dtypes[k].name], self._parameters[k]) for k in phased]
        with on_device(self._first.device):
            arrays: list[Any] = [stored.data for stored in new_arrays(wanted)]
            self._work = dict(zip(phased, arrays, strict=True))
            self._views = {k: library.view(a) for k, a in self._work.items() if library}
        self._library = library
        self.work_bytes = sum(a.nbytes for a in arrays)

    def step(self, grads: Any, hessian: Any, flat: bool) -> int | None:
        with on_device(self._first.device):
            self._look(idle=False)
            if flat:
                self._bind(grads, hessian)
            elif not self._known(grads, hessian):
                return None
            elif hessian is None and isinstance(grads, Fixed):
                self._fixed = weakref.ref(grads)
            return self._run()

    def synchronize(self) -> None:
        with on_device(self._first.device):
            synchronize()  # also for steps on a stream that was the current one before
            self._look(idle=True)

    def _look(self, idle: bool) -> None:
        """FloatingPointError where the device has refused a step."""
        if self._guard is None:
            return
        try:
            self._guard.look(idle)
        except FloatingPointError:
            # Leaves of one launch need not have the same step count any more.
            self._bound = self._key = self._seen = self._fixed = None
            raise

    # ---------------------------------------------------------------- what is given

    def _known(self, grads: Any, hessian: Any) -> bool:
        """Whether these are the arrays of the step before, in the same places, on its stream."""
        if self._bound is None or self._bound.stream != self._first.current_stream:
            return False
        fixed = self._fixed and self._fixed()
        if fixed is not None and grads is fixed and hessian is None:
            return True
        tree, seen = self._layout.tree, self._seen
        given = list(_leaves(tree, opened(grads)))
        given += [None] if hessian is None else _leaves(tree, opened(hessian))
        if seen is None or len(seen) != len(given) or not all(p.unmoved for p in self._watched):
            return False
        return all(
            x is None if known is None else known.again(x)
            for known, x in zip(seen, given, strict=True)
        )

    def _bind(self, grads: Sequence[Any], hessian: Sequence[Any] | None) -> None:
        estimates = [None] * len(grads) if hessian is None else hessian
        self._seen = self._fixed = None
        inputs = [g for g in (*grads, *estimates) if g is not None]
        offsets = self._layout.counters[1:] - self._layout.counters[0]
        stream = self._first.current_stream
        key = (
            stream,
            [None if g is None else (g.address, g.dtype) for g in (*grads, *estimates)],
            offsets.tobytes(),
        )
        if key != self._key:
            self._bound, self._key = None, None
            self._bound = self._bound_to(grads, estimates, inputs, stream)
            self._key = key
        with suppress(TypeError):  # what no weak reference can be made to is looked at every time
            given = [*grads, *([None] if hessian is None else hessian)]
            self._seen = [None if g is None else Known(g) for g in given]

    def _bound_to(
        self, grads: Sequence[Any], estimates: Sequence[Any], inputs: Any, stream: int
    ) -> Bound:
        active = [k for k, g in enumerate(grads) if g is not None]
        first, second = (self._launches(p, active, grads, estimates, stream) for p in (0, 1))
        # Nothing is written to a parameter before the library's products, which may fail.
        before = [queued for queued in first if queued.leaf in self._work]
        after = [*second, *(queued for queued in first if queued.leaf not in self._work)]
        matrices = [k for k in active if k in self._work]
        sums = table = None
        if self._layout.decide is not None:
            sums = Sums({k: grads[k] for k in active}, self._dtypes, stream)
            table = self._guard.table(sums, stream) if self._guard else None
        others = self._producers | {g.producer for g in inputs}
        took_part = np.array(active, np.int64)
        return Bound(took_part, before, matrices, after, sums, table, stream, others)

    def _launches(
        self, phase: int, active: Sequence[int], grads: Any, estimates: Any, stream: int
    ) -> list[Queued]:
        layout = self._layout
        alike: dict[Any, list[int]] = {}
        for k in active:
            variant = self._variant(k, phase, grads[k], estimates[k])
            if variant.steps:
                key = variant, layout.group_of[k], int(layout.counters[k + 1])
                alike.setdefault(key, []).append(k)
        made = []
        for (variant, group, _), members in alike.items():
            refreshed = estimates[members[0]] is not None
            operations = operations_of(self._programs[group], phase, refreshed)
            leaves = [self._leaf(k, variant, grads[k], estimates[k]) for k in members]
            launch = Launch(variant, leaves, self._first.device, stream)
            made.append(Queued(launch, operations, group, members[0]))
        return made

    def _variant(self, k: int, phase: int, g: Any, estimate: Any) -> Variant:
        program, memory = self._programs[self._layout.group_of[k]], self._layout.leaves[k]
        formats = [("g", PLAIN[g.dtype.name]), ("p", memory.parameter.format)]
        if estimate is not None:
            formats.append(("hessian", PLAIN[estimate.dtype.name]))
        formats += [(name, state.format) for name, state in memory.states.items()]
        if program.phases > 1:
            formats.append(("work", PLAIN[self._dtypes[k].name]))
        operations = operations_of(program, phase, estimate is not None)
        return Variant(
            tuple(Step.of(program, op) for op in operations),
            program.scratch,
            self._dtypes[k],
            tuple(formats),
            tuple(PLAIN[a.dtype.name] for a in memory.mirrors),
            self._layout.zero_grads,
            self._guard is not None,
        )

    def _places_of(self, k: int) -> dict[str, Place]:
        """The places of all arrays of a leaf but its inputs."""
        memory, keys = self._layout.leaves[k], self._layout.keys[k]
        own = {"p": memory.parameter, **memory.states}
        found = {name: Place.of(a, key) for (name, a), key in zip(own.items(), keys, strict=True)}
        if k in self._work:
            found["work"] = Place.of(self._work[k])
        return found | {f"copy{j}": Place.of(a) for j, a in enumerate(memory.mirrors)}

    def _leaf(self, k: int, variant: Variant, g: Any, estimate: Any) -> tuple[int, list[Place]]:
        """A leaf as a launch takes it."""
        places = self._places[k] | {"g": Place.of(g)}
        if estimate is not None:
            places["hessian"] = Place.of(estimate)
        return g.size, [places[name] for name, _ in variant.arrays]

    # ---------------------------------------------------------------- the step

    def _run(self) -> int:
        assert self._bound is not None
        bound, layout, stream = self._bound, self._layout, self._bound.stream
        others = {producer.written_on for producer in bound.others} - {stream}
        for other in others:
            wait_for(stream, other)
        for producer in self._producers:
            if isinstance(producer, Memory):
                producer.written_on = stream
        layout.results[...] = 0
        number = int(layout.counters[0]) + 1
        if bound.sums is not None:
            bound.sums.queue(stream)
            if self._guard is not None and bound.table is not None:
                self._guard.queue(bound.sums, bound.table, number, stream)
            elif not self._decided(bound.sums, stream):
                return number - 1
        self._launch(bound.before, stream)
        if bound.matrices:
            self._orthogonalize(bound.matrices, stream)
        self._launch(bound.after, stream)
        for other in others:
            wait_for(other, stream)
        layout.counters[1:][bound.active] += 1
        layout.counters[0] = number
        if self._guard is not None:
            self._guard.note(number, bound.active, stream)
        return number

    def _launch(self, launches: Sequence[Queued], stream: int) -> None:
        layout = self._layout
        for launch, operations, group, leaf in launches:
            program, lr = self._programs[group], float(layout.rates[group])
            sign, base, slope = program.head
            # With a guard the kernel puts the factor, which it alone knows, on this sign.
            factor = 1.0 if self._guard else float(layout.rates[len(layout.groups) + group])
            factor *= sign
            filtered = any(op.loop == "filter" for op in program.operations)
            heads = {1: (factor,), 2: (1.0 if filtered else factor, base + slope * lr), 0: ()}
            t = int(layout.counters[leaf + 1]) + 1
            values = [x for op in operations for x in (*heads[HEAD[op.loop]], *op.scalars(t, lr))]
            more = [self._guard.factor(group, launch.dtype)] if self._guard else []
            more += [t - 1] * launch.random
            launch.run(np.array(values, np.float64).astype(launch.dtype), stream, *more)

    def _orthogonalize(self, leaves: Sequence[int], stream: int) -> None:
        assert self._library is not None
        with self._library.on_stream(stream, self._first.device):
            for k in leaves:
                rule: Any = self._layout.groups[self._layout.group_of[k]].rule
                stack = rule.matrices(self._parameters[k].shape)
                if self._parameters[k].size:
                    factor = rule.factor(*stack[1:])
                    self._library.orthogonalize(self._views[k], stack, rule.iteration, factor)

    def _decided(self, sums: Sums, stream: int) -> bool:
        """What `decide` says to sums that were queued: the one place where a step waits."""
        self._layout.results[sums.leaves, :2] = sums.found(stream)
        assert self._layout.decide is not None
        return self._layout.decide()
