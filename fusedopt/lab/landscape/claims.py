"""Compute what each scene shows, as numbers of its paths.

A claim takes the paths by label, in the order of the scene's runs, and the objective.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

import fusedopt as fo

from .objectives import Array, Objective
from .paths import Path

Paths = Mapping[str, Path]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence with its numbers, and whether they bear it out."""

    text: str
    numbers: dict[str, float]
    holds: bool


def jitter(paths: Paths, objective: Objective) -> Claim:
    """The fewer samples in a batch, the more steps turn, and the wider the path spreads."""
    turns = [_turn(path) for path in paths.values()]
    spreads = [_spread(path, objective) for path in paths.values()]
    ordered = all(np.diff(turns) > 0) and all(np.diff(spreads) > 0)
    return Claim(
        text="from step to step the direction turns by "
        + _listed(f"{turn:.1f} degrees ({label})" for label, turn in zip(paths, turns, strict=True))
        + "; in its second half the path keeps "
        + _listed(f"{spread:.2g}" for spread in spreads)
        + " from the minimum (root mean square)",
        numbers={
            **_named("turn, degrees", paths, turns),
            **_named("spread", paths, spreads),
        },
        holds=ordered and turns[0] < 5 and turns[-1] > 45 and spreads[-1] > 3 * spreads[1],
    )


def damped(paths: Paths, objective: Objective) -> Claim:
    """Momentum crosses the valley less often, on a shorter way, and ends lower."""
    crossings = [_crossings(path.points[:, 1]) for path in paths.values()]
    across = [float(np.abs(path.moves[:, 1]).sum()) for path in paths.values()]
    ends = [float(path.losses[-1]) for path in paths.values()]
    plain, momentum = range(2)
    return Claim(
        text=f"at the same learning rate, {len(next(iter(paths.values())).moves)} steps of plain"
        f" descent cross the floor of the valley {crossings[plain]} times and go"
        f" {across[plain]:.1f} across it, momentum {crossings[momentum]} times and"
        f" {across[momentum]:.1f}; the loss ends at {ends[plain]:.2g} and {ends[momentum]:.2g}",
        numbers={
            **_named("crossings", paths, crossings),
            **_named("way across", paths, across),
            **_named("last loss", paths, ends),
        },
        holds=4 * crossings[momentum] < crossings[plain]
        and 4 * across[momentum] < across[plain]
        and ends[momentum] < ends[plain],
    )


def overshoot(paths: Paths, objective: Objective) -> Claim:
    """Nesterov flies less far past the minimum than Polyak, along the valley and across."""
    past = [_overshoot(path, objective) for path in paths.values()]
    ends = [float(path.losses[-1]) for path in paths.values()]
    (along, across), (along_ahead, across_ahead) = past
    return Claim(
        text=f"Polyak's momentum overshoots the minimum by {across:.2f} across the valley and"
        f" {along:.2f} along it, Nesterov's by {across_ahead:.2f} and {along_ahead:.2f}",
        numbers={
            **_named("overshoot along", paths, [p[0] for p in past]),
            **_named("overshoot across", paths, [p[1] for p in past]),
            **_named("last loss", paths, ends),
        },
        holds=bool(across_ahead < across / 2 and along_ahead < along and ends[1] < ends[0]),
    )


def stalled(paths: Paths, objective: Objective) -> Claim:
    """AdaGrad's steps fall as 1 / sqrt(t); RMSProp's stay near lr while the slope lasts."""
    adagrad, rmsprop = paths.values()
    exponent = _exponent(np.abs(adagrad.moves[:, 0]))
    lr = cast(float, rmsprop.run.rule.lr)
    early = np.abs(rmsprop.moves[20 : int(2.0 / lr), 0]) / lr  # it is not near the minimum yet
    gone = [float(np.abs(path.points[-1] - path.points[0])[0]) for path in paths.values()]
    return Claim(
        text=f"AdaGrad's step falls as t^{exponent:.2f}, RMSProp's stays between"
        f" {early.min():.2f} and {early.max():.2f} of lr; of the"
        f" {abs(adagrad.points[0, 0] - objective.minimum[0]):g} to the minimum AdaGrad has gone"
        f" {gone[0]:.2f} after {len(adagrad.moves)} steps, RMSProp {gone[1]:.2f}",
        numbers={
            "AdaGrad's exponent": exponent,
            "RMSProp's least step / lr": float(early.min()),
            "RMSProp's largest step / lr": float(early.max()),
            **_named("gone", paths, gone),
        },
        holds=abs(exponent + 0.5) < 0.03
        and early.min() > 0.9
        and early.max() < 1.1
        and gone[0] < 0.2 * gone[1],
    )


