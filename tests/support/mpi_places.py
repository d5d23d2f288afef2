"""The places at which a rank is killed, for killed.py and those who read what it writes."""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """A call in which a rank is killed.

    owner: name of a class or module in `fusedopt.mpi`. after: whether the call has returned.
    common: whether parameters and gradients are in memory of all ranks.
    """

    victim: int
    owner: str
    name: str
    after: bool = False
    common: bool = False


PLACES = {
    "between steps": Place(1, "optimizer.ShardedOptimizer", "step"),
    "step, in the first exchange": Place(0, "ranks.Ranks", "gather_arrays"),
    "step, in the reduction": Place(1, "reduction.Reduction", "_begin", after=True),
    "step, before the update": Place(2, "reduction.Reduction", "reduce", after=True),
    "step, before parameters are gathered": Place(
        0, "optimizer.ShardedOptimizer", "_gather_parameters"
    ),
    "step, in common memory": Place(1, "optimizer.Share", "step", common=True),
    "step, after a share in common memory": Place(
        2, "optimizer.Share", "step", after=True, common=True
    ),
    "save, before a file": Place(1, "checkpoint", "write"),
    "save, after a file": Place(2, "checkpoint", "write", after=True),
    "save, before the index": Place(0, "checkpoint", "write_index"),
    "save, after the index": Place(0, "checkpoint", "write_index", after=True),
}
