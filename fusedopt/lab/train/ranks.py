"""A training run on several ranks of MPI: each has a part of every batch, and rank 0 speaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpi4py import MPI

SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers tell a process how many there are: without one, mpi4py is not imported."""


class Ranks:
    """The ranks of a run; without a communicator, one that is alone."""

    def __init__(self, comm: MPI.Comm | None) -> None:
        self.comm = comm
        self.rank = 0 if comm is None else comm.Get_rank()
        self.size = 1 if comm is None else comm.Get_size()

    @classmethod
    def of_process(cls) -> Ranks:
        """Return the ranks that mpiexec started; ImportError where mpi4py is missing."""
        if not any(int(os.environ.get(name, "1")) > 1 for name in SIZES):
            return cls(None)
        from mpi4py import MPI

        return cls(MPI.COMM_WORLD)

    def own(self, batch: int) -> slice:
        """Return this rank's windows of a batch; ValueError where the batch cannot be divided."""
        if batch % self.size:
            raise ValueError(f"batch: expected a multiple of the {self.size} ranks, got {batch}")
        count = batch // self.size
        return slice(self.rank * count, (self.rank + 1) * count)

    def mean(self, loss: float) -> float:
        """The mean of the losses of all ranks, the same on each."""
        return loss if self.comm is None else fmean(self.comm.allgather(loss))

    @contextmanager
    def first_alone(self) -> Iterator[bool]:
        """Tell whether this is rank 0; its OSError or ValueError inside is raised on all ranks."""
        error: Exception | None = None
        try:
            yield self.rank == 0
        except (OSError, ValueError) as raised:
            error = raised
        told: Any = error if self.comm is None else self.comm.bcast(error)
        if told is not None:
            raise told


ALONE = Ranks(None)
