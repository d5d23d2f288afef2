"""The polynomials by which Newton-Schulz iterations move singular values towards 1."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Row = tuple[float, float, float]
"""(a, b, c) of one iteration s := a s + b s^3 + c s^5."""


@dataclass(frozen=True)
class Coefficients:
    """The map of a singular value s in [0, 1] of a matrix that was divided by its norm.

    rows: of the iterations, the first first. prescale: the norm is multiplied by it before the
    division, where values close to 1 have to be kept clear of. pairs: the iterations that may be
    made together with their successor on the Gram matrix (`newton_schulz` says how); those of the
    sets below are the ones with which the error stays within twice that of single iterations.
    """

    rows: tuple[Row, ...]
    prescale: float
    pairs: tuple[int, ...]

    def __call__(self, s: np.ndarray) -> np.ndarray:
        """Map singular values."""
        s = s / self.prescale
        for a, b, c in self.rows:
            s = s * (a + s * s * (b + s * s * c))
        return s

    def reach(self, rounding: float) -> float:
        """Return how large a value may become where rounding adds so much, relatively, to each."""
        highest = 1 / self.prescale
        with np.errstate(all="ignore"):
            for a, b, c in self.rows:
                s = np.linspace(0.0, 1.0, 1 << 12) * (highest * (1 + rounding))
                highest = float(np.abs(s * (a + s * s * (b + s * s * c))).max())
        return highest

    @property
    def slope_at_zero(self) -> float:
        """Factor by which the smallest singular values grow."""
        return math.prod(a for a, _, _ in self.rows) / self.prescale

    @functools.cached_property
    def amplification(self) -> float:
        """The largest slope anywhere, by which rounding grows; in all sets below that at zero."""
        s = np.linspace(0.0, 1.0, 1 << 14) / self.prescale
        slope = np.full_like(s, 1 / self.prescale)
        for a, b, c in self.rows:
            square = s * s
            slope *= a + square * (3 * b + square * 5 * c)
            s = s * (a + square * (b + square * c))
        return float(np.abs(slope).max())


MOST = 1000
"""Iterations; ten are many."""


def coefficient_set(
    choice: str | Row | Sequence[Row], steps: int, where: str = "coefficients"
) -> Coefficients:
    """A set by its name, one triple for all iterations, or a triple for each.

    steps: how many iterations. Named sets, and what values s >= 0.01 (s >= 0.001) become:

        "keller"         one triple, repeated: five steps 0.68..1.14 (0.47..1.21)
        "you"            a table of five: 0.97..1.04 (0.47..1.15)
        "cans"           a table of five: 0.88..1.12 (0.88..1.12)
        "polar_express"  any number: five 0.87..1.13 (0.84..1.13), eight 1 (1)

    Of a table the last rows are taken: fewer steps are for matrices whose singular values are
    large from the start, as the norm "aol" makes them. Raises ValueError, which begins with
    `where`, for an unknown name, for more steps than a table has or than `MOST`, and for a number
    of triples other than `steps`.

    Sources: Keller Jordan, https://kellerjordan.github.io/posts/muon/; You Jiacheng, in
    https://github.com/KellerJordan/modded-nanogpt; CANS, arXiv 2506.10935; Polar Express, arXiv
    2505.16932, algorithm 1.
    """
    if steps > MOST:
        raise ValueError(f"{where}: expected at most {MOST} steps, got {steps}")
    # Pairs, and a single iteration after each, kept within twice the error of single iterations
    # in all of the inputs that the tests list; pair upon pair did not.
    pairs = tuple(range(0, steps - 1, 3))
    if choice == "keller":
        return Coefficients((KELLER,) * steps, 1.0, pairs)
    if choice == "polar_express":
        return Coefficients(_safe_polar_express(steps), SAFETY, pairs)
    if isinstance(choice, str):
        if choice not in TABLES:
            known = ", ".join(map(repr, NAMES))
            raise ValueError(f"{where}: expected one of {known}, or triples, got {choice!r}")
        table = TABLES[choice]
        if steps > len(table.rows):
            raise ValueError(
                f"{where}: {choice!r} has {len(table.rows)} steps, and {steps} were asked for;"
                " 'polar_express' has any number"
            )
        dropped = len(table.rows) - steps
        kept = tuple(k - dropped for k in table.pairs if k >= dropped)
        return Coefficients(table.rows[dropped:], table.prescale, kept)
    rows = choice if isinstance(choice[0], tuple) else (choice,) * steps
    if len(rows) != steps:
        raise ValueError(f"{where}: {len(rows)} triples for {steps} steps; give one for each")
    return Coefficients(tuple(rows), 1.0, pairs)  # type: ignore[arg-type]


KELLER: Row = (3.4445, -4.7750, 2.0315)

TABLES = {
    "you": Coefficients(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        1.0,
        (0, 3),
    ),
    # At 1, where a matrix of rank one has its only singular value, the slope of this set is 48758;
    # from 1 / 1.01 on it is below that at zero, and the range of results is the same. Its results
    # depend on rounding more than others' do, so that it has one pair only.
    "cans": Coefficients(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        1.01,
        (3,),
    ),
}
NAMES = ("keller", "polar_express", *TABLES)

SAFETY = 1.01
CUSHION = 0.02407327424182761
"""Polar Express as published: how far it stays clear of the end of its interval, and the smallest
part of the interval that a polynomial is made for."""

CONVERGED = 8
"""The first Polar Express polynomial, counted from 1, that is the limit of all later ones."""


@functools.cache
def _safe_polar_express(steps: int) -> tuple[Row, ...]:
    rows = polar_express(max(steps, CONVERGED), cushion=CUSHION)
    return tuple(
        _shrunk(row, SAFETY) if k < CONVERGED - 1 else row for k, row in enumerate(rows[:steps])
    )


def polar_express(
    steps: int, *, least: float = 1e-3, cushion: float = 0.0, safety: float = 1.0
) -> list[Row]:
    """The composition of odd quintics that comes nearest to 1 on [least, 1], greedily.

    cushion: a polynomial is made for no less than this part of its interval, however far down the
    interval reaches. safety: all but the last polynomial treat s as s / safety.

    Source: Amsel et al. 2025, arXiv 2505.16932, algorithm 1.
    """
    low, high = least, 1.0
    rows = []
    for k in range(steps):
        row = _best_quintic(max(low, cushion * high), high)
        if low < cushion * high:  # it is centred round 1 on a part only
            row = _scaled(row, 2 / (_value(row, low) + _value(row, high)))
        if k < steps - 1:
            row = _shrunk(row, safety)
        rows.append(row)
        low = _value(row, low)
        high = 2 - low
    return rows


def _best_quintic(low: float, high: float) -> Row:
    """The odd quintic with the smallest largest error |p - 1| on [low, high], by Remez."""
    if low >= (1 - 5e-6) * high:  # its coefficients would be differences of nearly equal numbers
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    inner = (3 * low + high) / 4, (low + 3 * high) / 4
    before = math.inf
    for _ in range(100):
        nodes = np.array([low, *inner, high])
        system = np.stack([nodes, nodes**3, nodes**5, [1, -1, 1, -1]], axis=1)
        a, b, c, error = (float(x) for x in np.linalg.solve(system, np.ones(4)))
        if abs(error - before) < 1e-15:
            break
        before = error
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = (
            math.sqrt((-3 * b - root) / (10 * c)),
            math.sqrt((-3 * b + root) / (10 * c)),
        )
    return a, b, c


def _value(row: Row, s: float) -> float:
    a, b, c = row
    return s * (a + s * s * (b + s * s * c))


def _scaled(row: Row, factor: float) -> Row:
    a, b, c = row
    return factor * a, factor * b, factor * c


def _shrunk(row: Row, safety: float) -> Row:
    a, b, c = row
    return a / safety, b / safety**3, c / safety**5
