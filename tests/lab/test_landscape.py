"""The landscapes: gradients, paths of the fused kernels, what the scenes claim, the pictures."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from typer.testing import CliRunner

import fusedopt as fo
from drawn import check_texts
from fusedopt.cli import app
from fusedopt.lab.landscape import SCENES, Run, Scene, walk
from fusedopt.lab.landscape.objectives import (
    Beale,
    Line,
    Objective,
    Quadratic,
    Rosenbrock,
    TugOfWar,
)
from fusedopt.lab.landscape.pictures import draw, write_gif, write_png
from fusedopt.lab.landscape.scenes import BEALE_RATES, ROSENBROCK_RATES, of_two_weights
from fusedopt.lab.plotting import BLUE

OBJECTIVES: list[Objective] = [
    Quadratic((1.0, 25.0), (0.5, -1.0)),
    Rosenbrock(),
    Beale(),
    Line(),
    TugOfWar((5.0, 0.01)),
]

each_scene = pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())


def run(rule: fo.Rule, batch: int | None = None) -> Run:
    return Run(label="it", rule=rule, colour=BLUE, batch=batch)


# Objectives.


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_gradients_are_the_slopes_of_the_values(objective: Objective) -> None:
    for w in np.random.default_rng(0).uniform(-1.5, 1.5, (20, 2)):
        shifts = 1e-5 * np.eye(2)
        slope = (objective.value(w + shifts) - objective.value(w - shifts)) / 2e-5
        np.testing.assert_allclose(objective.gradient(w), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_nothing_is_lower_than_the_minimum(objective: Objective) -> None:
    minimum = np.array(objective.minimum)
    around = np.random.default_rng(0).uniform(-4, 4, (1000, 2))
    assert np.all(objective.value(around) >= objective.value(minimum))
    np.testing.assert_allclose(objective.gradient(minimum), 0, atol=1e-12)


@pytest.mark.parametrize("objective", [Line(), TugOfWar((5.0, 0.01))])
def test_samples_average_to_the_gradient(objective: Line | TugOfWar) -> None:
    w = np.array([0.3, -2.0])
    pulls = [objective.pull(w, np.array([k])) for k in range(objective.count)]
    np.testing.assert_allclose(np.mean(pulls, axis=0), objective.gradient(w), atol=1e-12)
    assert np.std(pulls, axis=0).min() > 0


# Paths.


def test_a_path_is_what_the_functional_kernel_makes() -> None:
    rule, valley = fo.AdamW(lr=0.1, weight_decay=0.2), Quadratic((1.0, 25.0))
    path = walk(valley, run(rule), (-4.0, 1.0), 30)
    w = np.array([-4.0, 1.0])
    states = rule.init(w)
    for t in range(1, 31):
        np.testing.assert_array_equal(path.gradients[t - 1], valley.gradient(w))
        fo.update(rule, t, w, valley.gradient(w), *states)
        np.testing.assert_array_equal(path.points[t], w)
    np.testing.assert_array_equal(path.losses, valley.value(path.points))


@each_scene
def test_every_path_agrees_with_the_textbook(scene: Scene) -> None:
    for path in replace(scene, steps=40).walk().values():
        rule = path.run.rule
        if rule.takes_hessian:
            continue
        p, states = path.points[0], rule.init(path.points[0].copy())
        for t, g in enumerate(path.gradients, 1):
            p, states = rule.reference(p, g, states, t=t, lr=rule.lr_at(t))
            np.testing.assert_allclose(path.points[t], p, rtol=1e-12, atol=1e-12)


def test_every_path_takes_its_steps_from_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Mock(side_effect=fo.Optimizer.step, autospec=True)
    monkeypatch.setattr(fo.Optimizer, "step", lambda *args, **kwargs: step(*args, **kwargs))
    for scene in SCENES.values():
        replace(scene, steps=5).walk()
    assert step.call_count == 5 * sum(len(scene.runs) for scene in SCENES.values())


def test_look_ahead_takes_its_gradients_where_the_velocity_leads() -> None:
    rule = fo.Nesterov(lr=0.05, momentum=0.9, form="lookahead")
    path = walk(Quadratic((1.0, 12.0)), run(rule), (-4.0, 2.0), 10)
    w, v = np.array([-4.0, 2.0]), np.zeros(2)
    for t in range(10):
        ahead = w - 0.9 * v
        np.testing.assert_allclose(path.probes[t], ahead, rtol=1e-12)
        v = 0.9 * v + 0.05 * np.array([1.0, 12.0]) * ahead
        w = w - v
        np.testing.assert_allclose(path.points[t + 1], w, rtol=1e-11)


def test_batches_are_drawn_without_repetition_from_the_seed() -> None:
    line, all_of_it = Line(), run(fo.SGD(lr=0.1), batch=200)
    whole = walk(line, run(fo.SGD(lr=0.1)), (0.0, 0.0), 20)
    np.testing.assert_allclose(
        walk(line, all_of_it, (0.0, 0.0), 20).points, whole.points, rtol=1e-12
    )
    single = run(fo.SGD(lr=0.1), batch=1)
    one, same, other = (walk(line, single, (0.0, 0.0), 20, seed=s).points for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_a_path_to_infinity_is_refused() -> None:
    message = r"it: expected finite weights, got .* at step \d"
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match=message):
        walk(Rosenbrock(), run(fo.SGD(lr=1.0)), (-1.2, 1.0), 100)


# Claims.


@each_scene
def test_what_a_scene_claims_holds(scene: Scene) -> None:
    claim = scene.claim(scene.walk(), scene.objective)
    assert claim.holds, claim.text


@each_scene
def test_a_claim_can_fail(scene: Scene) -> None:
    paths = scene.walk()
    if scene.claim.__name__ == "descended":
        still = {label: replace(path, losses=path.losses[:1]) for label, path in paths.items()}
        assert not scene.claim(still, scene.objective).holds
    else:
        exchanged = dict(zip(paths, reversed(paths.values()), strict=True))
        assert not scene.claim(exchanged, scene.objective).holds


def test_momentum_damps_the_zigzag() -> None:
    plain, momentum = SCENES["valley"].walk().values()
    np.testing.assert_array_equal(np.sign(plain.points[:, 1]), (-1.0) ** np.arange(61))
    # Across, plain descent has the factor 1 - 25 lr = -0.96, momentum sqrt(0.9) = 0.949.
    np.testing.assert_allclose(plain.points[:, 1], (-0.96) ** np.arange(61), rtol=1e-10)
    envelope = np.abs(momentum.points[30:, 1]).max()
    assert envelope < 2 * 0.9**15


def test_adagrad_falls_as_one_over_the_root_of_t() -> None:
    adagrad, rmsprop = SCENES["stall"].walk().values()
    t = np.arange(1, 601)
    np.testing.assert_allclose(np.abs(adagrad.moves[:, 0]) * np.sqrt(t) / 0.01, 1, atol=0.13)
    np.testing.assert_allclose(np.abs(rmsprop.moves[30:200, 0]) / 0.01, 1, atol=0.05)


def test_first_steps_with_and_without_bias_correction() -> None:
    corrected, without, shorter = SCENES["bias"].walk().values()
    np.testing.assert_allclose(np.abs(corrected.moves[0]), 0.05, rtol=1e-7)
    np.testing.assert_allclose(np.abs(without.moves[0]), 0.05 * 0.1 / 0.001**0.5, rtol=1e-6)
    np.testing.assert_allclose(np.abs(shorter.moves[0]), 0.05 * 0.1**0.5, rtol=1e-6)


def test_decoupled_decay_is_the_same_whatever_pulls() -> None:
    claim = SCENES["decay"].claim(SCENES["decay"].walk(), SCENES["decay"].objective).numbers
    assert claim["(1 - lr lambda)^steps"] == pytest.approx(np.exp(-2), rel=1e-3)
    hard, other = (
        claim[f"left of {w}, decoupled"] for w in ("the weight pulled hard", "the other")
    )
    assert abs(hard - other) < 0.05
    assert claim["left of the weight pulled hard, L2"] > 0.6
    assert abs(claim["left of the other, L2"]) < 0.01


def test_noise_of_single_samples_and_batches() -> None:
    claim = SCENES["batches"].claim(SCENES["batches"].walk(), SCENES["batches"].objective).numbers
    # Without repetition the mean of M of N varies by (N - M) / (N - 1) / M of a single one.
    said = (20 * 199 / 180) ** 0.5
    assert said / 2 < claim["spread, 1"] / claim["spread, 20"] < said * 2
    assert claim["turn, degrees, all 200 samples"] < 1


def test_nesterov_brakes_in_the_very_second_step() -> None:
    polyak, nesterov = SCENES["nesterov"].walk().values()
    np.testing.assert_array_equal(polyak.points[1], nesterov.points[1])
    np.testing.assert_allclose(polyak.points[2, 1], 0.8 - 0.9 * 1.2 - 0.6 * 0.8)
    np.testing.assert_allclose(nesterov.points[2, 1], (0.8 - 0.9 * 1.2) * (1 - 0.6))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rates"), [("rosenbrock", ROSENBROCK_RATES), ("beale", BEALE_RATES)]
)
def test_rates_are_the_best_of_their_grid(name: str, rates: dict[str, float]) -> None:
    scene = SCENES[name]
    panel: Any = scene.panels[0][0]
    left, right, bottom, top = panel.ground.extent

    def end(rule: str, lr: float) -> float:
        try:
            path = walk(scene.objective, run(of_two_weights(rule, lr)), scene.start, scene.steps)
        except FloatingPointError:
            return np.inf
        x, y = path.points.T
        inside = left <= x.min() and x.max() <= right and bottom <= y.min() and y.max() <= top
        return float(path.losses[-1]) if inside else np.inf

    grid = [float(f"{10 ** (k / 4):.2g}") for k in range(-20, 5)]
    with np.errstate(all="ignore"):
        for rule, lr in rates.items():
            assert min(grid, key=lambda value: end(rule, value)) == lr


def test_every_rule_is_raced_or_left_out_with_a_reason() -> None:
    for name in ("rosenbrock", "beale"):
        raced = {type(run.rule).name for run in SCENES[name].runs}
        left = set(fo.RULES) - raced
        assert raced == {*list(fo.RULES)[:9]}
        for rule in left:
            shown, refused = fo.RULES[rule].__name__, fo.RULES[rule]().refuses(np.zeros(2))
            *refusals, no_room = SCENES[name].left_out.split("; ")
            if refused:
                assert any(r.startswith(f"{shown} updates arrays of two") for r in refusals)
            else:
                assert shown in no_room.partition(": no room")[0].split(", ")


# Pictures.


@pytest.mark.slow
@each_scene
def test_no_text_is_cut_off_or_covers_another(scene: Scene) -> None:
    made, _ = draw(scene, list(scene.walk().values()))
    assert check_texts(made) > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["valley", "rosenbrock"])
def test_pictures_are_small_and_move(name: str, tmp_path: Path) -> None:
    scene = SCENES[name]
    paths = list(scene.walk().values())
    still, moving = tmp_path / "a.png", tmp_path / "a.gif"
    write_png(scene, paths, still)
    assert struct.unpack(">I", still.read_bytes()[16:20]) == (800,)
    assert still.stat().st_size < 150_000
    write_gif(scene, paths, moving)
    assert moving.stat().st_size < 400_000
    with cast(GifImageFile, Image.open(moving)) as gif:
        assert gif.size[0] == 640
        assert gif.info["loop"] == 0
        frames = []
        for k in range(gif.n_frames):
            gif.seek(k)
            frames.append(np.array(gif.convert("RGB")))
    assert len(frames) > 40
    assert all(tuple(frame[0, 0]) == (255, 255, 255) for frame in frames)
    coloured = [int((np.ptp(frame.astype(int), axis=2) > 60).sum()) for frame in frames]
    assert coloured[0] < coloured[len(frames) // 2] < coloured[-1]


# The command.


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["landscape", *arguments])


def test_landscape_command(tmp_path: Path) -> None:
    file = tmp_path / "scenes.json"
    scenes = ("--scene", "bias", "--scene", "valley")
    result = command(*scenes, "--no-gif", "--out", str(tmp_path), "--json", str(file))
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert "plain descent cross the floor of the valley 60 times" in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bias.png", "scenes.json", "valley.png"]
    record = json.loads(file.read_text(encoding="ascii"))
    bias, valley = record["scenes"]
    assert (bias["name"], valley["name"]) == ("bias", "valley")
    assert bias["claim"]["holds"] is True
    assert bias["claim"]["numbers"]["first step / lr, corrected"] == pytest.approx(1)
    assert len(valley["paths"]["momentum"]["points"]) == 61
    assert "Momentum(lr=0.0784" in valley["paths"]["momentum"]["rule"]
    assert record["machine"] == fo.info()


@pytest.mark.slow
def test_landscape_command_where_a_claim_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = SCENES["valley"]
    same = replace(scene, runs=tuple(replace(r, rule=scene.runs[0].rule) for r in scene.runs))
    monkeypatch.setitem(SCENES, "valley", same)
    result = command("--scene", "valley", "--no-gif", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "NOT BORNE OUT" in result.output


@pytest.mark.slow
def test_landscape_command_keeps_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setitem(SCENES, "stall", replace(SCENES["stall"], claim=interrupt))
    file = tmp_path / "scenes.json"
    scenes = ("--scene", "bias", "--scene", "stall")
    result = command(*scenes, "--no-gif", "--out", str(tmp_path), "--json", str(file))
    assert result.exit_code == 130
    assert "Interrupted after 1 of 2 scenes" in result.output
    assert [scene["name"] for scene in json.loads(file.read_text())["scenes"]] == ["bias"]
    assert (tmp_path / "bias.png").exists()


def test_landscape_command_refuses(tmp_path: Path) -> None:
    result = command("--scene", "himalaya", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "expected one of batches, valley" in result.output
    assert "got 'himalaya'" in " ".join(result.output.split())
    occupied = tmp_path / "file"
    occupied.touch()
    result = command("--scene", "bias", "--out", str(occupied))
    assert result.exit_code == 2
    assert "cannot write there" in " ".join(result.output.split())
