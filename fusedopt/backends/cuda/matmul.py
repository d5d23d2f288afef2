"""The matrix products of rules for matrices, by the library that the arrays come from."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...arrays.order import shaped
from ...linalg.newton_schulz import Iteration, as_matrix
from ...rules import SOAP, AdaMuon, Muon, NorMuon
from ...rules.matrix import MatrixRule
from .arrays import DeviceArray

LIBRARIES = ("cupy", "torch")


class Library:
    """A library with matrix products for arrays on a device."""

    def __init__(self, preferred: str) -> None:
        """Raises RuntimeError where there is neither CuPy nor PyTorch."""
        from .toolkit import SIMULATED

        self._module: Any = np if SIMULATED else None
        for name in dict.fromkeys((preferred, *LIBRARIES)):
            if self._module is None and name in LIBRARIES:
                with contextlib.suppress(ImportError):
                    self._module = importlib.import_module(name)
        if self._module is None:
            raise RuntimeError(
                "rules for matrices leave their products on the backend 'cuda' to CuPy or PyTorch,"
                " and neither could be imported; install one of them"
            )

    def view(self, a: DeviceArray) -> Any:
        """The library's own array over the memory of one."""
        if self._module is np:
            from .buffers import simulated_view

            return shaped(simulated_view(a.address, a.dtype, a.size), a.shape, a.order)
        if self._module.__name__ == "torch":
            return self._module.as_tensor(a, device=f"cuda:{a.device}")
        return self._module.asarray(a)

    def on_stream(self, stream: int, device: int) -> Any:
        """A context in which the library works on this stream."""
        if self._module is np:
            return np.errstate(all="ignore")
        streams = self._module.cuda
        if self._module.__name__ == "torch":
            # 0 would make PyTorch take a new stream.
            own = streams.ExternalStream if stream else lambda _, d: streams.default_stream(d)
            return streams.stream(own(stream, f"cuda:{device}"))
        return streams.ExternalStream(stream, device) if stream else streams.Stream.null

    def between(
        self, rule: MatrixRule, phase: int, works: Mapping[str, Any], sides: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Do what `Rule.between` does after a phase, for the works of one leaf, in place.

        sides: the leaf's side states. Returns those that are to be written, which are not.
        """
        if isinstance(rule, SOAP):
            return self._soap(rule, phase, works, sides)
        assert isinstance(rule, Muon)
        u = works["work"]
        stack = rule.matrices(tuple(u.shape))
        factor, new = rule.factor(*stack[1:]), {}
        if phase > 0:
            x = u.reshape(stack)
        else:
            x = self._orthogonalized(u.reshape(stack), rule.iteration)
        if isinstance(rule, NorMuon):
            x, new["v"] = self._normalized_rows(rule, x, sides["v"], factor)
        elif not isinstance(rule, AdaMuon):
            x = factor * x
        elif phase > 0:
            size = factor * math.sqrt(min(stack[1:]))
            norm = ((x * x).sum(-1).sum(-1) ** 0.5 + rule.eps_v)[:, None, None]
            x = size * x / (norm + (norm == 0)) * (norm != 0)
        u[...] = x.reshape(u.shape)
        return new

    def _normalized_rows(self, rule: NorMuon, o: Any, v: Any, factor: float) -> tuple[Any, Any]:
        """The direction of NorMuon from orthogonalised matrices, and the new averages of rows."""
        wide = self._module.float64
        squares = (o * o).sum(-1)
        new = rule.beta2 * v.reshape(squares.shape)
        new = self._normal(new + (1.0 - rule.beta2) / o.shape[-1] * squares)
        root = (new**0.5 + rule.eps_v)[:, :, None]
        n = o * (root != 0) / (root + (root == 0))
        after = (n * n).sum(-1).sum(-1, dtype=wide) ** 0.5 + rule.eps_v
        before = squares.sum(-1, dtype=wide) ** 0.5
        size = factor * before * (after != 0) / (after + (after == 0))
        size = size.to(n.dtype) if hasattr(size, "to") else size.astype(n.dtype)
        return n * size[:, None, None], new.reshape(v.shape)

    def _soap(
        self, rule: SOAP, phase: int, works: Mapping[str, Any], sides: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Into the basis and, after the second phase, out of it; the new L and R."""
        new = {}
        for name in ("turned", "work") if phase == 0 else ("work",):
            u = works[name]
            x = u.reshape(as_matrix(tuple(u.shape)))
            if name == "turned":
                for side, y in (("L", x), ("R", x.swapaxes(0, 1))):
                    if side in sides:
                        moment = (1.0 - rule.shampoo_beta) * (y @ y.swapaxes(0, 1))
                        new[side] = self._normal(rule.shampoo_beta * sides[side] + moment)
            left, right = (sides.get(basis) for basis in ("QL", "QR"))
            if left is not None:
                x = (left.swapaxes(0, 1) if phase == 0 else left) @ x
            if right is not None:
                x = x @ (right if phase == 0 else right.swapaxes(0, 1))
            u[...] = x.reshape(u.shape)
        return new

    def _normal(self, x: Any) -> Any:
        """The elements; zero where they are smaller than the smallest normal number."""
        return x * (abs(x) >= float(self._module.finfo(x.dtype).tiny))

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        """The elements of x where a condition holds, and those of y elsewhere."""
        return self._module.where(condition, x, y)

    def _orthogonalized(self, x: Any, iteration: Iteration) -> Any:
        """The iterates of a stack (count, rows, columns)."""
        rows, cols = x.shape[-2:]
        wide = rows <= cols
        y = self._normalized(x if wide else x.swapaxes(-1, -2), iteration)
        for group in iteration.groups(rows, cols):
            gram = y @ y.swapaxes(-1, -2)
            q = self._polynomial(group[0], gram)
            if len(group) > 1:
                r = q @ gram @ q
                q = self._polynomial(group[1], 0.5 * (r + r.swapaxes(-1, -2))) @ q
            y = q @ y
        return y if wide else y.swapaxes(-1, -2)

    def _polynomial(self, row: tuple[float, float, float], gram: Any) -> Any:
        a, b, c = row
        result = b * gram + c * (gram @ gram)
        n = gram.shape[-1]
        result.reshape(-1, n * n)[:, :: n + 1] += a
        return result

    def _normalized(self, y: Any, iteration: Iteration) -> Any:
        # By the largest element first, or squares may leave the range.
        largest = abs(y).reshape(y.shape[0], -1).max(-1)
        largest = getattr(largest, "values", largest)[:, None, None]
        largest = largest + (largest == 0)
        y = y / largest
        if iteration.norm == "frobenius":
            squares = (y * y).reshape(y.shape[0], -1).sum(-1)[:, None, None]
        else:
            squares = abs(y @ y.swapaxes(-1, -2)).sum(-1)[:, :, None]
        norm = iteration.coefficients.prescale * squares**0.5 + iteration.eps / largest
        return y / (norm + (squares == 0))
