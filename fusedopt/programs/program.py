"""Operations, and the programs of them that are run on each tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from .elements import Element

HEAD = {"rule": 2, "peek": 2, "filter": 1, "sum": 0, "other": 0}
"""How many scalars an operation has before its own, by its loop."""

MODES = ("plain", "l2", "decoupled", "first", "peek", "peek_l2")
"""Treatments of weight decay and the delta by the loop around a rule, as in csrc/table.h."""


def loop_lines(mode: str, target: str, decay: str = "decay") -> tuple[str, str, str]:
    """Return the loop around a rule as Python: on the gradient, before the rule, and after it.

    The lines know the parameter w, its gradient, and the rule's delta. target: what takes the
    result; decay: the coefficient of weight decay.
    """
    decayed, subtracted = f"gradient = gradient + {decay} * w", f"{target} = w - delta"
    lines = {
        "plain": ("", "", subtracted),
        "l2": (decayed, "", subtracted),
        "decoupled": ("", "", f"{target} = w - ({decay} * w + delta)"),
        "first": ("", f"w = {decay} * w", subtracted),
        "peek": ("", "", f"{target} = delta"),
        "peek_l2": (decayed, "", f"{target} = delta"),
    }
    return lines[mode]


class Operation(NamedTuple):
    """One operation of a rule's program, run on each tile (csrc/rules.hpp holds the kernels).

    operands: names; "g" and "hessian" come anew with each step, "p" is the parameter, those of
    `Rule.works` are the matrices between two phases, every other name a state, scratch or sum.
    loop: what the loop around the kernel does: "rule" applies the delta, "peek" only writes it to
    the last operand, "filter" makes its first operand of the gradient times its factor, "sum" adds
    up, and "other" writes its first operand. needs: run only where this input was given. written:
    the number of a rule's states that are written, the first ones; None: all. element: the kernel
    in Python, where elements.py does not have it under the kernel's name. kernel: None where the
    core has none, and is given the compiled element.
    """

    kernel: str | None
    operands: tuple[str, ...]
    scalars: Callable[[int, float], tuple[float, ...]]
    loop: Literal["rule", "peek", "filter", "sum", "other"] = "rule"
    phase: int = 0
    needs: Literal["hessian"] | None = None
    written: int | None = None
    element: Element | None = None


class Governed(Protocol):
    """The part of a rule that a program needs: see `fusedopt.rules.base.Rule`."""

    @property
    def maximize(self) -> bool:
        """Whether the gradient is ascended."""

    @property
    def weight_decay(self) -> float:
        """The coefficient of weight decay."""

    @property
    def decay(self) -> str:
        """The form of weight decay."""

    @property
    def works(self) -> tuple[str, ...]:
        """The names of the work space between two phases."""

    @property
    def decay_line(self) -> tuple[float, float]:
        """(a, b): the loop around the rule multiplies the parameter with a + b lr."""


class Program:
    """Operations on a rule's arrays, and their scalars.

    arrays: names; work space is added where there are several phases. temporaries: names of tiles
    that live as long as a tile is worked on; sums: of sums over a leaf. folds: of each operation
    its function from (t, lr). head: (factor, a, b); the scalars of a rule stand behind the factor
    on the gradient and the coefficient a + b lr of weight decay. numbers: both, all that depends on
    hyperparameters that are numbers. form: what does not, hashable where operations have kernels.
    """

    def __init__(
        self,
        rule: Governed,
        operations: tuple[Operation, ...],
        arrays: tuple[str, ...],
        temporaries: tuple[str, ...] = (),
        sums: tuple[str, ...] = (),
    ) -> None:
        self.temporaries, self.sums = temporaries, sums
        self.phases = 1 + max([op.phase for op in operations])
        self.works = rule.works
        self.arrays = (*arrays, *self.works)
        self._decay = _decay(rule)
        self._forms = _forms(operations)
        self.form = (self._forms, self.arrays, temporaries, sums, self._decay)
        self.native: Any = None  # what the native backend compiled it to
        self._renumber(rule, operations)

    def _renumber(self, rule: Governed, operations: tuple[Operation, ...]) -> None:
        self.operations = operations
        self.folds = tuple([op.scalars for op in operations])
        line = rule.decay_line if rule.weight_decay else (0.0, 0.0)
        self.head = (-1.0 if rule.maximize else 1.0, *line)
        self.numbers = self.folds, self.head

    def renumbered(self, rule: Governed, operations: tuple[Operation, ...]) -> Program | None:
        """Return this program with the numbers of another rule; None where forms differ."""
        if _decay(rule) != self._decay or _forms(operations) != self._forms:
            return None
        new = object.__new__(Program)
        new.__dict__.update(self.__dict__)
        new._renumber(rule, operations)
        return new

    def scalars(self, op: Operation, t: int, lr: float, factor: float) -> tuple[float, ...]:
        """Return all scalars of an operation: those that the loop around it takes, then its own.

        factor: on the gradient, which a filter has applied where there is one.
        """
        sign, base, slope = self.head
        signed = sign * factor
        filtered = any(each.loop == "filter" for each in self.operations)
        rule = (1.0 if filtered else signed, base + slope * lr)
        return (*{0: (), 1: (signed,), 2: rule}[HEAD[op.loop]], *op.scalars(t, lr))

    def fits(self, other: Program) -> bool:
        """Whether this program runs on the arrays that another was laid out for."""
        return (self.arrays, self.temporaries, self.sums, self.phases) == (
            other.arrays,
            other.temporaries,
            other.sums,
            other.phases,
        )

    def mode(self, op: Operation) -> str:
        """Return how the loop around an operation treats weight decay and the delta."""
        if op.loop == "peek":
            return "peek_l2" if self._decay == "l2" else "peek"
        return self._decay if op.loop == "rule" else "plain"


DECAYS = {"independent": "decoupled", "decoupled_first": "first"}


def _decay(rule: Governed) -> str:
    return DECAYS.get(rule.decay, rule.decay) if rule.weight_decay else "plain"


def _forms(operations: Sequence[Operation]) -> tuple[Any, ...]:
    """Return what is the same of operations whatever numbers a rule has."""
    return tuple([(op[:2], op[3:7]) for op in operations])