def corrected(paths: Paths, objective: Objective) -> Claim:
    """Check that Adam's first step is lr with bias correction, else that of eq. (14)-(15)."""
    first = [in_rates(path)[0] for path in paths.values()]
    said = [_first_said(path) for path in paths.values()]
    largest = [float(in_rates(path).max()) for path in paths.values()]
    return Claim(
        text="the first step is "
        + _listed(f"{f:.3f} lr {label}" for label, f in zip(paths, first, strict=True))
        + f"; the largest are {_listed(f'{f:.2f} lr' for f in largest)}",
        numbers={
            **_named("first step / lr", paths, first),
            **_named("first step / lr by the equations", paths, said),
            **_named("largest step / lr", paths, largest),
        },
        holds=bool(np.allclose(first, said, rtol=1e-6))
        and said[0] == 1.0
        and largest[0] < 1.01
        and largest[1] > 5,
    )


def alike(paths: Paths, objective: Objective) -> Claim:
    """Decoupled decay shrinks both weights alike; L2 under Adam hardly the one pulled hard."""
    left = [path.points[-1] / path.points[0] for path in paths.values()]
    decoupled = next(path for path in paths.values() if path.run.rule.decay == "decoupled")
    rule, steps = decoupled.run.rule, len(decoupled.moves)
    said = (1 - cast(float, rule.lr) * rule.weight_decay) ** steps
    (hard_l2, easy_l2), (hard, easy) = left
    return Claim(
        text=f"after {steps} steps of decoupled decay {hard:z.2f} is left of the weight that the"
        f" samples pull hard and {easy:z.2f} of the other, (1 - lr lambda)^{steps} being"
        f" {said:.2f}; of L2 under Adam {hard_l2:z.2f} and {easy_l2:z.2f}",
        numbers={
            **_named("left of the weight pulled hard", paths, [w[0] for w in left]),
            **_named("left of the other", paths, [w[1] for w in left]),
            "(1 - lr lambda)^steps": said,
        },
        holds=bool(
            abs(hard - said) < 0.1
            and abs(easy - said) < 0.1
            and hard_l2 > 0.6
            and abs(easy_l2) < 0.05
        ),
    )


def descended(paths: Paths, objective: Objective) -> Claim:
    """Every rule ends below a tenth of the first loss."""
    ends = {label: float(path.losses[-1]) for label, path in paths.items()}
    path = next(iter(paths.values()))
    first, steps = float(path.losses[0]), len(path.moves)
    near = sorted(ends, key=lambda label: ends[label])
    return Claim(
        text=f"from a loss of {first:.1f}, {steps} steps lead to "
        + _listed(f"{ends[label]:.1g} ({label})" for label in near),
        numbers={"first loss": first, **_named("last loss", paths, list(ends.values()))},
        holds=all(end < first / 10 for end in ends.values()),
    )


def _named(what: str, paths: Paths, values: Any) -> dict[str, float]:
    return {f"{what}, {label}": float(v) for label, v in zip(paths, values, strict=True)}


def _listed(parts: Any) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}"


def _turn(path: Path) -> float:
    """The mean angle between a step and the next, in degrees."""
    directions = path.moves / path.lengths[:, None]
    cosines = (directions[1:] * directions[:-1]).sum(axis=1)
    return float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).mean())


def _spread(path: Path, objective: Objective) -> float:
    away = (path.points - objective.minimum)[len(path.points) // 2 :]
    return float(np.sqrt((away**2).sum(axis=1).mean()))


def _crossings(heights: Array) -> int:
    return int((heights[1:] * heights[:-1] < 0).sum())


def _overshoot(path: Path, objective: Objective) -> Array:
    """Return how far past the minimum each weight gets, seen from the start."""
    away = path.points - objective.minimum
    furthest: Array = np.maximum(-np.sign(away[0]) * away, 0).max(axis=0)
    return furthest


def _exponent(steps: Array) -> float:
    """Return the exponent of t that fits best, by least squares of the logarithms."""
    t = np.arange(1, len(steps) + 1)
    return float(np.polyfit(np.log(t), np.log(steps), 1)[0])


def in_rates(path: Path) -> Array:
    """The larger of both weights' moves, in units of lr, step by step."""
    sizes: Array = np.abs(path.moves).max(axis=1) / cast(float, path.run.rule.lr)
    return sizes


def _first_said(path: Path) -> float:
    rule = cast(fo.Adam, path.run.rule)
    b1, b2 = rule.betas
    return 1.0 if rule.bias_correction else float((1 - b1) / (1 - b2) ** 0.5)
