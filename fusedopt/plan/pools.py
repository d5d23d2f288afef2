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

OWN = ("lr", "weight_decay", "decay", "maximize")
"""Hyperparameters in which the groups of one optimizer may differ though they share their sums."""


class Pool(NamedTuple):
    """Leaves whose measures are taken together. rule: that of the first."""

    rule: Rule
    leaves: list[int]


class Pools:
    """The pools of an optimizer.

    After a step has measured, and before it writes anything, `combine` gives each leaf the sums and
    maxima of its pool, and finds the numbers that the rule will keep; `keep` stores these when all
    else of the step has been written. They are side states of every leaf of the pool, with or
    without a gradient, and are read from one of the widest type. `programs` are those of the
    groups.
    """

    def __init__(self, spec: PlanSpec) -> None:
        self._spec = spec
        found: dict[Any, Pool] = {}
        for k, g in enumerate(spec.group_of):
            rule = spec.groups[g].rule
            if rule.pooled:
                key = g if rule.over == "group" else type(rule)
                found.setdefault(key, Pool(rule, [])).leaves.append(k)
                _check_alike(found[key].rule, rule, spec.groups[g].label)
        self._pools = list(found.values())
        self.programs = [spec.extras.program(group.rule) for group in spec.groups]
        for pool in self._pools:
            for g in {spec.group_of[k] for k in pool.leaves} if pool.rule.kept else ():
                recall = functools.partial(self._kept, pool)
                self.programs[g] = self.programs[g].recalling(recall)
        self._fresh: list[tuple[Pool, tuple[float, ...]]] = []

    def __bool__(self) -> bool:
        return bool(self._pools)

    def succeeded(self, groups: Sequence[Group], extras: Extras) -> Pools:
        """Return the pools of the same leaves with other rules."""
        return Pools(replace(self._spec, groups=groups, extras=extras))

    def take(self, other: Pools) -> None:
        """Become what another is."""
        self.__dict__.update(other.__dict__)

    def combine(self, leaves: Sequence[int]) -> None:
        """Put the sums of each pool into the results of its leaves that take part in the step."""
        spec = self._spec
        self._fresh = []
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
                self.renew(pool, found[-len(rule.kept) :])

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

    def renew(self, pool: Pool, numbers: tuple[float, ...]) -> None:
        """Let `keep` store other numbers of a pool."""
        self._fresh.append((pool, numbers))

    def keep(self) -> None:
        """Store the numbers that rules keep."""
        spec = self._spec
        for pool, numbers in self._fresh:
            for k in pool.leaves:
                for name, number in zip(pool.rule.kept, numbers, strict=True):
                    side = spec.leaves[k].sides[name].data
                    with np.errstate(all="ignore"):
                        side[...] = number
                    if abs(side) < np.finfo(side.dtype).smallest_normal:
                        side[...] = 0
        if self._fresh and spec.state_file:
            spec.state_file.release()
        self._fresh = []

    def _kept(self, pool: Pool) -> tuple[float, ...]:
        sides = self._spec.leaves[self.widest(pool.leaves)].sides
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
