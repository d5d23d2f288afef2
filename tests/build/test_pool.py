"""The threads of a build without OpenMP, in a program of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exactness import ROOT

pytestmark = pytest.mark.build


@pytest.mark.skipif(sys.platform == "win32", reason="the program forks")
@pytest.mark.parametrize("parallel", ["FUSEDOPT_THREADS", "FUSEDOPT_SERIAL_LOOP"])
def test_every_part_runs_once_through_forks_and_the_end(parallel: str, tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        pytest.skip("there is no C++ compiler")
    sources = [ROOT / "tests/build/pool.cpp", ROOT / "csrc/parallel.cpp"]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", f"-D{parallel}"]
    program = tmp_path / "pool"
    command = [compiler, *flags, f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr
