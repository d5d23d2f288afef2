"""Measure the speed of this machine in a minute: the work behind `fusedopt bench`."""

from __future__ import annotations

from .compare import compare
from .result import Bench, Row
from .run import BenchOptions, bench

__all__ = ["Bench", "BenchOptions", "Row", "bench", "compare"]
