"""The race: its lanes, its report, and the command."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import fusedopt as fo
from drawn import check_texts
from fusedopt.cli import app
from fusedopt.lab.race import Outcome, RaceOptions, race
from fusedopt.lab.race import rates as rates_module
from fusedopt.lab.race import run as run_module
from fusedopt.lab.race.figures import curves, step_times
from fusedopt.lab.race.lanes import Lane
from fusedopt.lab.race.rates import MOST, RateBook, best
from fusedopt.lab.race.report import page
from fusedopt.lab.train import LEARNING_RATES, TrainOptions, text, train

WORDS = ["the", "a", "cat", "dog", "rat", "sat", "ran", "ate", "on", "past", "mat;", "vat.\n"]


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
def small(story: Path, tmp_path: Path) -> RaceOptions:
    return RaceOptions(
        rules=("sgd", "adamw"),
        data=story,
        out=tmp_path / "out",
        steps=40,
        search_steps=4,
        context=12,
        layers=1,
        heads=2,
        width=16,
        batch=4,
        seeds=1,
    )


# Lanes.


def test_a_lane_runs_as_the_trainer_does(small: RaceOptions, tmp_path: Path) -> None:
    options = replace(small.run("sophia", 0.001, 40), out=tmp_path)
    lane = Lane(options)
    lane.evaluate()
    for _ in range(20):
        lane.train(2)
        lane.evaluate()
    result = train(options, console()[0])
    assert lane.history.losses == result.train_losses
    assert lane.history.held_out == result.held_out_losses
    assert lane.clock == sorted(lane.clock)
    assert lane.clock[-1] == pytest.approx(lane.seconds)


def test_lanes_start_alike_and_see_the_same_batches(
    small: RaceOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[bytes]] = {}
    for rule in fo.RULES:
        lane = Lane(small.run(rule, 1e-9, 3))
        lane.evaluate()
        lane.train(3)
        seen[rule] = [np.float64(x).tobytes() for x in (lane.history.losses[0], lane.loss)]
    assert len({tuple(values) for values in seen.values()}) == 1


def test_a_lane_that_diverges_stops(small: RaceOptions) -> None:
    lane = Lane(small.run("sgd", 1e30, 40))
    lane.evaluate()
    lane.train(10)
    lane.evaluate()
    assert lane.failed == f"loss not finite at step {lane.steps + 1}"
    assert lane.loss == math.inf
    done = lane.steps
    lane.train(10)
    assert (lane.steps, len(lane.clock)) == (done, 1)


def outcome(small: RaceOptions, held_out: list[tuple[int, float, float]]) -> Outcome:
    lane = Lane(small.run("sgd", 0.1, 3))
    lane.evaluate()
    return replace(Outcome.of([lane]), runs=[held_out])


def test_time_to_a_loss_is_read_between_evaluations(small: RaceOptions) -> None:
    ran = outcome(small, [(0, 0.0, 4.0), (10, 2.0, 3.0), (20, 5.0, 3.2), (30, 7.0, 2.2)])
    assert ran.seconds_to(3.5) == pytest.approx(1.0)
    assert ran.seconds_to(3.0) == pytest.approx(2.0)
    assert ran.seconds_to(2.7) == pytest.approx(6.0)
    assert ran.seconds_to(2.0) is None


def test_what_is_shown_of_several_seeds_is_their_mean(small: RaceOptions) -> None:
    first = [(0, 0.0, 4.0), (10, 2.0, 3.0), (20, 5.0, 1.0)]
    second = [(0, 0.0, 5.0), (10, 4.0, 2.0)]
    ran = replace(outcome(small, first), runs=[first, second])
    assert ran.held_out == [(0, 0.0, 4.5), (10, 3.0, 2.5)]
    assert (ran.loss, ran.spread) == (2.5, (2.0, 3.0))
    assert ran.seconds_to(3.5) == pytest.approx(1.5)
    assert replace(ran, failed="somewhere").loss == math.inf


@pytest.mark.slow
def test_a_seed_has_the_run_that_it_has_alone(small: RaceOptions) -> None:
    both = race(replace(small, seeds=2), console()[0])
    alone = race(replace(small, seed=1, search=True), console()[0])
    rates = [{o.rule: o.lr for o in result.outcomes} for result in (both, alone)]
    assert rates[0] == rates[1]  # or the runs need not be the same
    for of_both, of_one in zip(both.outcomes, alone.outcomes, strict=True):
        assert losses(of_both.runs[1]) == losses(of_one.runs[0])


@pytest.mark.slow
def test_a_rate_between_no_worse_ones_is_said_to_be(small: RaceOptions) -> None:
    result = race(replace(small, steps=2), console()[0])
    for tried, said in (
        ({0.1: 2.0, 0.3: 1.0, 0.9: 2.0}, ""),
        ({0.1: 1.0, 0.3: 2.0, 0.9: 2.0}, ", not bracketed from below"),
        ({0.1: 2.0, 0.3: 2.0, 0.9: 1.0}, ", not bracketed from above"),
    ):
        found = page(replace(result, tried={**result.tried, "sgd": tried}))
        assert f"<td class=n>{best(tried):g}{said}</td>" in found or (
            f"<td>{best(tried):g}{said}</td>" in found
        )


# Races.


class Page(HTMLParser):
    """What a page consists of; fails at a tag that is not closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_decl(self, decl: str) -> None:
        assert decl == "DOCTYPE html"


