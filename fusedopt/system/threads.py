"""Return the number of threads that a step may use."""

from __future__ import annotations

import os

from .environment import positive_integer
from .extension import core

_in_use = _most = 1


def in_use() -> int:
    """Return the number of threads that a step may use; the core has a copy of its own."""
    return _in_use


def most() -> int:
    """Return the largest number so far: at the start, all threads that the process was granted."""
    return _most


def use(n: int) -> None:
    """Set the number of threads that a step may use."""
    global _in_use, _most
    _in_use, _most = n, max(n, _most)


def available() -> dict[str, int]:
    """Every limit on the number of threads that applies to this process, by its name."""
    limits = {"processors": os.cpu_count() or 1}
    if hasattr(os, "sched_getaffinity"):
        limits["affinity"] = len(granted())
    container = _container_limit()
    if container is not None:
        limits["container"] = container
    # OpenMP's own variable can be a list, one number for each level of nesting.
    outermost = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if outermost.isdigit() and int(outermost) > 0:
        limits["OMP_NUM_THREADS"] = int(outermost)
    own = positive_integer("FUSEDOPT_THREADS")
    if own is not None:
        limits["FUSEDOPT_THREADS"] = own
    return limits


def granted() -> set[int]:
    """The processors that this process was granted.

    With OMP_PROC_BIND, usual on HPC machines, OpenMP binds the thread that loads it to one of them
    there and then, and every thread that this one starts has that affinity: what the process had
    before, only OpenMP knows.
    """
    return set(core.bound_processors() if core else ()) or os.sched_getaffinity(0)


def _container_limit() -> int | None:
    """The processors that a control group grants, rounded up; None without a limit."""
    try:
        quota, period = _read("cpu.max").split()  # version 2
    except (OSError, ValueError):
        try:
            quota, period = _read("cpu/cpu.cfs_quota_us"), _read("cpu/cpu.cfs_period_us")
        except OSError:
            return None
    if not quota.strip().isdigit() or int(quota) <= 0:
        return None
    return max(1, -(-int(quota) // int(period)))


def _read(control: str) -> str:
    with open(f"/sys/fs/cgroup/{control}") as file:  # pathlib would cost 3 ms of the import
        return file.read()


def check_threads(where: str, n: object) -> int:
    """A number of threads; TypeError or ValueError where it is none."""
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"{where}: expected an integer >= 1, got {n!r}")
    if not 1 <= n < 1 << 31:
        raise ValueError(f"{where}: expected an integer >= 1 and below 2^31, got {n}")
    return n
