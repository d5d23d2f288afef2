"""Muon."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..newton_schulz import Workspace, as_matrix
from .base import (
    REQUIRED,
    Array,
    Convention,
    DecayForm,
    Operation,
    Rule,
    correction,
    textbook_correction,
)
from .fields import Count, Fraction, LearningRate, NonNegative, Quintic

_SCALES = {"scale": {"original": "original", "match_rms_adamw": "match_rms_adamw"}}


@dataclass(frozen=True, kw_only=True)
class Muon(Rule):
    """Momentum, orthogonalised, for matrices. State: m.

        "ema"         m := mu m + (1 - mu) g    u = (1 - mu) g + mu m with `nesterov`, else m
        "heavy_ball"  m := mu m + g             u = g + mu m with `nesterov`, else m
        o = NewtonSchulz(u / (||u|| + eps)),    p := p - lr s o

    Newton-Schulz: `ns_steps` times x := a x + (b A + c A^2) x with A = x x^T, (a, b, c) the
    `ns_coefficients`. Parameters of more than two dimensions are flattened to
    (shape[0], the rest). s by `scale`: "original" sqrt(max(1, rows/cols)), "match_rms_adamw"
    0.2 sqrt(max(rows, cols)), "spectral" sqrt(rows/cols), "none" 1. Rows are outputs; in optax's
    own layout they are the columns, unless its `MuonDimensionNumbers` says otherwise.
    `bias_correction` (optax) divides g by 1 - mu^t and m by 1 - mu^(t+1) in u. eps only guards a
    zero gradient. Vectors are refused: send them to AdamW by a pattern.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.

    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.zeros((2, 3)), np.array([[1.0, 2, 3], [4, 5, 6]])
    >>> rule = fo.Muon(lr=1.0)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(3))
    [[ 0.568 -0.058 -0.684]
     [-0.563 -0.406 -0.248]]
    """

    name = "muon"
    conventions = {
        "torch": Convention(
            {
                "lr": 1e-3,
                "weight_decay": 0.1,
                "momentum": 0.95,
                "nesterov": True,
                "ns_coefficients": (3.4445, -4.7750, 2.0315),
                "eps": 1e-7,
                "ns_steps": 5,
                "scale": "original",
            },
            {"decay": "decoupled_first"},
            _SCALES,
        ),
        "optax": Convention(
            {
                "lr": REQUIRED,
                "momentum": 0.95,
                "nesterov": True,
                "ns_coefficients": (3.4445, -4.7750, 2.0315),
                "ns_steps": 5,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "scale": "original",
            },
            {"bias_correction": True},
            _SCALES,
        ),
        "keras": Convention(
            {
                "lr": 1e-3,
                "momentum": 0.95,
                "nesterov": True,
                "ns_coefficients": (3.4445, -4.7750, 2.0315),
                "ns_steps": 5,
                "weight_decay": 4e-3,
                "scale": "match_rms_adamw",
            },
            {"form": "heavy_ball", "eps": 1e-7},
            {"scale": {"match_rms_adamw": "match_rms_adamw", "none": "none"}},
        ),
    }
    examples = (
        {},
        {"nesterov": False, "scale": "match_rms_adamw"},
        {"form": "heavy_ball", "scale": "spectral", "ns_steps": 3},
        {"bias_correction": True, "scale": "none"},
        {"bias_correction": True, "nesterov": False},
    )

    lr: LearningRate = 2e-2
    momentum: Fraction = 0.95
    nesterov: bool = True
    form: Literal["ema", "heavy_ball"] = "ema"
    ns_steps: Count = 5
    ns_coefficients: Quintic = (3.4445, -4.7750, 2.0315)
    scale: Literal["original", "match_rms_adamw", "spectral", "none"] = "original"
    eps: NonNegative = 1e-30
    bias_correction: bool = False
    weight_decay: NonNegative = 0.0
    decay: DecayForm = "decoupled"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias_correction and self.form != "ema":
            raise ValueError(
                f"Muon(bias_correction): only the form 'ema' has a bias; got {self.form!r}"
            )

    @property
    def states(self) -> tuple[str, ...]:
        return ("m",)

    def refuses(self, p: np.ndarray) -> str | None:
        if p.ndim >= 2:
            return None
        return (
            f"Muon updates arrays of two dimensions or more, got shape {p.shape}; send it to AdamW"
            " by a pattern: {'<this path>': fo.AdamW(), '*': fo.Muon()}"
        )

    def operations(self) -> tuple[Operation, ...]:
        direction = Operation(
            "nesterov" if self.nesterov else "momentum",
            ("p", "g", "m", "work"),
            self._direction,
            loop="peek",
        )
        commit = Operation("muon", ("p", "g", "m", "work"), self._commit, phase=1)
        return (direction, commit)

    @property
    def _gain(self) -> float:
        return 1.0 - self.momentum if self.form == "ema" else 1.0

    def _direction(self, t: int, lr: float) -> tuple[float, ...]:
        mu, a = self.momentum, self._gain
        # Of a positive factor on the whole direction nothing is left after the normalisation.
        c_g = c_m = 1.0
        if self.bias_correction:
            c_g, c_m = correction(mu, t), correction(mu, t + 1)
        return (mu, a, a / c_g, mu / c_m) if self.nesterov else (mu, a, 1.0 / c_g)

    def _commit(self, t: int, lr: float) -> tuple[float, ...]:
        return self.momentum, self._gain, lr

    def factor(self, rows: int, cols: int) -> float:
        """s, by which the orthogonalised direction is multiplied."""
        if self.scale == "original":
            return math.sqrt(max(1.0, rows / cols))
        if self.scale == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, cols))
        return math.sqrt(rows / cols) if self.scale == "spectral" else 1.0

    def between(self, direction: np.ndarray, space: Workspace) -> None:
        if direction.size == 0:
            return
        factor = self.factor(*as_matrix(direction.shape))
        coefficients = [self.ns_coefficients] * self.ns_steps
        space.orthogonalize(direction, coefficients, self.eps, factor)

    def orthogonalized(self, u: np.ndarray) -> np.ndarray:
        """s o of a direction, in its shape, in plain NumPy; `between` is the fast form."""
        if u.size == 0:
            return u.copy()
        matrix = u.reshape(as_matrix(u.shape))
        wide = matrix.shape[0] <= matrix.shape[1]
        x = matrix if wide else matrix.T
        x = x / (np.sqrt(np.sum(x * x)) + self.eps)
        a, b, c = self.ns_coefficients
        for _ in range(self.ns_steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        o: np.ndarray = self.factor(*matrix.shape) * (x if wide else x.T)
        return o.reshape(u.shape)

    @property
    def amplification(self) -> float:
        """The slope of the Newton-Schulz map at zero: by so much it amplifies rounding."""
        return abs(self.ns_coefficients[0]) ** self.ns_steps

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        (m,) = states
        mu = self.momentum
        gained = (1 - mu) * g if self.form == "ema" else g
        m = mu * m + gained
        c_g = c_m = 1.0
        if self.bias_correction:
            c_g, c_m = textbook_correction(mu, t), textbook_correction(mu, t + 1)
        u = gained / c_g + mu * m / c_m if self.nesterov else m / c_g
        if isinstance(u, np.ndarray):
            return lr * self.orthogonalized(u), (m,)
        return lr * u.through(self.orthogonalized, self.amplification), (m,)
