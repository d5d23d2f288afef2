"""The compiled core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..around import EVERYTHING
from ..environment import sleepy_openmp
from ..formats import FORMATS, compute_dtype
from ..newton_schulz import Workspace, batches
from ..rules import RULES, Nesterov, Rule
from ..rules.base import Program
from ..states import Memory, Stored
from .base import Group, Layout, Plan, results_for

_reason: str | None = None
try:
    with sleepy_openmp():
        from .. import _core as core
except ImportError as error:
    core = None  # type: ignore[assignment]
    _reason = f"the compiled core could not be imported ({error}); it was not built"

__all__ = ["NativeBackend", "check_registry", "core"]

INPUTS = ("g", "hessian")
HEAD = {"rule": 2, "peek": 2, "filter": 1, "sum": 0, "other": 0}
"""How many scalars the core puts before an operation's own."""


def _compile(program: Program) -> Any:
    """The program in the core's terms, made once for each rule object."""
    if program.native is None:
        names = (*INPUTS, *program.arrays, *program.scratch, *program.sums)
        slots = {name: k for k, name in enumerate(names)}
        program.native = core.Program(
            [
                (
                    op.kernel,
                    program.MODES.index(program.mode(op)),
                    op.phase,
                    INPUTS.index(op.needs) if op.needs else -1,
                    [slots[name] for name in op.operands],
                )
                for op in program.operations
            ],
            *program.head,
            len(program.arrays),
            len(program.scratch),
            len(program.sums),
        )
    return program.native


def check_registry() -> None:
    """ImportError where the compiled table is not the one that the rules were written for."""
    table = {name: (operands, scalars) for name, operands, scalars in core.operations()}
    rules = (cls(**example) for cls in RULES.values() for example in cls.examples)
    for rule in rules:
        for op in (*rule.every_operation(), *EVERYTHING.program(rule).operations):
            operands = len(op.operands) - (op.loop == "peek")
            scalars = len(op.scalars(1, 0.1)) + HEAD[op.loop]
            if table.get(op.kernel) != (operands, scalars):
                raise ImportError(
                    f"stale extension, rebuild: {type(rule).__name__} needs the kernel"
                    f" {op.kernel!r} with (operands, scalars) = {(operands, scalars)}, the compiled"
                    f" core has {table.get(op.kernel)}"
                )
    formats = [
        (f.codec, f.bits, f.block, f.aux_dtype.itemsize if f.aux_dtype else 0) for f in FORMATS
    ]
    if formats != core.codecs():
        raise ImportError(
            f"stale extension, rebuild: the formats are {formats}, the compiled core has"
            f" {core.codecs()}"
        )


class NativeBackend:
    """C++ kernels on NumPy arrays."""

    name = "native"
    native = True

    def unavailable(self) -> str | None:
        return _reason

    def describe(self) -> str:
        return f"{core.get_level()}, {core.parallel}"

    def plan(self, layout: Layout) -> Plan:
        return NativePlan(layout)

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
        program = rule.program
        if program.phases > 1:  # what it refuses, only Python knows
            return checked and self._update_matrix(rule, t, lr, arrays, g)
        native = program.native or _compile(program)
        if checked:
            arrays = tuple(stored.spec for stored in arrays)
        return core.update(native, program.folds, t, lr, g, hessian, arrays)

    def _update_matrix(
        self, rule: Rule, t: int, lr: float, arrays: tuple[Stored, ...], g: np.ndarray
    ) -> bool:
        rates, counters = np.array([lr, 1.0]), np.array([0, t - 1])
        memory = Memory(arrays[0], dict(zip(rule.states, arrays[1:], strict=True)))
        group, keys = Group(rule.name, rule), [[0] * len(arrays)]
        results = results_for([rule.program], 1)
        plan = NativePlan(Layout(0, [memory], [group], [0], rates, counters, keys, results))
        return plan.step(g, None, False) is not None

    def sums_of_squares(self, arrays: Sequence[np.ndarray]) -> Sequence[tuple[float, float]]:
        found: list[tuple[float, float]] = core.sums_of_squares(list(arrays))
        return found

    def shift(self, rule: Nesterov, p: np.ndarray, v: np.ndarray) -> None:
        program = rule.shift
        if not core.update(_compile(program), program.folds, 1, 0.0, v, None, (p,)):
            raise RuntimeError("the core refused the look-ahead; please report this")