@pytest.fixture(scope="module")
def whole(story: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, str]:
    """A race of all rules: the result, its directory, and what was printed."""
    out = tmp_path_factory.mktemp("race")
    options = RaceOptions(
        data=story, out=out, steps=40, search_steps=12, context=12, layers=1, heads=2, width=16,
        batch=4, target=2.5, json=out / "race.json", seeds=2,
    )  # fmt: skip
    screen, printed = console()
    return race(options, screen), out, printed.getvalue()


def losses(run: list[tuple[int, float, float]]) -> list[float]:
    return [loss for _, _, loss in run]


@pytest.mark.slow
def test_all_rules_race(whole: tuple[Any, Path, str]) -> None:
    result, _, _ = whole
    assert result.status == "finished"
    assert [o.rule for o in result.outcomes] == list(fo.RULES)
    assert all(len({str(losses(run)) for run in o.runs}) == 2 for o in result.outcomes)
    for ran in result.outcomes:
        steps = [step for step, _, _ in ran.held_out]
        assert steps == list(range(0, 41, 2))
        assert ran.held_out[0][2] == result.outcomes[0].held_out[0][2]
        # An estimate of the rate begins at a millionth, and has 40 steps to grow.
        least = 0.0 if fo.RULES[ran.rule].kept else 0.1
        assert ran.loss < ran.held_out[0][2] - least
        assert ran.lr == best(result.tried[ran.rule])
        assert ran.step_times.fused_s > 0
        assert ran.step_times.naive_s > 0
    numbers = {o.rule: o.state_bytes / result.parameters for o in result.outcomes}
    assert (numbers["sgd"], numbers["lion"], numbers["adamw"]) == (0, 4, 8)
    assert 4 < numbers["muon"] < 8 < numbers["soap"]


@pytest.mark.slow
def test_report_is_one_file_that_needs_nothing_else(whole: tuple[Any, Path, str]) -> None:
    result, out, _ = whole
    source = (out / "report.html").read_text(encoding="utf-8")
    found = Page(source)
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "link", "iframe", "object"})
    pictures = [dict(attrs)["src"] or "" for tag, attrs in found.tags if tag == "img"]
    assert len(pictures) == 3
    for picture in pictures:
        kind, _, data = picture.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG\r\n\x1a\n")
    assert not any(name in attrs for _, attrs in found.tags for name in ("href", "srcset", "style"))
    text_only = re.sub(r'src="[^"]*"', "", source)
    assert not re.search(r"https?:|url\(|@import", text_only)
    for ran in result.outcomes:
        assert f"<td>{ran.name}</td>" in source
        low, high = ran.spread
        assert f"{ran.loss:.3f} ({low:.3f} to {high:.3f})" in source
        assert f"{1e3 * ran.step_times.fused_s:.3f} ms" in source
    assert "Time to 2.50" in source
    assert "seeds 0 to 1" in source
    assert fo.info()["processor"] in source
    assert (out / "curves.png").stat().st_size < 12_000 * len(fo.RULES)


