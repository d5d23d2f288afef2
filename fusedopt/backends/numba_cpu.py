"""The rules' element functions, compiled by Numba; the bits are those of the compiled core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..formats import PLAIN, Format, compute_dtype, subkey
from ..interrupts import deferred
from ..rules import Nesterov, Rule
from ..rules.base import Operation, Program
from ..states import Memory, Stored
from ..threads import in_use
from .base import Group, Layout, Plan, single
from .matrices import Matrices
from .pool import parallel_for

INPUTS = ("g", "hessian")
GRADIENT, HESSIAN, PARAMETER = 0, 1, 2

# Python's threads take 0.1 ms to wake, several times as long as the core's.
SERIAL = 1 << 18
SMALLEST_PART = 1 << 16
PARTS_PER_THREAD = 16


class NumbaBackend:
    """Kernels that Numba compiles on NumPy arrays."""

    name = "numba"
    native = False

    def unavailable(self) -> str | None:
        try:
            from ..jit import driver  # noqa: F401  # 0.5 s, for those who ask
        except ImportError as error:
            return f"Numba could not be imported ({error}); pip install 'fusedopt[numba]' adds it"
        return None

    def describe(self) -> str:
        import llvmlite.binding
        import numba

        return f"Numba {numba.__version__}, {llvmlite.binding.get_host_cpu_name()}"

    def plan(self, layout: Layout) -> Plan:
        return NumbaPlan(layout, [group.rule.program for group in layout.groups])

    def update(
        self,
        rule: Rule,
        t: int,
        lr: float,
        arrays: tuple[Any, ...],
        g: np.ndarray,
        hessian: np.ndarray | None,
        checked: bool,
    ) -> bool:
        if not checked:
            return False
        plan = self.plan(single(rule, t, lr, arrays))
        with deferred():
            return plan.step([g], [hessian], True) is not None

    def shift(self, rule: Nesterov, p: np.ndarray, v: np.ndarray) -> None:
        memory, group = Memory(Stored.plain(p), {}), Group(rule.name, rule)
        layout = Layout(0, [memory], [group], [0], np.zeros(1), np.zeros(2, np.int64), [[0]])
        NumbaPlan(layout, [rule.shift]).step([v], None, True)


@dataclass(frozen=True)
class Op:
    """One operation of a program for one compute type. used, written: operands, as bits."""

    run: int
    slots: list[int]
    used: int
    written: int
    phase: int
    needs: str | None


def tile_function(program: Program, op: Operation, dtype: np.dtype) -> Any:
    """An operation of a program, compiled for elements of one type; it lives as long as Numba.

    Raises RuntimeError where there is no Numba, TypeError for a user's element that does not fit.
    """
    reason = NumbaBackend().unavailable()
    if reason is not None:
        raise RuntimeError(f"{op.element.__qualname__} is compiled by Numba: {reason}")
    from ..jit import kernels
    from ..jit.explain import check_element

    operands, scalars = len(op.operands), len(op.scalars(1, 0.1))
    if op.kernel is None:
        check_element(op.element, dtype, operands - 2, scalars)
    if op.loop == "other":
        return kernels.other_tile(op.element, operands, scalars, dtype)
    states = operands - 2 - (op.loop == "peek")
    written = states if op.written is None else op.written
    return kernels.rule_tile(op.element, states, written, scalars, program.mode(op), dtype)


def _compiled(program: Program, dtype: np.dtype) -> list[Op]:
    slots = {name: k for k, name in enumerate((*INPUTS, *program.arrays))}
    ops = []
    for op in program.operations:
        places = [slots[name] for name in op.operands]
        function = tile_function(program, op, dtype)
        if op.loop == "rule":
            count = len(places) if op.written is None else op.written
            written = [places[0], *places[2 : 2 + count]]
        else:
            written = places[-1:] if op.loop == "peek" else places[:1]
        used = sum(1 << k for k in places)
        changed = sum(1 << k for k in written)
        ops.append(Op(function.address, places, used, changed, op.phase, op.needs))
    return ops


class NumbaPlan:
    """One optimizer on Numba's kernels."""

    def __init__(self, layout: Layout, programs: Sequence[Program]) -> None:
        self._layout, self._programs = layout, programs
        self._matrices = Matrices(layout)
        self.work_bytes = self._matrices.work_bytes
        self._dtypes = [compute_dtype(m.parameter.format.dtype) for m in layout.leaves]
        kinds = dict.fromkeys(zip(layout.group_of, self._dtypes, strict=True))
        self._ops = {(g, dtype): _compiled(programs[g], dtype) for g, dtype in kinds}
        self._arrays: list[list[Stored]] = []
        self._lay_out()

    def _lay_out(self) -> None:
        """What stays the same from step to step: the operands but for the inputs."""
        from ..jit.driver import OPERAND

        rows, self._counts, self._random = [], [], []
        for k, memory in enumerate(self._layout.leaves):
            stored = memory.operands
            work = [Stored.plain(a) for a in self._matrices.work.get(k, ())]
            row = np.zeros(PARAMETER + len(stored) + len(work) + len(memory.mirrors), OPERAND)
            row["source"] = -1
            for place, one in enumerate([*stored, *work], PARAMETER):
                self._set(row[place], one, self._dtypes[k])
                if one.format.random:
                    key = self._layout.keys[k][place - PARAMETER]
                    self._random.append((k, place, key))
            for place, mirror in enumerate(memory.mirrors, PARAMETER + len(stored) + len(work)):
                self._set(row[place], Stored.plain(mirror), self._dtypes[k], copy=True)
                row[place]["source"] = PARAMETER
            self._arrays.append([*stored, *work])
            self._counts.append(len(row))
            rows.append(row)
        self._starts = np.cumsum([0, *self._counts])
        self._operands = np.concatenate([*rows, np.zeros(0, OPERAND)])

    @staticmethod
    def _set(row: Any, stored: Stored, dtype: np.dtype, copy: bool = False) -> None:
        from ..jit import kernels

        row["data"] = address(stored.data)
        row["bits"] = stored.format.bits
        if stored.aux is not None:
            row["aux"] = address(stored.aux)
            row["aux_bytes"] = 256 // stored.format.block * stored.aux.itemsize
        if stored.format is not PLAIN[dtype.name]:
            row["decode"] = 0 if copy else kernels.decoder(stored.format, dtype).address
            row["encode"] = kernels.encoder(stored.format, dtype, copy).address
        elif copy:
            row["encode"] = kernels.encoder(stored.format, dtype, copy).address

    def step(self, grads: Any, hessian: Any, flat: bool) -> int | None:
        if not flat:  # the optimizer checks, and sees to it that this is not interrupted
            return None
        layout = self._layout
        active = [k for k, g in enumerate(grads) if g is not None]
        for slot, inputs in ((GRADIENT, grads), (HESSIAN, hessian)):
            self._take(slot, active, inputs)
        for k, place, key in self._random:
            at = self._starts[k] + place
            self._operands[at]["key"] = subkey(key, int(layout.counters[k + 1]))[0]
        scalars = self._folded(active)
        batches = self._matrices.batches
        for batch in sorted({batches[k] for k in active if k in batches}):
            members = [k for k in active if batches.get(k) == batch]
            self._run(members, 0, scalars)
            self._matrices.between(batch, members)
            self._run(members, 1, scalars)
        self._run([k for k in active if k not in batches], 0, scalars)
        layout.counters[1:][active] += 1
        layout.counters[0] += 1
        return int(layout.counters[0])

    def _take(self, slot: int, active: Sequence[int], inputs: Any) -> None:
        """Puts a step's inputs in their places; without one, `data` is 0."""
        from ..jit import kernels

        self._operands["data"][self._starts[:-1] + slot] = 0
        for k in active if inputs is not None else ():
            a = inputs[k]
            if a is None:
                continue
            row, dtype = self._operands[self._starts[k] + slot], self._dtypes[k]
            format: Format = PLAIN[a.dtype.name]
            row["data"], row["bits"] = address(a), format.bits
            row["decode"] = 0 if a.dtype == dtype else kernels.decoder(format, dtype).address
            zeroed = slot == GRADIENT and self._layout.zero_grads
            row["encode"] = kernels.zeroer(a.dtype).address if zeroed else 0

    def _folded(self, active: Sequence[int]) -> dict[tuple[int, np.dtype, int], list[np.ndarray]]:
        """The scalars of each operation, by rule, compute type and the leaf's step."""
        layout, folded = self._layout, {}
        for k in active:
            g, dtype, t = key = self._kind(k)
            if key in folded:
                continue
            program, lr = self._programs[g], float(layout.rates[g])
            factor, base, slope = program.head
            folded[key] = [
                np.array(
                    [*(() if op.loop == "other" else (factor, base + slope * lr)), *fold(t, lr)],
                    np.float64,
                ).astype(dtype)
                for op, fold in zip(program.operations, program.folds, strict=True)
            ]
        return folded

    def _kind(self, k: int) -> tuple[int, np.dtype, int]:
        return self._layout.group_of[k], self._dtypes[k], int(self._layout.counters[k + 1]) + 1

    def _run(
        self,
        members: Sequence[int],
        phase: int,
        scalars: dict[tuple[int, np.dtype, int], list[np.ndarray]],
    ) -> None:
        from ..jit.driver import LEAF, STEP, run_part

        leaves: list[Any] = []
        steps: list[Any] = []
        start = 0
        made: dict[Any, tuple[int, int, int, int]] = {}
        for k in members:
            first = int(self._starts[k])
            refreshed = bool(self._operands[first + HESSIAN]["data"])
            mirrors = len(self._layout.leaves[k].mirrors)
            kind = self._kind(k)
            key = kind, refreshed, mirrors, self._counts[k]
            if key not in made:
                made[key] = self._steps(kind, phase, refreshed, scalars[kind], steps)
            at, count, used, written = made[key]
            if written >> PARAMETER & 1:
                copies = ((1 << mirrors) - 1) << (self._counts[k] - mirrors)
                zeroed = int(self._layout.zero_grads) << GRADIENT
                used, written = used | copies, written | copies | zeroed
            n = self._layout.leaves[k].parameter.size
            leaves.append((start, n, first, self._counts[k], at, count, used, written))
            start += n
        if not start:
            return
        table, program = np.array(leaves, LEAF), np.array(steps, STEP)
        limit = in_use()
        threads = min(self._layout.threads or limit, limit)
        parts = 1
        if threads > 1 and start >= SERIAL:
            parts = max(1, min(start // SMALLEST_PART, threads * PARTS_PER_THREAD))
        compiled = run_part()
        parallel_for(
            parts, threads, lambda part: compiled(table, self._operands, program, part, parts)
        )

    def _steps(
        self,
        kind: tuple[int, np.dtype, int],
        phase: int,
        refreshed: bool,
        scalars: Sequence[np.ndarray],
        steps: list[Any],
    ) -> tuple[int, int, int, int]:
        """Appends a program's steps; where they begin, their count, operands used and written."""
        at, used, written = len(steps), 0, 0
        for op, values in zip(self._ops[kind[:2]], scalars, strict=True):
            if op.phase == phase and (op.needs is None or refreshed):
                places = op.slots + [0] * (12 - len(op.slots))
                steps.append((op.run, address(values), len(op.slots), places))
                used, written = used | op.used, written | op.written
        return at, len(steps) - at, used, written


def address(a: np.ndarray) -> int:
    """Where an array's memory begins."""
    return int(a.__array_interface__["data"][0])
