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
README = ROOT / "README.md"
RECIPES = {"jax.md", "numpy-frameworks.md", "pytorch.md", "spacy.md"}
"""Pages that need other packages, and run in tests/interop/test_recipes.py."""
PAGES = sorted(set((ROOT / "docs").rglob("*.md")) - {*(ROOT / "docs/rules/generated").glob("*")})


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def run(page: Path) -> None:
    """Run the Python blocks of a page, one after another, as one program.

    Examples that need what a test has not, such as a GPU, are `{code-block} python` in the pages.
    """
    for code in blocks(page, "python"):
        assert all(len(line) <= 100 for line in code.splitlines())
    exec(compile("\n".join(blocks(page, "python")), str(page), "exec", dont_inherit=True), {})


def test_the_readmes_example(capsys: pytest.CaptureFixture[str]) -> None:
    run(README)
    found = re.match(r"step 200: loss (.*) -> (.*)\n", capsys.readouterr().out)
    assert found
    assert float(found[2]) < 0.1 * float(found[1])


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if p.name not in RECIPES and blocks(p, "python")],
    ids=lambda p: p.relative_to(ROOT).as_posix(),
)
def test_the_examples_of_a_page(page: Path) -> None:
    run(page)


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_between_pages(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_ci_runs_the_readmes_test_command() -> None:
    _, test_command, *_ = blocks(README, "sh")
    assert test_command in (ROOT / ".ci" / "run").read_text()


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