@pytest.mark.slow
@pytest.mark.parametrize("runners", [10, 5, 1])
def test_no_text_is_cut_off_or_covers_another(runners: int, whole: tuple[Any, Path, str]) -> None:
    result = replace(whole[0], outcomes=whole[0].outcomes[-runners:])
    assert check_texts(curves(result, "step")) > runners
    assert check_texts(curves(result, "second")) > runners
    assert check_texts(step_times(result)) > 2 * runners


@pytest.mark.slow
@pytest.mark.parametrize("slower", [1, 3, 10, 30, 100, 300, 1000, 10_000])
def test_numbers_of_step_times_have_room(slower: int, whole: tuple[Any, Path, str]) -> None:
    """However many decades lie between the fastest and the slowest step."""
    outcomes = list(whole[0].outcomes)
    times = replace(outcomes[0].step_times, fused_s=5e-6, naive_s=slower * 1e-5)
    result = replace(whole[0], outcomes=[replace(o, step_times=times) for o in outcomes])
    assert check_texts(step_times(result)) > 2 * len(outcomes)


@pytest.mark.slow
def test_record_of_a_race(whole: tuple[Any, Path, str]) -> None:
    result, out, _ = whole
    record = json.loads((out / "race.json").read_text(encoding="ascii"), parse_constant=pytest.fail)
    assert record["status"] == "finished"
    assert record["options"]["steps"] == 40
    assert [o["rule"] for o in record["outcomes"]] == list(fo.RULES)
    first = record["outcomes"][0]
    assert first["loss"] == result.outcomes[0].loss
    assert first["held_out"][-1] == list(result.outcomes[0].held_out[-1])
    assert first["seconds_to_target"] == result.outcomes[0].seconds_to(2.5)
    assert record["tried"]["sgd"] == [list(row) for row in sorted(result.tried["sgd"].items())]
    assert record["machine"] == fo.info()


@pytest.mark.slow
def test_plain_lines_into_a_pipe(whole: tuple[Any, Path, str]) -> None:
    result, _, printed = whole
    assert "\x1b" not in printed
    assert "\r" not in printed
    lines = printed.splitlines()
    assert sum(line.startswith("step ") for line in lines) == 20
    assert lines[-1].startswith("wrote ")
    ranks = [o.rule for o in sorted(result.outcomes, key=lambda o: o.loss)]
    count = len(fo.RULES)
    assert [line.split()[0] for line in lines[-1 - count : -1]] == ranks
    assert f"learning rates: 0 of {count} known" in printed
    announced = rf"{count} rules, 40 steps each, 2 seeds, in batches of 4: \d+ (s|min) to \d+"
    assert re.search(announced, printed)


@pytest.mark.slow
def test_a_table_on_a_terminal(small: RaceOptions) -> None:
    screen, out = console(force_terminal=True)
    race(small, screen)
    printed = out.getvalue()
    assert "\x1b[" in printed
    assert "learning rate" in printed
    assert "step 40 of 40" in printed


def trials(monkeypatch: pytest.MonkeyPatch) -> Mock:
    add = Mock(side_effect=RateBook.add, autospec=True)
    monkeypatch.setattr(rates_module.RateBook, "add", lambda *args: add(*args))
    return add


