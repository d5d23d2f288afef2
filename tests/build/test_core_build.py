"""What the build made: the kernels' objects, forced and missing variants, the pure-Python wheel."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import fusedopt as fo
from built import kernel_objects, output, tool
from exactness import ROOT, run_python
from fusedopt.backends import BACKENDS, check_registry
from fusedopt.system.isa import isas

pytestmark = pytest.mark.build

LIGHT = ("numba", "torch", "matplotlib", "mpi4py", "rich", "typer")


# ---------------------------------------------------------------- the kernels' objects


@pytest.fixture(scope="module")
def objects() -> dict[str, Path]:
    """The kernels' object of each instruction set, of the newest build in this checkout."""
    return kernel_objects()


def test_every_instruction_set_has_an_object(objects: dict[str, Path]) -> None:
    assert set(isas()) <= set(objects)


def test_symbols_of_the_kernels(objects: dict[str, Path]) -> None:
    # A second global or a weak symbol could be merged with another object's, which was compiled
    # for another instruction set; what is undefined must need no header of the language.
    allowed = {"memcpy", "memmove", "memset", "_GLOBAL_OFFSET_TABLE_", "__stack_chk_fail"}
    nm = tool("nm")
    tables = {f"table_{name}": path for name, path in objects.items()}
    units = kernel_objects("units", "matrix_units.cpp")
    assert set(fo.info()["matrix_units"]) <= set(units)
    tables |= {f"units_{name}": path for name, path in units.items()}
    for name, path in tables.items():
        rows = [line.split() for line in output(nm, path).splitlines()]
        undefined = {row[-1] for row in rows if row[-2] == "U"}
        visible = [row[-1] for row in rows if row[-2] != "U" and not row[-2].islower()]
        weak = [row[-1] for row in rows if row[-2] in "vVwWu"]
        assert undefined <= allowed, name
        assert visible == [f"_ZN8fusedopt{len(name)}{name}E"], name
        assert not weak, name


# Instructions, and registers wider than an x86 instruction set has, as objdump prints them.
FUSED = r"\bvfn?m(add|sub)|\bfn?m(add|sub)\b|\bfml[as]\b"
WIDER = {
    "baseline": r"%[yz]mm|\tv[a-z]",
    "x86_v3": r"%zmm|%k[1-7]",
    "x86_v4": r"\tvcvtne2?ps2bf16|\tvdpbf16ps|\tvperm(b|[it]2b)|\tvpmultishiftqb",
}
# What a level is there for.
OWN = {"x86_v3": r"\tvcvtps2ph", "x86_v4": r"%zmm", "x86_v4_bf16": r"\tvcvtne2ps2bf16"}
PACKED_ROOT = r"sqrtp[sd]|fsqrt\s+v\d+\.[24]"


def test_instructions_of_the_kernels(objects: dict[str, Path]) -> None:
    objdump = tool("objdump")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    for name, path in objects.items():
        code = output(objdump, "-d", "--no-show-raw-insn", path)
        assert not re.search(FUSED, code), f"{name}: multiplies and adds with one rounding"
        assert re.search(PACKED_ROOT, code), f"{name}: no loop was vectorised"
        if x86 and name in WIDER:
            wider = re.search(WIDER[name], code)
            assert not wider, f"{name}: {wider} is beyond it"
        if x86 and name in OWN:
            assert re.search(OWN[name], code), f"{name}: none of its own instructions"


def test_instructions_of_the_matrix_units() -> None:
    objdump = tool("objdump")
    own = {"amx": r"\ttdpbf16ps", "avx512_bf16": r"\tvdpbf16ps"}
    for name, path in kernel_objects("units", "matrix_units.cpp").items():
        code = output(objdump, "-d", "--no-show-raw-insn", path)
        assert not re.search(FUSED, code), f"{name}: multiplies and adds with one rounding"
        for unit, instruction in own.items():
            assert bool(re.search(instruction, code)) == (unit == name), name


# ---------------------------------------------------------------- forcing a variant


def test_every_instruction_set_can_be_forced() -> None:
    before = fo.get_isa()
    try:
        for isa in isas():
            fo.set_isa(isa)
            assert fo.get_isa() == isa
            assert fo.info()["isa"] == isa
    finally:
        fo.set_isa(before)


@pytest.mark.parametrize("name", ["x86_v9", "", "BASELINE"])
def test_unknown_instruction_sets_are_refused(name: str) -> None:
    before = fo.get_isa()
    with pytest.raises(ValueError, match=re.escape(", ".join(isas()))):
        fo.set_isa(name)
    assert fo.get_isa() == before


INFO = "import json, fusedopt as fo; print(json.dumps(fo.info()))"


