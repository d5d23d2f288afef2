"""What tests of the build share: tools of the system, and the objects of the newest build here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exactness import ROOT


def tool(name: str) -> str:
    found = shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def kernel_objects(kind: str = "kernels", source: str = "kernels.cpp") -> dict[str, Path]:
    """The kernels' object of each instruction set, of the newest build in this checkout."""
    if sys.platform != "linux":
        pytest.skip("reads what GNU's tools print of ELF objects")
    found = ROOT.glob(f"build/cp*/CMakeFiles/{kind}_*.dir/csrc/{source}.o")
    oldest_first = sorted(found, key=lambda path: path.stat().st_mtime)
    if not oldest_first:
        assert not os.environ.get("CI"), "no build folder here: CI must check the objects"
        pytest.skip("this checkout has no build folder")
    build = oldest_first[-1].parents[3]
    return {
        path.parents[1].name.removeprefix(f"{kind}_").removesuffix(".dir"): path
        for path in oldest_first
        if path.is_relative_to(build)
    }