@pytest.mark.slow
def test_known_rates_are_taken_and_missing_ones_found(
    small: RaceOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(small, steps=2)
    first = race(small, console()[0])
    add = trials(monkeypatch)
    screen, out = console()
    again = race(small, screen)
    assert not add.called
    assert again.tried == first.tried
    assert "learning rates: 2 of 2 known" in out.getvalue()
    race(replace(small, rules=("adamw", "lion")), console()[0])
    assert {call.args[1] for call in add.call_args_list} == {"lion"}
    add.reset_mock()
    race(replace(small, search_steps=5), console()[0])
    assert {call.args[1] for call in add.call_args_list} == {"sgd", "adamw"}
    add.reset_mock()
    race(replace(small, search_steps=5, search=True), console()[0])
    assert {call.args[1] for call in add.call_args_list} == {"sgd", "adamw"}


@pytest.mark.slow
def test_a_rule_that_diverges_is_said_to(
    small: RaceOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LEARNING_RATES, "sgd", 1e30)
    screen, out = console()
    result = race(replace(small, json=small.out / "race.json"), screen)
    failed, ran = result.outcomes
    assert failed.failed.startswith("loss not finite at step ")
    assert not ran.failed
    assert len(result.tried["sgd"]) == MOST
    assert failed.failed in out.getvalue()
    source = (small.out / "report.html").read_text(encoding="utf-8")
    assert failed.failed in source
    assert "not finite" in source
    record = json.loads((small.out / "race.json").read_text(), parse_constant=pytest.fail)
    assert record["outcomes"][0]["loss"] is None


def interrupting(after: int) -> Any:
    """A source of batches during which Ctrl-C is pressed, once."""
    batches, count = text.batches, 0

    def source(*args: Any) -> Iterator[Any]:
        nonlocal count
        for batch in batches(*args):
            count += 1
            if count == after:
                signal.raise_signal(signal.SIGINT)
            yield batch

    return source


def test_an_interrupted_search_keeps_its_rates(
    small: RaceOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "batches", interrupting(2 * run_module.PROBE + 11))
    screen, out = console()
    result = race(small, screen)
    assert result.status == "interrupted"
    assert not result.outcomes
    assert list(result.tried) == ["sgd"]
    assert "Interrupted" in out.getvalue()
    source = (small.out / "report.html").read_text(encoding="utf-8")
    Page(source)
    assert "The race was interrupted" in source
    assert "<img" not in source
    kept = json.loads((small.out / "learning_rates.json").read_text())["tried"]
    assert len(kept["sgd"]) == 2


@pytest.mark.slow
def test_an_interrupted_race_keeps_its_steps(
    small: RaceOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    race(small, console()[0])  # for the rates
    monkeypatch.setattr(text, "batches", interrupting(2 * run_module.PROBE + 4 * 2 + 3))
    result = race(small, console()[0])
    assert result.status == "interrupted"
    sgd, adamw = result.outcomes
    assert [step for step, _, _ in sgd.held_out] == [0, 2, 4, 6]
    assert [step for step, _, _ in adamw.held_out] == [0, 2, 4]
    source = (small.out / "report.html").read_text(encoding="utf-8")
    assert "The race was interrupted" in source
    assert source.count("<img") == 3
    assert page(result) == source


# The command, and refusals.


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["race", *arguments])


def test_race_command(story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"search_steps": 2, "context": 12, "layers": 1, "heads": 2, "width": 16}
    monkeypatch.setattr("fusedopt.lab.race.QUICK", small)
    arguments = ["--quick", "--rules", "lion,sgd", "--steps", "4", "--data", str(story)]
    arguments += ["--out", str(tmp_path), "--json", str(tmp_path / "race.json")]
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "race.json").read_text())
    assert [o["rule"] for o in record["outcomes"]] == ["lion", "sgd"]
    assert (record["options"]["steps"], record["options"]["width"]) == (4, 16)
    monkeypatch.setattr(text, "batches", interrupting(1))
    assert command(*arguments).exit_code == 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rules", "sgd,sdg"), "got 'sdg'"),
        (("--rules", "sgd,sgd"), "expected different rules"),
        (("--steps", "0"), "steps: expected at least 1"),
        (("--target", "-1"), "target: expected a positive number"),
        (("--data", "/nowhere/at/all.txt"), "/nowhere/at/all.txt"),
        (("--backend", "gpu"), "gpu"),
    ],
)
def test_race_command_refuses(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = command(*arguments, "--out", str(tmp_path))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(small: RaceOptions, story: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"--out .*story.txt: cannot write .*another directory"):
        race(replace(small, out=story), console()[0])
    with pytest.raises(OSError, match=r"--json .*x.json: cannot write .*another file"):
        race(replace(small, json=tmp_path / "missing" / "x.json"), console()[0])


def test_options_out_of_range() -> None:
    with pytest.raises(ValueError, match="search_steps: expected at least 1, got 0"):
        RaceOptions(search_steps=0)
    with pytest.raises(ValueError, match="seeds: expected at least 1, got 0"):
        RaceOptions(seeds=0)
    with pytest.raises(
        ValueError, match=r"rules: expected different rules, at least one, got \(\)"
    ):
        RaceOptions(rules=())
    assert isinstance(RaceOptions().run("lion", 0.1, 7), TrainOptions)
