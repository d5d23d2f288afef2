"""Describe what this process runs on: backends, instruction sets, threads."""

from __future__ import annotations

import platform
import time
from typing import Any

import ml_dtypes
import numpy as np

from ._version import __version__
from .backends import BACKENDS, FORCED
from .optimizer import Optimizer
from .rules import RULES, Rule
from .system.extension import core
from .system.isa import get_isa, get_threads, isas
from .system.numa import nodes, thread_nodes
from .system.threads import available


def warmup(*rules: Rule, dtype: str = "float32", backend: str = "auto", **options: Any) -> float:
    """Compile ahead of the first step what that would compile.

    Parameters
    ----------
    *rules : Rule
        By default all of `RULES` as they are.
    dtype : str, default "float32"
        Dtype of parameters and gradients.
    backend : str, default "auto"
        As for `Optimizer`. Only "numba" compiles, and whichever backend runs a `CustomRule`.
    **options
        Arguments of `Optimizer` for storage, such as `state_dtype`.

    Returns
    -------
    float
        Seconds that it took.

    Notes
    -----
    Compiled kernels stay on disk for later processes, below NUMBA_CACHE_DIR or the user's cache
    directory, if it can be written to. Errors are those of `Optimizer`.
    """
    start = time.perf_counter()
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    for rule in rules or [cls() for cls in RULES.values()]:
        p, g = (np.zeros((64, 64), kind) for _ in range(2))  # enough to be quantised
        optimizer = Optimizer(p, rule, backend=backend, **options)
        optimizer.step(g, hessian=g.copy() if rule.takes_hessian else None)
    return time.perf_counter() - start


def info() -> dict[str, Any]:
    """Return what was chosen on this machine, and why the rest was not.

    Returns
    -------
    dict
        Values for JSON: version, backends, instruction sets, threads and their processors, the
        compiler, and the versions of Python and NumPy.
    """
    reasons = {name: backend.unavailable() for name, backend in BACKENDS.items()}
    usable = [name for name, reason in reasons.items() if reason is None]
    limits = available()
    return {
        "version": __version__,
        "backend": FORCED if FORCED not in (None, "auto") else usable[0],
        "backends": {name: reason or "available" for name, reason in reasons.items()},
        "isa": get_isa(),
        "isas": isas(),
        "matrix_units": core.matrix_units() if core else [],
        "threads": get_threads(),
        "thread_limits": limits,
        "numa_nodes": nodes(),
        "thread_nodes": thread_nodes(core.thread_processors(get_threads()) if core else []),
        "parallel": core.parallel if core else "none",
        "compiler": core.compiler if core else "none",
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
