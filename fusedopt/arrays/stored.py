"""The arrays that a step updates: how each is stored, and the memory of those that are new."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

from .formats import PLAIN_OF, Format, Values
from .order import flattened, memory_order, shaped

LINE = 64  # bytes: of a cache line, and of the widest vector
WINDOW = 32 << 20
"""Bytes of states in a file that a step has in memory at a time."""

AVERAGE = "average"
"""The state that holds a parameter's average."""

SLOW = "slow_weights"
"""The state that holds a parameter's slow weights."""

WEIGHTS = (SLOW, AVERAGE)
"""States that begin as their parameter, in the type that it is computed in."""


@dataclass(frozen=True, eq=False)
class Stored:
    """The elements of one array as they are stored.

    data: elements of the array's shape, or flat codes. aux: flat; None where the format has none.
    order: in which the elements of `shape` lie in memory.
    """

    format: Format
    data: np.ndarray
    aux: np.ndarray | None
    shape: tuple[int, ...]
    order: str

    @classmethod
    def plain(cls, array: np.ndarray) -> Stored:
        """A dense array of NumPy's own as it is."""
        return cls(PLAIN_OF[array.dtype], array, None, array.shape, memory_order(array))

    @property
    def arrays(self) -> list[np.ndarray]:
        """The memory that a step writes."""
        return [self.data] if self.aux is None else [self.data, self.aux]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)

    @property
    def spec(self) -> Any:
        """The array as the compiled core takes it."""
        if self.format.codec == self.data.dtype.name:
            return self.data
        return self.format.codec, self.data, self.aux

    @property
    def values(self) -> Values:
        """The elements in the type that they are computed in, of the array's shape; a copy."""
        flat = self.format.decode(self.flat_data, self.aux)
        values: Values = shaped(flat[: self.size], self.shape, self.order)
        return values

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def flat_data(self) -> np.ndarray:
        """The data in memory order."""
        return self.flat(self.data) if self.data.shape == self.shape else self.data.reshape(-1)

    def flat(self, x: Values) -> Values:
        """Elements of the array's shape, in memory order."""
        elements: Values = flattened(x, self.order)
        return elements

    def write(self, encoded: tuple[np.ndarray, Any], rows: np.ndarray | None = None) -> None:
        """Store what the format made of flat elements; of these rows alone, if given."""
        for mine, new in zip(self.arrays, encoded, strict=False):
            if rows is None:
                alike = mine.shape == self.shape
                mine[...] = shaped(new, mine.shape, self.order if alike else "C")
            elif rows.size:
                count = self.shape[0]
                mine.reshape(count, -1)[rows] = new.reshape(count, -1)[rows]

    def fill(self, value: float) -> None:
        """Set every element."""
        self.write(self.format.encode(np.full(self.size, value)))

    def copy(self) -> Stored:
        """Return a copy of the elements in memory of their own."""
        aux = None if self.aux is None else self.aux.copy()
        return type(self)(self.format, self.data.copy(order="K"), aux, self.shape, self.order)

    @property
    def visible(self) -> Any:
        """The state as a user sees it: its array, or this object where it is quantised."""
        return self if self.format.quantized else self.data


class Quantized(Stored):
    """A quantised state: codes, and a float32 scale for each block of elements in memory order."""

    @property
    def codes(self) -> np.ndarray:
        """The live codes, uint8, flat; two to a byte where they have four bits."""
        return self.data

    @property
    def scales(self) -> np.ndarray:
        """The live scales, float32, one for each block."""
        assert self.aux is not None
        return self.aux

    def dequantize(self) -> np.ndarray:
        """The state's values in float32, in the parameter's shape; a copy."""
        values: np.ndarray = self.values
        return values

    def __repr__(self) -> str:
        return f"Quantized({self.format.name}, shape={self.shape}, {self.nbytes} bytes)"


@dataclass(frozen=True)
class ArraySpec:
    """An array to be allocated like another, in a format of its own.

    shape: of its own, in C order, if given. beside: only what stands beside the elements; these
    are the other array's own. filled: whether its maker writes to it before the first step.
    """

    format: Format
    like: np.ndarray
    initial: float = 0.0
    beside: bool = False
    shape: tuple[int, ...] | None = None
    filled: bool = False

    def __post_init__(self) -> None:
        block = self.format.bits < 16  # whose scales are float32
        dtype = np.dtype(np.float32) if block else self.format.dtype
        largest = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
        if abs(self.initial) > largest:
            raise ValueError(
                f"a state begins at {self.initial:g}, which {self.format.name} cannot hold; take a"
                " smaller initial value of the rule, or another state_dtype"
            )

    def sizes(self) -> Iterator[int]:
        """Bytes of its data and of what stands beside it, where they are to be allocated."""
        n = self.like.size if self.shape is None else math.prod(self.shape)
        if not self.beside:
            yield self.format.data_size(n) * self.format.dtype.itemsize
        if self.format.aux_dtype is not None:
            yield self.format.aux_size(n) * self.format.aux_dtype.itemsize


Block = Callable[[int], np.ndarray]
"""A function of a number of bytes that returns as many zeros, uint8."""


def in_memory(size: int) -> np.ndarray:
    """Pages stay untouched until the first step."""
    return np.zeros(size, np.uint8)


