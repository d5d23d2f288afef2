"""`fusedopt bench`: what is timed is checked, what is written can be read, and two runs compare."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import fusedopt as fo
from fusedopt.arrays.formats import BFLOAT16
from fusedopt.cli import INTERRUPTED, app
from fusedopt.lab.bench import contenders, measure, memory, naive, run
from fusedopt.lab.bench.compare import changes
from fusedopt.lab.bench.contenders import LIMIT
from fusedopt.lab.bench.formats import WAYS, Stored
from fusedopt.lab.bench.problems import (
    Problem,
    elementwise_rules,
    gpt2_small,
    moved,
    resnet50,
    rule_of,
    tensors,
)
from fusedopt.lab.bench.result import Bench, Row
from fusedopt.lab.bench.show import duration, table


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Run the command with the smallest samples, and no PyTorch, which takes long to import."""
    monkeypatch.setattr(measure, "PAUSE", 0.0)
    monkeypatch.setattr(measure, "SAMPLE", 0.0)
    monkeypatch.setattr(run, "SIDE", 16)
    monkeypatch.setattr(run, "PIECE", 5000)
    for module in (run, contenders):
        monkeypatch.setattr(module, "pytorch", lambda: None)

    def invoke(*arguments: str) -> Any:
        own = ("--size", "10000", "--seconds", "0.01", "--out", str(tmp_path / "out"))
        return CliRunner().invoke(app, ["bench", *own, *arguments])

    return invoke


# What is stepped


def test_the_lists_have_the_architectures_sizes() -> None:
    lists = (gpt2_small(), resnet50())
    sizes = [(len(shapes), sum(int(np.prod(s)) for s in shapes.values())) for shapes in lists]
    assert sizes == [(148, 124_439_808), (161, 25_557_032)]


@pytest.mark.parametrize(
    ("rule", "count"),
    [("sgd", 12), ("momentum", 20), ("adagrad", 20), ("adamw", 28), ("lion", 20), ("sophia", 24)],
)
def test_bytes_of_a_step(rule: str, count: int) -> None:
    assert Problem(tensors(2, 10), rule_of(rule)).bytes_per_step == 20 * count


@pytest.mark.parametrize(
    ("way", "count"),
    [
        ("float32", 28),
        ("all bfloat16", 14),
        ("bfloat16, split16", 26),
        ("bfloat16, float32 masters", 28),
        ("float32, bfloat16 gradient and copy", 28),
    ],
)
def test_bytes_of_a_step_by_format(way: str, count: int) -> None:
    stored = Stored(WAYS[way], tensors(2, 5000), fo.AdamW())
    assert (stored.elements, stored.bytes_per_step) == (10_000, 10_000 * count)


@pytest.mark.parametrize("rule", elementwise_rules())
def test_every_contender_takes_the_rules_step(rule: str) -> None:
    able = contenders.entrants(rule, 1)
    careful = {"NumPy", "NumPy, temporaries"} if rule in naive.STEPS else set()
    assert {LIMIT, "fusedopt", "fusedopt.update", "textbook", *careful} <= set(able)
    for dtype in (np.float32, np.float64):
        for name, make in able.items():
            if not name.startswith("torch"):
                make(Problem(tensors(1, 1003), rule_of(rule), dtype)).check()


def test_a_contender_on_used_arrays_is_checked_at_its_own_step() -> None:
    problem = Problem(tensors(3, 101), rule_of("adamw"))
    for _ in range(2):
        for contender in contenders.enter(problem, "fusedopt", "NumPy"):
            contender.check()


def perturb(problem: Problem, what: str) -> None:
    problem.optimizer.step(problem.grads)
    leaf = problem.leaves[1]
    {"p": leaf.p, "m": leaf.states[0], "g": leaf.g}[what][17] *= 1.001


@pytest.mark.parametrize(
    ("what", "message"), [("p", "p: 1 of"), ("m", "m: 1 of"), ("g", "gradients")]
)
def test_a_wrong_element_is_found(what: str, message: str) -> None:
    problem = Problem(tensors(2, 100), rule_of("lion"))
    with pytest.raises(fo.VerificationError, match=message):
        problem.check(lambda: perturb(problem, what))


