"""Shares: which rank updates which elements of which leaf."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from ..arrays.formats import SEGMENT
from ..arrays.order import flattened, memory_order
from ..rules.base import Rule

LONGEST_ROW = 8192
"""Elements; longer rows may be cut across ranks, so that their leaf takes no gradient of `Rows`."""

BYTES_PER_FLOP = 0.2
"""Cost of a product's operation in bytes moved: 50 GFLOP/s and 10 GB/s of one core."""


@dataclass(frozen=True)
class Cut:
    """The cuts of one leaf: rank r updates elements [bounds[r], bounds[r + 1]), in memory order.

    row: number of elements of a row if no row is cut, else 0. owner: the rank of a leaf that is
    not cut.
    """

    bounds: tuple[int, ...]
    row: int
    owner: int | None

    @property
    def sizes(self) -> list[int]:
        """The number of elements of each rank."""
        return [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]

    def holds(self, rank: int) -> bool:
        """Return whether a rank has a part of the leaf, which may be an empty leaf."""
        return rank == self.owner if self.owner is not None else self.sizes[rank] > 0

    def part(self, a: np.ndarray, rank: int) -> np.ndarray:
        """A rank's part of an array like the parameter, as a view."""
        if self.owner is not None:
            if rank == self.owner:
                return a
            return a[(slice(0, 0),) * a.ndim] if a.ndim else flat(a)[:0]
        start, stop = self.bounds[rank], self.bounds[rank + 1]
        if self.row:
            return a[start // self.row : stop // self.row]
        return flat(a)[start:stop]


def flat(a: np.ndarray) -> np.ndarray:
    """The elements of a dense array in memory order, as a view."""
    elements: np.ndarray = flattened(a, memory_order(a))
    return elements


def cut(parameters: Sequence[np.ndarray], rules: Sequence[Rule], size: int) -> list[Cut]:
    """Share the leaves out to `size` ranks, so that their costs are equal.

    What a rule treats as a whole, and leaves of few elements, go to one rank each, the
    most expensive first to whoever has least. The others are laid end to end and cut where each
    rank has its fill. Cuts are at multiples of 16384 elements: there begin the sums of a norm, the
    blocks of scales and the tiles of random bits, which thus are the ones of the whole leaf.
    """
    costs = [_cost(p, rule) for p, rule in zip(parameters, rules, strict=True)]
    units = [_unit(p, rule) for p, rule in zip(parameters, rules, strict=True)]
    loads = [0.0] * size
    cuts: dict[int, Cut] = {}
    whole = [k for k, p in enumerate(parameters) if p.size < 2 * units[k][0]]
    for k in sorted(whole, key=lambda k: (-costs[k], k)):
        owner = min(range(size), key=lambda rank: (loads[rank], rank))
        loads[owner] += costs[k]
        bounds = [0] * (owner + 1) + [parameters[k].size] * (size - owner)
        cuts[k] = Cut(tuple(bounds), 0, owner)
    rest = [k for k in range(len(parameters)) if k not in cuts]
    ends = _ends(loads, sum(costs[k] for k in rest))
    begun = 0.0
    for k in rest:
        n, (unit, row) = parameters[k].size, units[k]
        marks = [(end - begun) / costs[k] * n for end in ends]
        inner = [min(n, max(0, round(mark / unit) * unit)) for mark in marks[:-1]]
        bounds = [0, *inner, n]
        begun += costs[k]
        cuts[k] = Cut(tuple(bounds), row, None)
    return [cuts[k] for k in range(len(parameters))]


def _ends(loads: Sequence[float], rest: float) -> list[float]:
    """Return the end of each rank's part of the rest, if all are to be filled to one level."""
    low, high = 0.0, max(loads) + rest
    for _ in range(100):
        level = (low + high) / 2
        if sum(max(0.0, level - load) for load in loads) < rest:
            low = level
        else:
            high = level
    return list(accumulate(max(0.0, high - load) for load in loads))


def _unit(p: np.ndarray, rule: Rule) -> tuple[int, int]:
    """The number of elements at whose multiples a leaf may be cut; that of a row, if it is kept."""
    by_row = rule.program.axis == 0 and rule.program.slices(p.shape) > 0 and memory_order(p) == "C"
    if p.ndim == 0 or p.size == 0 or (rule.program.phases > 1 and not by_row):
        return max(p.size, 1), 0
    row = p.size // p.shape[0]
    if not by_row and (memory_order(p) != "C" or row > LONGEST_ROW):
        return SEGMENT, 0
    return math.lcm(row, SEGMENT), row


def _cost(p: np.ndarray, rule: Rule) -> float:
    """Bytes that a step moves, operations of matrix products converted to them."""
    cost = float(p.size * 4 * (3 + 2 * len(rule.states)))
    stack = rule.matrices(p.shape)
    if stack is not None and p.size:
        count, *sides = stack
        short, long = sorted(sides)
        steps = getattr(rule, "ns_steps", 5)
        cost += count * steps * (4.0 * short**2 * long + 2.0 * short**3) * BYTES_PER_FLOP
    return cost