@pytest.mark.parametrize(
    ("variable", "value", "key"),
    [
        *(("FUSEDOPT_ISA", isa, "isa") for isa in isas()),
        ("FUSEDOPT_THREADS", "1", "threads"),
        ("FUSEDOPT_BACKEND", "reference", "backend"),
        ("FUSEDOPT_BACKEND", "native", "backend"),
        ("FUSEDOPT_BACKEND", "numba", "backend"),
    ],
)
def test_environment(variable: str, value: str, key: str) -> None:
    done = run_python(INFO, {variable: value})
    assert done.returncode == 0, done.stderr
    assert str(json.loads(done.stdout)[key]) == value


@pytest.mark.parametrize(
    ("variable", "value", "valid"),
    [
        ("FUSEDOPT_ISA", "x86_v9", isas()),
        ("FUSEDOPT_THREADS", "0", [">= 1"]),
        ("FUSEDOPT_THREADS", "two", [">= 1"]),
        ("FUSEDOPT_BACKEND", "fortran", ["auto", "native", "numba", "reference"]),
    ],
)
def test_bad_environment_is_refused_at_import(variable: str, value: str, valid: list[str]) -> None:
    done = run_python("import fusedopt", {variable: value})
    assert done.returncode != 0
    message = done.stderr.splitlines()[-1]
    for part in ("ValueError", variable, repr(value), *valid):
        assert part in message