@pytest.mark.parametrize("way", WAYS)
def test_a_stored_step_is_checked(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Stored(WAYS[way], tensors(2, 5000), fo.AdamW())
    stored.check()
    stored.check()
    monkeypatch.setattr(stored, "step", lambda: None)
    with pytest.raises(fo.VerificationError, match="t0: "):
        stored.check()


def test_a_stored_matrix_and_its_textbook() -> None:
    stored = Stored(WAYS["float32"], {"w": (12, 20)}, rule_of("muon"))
    stored.check()
    before = stored.params["w"].copy()
    stored.textbook()
    assert not np.array_equal(stored.params["w"], before)


# The limit


ARRAYS = [
    [([np.float32], [np.float32])],
    [([np.float32], [np.float32] * 3), ([np.float32], [np.float32] * 3)],
    [([np.float64] * 2, [np.float32])],
    [([BFLOAT16], [np.float32, np.uint8])],
]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("leaves", ARRAYS)
def test_the_sweep_reads_and_writes_every_byte(
    leaves: Any, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    traffic = [
        ([np.ones(4104, d) for d in read], [np.ones(4104, d) for d in updated])
        for read, updated in leaves
    ]
    seen: list[int] = []
    for name, passes in (("_add", (2, 1)), ("_increase", (2,)), ("_read", (1,))):
        work = getattr(memory, name)

        def counted(*arrays: Any, work: Any = work, passes: tuple[int, ...] = passes) -> None:
            seen.extend(a.nbytes * n for a, n in zip(arrays, passes, strict=True))
            work(*arrays)

        monkeypatch.setattr(memory, name, counted)
    memory.Sweep(traffic, threads)()
    assert sum(seen) == moved(traffic)
    assert all((a == 1).all() for leaf in traffic for arrays in leaf for a in arrays)


def test_a_sweep_that_changes_values_is_found() -> None:
    problem = Problem(tensors(1, 100), rule_of("sgd"))
    with pytest.raises(fo.VerificationError, match="limit changed"):
        contenders.idle(problem, lambda: np.negative(*problem.leaves[0][:1] * 2)).check()


# The times


def test_rounds_begin_with_another_each_and_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PAUSE", 0.0)
    called: list[str] = []
    steps = {name: (lambda name=name: called.append(name)) for name in "ab"}
    times = measure.interleaved(steps, 5, asleep=True)
    assert called == list("abbaabbaab")
    assert [len(s) for s in times.seconds.values()] == [5, 5]
    called.clear()
    assert len(measure.interleaved(steps, 50, asleep=True, within=0.0).seconds["a"]) == 3


def test_times() -> None:
    times = measure.Times({"a": [1.0, 4.0, 3.0], "b": [1.0, 2.0, 1.0]})
    assert times.medians() == {"a": 3.0, "b": 1.0}
    assert (times.ratio("a", "b"), times.difference("a", "b")) == (2.0, 2.0)


# The command


@pytest.mark.slow
def test_bench_writes_what_it_shows(quick: Callable[..., Any], tmp_path: Path) -> None:
    before = fo.get_threads()
    result = quick("--threads", "1", "--json", str(tmp_path / "copy.json"))
    assert result.exit_code == 0, result.output
    assert fo.get_threads() == before
    file = tmp_path / "out/bench.json"
    assert file.read_text() == (tmp_path / "copy.json").read_text()
    record = json.loads(file.read_text())
    assert record["status"] == "finished"
    assert record["machine"]["threads"] == 1
    assert record["limit"]["gb_s"] > 0
    assert record["limit"]["how"] in result.output
    rows = record["rows"]
    assert [r["name"] for r in rows if r["group"] == run.LARGE] == elementwise_rules()
    assert [r["name"] for r in rows if r["group"] == run.FORMATS] == list(run.SHOWN_WAYS)
    assert [r["name"] for r in rows if r["group"] == run.MATRIX] == [
        f"{name}, 16 x 16" for name in fo.RULES if name not in elementwise_rules()
    ]
    for row in rows:
        assert f"\n{row['name']} " in result.output
        assert "fusedopt" in row["contenders"]
        for one in row["contenders"].values():
            assert len(one["seconds"]) == 3
            assert one["median_s"] == sorted(one["seconds"])[1]
            assert one["gb_s"] == pytest.approx(row["bytes"] / one["median_s"] / 1e9)
    limited = [r for r in rows if r["group"] in (run.LARGE, run.FORMATS)]
    assert all(r["contenders"][LIMIT]["share_of_limit"] == 1.0 for r in limited)
    with Image.open(tmp_path / "out/roofline.png") as picture:
        assert picture.width == 800


def test_bench_of_one_rule(quick: Callable[..., Any], tmp_path: Path) -> None:
    result = quick("--rule", "lion")
    assert result.exit_code == 0, result.output
    rows = Bench.read(tmp_path / "out/bench.json").rows
    assert {row.group for row in rows} == {run.LARGE, run.SMALL}
    assert all("lion" in row.name for row in rows)


def test_bench_of_a_matrix_rule_alone_draws_nothing(
    quick: Callable[..., Any], tmp_path: Path
) -> None:
    result = quick("--rule", "muon")
    assert result.exit_code == 0, result.output
    assert "roofline" not in result.output
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["bench.json"]


def test_an_interrupt_keeps_what_is_there(
    quick: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run.Case.measure
    done: list[Row] = []

    def twice(self: run.Case, *arguments: Any) -> Row:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(whole(self, *arguments))
        return done[-1]

    monkeypatch.setattr(run.Case, "measure", twice)
    result = quick()
    assert result.exit_code == INTERRUPTED
    cases = len(fo.RULES) + len(run.SHOWN_WAYS) + 4  # small tensors
    assert f"Interrupted after 2 of {cases} cases" in result.output
    assert "\nmomentum " in result.output
    found = Bench.read(tmp_path / "out/bench.json")
    assert found.status == "interrupted"
    assert found.rows == done
    assert (tmp_path / "out/roofline.png").exists()


def test_a_wrong_answer_is_not_timed(
    quick: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fo.SGD, "scalars", lambda self, t, lr: (lr * 1.001,))
    result = quick("--rule", "sgd")
    assert result.exit_code == 1
    assert "sampled elements are wrong" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("limits", "load", "wanted", "expected"),
    [
        ({"processors": 8, "affinity": 8}, 0.2, None, []),
        ({"processors": 8, "container": 4}, 0.2, None, ["container allows 4 of 8 processors"]),
        ({"processors": 8, "affinity": 8}, 6.0, None, ["load average 6.0"]),
        ({"processors": 8}, 0.0, 12, ["--threads 12 asks for more than the 8"]),
    ],
)
def test_starvation_is_said(
    limits: Mapping[str, int],
    load: float,
    wanted: int | None,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = {"backend": "native", "threads": min(limits.values()), "thread_limits": limits}
    monkeypatch.setattr(fo, "info", lambda: own)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    lines = run.starved(wanted)
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))


def test_a_terminal_gets_a_table_and_a_pipe_gets_lines() -> None:
    rows = [
        Row(run.LARGE, "lion", 10, 400_000, {LIMIT: [1e-6] * 3, "fusedopt": [2e-6] * 3}),
        Row(run.LARGE, "adamw", 10, 280_000, {"fusedopt": [1e-6] * 3, LIMIT: [1e-6] * 3}),
    ]
    shown = {}
    for terminal in (False, True):
        text = io.StringIO()
        table(Console(file=text, force_terminal=terminal, width=60), rows)
        shown[terminal] = text.getvalue()
    assert "┃" in shown[True]
    assert shown[False].splitlines()[2:] == [
        "       fusedopt   GB/s  of limit",
        "lion       2 us  200.0       50%",
        "adamw      1 us  280.0      100%",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.0, "2 s"), (0.0123, "12.3 ms"), (4.56e-6, "4.56 us")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# Two runs


def result_of(**scale: float) -> Bench:
    """A run whose contenders take so many times as long; the noise is 1 %."""
    names = ("limit", "fusedopt", "NumPy")
    seconds = {n: [scale.get(n, 1.0) * (1 + 0.005 * k) for k in (-1, 0, 1)] for n in names}
    rows = [Row(run.LARGE, "lion", 100, 2000, seconds)]
    rows.append(Row(run.SMALL, "lion, small", 100, 2000, {"fusedopt": seconds["fusedopt"]}))
    return Bench(status="finished", rows=rows, machine={"isa": "x"}, starved=[])


def compared(tmp_path: Path, a: Bench, b: Bench, *arguments: str) -> Any:
    files = [tmp_path / name for name in ("a.json", "b.json")]
    for file, one in zip(files, (a, b), strict=True):
        file.write_text(json.dumps(one.record()))
    return CliRunner().invoke(app, ["bench", "--compare", *map(str, files), *arguments])


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = result_of(fusedopt=2.0)
    (tmp_path / "a.json").write_text(json.dumps(made.record()))
    assert Bench.read(tmp_path / "a.json") == made


@pytest.mark.parametrize(
    ("scale", "code", "verdicts"),
    [
        ({}, 0, ["", "", "", ""]),
        ({"fusedopt": 1.02}, 0, ["", "", "", ""]),
        ({"fusedopt": 1.1}, 1, ["", "slower", "", "slower"]),
        ({"fusedopt": 0.5}, 0, ["", "faster", "", "faster"]),
        ({"NumPy": 2.0}, 0, ["", "", "slower", ""]),
        ({"limit": 1.5, "NumPy": 1.5}, 0, ["slower", "faster", "", ""]),
    ],
)
def test_compare(scale: dict[str, float], code: int, verdicts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "changes.json"
    result = compared(tmp_path, result_of(), result_of(**scale), "--json", str(file))
    assert result.exit_code == code, result.output
    assert [change["verdict"] for change in json.loads(file.read_text())] == verdicts
    assert f"{verdicts[1::2].count('slower')} of fusedopt's times" in result.output


def test_compare_does_not_blame_a_step_for_slower_memory() -> None:
    found = changes(result_of(), result_of(fusedopt=1.5, limit=1.5))
    large = {c.contender: c for c in found if c.case.startswith(run.LARGE)}
    assert large["fusedopt"].ratio == pytest.approx(1.0)
    assert (large["fusedopt"].verdict, large["limit"].verdict) == ("", "slower")


def test_compare_knows_noise() -> None:
    rows = [Row("g", "n", 1, 1, {"fusedopt": [0.5, middle, 2.0]}) for middle in (1.0, 1.2)]
    a, b = (Bench(status="finished", rows=[row], machine={}, starved=[]) for row in rows)
    (change,) = changes(a, b)
    assert change.ratio == pytest.approx(1.2)
    assert change.noise > 0.2
    assert change.verdict == ""


def test_compare_says_what_differs_and_refuses_what_cannot_be(tmp_path: Path) -> None:
    other = Bench(status="finished", rows=result_of().rows[:1], machine={"isa": "y"}, starved=["s"])
    result = compared(tmp_path, result_of(), other)
    for line in ("isa: x -> y", "STARVED, ", "in one run only: 1 case(s)"):
        assert line in result.output
    none = Bench(status="finished", rows=[], machine={}, starved=[])
    assert compared(tmp_path, result_of(), none).exit_code == 2
    bad = tmp_path / "bad.json"
    for text in ("no JSON", "[]", '{"rows": []}'):
        bad.write_text(text)
        result = CliRunner().invoke(app, ["bench", "--compare", str(bad), str(bad)])
        assert result.exit_code == 2
        assert "expected what `fusedopt bench --json` writes" in " ".join(result.output.split())
