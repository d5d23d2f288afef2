"""A rank that is killed within a step or a save; the others write what they get into a file each.

`mpiexec -n 3 python guarded.py killed.py PLACE`, of mpi_places.py. All make a digest of each step.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import fusedopt as fo
from fusedopt.mpi import ShardedOptimizer, shared_arrays
from mpi_places import PLACES, Place

TIMEOUT, SOON = 2.0, 30.0


def kill_at(place: Place) -> None:
    """Let the next call of a function be this process's last."""
    module, _, cls = place.owner.partition(".")
    owner: Any = importlib.import_module(f"fusedopt.mpi.{module}")
    owner = getattr(owner, cls) if cls else owner
    function = getattr(owner, place.name)

    @wraps(function)
    def last(*arguments: Any, **keywords: Any) -> Any:
        if place.after:
            function(*arguments, **keywords)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, place.name, last)


def main() -> None:
    comm, name = MPI.COMM_WORLD, sys.argv[1]
    place = PLACES[name]
    params = {"w": np.zeros((700, 256), np.float32)}
    grads = {"w": np.full_like(params["w"], 1.0 + comm.rank)}
    if place.common:
        params, grads = shared_arrays(params, comm), shared_arrays(grads, comm, each=True)
    opt = ShardedOptimizer(params, fo.AdamW(), comm, timeout=TIMEOUT)
    for step in range(2):
        if step == 1 and not name.startswith("save"):
            break
        opt.step(grads)
        digest = opt.fingerprint()
        if comm.rank == 0:
            Path(f"digest{step + 1}").write_text(digest)
        if step == 0:
            opt.save("kept")
    comm.Barrier()
    if comm.rank == place.victim:
        kill_at(place)
    start = time.monotonic()
    for _ in range(2):
        try:
            if name.startswith("save"):
                opt.save("kept")
            else:
                opt.step(grads)
        except (TimeoutError, RuntimeError) as error:
            soon = time.monotonic() - start < SOON
            with Path(f"rank{comm.rank}").open("a") as file:
                file.write(f"{type(error).__name__} {soon}\n")
    # The first to leave ends the job; the other one is to have its say before.
    other = Path(f"rank{3 - place.victim - comm.rank}")
    while time.monotonic() - start < SOON:
        if other.exists() and other.read_text().count("\n") == 2:
            break
        time.sleep(0.05)


if __name__ == "__main__":
    main()
