"""The compiled core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..arrays import host
from ..arrays.formats import FLOAT32, FLOAT64, FORMATS, RandomKey
from ..arrays.state_file import StateFile
from ..plan.extras import EVERYTHING, Extras
from ..plan.interface import Plan
from ..plan.pools import Kept, Pools
from ..plan.spec import INPUTS, PlanSpec
from ..programs.program import AXES, MODES, Operation, Program
from ..rules import RULES, Rule
from ..rules.groups import Group
from ..system.extension import core, reason
from .matrices import Matrices

_compiled: dict[Any, Any] = {}
"""The core's program of each form that has come by, of kernels that the core has."""


def compiled(program: Program) -> Any:
    """The program in the core's terms, made once for each form."""
    if program.native is None:
        program.native = _compiled.get(program.form)
    if program.native is None:
        program.native = _compile(program)
        if all(op.kernel for op in program.operations):
            _compiled[program.form] = program.native
    return program.native


def _compile(program: Program) -> Any:
    names = (*INPUTS, *program.arrays, *program.temporaries, *program.sums)
    slots = {name: k for k, name in enumerate(names)}
    return core.Program(
        [
            (
                op.kernel or type(op.element).__name__,
                MODES.index(program.mode(op)),
                op.phase,
                INPUTS.index(op.needs) if op.needs else -1,
                op.measured,
                [slots[name] for name in op.operands],
                None if op.kernel else _foreign(program, op),
            )
            for op in program.operations
        ],
        len(program.arrays),
        len(program.works),
        len(program.temporaries),
        len(program.sums),
        (None, *AXES.values()).index(program.axis),
    )


def _foreign(program: Program, op: Operation) -> tuple[int, int, int, list[int]]:
    """The sums, maxima among them, scalars and addresses of an operation that Numba compiles."""
    from ..jit.operations import tile_function  # 0.5 s of import, for those with rules of their own

    addresses = [tile_function(program, op, dtype).address for dtype in (FLOAT32, FLOAT64)]
    return len(op.sums), op.maxima, op.scalar_count, addresses


