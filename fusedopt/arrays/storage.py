"""What an optimizer stores its parameters and states in: the user's words, checked and applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np

from .formats import (
    BFLOAT16,
    FLOAT16,
    KAHAN,
    PLAIN,
    QUANTIZED,
    QUANTIZED_STOCHASTIC,
    SPLIT16,
    STOCHASTIC,
    Format,
    compute_dtype,
)
from .stored import AVERAGE, Block, Memory, Stored, Wanted, allocate, in_memory

StateDtype = str | Mapping[str, str] | None
Master = Literal["float32", "split16"]
Rounding = Literal["nearest", "stochastic", "kahan"]

STATE_DTYPES = (*PLAIN, *QUANTIZED)
QUANTIZED_FROM = 4096
"""Elements; smaller leaves keep their states in float32, as bitsandbytes has it."""

LOW = (BFLOAT16, FLOAT16)


class StateSpec(Protocol):
    """What says which states a parameter has: see `fusedopt.rules.base.Rule`."""

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
        self, labels: Sequence[str], dtypes: Sequence[np.dtype], rules: Sequence[StateSpec]
    ) -> None:
        """ValueError or TypeError where an argument has nothing to apply to, or does not fit."""
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
        """In which a parameter's elements are computed with."""
        if dtype not in LOW:
            return PLAIN[dtype.name]
        if self.master:
            return SPLIT16 if self.master == "split16" else PLAIN["float32"]
        if self.rounding == "kahan" and dtype == BFLOAT16:
            return KAHAN
        return self._rounded(dtype.name)

    def state(self, rule: StateSpec, name: str, dtype: np.dtype, size: int) -> Format:
        """Of a state, for a parameter of this dtype and size."""
        if name == AVERAGE:
            return PLAIN[compute_dtype(dtype).name]
        chosen = self.state_dtype
        if isinstance(chosen, Mapping):
            chosen = chosen.get(name)
        if chosen is None:
            chosen = compute_dtype(dtype).name
        if chosen in PLAIN:
            return self._rounded(chosen)
        if size < QUANTIZED_FROM:
            return PLAIN[compute_dtype(dtype).name]
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

    def keys(self, seed: int, paths: Sequence[str], memories: Sequence[Memory]) -> list[list[int]]:
        """Of each leaf, for its parameter and states, the keys of their random bits."""
        if self.rounding != "stochastic":
            return [[0] * len(memory.operands) for memory in memories]
        from hashlib import blake2b  # 3 ms, for this and fingerprints

        def key(path: str, operand: str) -> int:
            text = f"{seed} {path} {operand}".encode()
            return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")

        return [
            [key(path, operand) for operand in ("p", *memory.states)]
            for path, memory in zip(paths, memories, strict=True)
        ]

    def allocate(
        self,
        rules: Sequence[StateSpec],
        parameters: Sequence[np.ndarray],
        copies: Sequence[np.ndarray | None],
        states_of: Callable[[Any], tuple[str, ...]] = own_states,
        block: Block = in_memory,
    ) -> list[Memory]:
        """The memory of each leaf; masters begin as their parameters, and so do averages.

        copies: of each leaf the array that gets a copy of the new parameter, or None. states_of:
        the names of a rule's states, and of those kept beside them. block: where what is new lies.
        """
        wanted: list[Wanted] = []
        for rule, p in zip(rules, parameters, strict=True):
            if self._own(p):
                format = self.parameter(p.dtype)
                wanted.append(Wanted(format, p, beside=format.aux_dtype is not None))
            wanted += [
                Wanted(self.state(rule, s, p.dtype, p.size), p, rule.initial(s))
                for s in states_of(rule)
            ]
            plain = PLAIN[compute_dtype(p.dtype).name]
            wanted += [Wanted(plain, p, shape=shape) for shape in rule.sides(p.shape).values()]
        fresh = iter(allocate(wanted, block))
        memories = []
        for rule, p, copied in zip(rules, parameters, copies, strict=True):
            own = next(fresh) if self._own(p) else None
            states = {name: next(fresh) for name in states_of(rule)}
            sides = {name: next(fresh) for name in rule.sides(p.shape)}
            memory = replace(self._memory(p, own, states, copied), sides=sides)
            synchronize(memory)
            if AVERAGE in states:
                states[AVERAGE].data[...] = memory.parameter.values
            memories.append(memory)
        return memories

    def _own(self, p: np.ndarray) -> bool:
        """Whether there is a master of a parameter, or anything beside its elements."""
        format = self.parameter(p.dtype)
        return format.dtype != p.dtype or format.aux_dtype is not None

    def _memory(
        self,
        p: np.ndarray,
        own: Stored | None,
        states: Mapping[str, Stored],
        copied: np.ndarray | None,
    ) -> Memory:
        mirrors = () if copied is None else (copied,)
        if own is None:
            stored = replace(Stored.plain(p), format=self.parameter(p.dtype))
            return Memory(stored, states, mirrors)
        if own.aux is None:
            return Memory(own, states, (p, *mirrors), ("master", own.data))
        name = "low" if own.format is SPLIT16 else "compensation"
        return Memory(own, states, mirrors, (name, own.aux))


def synchronize(memory: Memory) -> None:
    """Takes the master anew from the parameter, where there is one."""
    if memory.extra is None:
        return
    name, array = memory.extra
    if name == "master":
        array[...] = memory.caller
    else:
        array[...] = 0


def _check_choice(what: str, value: object, valid: Sequence[str]) -> None:
    if value not in valid:
        raise ValueError(f"{what}: expected one of {', '.join(valid)}; got {value!r}")
