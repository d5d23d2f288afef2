"""Runs that are stopped and go on, and what the trainer has of the optimizer's options."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import fusedopt as fo
from fusedopt.arrays.file_set import read_metadata
from fusedopt.cli import app
from fusedopt.lab.train import Result, TrainOptions, resume, steptime, text, train, trainer
from fusedopt.lab.train.descent import _win_rate, descend
from fusedopt.lab.train.history import History
from fusedopt.lab.train.setup import Setup

RUNS: dict[str, dict[str, Any]] = {
    "adamw": {"rule": "adamw", "accumulate": 3, "ema": 0.9, "clip": 0.5},
    "gnb": {"rule": "sophia", "hessian_every": 3, "accumulate": 2},
    "hutchinson": {"rule": "sophia", "estimator": "hutchinson", "hessian_every": 4},
    "muon": {"rule": "muon", "clip": 1.0, "schedule": "wsd"},
    "stochastic": {
        "rule": "lion", "dtype": "bfloat16", "state_dtype": "bfloat16", "rounding": "stochastic",
    },
}  # fmt: skip

SAME = (
    "status", "train_losses", "held_out_losses", "averaged_losses", "grad_norms", "win_rates",
    "fingerprint", "sample",
)  # fmt: skip
"""In a run's record: everything but times, names of files, and what it went on from."""


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = np.random.default_rng(0).choice(["a", "cat", "dog", "sat", "ran", "mat.\n"], 900)
    path: Path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(" ".join(words), encoding="utf-8")
    return path


