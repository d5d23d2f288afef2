"""One parallel loop on Python's own threads, for kernels that release the lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from ...system.extension import core
from ...system.threads import granted

_pool: ThreadPoolExecutor | None = None


def parallel_for(parts: int, threads: int, run: Callable[[int], None]) -> None:
    """Call run(part) for each part, on `threads` threads with this one; run must not raise."""
    left = deque(range(parts))

    def work() -> None:
        while True:
            try:
                part = left.popleft()
            except IndexError:
                return
            run(part)

    helpers = []
    with suppress(RuntimeError):  # the interpreter shuts down: this thread does it all
        for _ in range(min(threads, parts) - 1):
            helpers.append(_workers().submit(work))
    work()
    for helper in helpers:
        helper.result()


def _workers() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count() or 1, "fusedopt", _unbind)
    return _pool


def _unbind() -> None:
    """A new thread has the affinity of the one that made it, which OpenMP may have bound."""
    if core is not None and core.bound_processors():
        os.sched_setaffinity(0, granted())


def _forget() -> None:
    """Forget the threads in a forked child, where they do not exist."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
