"""Memory that the ranks of one host have in common."""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from ..arrays.order import memory_order, shaped
from ..arrays.stored import LINE
from ..arrays.trees import Tree
from .ranks import Ranks
from .shares import flat

if TYPE_CHECKING:
    from mpi4py import MPI

DIRECTORY = Path("/dev/shm")
"""Where Linux has files that are in memory alone."""


class Place(NamedTuple):
    """The place of an array in common memory, which is the same on all ranks.

    token: of the memory. offset: in bytes.
    """

    token: str
    offset: int


class CommonMemory(mmap.mmap):
    """A mapping of memory that all ranks of a communicator have."""

    token: str
    address: int
    group: MPI.Group


_mapped: WeakValueDictionary[str, CommonMemory] = WeakValueDictionary()
"""The memory of which this process has arrays."""


def shared_arrays(
    arrays: Any, comm: MPI.Comm | None = None, *, each: bool = False, timeout: float = 300.0
) -> Any:
    """Copy arrays into memory that the ranks of one host have in common.

    A `ShardedOptimizer` of the same ranks then copies nothing: parameters are there once for all
    ranks, and each rank reads the others' gradients where these are.

    Parameters
    ----------
    arrays : array or nested dicts, lists and tuples of arrays
        Dense arrays of equal shapes on all ranks.
    comm : mpi4py.MPI.Comm, optional
        Communicator, `MPI.COMM_WORLD` by default, whose ranks all call this.
    each : bool, optional
        With False, the arrays are the same memory on all ranks, with rank 0's values: for
        parameters. With True, every rank gets arrays of its own, which the others may read: for
        gradients.
    timeout : float, optional
        Seconds that a rank waits for the others.

    Returns
    -------
    nested arrays
        Arrays like those given. Their memory is freed with the last of them.

    Raises
    ------
    MemoryError
        If the ranks are on several hosts, or /dev/shm has no room; on all ranks.

    Examples
    --------
    >>> params = fusedopt.mpi.shared_arrays(params)                # doctest: +SKIP
    >>> grads = fusedopt.mpi.shared_arrays(params, each=True)      # doctest: +SKIP
    """
    ranks = Ranks(comm, timeout)
    with ranks.together():
        tree = Tree(arrays)
        given = [np.asarray(leaf.value) for leaf in tree.leaves]
        for leaf, a in zip(tree.leaves, given, strict=True):
            if not memory_order(a):
                raise ValueError(f"{leaf.label}: expected a dense array; pass a copy")
    sizes = [-(-a.nbytes // LINE) * LINE for a in given]
    total = sum(sizes)
    memory = _common_memory(ranks, max(total, 1) * (ranks.size if each else 1))
    at = total * ranks.rank if each else 0
    made = []
    for a, size in zip(given, sizes, strict=True):
        elements = np.frombuffer(memory, np.uint8, a.nbytes, at).view(a.dtype)
        if each or ranks.rank == 0:
            elements[:] = flat(a)
        made.append(shaped(elements, a.shape, memory_order(a)))
        at += size
    ranks.gather(None)  # all values are there
    return tree.build(made)


def _common_memory(ranks: Ranks, nbytes: int) -> CommonMemory:
    """Return zeros that all ranks read and write.

    The file behind them has no name any more, so that it is gone when the last process is.
    """
    token = secrets.token_hex(8)
    made = ranks.rank == 0 and _make(_path(token), nbytes)
    memory = None
    try:
        token, made = ranks.gather((token, made))[0]
        if made:
            memory = _map(ranks, token, nbytes)
        complete = all(ranks.gather(memory is not None))
    finally:
        if ranks.rank == 0:
            _path(token).unlink(missing_ok=True)
    if memory is None or not complete:
        raise MemoryError(
            f"shared_arrays: the ranks have no {nbytes} bytes of {DIRECTORY} in common; they must"
            " be on one host, with room there (a container's --shm-size)"
        )
    _mapped[token] = memory
    return memory


def _path(token: str) -> Path:
    return DIRECTORY / f"fusedopt.{token}"


def _make(path: Path, nbytes: int) -> bool:
    try:
        with path.open("xb") as file:
            os.fchmod(file.fileno(), 0o600)
            os.posix_fallocate(file.fileno(), 0, nbytes)  # a write without room would be a signal
    except (OSError, AttributeError):
        return False
    return True


def _map(ranks: Ranks, token: str, nbytes: int) -> CommonMemory | None:
    try:
        with _path(token).open("r+b") as file:
            memory = CommonMemory(file.fileno(), nbytes)
    except OSError:  # a file of another host
        return None
    memory.token, memory.group = token, ranks.comm.Get_group()
    memory.address = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    return memory


def places_of(ranks: Ranks, arrays: Iterable[Any]) -> list[Place | None]:
    """Return the place of each array that is in memory which these very ranks have in common."""
    mpi = ranks.mpi
    known = [
        memory
        for memory in list(_mapped.values())
        if mpi.Group.Compare(memory.group, ranks.comm.Get_group()) != mpi.UNEQUAL
    ]
    return [_place(known, a) if isinstance(a, np.ndarray) else None for a in arrays]


def _place(known: Iterable[CommonMemory], a: np.ndarray) -> Place | None:
    if not a.size:
        return None
    start = a.__array_interface__["data"][0]
    for memory in known:
        if memory.address <= start < memory.address + len(memory):
            return Place(memory.token, start - memory.address)
    return None


def array_at(place: Place, dtype: np.dtype, size: int) -> np.ndarray:
    """Return the flat array that another rank has at a place."""
    memory = _mapped.get(place.token)
    if memory is None:
        raise ValueError(
            "grads: another rank's are in memory from shared_arrays of which this rank has dropped"
            " its own arrays; keep them as long as any rank passes its own"
        )
    nbytes = size * dtype.itemsize
    return np.frombuffer(memory, np.uint8, nbytes, place.offset).view(dtype)
