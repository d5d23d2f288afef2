"""AdaMuon."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..linalg.newton_schulz import Workspace
from ..programs.arithmetic import Array, capped, correction, ratio, textbook_correction
from ..programs.program import Operation
from .hyperparameters import Fraction, NonNegative
from .matrix import DeviceAlgebra, Member
from .muon import Muon


@dataclass(frozen=True, kw_only=True)
class AdaMuon(Muon):
    """Muon with Adam's second moment on the orthogonalised direction.

    Parameters
    ----------
    momentum, nesterov, form, ns_steps, ns_coefficients, norm, gram, ns_dtype, split, scale
        As in `Muon`.
    eps, bias_correction
        As in `Muon`.
    beta2 : float
        Decay rate in [0, 1) of the squares; default 0.999.
    eps_v : float
        Number >= 0 added to the denominators; default 1e-8.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    With o, the orthogonalised direction of `Muon`::

        v := beta2 v + (1 - beta2) o^2         n = o / (sqrt(v / (1 - beta2^t)) + eps_v)
        p := p - lr s sqrt(min(rows, cols)) n / (||n|| + eps_v)

    The norm is that of each matrix. With the default scale, "match_rms_adamw", the step's root mean
    square is 0.2 lr, about that of AdamW's.

    States: m, v.

    References
    ----------
    Si, Zhang, Shen 2025, arXiv 2507.11005, in the form of the authors' code
    (https://github.com/Chongjie-Si/AdaMuon); the paper besides takes the sign of the direction
    before it is orthogonalised, which neither that code nor this does.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.zeros((2, 3)), np.array([[1.0, 2, 3], [4, 5, 6]])
    >>> rule = fo.AdaMuon(lr=1.0)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(3))
    [[ 0.2 -0.2 -0.2]
     [-0.2 -0.2 -0.2]]
    """

    name = "adamuon"
    year = 2025
    examples = (
        {},
        {"nesterov": False, "scale": "original", "beta2": 0.9},
        {"form": "heavy_ball", "eps_v": 1e-6, "norm": "aol"},
    )

    scale: Literal["original", "match_rms_adamw", "spectral", "none"] = "match_rms_adamw"
    beta2: Fraction = 0.999
    eps_v: NonNegative = 1e-8

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "v")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset({"v"})

    def operations(self) -> tuple[Operation, ...]:
        direction, commit = super().operations()
        line = (self.beta2, 1.0 - self.beta2)
        square = Operation("sophia_refresh_square", ("v", "work"), lambda t, lr: line, "other", 1)
        divide = Operation("normalize", ("work", "v"), self._division, "other", 1)
        return (direction, square, divide, commit._replace(phase=2))

    def _division(self, t: int, lr: float) -> tuple[float, ...]:
        return 1.0 / correction(self.beta2, t), self.eps_v

    def between(
        self,
        phase: int,
        works: Sequence[np.ndarray],
        workspace: Workspace,
        members: Sequence[Member | None],
    ) -> None:
        (directions,) = works
        if not directions.size:
            return
        stack = count, rows, cols = self.stack(directions)
        if phase == 0:
            workspace.orthogonalize(directions, stack, self.iteration, 1.0)
            return
        x, _ = workspace.opened(directions, stack)
        size = self.factor(rows, cols) * math.sqrt(min(rows, cols))
        for k in range(count):
            flat = x[k].reshape(-1)
            squares = np.dot(flat, flat)
            norm = math.sqrt(squares) + self.eps_v
            some = norm and (squares or flat.any())  # whose squares may all be too small
            flat *= flat.dtype.type(size / norm if some else 0.0)
        workspace.closed(directions, x)

    def scaled_on_device(
        self, phase: int, x: Any, sides: Mapping[str, Any], algebra: DeviceAlgebra
    ) -> tuple[Any, dict[str, Any]]:
        if phase == 0:
            return x, {}
        size = self.factor(*x.shape[1:]) * math.sqrt(min(x.shape[1:]))
        norm = ((x * x).sum(-1).sum(-1) ** 0.5 + self.eps_v)[:, None, None]
        return size * x / (norm + (norm == 0)) * (norm != 0), {}

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        m, v = states
        u, m = self.textbook_direction(g, m, t)
        o = self.through(u, self.polar, 1.0)
        v = self.beta2 * v + (1 - self.beta2) * (o * o)
        stack = _, rows, cols = self.matrices(p.shape)
        c = textbook_correction(self.beta2, t)
        n = ratio(o, np.sqrt(v / c) + self.eps_v).reshape(*stack)
        n = capped(n, 1.01 * math.sqrt(c / (1 - self.beta2)))  # since v holds o^2 itself
        norm = np.sqrt((n * n).sum(axis=-1, keepdims=True).sum(axis=-2, keepdims=True))
        unit = ratio(n, norm + self.eps_v)
        size = self.factor(rows, cols) * math.sqrt(min(rows, cols)) if 0 not in stack else 0.0
        return lr * (size * unit).reshape(*p.shape), (m, v)
