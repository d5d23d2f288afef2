"""FSDP2 and ZeroRedundancyOptimizer over two processes with gloo."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("torch")

WORKER = """
import os, sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))

def batch(step, rank):
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(10 * step + rank))

def train(net, opt, rank, steps, first=0):
    for step in range(first, first + steps):
        opt.zero_grad()
        (net(batch(step, rank)) ** 2).mean().backward()
        opt.step()

def main(rank, path):
    import fusedopt.torch as ft
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    MODE
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(main, args=(sys.argv[1],), nprocs=2)
"""

FSDP2 = """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    import copy
    mesh = init_device_mesh("cpu", (2,))
    nets = []
    for module in (ft, torch.optim):
        net = fully_shard(model(), mesh=mesh)
        opt = module.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
        train(net, opt, rank, 10)
        if module is ft:
            half = copy.deepcopy(opt.state_dict())
            again = fully_shard(model(), mesh=mesh)
            with torch.no_grad():
                for p, q in zip(again.parameters(), net.parameters()):
                    p.copy_(q)
            resumed = ft.AdamW(again.parameters())
            resumed.load_state_dict(half)
            train(again, resumed, rank, 10, 10)
        train(net, opt, rank, 10, 10)
        nets.append([p.to_local().detach().clone() for p in net.parameters()])
    state = resumed.state[next(iter(again.parameters()))]["exp_avg"]
    assert type(state).__name__ == "DTensor", type(state)
    for a, b, p in zip(*nets, again.parameters()):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), (a - b).abs().max()
        assert torch.equal(a, p.to_local())
    try:
        ft.AdamW(net.parameters(), clip_norm=1.0)._bound()
    except ValueError as error:
        assert "clip_grad_norm_" in str(error)
    else:
        raise AssertionError("clip_norm of shards")
"""

ZERO = """
    from torch.distributed.optim import ZeroRedundancyOptimizer
    nets = []
    for module in (ft, torch.optim):
        net = torch.nn.parallel.DistributedDataParallel(model())
        opt = ZeroRedundancyOptimizer(net.parameters(), module.AdamW, lr=0.01, weight_decay=0.1)
        train(net, opt, rank, 10)
        opt.param_groups[0]["lr"] = 0.1
        train(net, opt, rank, 10, 10)
        opt.consolidate_state_dict(0)
        if rank == 0:
            assert len(opt.state_dict()["state"]) == 4
        nets.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*nets):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), (a - b).abs().max()
"""


@pytest.mark.parametrize("mode", [FSDP2, ZERO], ids=["fsdp2", "zero"])
def test_two_processes_train_as_with_torch(mode: str, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER).replace("    MODE\n", mode))
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "meeting")], check=True, timeout=240
    )