def allocate(
    wanted: Sequence[ArraySpec],
    block: Block = in_memory,
    place: Callable[[Sequence[Sequence[np.ndarray]]], None] = lambda pieces: None,
) -> list[Stored]:
    """Return new arrays, with the shapes and memory orders of others.

    All of them lie in one block, each on a line of its own. With 1000 tensors of 1000 elements a
    step took 250 us on one core, and 310 to 430 with each state an array of its own. place: gets
    the bytes of each array, and of what stands beside it, before anything is written to them.
    """
    total = sum(-(-size // LINE) * LINE for w in wanted for size in w.sizes())
    memory = block(total + LINE if total else 0)
    at = -memory.__array_interface__["data"][0] % LINE

    def take(size: int) -> np.ndarray:
        nonlocal at
        piece = memory[at : at + size]
        at += -(-size // LINE) * LINE
        return piece

    pieces = [[take(size) for size in w.sizes()] for w in wanted]
    place(pieces)
    return [_make(w, *own) for w, own in zip(wanted, pieces, strict=True)]


def _make(w: ArraySpec, data: np.ndarray, aux: np.ndarray | None = None) -> Stored:
    aux_dtype = w.format.aux_dtype or np.dtype(np.uint8)
    shape, order = w.like.shape, memory_order(w.like)
    if w.shape is not None:
        shape, order = w.shape, "C"
    if w.beside:  # the caller's array stays that very object: the core watches it
        return Stored(w.format, w.like, data.view(aux_dtype), shape, order)
    if w.format.zero:
        data.fill(w.format.zero)
    data = data.view(w.format.dtype)
    if aux is not None:
        aux = aux.view(aux_dtype)
    if w.format.bits >= 16:
        data = shaped(data, shape, order)
    cls = Quantized if w.format.quantized else Stored
    made = cls(w.format, data, aux, shape, order)
    if w.initial:
        made.fill(w.initial)
    return made


@dataclass(frozen=True, eq=False)
class LeafState:
    """The arrays that a step writes of one leaf.

    parameter: the elements that are computed with. states: by name. mirrors: arrays into which the
    new parameter is written besides; with separate masters the first is the caller's parameter.
    extra: the name of what there is beside the caller's parameter ("master", "low",
    "compensation"), and its array. sides: states of another shape, by name.
    """

    parameter: Stored
    states: Mapping[str, Stored]
    mirrors: tuple[np.ndarray, ...] = ()
    extra: tuple[str, np.ndarray] | None = None
    sides: Mapping[str, Stored] = field(default_factory=dict)

    @property
    def operands(self) -> list[Stored]:
        """The parameter, then the states of its shape."""
        return [self.parameter, *self.states.values()]

    @property
    def stored(self) -> list[Stored]:
        """The parameter, then all states."""
        return [*self.operands, *self.sides.values()]

    @property
    def caller(self) -> np.ndarray:
        """The caller's parameter."""
        return self.mirrors[0] if self._separate else self.parameter.data

    @property
    def copies(self) -> tuple[np.ndarray, ...]:
        """The copies of the parameter that the caller gets."""
        return self.mirrors[1:] if self._separate else self.mirrors

    @property
    def _separate(self) -> bool:
        return self.extra is not None and self.extra[0] == "master"

    @property
    def written(self) -> list[np.ndarray]:
        """Every array that a step writes: the caller's parameter, its copies, the rest."""
        own = [a for stored in self.stored for a in stored.arrays]
        rest = [a for a in own if a is not self.caller]
        return [self.caller, *self.copies, *rest]

    @property
    def saved(self) -> dict[str, np.ndarray]:
        """Arrays that a checkpoint holds, by name: all but those of the caller's."""
        saved = dict([self.extra]) if self.extra else {}
        for name, state in self.states.items():
            if isinstance(state, Quantized):
                saved |= {f"{name}.codes": state.codes, f"{name}.scales": state.scales}
            else:
                saved[name] = state.data
        return saved | {name: side.data for name, side in self.sides.items()}

    @property
    def visible(self) -> dict[str, Any]:
        """The states as a user sees them, by name, with what there is beside the parameter."""
        return {
            **{name: state.visible for name, state in self.states.items()},
            **{name: side.data for name, side in self.sides.items()},
            **(dict([self.extra]) if self.extra else {}),
        }

    def copy(self) -> LeafState:
        """Return a copy in memory of its own, for a step on trial."""
        parameter = self.parameter.copy()
        states = {name: state.copy() for name, state in self.states.items()}
        mirrors = tuple(a.copy(order="K") for a in self.mirrors)
        extra = self.extra and (self.extra[0], parameter.arrays[-1])
        sides = {name: side.copy() for name, side in self.sides.items()}
        return LeafState(parameter, states, mirrors, extra, sides)

    def rebound(self, p: np.ndarray) -> LeafState:
        """Return the state of a leaf whose parameter is at another address."""
        if self._separate:
            return replace(self, mirrors=(p, *self.copies))
        return replace(self, parameter=replace(self.parameter, data=p))

    def take(self, other: LeafState) -> None:
        """Copy another one's elements."""
        for a, b in zip(self.written, other.written, strict=True):
            a[...] = b
