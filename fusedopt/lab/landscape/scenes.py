"""The scenes: each a description, from which paths, pictures and claims follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

import fusedopt as fo

from ..plotting import BLACK, BLUE, GREEN, ORANGE, VERMILION
from . import claims
from .claims import Claim
from .objectives import Array, Beale, Line, Objective, Quadratic, Rosenbrock, TugOfWar
from .panels import Curve, Ground, Map, OneStep, Panel
from .paths import Path, Run, walk


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A scene: the runs, the claims that they show, and how they are drawn.

    name: of its files. title: what is seen. claim: that, as numbers of the paths. panels: the
    picture's rows; heights: theirs, in inches. footer: what signs mean, where they need it.
    left_out: which rules do not apply, and why.
    """

    name: str
    title: str
    objective: Objective
    start: tuple[float, float]
    steps: int
    runs: tuple[Run, ...]
    claim: Callable[[Mapping[str, Path], Objective], Claim]
    panels: Sequence[Sequence[Panel]]
    heights: tuple[float, ...]
    footer: str = ""
    left_out: str = ""

    def walk(self) -> dict[str, Path]:
        """The paths by label, each of `steps` steps."""
        return {run.label: walk(self.objective, run, self.start, self.steps) for run in self.runs}


def _away(objective: Objective, path: Path) -> Array:
    distance: Array = np.linalg.norm(path.points - objective.minimum, axis=1)
    return distance


def _height(objective: Objective, path: Path) -> Array:
    return path.points[:, 1]


def _move(objective: Objective, path: Path) -> Array:
    moved: Array = np.abs(path.moves[:, 0])
    return moved


def _in_rates(objective: Objective, path: Path) -> Array:
    return claims.in_rates(path)


LINE = Ground(extent=(-2.5, 2.7, -1.4, 3.4), levels=(0.55, 20.0))
BATCHES = Scene(
    name="batches",
    title="The fewer samples in each batch,\nthe more the path jitters",
    objective=Line(),
    start=(-2.0, 3.0),
    steps=200,
    runs=(
        Run(label="all 200 samples", rule=fo.SGD(lr=0.1), colour=BLACK, width=3.0),
        Run(label="20", rule=fo.SGD(lr=0.1), batch=20, colour=BLUE),
        Run(label="1", rule=fo.SGD(lr=0.1), batch=1, colour=ORANGE, width=1.2),
    ),
    claim=claims.jitter,
    panels=(
        (Map(ground=LINE, axes=("slope", "intercept")),),
        (Curve(of=_away, ylabel="distance", log="y"),),
    ),
    heights=(4.9, 1.9),
)

NARROW = Ground(extent=(-4.5, 1.5, -1.35, 1.35), levels=(0.02, 30.0))
VALLEY = Scene(
    name="valley",
    title="Momentum damps the zigzag\nacross a narrow valley",
    objective=Quadratic((1.0, 25.0)),
    start=(-4.0, 1.0),
    steps=60,
    runs=(  # 1.96 over the larger curvature: from 2 on, plain descent flies apart
        Run(label="plain descent", rule=fo.SGD(lr=0.0784), colour=VERMILION),
        Run(label="momentum", rule=fo.Momentum(lr=0.0784), colour=BLUE),
    ),
    claim=claims.damped,
    panels=(
        (Map(ground=NARROW, only="plain descent", axes=("", "across")),),
        (Map(ground=NARROW, only="momentum", axes=("", "across")),),
        (Curve(of=_height, ylabel="across"),),
    ),
    heights=(2.35, 2.35, 1.7),
)

STEEP = Quadratic((1.0, 12.0))
WIDE = Ground(extent=(-4.4, 2.4, -1.9, 2.3), levels=(0.02, 40.0))
CLOSE = Ground(extent=(-4.45, -2.45, -1.0, 1.15), levels=(1.0, 14.0))
NESTEROV = Scene(
    name="nesterov",
    title="Nesterov looks ahead and brakes;\nPolyak overshoots",
    objective=STEEP,
    start=(-4.0, 2.0),
    steps=60,
    runs=(
        Run(label="Polyak", rule=fo.Momentum(lr=0.05, form="heavy_ball"), colour=VERMILION),
        Run(label="Nesterov", rule=fo.Nesterov(lr=0.05, form="lookahead"), colour=BLUE),
    ),
    claim=claims.overshoot,
    panels=(
        (Map(ground=WIDE, axes=("", "across")),),
        (
            OneStep(ground=CLOSE, only="Polyak", step=2, title="step 2: gradient\nbefore the jump"),
            OneStep(
                ground=CLOSE, only="Nesterov", step=2, title="step 2: gradient\nafter the jump"
            ),
        ),
        (Curve(of=_height, ylabel="across"),),
    ),
    heights=(3.5, 3.2, 1.7),
)

STALL = Scene(
    name="stall",
    title="AdaGrad's steps shrink for ever;\nRMSProp's settle at the learning rate",
    objective=Quadratic((1.0, 4.0)),
    start=(-4.0, 2.5),
    steps=600,
    runs=(
        Run(label="AdaGrad", rule=fo.AdaGrad(lr=0.01), colour=VERMILION, width=5.0),
        Run(label="RMSProp", rule=fo.RMSProp(lr=0.01), colour=BLUE),
    ),
    claim=claims.stalled,
    panels=(
        (Map(ground=Ground(extent=(-4.5, 1.5, -1.0, 3.0), levels=(0.05, 40.0))),),
        (
            Curve(
                of=_move,
                ylabel="length of a step",
                log="xy",
                last=350,
                guide=("lr / \u221at", lambda t: 0.01 / np.sqrt(t)),
            ),
        ),
    ),
    heights=(3.6, 2.2),
)

