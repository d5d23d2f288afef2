"""The documentation runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import fusedopt

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_examples(capsys: pytest.CaptureFixture[str]) -> None:
    code = compile("\n".join(blocks("python")), "README.md", "exec", dont_inherit=True)
    exec(code, {"__name__": "__main__"})
    printed = capsys.readouterr().out
    found = re.match(r"step 200: loss (.*) -> (.*)\n", printed)
    assert found
    assert "m bfloat16, v dynamic8, low uint16" in printed
    assert float(found[2]) < 0.1 * float(found[1])


def test_ci_runs_the_readmes_test_command() -> None:
    _, test_command, *_ = blocks("sh")
    assert test_command in (ROOT / ".ci" / "run").read_text()


def test_the_table_has_every_rule_and_its_states() -> None:
    for cls in fusedopt.RULES.values():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{cls.__name__}`"))
        cell = row.rsplit("|", 2)[1]
        rules = [cls(**example) for example in cls.examples]
        states = {name for rule in rules for name in (*rule.states, *rule.sides((2, 3)))}
        assert set(re.findall(r"\w+", cell)) == states


OF_RULES = {cls.__module__ for cls in (*fusedopt.RULES.values(), fusedopt.CustomRule)}
MODULES = [m.name for m in pkgutil.walk_packages(fusedopt.__path__, "fusedopt.")]


@pytest.mark.parametrize(
    "name", [m for m in MODULES if not m.endswith(("__main__", "_core", "_jax"))]
)
def test_docstrings(name: str) -> None:
    if name.startswith("fusedopt.backends.cuda."):
        pytest.importorskip("numba_cuda")
    if name.startswith("fusedopt.torch"):
        pytest.importorskip("torch")
    if name == "fusedopt.thinc":
        pytest.importorskip("thinc")
    if name == "fusedopt.jax":
        pytest.importorskip("optax")
        pytest.importorskip("fusedopt._jax")
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    if name in OF_RULES or name == "fusedopt.schedules":
        assert result.attempted > 0
