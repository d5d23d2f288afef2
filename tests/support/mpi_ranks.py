"""Starts Python programs on several MPI ranks of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from exactness import SUPPORT


def run_ranks(
    count: int,
    arguments: Sequence[str],
    *,
    launcher: Sequence[str] = (),
    cwd: Path | None = None,
    seconds: float = 120,
) -> subprocess.CompletedProcess[str]:
    """What `mpiexec -n COUNT python ARGUMENTS` returns and prints; each rank has one thread."""
    mpiexec, library = _installed()
    threads = {"OPENBLAS_NUM_THREADS": "1", "FUSEDOPT_THREADS": "1"}
    where = {"MPI4PY_LIBMPI": str(library)} if library else {}
    return subprocess.run(
        [str(mpiexec), *launcher, "-n", str(count), sys.executable, *arguments],
        env={**os.environ, **SUPPORT, **threads, **where},
        cwd=cwd,
        timeout=seconds,
        text=True,
        capture_output=True,
        check=False,
    )


def _installed() -> tuple[Path, Path | None]:
    """The launcher and the library of the package mpich; else the launcher on the path."""
    try:
        files = [Path(str(file.locate())) for file in metadata.files("mpich") or ()]
    except metadata.PackageNotFoundError:
        files = []
    launchers = [file for file in files if file.name == "mpiexec"]
    libraries = [file for file in files if file.name == "libmpi.so.12"]
    if launchers and libraries:
        return launchers[0].resolve(), libraries[0].resolve()
    found = shutil.which("mpiexec")
    assert found, "no mpiexec; pip install -e '.[mpi]'"
    return Path(found), None
