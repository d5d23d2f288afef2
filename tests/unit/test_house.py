"""The rooms of the package, which are the files and folders in it, and the imports between them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fusedopt as fo

HOUSE = Path(fo.__file__).parent
MODULES = {
    ".".join((HOUSE.name, *path.relative_to(HOUSE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in HOUSE.rglob("*.py")
}


def imports(module: str, path: Path) -> Iterator[str]:
    """The modules that a module imports, also for types alone and inside of functions."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = [*above, *([node.module] if node.module else [])]
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            while name not in MODULES and "." in name:
                name = name.rpartition(".")[0]
            # The package itself gives out names, and imports them when they are asked for.
            if name in MODULES and name not in (module, HOUSE.name):
                yield name


def longest(graph: dict[str, set[str]]) -> list[str]:
    """The longest chain of imports; CycleError where there is a circle."""
    chains: dict[str, list[str]] = {}
    for node in TopologicalSorter(graph).static_order():
        below = max((chains[other] for other in graph[node]), key=len, default=[])
        chains[node] = [node, *below]
    return max(chains.values(), key=len)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return {module: set(imports(module, path)) for module, path in MODULES.items()}


def test_no_circle_of_imports(graph: dict[str, set[str]]) -> None:
    assert len(graph) > 150
    assert len(longest(graph)) > 12


def test_floors(graph: dict[str, set[str]]) -> None:
    rooms: dict[str, set[str]] = {}
    for module, others in graph.items():
        room = module.split(".")[1] if "." in module else module
        below = rooms.setdefault(room, set())
        below |= {other.split(".")[1] for other in others} - {room}
    del rooms[HOUSE.name]
    chain = longest(rooms)
    assert chain[0] == "__main__"
    assert chain[-1] == "system"
    assert len(chain) <= 12, chain