BIAS = Scene(
    name="bias",
    title="Adam's first steps are the learning rate\nonly with bias correction",
    objective=Quadratic((1.0, 4.0)),
    start=(-4.0, 2.5),
    steps=120,
    runs=(
        Run(label="corrected", rule=fo.Adam(lr=0.05), colour=BLUE, width=3.0),
        Run(label="without", rule=fo.Adam(lr=0.05, bias_correction=False), colour=VERMILION),
        Run(
            label="without, b2 = 0.9",
            rule=fo.Adam(lr=0.05, betas=(0.9, 0.9), bias_correction=False),
            colour=GREEN,
        ),
    ),
    claim=claims.corrected,
    panels=(
        (Map(ground=Ground(extent=(-4.5, 1.5, -1.2, 3.0), levels=(0.05, 40.0))),),
        (Curve(of=_in_rates, ylabel="step / lr", last=40),),
    ),
    heights=(3.75, 2.2),
)

DECAY = Scene(
    name="decay",
    title="Decoupled decay shrinks both weights alike;\nL2 under Adam spares the one pulled hard",
    objective=TugOfWar((5.0, 0.01)),
    start=(1.0, 1.0),
    steps=4000,
    runs=(
        Run(label="L2", rule=fo.Adam(lr=0.001, weight_decay=0.5), batch=1, colour=VERMILION),
        Run(label="decoupled", rule=fo.AdamW(lr=0.001, weight_decay=0.5), batch=1, colour=BLUE),
    ),
    claim=claims.alike,
    panels=(
        (
            Map(
                ground=Ground(
                    extent=(-0.1, 1.1, -0.1, 1.1),
                    levels=(0.005, 2.0),
                    objective=Quadratic((1.0, 1.0)),
                ),
                axes=("weight pulled hard", "the other"),
            ),
        ),
    ),
    heights=(5.3,),
    footer="the samples' pulls cancel: the loss is level;\n"
    "circles: lines of equal x\u00b2 + y\u00b2",
)

# The rate of each rule, among 10^(k/4) to two digits, that ends lowest and stays in the picture.
ROSENBROCK_RATES = {
    "sgd": 0.0032,
    "momentum": 0.032,
    "nesterov": 0.001,
    "adagrad": 0.56,
    "rmsprop": 0.01,
    "adam": 0.56,
    "adamw": 0.18,
    "lion": 0.0056,
    "sophia": 0.18,
}
BEALE_RATES = {
    "sgd": 0.032,
    "momentum": 0.032,
    "nesterov": 0.0032,
    "adagrad": 1.0,
    "rmsprop": 0.018,
    "adam": 0.56,
    "adamw": 0.32,
    "lion": 0.1,
    "sophia": 0.032,
}

# By what a rule adapts: nothing per weight, a rate per weight, or more than that.
COLOURS = dict.fromkeys(("sgd", "momentum", "nesterov"), BLUE) | dict.fromkeys(
    ("adagrad", "rmsprop", "adam", "adamw"), VERMILION
)


def of_two_weights(name: str, lr: float) -> fo.Rule:
    """A rule for two weights: its defaults, but Sophia with Hutchinson's estimate, undecayed.

    The other estimate needs labels to draw.
    """
    kind = fo.RULES[name]
    if kind.takes_hessian:
        return fo.Sophia(lr=lr, form="paper", estimator="hutchinson", weight_decay=0.0)
    return kind(lr=lr)


def _everyone(
    name: str,
    title: str,
    objective: Objective,
    start: tuple[float, float],
    steps: int,
    rates: Mapping[str, float],
    ground: Ground,
) -> Scene:
    """The article's rules for two weights, three in a row."""
    refusals = {name: kind().refuses(np.array(start)) for name, kind in fo.RULES.items()}
    no_matrices = [refusal.partition(";")[0] for refusal in refusals.values() if refusal]
    later = [fo.RULES[n].__name__ for n, no in refusals.items() if not no and n not in rates]
    runs = tuple(
        Run(
            label=fo.RULES[rule].__name__,
            rule=of_two_weights(rule, lr),
            colour=COLOURS.get(rule, GREEN),
        )
        for rule, lr in rates.items()
    )
    maps = [Map(ground=ground, only=run.label, bare=True) for run in runs]
    rows = [maps[k : k + 3] for k in range(0, len(maps), 3)]
    return Scene(
        name=name,
        title=title,
        objective=objective,
        start=start,
        steps=steps,
        runs=runs,
        claim=claims.descended,
        panels=rows,
        heights=(1.55,) * len(rows),
        footer="blue: one rate for all weights; red: a rate for each;\n"
        "green: sign or curvature; star: the minimum",
        left_out="; ".join((*no_matrices, f"{', '.join(later)}: no room beside these nine")),
    )


ROSENBROCK = _everyone(
    "rosenbrock",
    "Rosenbrock's bent valley:\nnine rules, their loss after 500 steps",
    Rosenbrock(),
    (-1.2, 1.0),
    500,
    ROSENBROCK_RATES,
    Ground(extent=(-1.75, 1.75, -0.9, 1.9), levels=(0.6, 1200.0)),
)
BEALE = _everyone(
    "beale",
    "Beale's plateau between walls:\nnine rules, their loss after 300 steps",
    Beale(),
    (1.0, 1.5),
    300,
    BEALE_RATES,
    Ground(extent=(-0.4, 4.2, -1.6, 1.8), levels=(0.05, 3000.0)),
)

SCENES = {
    scene.name: scene
    for scene in (BATCHES, VALLEY, NESTEROV, STALL, BIAS, DECAY, ROSENBROCK, BEALE)
}
"""Every scene by name, in the order in which its rules appeared."""
