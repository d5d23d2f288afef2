"""The language of docstrings: each first line stands alone, and public names say what they take."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusedopt as fo

PACKAGE = Path(fo.__file__).parent
CORE = PACKAGE.parent / "csrc"

DANGLING = re.compile(
    r"(Of|It|Its|That|Those|These|This|They|Their|What|Which|The same|Sets that)\b"
    r"(?!-| (rank|machine|process))"
)
"""Words whose noun is somewhere else."""


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield (place, docstring) of every module, class, function and attribute of the package."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield f"{file.relative_to(PACKAGE)}:{node.lineno}", text


def test_first_lines_stand_alone() -> None:
    found = list(docstrings())
    assert len(found) > 1000
    dangling = [(place, text[:80]) for place, text in found if DANGLING.match(text)]
    assert dangling == []


@pytest.mark.skipif(not CORE.is_dir(), reason="needs the source")
def test_numbers_have_names() -> None:
    files = [*PACKAGE.rglob("*.py"), *CORE.iterdir()]
    assert [str(f) for f in files if "so many" in f.read_text(encoding="utf-8").lower()] == []


def documented() -> Iterator[str]:
    """Yield what a user calls: functions, classes, and the methods of an optimizer and its kin."""
    for name in fo.__all__:
        value = getattr(fo, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name
        if name in ("Optimizer", "LossScaler"):
            methods = inspect.getmembers(value, inspect.isfunction)
            yield from (f"{name}.{method}" for method, _ in methods if not method.startswith("_"))
    yield from ("Rule.init", "Rule.like", "Rule.lr_at", "Rule.reference", "Muon.with_adamw")


CHECKS = {
    *("GL02", "GL03", "GL05", "GL06", "GL07", "GL08", "GL10"),
    *("SS01", "SS02", "SS03", "SS04", "SS05", "SS06"),
    *("PR01", "PR02", "PR06", "PR07", "PR08", "PR09", "PR10", "RT01", "RT03", "RT04", "RT05"),
}
"""Checks of numpydoc: form of the sections, summary, parameters, and what is returned."""


@pytest.mark.parametrize("name", list(documented()))
def test_public_docstrings_have_the_sections_of_numpydoc(name: str) -> None:
    validate = pytest.importorskip("numpydoc.validate").validate
    found = validate(f"fusedopt.{name}")["errors"]
    assert [f"{code}: {text}" for code, text in found if code in CHECKS] == []
