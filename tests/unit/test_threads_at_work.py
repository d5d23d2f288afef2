"""Which thread works on what: static shares, pages touched first, one thread or all of them."""

from __future__ import annotations

import json
import mmap
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from exactness import SERIAL, run_python
from fusedopt.arrays.stored import AVERAGE
from fusedopt.system.extension import core

pytestmark = pytest.mark.skipif(core is None, reason="is about the compiled core")


def run(choice: Any, seconds: dict[bool, float], steps: int) -> list[bool]:
    """What a `ThreadChoice` asks for in steps that take as long as is given."""
    asked = []
    for _ in range(steps):
        asked.append(choice.all())
        choice.tell(asked[-1], seconds[asked[-1]])
    return asked


@pytest.mark.parametrize("faster", [False, True])
def test_the_faster_way_takes_the_steps(faster: bool) -> None:
    asked = run(core.ThreadChoice(), {faster: 1.0, not faster: 1.3}, 10 * core.THREAD_TRIALS)
    assert set(asked[:3]) == {False, True}, "both are tried at once"
    others = [k for k, all_threads in enumerate(asked) if all_threads != faster and k > 2]
    assert others == list(range(core.THREAD_TRIALS, len(asked), core.THREAD_TRIALS))


@pytest.mark.parametrize("first", [False, True])
def test_a_choice_follows_the_program(first: bool) -> None:
    choice = core.ThreadChoice()
    run(choice, {first: 1.0, not first: 1.6}, 200)
    then = run(choice, {first: 1.6, not first: 1.0}, 10 * core.THREAD_TRIALS)
    last = then[-2 * core.THREAD_TRIALS :]
    assert last.count(first) <= 2, "the change was not noticed"


def test_one_step_that_was_held_up_does_not_decide() -> None:
    choice = core.ThreadChoice()
    run(choice, {True: 1.0, False: 1.6}, 3 * core.THREAD_TRIALS + 5)
    choice.tell(True, 1000.0)
    assert all(run(choice, {True: 1.0, False: 1.6}, core.THREAD_TRIALS // 2))


def test_the_first_step_does_not_count() -> None:
    choice = core.ThreadChoice()
    choice.tell(choice.all(), 1000.0)
    assert all(run(choice, {True: 1.0, False: 1.6}, core.THREAD_TRIALS - 1)[2:])


def test_bits_do_not_depend_on_the_choice() -> None:
    n = 2 * SERIAL + 77
    rng = np.random.default_rng(0)
    p, g = rng.standard_normal((2, n), np.float32)
    alone = p.copy()
    one, all_threads = fo.Optimizer(alone, fo.AdamW(), threads=1), fo.Optimizer(p, fo.AdamW())
    for _ in range(2 * core.THREAD_TRIALS):
        one.step(g)
        all_threads.step(g)
    assert one.fingerprint() == all_threads.fingerprint()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_first_touch_writes_into_every_page_and_nothing_else(threads: int) -> None:
    sizes = [3 * SERIAL + 5, 0, 17, 5 * SERIAL]
    arrays = [[np.ones(4 * n, np.uint8), np.ones(n, np.uint8)] for n in sizes]
    core.first_touch(list(zip(sizes, arrays, strict=True)), threads)
    for pair in arrays:
        for a in pair:
            assert set(np.unique(a).tolist()) <= {0, 1}
            touched = np.flatnonzero(a == 0)
            if a.size:
                edges = np.concatenate([[0], touched, [a.size]])
                assert np.diff(edges).max() <= mmap.PAGESIZE + 1


def test_masters_averages_and_initial_values_are_what_they_were() -> None:
    p = np.linspace(-3, 3, 3 * SERIAL + 11).astype(ml_dtypes.bfloat16)
    rule = fo.AdaGrad(initial_accumulator=0.25)
    optimizer = fo.Optimizer({"a": p, "b": p[:7].copy()}, rule, master="float32", ema=0.9)
    for path, value in (("a", p), ("b", p[:7])):
        state, _ = optimizer.leaf_state(path)
        assert np.array_equal(state.parameter.values, value.astype(np.float32))
        assert np.array_equal(state.states[AVERAGE].values, value.astype(np.float32))
        assert np.all(state.states[rule.states[0]].values == 0.25)


PLACES = """
import json
import fusedopt as fo
from fusedopt.system.extension import core
print(json.dumps(core.thread_processors(fo.get_threads())))
print(json.dumps(fo.info()["thread_nodes"]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
def test_info_names_the_nodes_of_each_thread() -> None:
    done = run_python(PLACES)
    assert done.returncode == 0, done.stderr
    processors, nodes = map(json.loads, done.stdout.splitlines())
    assert len(processors) == len(nodes) == fo.get_threads()
    assert all(processors)
