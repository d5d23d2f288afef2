"""The matrix products of rules for matrices, by the library that the arrays come from."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import numpy as np

from ...arrays.formats import BFLOAT16
from ...arrays.order import shaped
from ...linalg.newton_schulz import Iteration
from .arrays import DeviceArray

LIBRARIES = ("cupy", "torch")


class Library:
    """A library with matrix products for arrays on a device."""

    def __init__(self, preferred: str, short: bool) -> None:
        """Raise RuntimeError where there is neither CuPy nor PyTorch.

        short: whether products of bfloat16 are wanted, which CuPy does not have.
        """
        from .toolkit import SIMULATED

        libraries = LIBRARIES[1:] if short else LIBRARIES
        self._module: Any = np if SIMULATED else None
        for name in dict.fromkeys((preferred, *libraries)):
            if self._module is None and name in libraries:
                with contextlib.suppress(ImportError):
                    self._module = importlib.import_module(name)
        if self._module is None:
            products = "products of bfloat16" if short else "products"
            raise RuntimeError(
                f"rules for matrices leave their {products} on the backend 'cuda' to"
                f" {' or '.join(libraries)}, which could not be imported; install"
                f" {libraries[-1]}"
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

    @property
    def wide(self) -> Any:
        """The library's float64."""
        return self._module.float64

    def cast(self, x: Any, like: Any) -> Any:
        """The elements of x in the dtype of another array."""
        return self._to(x, like.dtype)

    @staticmethod
    def _to(x: Any, dtype: Any) -> Any:
        return x.to(dtype) if hasattr(x, "to") else x.astype(dtype)

    def normal(self, x: Any) -> Any:
        """The elements; zero where they are smaller than the smallest normal number."""
        return x * (abs(x) >= float(self._module.finfo(x.dtype).tiny))

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        """The elements of x where a condition holds, and those of y elsewhere."""
        return self._module.where(condition, x, y)

    def orthogonalized(self, x: Any, iteration: Iteration) -> Any:
        """The iterates of a stack (count, rows, columns)."""
        rows, cols = x.shape[-2:]
        wide = rows <= cols
        y = self._normalized(x if wide else x.swapaxes(-1, -2), iteration)
        if iteration.products == "bfloat16":
            y = self.cast(self._iterated_short(y, iteration), x)
            return y if wide else y.swapaxes(-1, -2)
        for group in iteration.groups(rows, cols):
            gram = y @ y.swapaxes(-1, -2)
            q = self._polynomial(group[0], gram)
            if len(group) > 1:
                r = q @ gram @ q
                q = self._polynomial(group[1], 0.5 * (r + r.swapaxes(-1, -2))) @ q
            y = q @ y
        return y if wide else y.swapaxes(-1, -2)

    def _iterated_short(self, y: Any, iteration: Iteration) -> Any:
        """The iterates of normalised matrices, by products of bfloat16."""
        y = self._to(y, self._module.float32)
        for a, b, c in iteration.coefficients.rows:
            gram = self._short_product(y, y.swapaxes(-1, -2))
            y = a * y + self._short_product(b * gram + c * self._short_product(gram, gram), y)
        return y

    def _short_product(self, a: Any, b: Any) -> Any:
        """The product of two stacks whose elements are rounded to bfloat16, added in float32."""
        if self._module is np:
            return np.matmul(*(x.astype(BFLOAT16).astype(np.float32) for x in (a, b)))
        torch = self._module
        return torch.bmm(a.to(torch.bfloat16), b.to(torch.bfloat16), out_dtype=torch.float32)

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
