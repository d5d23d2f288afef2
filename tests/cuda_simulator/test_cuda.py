"""The CUDA backend where there is no device: on Numba's simulator, and as assembly.

What a device does with it, `benchmarks/gpu.py` shows where there is one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from exactness import SUPPORT, TESTS, run_python
from fusedopt.arrays.formats import PLAIN, compute_dtype
from fusedopt.backends import BACKENDS
from fusedopt.plan.extras import Around
from fusedopt.rules import Rule

pytest.importorskip("numba")
pytest.importorskip("numba_cuda")

from fusedopt.backends.cuda import kernels, reductions, toolkit
from fusedopt.backends.cuda.kernels import Step, Variant

CAPABILITIES = ((8, 0), (9, 0))
LOW = ("bfloat16", "float16")


@pytest.mark.parametrize(
    "file",
    [
        "simulated.py",
        "simulated_arrays.py",
        "simulated_clipping.py",
        "simulated_streams.py",
    ],
)
def test_on_the_simulator(file: str) -> None:
    options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "-p", "devices"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, file],
        cwd=TESTS / "cuda_simulator",
        env={**os.environ, **SUPPORT, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert re.search(r"\d{2,} passed", result.stdout)
    assert "skipped" not in result.stdout


def test_what_it_says_without_a_device() -> None:
    reason = BACKENDS["cuda"].unavailable()
    if reason is None:
        pytest.skip("there is a CUDA device")
    assert "no CUDA device" in reason
    assert fo.info()["backends"]["cuda"] == reason
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot be used here: no CUDA device"):
        fo.Optimizer(np.ones(3), fo.SGD(), backend="cuda")


def test_importing_fusedopt_imports_nothing_of_it() -> None:
    code = (
        "import sys, fusedopt; print([m for m in ('numba', 'cuda', 'torch') if m in sys.modules])"
    )
    assert run_python(code).stdout == "[]\n"


# ---------------------------------------------------------------- assembly


def variants_of(rule: Rule, p: str, g: str, s: str, **more: Any) -> Iterator[Variant]:
    """The kernels of a rule's phases."""
    program = Around(**more).program(rule)
    dtype = compute_dtype(PLAIN[p].dtype)
    names = program.arrays[1:]
    formats = [("g", p if g == "own" else g), ("p", p), *((name, s) for name in names)]
    if rule.takes_hessian:
        formats.append(("hessian", g))
    for phase in range(program.phases):
        operations = kernels.operations_of(program, phase, rule.takes_hessian)
        steps = tuple(Step.of(program, op) for op in operations)
        stored = tuple((name, PLAIN[format]) for name, format in formats)
        yield Variant(steps, program.scratch, dtype, stored, (PLAIN["bfloat16"],))


def every_kernel() -> dict[str, Variant]:
    """One of every rule, of the formats in turn, and each rule's own variants in float32."""
    found: dict[Variant, str] = {}
    formats = [("float32",) * 3, ("float64",) * 3, ("bfloat16",) * 3]
    formats += [(low, low, "float32") for low in LOW]
    for (name, cls), (p, g, s) in product(fo.RULES.items(), formats):
        rule = cls(weight_decay=0.1, **cls.examples[0])
        if (p, s) in (("float32",) * 2, ("bfloat16", "float32")) or name in ("adamw", "lion"):
            for k, variant in enumerate(variants_of(rule, p, g, s)):
                found.setdefault(variant, f"{name}-{k}-{p}-{s}")
    for name, cls in fo.RULES.items():
        for j, example in enumerate(cls.examples):
            for k, variant in enumerate(variants_of(cls(**example), *formats[0])):
                found.setdefault(variant, f"{name}-{k}-example{j}")
    around = {"clip_value": 1.0, "ema": 0.5}
    for variant in variants_of(fo.AdamW(), "bfloat16", "bfloat16", "float32", **around):
        found.setdefault(variant, "adamw-around")
    for variant, name in list(found.items()):
        if re.match("adamw-0|lion-0|muon-.-float32", name):
            found[replace(variant, clipped=True)] = f"{name}-clipped"
    return {name: variant for variant, name in found.items()}


KERNELS = every_kernel()


