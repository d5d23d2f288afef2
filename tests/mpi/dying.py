"""A rank that dies between two steps; the others write what they get into a file each."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

import fusedopt as fo
from fusedopt.mpi import ShardedOptimizer

comm = MPI.COMM_WORLD
params = {"w": np.zeros((300, 256), np.float32)}
grads = {"w": np.ones_like(params["w"])}
opt = ShardedOptimizer(params, fo.AdamW(), comm, timeout=1.0)
opt.step(grads)
if comm.rank == 1:
    os._exit(0)
start = time.monotonic()
for _ in range(2):
    try:
        opt.step(grads)
    except (TimeoutError, RuntimeError) as error:
        soon = time.monotonic() - start < 20.0
        with Path(f"rank{comm.rank}").open("a") as file:
            file.write(f"{type(error).__name__} {soon}\n")
# The first to leave ends the job; the other one is to have its say before.
other = Path(f"rank{2 - comm.rank}")
while time.monotonic() - start < 20.0:
    if other.exists() and other.read_text().count("\n") == 2:
        break
    time.sleep(0.05)
