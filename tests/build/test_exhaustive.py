"""Every codec on every instruction set, over all inputs: what instructions convert has its bits."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from built import kernel_objects, output, tool
from exactness import ROOT
from fusedopt.arrays.formats import FORMATS
from fusedopt.system.isa import isas

pytestmark = pytest.mark.build

CODECS = [format.codec for format in FORMATS if format.codec not in ("float32", "float64")]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`exhaustive.cpp`, linked with the objects that the installed core is made of."""
    objects = kernel_objects()
    compiler = tool(os.environ.get("CXX", "c++"))
    path = tmp_path_factory.mktemp("exhaustive") / "exhaustive"
    sources = [Path(__file__).with_name("exhaustive.cpp"), ROOT / "csrc" / "cpu.cpp"]
    x86 = [f"-DFUSEDOPT_X86_LEVELS={len(objects)}"] if len(objects) > 1 else []
    flags = ["-std=c++17", "-O2", "-pthread", f"-I{ROOT / 'csrc'}", *x86]
    output(compiler, *flags, *sources, *objects.values(), "-o", path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_every_input_has_the_same_bits_on_every_instruction_set(program: Path, codec: str) -> None:
    """2^32 floats and all codes, 10 to 60 s each on two cores."""
    done = subprocess.run([program, codec, *isas()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
