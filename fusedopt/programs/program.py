"""Operations, and the programs of them that are run on each tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, Protocol

import numpy as np

from .elements import Element

HEAD = {"rule": 2, "peek": 2, "measure": 2, "filter": 1, "sum": 0, "other": 0}
"""How many scalars an operation has before its own, by its loop."""

DECAY_MODES = {"independent": "decoupled", "decoupled_first": "first", "scaled": "plain"}
"""Modes of the forms of weight decay whose names differ."""

MODES = ("plain", "l2", "decoupled", "first", "cautious", "peek", "peek_l2")
"""Treatments of weight decay and the delta by the loop around a rule, as in csrc/table.h."""


def loop_lines(mode: str, target: str, decay: str = "decay") -> tuple[str, str, str]:
    """Return the loop around a rule as Python: on the gradient, before the rule, and after it.

    The lines know the parameter w, its gradient, and the rule's delta. target: what takes the
    result; decay: the coefficient of weight decay.
    """
    decayed, subtracted = f"gradient = gradient + {decay} * w", f"{target} = w - delta"
    opposed = "((delta > 0) & (w < 0)) | ((delta < 0) & (w > 0))"
    lines = {
        "plain": ("", "", subtracted),
        "l2": (decayed, "", subtracted),
        "decoupled": ("", "", f"{target} = w - ({decay} * w + delta)"),
        "cautious": ("", "", f"{target} = w - (delta if {opposed} else {decay} * w + delta)"),
        "first": ("", f"w = {decay} * w", subtracted),
        "peek": ("", "", f"{target} = delta"),
        "peek_l2": (decayed, "", f"{target} = delta"),
    }
    return lines[mode]


AXES = {"row": 0, "column": -1}
"""The axes of which an index selects what has sums of its own, by a rule's `over`."""


class Operation(NamedTuple):
    """One operation of a rule's program, run on each tile (csrc/rules.hpp holds the kernels).

    operands: names; "g" and "hessian" come anew with each step, "p" is the parameter, those of
    `Rule.works` are the matrices between two phases, every other name a state, scratch or sum.
    loop: what the loop around the kernel does: "rule" applies the delta, "peek" only writes it to
    the last operand, "measure" adds to sums of the leaf what the rule will read of them, "filter"
    makes its first operand of the gradient times its factor, "sum" adds up, and "other" writes its
    first operand. measured: how many of the scalars, the last ones, come from those sums and not
    from `scalars`. maxima: how many of the sums of "measure", the last ones, are maxima instead.
    needs: run only where this input was given. written: the number of a rule's states that are
    written, the first ones; None: all. scalars: a method of the rule, or of what is around it, or a
    function that knows no hyperparameters. element: the kernel in Python, where
    elements.py does not have it under the kernel's name. kernel: None where the core has none, and
    is given the compiled element.
    """

    kernel: str | None
    operands: tuple[str, ...]
    scalars: Callable[[int, float], tuple[float, ...]]
    loop: Literal["rule", "peek", "measure", "filter", "sum", "other"] = "rule"
    phase: int = 0
    needs: Literal["hessian"] | None = None
    written: int | None = None
    element: Element | None = None
    measured: int = 0
    maxima: int = 0

    @property
    def sums(self) -> tuple[str, ...]:
        """The sums to which the operation adds, which are its first operands."""
        if self.loop == "measure":
            return tuple(name for name in self.operands if name.startswith(MEASURE))
        return self.operands[:1] if self.loop == "sum" else ()

    @property
    def scalar_count(self) -> int:
        """The number of scalars, those of the loop included."""
        return HEAD[self.loop] + len(self.scalars(1, 0.1)) + self.measured


MEASURE = "sum "
"""The sums that a rule reads are called this and a number, as no state can be."""


def refuse_scalar(fold: Any, name: str, dtype: str, t: int, lr: float) -> NoReturn:
    """Raise ValueError for a scalar that is infinite in the type that is computed in.

    fold: what gave it. name: of the operation.
    """
    owner = getattr(fold, "__self__", None)
    where = name if owner is None else type(owner).__name__
    raise ValueError(
        f"{where}: in step {t}, with lr {lr:g}, a number that the step computes with is not finite"
        f" in {dtype}; take hyperparameters whose products and quotients {dtype} can hold"
        + (", or float64 parameters" if dtype == "float32" else "")
    )


def narrowed(
    values: Sequence[float] | np.ndarray,
    dtype: np.dtype,
    op: Operation,
    t: int,
    lr: float,
    finite: bool | np.ndarray = True,
) -> np.ndarray:
    """Return scalars of an operation in the type that is computed in.

    finite: whether they must be; of the scalars of each row an array.
    """
    with np.errstate(over="ignore", under="ignore"):
        found = np.array(values, np.float64, order="C").astype(dtype)
    if (finite & ~np.isfinite(found).all(axis=-1)).any():
        refuse_scalar(op.scalars, op.kernel or "element", dtype.name, t, lr)
    return found


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
    def over(self) -> str:
        """The arrays over which sums are taken."""

    @property
    def decay_line(self) -> tuple[float, float]:
        """(a, b): the loop around the rule multiplies the parameter with a + b lr."""

    def from_sums(self, t: int, lr: float, sums: Any, *kept: float) -> Any:
        """The scalars that come from sums, and from the numbers that the rule keeps."""