@pytest.fixture
def small(story: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a run of well under a second."""
    sizes = {"context": 12, "layers": 1, "heads": 2, "width": 16, "batch": 4}
    return {"data": story, "out": tmp_path / "out", "steps": 40, **sizes}


def run(**options: Any) -> tuple[Result, str]:
    out = io.StringIO()
    return train(TrainOptions(**options), Console(file=out, width=100)), out.getvalue()


def assert_same_run(found: Result, expected: Result) -> None:
    for name in SAME:
        assert getattr(found, name) == getattr(expected, name), name


def interrupting(after: int) -> Any:
    """A source of batches during which Ctrl-C is pressed."""
    batches = text.batches

    def source(*args: Any) -> Iterator[Any]:
        for k, batch in enumerate(batches(*args)):
            if k == after:
                signal.raise_signal(signal.SIGINT)
            yield batch

    return source


# Stopping and going on.


@pytest.mark.slow
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_an_interrupted_run_goes_on_bit_for_bit(
    options: dict[str, Any], small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(**small, **options)
    file = tmp_path / "run.ckpt"
    after = 11 * options.get("accumulate", 1)
    with monkeypatch.context() as patched:
        patched.setattr(text, "batches", interrupting(after))
        stopped, printed = run(checkpoint=file, **small, **options)
    assert (stopped.status, stopped.steps) == ("interrupted", 12)
    assert f"To go on, give the same options and --resume {file}" in printed
    resumed, printed = run(resume=file, **small, **options)
    assert f"going on from {file} at step 12 of 40" in printed
    assert "note:" not in printed
    assert resumed.resumed == {"step": 12, "remarks": []}
    assert_same_run(resumed, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("call", "step"), [(1, 0), (6, 4)])
def test_an_interrupt_during_an_evaluation(
    call: int, step: int, small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(ema=0.9, **small)
    file, held_out_loss, calls = tmp_path / "run.ckpt", trainer._held_out_loss, 0

    def interrupted(setup: Setup, step: int) -> float:
        nonlocal calls
        calls += 1
        if calls == call:  # odd ones are of the parameters, even ones of their averages
            signal.raise_signal(signal.SIGINT)
        return held_out_loss(setup, step)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "_held_out_loss", interrupted)
        assert run(ema=0.9, checkpoint=file, **small)[0].steps == step
    assert len(read_metadata(file)["history"]["held_out"]) == step // 2
    assert_same_run(run(ema=0.9, resume=file, **small)[0], whole)


def test_a_finished_run_goes_on_with_its_report(small: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "run.ckpt"
    whole, printed = run(checkpoint=file, **small)
    assert str(file) in printed.splitlines()[-1]
    again, _ = run(resume=file, **small)
    assert again.resumed == {"step": 40, "remarks": []}
    assert_same_run(again, whole)


CHILD = """
import json, sys
from pathlib import Path
from rich.console import Console
from fusedopt.lab.train import TrainOptions, train

options = json.loads(sys.argv[1])
paths = {name: Path(options.pop(name)) for name in ("data", "out", "checkpoint")}
resumed = {"resume": paths["checkpoint"]} if paths["checkpoint"].exists() else {}
train(TrainOptions(**options, **paths, **resumed), Console(file=sys.stdout))
"""


def child(options: dict[str, Any]) -> subprocess.Popen[str]:
    arguments = json.dumps(options, default=str)
    return subprocess.Popen(
        [sys.executable, "-uc", CHILD, arguments], stdout=subprocess.PIPE, text=True
    )


def record(options: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((options["out"] / "run.json").read_text())
    return found


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(small: dict[str, Any], tmp_path: Path) -> None:
    small.update(RUNS["gnb"], ema=0.9, clip=0.5, steps=300, checkpoint_every=7)
    whole, stopped = (
        {**small, "out": tmp_path / each, "checkpoint": tmp_path / f"{each}.ckpt"}
        for each in ("whole", "stopped")
    )
    with child(whole) as process:
        process.communicate()
    assert process.returncode == 0
    evaluations, delay = random.randrange(2, 12), random.uniform(0.0, 0.05)
    print(f"killed after {evaluations} evaluations and {delay} s")
    with child(stopped) as process:
        assert process.stdout is not None
        for line in process.stdout:
            evaluations -= line.startswith("step ")
            if not evaluations:
                break
        time.sleep(delay)
        process.kill()
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    assert not (stopped["out"] / "run.json").exists()
    assert stopped["checkpoint"].exists()
    with child(stopped) as process:
        process.communicate()
    assert process.returncode == 0
    expected, found = record(whole), record(stopped)
    assert 7 <= found["resumed"]["step"] < 300
    assert found["resumed"]["step"] % 7 == 0
    for key in SAME:
        assert found[key] == expected[key], key
    first, second = ((each["out"] / "loss.png").read_bytes() for each in (whole, stopped))
    assert first == second


# What does not fit.


def test_a_checkpoint_of_another_run_is_refused(small: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "run.ckpt"
    run(checkpoint=file, **small)
    before = file.read_bytes()
    other = tmp_path / "other.txt"
    other.write_text(small["data"].read_text().replace("cat", "cow"))
    changes: dict[str, Any] = {
        "rule": "lion", "width": 32, "steps": 41, "seed": 1, "batch": 5, "accumulate": 2,
        "clip": 1.0, "ema": 0.5, "lr": 1.0, "schedule": "linear", "dtype": "bfloat16",
    }  # fmt: skip
    for name, value in changes.items():
        with pytest.raises(ValueError, match=rf"another run: {name} .* here, .* there; .*started"):
            run(resume=file, checkpoint=file, **{**small, name: value})
    with pytest.raises(ValueError, match=r"rule 'sgd' here, 'adamw' there; .*seed 3 here, 0 there"):
        run(resume=file, **{**small, "rule": "sgd", "seed": 3})
    with pytest.raises(ValueError, match=r"another run: text \(sha256\) '\w{16}' here, '\w{16}'"):
        run(resume=file, **{**small, "data": other})
    assert file.read_bytes() == before
    # Neither the place of the text nor a rate that is written out makes it another run.
    moved = tmp_path / "moved.txt"
    moved.write_bytes(small["data"].read_bytes())
    assert run(resume=file, **{**small, "data": moved, "lr": 2e-3})[0].steps == 40


def test_files_that_are_no_checkpoint_of_the_trainer(small: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "run.ckpt"
    with pytest.raises(FileNotFoundError, match=r"run\.ckpt"):
        run(resume=file, **small)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"run\.ckpt: is not a whole safetensors file"):
        run(resume=file, **small)
    setup = Setup.of(TrainOptions(**small))
    setup.optimizer.save(file)
    with pytest.raises(ValueError, match=r"run\.ckpt: is not a checkpoint that this fusedopt tra"):
        run(resume=file, **small)
    resume.save(setup, History(setup.options.tokens), file)
    metadata = read_metadata(file)
    spoilt: dict[str, Any]
    for spoilt in ({"history": {}}, {"generators": {"places": {}}}, {"history": 3}):
        setup.optimizer.save(file, metadata={**metadata, **spoilt})
        with pytest.raises(ValueError, match=r"run\.ckpt: its record of the training is spoilt"):
            run(resume=file, **small)


def test_other_surroundings_are_told(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, real = tmp_path / "run.ckpt", resume.surroundings("auto")
    assert real["blas_threads"] is None or real["blas_threads"] >= 1
    there = {**real, "numpy": "0.2", "blas": "openblas 1.2", "blas_threads": 3}
    monkeypatch.setattr(resume, "surroundings", lambda backend: there)
    run(checkpoint=file, **small)
    monkeypatch.setattr(
        resume, "surroundings", lambda backend: {**there, "numpy": "0.1", "blas_threads": 5}
    )
    result, printed = run(resume=file, **small)
    assert result.resumed is not None
    remarks = result.resumed["remarks"]
    assert remarks[0] == "numpy '0.1' here, '0.2' there: results may differ in the last bits"
    assert remarks[1].startswith("matrix products have 5 threads here, 3 there: results may differ")
    assert remarks[1].endswith("start it with OPENBLAS_NUM_THREADS=3")
    assert all(f"note: {each}\n" in printed for each in remarks)


def test_places_for_checkpoints_are_tried_before_training(
    small: dict[str, Any], tmp_path: Path
) -> None:
    for place in (tmp_path, tmp_path / "missing" / "run.ckpt"):
        with pytest.raises(OSError, match=r"--checkpoint .*: cannot write there .*another file"):
            run(checkpoint=place, **small)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


# Accumulation, clipping, averages, curvature.


def test_accumulated_batches_are_one_large_batch(small: dict[str, Any]) -> None:
    for rule in ("adamw", "sophia"):
        losses, curvature = [], []
        for sizes in ({"accumulate": 4, "batch": 3}, {"batch": 12}, {"batch": 3}):
            setup = Setup.of(TrainOptions(**small | {"rule": rule, "clip": 0.1} | sizes))
            history = History(setup.options.tokens)
            assert list(islice(descend(setup, history), 8)) == list(range(1, 9))
            losses.append([*history.losses, *history.grad_norms])
            state = setup.optimizer.state["blocks.0.up.w"]
            curvature.append(state["v" if rule == "adamw" else "h"].copy())
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
        np.testing.assert_allclose(
            curvature[0], curvature[1], rtol=0.1, atol=1e-4 * np.max(curvature)
        )
        assert not np.allclose(losses[2], losses[1], rtol=1e-2)


@pytest.mark.slow
def test_clipping(small: dict[str, Any]) -> None:
    free, _ = run(clip=1e9, **small)
    limit = float(np.median(free.grad_norms))
    clipped, printed = run(clip=limit, **small)
    assert free.grad_norms[0] == clipped.grad_norms[0]
    assert (free.clipped_steps, len(free.grad_norms)) == (0, 40)
    assert 0 < clipped.clipped_steps < 40
    assert f"clipped in {clipped.clipped_steps} of 40 steps" in printed
    assert run(**small)[0].train_losses == free.train_losses != clipped.train_losses
    found = record(small)
    assert (found["options"]["clip"], found["grad_norms"]) == (None, [])


@pytest.mark.slow
def test_averages_are_evaluated(small: dict[str, Any]) -> None:
    plain, _ = run(**small)
    result, printed = run(ema=0.8, **small)
    assert result.held_out_losses == plain.held_out_losses  # the averages change nothing
    assert result.averaged_losses[0] == result.held_out_losses[0]
    assert result.averaged_loss != result.held_out_loss
    assert f"averaged parameters: {result.averaged_loss:.3f} nats" in printed
    assert printed.count(", averaged ") == 21
    none, _ = run(ema=0.0, **small)  # the average is the parameter
    assert none.averaged_losses == none.held_out_losses
    kept, _ = run(ema=1.0, **small)  # it stays where it began
    assert {loss for _, loss in kept.averaged_losses} == {kept.held_out_losses[0][1]}
    assert record(small)["averaged_loss"] == kept.averaged_loss


@pytest.mark.parametrize("estimator", ["gnb", "hutchinson"])
def test_curvature_at_its_cadence(
    estimator: str, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refreshed = []
    step = fo.Optimizer.step

    def recorded(self: fo.Optimizer, *args: Any, hessian: Any = None, **kwargs: Any) -> Any:
        refreshed.append(hessian is not None)
        return step(self, *args, hessian=hessian, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(fo.Optimizer, "step", recorded)
        patched.setattr(
            steptime,
            "compare",
            lambda *_, **__: steptime.StepTimes(fused_s=1.0, naive_s=1.0, rounds=1),
        )
        result, printed = run(rule="sophia", estimator=estimator, hessian_every=7, **small)
    assert [k for k, given in enumerate(refreshed) if given] == [0, 7, 14, 21, 28, 35]
    assert f"curvature: {estimator}, every 7 steps" in printed
    assert len(result.win_rates) == 40
    assert result.win_rates[0] == 0.0  # there is no curvature yet, and every element is clipped
    assert 0.0 < max(result.win_rates) <= 1.0
    assert result.held_out_loss < result.held_out_losses[0][1] - 0.02
    found = record(small)
    assert found["win_rate"] == pytest.approx(np.mean(result.win_rates))
    assert found["options"]["estimator"] == estimator
    assert f"win rate {result.win_rate:.2f}, " in printed


def test_the_win_rate_is_of_all_elements(small: dict[str, Any]) -> None:
    setup = Setup.of(TrainOptions(rule="sophia", **small))
    stats = {path: {"win_rate": 0.0} for path in setup.optimizer.state}
    stats["wte"] = {"win_rate": 0.5}
    assert _win_rate(setup, stats) == 0.5 * setup.params["wte"].size / setup.parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate: expected at least 1, got 0"),
        ({"clip": 0.0}, "clip: expected a positive number, got 0.0"),
        ({"checkpoint_every": 0}, "checkpoint_every: expected at least 1, got 0"),
        ({"checkpoint_every": 5}, "checkpoint_every: there is no file for it; give checkpoint too"),
        ({"estimator": "gnb"}, "estimator: adamw takes no curvature; leave it out"),
        ({"hessian_every": 5}, "hessian_every: adamw takes no curvature; leave it out"),
        ({"rule": "sophia", "estimator": "exact"}, "estimator: expected one of gnb, hutchinson"),
        ({"rule": "sophia", "hessian_every": 0}, "hessian_every: expected at least 1, got 0"),
    ],
)
def test_options_that_do_not_go(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainOptions(**options)


@pytest.mark.slow
def test_the_command(story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.ckpt"
    arguments = ["train", "--data", str(story), "--steps", "2", "--batch", "1"]
    arguments += ["--rule", "sophia", "--estimator", "hutchinson", "--hessian-every", "1"]
    arguments += ["--accumulate", "2", "--clip", "0.5", "--ema", "0.5", "--out", str(tmp_path)]
    arguments += ["--checkpoint", str(file), "--checkpoint-every", "1"]
    with monkeypatch.context() as patched:
        patched.setattr(text, "batches", interrupting(0))
        stopped = CliRunner().invoke(app, arguments)
    assert stopped.exit_code == 130, stopped.output
    finished = CliRunner().invoke(app, [*arguments, "--resume", str(file)])
    assert finished.exit_code == 0, finished.output
    found = json.loads((tmp_path / "run.json").read_text())
    assert (found["steps"], found["resumed"]["step"]) == (2, 1)
    wanted = {"accumulate": 2, "estimator": "hutchinson", "hessian_every": 1, "clip": 0.5}
    assert found["options"].items() >= {**wanted, "ema": 0.5, "checkpoint_every": 1}.items()
    refused = CliRunner().invoke(app, [*arguments, "--resume", str(file), "--seed", "1"])
    assert refused.exit_code == 2
    assert "seed 1 here, 0 there" in refused.output
