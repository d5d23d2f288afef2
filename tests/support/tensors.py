"""Problems for optimizers of torch: parameters, gradients, and what two runs may differ in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

SHAPES = ((7, 5), (3,), (), (1,), (300,), (2, 3, 4))
MATRICES = ((7, 5), (16, 32), (33, 9))
STEPS = 25

Tensors = list[Any]


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> Tensors:
    """New parameters, the same at every call."""
    source = torch.Generator().manual_seed(5)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return [
        torch.nn.Parameter(torch.randn(shape, generator=source, dtype=wide).to(dtype))
        for shape in shapes
    ]


def gradients(params: Sequence[torch.Tensor], step: int) -> Iterator[torch.Tensor]:
    """The gradients of a step, the same at every call; large, small and zero ones among them."""
    source = torch.Generator().manual_seed(1000 + step)
    for p in params:
        wide = torch.complex128 if p.is_complex() else torch.float64
        g = torch.randn(p.shape, generator=source, dtype=wide)
        scale = torch.rand(p.shape, generator=source, dtype=torch.float64)
        yield (g * 10 ** (4 * scale - 3)).to(p.dtype)


def give(params: Sequence[torch.Tensor], step: int) -> None:
    """Set the gradients of a step."""
    for p, g in zip(params, gradients(params, step), strict=True):
        p.grad = g


def run(
    opt: Any,
    params: Sequence[torch.Tensor],
    steps: int = STEPS,
    first: int = 0,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """So many steps with gradients that are the same for every optimizer."""
    for step in range(first, first + steps):
        give(params, step)
        opt.step()
        after(step)


def in_groups(params: Tensors) -> list[dict[str, Any]]:
    """Two parameter groups with hyperparameters of their own."""
    half = len(params) // 2
    return [{"params": params[:half]}, {"params": params[half:], "weight_decay": 0.05, "lr": 0.02}]


def assert_near(
    ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]
) -> None:
    """Each element of ours is as near to a run in twice the precision as torch's own may be.

    Two runs in one precision part by their roundings: an element may be off by 4 times what
    torch's own run is at most, in the scale of its tensor, and by 16 units of its last place.
    """
    for a, b, c in zip(ours, theirs, exact, strict=True):
        bound = 4 * (b.to(c.dtype) - c).abs().max() + 16 * torch.finfo(a.dtype).eps * c.abs()
        assert ((a.to(c.dtype) - c).abs() <= bound).all()


def same_bits(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    """Whether all elements are equal."""
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def orthogonalized(
    update: torch.Tensor, ns_coefficients: Sequence[float], ns_steps: int, eps: float
) -> torch.Tensor:
    """The iteration of torch's Muon in float64, where its own is in bfloat16."""
    a, b, c = ns_coefficients
    tall = update.shape[0] > update.shape[1]
    x = update.double().T if tall else update.double()
    x = x / x.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: torch.Tensor = (x.T if tall else x).to(update.dtype)
    return found
