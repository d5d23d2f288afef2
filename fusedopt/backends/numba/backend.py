"""The rules' element functions, compiled by Numba; the bits are those of the compiled core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...arrays import host
from ...arrays.formats import DTYPES, PLAIN_OF, TILE, RandomKey, compute_dtype
from ...arrays.rows import UniqueRows, values_of
from ...arrays.stored import Stored
from ...jit import unavailable
from ...jit.operations import tile_function
from ...plan.extras import Extras
from ...plan.interface import ExclusiveUse, Plan
from ...plan.pools import Pools
from ...plan.spec import HALFWAY, INPUTS, PlanSpec
from ...programs.program import Program, narrowed
from ...rules.groups import Group
from ..matrices import Matrices

GRADIENT, HESSIAN, PARAMETER = range(3)


class NumbaBackend:
    """Kernels that Numba compiles on NumPy arrays."""

    name = "numba"
    textbook = False
    takes_means = False
    update_alone = None
    device = host

    def unavailable(self) -> str | None:
        return unavailable()

    def describe(self) -> str:
        import llvmlite.binding
        import numba

        return f"Numba {numba.__version__}, {llvmlite.binding.get_host_cpu_name()}"

    def plan(self, spec: PlanSpec) -> Plan:
        return NumbaPlan(spec)

    def sums_of_squares(self, arrays: Sequence[Any]) -> Sequence[tuple[float, float]] | None:
        from .tables import sums_of_dense

        for a in arrays:
            if type(a) is not np.ndarray or a.dtype not in DTYPES or not a.flags.aligned:
                return None
            if not a.flags.forc:
                return None

        return sums_of_dense(arrays)


def selected_size(gradient: Any) -> int:
    """Return the number of elements of a parameter that a step touches."""
    if isinstance(gradient, UniqueRows):
        return len(gradient.rows) * int(gradient.values[:1].size)
    return int(gradient.size)


@dataclass(frozen=True)
class Op:
    """One operation of a program for one compute type. used, written, summed, maxima: slots, as
    bits."""

    run: int
    slots: list[int]
    used: int
    written: int
    summed: int
    maxima: int
    phase: int
    needs: str | None


def _compiled(program: Program, dtype: np.dtype) -> list[Op]:
    names = (*INPUTS, *program.arrays, *program.temporaries, *program.sums)
    slots = {name: k for k, name in enumerate(names)}
    ops = []
    for op in program.operations:
        places = [slots[name] for name in op.operands]
        changed = places[:1]
        if op.loop == "measure":
            changed = places[: len(op.sums)]
        elif op.loop == "rule":
            changed += places[2:] if op.written is None else places[2 : 2 + op.written]
        elif op.loop == "peek":
            changed = places[-1:]
        used, written = (sum(1 << k for k in bits) for bits in (places, changed))
        summed = written if op.sums else 0
        maxima = sum(1 << k for k in changed[len(changed) - op.maxima :])
        run = tile_function(program, op, dtype).address
        ops.append(Op(run, places, used, written - summed, summed, maxima, op.phase, op.needs))
    return ops


Folded = list[np.ndarray]
"""The scalars of each operation of a program."""


class NumbaPlan(ExclusiveUse):
    """One optimizer on Numba's kernels."""

    def __init__(self, spec: PlanSpec) -> None:
        super().__init__()
        self._spec, self._pools = spec, Pools(spec)
        self._programs = programs = self._pools.programs
        self._matrices = Matrices(spec)
        self.work_bytes = self._matrices.work_bytes
        self._dtypes = [compute_dtype(m.parameter.format.dtype) for m in spec.leaves]
        kinds = dict.fromkeys(zip(spec.group_of, self._dtypes, strict=True))
        self._ops = {(g, dtype): _compiled(programs[g], dtype) for g, dtype in kinds}
        self._random: list[tuple[int, int, RandomKey]] = []  # operand, leaf, key
        self._row_sums: dict[int, np.ndarray] = {}  # of leaves by row: of each sum, every row's
        self._lay_out()

    def adopt(self, groups: Sequence[Group], extras: Extras) -> bool:
        """Take other rules for the groups; False if a new plan is needed."""
        pools = self._pools.succeeded(groups, extras)
        programs = pools.programs
        pairs = zip(programs, self._programs, strict=True)
        if not all(new.fits(old) for new, old in pairs) or not self._matrices.adopt(groups):
            return False
        self._pools = pools
        self._ops = {(g, dtype): _compiled(programs[g], dtype) for g, dtype in self._ops}
        self._programs = programs
        return True

    def _lay_out(self) -> None:
        """Fill in what stays the same from step to step: the operands but for the inputs."""
        from ...jit.driver import OPERAND

        rows = [self._row(k) for k in range(len(self._spec.leaves))]
        self._counts = [len(row) for row in rows]
        self._starts = [0, *np.cumsum(self._counts).tolist()]
        self._operands = np.concatenate([*rows, np.zeros(0, OPERAND)])

    def _row(self, k: int) -> np.ndarray:
        from ...jit.driver import INPUT, OPERAND, SCRATCH, SUMS

        leaf_state, dtype = self._spec.leaves[k], self._dtypes[k]
        program = self._programs[self._spec.group_of[k]]
        work = [Stored.plain(a) for a in self._matrices.work.get(k, ())]
        arrays = [*leaf_state.operands, *work]
        temporaries = PARAMETER + len(arrays)
        sums = temporaries + len(program.temporaries)
        mirrors = sums + len(program.sums)
        row = np.zeros(mirrors + len(leaf_state.mirrors), OPERAND)
        row["source"] = -1
        row["role"][:PARAMETER] = INPUT
        row["role"][temporaries:sums], row["role"][sums:mirrors] = SCRATCH, SUMS
        for place, stored in enumerate(arrays, PARAMETER):
            self._set(row[place], stored, dtype)
            if stored.format.random:
                self._random.append((place, k, self._spec.keys[k][place - PARAMETER]))
        for place, mirror in enumerate(leaf_state.mirrors, mirrors):
            self._set(row[place], Stored.plain(mirror), dtype, copy=True)
        return row

    @staticmethod
    def _set(row: Any, stored: Stored, dtype: np.dtype, copy: bool = False) -> None:
        from ...jit import tiles
        from .tables import address

        row["data"], row["bits"] = address(stored.data), stored.format.bits
        if stored.aux is not None:
            row["aux"] = address(stored.aux)
            row["aux_bytes"] = TILE // stored.format.block * stored.aux.itemsize
        if copy:
            row["source"] = PARAMETER
        elif stored.format is PLAIN_OF[dtype]:
            return  # used where it lies
        else:
            row["decode"] = tiles.decoder(stored.format, dtype).address
        row["encode"] = tiles.encoder(stored.format, dtype, copy).address

    def step_leaves(self, grads: Sequence[Any], hessian: Sequence[Any] | None) -> int | None:
        spec = self._spec
        active = [k for k, g in enumerate(grads) if g is not None]
        self._take(GRADIENT, active, grads)
        self._take(HESSIAN, active, hessian)
        spec.results[...] = 0
        if any(program.sums for program in self._programs):
            spec.results[active, 1] = 1
            for k in active:
                spec.results[k, 2] = selected_size(grads[k])
        if spec.decide is not None:
            self._measure(active, grads)
            if not spec.decide():
                return int(spec.counters[0])
        for place, k, key in self._random:
            at = self._starts[k] + place
            self._operands[at]["key"] = key.after(int(spec.counters[k + 1]))
        scalars = self._folded(active)
        measuring = [k for k in active if self._programs[spec.group_of[k]].measures]
        kept = []
        if measuring:
            self._run(measuring, 0, scalars, grads)
            kept = self._pools.combine(measuring)
            scalars.update({k: self._with_measured(k, scalars[k]) for k in measuring})
        batches = self._matrices.batches
        if batches:
            self._matrices.before(active)
        begun = False
        try:
            for batch in sorted({batches[k] for k in active if k in batches}):
                members = [k for k in active if batches.get(k) == batch]
                for phase in range(self._programs[spec.group_of[members[0]]].phases - 1):
                    self._run(members, phase, scalars, grads)
                    # Only work space has been written, unless there are side states.
                    begun = begun or phase > 0 or self._matrices.sided
                    self._matrices.between(batch, phase, members)
                begun = True
                self._run(members, None, scalars, grads)
            self._run([k for k in active if k not in batches], None, scalars, grads)
            begun = True
            self._pools.keep(kept)
        except BaseException:
            if begun:
                spec.counters[0] = HALFWAY
            raise
        spec.counters[1:][active] += 1
        spec.counters[0] += 1
        return int(spec.counters[0])

    def _take(self, slot: int, active: Sequence[int], inputs: Any) -> None:
        """Put a step's inputs in their places; without one, `data` is 0."""
        from .tables import take_input

        self._operands["data"][[start + slot for start in self._starts[:-1]]] = 0
        zeroed = slot == GRADIENT and self._spec.zero_grads
        for k in active if inputs is not None else ():
            if inputs[k] is not None:
                row = self._operands[self._starts[k] + slot]
                take_input(row, values_of(inputs[k]), self._dtypes[k], zeroed)

    def _measure(self, active: Sequence[int], grads: Any) -> None:
        from .tables import sums_of_squares

        found = sums_of_squares(
            [grads[k] for k in active], [self._dtypes[k] for k in active], self._spec.threads
        )
        for k, result in zip(active, found, strict=True):
            self._spec.results[k, :2] = result

    def _folded(self, active: Sequence[int]) -> dict[int, Folded]:
        """The scalars of each leaf; those of one rule, compute type and step share theirs."""
        spec, shared, folded = self._spec, dict[Any, Folded](), {}
        for k in active:
            g, dtype, t = kind = spec.group_of[k], self._dtypes[k], self._next(k)
            if kind not in shared:
                program, lr = self._programs[g], float(spec.rates[g])
                factor = float(spec.factors[g])
                shared[kind] = [
                    narrowed(program.scalars(op, t, lr, factor), dtype, op, t, lr)
                    for op in program.operations
                ]
            folded[k] = shared[kind]
        return folded

    def _with_measured(self, k: int, scalars: Folded) -> Folded:
        """Return the scalars of a leaf with those that its sums give."""
        spec, g = self._spec, self._spec.group_of[k]
        program = self._programs[g]
        t, lr = self._next(k), float(spec.rates[g])

        first = 3 + len(program.told)
        own_sums = spec.results[k, first : first + program.measures]
        if program.axis is not None:
            sums = self._row_sums.get(k, own_sums[:, None])
            if not sums.size or not spec.leaves[k].parameter.size:  # there are no rows
                return scalars
            found = program.measured(t, lr, sums.copy()).T
        else:
            sums = own_sums
            found = np.array(program.measured(t, lr, tuple(sums.tolist())), np.float64)
        # Sums that are not finite give scalars that are not, as the elements are not.
        finite = np.isfinite(sums).all(axis=0)
        full = []
        for op, own in zip(program.operations, scalars, strict=True):
            if op.measured:
                before = np.broadcast_to(
                    own[: -op.measured], (*finite.shape, own.size - op.measured)
                )
                values = np.concatenate((before, found), axis=-1)
                own = narrowed(values, own.dtype, op, t, lr, finite)
            full.append(own)
        return full

    def _next(self, k: int) -> int:
        """The number of a leaf's next step."""
        return int(self._spec.counters[k + 1]) + 1

    def _run(
        self,
        members: Sequence[int],
        phase: int | None,
        scalars: dict[int, Folded],
        grads: Sequence[Any],
    ) -> None:
        """Run a phase of some leaves; None: the last of each."""
        from .tables import Table

        table = Table(self._operands)
        made: dict[Any, tuple[tuple[int, int], int, int, int, int]] = {}
        summed = {}
        for k in members:
            first, count = self._starts[k], self._counts[k]
            refreshed = bool(self._operands[first + HESSIAN]["data"])
            key = id(scalars[k]), refreshed
            if key not in made:
                made[key] = self._steps(table, k, phase, refreshed, scalars[k])
            steps, used, written, sums, maxima = made[key]
            if written >> PARAMETER & 1:
                mirrors = len(self._spec.leaves[k].mirrors)
                copies = ((1 << mirrors) - 1) << (count - mirrors)
                zeroed = int(self._spec.zero_grads) << GRADIENT
                used, written = used | copies, written | copies | zeroed
            p = self._spec.leaves[k].parameter
            rows = self._programs[self._spec.group_of[k]].slices(p.shape)
            leaf = table.add_leaf(
                p.size, first, count, steps, used, written, sums, maxima, grads[k], rows
            )
            summed[k] = leaf, sums, rows
        self._spec.check_unmoved()
        total = table.run(self._spec.threads)
        for k, (leaf, sums, rows) in summed.items():
            program = self._programs[self._spec.group_of[k]]
            at = PARAMETER + len(program.arrays) + len(program.temporaries)
            own = [j for j in range(len(program.sums)) if sums >> (at + j) & 1]
            for j in own:
                self._spec.results[k, 3 + j] = total(leaf, at + j)
            if rows and phase == 0:
                found = [total(leaf, at + j, True) for j in own[-program.measures :]]
                self._row_sums[k] = np.stack(found)

    def _steps(
        self, table: Any, k: int, phase: int | None, refreshed: bool, scalars: Folded
    ) -> tuple[tuple[int, int], int, int, int, int]:
        """Add a program's steps: the first and their count; operands used, written, summed, and
        which of the last are maxima."""
        numbers, used, written, summed, maxima = [0], 0, 0, 0, 0
        g = self._spec.group_of[k]
        if phase is None:
            phase = self._programs[g].phases - 1
        for op, values in zip(self._ops[g, self._dtypes[k]], scalars, strict=True):
            if op.phase == phase and (op.needs is None or refreshed):
                numbers.append(table.add_step(op.run, values, op.slots))
                used, written = used | op.used, written | op.written
                summed, maxima = summed | op.summed, maxima | op.maxima
        return (numbers[-1] - len(numbers) + 2, len(numbers) - 1), used, written, summed, maxima
