"""The CUDA backend where there is no device: on Numba's simulator, and as assembly.

What a device does with it, `benchmarks/gpu.py` shows where there is one.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from exactness import ROOT, SUPPORT, TESTS, run_python
from fusedopt.arrays.formats import PLAIN, Format, compute_dtype
from fusedopt.arrays.storage import Storage
from fusedopt.backends import BACKENDS
from fusedopt.plan.extras import Extras
from fusedopt.rules import Rule

pytest.importorskip("numba")
pytest.importorskip("numba_cuda")

from fusedopt.backends.cuda import blocks, kernels, reductions, rows, stages, stats, toolkit
from fusedopt.backends.cuda.kernels import Step, Variant

pytestmark = pytest.mark.gpu

CAPABILITIES = ((8, 0), (9, 0))
LOW = ("bfloat16", "float16")


SIMULATED = {
    **{
        file: ["-m", "pytest", "-q", "--all", "-W", "ignore", "-p", "no:cacheprovider",
               "-p", "devices", file]
        for file in ("simulated.py", "simulated_arrays.py", "simulated_clipping.py",
                     "simulated_formats.py", "simulated_rows.py", "simulated_stats.py",
                     "simulated_streams.py")
    },
    "rehearsal": [str(ROOT / "benchmarks" / "gpu.py"), "--rehearse", "--output", "rows.jsonl"],
}  # fmt: skip
"""What is run on the simulator, each in a process of its own: files of tests, and the benchmark."""


@pytest.fixture(scope="module")
def simulated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[subprocess.Popen[str], Path]]]:
    """The processes of the tests that were selected, all at once, and what they print."""
    folder, running = tmp_path_factory.mktemp("simulated"), {}
    for item in request.session.items:
        case: Any = getattr(item, "callspec", None)
        name = case and case.params.get("simulation")
        if name:
            printed = folder / name
            with printed.open("w") as file:
                process = subprocess.Popen(
                    [sys.executable, *SIMULATED[name]],
                    cwd=folder if name == "rehearsal" else TESTS / "cuda_simulator",
                    env={**os.environ, **SUPPORT, "NUMBA_ENABLE_CUDASIM": "1"},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            running[name] = process, printed
    yield running
    for process, _ in running.values():
        process.kill()


@pytest.mark.parametrize("simulation", SIMULATED)
def test_on_the_simulator(simulation: str, simulated: Any) -> None:
    process, printed = simulated[simulation]
    code = process.wait(1200)
    told = printed.read_text()
    if simulation == "rehearsal":  # whose clock is no clock, so that targets of speed are missed
        lines = (printed.parent / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert {row["part"] for row in rows} == {
            "bits", "streams", "bandwidth", "formats", "matrices", "lists", "clipping", "cores"
        }, told  # fmt: skip
        assert not any(row["value"] for row in rows if row["part"] in ("bits", "streams")), told
        assert "Error" not in told
        return
    assert code == 0, told[-10000:]
    assert re.search(r"\d{2,} passed", told)
    assert "skipped" not in told


def test_a_benchmark_that_is_stopped_keeps_its_rows(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    given = ["--rehearse", "streams", "lists", "--seconds", "0", "--output", str(rows)]
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *given],
        env={**os.environ, **SUPPORT, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    assert re.search(r"stopped after \d+ s, in streams\n$", result.stdout)
    (row,) = map(json.loads, rows.read_text(encoding="utf-8").splitlines())
    assert row["part"] == "streams"


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


def variants_of(
    rule: Rule,
    p: str,
    g: str,
    storage: Storage,
    copies: Sequence[str] = ("bfloat16",),
    sums: bool = False,
    **more: Any,
) -> Iterator[Variant]:
    """The kernels of a rule's phases, for large leaves of a dtype; sums: those of sums."""
    program = Extras(**more).program(rule)
    held = PLAIN[p].dtype
    dtype = compute_dtype(held)
    formats: list[tuple[str, Format]] = [("g", PLAIN[g]), ("p", storage.parameter(held))]
    states = Extras(**more).states(rule)
    formats += [(name, storage.state(rule, name, held, 1 << 20)) for name in states]
    works = [*program.works, *itertools.chain(*stages.all_kept(program))]
    formats += [(name, PLAIN[dtype.name]) for name in works]
    if rule.takes_hessian:
        formats.append(("hessian", PLAIN[g]))
    for phase, ahead in product(range(program.phases), (False,) if sums else (True, False)):
        _, steps = stages.operations_at(program, phase, ahead, rule.takes_hessian)
        if sums:
            operations = kernels.operations_of(program, phase, rule.takes_hessian, sums)
            steps = tuple(Step.of(program, op) for op in operations)
        mirrors = tuple(PLAIN[name] for name in copies)
        if steps:
            yield Variant(steps, program.temporaries, dtype, tuple(formats), mirrors)


