"""What a plain `pytest` selects."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys

import pytest

import fusedopt as fo
from exactness import ROOT
from fusedopt.verify import STORAGES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def selected() -> list[str]:
    """The tests of a plain run, which this one is not."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


def values(selected: list[str], test: str) -> set[str]:
    found = (re.search(rf"{test}\[(.*)\]", line) for line in selected)
    return {match[1] for match in found if match}


def test_a_plain_run_meets_every_module(selected: list[str]) -> None:
    modules = {m.name for m in pkgutil.walk_packages(fo.__path__, "fusedopt.")}
    without = {m for m in modules if m.endswith(("__main__", "_core", "_jax"))}
    assert values(selected, "::test_docstrings") == modules - without


def test_a_plain_run_meets_every_rule_and_storage(selected: list[str]) -> None:
    verified = values(selected, "::test_every_rule_is_within_its_bound")
    rules, storages = zip(*(case.split("-", 1) for case in verified), strict=True)
    assert ({*rules}, {*storages}) == ({*fo.RULES}, {*STORAGES})
    assert len(verified) < len(fo.RULES) * len(STORAGES) / 4
    exact = values(selected, "test_exact.py::test_instruction_sets")
    assert {case.partition("-")[0] for case in exact} == {*fo.RULES}