class Program:
    """Operations on a rule's arrays, and their scalars.

    arrays: names; work space is added where there is some between phases. temporaries: names of
    tiles that live as long as a tile is worked on; sums: of sums over a leaf, those that the rule
    itself reads last; told: the others. axis: the one of which an index selects what has sums of
    its own, or None. folds: of each operation its function from (t, lr), and where the rule
    measures, that from (t, lr, sums). head: (factor, a, b); the scalars of a rule stand behind the
    factor on the gradient and the coefficient a + b lr of weight decay. numbers: both, all that
    depends on hyperparameters that are numbers. form: what does not, hashable where operations have
    kernels.
    """

    def __init__(
        self,
        rule: Governed,
        operations: tuple[Operation, ...],
        arrays: tuple[str, ...],
        temporaries: tuple[str, ...] = (),
    ) -> None:
        self.temporaries = temporaries
        self.told = tuple([name for op in operations if op.loop == "sum" for name in op.sums])
        own = tuple([name for op in operations if op.loop == "measure" for name in op.sums])
        self.sums, self.measures = (*self.told, *own), len(own)
        self.phases = 1 + max([op.phase for op in operations])
        self.axis = AXES.get(rule.over) if self.measures else None
        self.works = rule.works
        self.arrays = (*arrays, *self.works)
        self._decay = _decay(rule)
        self._forms = _forms(operations)
        self.form = (self._forms, self.arrays, temporaries, self.sums, self._decay, self.axis)
        self.native: Any = None  # what the native backend compiled it to
        self._renumber(rule, operations)

    def _renumber(self, rule: Governed, operations: tuple[Operation, ...]) -> None:
        self.operations = operations
        self.measured: Callable[..., Any] = rule.from_sums
        folds: tuple[Any, ...] = tuple([op.scalars for op in operations])
        self.folds = (*folds, rule.from_sums) if self.measures else folds
        self.head = head_of(rule)
        self.numbers = self.folds, self.head

    def renumbered(self, rule: Governed, operations: tuple[Operation, ...]) -> Program | None:
        """Return this program with the numbers of another rule; None where forms differ."""
        if _decay(rule) != self._decay or _forms(operations) != self._forms:
            return None
        new = object.__new__(Program)
        new.__dict__.update(self.__dict__)
        new._renumber(rule, operations)
        return new

    def recalling(self, recall: Callable[[], tuple[float, ...]]) -> Program:
        """Return the program of a rule that keeps numbers, which `recall` gives."""

        def recalled(fold: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *known: fold(*known, *recall())

        new = object.__new__(Program)
        new.__dict__.update(self.__dict__)
        new.operations = tuple(
            op._replace(scalars=recalled(op.scalars)) if op.loop in ("rule", "measure") else op
            for op in self.operations
        )
        new.measured = recalled(self.measured)
        new.folds = (*[op.scalars for op in new.operations], new.measured)
        new.numbers = new.folds, self.head
        return new

    @property
    def matrices(self) -> bool:
        """Whether the phases have matrix products between them."""
        return bool(self.works)

    def scalars(self, op: Operation, t: int, lr: float, factor: float) -> tuple[float, ...]:
        """Return all scalars of an operation: those that the loop around it takes, then its own.

        factor: on the gradient, which a filter has applied where there is one.
        """
        sign, base, slope = self.head
        signed = sign * factor
        filtered = any(each.loop == "filter" for each in self.operations)
        rule = (1.0 if filtered else signed, base + slope * lr)
        head = {0: (), 1: (signed,), 2: rule}[HEAD[op.loop]]
        return (*head, *op.scalars(t, lr), *[0.0] * op.measured)

    def slices(self, shape: tuple[int, ...]) -> int:
        """Return how many rows or columns of a parameter have their own sums; 0 where it has them.

        An array with one axis is one row, or one column.
        """
        if self.axis is None or len(shape) < 2 or 0 in shape:
            return 0
        return shape[self.axis]

    def fits(self, other: Program) -> bool:
        """Whether this program runs on the arrays that another was laid out for."""
        names = ("arrays", "temporaries", "sums", "phases", "measures", "axis")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def mode(self, op: Operation) -> str:
        """Return how the loop around an operation treats weight decay and the delta."""
        if op.loop == "peek":
            return "peek_l2" if self._decay == "l2" else "peek"
        return self._decay if op.loop in ("rule", "measure") else "plain"


def head_of(rule: Governed) -> tuple[float, float, float]:
    """Return a program's `head`."""
    sign = -1.0 if rule.maximize else 1.0
    return (sign, *rule.decay_line) if rule.weight_decay else (sign, 0.0, 0.0)


def _decay(rule: Governed) -> str:
    return DECAY_MODES.get(rule.decay, rule.decay) if rule.weight_decay else "plain"


def _forms(operations: Sequence[Operation]) -> tuple[Any, ...]:
    """Return what is the same of operations whatever numbers a rule has."""
    return tuple([(op[:2], op[3:7], op[8:]) for op in operations])