RULES = {name: cls for name, cls in fo.RULES.items() if not cls().host_only}
"""The rules that the backend has."""


def every_kernel() -> dict[str, Variant]:
    """One of every rule, of the formats in turn, and each rule's own variants in float32."""
    found: dict[Variant, str] = {}
    formats = [("float32",) * 3, ("float64",) * 3, ("bfloat16",) * 3]
    formats += [(low, low, "float32") for low in LOW]
    for (name, cls), (p, g, s) in product(RULES.items(), formats):
        rule = cls(weight_decay=0.1, **cls.examples[0])
        if (p, s) in (("float32",) * 2, ("bfloat16", "float32")) or name in ("adamw", "lion"):
            for k, variant in enumerate(variants_of(rule, p, g, Storage(s))):
                found.setdefault(variant, f"{name}-{k}-{p}-{s}")
    for name, cls in RULES.items():
        for j, example in enumerate(cls.examples):
            for k, variant in enumerate(variants_of(cls(**example), "float32", "float32", NATURAL)):
                found.setdefault(variant, f"{name}-{k}-example{j}")
    for variant in variants_of(fo.AdamW(), "bfloat16", "bfloat16", Storage("float32"), **AROUND):
        found.setdefault(variant, "adamw-around")
    for name, variant in kernels_of_formats().items():
        found.setdefault(variant, name)
    for variant, name in list(found.items()):
        if re.match("(adamw|lion|muon)-.-(float32|float64|bfloat16|dynamic8)", name):
            found[replace(variant, clipped=True)] = f"{name}-clipped"
    return {name: variant for variant, name in found.items()}


NATURAL = Storage()
AROUND: dict[str, Any] = {"clip_value": 1.0, "ema": 0.5}


def kernels_of_formats() -> dict[str, Variant]:
    """Some rules' kernels of every format, and of parameters of every dtype."""
    found = {}
    rules: dict[str, Rule] = {"adamw": fo.AdamW(weight_decay=0.1), "lion": fo.Lion()}
    more: dict[str, Rule] = {"muon": fo.Muon(), "amsgrad": fo.Adam(amsgrad="raw")}
    more |= {"adamuon": fo.AdaMuon(), "soap": fo.SOAP()}
    for state in ("float8", "dynamic8", "dynamic4"):
        for name, rule in (rules | more if state == "dynamic8" else rules).items():
            for k, variant in enumerate(variants_of(rule, "float32", "float32", Storage(state))):
                found[f"{name}-{k}-{state}"] = variant
    for p in ("bfloat16", "float64"):
        (found[f"adamw-{p}-dynamic8"],) = variants_of(rules["adamw"], p, p, Storage("dynamic8"))
    storages = {
        "stochastic": Storage("bfloat16", rounding="stochastic"),
        "kahan": Storage(rounding="kahan"),
        "split16": Storage(master="split16"),
        "split16-float8": Storage("float8", "split16", "stochastic"),
        "dynamic8-stochastic": Storage("dynamic8", rounding="stochastic"),
        "dynamic4-stochastic": Storage("dynamic4", rounding="stochastic"),
    }
    for where, storage in storages.items():
        for name, rule in rules.items():
            (found[f"{name}-{where}"],) = variants_of(rule, "bfloat16", "bfloat16", storage)
    return found


