"""CPUOffload over a transfer layer that copies as late as it may."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import fusedopt.torch as ft  # noqa: E402
from tensors import same_bits  # noqa: E402

STEPS = 20


class LateTransfer:
    """Copies down when they are waited for, and up when all are to be there."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._late: list[Callable[[], Any]] = []

    def buffer(self, shape: Sequence[int], dtype: Any) -> Any:
        return torch.full(tuple(shape), float("nan"), dtype=dtype)

    def down(self, source: Any, target: Any) -> Callable[[], None]:
        self.log.append("down")
        seen = source.clone()  # what the device has done so far

        def wait() -> None:
            self.log.append("wait")
            target.copy_(seen)

        return wait

    def up(self, source: Any, target: Any) -> None:
        self.log.append("up")
        self._late.append(lambda: target.copy_(source))

    def finish(self) -> None:
        for copied in self._late:
            copied()
        self._late.clear()


def model(dtype: Any) -> Any:
    torch.manual_seed(3)
    layers = [torch.nn.Linear(9, 7), torch.nn.Tanh(), torch.nn.Linear(7, 5)]
    return torch.nn.Sequential(*layers).to(dtype)


def backward(net: Any, step: int, factor: float = 1.0) -> None:
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(step)).to(net[0].weight.dtype)
    (factor * (net(x) ** 2).mean()).backward()


def train(net: Any, opt: Any, steps: int = STEPS, first: int = 0) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1.0 / (1 + first + k))
    for step in range(first, first + steps):
        opt.zero_grad()
        backward(net, 2 * step)
        backward(net, 2 * step + 1)  # accumulated
        opt.step()
        schedule.step()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"state_dtype": "bfloat16"},
    {"state_dtype": "dynamic8"},
    {"clip_norm": 0.1},
    {"skip_nonfinite": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bucket", [1, 1 << 20])
def test_an_offloaded_run_has_the_bits_of_one_with_masters(
    options: dict[str, Any], dtype: str, bucket: int
) -> None:
    there, here = (model(getattr(torch, dtype)) for _ in range(2))
    transfer = LateTransfer()
    a = ft.CPUOffload(
        there.parameters(), ft.AdamW, transfer=transfer, bucket=bucket, lr=0.05, **options
    )
    master = "float32" if dtype == "bfloat16" else None
    b = ft.AdamW(here.parameters(), lr=0.05, master=master, **options)
    train(there, a)
    train(here, b)
    assert same_bits(list(there.parameters()), list(here.parameters()))
    first = transfer.log[: transfer.log.index("up")]
    early = bucket == 1 and not {"clip_norm", "skip_nonfinite"} & set(options)
    assert first.count("wait") == (1 if early else 4)  # the first bucket does not wait for others


def test_the_benchmark_can_be_rehearsed(capsys: pytest.CaptureFixture[str]) -> None:
    found = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "offload.py"))
    found["main"](["--rehearse"])
    printed = capsys.readouterr().out
    assert "bits: those of a step on the host" in printed
    assert printed.count(" ms\n") == 5


def test_new_parameters_are_under_way_while_the_next_bucket_is_stepped() -> None:
    net, transfer = model(torch.bfloat16), LateTransfer()
    opt = ft.CPUOffload(net.parameters(), ft.AdamW, transfer=transfer, bucket=1)
    backward(net, 0)
    transfer.log.clear()
    opt.step()
    assert transfer.log == ["wait", "up"] * 4  # and the copies down began in the backward pass


def test_muon_offloads() -> None:
    there, here = (model(torch.float32) for _ in range(2))
    runs = []
    for net in (there, here):
        weights = [p for p in net.parameters() if p.ndim == 2]
        make = ft.CPUOffload if net is there else (lambda params, cls, **_: cls(params))
        opt = make(weights, ft.Muon, transfer=LateTransfer())
        train(net, opt)
        runs.append(weights)
    for p, q in zip(*runs, strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_an_offloaded_run_resumes_with_the_same_bits() -> None:
    whole, half = (model(torch.bfloat16) for _ in range(2))
    make: Any = lambda net: ft.CPUOffload(  # noqa: E731
        net.parameters(), ft.AdamW, transfer=LateTransfer(), lr=0.05, weight_decay=0.1
    )
    train(whole, make(whole))
    opt = make(half)
    train(half, opt, 8)
    parts = copy.deepcopy((half.state_dict(), opt.state_dict()))
    again = model(torch.bfloat16)
    again.load_state_dict(parts[0])
    opt = make(again)
    opt.load_state_dict(parts[1])
    for group in opt.param_groups:
        group["lr"] = group["initial_lr"]
    train(again, opt, STEPS - 8, 8)
    assert same_bits(list(again.parameters()), list(whole.parameters()))


def test_gradients_changed_after_the_backward_pass_are_copied_again() -> None:
    there, here = (model(torch.float32) for _ in range(2))
    a = ft.CPUOffload(there.parameters(), ft.AdamW, transfer=LateTransfer())
    b = ft.AdamW(here.parameters())
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
    for step in range(STEPS):
        for net, opt, scaler in ((there, a, scalers[0]), (here, b, scalers[1])):
            opt.zero_grad()
            backward(net, step, scaler.get_scale())
            scaler.scale(torch.ones(1))
            if step % 2:
                scaler.unscale_(opt)
                torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
            scaler.step(opt)
            scaler.update()
    assert same_bits(list(there.parameters()), list(here.parameters()))


def test_all_parameters_are_given_at_construction() -> None:
    net = model(torch.float32)
    opt = ft.CPUOffload(net[0].parameters(), ft.AdamW, transfer=LateTransfer())
    with pytest.raises(ValueError, match="at construction"):
        opt.add_param_group({"params": list(net[2].parameters())})
