"""The trainer: its text, its recipes, its loop, and what it leaves behind."""

from __future__ import annotations

import io
import json
import math
import signal
import struct
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from rich.console import Console

import fusedopt as fo
from fusedopt.arrays.trees import Tree
from fusedopt.lab.train import (
    LEARNING_RATES,
    TrainOptions,
    gpt,
    peak_rate,
    report,
    steptime,
    text,
    train,
    trainer,
)
from fusedopt.lab.train.recipes import ESTIMATORS, SCHEDULES, recipe
from fusedopt.lab.train.setup import Setup
from fusedopt.schedules import Constant, Cosine

WORDS = ["the", "a", "cat", "dog", "rat", "sat", "ran", "ate", "on", "past", "mat;", "vat.\n"]
PNG_HEADER = b"\x89PNG\r\n\x1a\n"


def console(**settings: Any) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=100, **settings), out


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = np.random.default_rng(0).choice(WORDS, 900)
    path: Path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(" ".join(words), encoding="utf-8")
    return path


@pytest.fixture
def small(story: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a run of well under a second."""
    sizes = {"context": 12, "layers": 1, "heads": 2, "width": 16, "batch": 4}
    return {"data": story, "out": tmp_path / "out", "steps": 40, **sizes}


# Text.


def test_corpus_splits_and_numbers_a_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    written = "b\u00e4a\r\n\U0001f600[bold]\x1b" * 3  # 36 characters
    path.write_bytes(b"\xef\xbb\xbf" + written.encode())  # a byte order mark is no character
    corpus = text.load(path, 2)
    assert corpus.alphabet == "".join(sorted(set(written)))
    assert corpus.decode(corpus.train) + corpus.decode(corpus.held_out) == written
    assert (len(corpus.held_out), corpus.characters) == (3, len(written))


def test_default_text_has_no_paragraph_twice() -> None:
    name, written = text.default_text()
    assert "pydoc_data" in name
    assert len(written) > 200_000
    paragraphs = [p.strip() for p in written.split("\n\n") if p.strip()]
    assert len(paragraphs) == len(set(paragraphs)) > 1000


def test_default_text_without_pydoc_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    name, written = text.default_text()
    assert "no pydoc_data here" in name
    assert len(written) > 200_000
    monkeypatch.setattr(text, "FALLBACK_MODULES", ("fusedopt_no_such_module", "sys"))
    with pytest.raises(ValueError, match=r"neither pydoc_data.topics nor .* --data FILE"):
        text.default_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x" * 129, r"text.txt: expected at least 130 characters .* got 129; give a longer text"),
        (b"caf\xe9 " * 99, r"text.txt: expected UTF-8, got the byte 0xe9 at offset 3; .* iconv"),
    ],
)
def test_text_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text.load(path, 12)


def test_shortest_text_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"x" * 130)
    corpus = text.load(path, 12)
    x, y = text.spread(corpus.held_out, 256, 12)
    assert x.shape == y.shape == (1, 12)


def test_batches_are_windows_of_the_text() -> None:
    ids = np.arange(20, dtype=np.int32)
    source = text.batches(ids, 200, 5, np.random.default_rng(0))
    x, y = next(source)
    assert x.shape == (200, 5)
    np.testing.assert_array_equal(y, x + 1)
    np.testing.assert_array_equal(x, x[:, :1] + np.arange(5))
    assert set(x[:, 0]) == set(range(15))  # every place, the last one too
    assert not np.array_equal(next(source)[0], x)


def test_spread_windows_do_not_overlap() -> None:
    x, y = text.spread(np.arange(101, dtype=np.int32), 7, 4)
    assert x.shape == (7, 4)
    assert (x[0, 0], y[-1, -1]) == (0, 100)
    assert np.all(x[1:, 0] > x[:-1, -1])


def test_bigram_loss_by_hand() -> None:
    train_ids = np.array([0, 0, 1, 0, 1], np.int32)  # aabab: aa once, ab twice, ba once
    x, y = np.array([[0, 0], [1, 2]], np.int32), np.array([[0, 1], [2, 0]], np.int32)
    # P(a|a) = 2/6, P(b|a) = 3/6, P(c|b) = 1/4, P(a|c) = 1/3
    by_hand = -(math.log(2 / 6) + math.log(3 / 6) + math.log(1 / 4) + math.log(1 / 3)) / 4
    assert text.bigram_loss(train_ids, x, y, 3) == pytest.approx(by_hand, rel=1e-14)


# Recipes.


def test_every_rule_has_a_learning_rate() -> None:
    assert set(LEARNING_RATES) <= set(fo.RULES)
    assert all(peak_rate(name) > 0 for name in fo.RULES)


def test_schedule_free_rules_take_no_schedule_and_warm_up() -> None:
    (rule,) = recipe("schedulefreeadamw", 0.01, 100, 1).values()
    assert rule == fo.ScheduleFreeAdamW(lr=0.01, warmup_steps=5)
    for wrong in ({"schedule": "linear"}, {"ema": 0.9}):
        with pytest.raises(ValueError, match="schedulefreeadamw averages by itself"):
            TrainOptions(rule="schedulefreeadamw", **wrong)


@pytest.mark.parametrize("steps", [1, 7, 40, 1000])
def test_the_default_schedule(steps: int) -> None:
    schedule = SCHEDULES["cosine"](2.0, steps)
    for t in range(1, steps + 1):
        rising = min(1.0, 20 * t / steps)
        falling = 0.55 + 0.45 * math.cos(math.pi * (t - 1) / steps)
        assert schedule(t) == pytest.approx(2.0 * rising * falling, rel=1e-15)
    assert schedule(steps + 1) == pytest.approx(0.2)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 400])
def test_schedules_rise_and_fall(name: str, steps: int) -> None:
    schedule = SCHEDULES[name](2.0, steps)
    rates = [schedule(t) for t in range(1, steps + 1)]
    assert schedule.base == 2.0
    assert all(0.0 <= rate <= 2.0 for rate in rates)
    if steps == 400:
        assert max(rates) == pytest.approx(2.0, rel=0.01)
        assert 0 < rates[0] < 0.21
        end = schedule(steps + 1)
        assert (end == 2.0) if name == "constant" else (end <= 0.2 + 1e-12)


def test_recipe_of_rules_with_needs() -> None:
    sophia = recipe("sophia", None, 10, tokens=48)["*"]
    assert isinstance(sophia, fo.Sophia)
    assert sophia.bs == 48
    for name, form in (("gnb", "official"), ("hutchinson", "paper")):
        sophia = recipe("sophia", None, 10, tokens=48, estimator=name)["*"]
        assert isinstance(sophia, fo.Sophia)
        assert (sophia.estimator, sophia.form) == (name, form)
    assert set(ESTIMATORS) == {"gnb", "hutchinson"}
    rules = recipe("muon", 0.5, 10, tokens=48)
    muon, rest = rules["blocks.*.w"], rules["*"]
    assert isinstance(muon, fo.Muon)
    assert muon.lr == Constant(0.5, warmup=0.5) * Cosine(1.0, 10, final=0.1)
    assert rest == fo.AdamW(lr=SCHEDULES["cosine"](LEARNING_RATES["adamw"], 10))
    rules = recipe("muon", 0.5, 10, tokens=48, schedule="constant")
    assert rules["*"].lr == Constant(LEARNING_RATES["adamw"], warmup=0.5)


# Runs.


@pytest.mark.slow
@pytest.mark.parametrize("rule", fo.RULES)
def test_each_rule_learns(
    rule: str, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    estimate = Mock(wraps=fo.hessian.gauss_newton_bartlett)
    monkeypatch.setattr(fo.hessian, "gauss_newton_bartlett", estimate)
    small["steps"] = 100
    result = train(TrainOptions(rule=rule, **small), console()[0])
    (_, first), *_, (steps, last) = result.held_out_losses
    assert (result.status, steps, result.steps) == ("finished", 100, 100)
    assert estimate.call_count == (10 if fo.RULES[rule].takes_hessian else 0)
    assert first == pytest.approx(math.log(len(result.alphabet)), abs=0.1)
    assert last < first - 0.1
    assert result.step_times.fused_s > 0
    assert result.step_times.naive_s > 0


@pytest.mark.slow
def test_a_longer_run_beats_the_bigram_model(small: dict[str, Any]) -> None:
    small.update(steps=500, width=32)
    result = train(TrainOptions(**small), console()[0])
    assert result.held_out_loss < result.bigram_loss - 0.05


def test_equal_seeds_give_equal_bits(small: dict[str, Any]) -> None:
    first, again, other = (
        train(TrainOptions(rule="sophia", seed=seed, **small), console()[0]) for seed in (1, 1, 2)
    )
    assert first.train_losses == again.train_losses != other.train_losses
    assert first.held_out_losses == again.held_out_losses
    assert first.sample == again.sample


def test_low_precision_learns(small: dict[str, Any]) -> None:
    storage: dict[str, Any] = {"dtype": "bfloat16", "master": "split16", "state_dtype": "float8"}
    setup = Setup.of(TrainOptions(**small, **storage))
    assert {leaf.value.dtype.name for leaf in Tree(setup.params).leaves} == {"bfloat16"}
    assert {leaf.value.dtype.name for leaf in Tree(setup.weights()).leaves} == {"float32"}
    small["steps"] = 100
    result = train(TrainOptions(**small, **storage), console()[0])
    assert result.held_out_loss < result.held_out_losses[0][1] - 0.1


def test_schedules_are_used(small: dict[str, Any]) -> None:
    losses = {
        name: train(TrainOptions(schedule=name, **small), console()[0]).train_losses
        for name in ("cosine", "linear")
    }
    assert losses["cosine"][:3] != losses["linear"][:3]
    record = json.loads((small["out"] / "run.json").read_text())
    assert record["options"]["schedule"] == "linear"
    assert "lr=Linear(base=0.002, steps=40, warmup=2.0, final=0.0)" in record["rules"]["*"]


def test_json_and_picture(small: dict[str, Any], tmp_path: Path) -> None:
    second = tmp_path / "second.json"
    result = train(TrainOptions(json=second, rule="lion", **small), console()[0])
    written = (small["out"] / "run.json").read_text(encoding="ascii")
    assert second.read_text(encoding="ascii") == written
    record = json.loads(written, parse_constant=pytest.fail)  # no NaN, no Infinity
    assert record["status"] == "finished"
    assert record["options"]["rule"] == "lion"
    assert record["steps"] == len(record["train_losses"]) == 40
    assert [step for step, _ in record["held_out_losses"]] == list(range(0, 41, 2))
    assert record["held_out_loss"] == record["held_out_losses"][-1][1]
    assert record["bigram_loss"] == result.bigram_loss
    assert "Lion" in record["rules"]["*"]
    assert len(record["sample"]) == trainer.SAMPLE
    assert 0 < record["optimizer_share"] < 1
    stepping = sum(record["seconds"].values()) - record["seconds"]["evaluation"]
    assert record["tokens_per_second"] == pytest.approx(40 * 4 * 12 / stepping)
    assert record["machine"] == json.loads(json.dumps(fo.info()))
    picture = (small["out"] / "loss.png").read_bytes()
    assert picture.startswith(PNG_HEADER)
    assert struct.unpack(">II", picture[16:24]) == (800, 544)
    assert len(picture) > 10_000


def interrupting(after: int) -> Any:
    """A source of batches during which Ctrl-C is pressed."""
    batches = text.batches

    def source(*args: Any) -> Iterator[Any]:
        for k, batch in enumerate(batches(*args)):
            if k == after - 1:  # a step that is then finished
                signal.raise_signal(signal.SIGINT)
            yield batch

    return source


@pytest.mark.parametrize("after", [1, 14])
def test_an_interrupt_keeps_what_is_there(
    after: int, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "batches", interrupting(after))
    screen, out = console()
    result = train(TrainOptions(**small), screen)
    assert (result.status, result.steps) == ("interrupted", after)
    assert [step for step, _ in result.held_out_losses] == sorted({*range(0, after, 2), after})
    record = json.loads((small["out"] / "run.json").read_text())
    assert (record["status"], record["steps"]) == ("interrupted", after)
    assert len(record["sample"]) == trainer.SAMPLE
    assert (small["out"] / "loss.png").read_bytes().startswith(PNG_HEADER)
    assert f"Interrupted after {after} steps" in out.getvalue()


def test_plain_lines_into_a_pipe(small: dict[str, Any]) -> None:
    screen, out = console()
    result = train(TrainOptions(**small), screen)
    printed = out.getvalue()
    assert "\x1b" not in printed
    assert "\r" not in printed
    lines = printed.splitlines()
    assert sum(line.startswith("step ") for line in lines) == 21
    assert f"held-out loss {result.bigram_loss:.3f}" in printed
    assert "tokens/s, optimizer" in printed
    assert "times as long" in printed
    assert result.sample in printed


def test_a_bar_on_a_terminal(small: dict[str, Any]) -> None:
    screen, out = console(force_terminal=True)
    train(TrainOptions(**small), screen)
    printed = out.getvalue()
    assert "\x1b[" in printed
    assert "/40" in printed


def test_what_a_terminal_would_obey_is_shown_as_escapes() -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii", newline="\n") as out:
        report.say(Console(file=out), "[bold]\x1b[2J\u00e9\n\ttab")
        out.flush()
        assert raw.getvalue() == b"[bold]\\x1b[2J\\xe9\n        tab\n"


def test_comparing_steps_leaves_the_parameters_alone() -> None:
    config = gpt.Config(vocab=5, context=4, layers=1, heads=1, width=4)
    params = gpt.init(np.random.default_rng(0), config)
    kept = deepcopy(params)
    _, grads = gpt.loss_and_grads(params, np.array([[0, 1]]), np.array([[1, 2]]), config)
    rules = recipe("muon", None, 10, tokens=2)
    times = steptime.compare(params, grads, rules, backend="auto", threads=1)
    assert times.fused_s > 0
    assert times.naive_s > 0
    for a, b in zip(Tree(params).leaves, Tree(kept).leaves, strict=True):
        assert a.value.tobytes() == b.value.tobytes()


# Refusals.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "adamz"}, "rule: expected one of sgd, .*, got 'adamz'"),
        ({"schedule": "cos"}, "schedule: expected one of cosine, .*step, got 'cos'"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"lr": 0.0}, "lr: expected a positive number, got 0.0"),
        ({"lr": math.nan}, "lr: expected a positive number, got nan"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainOptions(**options)


def test_places_that_cannot_be_written_are_found_before_training(
    small: dict[str, Any], story: Path, tmp_path: Path
) -> None:
    screen, out = console()
    nowhere = tmp_path / "missing" / "run.json"
    with pytest.raises(OSError, match=r"--json .*run.json: cannot write there .*another file"):
        train(TrainOptions(json=nowhere, **small), screen)
    small["out"] = story  # a file
    with pytest.raises(OSError, match=r"--out .*story.txt: cannot write .*another directory"):
        train(TrainOptions(**small), screen)
    assert not out.getvalue()


def test_a_missing_text(small: dict[str, Any], tmp_path: Path) -> None:
    small["data"] = tmp_path / "none.txt"
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        train(TrainOptions(**small), console()[0])


def test_a_run_that_diverges(small: dict[str, Any]) -> None:
    small["steps"] = 100  # the first evaluation comes after the first bad step
    with pytest.raises(FloatingPointError, match=r"got (nan|inf) at step 2; take a smaller --lr"):
        train(TrainOptions(rule="sgd", lr=1e30, **small), console()[0])