class NativePlan:
    """The core's plan of an optimizer."""

    def __init__(self, layout: Layout) -> None:
        matrices = _Matrices(layout)
        self.work_bytes = matrices.work_bytes
        programs = [layout.around.program(group.rule) for group in layout.groups]
        # The core's objects are unknown to the garbage collector: what it calls must not lead back
        # to this plan.
        plan = core.Plan(
            tree=layout.tree,
            arrays=[
                [*(stored.spec for stored in memory.operands), *matrices.work.get(k, ())]
                for k, memory in enumerate(layout.leaves)
            ],
            mirrors=[list(memory.mirrors) for memory in layout.leaves],
            # Work space is in the compute type, and takes no random bits.
            keys=[[*keys, 0] for keys in layout.keys],
            groups=list(layout.group_of),
            batches=[matrices.batches.get(k, -1) for k in range(len(layout.leaves))],
            programs=[_compile(program) for program in programs],
            folds=[program.folds for program in programs],
            rates=layout.rates,
            counters=layout.counters,
            between=matrices.between,
            results=layout.results,
            decide=layout.decide,
            zero_grads=layout.zero_grads,
            threads=layout.threads or 0,
            scratch=layout.scratch,
        )
        self.take, self.give = plan.take, plan.give
        self.step, self.step_alone = plan.step, plan.step_alone


class _Matrices:
    """The leaves whose rule has two phases, and the matrix products between these.

    work: of each such leaf its part of the work space that all of one dtype share. batches: of
    each the number of its batch.
    """

    def __init__(self, layout: Layout) -> None:
        leaves = []
        for k, group in enumerate(layout.group_of):
            rule, p = layout.groups[group].rule, layout.leaves[k].parameter
            if rule.program.phases > 1:
                compute = compute_dtype(p.format.dtype)
                leaves.append((k, compute, rule.matrices(p.shape), (group, p.shape, p.order)))
        made = batches(leaves)
        self._spaces = {
            dtype: Workspace([batch.stack for batch in made if batch.dtype == dtype], dtype)
            for dtype in {batch.dtype for batch in made}
        }
        self.batches: dict[int, int] = {}
        self.work: dict[int, tuple[np.ndarray]] = {}
        self._steps: list[tuple[Rule, np.ndarray, Workspace]] = []
        for number, batch in enumerate(made):
            first = batch.members[0]
            space = self._spaces[batch.dtype]
            directions = _alike(layout.leaves[first].parameter, len(batch.members), space.direction)
            self._steps.append((layout.groups[layout.group_of[first]].rule, directions, space))
            for k, direction in zip(batch.members, directions, strict=True):
                self.batches[k], self.work[k] = number, (direction,)

    @property
    def work_bytes(self) -> int:
        return sum(space.nbytes for space in self._spaces.values())

    def between(self, batch: int, leaves: Sequence[int]) -> None:
        # Leaves of the batch that have no gradient are orthogonalised too, whatever is there.
        rule, directions, space = self._steps[batch]
        rule.between(directions, space)


def _alike(p: Stored, count: int, flat: np.ndarray) -> np.ndarray:
    """So many arrays of a parameter's shape and memory order, along a first axis, in `flat`."""
    flat = flat[: count * p.size]
    if p.order == "C":
        return flat.reshape(count, *p.shape)
    return flat.reshape(count, *p.shape[::-1]).transpose(0, *range(len(p.shape), 0, -1))
