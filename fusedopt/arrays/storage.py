"""The storage options of an optimizer, checked and applied to its parameters and states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol, get_args

import numpy as np

from ..system.extension import core
from ..system.threads import in_use
from .formats import (
    BFLOAT16,
    FLOAT16,
    KAHAN,
    PLAIN,
    PLAIN_OF,
    QUANTIZED,
    QUANTIZED_STOCHASTIC,
    SPLIT16,
    STOCHASTIC,
    Format,
    RandomKey,
    compute_dtype,
)
from .rows import check_slices
from .stored import WEIGHTS, ArraySpec, Block, LeafState, Stored, allocate, in_memory

StateDtype = str | Mapping[str, str] | None
Master = Literal["float32", "split16"]
Rounding = Literal["nearest", "stochastic", "kahan"]

STATE_DTYPES = (*PLAIN, *QUANTIZED)
QUANTIZED_FROM = 4096
"""Elements; smaller leaves keep their states in float32, as bitsandbytes has it."""

LOW = (BFLOAT16, FLOAT16)


class StateSpec(Protocol):
    """The part of a rule that names a parameter's states: see `fusedopt.rules.base.Rule`."""

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the states of the parameter's shape."""

    @property
    def nonnegative(self) -> frozenset[str]:
        """The states that are never negative."""

    def initial(self, state: str) -> float:
        """The value with which a state begins."""

    def sides(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The states of another shape, and that shape."""

    @property
    def program(self) -> Any:
        """The program of a step, which may be of a parameter's rows."""


def own_states(rule: StateSpec) -> tuple[str, ...]:
    """Return the names of a rule's states, with none beside them."""
    return rule.states


@dataclass(frozen=True)
class Storage:
    """state_dtype: of all states, or by the state's name. master, rounding: see `Optimizer`."""

    state_dtype: StateDtype = None
    master: Master | None = None
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        if self.state_dtype is None:
            names: list[object] = []
        elif isinstance(self.state_dtype, Mapping):
            names = list(self.state_dtype.values())
        else:
            names = [self.state_dtype]
        for name in names:
            if not isinstance(name, str):
                raise TypeError(
                    f"state_dtype: expected one of {', '.join(STATE_DTYPES)}, or a mapping of"
                    f" states to these; got {name!r}"
                )
            _check_choice("state_dtype", name, STATE_DTYPES)
        if self.master is not None:
            _check_choice("master", self.master, get_args(Master))
        _check_choice("rounding", self.rounding, get_args(Rounding))
        if self.rounding == "kahan" and self.master:
            raise ValueError(
                f"rounding: 'kahan' compensates bfloat16 parameters that have no masters; with"
                f" master={self.master!r} leave it out"
            )

    def check(
        self,
        labels: Sequence[str],
        dtypes: Sequence[np.dtype],
        shapes: Sequence[tuple[int, ...]],
        rules: Sequence[StateSpec],
    ) -> None:
        """Raise ValueError or TypeError where an argument applies to nothing, or does not fit."""
        states = [name for rule in rules for name in rule.states]
        if isinstance(self.state_dtype, Mapping):
            for name in self.state_dtype:
                if name not in states:
                    known = ", ".join(dict.fromkeys(states)) or "none"
                    raise ValueError(f"state_dtype[{name!r}]: no such state; there are: {known}")
        for label, dtype in zip(labels, dtypes, strict=True):
            if self.master == "split16" and dtype == FLOAT16:
                raise ValueError(
                    f"master: 'split16' goes with bfloat16, and {label} is float16; take 'float32'"
                )
        if self.master and not any(dtype in LOW for dtype in dtypes):
            raise ValueError(
                f"master: {self.master!r} is for bfloat16 and float16 parameters, of which there"
                " are none"
            )
        if self.rounding == "kahan" and BFLOAT16 not in dtypes:
            raise ValueError(
                "rounding: 'kahan' is for bfloat16 parameters, of which there are none"
            )
        for label, dtype, shape, rule in zip(labels, dtypes, shapes, rules, strict=True):
            if rule.program.slices(shape):
                size = math.prod(shape)
                formats = {"the parameter": self.parameter(dtype)}
                formats |= {s: self.state(rule, s, dtype, size) for s in rule.states}
                check_slices(label, type(rule).__name__, shape, formats, rule.program.axis)
        if self.rounding == "stochastic":
            stored = [
                f for rule, d in zip(rules, dtypes, strict=True) for f in self._formats(rule, d)
            ]
            if not any(f.random for f in stored):
                raise ValueError(
                    "rounding: 'stochastic' is for parameters and states in bfloat16, float16 or"
                    " quantised, of which there are none"
                )

    def _formats(self, rule: StateSpec, dtype: np.dtype) -> Iterator[Format]:
        yield self.parameter(dtype)
        yield from (self.state(rule, name, dtype, QUANTIZED_FROM) for name in rule.states)

    def parameter(self, dtype: np.dtype) -> Format:
        """Return the format in which a parameter is computed."""
        if dtype not in LOW:
            return PLAIN_OF[dtype]
        if self.master:
            return SPLIT16 if self.master == "split16" else PLAIN["float32"]
        if self.rounding == "kahan" and dtype == BFLOAT16:
            return KAHAN
        return self._rounded(dtype.name)

    def state(self, rule: StateSpec, name: str, dtype: np.dtype, size: int) -> Format:
        """Return the format of a state, for a parameter of this dtype and size."""
        if name in WEIGHTS:
            return PLAIN_OF[compute_dtype(dtype)]
        chosen = self.state_dtype
        if isinstance(chosen, Mapping):
            chosen = chosen.get(name)
        if chosen is None:
            chosen = compute_dtype(dtype).name
        if chosen in PLAIN:
            return self._rounded(chosen)
        if size < QUANTIZED_FROM:
            return PLAIN_OF[compute_dtype(dtype)]
        formats = QUANTIZED_STOCHASTIC if self.rounding == "stochastic" else QUANTIZED
        return formats[chosen][name in rule.nonnegative]

    def describe(self, rule: StateSpec, name: str, p: np.ndarray) -> str:
        """A state's name and format, with the reason where it is not the one asked for."""
        chosen = self.state_dtype
        if isinstance(chosen, Mapping):
            chosen = chosen.get(name)
        format = self.state(rule, name, p.dtype, p.size)
        small = chosen in QUANTIZED and not format.quantized
        return f"{name} {format.name}" + f" (below {QUANTIZED_FROM} elements)" * small

    def _rounded(self, name: str) -> Format:
        stochastic = self.rounding == "stochastic" and name in STOCHASTIC
        return STOCHASTIC[name] if stochastic else PLAIN[name]

    def keys(
        self,
        seed: int,
        paths: Sequence[str],
        leaf_states: Sequence[LeafState],
        first_tiles: Sequence[int] | None = None,
    ) -> list[list[RandomKey]]:
        """The keys of random bits, for each leaf those of its parameter and states.

        first_tiles: where the leaves begin in those that they are parts of; None: each is whole.
        """
        if self.rounding != "stochastic":
            return [[RandomKey()] * len(leaf_state.operands) for leaf_state in leaf_states]
        from hashlib import blake2b  # 3 ms of import, for this and fingerprints

        def key(path: str, operand: str, first_tile: int) -> RandomKey:
            text = f"{seed} {path} {operand}".encode()
            bits = blake2b(text, digest_size=8).digest()
            return RandomKey(int.from_bytes(bits, "little"), first_tile)

        return [
            [key(path, operand, first) for operand in ("p", *leaf_state.states)]
            for path, leaf_state, first in zip(
                paths, leaf_states, first_tiles or [0] * len(leaf_states), strict=True
            )
        ]

    def allocate(
        self,
        rules: Sequence[StateSpec],
        parameters: Sequence[np.ndarray],
        copies: Sequence[np.ndarray | None],
        states_of: Callable[[Any], tuple[str, ...]] = own_states,
        block: Block = in_memory,
    ) -> list[LeafState]:
        """The memory of each leaf; masters, averages and slow weights begin as their parameters.

        copies: of each leaf the array that gets a copy of the new parameter, or None. states_of:
        the names of a rule's states, and of those kept beside them. block: where what is new lies.
        """
        wanted: list[ArraySpec] = []
        for rule, p in zip(rules, parameters, strict=True):
            if self.keeps_more(p):
                format = self.parameter(p.dtype)
                beside = format.aux_dtype is not None
                wanted.append(ArraySpec(format, p, beside=beside, filled=True))
            wanted += [
                ArraySpec(
                    self.state(rule, s, p.dtype, p.size), p, rule.initial(s), filled=s in WEIGHTS
                )
                for s in states_of(rule)
            ]
            plain = PLAIN_OF[compute_dtype(p.dtype)]
            wanted += [
                ArraySpec(plain, p, rule.initial(name), shape=shape)
                for name, shape in rule.sides(p.shape).items()
            ]
        place = partial(_place, wanted, parameters)
        fresh = iter(allocate(wanted, block, *([place] if block is in_memory else [])))
        leaf_states = []
        for rule, p, copied in zip(rules, parameters, copies, strict=True):
            own = next(fresh) if self.keeps_more(p) else None
            states = {name: next(fresh) for name in states_of(rule)}
            sides = {name: next(fresh) for name in rule.sides(p.shape)}
            leaf_state = replace(self.leaf_state(Stored.plain(p), own, states, copied), sides=sides)
            synchronize(leaf_state)
            for name in states.keys() & WEIGHTS:
                states[name].data[...] = leaf_state.parameter.values
            leaf_states.append(leaf_state)
        return leaf_states

    def keeps_more(self, p: np.ndarray) -> bool:
        """Return whether there is a master of a parameter, or anything beside its elements."""
        format = self.parameter(p.dtype)
        return format.dtype != p.dtype or format.aux_dtype is not None

    def leaf_state(
        self,
        p: Stored,
        own: Stored | None,
        states: Mapping[str, Stored],
        copied: np.ndarray | None,
    ) -> LeafState:
        """The memory of a parameter, without side states. own: what it keeps besides its elements,
        or instead of them."""
        mirrors = () if copied is None else (copied,)
        if own is None:
            stored = replace(p, format=self.parameter(p.data.dtype))
            return LeafState(stored, states, mirrors)
        if own.aux is None:
            return LeafState(own, states, (p.data, *mirrors), ("master", own.data))
        name = "low" if own.format is SPLIT16 else "compensation"
        return LeafState(own, states, mirrors, (name, own.aux))


def synchronize(leaf_state: LeafState) -> None:
    """Take the master anew from the parameter, where there is one."""
    if leaf_state.extra is None:
        return
    name, array = leaf_state.extra
    if name == "master":
        array[...] = leaf_state.caller
    else:
        array[...] = 0


def _check_choice(what: str, value: object, valid: Sequence[str]) -> None:
    if value not in valid:
        raise ValueError(f"{what}: expected one of {', '.join(valid)}; got {value!r}")


def _place(
    wanted: Sequence[ArraySpec],
    parameters: Sequence[np.ndarray],
    pieces: Sequence[Sequence[np.ndarray]],
) -> None:
    """Let the threads of a step be the first to touch what is filled before the first step.

    The system puts a page into the memory of the thread that touches it first; everything else is
    touched first by the first step.
    """
    places: dict[int, list[np.ndarray]] = {id(p): [] for p in parameters}
    for spec, own in zip(wanted, pieces, strict=True):
        if spec.filled or spec.initial or spec.format.zero:
            places[id(spec.like)] += own
    if core and any(places.values()):
        core.first_touch([(p.size, places[id(p)]) for p in parameters], in_use())
