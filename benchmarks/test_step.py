"""Steps by rule, size and contender, and by what else matters: pytest-benchmark groups.

Every test checks its contender's answer on the arrays that it times. `extra_info` has the bytes
that the step must move, GB/s, and the share of the limit, timed in turn with the step.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
import whole
from contenders import enter, entrants
from formats import streams
from fusedopt.lab.bench.contenders import LIMIT, Contender
from fusedopt.lab.bench.formats import WAYS, Stored
from fusedopt.lab.bench.measure import PAUSE, interleaved
from fusedopt.lab.bench.problems import (
    Problem,
    Shapes,
    elementwise_rules,
    gpt2_block,
    gpt2_small,
    resnet50,
    rule_of,
    tensors,
)

PROBLEMS: dict[str, tuple[Shapes, type]] = {
    "tiny, 1 of 1000": (tensors(1, 1000), np.float32),
    "1 of 100000": (tensors(1, 100_000), np.float32),
    "1000 of 1000": (tensors(1000, 1000), np.float32),
    "a GPT-2 block in float64": (gpt2_block(), np.float64),
    "ResNet-50": (resnet50(), np.float32),
    "large, 1 of 2^24": (tensors(1, 1 << 24), np.float32),
    "GPT-2 small": (gpt2_small(), np.float32),
}
SLOW_FROM = 10_000_000
"""Elements, from which the NumPy reference is left out: it would take minutes."""
LIMIT_ROUNDS = 5
MATRICES = {
    "512 x 512": {"w": (512, 512)},
    "12 of 256 x 256": {f"w{k}": (256, 256) for k in range(12)},
}
ADAMW = fo.AdamW(lr=1e-4, weight_decay=0.1)


def elements(shapes: Shapes) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values())


def backends(shapes: Shapes) -> list[str]:
    """Return the backends that can be used here and take less than minutes."""
    usable = [name for name, reason in fo.info()["backends"].items() if reason == "available"]
    return [b for b in usable if b != "reference" or elements(shapes) < SLOW_FROM]


def names(rule: str, problem: str) -> Iterator[tuple[str, str]]:
    """Contenders with their backends."""
    shapes, dtype = PROBLEMS[problem]
    for name in entrants(rule, len(shapes)):
        if name in ("optax", "DeepSpeed") and dtype is not np.float32:
            continue  # jax has no float64 unless told to, and DeepSpeed none
        for backend in backends(shapes) if name == "fusedopt" else ["native"]:
            yield name, backend


@functools.lru_cache(maxsize=1)
def problem_of(name: str, rule: str, backend: str) -> Problem:
    """One for all contenders in turn."""
    shapes, dtype = PROBLEMS[name]
    return Problem(shapes, rule_of(rule), dtype, backend)


def run(
    benchmark: Any, group: str, made: Contender, limit: Callable[[], object], moved: int, *,
    asleep: bool = False,
) -> None:  # fmt: skip
    """Checks the contender's step, times it, and then the limit in turn with it."""
    made.check()
    benchmark.group = group
    if asleep:
        benchmark.pedantic(made.step, setup=lambda: time.sleep(PAUSE), rounds=15, iterations=1)
    else:
        benchmark(made.step)
    benchmark.extra_info["bytes"] = moved
    if benchmark.stats is not None:  # with --benchmark-disable there are none
        speed = moved / benchmark.stats.stats.median
        benchmark.extra_info["GB/s"] = round(speed / 1e9, 2)
        times = interleaved({"step": made.step, "limit": limit}, LIMIT_ROUNDS, asleep=asleep)
        benchmark.extra_info["share of the limit"] = round(times.ratio("limit", "step"), 3)


def run_step(
    benchmark: Any, group: str, problem: str, rule: str, name: str, backend: str, *,
    asleep: bool = False,
) -> None:  # fmt: skip
    arrays = problem_of(problem, rule, backend)
    made, limit = enter(arrays, name, LIMIT)
    run(benchmark, group, made, limit.step, arrays.bytes_per_step, asleep=asleep)


def test_the_lists_have_their_sizes() -> None:
    sizes = [(len(shapes), elements(shapes)) for shapes in (gpt2_small(), resnet50())]
    assert sizes == [(148, 124_439_808), (161, 25_557_032)]


CASES = [
    (problem, rule, *name)
    for problem in PROBLEMS
    for rule in elementwise_rules()
    for name in names(rule, problem)
]
ADAMW_CASES = [case for case in CASES if case[1] == "adamw"]
ARGUMENTS = ("problem", "rule", "contender", "backend")


@pytest.mark.parametrize(ARGUMENTS, CASES)
def test_step(benchmark: Any, problem: str, rule: str, contender: str, backend: str) -> None:
    run_step(benchmark, f"{rule}, {problem}", problem, rule, contender, backend)


@pytest.mark.parametrize(ARGUMENTS, ADAMW_CASES)
def test_step_asleep(benchmark: Any, problem: str, rule: str, contender: str, backend: str) -> None:
    group = f"{rule}, {problem}, threads asleep"
    run_step(benchmark, group, problem, rule, contender, backend, asleep=True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = fo.get_threads()
    fo.set_threads(1)
    yield
    fo.set_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(ARGUMENTS, [case for case in ADAMW_CASES if case[2] != "optax"])
def test_step_on_one_thread(
    benchmark: Any, problem: str, rule: str, contender: str, backend: str
) -> None:
    run_step(benchmark, f"{rule}, {problem}, 1 thread", problem, rule, contender, backend)


@functools.lru_cache(maxsize=1)
def whole_of(name: str) -> whole.Whole:
    """One for all contenders in turn."""
    return whole.Whole(PROBLEMS[name][0])


@pytest.mark.parametrize("shapes", ["1000 of 1000", "ResNet-50", "GPT-2 small"])
@pytest.mark.parametrize("contender", ["fusedopt", "NumPy", "torch"])
def test_whole_step(benchmark: Any, contender: str, shapes: str) -> None:
    arrays = whole_of(shapes)
    able = whole.contenders(arrays)
    if contender not in able:
        pytest.skip(f"{contender} is not installed")
    group = f"clip + adamw + zero, {shapes}"
    run(benchmark, group, able[contender](), whole.limit(arrays).step, arrays.bytes_per_step)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shapes", ["ResNet-50", "GPT-2 small"])
def test_format(benchmark: Any, shapes: str, way: str) -> None:
    stored = Stored(WAYS[way], PROBLEMS[shapes][0], ADAMW)
    made = Contender(way, stored.step, stored.check)
    run(benchmark, f"adamw by format, {shapes}", made, streams(stored), stored.bytes_per_step)


@pytest.mark.parametrize("shapes", MATRICES)
@pytest.mark.parametrize("rule", [name for name in fo.RULES if name not in elementwise_rules()])
@pytest.mark.parametrize("contender", ["fusedopt", "textbook"])
def test_matrices(benchmark: Any, contender: str, rule: str, shapes: str) -> None:
    stored = Stored(WAYS["float32"], MATRICES[shapes], rule_of(rule))
    textbook = stored.textbook
    made = {
        "fusedopt": Contender(contender, stored.step, stored.check),
        "textbook": Contender(contender, textbook, textbook),  # what the other is checked by
    }[contender]
    run(benchmark, f"{rule}, {shapes}", made, streams(stored), stored.bytes_per_step)
