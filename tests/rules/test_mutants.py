"""The other tests see a wrong kernel: each mutant must turn a check red."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from exactness import ROOT, run_python

pytestmark = pytest.mark.build

pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")

# Without the handler of JAX, whose headers are not here, and without matrix units.
SOURCES = sorted(
    {source.name for source in (ROOT / "csrc").glob("*.cpp")} - {"jax.cpp", "matrix_units.cpp"}
)
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
         "-DFUSEDOPT_TABLE=table_baseline")  # fmt: skip


class Mutant(NamedTuple):
    """file: in csrc. old, new: what is changed, at its first occurrence. check: a rule and ways of
    storage, by default the uncopied ones, for `fo.verify`; or, with a leading "-k", tests of
    test_exact.py.
    """

    file: str
    old: str
    new: str
    check: str


MUTANTS = {
    "the diagonal forgotten": Mutant(
        "newton_schulz.hpp", "return v + load(diagonal + j)", "return v + T(0)", "muon"
    ),
    "a sign": Mutant("rules.hpp", "return lr * g;", "return -lr * g;", "sgd"),
    "swapped betas": Mutant("rules.hpp", "v = b2 * v + one_b2 * (g * g);",
                            "v = one_b2 * v + b2 * (g * g);", "adam"),
    "no decoupled decay": Mutant("kernels.cpp", "w - (decay * w + delta)", "w - delta", "adamw"),
    "decay of all elements": Mutant(
        "kernels.cpp", "opposed(delta, w) ? delta : decay * w + delta", "decay * w + delta", "lion"
    ),
    "no decay where nothing moves": Mutant(
        "rules.hpp", "((x > T(0)) & (y < T(0)))", "((x >= T(0)) & (y < T(0)))",
        "-k decay_of_some_elements",
    ),
    "no l2 decay where a direction is taken": Mutant(
        "kernels.cpp", "mode == L2 || mode == PEEK_L2)", "mode == L2)", "muon"
    ),
    "the new momentum in the sign": Mutant(
        "rules.hpp",
        "const T c = b1 * m + one_b1 * g;\n    m = b2 * m + one_b2 * g;",
        "m = b2 * m + one_b2 * g;\n    const T c = b1 * m + one_b1 * g;",
        "lion",
    ),
    "states in units of the old estimate": Mutant(
        "rules.hpp", "v = shrink2 * v;", "v = shrink * v;", "prodigy"
    ),
    "what the matrix became, without its rate": Mutant(
        "rules.hpp", "T operator()(T, T, T& o) const { return lr * o; }",
        "T operator()(T, T, T& o) const { return o; }", "adafactor",
    ),
    "the size before the decay": Mutant(
        "rules.hpp", "T operator()(T p, T) const { return factor * p; }",
        "T operator()(T p, T) const { return p; }", "adafactor",
    ),
    "no maximum": Mutant("rules.hpp", "x = maximum(x, k * v);", "x = k * v;", "adam"),
    "no clipping from below": Mutant("rules.hpp", "(x < -limit ? -limit : x)", "x", "sophia"),
    "the factor forgotten": Mutant("kernels.cpp", "factor * g :", "g :", "momentum"),
    "denormal states": Mutant(
        "codecs.hpp", "return float_of(bits & INFINITE ? bits : 0);", "return x;",
        "-k denormal or decay_to_zero",
    ),
    "a tail left out": Mutant(
        "driver.cpp", "at < span.to; at += BATCH",
        "at + 1 < span.to || at == span.from; at += BATCH",
        "-k gradients_of_the_other_dtype",
    ),
    "a bfloat16 cut off": Mutant(
        "codecs.hpp", "bits + 0x7fff + (bits >> 16 & 1)", "bits", "adamw bfloat16"
    ),
    "a float16 cut off": Mutant(
        "codecs.hpp", "(magnitude - REBIAS + 0xfff + (magnitude >> 13 & 1)) >> 13",
        "(magnitude - REBIAS) >> 13", "adamw float16",
    ),
    "other random bits": Mutant("codecs.hpp", "key += 0x9e", "key += 0x8e", "adamw stochastic"),
    "no compensation": Mutant(
        "codecs.hpp", "finite ? x - stored : 0.0f", "0.0f", "sgd kahan"
    ),
    "half a master": Mutant(
        "codecs.hpp", "low = static_cast<std::uint16_t>(value & 0xffffu);", "low = 0;",
        "sgd split16",
    ),
    "another scale": Mutant(
        "codecs.hpp", "LARGEST = 448", "LARGEST = 512", "momentum float8"
    ),
    "a decade too late": Mutant("codecs.hpp", "0.1 + 0.18 /", "0.11 + 0.18 /", "adamw dynamic8"),
    "the last block's neighbour": Mutant(
        "codecs.hpp", "for (std::size_t at = 0, k = 0; at < n; at += B::block, ++k)",
        "for (std::size_t at = 0, k = 0; at < n; at += B::block)", "adamw dynamic4",
    ),
}  # fmt: skip

# The core is put in place before the package asks for its own.
CHECK = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fusedopt._core", {core!r})
sys.modules["fusedopt._core"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["fusedopt._core"])
import fusedopt as fo
check = {check!r}
if check.startswith("-k"):
    import pytest
    sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "exact/test_exact.py", check]))
rule, *storages = check.split()
storages = storages or ["float32", "float64"]
checks = fo.verify([rule], backends=["native"], isas=["baseline"], storages=storages)
print(*checks, sep="\\n")
sys.exit(not all(c.passed for c in checks))
"""


