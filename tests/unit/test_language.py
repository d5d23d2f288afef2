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
    assert [str(f) for f in files if "so many" in f.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize(
    "name", ["update", "global_norm", "estimate", "verify", "warmup", "orthogonalize", "set_isa"]
)
def test_parameters_of_public_functions_are_described(name: str) -> None:
    function = getattr(fo, name)
    text = inspect.getdoc(function) or ""
    section = text.partition("Parameters\n----------\n")[2].partition("\n\n")[0]
    described = {
        part.strip("* ")
        for line in re.findall(r"^(\S.*?)(?: :.*)?$", section, re.MULTILINE)
        for part in line.split(",")
    }
    assert described == set(inspect.signature(function).parameters)
