"""Cases of several factors in which every few values of different factors come together."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]

TRIES = 20
"""Completions of a combination that are tried before it counts as impossible."""


def covering(
    factors: Mapping[str, Sequence[Any]], strength: int, possible: Callable[[Case], bool]
) -> Iterator[Case]:
    """Yield possible cases until each combination of `strength` values has been in one.

    Left out are combinations of which `TRIES` cases were impossible. Always the same cases.
    """
    draw = random.Random(strength)
    numbered = {name: [(name, k) for k in range(len(values))] for name, values in factors.items()}
    left = {
        combination
        for names in combinations(factors, strength)
        for combination in product(*(numbered[name] for name in names))
    }
    for combination in sorted(left, key=repr):
        for _ in range(TRIES if combination in left else 0):
            numbers = {name: draw.randrange(len(values)) for name, values in factors.items()}
            numbers.update(combination)
            case = {name: factors[name][k] for name, k in numbers.items()}
            if possible(case):
                left -= set(combinations(numbers.items(), strength))
                yield case
                break