def compile_with(*arguments: str | Path) -> None:
    command = [os.environ.get("CXX", "c++"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def compile_source(source: Path, target: Path) -> Path:
    """Compile the baseline alone, with a serial loop: enough to run every kernel."""
    folders = (source.parent, pybind11.get_include(), sysconfig.get_path("include"))
    includes = [f"-I{folder}" for folder in folders]
    compile_with(*FLAGS, *includes, "-c", source, "-o", target)
    return target


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The unchanged core's objects, by source file."""
    if os.name == "nt" or not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("needs GCC or Clang")
    folder = tmp_path_factory.mktemp("objects")
    with ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda s: compile_source(ROOT / "csrc" / s, folder / f"{s}.o"), SOURCES)
        return dict(zip(SOURCES, compiled, strict=True))


def link(objects: dict[str, Path], folder: Path) -> Path:
    core = folder / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    compile_with("-shared", *undefined, *objects.values(), "-o", core)
    return core


def mutate(mutant: Mutant, objects: dict[str, Path], folder: Path) -> Path:
    """The core with that change."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    file = folder / "csrc" / mutant.file
    text = file.read_text()
    assert mutant.old in text, f"the text to change is gone from {mutant.file}"
    file.write_text(text.replace(mutant.old, mutant.new, 1))
    unit = mutant.file if mutant.file in SOURCES else "kernels.cpp"
    changed = compile_source(folder / "csrc" / unit, folder / f"{unit}.o")
    return link({**objects, unit: changed}, folder)


def passes(core: Path, check: str) -> tuple[bool, str]:
    """Whether the check passes with this core, and what it printed."""
    done = run_python(CHECK.format(core=str(core), check=check), timeout=300)
    printed = done.stdout + done.stderr
    assert done.returncode in (0, 1), printed
    assert "Traceback" not in done.stderr, printed
    return done.returncode == 0, printed


def test_the_unchanged_core_passes(objects: dict[str, Path], tmp_path: Path) -> None:
    core = link(objects, tmp_path)
    for check in sorted({mutant.check for mutant in MUTANTS.values()}):
        passed, printed = passes(core, check)
        assert passed, printed


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutant_is_seen(mutant: Mutant, objects: dict[str, Path], tmp_path: Path) -> None:
    passed, printed = passes(mutate(mutant, objects, tmp_path), mutant.check)
    assert not passed, printed
