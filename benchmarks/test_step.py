"""Every elementwise rule, at several sizes, by every contender: pytest-benchmark groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from contenders import enter, entrants
from problems import Problem, Shapes, elementwise_rules, gpt2_block, gpt2_small, rule_of, tensors

PROBLEMS: dict[str, tuple[Shapes, type]] = {
    "1 of 1000": (tensors(1, 1000), np.float32),
    "1 of 100000": (tensors(1, 100_000), np.float32),
    "1000 of 1000": (tensors(1000, 1000), np.float32),
    "a GPT-2 block": (gpt2_block(), np.float32),
    "a GPT-2 block in float64": (gpt2_block(), np.float64),
}


def test_gpt2_small_has_its_size() -> None:
    sizes = [int(np.prod(shape)) for shape in gpt2_small().values()]
    assert (len(sizes), sum(sizes)) == (148, 124_439_808)


CASES = [
    (tensors, rule, contender)
    for tensors, (shapes, _) in PROBLEMS.items()
    for rule in elementwise_rules()
    for contender in entrants(rule, len(shapes))
]


@pytest.mark.parametrize(("tensors", "rule", "contender"), CASES)
def test_step(benchmark: Any, tensors: str, rule: str, contender: str) -> None:
    shapes, dtype = PROBLEMS[tensors]
    problem = Problem(shapes, rule_of(rule), dtype)
    (made,) = enter(problem, contender)
    made.check()
    benchmark.group = f"{rule}, {tensors}"
    benchmark(made.step)
    benchmark.extra_info["bytes"] = problem.bytes_per_step
    if benchmark.stats is not None:  # with --benchmark-disable there are none
        speed = problem.bytes_per_step / benchmark.stats.stats.median
        benchmark.extra_info["GB/s"] = round(speed / 1e9, 2)
