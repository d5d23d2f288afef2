"""Write a page for each rule in `fusedopt.RULES`, with the picture of its path, and their table."""

from __future__ import annotations

import typing
from dataclasses import fields
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import fusedopt as fo
from fusedopt.lab.landscape.objectives import Quadratic
from fusedopt.lab.landscape.paths import Run, walk
from fusedopt.rules.base import Rule
from fusedopt.rules.conventions import REQUIRED
from fusedopt.rules.hyperparameters import Numbers, Quintics, Rate

STEPS = 60
RATES = [10.0 ** (k / 4) for k in range(-12, 7)]


def write(folder: Path) -> None:
    """Write the pages and pictures of all rules, and their table, into a folder."""
    folder.mkdir(exist_ok=True)
    _replace(folder / "table.txt", table())
    for name, rule in fo.RULES.items():
        lines = [f"# {rule.__name__}", "", f"```{{autoclass}} fusedopt.{rule.__name__}", "```", ""]
        lines += ["## Values that hyperparameters accept", "", *_hyperparameters(rule)]
        lines += ["## Conventions of the libraries", "", *_conventions(rule)]
        lines += ["## Path", "", *_path(rule, folder / f"{name}.svg")]
        _replace(folder / f"{name}.md", "\n".join(lines))


def table() -> str:
    """Return the table of all rules."""
    lines = ["| rule | year | what it is | states | also in |", "|---|---|---|---|---|"]
    for name, rule in fo.RULES.items():
        made = [rule(**example) for example in rule.examples]
        first = [*made[0].states, *made[0].sides((2, 3))]
        more = {state: None for each in made for state in (*each.states, *each.sides((2, 3)))}
        others = [state for state in more if state not in first]
        states = ", ".join(first) + (f" ({', '.join(others)})" if others else "")
        what = (rule.__doc__ or "").partition("\n")[0].removesuffix(".")
        libraries = ", ".join(rule.conventions)
        page = f"[{rule.__name__}](generated/{name}.md)"
        lines.append(f"| {page} | {rule.year} | {what} | {states} | {libraries} |")
    return "\n".join(lines) + "\n"


def _replace(file: Path, text: str) -> None:
    if not file.exists() or file.read_text() != text:  # unchanged pages are not built again
        file.write_text(text)


def _hyperparameters(rule: type[Rule]) -> list[str]:
    hints = typing.get_type_hints(rule, include_extras=True)
    rows = ["| name | default | accepted |", "|---|---|---|"]
    for field in fields(rule):
        rows.append(f"| `{field.name}` | `{field.default!r}` | {_accepted(hints[field.name])} |")
    return [*rows, ""]


def _accepted(hint: object) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value!r}`" for value in typing.get_args(hint))
    if typing.get_origin(hint) is not typing.Annotated:
        return "`True`, `False`" if hint is bool else str(getattr(hint, "__name__", hint))
    kind = typing.get_args(hint)[1]
    if isinstance(kind, Rate):
        return "a number >= 0, or a schedule"
    if isinstance(kind, Numbers):
        return f"{kind.length} numbers, each {kind.each}"
    if isinstance(kind, Quintics):
        return "the name of a set, one triple, or one triple for each iteration"
    return str(kind)


def _conventions(rule: type[Rule]) -> list[str]:
    if not rule.conventions:
        return ["No convention of PyTorch, optax or Keras is recorded for this rule.", ""]
    rows = [
        f"`fo.{rule.__name__}.like(library, ...)` takes the names in the second column, with the",
        "library's defaults, and sets what the third column says.",
        "",
        "| library | its hyperparameters | set |",
        "|---|---|---|",
    ]
    for library, convention in rule.conventions.items():
        free = (
            f"`{name}` (required)" if value is REQUIRED else f"`{name}={value!r}`"
            for name, value in convention.free.items()
        )
        fixed = (f"`{name}={value!r}`" for name, value in convention.fixed.items())
        rows.append(f"| `{library}` | {', '.join(free)} | {', '.join(fixed)} |")
    return [*rows, ""]


def _path(rule: type[Rule], picture: Path) -> list[str]:
    """Draw the path with the best of the learning rates: that which ends lowest."""
    valley = Quadratic((1.0, 20.0))
    options = {"estimator": "hutchinson", "form": "paper"} if rule.takes_hessian else {}
    matrix = rule().program.phases > 1
    start = ((-2.0, 1.0), (0.8, -0.6)) if matrix else (-2.0, 1.0)
    found = []
    for lr in RATES:
        run = Run(label=rule.__name__, rule=rule(lr=lr, **options), colour="C0")
        try:
            with np.errstate(all="ignore"):
                points = walk(valley, run, start, STEPS).points
                found.append((float(valley.value(points[-1]).sum()), lr, points))
        except FloatingPointError:  # the learning rate is too large
            continue
    loss, lr, points = min(found, key=lambda one: one[0])

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    x, y = np.meshgrid(np.linspace(-2.4, 1.2, 120), np.linspace(-1.3, 1.3, 90))
    axes.contour(x, y, valley.value(np.stack([x, y], -1)), 12, colors="0.8", linewidths=0.8)
    for path in np.moveaxis(points.reshape(STEPS + 1, -1, 2), 1, 0):
        axes.plot(*path.T, ".-", markersize=4, linewidth=1)
    axes.plot(0, 0, "k+", markersize=12)
    axes.set(xlim=(-2.4, 1.2), ylim=(-1.3, 1.3))
    figure.savefig(picture, metadata={"Date": None})
    what = "each row of a 2 x 2 matrix" if matrix else "two weights"
    return [
        f"![{rule.__name__} in a valley]({picture.name})",
        "",
        f"The path of {what} over the loss (x² + 20 y²) / 2 in {STEPS} steps, computed by the",
        f"package while this page was built. The learning rate is {lr:.3g}, the best of 10^(k/4)",
        f"for this loss; the final loss is {loss:.2g}.",
        "",
    ]