def test_import_is_light() -> None:
    done = run_python(f"import sys, fusedopt; print(*(m for m in {LIGHT} if m in sys.modules))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
    # Classes take most of the time of an import: none of ours is made before one is asked for.
    code = "import sys, fusedopt; print(*(m for m in sys.modules if m.startswith('fusedopt.')))"
    loaded = set(run_python(code).stdout.split())
    extension = {"fusedopt._core", "fusedopt._version", "fusedopt.system"}
    assert {m for m in loaded if not m.startswith("fusedopt.system.")} == extension


def test_public_names_are_what_type_checkers_see() -> None:
    source = Path(fo.__file__).read_text()
    seen = ["examples", "hessian", "interop", "schedules"]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.level:
            home = importlib.import_module(f"fusedopt.{node.module}")
            names = [alias.name for alias in node.names]
            if names == ["*"]:
                names = [n for n in vars(home) if n == "RULES" or isinstance(vars(home)[n], type)]
            seen += [n for n in names if n != "start" and not n.startswith("_")]
            assert all(getattr(fo, n) is getattr(home, n) for n in names if n != "start")
    assert sorted(seen) == fo.__all__
    assert set(dir(fo)) >= set(fo.__all__)
    run_python("from fusedopt import *; AdamW, RULES, info, schedules.Cosine").check_returncode()
    with pytest.raises(AttributeError, match="has no attribute 'AdamX'"):
        fo.AdamX  # noqa: B018  # type: ignore[attr-defined]


@pytest.mark.parametrize("first", ["verify", "estimate", "orthogonalize", "runtime"])
def test_a_module_hides_no_function_of_its_name(first: str) -> None:
    code = (
        f"import fusedopt.{first}, fusedopt as fo\n"
        "assert all(map(callable, (fo.verify, fo.estimate, fo.orthogonalize)))\n"
        "import fusedopt.verify, fusedopt.estimate, fusedopt.orthogonalize\n"
        "from fusedopt.verify import variants\n"
        "from fusedopt import verify\n"
        "assert all(map(callable, (verify, fo.verify, fo.estimate, fo.orthogonalize)))\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_the_backends_that_the_environment_may_name() -> None:
    done = run_python("import fusedopt", {"FUSEDOPT_BACKEND": "x"})
    assert done.stderr.strip().endswith(f"expected one of auto, {', '.join(BACKENDS)}")


# ---------------------------------------------------------------- without the compiled core

HIDDEN = """
import sys, warnings
sys.modules["fusedopt._core"] = sys.modules["numba"] = None
import numpy as np, fusedopt as fo

reason = fo.info()["backends"]["native"]
assert "could not be imported" in reason, reason
assert fo.info()["backend"] == "reference"
assert "pip install 'fusedopt[numba]'" in fo.info()["backends"]["numba"]
assert fo.get_isa() == "none"
p, g = np.ones(3), np.ones(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    optimizer = fo.Optimizer(p, fo.SGD(lr=0.5))
assert [w.category for w in caught] == [RuntimeWarning], caught
assert reason in str(caught[0].message)
assert caught[0].filename == "<string>", caught[0].filename  # the caller's line
optimizer.step(g)
assert p.tolist() == [0.5] * 3
try:
    fo.Optimizer(p, fo.SGD(), backend="native")
except RuntimeError as error:
    assert reason in str(error)
else:
    raise AssertionError("backend='native' was accepted")
try:
    fo.set_isa("baseline")
except ValueError as error:
    assert "no compiled core" in str(error)
else:
    raise AssertionError("an instruction set was accepted")
"""


def test_without_the_compiled_core() -> None:
    done = run_python(HIDDEN)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", fo.RULES)
def test_stale_core_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # For each kernel that an example of the rule selects: a core with fewer scalars for it.
    cls = fo.RULES[name]
    original = cls.operations
    check_registry()
    for kernel in {op.kernel for example in cls.examples for op in cls(**example).operations()}:

        def with_more(self: fo.Rule, kernel: str | None = kernel) -> tuple[Any, ...]:
            def more(op: Any) -> Any:
                return op._replace(scalars=lambda t, lr: (*op.scalars(t, lr), 0.0))

            return tuple(more(op) if op.kernel == kernel else op for op in original(self))

        monkeypatch.setattr(cls, "operations", with_more)
        with pytest.raises(ImportError, match=f"stale extension, rebuild.*'{kernel}'"):
            check_registry()


# ---------------------------------------------------------------- a build that fails


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is built from."""
    if importlib.util.find_spec("scikit_build_core") is None:
        pytest.skip("scikit-build-core is not installed")
    copy = tmp_path_factory.mktemp("source")
    for name in ("csrc", "fusedopt"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__py*"))
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def build_with_failing_compiler(
    source: Path, tmp_path: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    failing = tmp_path / "no-compiler"
    failing.write_text("#!/bin/sh\nexit 1\n")
    failing.chmod(0o755)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
    command += ["-C", f"build-dir={tmp_path / 'build'}", "-w", str(tmp_path), str(source)]
    return subprocess.run(
        command,
        env={**os.environ, "CXX": str(failing), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


needs_scripts = pytest.mark.skipif(os.name == "nt", reason="the failing compiler is a shell script")


@needs_scripts
def test_failed_build_gives_a_pure_wheel(source: Path, tmp_path: Path) -> None:
    done = build_with_failing_compiler(source, tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fusedopt/__init__.py" in names
    assert not [name for name in names if name.endswith((".so", ".pyd"))]


@needs_scripts
def test_failed_build_fails_where_the_core_is_required(source: Path, tmp_path: Path) -> None:
    done = build_with_failing_compiler(source, tmp_path, FUSEDOPT_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert not list(tmp_path.glob("*.whl"))


# ---------------------------------------------------------------- the parallel loop

PARALLEL_MAIN = r"""
#include <atomic>
#include <cstdio>
#include <cstring>
#include <vector>
#include "parallel.hpp"

int main(int, char** argv) {
  fusedopt::guard_forks();
  if (std::strcmp(fusedopt::parallel_name(), argv[1])) return 1;
  if (fusedopt::parallel_limit() < 1) return 2;
  for (int threads : {1, 2, 7})
    for (std::size_t count : {0, 1, 2, 1000}) {
      std::vector<std::atomic<int>> runs(count + 1);
      for (auto& r : runs) r = 0;
      fusedopt::parallel_for(
          count, threads,
          [](void* context, std::size_t i) {
            ++(*static_cast<std::vector<std::atomic<int>>*>(context))[i];
          },
          &runs);
      for (std::size_t i = 0; i <= count; ++i)
        if (runs[i] != (i < count)) {
          std::printf("%d threads, %zu parts: part %zu ran %d times\n", threads, count, i,
                      runs[i].load());
          return 3;
        }
    }
  return 0;
}
"""


@pytest.mark.parametrize(
    ("form", "flags"),
    [
        ("openmp", ["-DFUSEDOPT_OPENMP", "-fopenmp"]),
        ("threads", ["-DFUSEDOPT_THREADS", "-pthread"]),
        ("serial", []),
    ],
)
def test_parallel_loop_runs_each_part_once(form: str, flags: list[str], tmp_path: Path) -> None:
    compiler = tool(os.environ.get("CXX", "c++"))
    main, program = tmp_path / "main.cpp", tmp_path / "main"
    main.write_text(PARALLEL_MAIN)
    probe = subprocess.run(
        [compiler, *flags, "-x", "c++", "-", "-o", program],
        input="int main() {}",
        text=True,
        capture_output=True,
        check=False,
    )
    if probe.returncode:
        pytest.skip(f"{compiler} has no {' '.join(flags)}")
    sources = [main, ROOT / "csrc" / "parallel.cpp"]
    output(compiler, "-std=c++17", "-O1", *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", program)
    done = subprocess.run([program, form], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
