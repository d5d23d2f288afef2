"""Tensors as the arrays that a step takes, and arrays as tensors over the same memory."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from ..arrays.foreign import host_array
from ..arrays.rows import Rows

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""The types whose memory can be read without asking further."""


class Leaf:
    """A parameter's memory as an array that is updated in place, and its gradients alike.

    A complex tensor is an array of pairs of reals, a DTensor that of its local shard, and one with
    its axes in another order in memory (`torch.channels_last`) is permuted. A tensor with gaps, or
    a permuted one that a rule treats as a matrix, is copied before and after each step.

    Parameters
    ----------
    param : torch.Tensor
        On the CPU.
    matrix : bool
        Whether the rule sees a matrix, so that the axes must stay as they are.

    Raises
    ------
    TypeError, ValueError
        If the tensor cannot be updated, with the reason and what to do.
    """

    def __init__(self, param: torch.Tensor, matrix: bool) -> None:
        self.param = param
        self.sharded = is_sharded(param)
        local = _local(param).detach()
        if local.device.type != "cpu":
            remedy = (
                "make them with module.to_empty(device='cpu'), then the optimizer"
                if local.device.type == "meta"
                else "use fusedopt.torch.CPUOffload, or give the tensors to fusedopt.Optimizer"
            )
            raise ValueError(
                f"fusedopt.torch: expected parameters on the CPU, got one on {local.device};"
                f" {remedy}"
            )
        if local.layout != torch.strided:
            raise TypeError(f"fusedopt.torch: expected a dense parameter, got {local.layout}")
        if matrix and (param.is_complex() or self.sharded):
            kind = "complex" if param.is_complex() else "sharded"
            raise ValueError(
                f"fusedopt.torch: this rule needs a whole real matrix, got a {kind} parameter of"
                f" shape {tuple(param.shape)}; give it AdamW"
            )
        self.complex = local.is_complex()
        view = _real(local)
        axes = _axes(view)
        own = tuple(range(view.ndim))
        bits = local.is_conj() or local.is_neg()
        self.staged = bits or axes is None or (matrix and axes != own)
        self.axes = None if self.staged or axes == own else axes
        if self.staged:
            view = view.clone(memory_format=torch.contiguous_format)
        self.array: np.ndarray = host_array(view if self.axes is None else view.permute(self.axes))
        plain = type(param) in PLAIN and not self.complex
        self.plain = plain and self.axes is None and not self.staged

    @property
    def local(self) -> torch.Tensor:
        """The tensor in whose memory the parameter is."""
        return _local(self.param)

    def gradient(self, grad: torch.Tensor | None) -> Any:
        """The gradient as the step takes it: an array, `Rows`, or None."""
        if grad is None:
            return None
        grad = _local(grad)
        if grad.layout == torch.sparse_coo and self.axes is None and grad.sparse_dim() == 1:
            grad = grad.detach().coalesce()
            return Rows(grad.indices()[0].numpy(), host_array(_real(grad.values())))
        if grad.layout != torch.strided:
            grad = grad.to_dense()
        view = _real(grad.detach())
        return host_array(view if self.axes is None else view.permute(self.axes))

    def read(self) -> None:
        """Copy the parameter in, if it is staged."""
        if self.staged:
            np.copyto(self.array, host_array(_real(_local(self.param).detach())))

    def write(self) -> None:
        """Copy the new parameter out, if it is staged."""
        if self.staged:
            self.local.detach().copy_(self._outward(self.array))

    def state(self, array: np.ndarray) -> torch.Tensor:
        """A state of the parameter's shape as a tensor like the parameter."""
        tensor = self._outward(array)
        if not self.sharded:
            return tensor
        return _distributed(self.param, tensor)

    def array_of(self, tensor: torch.Tensor) -> np.ndarray:
        """The inverse of `state`, of any tensor of the parameter's shape."""
        view = _real(_local(tensor).detach())
        array: np.ndarray = host_array(view if self.axes is None else view.permute(self.axes))
        return array

    def _outward(self, array: np.ndarray) -> torch.Tensor:
        tensor = tensor_of(array)
        if self.axes is not None:
            tensor = tensor.permute(tuple(np.argsort(self.axes)))
        return torch.view_as_complex(tensor) if self.complex else tensor


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """A tensor over an array's memory."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    # torch stores no uint16 in a pickle.
    return torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether this is a DTensor."""
    return hasattr(tensor, "_local_tensor") and hasattr(tensor, "placements")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    local: torch.Tensor = sharded.to_local()
    arrived: torch.Tensor = getattr(local, "wait", lambda: local)()  # for a collective under way
    return arrived


def _distributed(param: Any, local: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """Real numbers as they are, complex ones as pairs; no bit that says to conjugate or negate."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg()


def _axes(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The order of axes in which the tensor is dense in C or Fortran order; None if in none."""
    own = tuple(range(tensor.ndim))
    if tensor.is_contiguous() or tensor.permute(own[::-1]).is_contiguous():
        return own
    order = tuple(sorted(own, key=tensor.stride, reverse=True))
    return order if tensor.permute(order).is_contiguous() else None
