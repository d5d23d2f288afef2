"""The rules' element functions on a CUDA device, compiled by Numba; the bits are the CPU's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...arrays.formats import compute_dtype
from ...plan.interface import Plan
from ...plan.spec import PlanSpec


class CudaBackend:
    """Kernels on arrays of CuPy, PyTorch and Numba, where they lie."""

    name = "cuda"
    textbook = False
    takes_means = False
    update_alone = None

    def unavailable(self) -> str | None:
        try:
            from . import toolkit  # 0.7 s of import, for those who ask
        except ImportError as error:
            return (
                f"numba-cuda could not be imported ({error}); pip install 'fusedopt[cuda]' adds it"
            )
        return toolkit.unavailable()

    def describe(self) -> str:
        from . import toolkit

        return toolkit.describe()

    @property
    def device(self) -> Any:
        """The `Device` that checks and makes arrays."""
        from . import device

        return device

    def plan(self, spec: PlanSpec) -> Plan:
        from ...jit.diagnostics import check_element
        from .plan import CudaPlan

        programs = [spec.extras.program(group.rule) for group in spec.groups]
        for k, group in enumerate(spec.group_of):
            dtype = compute_dtype(spec.leaves[k].parameter.format.dtype)
            for op in programs[group].operations:
                if op.kernel is None and op.element is not None:
                    own = len(op.scalars(1, 0.1))
                    check_element(op.element, dtype, len(op.operands) - 2, own)
        return CudaPlan(spec, programs)

    def sums_of_squares(self, arrays: Sequence[Any]) -> Sequence[tuple[float, float]] | None:
        from .arrays import DeviceArray
        from .launching import sums_of_squares

        if not arrays or not all(isinstance(a, DeviceArray) for a in arrays):
            return None
        return sums_of_squares(arrays)
