"""Sums that rules take over several leaves, and the numbers that they keep of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..arrays.formats import compute_dtype
from ..programs.arithmetic import Pooling, Sums
from ..rules.base import Rule
from ..rules.groups import Group
from .extras import Extras
from .spec import PlanSpec

T = TypeVar("T")

Kept = tuple[np.ndarray, np.ndarray]
"""A place in memory, and what is to be stored there: each one number of the same type."""

OWN = ("lr", "weight_decay", "decay", "maximize")
"""Hyperparameters in which the groups of one optimizer may differ though they share their sums."""


class Pool(NamedTuple):
    """Leaves whose measures are taken together. rule: that of the first. widest: the first of those
    that are computed in the widest type."""

    rule: Rule
    leaves: list[int]
    widest: int


class Pools:
    """The pools of an optimizer.

    After a step has measured, and before it writes anything, `combine` gives each leaf the sums and
    maxima of its pool, and finds the numbers that the rule will keep; they are stored when all else
    of the step has been written. They are side states of every leaf of the pool, with or without a
    gradient, and are read from one of the widest type. `programs` are those of the groups.
    """

    def __init__(self, spec: PlanSpec) -> None:
        self._spec = spec
        found: dict[Any, tuple[Rule, list[int]]] = {}
        for k, g in enumerate(spec.group_of):
            rule = spec.groups[g].rule
            if rule.pooled:
                key = g if rule.over == "group" else type(rule)
                first, leaves = found.setdefault(key, (rule, []))
                leaves.append(k)
                _check_alike(first, rule, spec.groups[g].label)
        self._pools = [
            Pool(rule, members, self.widest(members)) for rule, members in found.values()
        ]
        self.programs = [spec.extras.program(group.rule) for group in spec.groups]
        for pool in self._pools:
            for g in {spec.group_of[k] for k in pool.leaves} if pool.rule.kept else ():
                recall = functools.partial(self._kept, pool)
                self.programs[g] = self.programs[g].recalling(recall)

    def __bool__(self) -> bool:
        return bool(self._pools)

    def succeeded(self, groups: Sequence[Group], extras: Extras) -> Pools:
        """Return the pools of the same leaves with other rules."""
        return Pools(replace(self._spec, groups=groups, extras=extras))

    def take(self, other: Pools) -> None:
        """Become what another is."""
        self.__dict__.update(other.__dict__)

    @property
    def keeps(self) -> bool:
        """Whether a rule keeps numbers."""
        return any(pool.rule.kept for pool in self._pools)

    def combine(self, leaves: Sequence[int]) -> list[Kept]:
        """Put the sums of each pool into the results of its leaves that take part in the step.

        Returns what is to be kept when all else has been written.
        """
        spec, kept = self._spec, list[Kept]()
        for pool, members in self.active(leaves):
            group = spec.group_of[members[0]]
            program = self.programs[group]
            first = 3 + len(program.told)
            own = slice(first, first + program.measures)
            rows = [tuple(row[own].tolist()) for row in spec.results[members]]
            total = tuple(map(float, combined(rows, pool.rule)))
            spec.results[members, own] = total
            if pool.rule.kept:
                t, lr = int(spec.counters[members[0] + 1]) + 1, float(spec.rates[group])
                rule = spec.groups[group].rule
                found = rule.measured(t, lr, total, *self._kept(pool))
                kept += self.to_keep(pool, found[-len(rule.kept) :])
        return kept

    def active(self, leaves: Sequence[int]) -> Iterator[tuple[Pool, list[int]]]:
        """Yield the pools of leaves that take part in a step, and these."""
        taking_part = set(leaves)
        for pool in self._pools:
            members = [k for k in pool.leaves if k in taking_part]
            if members:
                yield pool, members

    def widest(self, leaves: Sequence[int]) -> int:
        """Return the first of those leaves that are computed in the widest type."""
        return max(leaves, key=lambda k: compute_dtype(self._spec.leaves[k].caller.dtype).itemsize)

    def to_keep(self, pool: Pool, numbers: Sequence[float]) -> list[Kept]:
        """Return the places of a pool's numbers in the states of its leaves, with new values."""
        kept = []
        for name, number in zip(pool.rule.kept, numbers, strict=True):
            values: dict[np.dtype, np.ndarray] = {}
            for k in pool.leaves:
                place = self._spec.leaves[k].sides[name].data
                if place.dtype not in values:
                    values[place.dtype] = _without_denormals(number, place.dtype)
                kept.append((place, values[place.dtype]))
        return kept

    def keep(self, kept: Sequence[Kept]) -> None:
        """Store the numbers that rules keep."""
        for place, value in kept:
            place[...] = value
        self.release()

    def release(self) -> None:
        """Let the system take back the memory of states in a file, where numbers were stored."""
        if self.keeps and self._spec.state_file:
            self._spec.state_file.release()

    def _kept(self, pool: Pool) -> tuple[float, ...]:
        sides = self._spec.leaves[pool.widest].sides
        return tuple([float(sides[name].data) for name in pool.rule.kept])


def combined(found: Sequence[Sums], rule: Rule) -> Sums:
    """Return the sums and maxima of several leaves, taken together in their order."""
    sums = len(found[0]) - rule.maxima
    with np.errstate(all="ignore"):  # sums of gradients that are not finite
        return tuple(
            functools.reduce(np.add if j < sums else np.maximum, column)
            for j, column in enumerate(zip(*found, strict=True))
        )


def together(members: Sequence[int], rule: Rule, step: Callable[[int, Pooling], T]) -> dict[int, T]:
    """Return what the reference makes of leaves whose measures are taken together.

    step: of a leaf, with the function that makes its pool's sums of its own; it runs once to learn
    the sums, and once with those of all.
    """
    found: list[Sums] = []

    def learn(sums: Sums) -> Sums:
        found.append(sums)
        return sums

    for k in members:
        step(k, learn)
    total = combined(found, rule)
    return {k: step(k, lambda sums: total) for k in members}


def _without_denormals(number: float, dtype: np.dtype) -> np.ndarray:
    with np.errstate(all="ignore"):
        value = np.array(number, dtype)
    return np.zeros_like(value) if abs(value) < np.finfo(dtype).smallest_normal else value


def _check_alike(first: Rule, rule: Rule, label: str) -> None:
    """Raise ValueError where rules that share their sums differ in more than they may."""
    names = [f.name for f in fields(rule) if f.name not in OWN]
    for name in names:
        one, other = getattr(first, name), getattr(rule, name)
        if one != other:
            raise ValueError(
                f"group {label!r}: {type(rule).__name__} takes its sums over all groups of the"
                f" optimizer, which may differ in {', '.join(OWN)} alone; got {name} {one!r} and"
                f" {other!r}"
            )
