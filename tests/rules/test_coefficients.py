"""The sets of Newton-Schulz coefficients: published lists, ranges, slopes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fusedopt.linalg.coefficients import (
    CUSHION,
    KELLER,
    NAMES,
    SAFETY,
    coefficient_set,
    polar_express,
)

# arXiv 2505.16932; from the eighth on (15/8, -10/8, 3/8).
PUBLISHED = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]

# https://github.com/KellerJordan/modded-nanogpt: five steps, cushion and safety 0.02.
SAFE = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def test_polar_express_is_the_published_one() -> None:
    np.testing.assert_allclose(polar_express(8, cushion=CUSHION), PUBLISHED, rtol=0, atol=1e-8)
    np.testing.assert_allclose(polar_express(8, cushion=CUSHION)[:6], PUBLISHED[:6], rtol=1e-13)
    np.testing.assert_allclose(polar_express(11)[-1], PUBLISHED[-1], rtol=1e-12)


def test_polar_express_with_a_safety_factor_is_the_published_one() -> None:
    np.testing.assert_allclose(polar_express(5, cushion=0.02, safety=1.02), SAFE, rtol=1e-13)


def test_each_polar_express_polynomial_is_the_best() -> None:
    low, high = 1e-3, 1.0
    for a, b, c in polar_express(6):
        s = np.linspace(low, high, 20001)
        error = a * s + b * s**3 + c * s**5 - 1
        # Equioscillation: four times the largest error, with alternating signs.
        largest = np.abs(error).max()
        lobes = np.split(error, np.flatnonzero(np.diff(np.sign(error))) + 1)
        extremes = [float(lobe[np.abs(lobe).argmax()]) for lobe in lobes]
        np.testing.assert_allclose(extremes, largest * np.array([-1, 1, -1, 1]), rtol=1e-4)
        low, high = 1 - largest, 1 + largest


# (set, steps): slope at zero, and what becomes of s in [least, 1] for least 1e-3 and 1e-2.
FACTS: dict[tuple[str, int], tuple[float, tuple[float, float], tuple[float, float]]] = {
    ("keller", 5): (485, (0.471, 1.202), (0.682, 1.134)),
    ("you", 5): (493, (0.475, 1.145), (0.978, 1.032)),
    ("you", 4): (120.6, (0.120, 1.145), (0.973, 1.145)),
    ("cans", 5): (1049 / 1.01, (0.881, 1.120), (0.884, 1.120)),
    ("polar_express", 5): (976 / SAFETY, (0.840, 1.124), (0.870, 1.124)),
    ("polar_express", 8): (6363 / SAFETY, (1.0, 1.0), (1.0, 1.0)),
}


@pytest.mark.parametrize(("name", "steps"), FACTS)
def test_ranges_and_slopes(name: str, steps: int) -> None:
    slope, *ranges = FACTS[name, steps]
    found = coefficient_set(name, steps)
    assert found.slope_at_zero == pytest.approx(slope, rel=1e-3)
    for least, expected in zip((1e-3, 1e-2), ranges, strict=True):
        values = found(np.linspace(least, 1.0, 100_001))
        assert (values.min(), values.max()) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("name", NAMES)
def test_no_set_flips_a_sign_or_is_steeper_than_at_zero(name: str) -> None:
    found = coefficient_set(name, 5)
    assert found.amplification == pytest.approx(found.slope_at_zero)
    for steps in range(1, 6):
        found = coefficient_set(name, steps)
        assert len(found.rows) == steps
        assert (found(np.linspace(1e-9, 1.0, 10_001)) > 0).all()
        singles = set(range(steps)) - {j for k in found.pairs for j in (k, k + 1)}
        assert len(singles) + 2 * len(found.pairs) == steps  # none is in two pairs


def test_without_its_prescale_cans_is_steep_at_one() -> None:
    rows = coefficient_set("cans", 5).rows
    assert coefficient_set(rows, 5).amplification == pytest.approx(48758, rel=1e-3)


def test_of_a_table_the_last_rows_are_taken() -> None:
    assert coefficient_set("you", 3).rows == coefficient_set("you", 5).rows[2:]
    assert coefficient_set("cans", 2).pairs == (0,)
    assert coefficient_set("you", 4).pairs == (2,)
    assert coefficient_set("polar_express", 3).rows == coefficient_set("polar_express", 9).rows[:3]


def test_triples() -> None:
    assert coefficient_set("keller", 2).rows == coefficient_set(KELLER, 2).rows == (KELLER,) * 2
    classic = (1.875, -1.25, 0.375)
    assert coefficient_set((KELLER, classic), 2).rows == (KELLER, classic)


@pytest.mark.parametrize(
    ("choice", "steps", "message"),
    [
        ("kellar", 5, "here: expected one of 'keller', 'polar_express', 'you', 'cans', or triples"),
        ("you", 6, "here: 'you' has 5 steps, and 6 were asked for; 'polar_express' has any number"),
        ("keller", 10**400, "here: expected at most 1000 steps, got 1000"),
        ((KELLER,), 2, "here: 1 triples for 2 steps; give one for each"),
    ],
)
def test_refusals(choice: Any, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        coefficient_set(choice, steps, "here")
