"""Muon's matrix products, by the library that the arrays come from."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import numpy as np

from ...arrays.order import shaped
from ...linalg.newton_schulz import Iteration, Stack
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
                "Muon on the backend 'cuda' leaves its matrix products to CuPy or PyTorch, and"
                " neither could be imported; install one of them"
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

    def orthogonalize(self, u: Any, stack: Stack, iteration: Iteration, factor: float) -> None:
        """Replaces each matrix of an array of any shape, a stack (count, rows, columns) in C order,
        by factor times its iterate."""
        rows, cols = stack[-2:]
        x = u.reshape(stack)
        wide = rows <= cols
        y = self._normalized(x if wide else x.swapaxes(-1, -2), iteration)
        for group in iteration.groups(rows, cols):
            gram = y @ y.swapaxes(-1, -2)
            q = self._polynomial(group[0], gram)
            if len(group) > 1:
                r = q @ gram @ q
                q = self._polynomial(group[1], 0.5 * (r + r.swapaxes(-1, -2))) @ q
            y = q @ y
        y = factor * y
        u[...] = (y if wide else y.swapaxes(-1, -2)).reshape(u.shape)

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
