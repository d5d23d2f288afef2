"""The command line, apart from training."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fusedopt as fo
from fusedopt.cli import app


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_info(tmp_path: Path) -> None:
    result = run("info", "--json", str(tmp_path / "info.json"))
    assert result.exit_code == 0
    found = json.loads((tmp_path / "info.json").read_text())
    assert found == fo.info()
    assert f"isa:           {fo.get_isa()}" in result.output
    assert set(found["backends"]) == {"native", "numba", "reference", "cuda"}


def test_verify(tmp_path: Path) -> None:
    file = tmp_path / "checks.json"
    result = run("verify", "--rule", "sgd", "--rule", "lion", "--size", "97", "--json", str(file))
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())
    assert {row["rule"] for row in rows} == {"sgd", "lion"}
    assert all(row["passed"] and row["worst_share"] <= 1 for row in rows)
    assert result.output.count("ok") == len(rows)
    chosen = run("verify", "--rule", "lion", "--storage", "dynamic8", "--json", str(file))
    assert chosen.exit_code == 0, chosen.output
    assert {row["storage"] for row in json.loads(file.read_text())} == {"dynamic8"}


def test_verify_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fo.SGD, "scalars", lambda self, t, lr: (lr * 1.001,))
    result = run("verify", "--rule", "sgd", "--backend", "native", "--size", "97")
    assert result.exit_code == 1
    assert "FAILED sgd: p[" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "--rule", "sdg"), "got 'sdg'"),
        (("verify", "--backend", "gpu"), "got 'gpu'"),
        (("verify", "--rule", "sgd", "--storage", "int8"), "'int8'"),
        (("train", "--dtype", "float16"), "expected one of float32, bfloat16, got 'float16'"),
        (("train", "--master", "split16"), "master: 'split16' is for bfloat16"),
        (("bench", "--rule", "sdg"), "got 'sdg'"),
        (("bench", "--size", "7"), "size: expected at least 8, got 7"),
        (("bench", "--rounds", "2"), "rounds: expected at least 3, got 2"),
        (("bench", "--seconds", "0"), "seconds: expected more than 0, got 0"),
        (("bench", "--out", "/dev/null/x"), "--out /dev/null/x"),
        (("bench", "--compare", "/nowhere/a.json", "/nowhere/b.json"), "/nowhere/a.json"),
        (("train", "--rule", "sdg"), "got 'sdg'"),
        (("train", "--steps", "0"), "steps"),
        (("train", "--schedule", "cos"), "schedule: expected one of cosine"),
        (("train", "--data", "/nowhere/at/all.txt"), "/nowhere/at/all.txt"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_module_and_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fusedopt", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("info", "verify", "bench", "train", "landscape", "race"):
        assert command in done.stdout
        assert "Example:" in run(command, "--help").output


def test_help_names_the_schedules() -> None:
    from fusedopt.lab.train.recipes import SCHEDULES

    assert set(re.findall(r"\w+", run("train", "--help").output)) >= set(SCHEDULES)


def test_without_its_extras_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; import fusedopt.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'fusedopt[cli]'" in done.stderr
