"""The compiled core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..arrays import host
from ..arrays.formats import FLOAT32, FLOAT64, FORMATS, RandomKey
from ..arrays.state_file import StateFile
from ..arrays.stored import Stored
from ..plan.extras import EVERYTHING
from ..plan.interface import Plan
from ..plan.spec import INPUTS, PlanSpec, single
from ..programs.program import HEAD, Operation, Program
from ..rules import RULES, Nesterov, Rule
from ..system.extension import core, reason
from .matrices import Matrices


def _compile(program: Program) -> Any:
    """The program in the core's terms, made once for each rule object."""
    if program.native is None:
        names = (*INPUTS, *program.arrays, *program.temporaries, *program.sums)
        slots = {name: k for k, name in enumerate(names)}
        program.native = core.Program(
            [
                (
                    op.kernel or type(op.element).__name__,
                    program.MODES.index(program.mode(op)),
                    op.phase,
                    INPUTS.index(op.needs) if op.needs else -1,
                    [slots[name] for name in op.operands],
                    None if op.kernel else _foreign(program, op),
                )
                for op in program.operations
            ],
            *program.head,
            len(program.arrays),
            len(program.works),
            len(program.temporaries),
            len(program.sums),
        )
    return program.native


def _foreign(program: Program, op: Operation) -> tuple[int, list[int]]:
    """The scalars and addresses of an operation that Numba compiles."""
    from ..jit.operations import tile_function  # 0.5 s, for those with rules of their own

    addresses = [tile_function(program, op, dtype).address for dtype in (FLOAT32, FLOAT64)]
    return HEAD[op.loop] + len(op.scalars(1, 0.1)), addresses


def check_registry() -> None:
    """ImportError where the compiled table is not the one that the rules were written for."""
    table = {name: (operands, scalars) for name, operands, scalars in core.operations()}
    rules = (cls(**example) for cls in RULES.values() for example in cls.examples)
    for rule in rules:
        for op in (*rule.every_operation(), *EVERYTHING.program(rule).operations):
            operands = len(op.operands) - (op.loop == "peek")
            scalars = len(op.scalars(1, 0.1)) + HEAD[op.loop]
            found = table.get(op.kernel or "")
            if found != (operands, scalars):
                raise ImportError(
                    f"stale extension, rebuild: {type(rule).__name__} needs the kernel"
                    f" {op.kernel!r} with (operands, scalars) = {(operands, scalars)}, the compiled"
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
    device = host

    def unavailable(self) -> str | None:
        return reason

    def describe(self) -> str:
        return f"{core.get_level()}, {core.parallel}"

    def plan(self, spec: PlanSpec) -> Plan:
        return NativePlan(spec)

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
        plan = NativePlan(single(rule, rule.program, t, lr, arrays))
        return plan.step(g, None, False) is not None

    def sums_of_squares(self, arrays: Sequence[Any]) -> Sequence[tuple[float, float]] | None:
        found: list[tuple[float, float]] | None = core.sums_of_squares(list(arrays))
        return found

    def shift(self, rule: Nesterov, p: np.ndarray, v: np.ndarray) -> None:
        program = rule.shift
        if not core.update(_compile(program), program.folds, 1, 0.0, v, None, (p,)):
            raise RuntimeError("the core refused the look-ahead; please report this")


class PlanDescription(NamedTuple):
    """What the core makes a plan from; csrc/plan.cpp reads the fields by their names.

    arrays: of each leaf its parameter, states and work space, each an ndarray or (name of the
    codec, data, what is stored beside it or None). mirrors: of each leaf the arrays into which its
    parameter is written besides. keys: of each leaf the keys of its arrays' random bits. groups: of
    each leaf the place of its group. batches: of each leaf -1, or the number of the batch of
    matrices whose products come between its phases. programs, folds: of each group its program, and
    the functions from (t, lr) to its operations' scalars. beside: what else a step writes.
    before(leaves), or None: called before anything is written. between(batch, phase, leaves):
    called after each phase but the last. threads: at most so many; 0: as many as there are for all.
    The rest is as in `PlanSpec`.
    """

    tree: Any
    arrays: list[list[Any]]
    mirrors: list[list[np.ndarray]]
    keys: list[list[tuple[int, int]]]
    groups: list[int]
    batches: list[int]
    programs: list[Any]
    folds: list[tuple[Any, ...]]
    rates: np.ndarray
    factors: np.ndarray
    counters: np.ndarray
    results: np.ndarray
    beside: list[np.ndarray]
    before: Callable[[Sequence[int]], None] | None
    between: Callable[[int, int, Sequence[int]], None]
    decide: Callable[[], bool] | None
    zero_grads: bool
    threads: int
    state_file: StateFile | None


def _described(spec: PlanSpec, programs: Sequence[Program], matrices: Matrices) -> PlanDescription:
    leaves, work = spec.leaves, matrices.work
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
        programs=[_compile(program) for program in programs],
        folds=[program.folds for program in programs],
        rates=spec.rates,
        factors=spec.factors,
        counters=spec.counters,
        results=spec.results,
        beside=[side.data for leaf_state in leaves for side in leaf_state.sides.values()],
        before=matrices.before if matrices.sided else None,
        between=matrices.between,
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
        self._extras, self._elementwise = spec.extras, not matrices.batches
        programs = [spec.extras.program(group.rule) for group in spec.groups]
        # The core's objects are unknown to the garbage collector: what it calls must not lead back
        # to this plan.
        plan = core.Plan(_described(spec, programs, matrices))
        self._reprogram = plan.reprogram
        self.take, self.give = plan.take, plan.give
        self.step, self.step_alone = plan.step, plan.step_alone

    def synchronize(self) -> None:
        """Steps are done when they return."""

    def adopt(self, rules: Sequence[Rule]) -> bool:
        """Take other rules for the groups, on the same arrays; False if a new plan is needed."""
        if not self._elementwise:  # what comes between the phases of a matrix has the old rule
            return False
        programs = [self._extras.program(rule) for rule in rules]
        folds = [program.folds for program in programs]
        return bool(self._reprogram([_compile(program) for program in programs], folds))
