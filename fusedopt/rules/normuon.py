"""NorMuon."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..linalg.newton_schulz import Workspace
from ..programs.arithmetic import Array, capped, ratio
from .hyperparameters import Fraction, NonNegative
from .matrix import DeviceAlgebra, Member
from .muon import Muon


@dataclass(frozen=True, kw_only=True)
class NorMuon(Muon):
    """Muon with rows of equal size.

    Parameters
    ----------
    momentum, nesterov, form, ns_steps, ns_coefficients, norm, gram, ns_dtype, split, scale
        As in `Muon`.
    eps, bias_correction
        As in `Muon`.
    beta2 : float
        Decay rate in [0, 1) of the rows' mean squares; default 0.95.
    eps_v : float
        Number >= 0 added to the denominators; default 1e-10.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    With o, the orthogonalised direction of `Muon`::

        v_i := beta2 v_i + (1 - beta2) mean_j(o_ij^2)       n_ij = o_ij / (sqrt(v_i) + eps_v)
        p := p - lr s (||o|| / (||n|| + eps_v)) n

    Rows are those of the flattened parameter, shape[0] of them; the norms are those of each matrix.
    v is in the compute type, whatever the optimizer's `state_dtype`.

    States: m; v, one number for each row.

    References
    ----------
    Li et al. 2025, arXiv 2510.05491, with the scale of the authors' code, which keeps the norm of o
    (https://github.com/zichongli5/NorMuon); the paper's step of a fixed root mean square is that of
    scale="match_rms_adamw" where o is orthogonal.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.zeros((2, 3)), np.array([[1.0, 2, 3], [4, 5, 6]])
    >>> rule = fo.NorMuon(lr=1.0)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(3))
    [[ 0.522 -0.053 -0.628]
     [-0.625 -0.45  -0.275]]
    """

    name = "normuon"
    year = 2025
    examples = (
        {},
        {"nesterov": False, "scale": "match_rms_adamw", "beta2": 0.8},
        {"form": "heavy_ball", "eps_v": 0.0, "norm": "aol"},
    )

    beta2: Fraction = 0.95
    eps_v: NonNegative = 1e-10

    def sides(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"v": shape[:1]}

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
        workspace.orthogonalize(directions, stack, self.iteration, 1.0)
        x, y = workspace.opened(directions, stack)
        factor, spare = self.factor(rows, cols), y.reshape(-1)[:rows]
        for k in range(count):
            leaf, part = divmod(k, self.split)
            member = members[leaf]
            if member is not None:
                own = slice(part * rows, (part + 1) * rows)
                self._normalize(x[k], member.sides["v"][own], spare, factor)
        workspace.closed(directions, x)

    def _normalize(self, o: np.ndarray, v: np.ndarray, spare: np.ndarray, factor: float) -> None:
        """One matrix and its rows' averages, in place; spare: an element for each row."""
        np.einsum("ij,ij->i", o, o, out=spare)
        before = np.sqrt(spare.sum(dtype=np.float64))
        spare *= (1.0 - self.beta2) / o.shape[1]
        v *= self.beta2
        v += spare
        np.sqrt(v, out=spare)
        np.copyto(v, 0.0, where=v < np.finfo(v.dtype).smallest_normal)  # as in all states
        spare += self.eps_v
        np.copyto(spare, np.inf, where=spare == 0)
        o /= spare[:, None]
        np.einsum("ij,ij->i", o, o, out=spare)
        after = np.sqrt(spare.sum(dtype=np.float64)) + self.eps_v
        o *= o.dtype.type(factor * before / after if after else 0.0)

    def scaled_on_device(
        self, phase: int, x: Any, sides: Mapping[str, Any], algebra: DeviceAlgebra
    ) -> tuple[Any, dict[str, Any]]:
        squares, v = (x * x).sum(-1), sides["v"]
        new = self.beta2 * v.reshape(squares.shape)
        new = new + (1.0 - self.beta2) / x.shape[-1] * squares
        root = (new**0.5 + self.eps_v)[:, :, None]
        n = x * (root != 0) / (root + (root == 0))
        after = (n * n).sum(-1).sum(-1, dtype=algebra.wide) ** 0.5 + self.eps_v
        before = squares.sum(-1, dtype=algebra.wide) ** 0.5
        size = self.factor(*x.shape[1:]) * before * (after != 0) / (after + (after == 0))
        return n * algebra.cast(size, n)[:, None, None], {"v": algebra.normal(new).reshape(v.shape)}

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        m, v = states
        u, m = self.textbook_direction(g, m, t)
        stack = count, rows, cols = self.matrices(p.shape)
        if 0 in stack:
            return lr * u, (m, v)
        o = self.through(u, self.polar, 1.0).reshape(*stack)
        squares = (o * o).sum(axis=-1, keepdims=True)
        v = self.beta2 * v.reshape(count, rows, 1) + (1 - self.beta2) * (squares / cols)
        n = ratio(o, np.sqrt(v) + self.eps_v)
        n = capped(n, 1.01 * math.sqrt(cols / (1 - self.beta2)))  # since v holds the mean itself
        after = np.sqrt((n * n).sum(axis=-1, keepdims=True).sum(axis=-2, keepdims=True))
        n = n * ratio(np.sqrt(squares.sum(axis=-2, keepdims=True)), after + self.eps_v)
        return lr * (self.factor(rows, cols) * n).reshape(*p.shape), (m, v.reshape(count * rows))
