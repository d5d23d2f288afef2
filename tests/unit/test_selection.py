"""A plain `pytest` meets every rule and runs code of every module."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fusedopt as fo
from exactness import ROOT, SUPPORT

PACKAGE = Path(fo.__file__).parent
ELSEWHERE = ()
"""Modules that need an extra, run in another process or are compiled by Numba."""


def has_functions(file: Path) -> bool:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) for node in ast.walk(tree))


@pytest.mark.slow
def test_a_plain_run_meets_every_rule_and_module(tmp_path: Path) -> None:
    found = tmp_path / "met.json"
    environment = {**os.environ, **SUPPORT, "FUSEDOPT_MET": str(found)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "met", "-p", "no:cacheprovider"]
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    met = json.loads(found.read_text())
    for name in fo.RULES:
        assert any(re.search(rf"\[(.*-)?{name}[-\]]", test) for test in met["tests"]), name
    files = {
        str(file.relative_to(PACKAGE)): str(file) in met["files"]
        for file in PACKAGE.rglob("*.py")
        if has_functions(file)
    }
    missed = {name for name, was_met in files.items() if not was_met}
    assert not {name for name in missed if not name.startswith(ELSEWHERE)}