def check_registry() -> None:
    """Raise ImportError where the compiled table is not the one that the rules were written for."""
    table = {name: (operands, scalars) for name, operands, scalars in core.operations()}
    rules = (cls(**example) for cls in RULES.values() for example in cls.examples)
    for rule in rules:
        for op in (*rule.every_operation(), *EVERYTHING.program(rule).operations):
            operands = len(op.operands) - (op.loop == "peek")
            found = table.get(op.kernel or "")
            if found != (operands, op.scalar_count):
                raise ImportError(
                    f"stale extension, rebuild: {type(rule).__name__} needs the kernel"
                    f" {op.kernel!r} with (operands, scalars) = {(operands, op.scalar_count)}, the"
                    f" compiled"
                    f" core has {found}"
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
    textbook = False
    takes_means = True
    device = host

    def unavailable(self) -> str | None:
        return reason

    def describe(self) -> str:
        return f"{core.get_level()}, {core.parallel}"

    def plan(self, spec: PlanSpec) -> Plan:
        return NativePlan(spec)

    @staticmethod
    def update_alone(
        rule: Rule, t: int, lr: float, arrays: tuple[Any, ...], g: Any, hessian: Any
    ) -> bool:
        """Take one step of one tensor, unless the rule has several phases."""
        program = rule.program
        if program.phases > 1:  # what it refuses, only Python knows
            return False
        native = program.native or compiled(program)
        return core.update(native, program.numbers, t, lr, g, hessian, arrays)

    def sums_of_squares(self, arrays: Sequence[Any]) -> Sequence[tuple[float, float]] | None:
        found: list[tuple[float, float]] | None = core.sums_of_squares(list(arrays))
        return found


class PlanDescription(NamedTuple):
    """The description from which the core makes a plan, field by field (csrc/plan.cpp).

    arrays: of each leaf its parameter, states and work space, each an ndarray or (name of the
    codec, data, what is stored beside it or None). mirrors: of each leaf the arrays into which its
    parameter is written besides. keys: of each leaf the keys of its arrays' random bits. groups: of
    each leaf the place of its group. batches: of each leaf -1, or the number of the batch of
    matrices whose products come between its phases. programs, numbers: of each group its program,
    and `Program.numbers`. beside: dense, what else no gradient may overlap. watched: the caller's
    own arrays, and those whose memory they use. combine(leaves): that of `Pools`, or None: called
    when leaves have been measured. after_kept(), or None: called when what it gave has been stored,
    which is when all else has been written. before(leaves), or None: called before anything is
    written. between(batch, phase, leaves): called after each phase
    but the last. threads: the most that a step may use; 0: all.
    The rest is as in `PlanSpec`.
    """

    tree: Any
    arrays: list[list[Any]]
    mirrors: list[list[np.ndarray]]
    keys: list[list[tuple[int, int]]]
    groups: list[int]
    batches: list[int]
    programs: list[Any]
    numbers: list[tuple[Any, ...]]
    rates: np.ndarray
    factors: np.ndarray
    counters: np.ndarray
    results: np.ndarray
    beside: list[np.ndarray]
    watched: list[np.ndarray]
    combine: Callable[[Sequence[int]], list[Kept]] | None
    after_kept: Callable[[], None] | None
    before: Callable[[Sequence[int]], None] | None
    between: Callable[[int, int, Sequence[int]], None]
    sided: bool
    decide: Callable[[], bool] | None
    zero_grads: bool
    threads: int
    state_file: StateFile | None


def _described(spec: PlanSpec, pools: Pools, matrices: Matrices) -> PlanDescription:
    leaves, work, programs = spec.leaves, matrices.work, pools.programs
    return PlanDescription(
        tree=spec.tree,
        arrays=[
            [*(stored.spec for stored in leaf_state.operands), *work.get(k, ())]
            for k, leaf_state in enumerate(leaves)
        ],
        mirrors=[list(leaf_state.mirrors) for leaf_state in leaves],
        # Work space is in the compute type, and takes no random bits.
        keys=[[*keys, *[RandomKey()] * len(work.get(k, ()))] for k, keys in enumerate(spec.keys)],
        groups=list(spec.group_of),
        batches=[matrices.batches.get(k, -1) for k in range(len(leaves))],
        programs=[compiled(program) for program in programs],
        numbers=[program.numbers for program in programs],
        rates=spec.rates,
        factors=spec.factors,
        counters=spec.counters,
        results=spec.results,
        beside=[
            *(side.data for leaf_state in leaves for side in leaf_state.sides.values()),
            *spec.beside,
        ],
        watched=spec.watch.arrays if spec.watch is not None else [],
        combine=pools.combine if pools else None,
        after_kept=pools.release if pools.keeps and spec.state_file else None,
        before=matrices.before if matrices.batches else None,
        between=matrices.between,
        sided=matrices.sided,
        decide=spec.decide,
        zero_grads=spec.zero_grads,
        threads=spec.threads or 0,
        state_file=spec.state_file,
    )


class NativePlan:
    """The core's plan of an optimizer."""

    def __init__(self, spec: PlanSpec) -> None:
        matrices = Matrices(spec)
        self.work_bytes = matrices.work_bytes
        self._matrices = matrices
        self._pools = pools = Pools(spec)
        # The core's objects are unknown to the garbage collector: what it calls must not lead back
        # to this plan.
        plan = core.Plan(_described(spec, pools, matrices))
        self._reprogram, self.renumber = plan.reprogram, plan.renumber
        self.take, self.give, self.held = plan.take, plan.give, plan.held
        self.whole_step, self.settle, self._step = plan.whole_step, plan.settle, plan.step

    def step(self, grads: Any, hessian: Any) -> int | None:
        """Take a step with trees; None where Python must look first."""
        number: int | None = self._step(grads, hessian, False)
        return number

    def step_leaves(self, grads: Sequence[Any], hessian: Sequence[Any] | None) -> int | None:
        """Take a step with checked leaves."""
        number: int | None = self._step(grads, hessian, True)
        return number

    def synchronize(self) -> None:
        """Do nothing, since steps are done when they return."""

    def adopt(self, groups: Sequence[Group], extras: Extras) -> bool:
        """Take other rules for the groups; False if a new plan is needed."""
        pools = self._pools.succeeded(groups, extras)
        if not self._matrices.adopt(groups) or not self._reprogram(*_in_the_core(pools.programs)):
            return False
        self._pools.take(pools)  # the core has the functions of the old ones
        return True


def _in_the_core(programs: Sequence[Program]) -> tuple[list[Any], list[Any]]:
    """Return what the core knows of programs, and their numbers."""
    return [compiled(program) for program in programs], [program.numbers for program in programs]
