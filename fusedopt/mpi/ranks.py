"""The ranks of a communicator: they agree on what happens, and wait no longer than stated."""

from __future__ import annotations

import atexit
import builtins
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..system.interrupts import directly, uninterrupted

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")


class Reports:
    """The reports of the ranks: `mine`, and `all` when every rank has sent its own."""

    mine: Any = None
    all: Sequence[Any] = ()


class Ranks:
    """The processes of a communicator that share one optimizer.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or None
        Communicator, which is duplicated; None for `MPI.COMM_WORLD`.
    timeout : float
        Seconds that one rank waits for the others.
    """

    def __init__(self, comm: MPI.Comm | None, timeout: float) -> None:
        from mpi4py import MPI  # initializes MPI: only for those who share an optimizer

        self.mpi = MPI
        self.comm = (MPI.COMM_WORLD if comm is None else comm).Dup()
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()
        self.timeout = timeout
        self.lost = ""

    @property
    def helped(self) -> bool:
        """Whether another thread than the one that initialized MPI may call it."""
        return bool(self.mpi.Query_thread() >= self.mpi.THREAD_SERIALIZED)

    def run(self, action: Callable[[], T]) -> T:
        """Call an action as a whole or not at all, whatever is raised from outside."""
        return (uninterrupted if self.helped else directly)(action)

    def check(self) -> None:
        """Raise RuntimeError if an earlier exchange was cut off."""
        if self.lost:
            raise RuntimeError(f"this optimizer cannot go on: {self.lost}; load a checkpoint")

    def wait(self, requests: Sequence[Any]) -> None:
        """Wait for requests; TimeoutError if they are not done in time, or cannot be.

        MPI has no time limit of its own: a request whose other side has died may wait for ever.
        """
        if not requests:
            return
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                if self.mpi.Request.Testall(requests):
                    return
            except self.mpi.Exception as error:
                self._lose(f"rank {self.rank} had {error} from MPI instead of an answer of another")
            if time.monotonic() > deadline:
                self._lose(f"rank {self.rank} waited {self.timeout:g} s for another rank")
            os.sched_yield()  # to the other ranks, where they outnumber the processors

    def _lose(self, how: str) -> None:
        if not self.lost:
            # MPI_Finalize would wait for the lost rank too.
            atexit.register(self.comm.Abort, 1)
        self.lost = how
        raise TimeoutError(
            f"{self.lost}, which has died, hangs, or does not call the same methods; parameters and"
            " states may be of no one step: start again from a checkpoint (ShardedOptimizer"
            " (timeout=...) sets the limit)"
        )

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order; for small ones."""
        self.check()
        mine = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = np.zeros(self.size, np.int64)
        self.wait([self.comm.Iallgather(np.array([mine.size], np.int64), sizes)])
        texts = self.gather_arrays(mine, sizes.tolist())
        return [pickle.loads(text.tobytes()) for text in texts]

    def gather_arrays(self, mine: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
        """The flat arrays of all ranks, whose numbers of elements are known to all."""
        whole = np.empty(sum(sizes), mine.dtype)
        starts = np.concatenate(([0], np.cumsum(sizes)[:-1])).astype(np.int64)
        self.share(whole, starts, sizes, mine)
        return [whole[a : a + n] for a, n in zip(starts.tolist(), sizes, strict=True)]

    def share(
        self,
        whole: np.ndarray,
        starts: Any,
        sizes: Sequence[int],
        mine: np.ndarray | None = None,
    ) -> None:
        """Put every rank's part of a flat array into that of all; without `mine` it is there."""
        self.wait(self.begin_share(whole, starts, sizes, mine))

    def begin_share(
        self,
        whole: np.ndarray,
        starts: Any,
        sizes: Sequence[int],
        mine: np.ndarray | None = None,
    ) -> list[Any]:
        """The requests of `share`."""
        holders = [rank for rank, size in enumerate(sizes) if size]
        if not holders or (self.size == 1 and mine is None):
            return []
        if len(holders) == 1 and mine is None:  # a ring would pass it on rank by rank
            return [self.comm.Ibcast(_bytes(whole), root=holders[0])]
        width = whole.itemsize
        counts, places = [n * width for n in sizes], [int(a) * width for a in starts]
        sent = self.mpi.IN_PLACE if mine is None else _bytes(mine)
        received = [_bytes(whole), (counts, places), self.mpi.BYTE]
        return [self.comm.Iallgatherv(sent, received)]

    def share_from_first(self, arrays: Sequence[np.ndarray]) -> None:
        """Copy rank 0's flat arrays to all ranks."""
        if self.size > 1:
            self.wait([self.comm.Ibcast(_bytes(a), root=0) for a in arrays if a.size])

    @contextmanager
    def together(self, *, changing: bool = False) -> Iterator[Reports]:
        """Raise on all ranks what one of them raises inside, naming it.

        The ranks exchange nothing inside. changing: parameters or states change there, so that
        after an error on some ranks and not on others there is no going on.
        """
        self.check()
        error: Exception | None = None
        reports = Reports()
        try:
            yield reports
        except Exception as raised:  # of any kind: the others must not wait for this rank
            error = raised
        told = None if error is None else (type(error).__name__, str(error))
        gathered = self.gather((told, reports.mine))
        failed = [rank for rank, (other, _) in enumerate(gathered) if other is not None]
        if changing and 0 < len(failed) < self.size:
            self.lost = f"rank {failed[0]} failed within a step that others made"
        if error is not None:
            error.add_note(f"on rank {self.rank} of {self.size}")
            raise error
        if failed:
            name, message = gathered[failed[0]][0]
            kind = getattr(builtins, name, RuntimeError)
            raise kind(f"rank {failed[0]} of {self.size}: {message}")
        reports.all = [value for _, value in gathered]


def _bytes(a: np.ndarray) -> np.ndarray:
    """The memory of a dense flat array; MPI knows no bfloat16."""
    return a.view(np.uint8)