KERNELS = every_kernel()


@pytest.fixture(scope="module")
def assembly() -> dict[tuple[str, tuple[int, int]], str]:
    """The assembly of each kernel for each compute capability."""
    return {
        (name, capability): blocks.kernel_of(variant).ptx(capability)
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
        width = blocks.WIDTH if variant.blocked else variant.width
        wide = sum(f.bits * width >= 128 for _, f in variant.arrays)
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


def check_registers(
    kernel: toolkit.Kernel, ptx: str, capability: tuple[int, int], file: Path
) -> None:
    """No more than the kernel's limit, and nothing spilt to memory."""
    file.write_text(ptx)
    arch = "sm_{}{}".format(*capability)
    options = ["-v", f"-arch={arch}", f"-maxrregcount={kernel.registers}"]
    told = subprocess.run(
        [str(ptxas()), *options, str(file), "-o", str(file.with_suffix(".cubin"))],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in told, told
    used = re.search(r"Used (\d+) registers", told)
    assert used is not None
    assert int(used[1]) <= kernel.registers, told


with_assembler = pytest.mark.skipif(ptxas() is None, reason="needs the wheel nvidia-cuda-nvcc")


@with_assembler
def test_registers(assembly: Assembly, tmp_path: Path) -> None:
    for (name, capability), ptx in assembly.items():
        kernel = blocks.kernel_of(KERNELS[name])
        check_registers(kernel, ptx, capability, tmp_path / f"{name}.ptx")


STATS: dict[str, tuple[Rule, str, Storage]] = {
    "sophia": (fo.Sophia(), "float32", NATURAL),
    "adamw": (fo.AdamW(weight_decay=0.1), "float64", NATURAL),
    "muon": (fo.Muon(), "bfloat16", Storage(master="split16")),
    "float8": (fo.AdamW(), "bfloat16", Storage("float8", rounding="stochastic")),
    "dynamic8": (fo.AdamW(), "float32", Storage("dynamic8")),
    "dynamic4": (fo.Lion(), "bfloat16", Storage("dynamic4", rounding="kahan")),
}


@with_assembler
@pytest.mark.parametrize("name", STATS)
def test_sums_of_a_step(name: str, tmp_path: Path) -> None:
    rule, dtype, storage = STATS[name]
    found = 0
    for variant in variants_of(rule, dtype, dtype, storage, sums=True, stats=True, norms=True):
        if any(step.loop == "sum" for step in variant.steps):
            kernel = stats.sums_kernel(variant)
            for capability in CAPABILITIES:
                ptx = kernel.ptx(capability)
                assert not re.search(r"\bfma\b|approx|\.local|\bcall\b", ptx)
                assert "add.rn.f64" in ptx
                check_registers(kernel, ptx, capability, tmp_path / "sums.ptx")
                found += 1
    assert found


SQUARES = (reductions.squares_kernel, reductions.row_squares_kernel)


def test_sums_of_squares_and_norms() -> None:
    found = [reductions.totals_kernel(), reductions.guard_kernel()]
    for name in ("float32", "bfloat16", "float64"):
        dtype = compute_dtype(PLAIN[name].dtype)
        found += [f(PLAIN[name], dtype) for f in SQUARES]
    for kernel, capability in product(found, CAPABILITIES):
        ptx = kernel.ptx(capability)
        assert not re.search(r"\bfma\b|approx|\.local|\bcall\b", ptx)
        assert "add.rn.f64" in ptx


def test_sums_of_rows() -> None:
    for name, capability in product(PLAIN, CAPABILITIES):
        dtype = compute_dtype(PLAIN[name].dtype)
        ptx = rows.added_kernel(PLAIN[name], dtype).ptx(capability)
        assert not re.search(r"\bfma\b|approx|\.local|\bcall\b", ptx)
        assert f"add.rn.f{8 * dtype.itemsize}" in ptx
