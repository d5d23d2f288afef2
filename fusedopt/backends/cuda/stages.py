"""The launches of rules of several phases: which come ahead of the last of the matrix products.

Those write work space alone, so that nothing has changed where products fail. A state that a phase
between two products makes is made once more after all products, and stored then.
"""

from __future__ import annotations

from ...programs.program import Operation, Program
from .kernels import Step, operations_of


def operations_at(
    program: Program, phase: int, ahead: bool, refreshed: bool
) -> tuple[list[Operation], tuple[Step, ...]]:
    """Return the operations of the launches of a phase, and the steps of their kernel.

    ahead: of those that write work space, otherwise of the others.
    """
    operations = operations_of(program, phase, refreshed)
    if phase >= program.phases - 1:
        operations = [] if ahead else operations
    elif not ahead:
        names = {name: copy for copy, name in kept(program, phase).items()}
        operations = [
            op._replace(operands=tuple(names.get(o, o) for o in op.operands))
            for op in operations
            if writes_state(program, op)
        ]
    steps = tuple(Step.of(program, op) for op in operations)
    if ahead:
        pairs = zip(steps, operations, strict=True)
        steps = tuple(
            step._replace(written=()) if writes_state(program, op) else step for step, op in pairs
        )
    return operations, steps


def writes_state(program: Program, op: Operation) -> bool:
    """Whether an operation writes the parameter or a state, not only work space."""
    return bool({*Step.of(program, op).written} & ({*program.arrays} - {*program.works}))


def kept(program: Program, phase: int) -> dict[str, str]:
    """The works that a phase overwrites although a state is yet to be made of them, by the name of
    their copies."""
    operations = operations_of(program, phase, False)
    written = {name for op in operations for name in Step.of(program, op).written}
    read = {name for op in operations if writes_state(program, op) for name in op.operands}
    return {f"kept_{name}": name for name in program.works if name in written & read}


def all_kept(program: Program) -> list[dict[str, str]]:
    """The copies that each phase but the last needs: see `kept`."""
    return [kept(program, phase) for phase in range(program.phases - 1)]
