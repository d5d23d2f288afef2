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
def collected() -> str:
    """What pytest says of a plain run, which this one is not."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def selected(collected: str) -> list[str]:
    return [line for line in collected.splitlines() if "::" in line]


def values(selected: list[str], test: str) -> set[str]:
    found = (re.search(rf"{test}\[(.*)\]", line) for line in selected)
    return {match[1] for match in found if match}


def test_a_plain_run_meets_every_module(selected: list[str]) -> None:
    modules = {m.name for m in pkgutil.walk_packages(fo.__path__, "fusedopt.")}
    without = {m for m in modules if m.endswith(("__main__", "_core", "_jax"))}
    assert values(selected, "::test_docstrings") == modules - without


def test_a_plain_run_meets_every_rule_in_many_tests(selected: list[str]) -> None:
    tests: dict[str, set[str]] = {name: set() for name in fo.RULES}
    for line in selected:
        test, _, case = line.partition("[")
        for word in re.findall(r"\w+", case.lower()):
            tests.get(word, set()).add(test)
    assert min(map(len, tests.values())) >= 12, {name: len(met) for name, met in tests.items()}


def test_a_plain_run_verifies_every_storage(selected: list[str]) -> None:
    verified = values(selected, "::test_every_rule_is_within_its_bound")
    rules, storages = zip(*(case.split("-", 1) for case in verified), strict=True)
    assert {*storages} == {*STORAGES}
    assert {*rules} < {*fo.RULES}  # the others meet other tests


def test_a_plain_run_is_a_part_of_all(collected: str, selected: list[str]) -> None:
    match = re.search(r"(\d+)/(\d+) tests collected", collected)
    assert match is not None
    shown, every = map(int, match.groups())
    assert shown == len(selected)
    assert shown < every / 5