@pytest.fixture(scope="module")
def assembly() -> dict[tuple[str, tuple[int, int]], str]:
    """Of each kernel for each compute capability."""
    return {
        (name, capability): kernels.step_kernel(variant).ptx(capability)
        for name, variant in KERNELS.items()
        for capability in CAPABILITIES
    }


Assembly = dict[tuple[str, tuple[int, int]], str]


def test_nothing_is_contracted(assembly: Assembly) -> None:
    for where, ptx in assembly.items():
        assert not re.search(r"\bfma\b|\bmad\.(?!lo|wide)", ptx), where
        for kind in re.findall(r"\b(?:add|sub|mul|div|sqrt)(?:\.\w+)*\.f(?:32|64)", ptx):
            assert ".rn" in kind and ".ftz" not in kind, (where, kind)  # noqa: PT018
        assert "approx" not in ptx, where


def test_without_the_option_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolkit, "OPTIONS", {"opt": 3})
    kernels.step_kernel.cache_clear()
    ptx = kernels.step_kernel(KERNELS["adamw-0-float32-float32"]).ptx((9, 0))
    kernels.step_kernel.cache_clear()
    assert "fma.rn.f32" in ptx


def test_no_float64_arithmetic_and_no_local_memory(assembly: Assembly) -> None:
    for where, ptx in assembly.items():
        if KERNELS[where[0]].dtype == np.float32:
            assert ".f64" not in ptx, where
        assert ".local" not in ptx, where
        assert "call" not in ptx, where


def test_whole_vectors_are_loaded_before_any_is_stored(assembly: Assembly) -> None:
    for where, ptx in assembly.items():
        variant = KERNELS[where[0]]
        vectors = [
            (found["way"], int(found["n"]) * int(found["bits"]))
            for found in re.finditer(
                r"(?P<way>ld|st)\.global\.v(?P<n>[24])\.[a-z](?P<bits>\d+)", ptx
            )
        ]
        wide = sum(f.bits * variant.width == 128 for _, f in variant.arrays)
        assert wide, where
        assert sum(way == "ld" and size == 128 for way, size in vectors) > 0, where
        body = ["ld" if way == "ld" else "st" for way, _ in vectors]
        # Unrolled, the loop has several such bodies.
        assert re.fullmatch(r"((ld,)+(st,)+)+", ",".join(body) + ","), where


def ptxas() -> str | None:
    """NVIDIA's assembler, from a wheel or a toolkit."""
    wheels = importlib.util.find_spec("nvidia")  # a namespace of the compiler's wheels
    roots = (wheels and wheels.submodule_search_locations) or []
    found = [f for root in roots for f in Path(root).glob("cu1*/bin/ptxas*")]
    return str(found[0]) if found else shutil.which("ptxas")


@pytest.mark.skipif(ptxas() is None, reason="needs the wheel nvidia-cuda-nvcc")
def test_registers(assembly: Assembly, tmp_path: Path) -> None:
    file = tmp_path / "kernel.ptx"
    for (name, (major, minor)), ptx in assembly.items():
        limit = toolkit.MAX_REGISTERS[KERNELS[name].dtype.name]
        file.write_text(ptx)
        options = ["-v", f"-arch=sm_{major}{minor}", f"-maxrregcount={limit}"]
        told = subprocess.run(
            [str(ptxas()), *options, str(file), "-o", str(tmp_path / "kernel.cubin")],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        assert "0 bytes spill stores, 0 bytes spill loads" in told, (name, told)
        used = re.search(r"Used (\d+) registers", told)
        assert used is not None
        assert int(used[1]) <= limit, (name, told)


def test_sums_of_squares_and_norms() -> None:
    found = [reductions.totals_kernel(), reductions.guard_kernel()]
    for name in ("float32", "bfloat16", "float64"):
        found.append(reductions.squares_kernel(PLAIN[name], compute_dtype(PLAIN[name].dtype)))
    for kernel, capability in product(found, CAPABILITIES):
        ptx = kernel.ptx(capability)
        assert not re.search(r"\bfma\b|approx|\.local|\bcall\b", ptx)
        assert "add.rn.f64" in ptx
