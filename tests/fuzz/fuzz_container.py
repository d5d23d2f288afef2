"""Feeds a coverage-guided fuzzer's files to the reader of checkpoints, until it is stopped.

python tests/fuzz/fuzz_container.py -max_total_time=600 CORPUS      (needs `pip install atheris`)
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from pathlib import Path

import atheris
import numpy as np

import fusedopt as fo
from fusedopt.arrays import safetensors_file
from fusedopt.step import checkpoint

for owner in (safetensors_file, checkpoint, checkpoint.Snapshot):
    for name, member in list(vars(owner).items()):
        if inspect.isfunction(member) and name != "write":
            setattr(owner, name, atheris.instrument_func(member))

SCRATCH = Path(tempfile.mkdtemp())


def fresh() -> fo.Optimizer:
    params = {"w": np.ones((3, 2), np.float32), "v": np.ones(4)}
    return fo.Optimizer(params, fo.AdamW())


OPTIMIZER = fresh()
BEFORE = OPTIMIZER.fingerprint()


def one(data: bytes) -> None:
    """What is refused changes nothing, and nothing but a refusal is raised."""
    global OPTIMIZER
    path = SCRATCH / "run"
    path.write_bytes(data)
    try:
        OPTIMIZER.load(path, strict=False)
    except (ValueError, OSError):
        assert OPTIMIZER.fingerprint() == BEFORE
        return
    OPTIMIZER.step({"w": np.ones((3, 2), np.float32), "v": np.ones(4)})
    OPTIMIZER = fresh()


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        if not argument.startswith("-"):  # a first file to begin from
            Path(argument).mkdir(parents=True, exist_ok=True)
            fresh().save(Path(argument) / "whole")
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
