"""CPUOffload on a GPU: the results of a step on the host, and the time of a step.

    python benchmarks/offload.py             # on a machine with a CUDA device, at most 5 minutes
    python benchmarks/offload.py --rehearse  # small, with copies on the host in place of a device's

A model in bfloat16 is trained with gradient accumulation and a scheduler. Its parameters must have
the bits of AdamW with float32 masters on the host with the same gradients. Then times of a training
step: without an optimizer, with torch's fused AdamW on the device, with torchao's offload where it
is installed, and with CPUOffload, plain, with bfloat16 states, and with the norm clipped.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import fusedopt.torch as ft

try:
    torchao: Any = importlib.import_module("torchao.optim")
except ImportError:
    torchao = None

STEPS = 10


class HostTransfer:
    """Copies at once, from the host to the host."""

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def down(self, source: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
        target.copy_(source)
        return lambda: None

    def up(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)

    def finish(self) -> None:
        pass


def model(width: int, layers: int, device: str) -> Any:
    """Layers with the matrices of a transformer's feed-forward part, in bfloat16."""
    torch.manual_seed(0)
    parts: list[Any] = []
    for _ in range(layers):
        parts += [torch.nn.Linear(width, 4 * width), torch.nn.GELU()]
        parts += [torch.nn.Linear(4 * width, width), torch.nn.LayerNorm(width)]
    return torch.nn.Sequential(*parts).to(device, torch.bfloat16)


def backward(net: Any, step: int) -> None:
    source = torch.Generator().manual_seed(step)
    x = torch.randn(64, net[0].in_features, generator=source).to(net[0].weight)
    (net(x) ** 2).mean().backward()


def check(width: int, layers: int, device: str, chosen: dict[str, Any]) -> None:
    """Raise AssertionError where a run has other bits than one on the host with its gradients."""
    net = model(width, layers, device)
    params = list(net.parameters())
    copies = [torch.nn.Parameter(p.detach().cpu().clone()) for p in params]
    opts: list[Any] = [
        ft.CPUOffload(params, ft.AdamW, lr=1e-3, **chosen),
        ft.AdamW(copies, lr=1e-3, master="float32"),
    ]
    schedules = [torch.optim.lr_scheduler.LinearLR(opt, total_iters=STEPS) for opt in opts]
    for step in range(STEPS):
        net.zero_grad()
        for part in range(2):
            backward(net, 2 * step + part)
        for p, q in zip(params, copies, strict=True):
            q.grad = p.grad.cpu().clone()
        for opt, schedule in zip(opts, schedules, strict=True):
            opt.step()
            schedule.step()
    assert all(torch.equal(p.cpu(), q) for p, q in zip(params, copies, strict=True))


def milliseconds(net: Any, opt: Any, device: str) -> float:
    """The median time of a step with its backward pass."""
    times = []
    for step in range(STEPS + 2):
        start = time.perf_counter()
        net.zero_grad()
        backward(net, step)
        if opt is not None:
            opt.step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:]) * 1e3


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true")
    rehearse = parser.parse_args(given).rehearse
    device = "cpu" if rehearse else "cuda"
    size = (32, 2) if rehearse else (4096, 8)
    chosen: dict[str, Any] = {"transfer": HostTransfer()} if rehearse else {}
    check(*((32, 2) if rehearse else (512, 4)), device, chosen)
    print("bits: those of a step on the host")
    ways: dict[str, Callable[[Any], Any]] = {
        "no optimizer": lambda params: None,
        "torch, fused, on the device": lambda params: torch.optim.AdamW(params, fused=True),
        "fusedopt, offloaded": lambda params: ft.CPUOffload(params, ft.AdamW, **chosen),
        "fusedopt, offloaded, bfloat16 states": lambda params: ft.CPUOffload(
            params, ft.AdamW, state_dtype="bfloat16", **chosen
        ),
        "fusedopt, offloaded, clipped": lambda params: ft.CPUOffload(
            params, ft.AdamW, clip_norm=1.0, **chosen
        ),
    }
    if torchao is not None and not rehearse:
        ways["torchao, offloaded"] = lambda params: torchao.CPUOffloadOptimizer(
            params, torch.optim.AdamW, fused=True
        )
    for label, make in ways.items():
        net = model(*size, device)
        print(f"{label}: {milliseconds(net, make(list(net.parameters())), device):.1f} ms")


if __name__ == "__main__":
    main()
