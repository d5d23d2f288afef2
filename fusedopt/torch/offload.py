"""Optimizers whose states are on the host, for parameters on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from .optimizer import Base, Params

BUCKET = 32 << 20
"""Bytes of parameters that are stepped together while others are on their way."""


class Transfer(Protocol):
    """Copies between a device and the host that go on beside both."""

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return new memory on the host that the device can copy to and from."""

    def down(self, source: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
        """Begin to copy to the host what the device has done so far; return what waits for it."""

    def up(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Begin to copy to the device."""

    def finish(self) -> None:
        """Let all later work on the device see what `up` copies, and the host write it again."""


class CudaTransfer:
    """Copies in side streams of a CUDA device, from and to pinned memory."""

    def __init__(self, device: torch.device) -> None:
        stream: Any = torch.cuda.Stream
        self._down, self._up = stream(device), stream(device)
        self._device = device

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def down(self, source: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._down):
            target.copy_(source, non_blocking=True)
        source.record_stream(self._down)
        event: Any = torch.cuda.Event()
        event.record(self._down)
        wait: Callable[[], None] = event.synchronize
        return wait

    def up(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self._up.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._up):
            target.copy_(source, non_blocking=True)

    def finish(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._up)
        self._up.synchronize()  # the host writes the same buffers in its next step


class CPUOffload(torch.optim.Optimizer):
    """An optimizer of this package for parameters on a GPU, with its states on the host.

    Masters in float32 and all states are in the host's memory. Gradients are copied there as the
    backward pass produces them, and a bucket of parameters is stepped while the others are copied.
    With `clip_norm` all gradients must have come before the first bucket is stepped.

    Parameters
    ----------
    params : iterable
        Tensors or parameter groups, on one device.
    cls : type
        A class of `fusedopt.torch`, such as `AdamW`.
    transfer : Transfer, optional
        How to copy; by default `CudaTransfer`.
    bucket : int, default 32 MiB
        How many bytes of parameters are stepped together.
    **arguments
        Those of `cls`. `master` is of no use here.

    Examples
    --------
    >>> import fusedopt.torch as ft
    >>> opt = ft.CPUOffload(model.parameters(), ft.AdamW, lr=3e-4)  # doctest: +SKIP
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Params,
        cls: Callable[..., Base],
        *,
        transfer: Transfer | None = None,
        bucket: int = BUCKET,
        **arguments: Any,
    ) -> None:
        listed = list(params)
        groups = listed if listed and isinstance(listed[0], Mapping) else [{"params": listed}]
        groups = [{**group, "params": list(group["params"])} for group in groups]
        first = next(p for group in groups for p in group["params"])
        self._transfer: Transfer = transfer or CudaTransfer(first.device)
        self._hosts: dict[torch.Tensor, torch.Tensor] = {}
        host_groups = [
            {**group, "params": [self._host(p) for p in group["params"]]} for group in groups
        ]
        self.host = cls(host_groups, **arguments)
        super().__init__(groups, self.host.defaults)
        self.state = self.host.state  # by the host's parameters
        self._grads: dict[torch.Tensor, torch.Tensor] = {}
        self._outs = {
            p: self._transfer.buffer(p.shape, p.dtype)
            for p, host in self._hosts.items()
            if p.dtype != host.dtype
        }
        self.host._copies = {host: self._outs.get(p) for p, host in self._hosts.items()}
        if not self._outs:
            self.host._copies = {}
        self._arrived: dict[torch.Tensor, tuple[Any, int, Callable[[], None]]] = {}
        for p in self._hosts:
            if p.requires_grad:  # the gradients of others, once thawed, are copied in `step`
                hooked: Any = p
                hooked.register_post_accumulate_grad_hook(self._send)
        self._buckets = self._divided(bucket)

    def _host(self, p: torch.Tensor) -> torch.Tensor:
        """The master of a parameter."""
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        buffer = self._transfer.buffer(p.shape, wide)
        buffer.copy_(p.detach())
        self._hosts[p] = torch.nn.Parameter(buffer)
        return self._hosts[p]

    def _divided(self, size: int) -> list[list[int]]:
        """Numbers of parameters in the order of the backward pass, some bytes together."""
        buckets: list[list[int]] = [[]]
        held = 0
        for k, p in reversed(list(enumerate(self._hosts))):
            if held >= size:
                buckets.append([])
                held = 0
            buckets[-1].append(k)
            held += p.numel() * p.element_size()
        return buckets

    def _send(self, p: torch.Tensor) -> None:
        """Begin to copy a gradient to the host."""
        grad = p.grad
        if grad is None:
            return
        if p not in self._grads or self._grads[p].dtype != grad.dtype:
            self._grads[p] = self._transfer.buffer(p.shape, grad.dtype)
        arrival = self._transfer.down(grad.detach(), self._grads[p])
        self._arrived[p] = (grad, grad._version, arrival)

    def _received(self, p: torch.Tensor) -> torch.Tensor | None:
        """The gradient on the host, as it is on the device now; None where there is none."""
        grad = p.grad
        if grad is None:
            return None
        sent = self._arrived.get(p)
        if sent is None or sent[0] is not grad or sent[1] != grad._version:
            self._send(p)  # another one, or changed since, as by clipping
        self._arrived.pop(p)[2]()
        return self._grads[p]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients of all parameters that have one.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model anew and returns the loss.

        Returns
        -------
        Any
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None or not bool(found_inf):
            scale = getattr(self, "grad_scale", None)
            with torch.no_grad():
                self._step(1.0 if scale is None else float(scale))
        return loss

    def _step(self, scale: float) -> None:
        self._share()
        device = list(self._hosts)
        engine = self.host._bound()
        if self._together:
            if not engine.step(None, scale, list(map(self._received, device))).skipped:
                self._raise(range(len(device)))
        else:
            for number, bucket in enumerate(self._buckets):
                grads = [self._received(device[k]) for k in bucket]
                engine.part(bucket, grads, scale, number == len(self._buckets) - 1)
                self._raise(bucket)
        self._transfer.finish()

    @property
    def _together(self) -> bool:
        """Whether all gradients are needed at once."""
        options = self.host._options
        return options.get("clip_norm") is not None or bool(options.get("skip_nonfinite"))

    def _raise(self, numbers: Sequence[int]) -> None:
        """Begin to copy new parameters to the device."""
        device = list(self._hosts)
        for k in numbers:
            p = device[k]
            if p.grad is not None:
                self._transfer.up(self._outs.get(p, self._hosts[p].detach()), p.detach())

    def _share(self) -> None:
        """Give the host's groups the hyperparameters of these."""
        for group, host in zip(self.param_groups, self.host.param_groups, strict=True):
            host.update({name: value for name, value in group.items() if name != "params"})

    def state_dict(self) -> dict[str, Any]:
        """Return states and hyperparameters as `cls` does, with the masters among the states."""
        self._share()
        found = self.host.state_dict()
        masters = enumerate(self._hosts.values())
        state = {k: {**found["state"].get(k, {}), "master": m.detach()} for k, m in masters}
        return {**found, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`, or from that of `cls` or of torch.optim's namesake.

        Parameters
        ----------
        state_dict : dict
            Without masters in it, these are taken anew from the parameters.
        """
        state = {k: dict(entry) for k, entry in state_dict["state"].items()}
        masters = {k: entry.pop("master", None) for k, entry in state.items()}
        kept = {k: entry for k, entry in state.items() if entry}
        self.host.load_state_dict({**state_dict, "state": kept})
        self.state = self.host.state
        with torch.no_grad():
            for k, (p, host) in enumerate(self._hosts.items()):
                master = masters.get(k)
                host.copy_(p if master is None else master)
        for group, host_group in zip(self.param_groups, self.host.param_groups, strict=True):
            group.update({n: value for n, value in host_group.items() if n != "params"})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: give all parameters at construction; frozen ones may be thawed later."""
        if hasattr(self, "_buckets"):
            raise ValueError(
                "CPUOffload: give all parameters at construction; those with requires_grad=False"
                " are left alone until that is True"
            )
        super().add_param_group(param_group)
