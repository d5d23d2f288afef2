"""The backend that Numba compiles: the same bits as the compiled core, on any threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import exactness
import formatted
import fusedopt as fo
from exactness import DEFAULTS, Array, assert_same_bits, case, operands, run_python, stepped
from formatted import WAYS, assert_same, draw, run
from fusedopt.backends import BACKENDS
from fusedopt.backends.numba import pool, tables
from fusedopt.system import threads

pytest.importorskip("numba")

UNDECAYED = {name: rule for name, rule in exactness.RULES.items() if not rule.weight_decay}
DECAYED = {k: r for k, r in exactness.RULES.items() if k.startswith(("adamw-", "muon-"))}
"""What the loop does with weight decay is the same text for every kernel."""


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four threads and many small parts, whatever the machine and the tensors."""
    before = threads.in_use()
    threads.use(4)
    monkeypatch.setattr(tables, "SERIAL", 1)
    monkeypatch.setattr(tables, "SMALLEST_PART", 300)
    yield
    threads.use(before)


COMPILED_LONG = {
    *("dynamic8", "dynamic4", "mixed states", "mixed quantised", "wide gradients"),
    *("narrow gradients", "copies"),
}
"""Ways with block formats beside float8, each of which takes Numba two to four seconds."""


def way_of(name: str, *more: Any) -> Any:
    return pytest.param(name, *more, marks=[pytest.mark.slow] * (name in COMPILED_LONG))


VARIANTS = UNDECAYED | DECAYED


@pytest.mark.parametrize("rule", VARIANTS.values(), ids=VARIANTS)
def test_every_variant(rule: fo.Rule) -> None:
    for awkward in ((), operands(rule)):
        c = case(rule, 259, np.float32, awkward=awkward)
        (got,), (want,) = stepped(rule, [c], backend="numba"), stepped(rule, [c])
        assert_same_bits(got, want, str(rule))


@pytest.mark.parametrize("rule", UNDECAYED.values(), ids=UNDECAYED)
def test_every_kernel_in_float64(rule: fo.Rule) -> None:
    c = case(rule, 259, np.float64, awkward=operands(rule))
    (got,), (want,) = stepped(rule, [c], backend="numba"), stepped(rule, [c])
    assert_same_bits(got, want, str(rule))


@pytest.mark.parametrize("name", formatted.RULES)
@pytest.mark.parametrize("way", [way_of(name) for name in WAYS])
def test_every_format(way: str, name: str, crowded: None) -> None:
    leaves = {"a": 0, "b": 1, "c": 255, "d": 4096, "e": 5003, "f": 4096 + 128}
    rule = formatted.RULES[name]
    assert_same(run(rule, WAYS[way], leaves, backend="numba"), run(rule, WAYS[way], leaves))
    some = {"d": 4096, "e": 5003}
    got, want = (
        run(rule, WAYS[way], some, special=True, backend=backend) for backend in ("numba", "native")
    )
    assert_same(got, want, "with an infinity and a NaN")


@pytest.mark.parametrize("rule", DEFAULTS.values(), ids=DEFAULTS)
def test_thread_counts(rule: fo.Rule, crowded: None) -> None:
    cases = [case(rule, n, np.float32, seed=n) for n in (3, 256, 100_003, 0, 777)]
    want = stepped(rule, cases)
    for count in (1, 2, 3, 4):
        for got, expected in zip(
            stepped(rule, cases, backend="numba", threads=count), want, strict=True
        ):
            assert_same_bits(got, expected, f"{count} threads")


def test_parts_are_handed_out(crowded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def watched(parts: int, threads: int, run: Callable[[int], None]) -> None:
        seen.append((parts, threads))
        pool.parallel_for(parts, threads, run)

    monkeypatch.setattr(tables, "parallel_for", watched)
    p = np.zeros(10_000, np.float32)
    fo.Optimizer(p, fo.SGD(lr=1.0), backend="numba", threads=3).step(np.ones_like(p))
    assert seen == [(33, 3)]
    assert (p == -1).all()


@pytest.mark.parametrize(
    "way",
    [
        *("float32", "split and copies"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("float64", "bfloat16")),
    ],
)
@pytest.mark.parametrize("name", ["adamw", "sophia"])
@pytest.mark.parametrize("clip", ["clip_norm", "clip_value"])
def test_all_that_a_step_does_besides(clip: str, name: str, way: str, crowded: None) -> None:
    rule, w = formatted.RULES[name], WAYS[way]
    found = []
    for backend in ("native", "numba"):
        params = {"a": draw(0, 40_001, w.p), "b": draw(1, 300, w.p), "c": draw(2, 0, w.p)}
        options = {clip: 0.25, "ema": 0.9, "stats": True, **w.options}
        optimizer = fo.Optimizer(params, rule, backend=backend, **options)
        told = []
        for t in range(3):
            grads = {k: draw(10 + t, p.shape, w.g) for k, p in params.items()}
            for _ in range(2):
                optimizer.accumulate({k: g.copy() for k, g in grads.items()})
            told.append(optimizer.step(grad_scale=2.0))
        found.append((told, formatted.held(optimizer)))
    assert_same(found[1][1], found[0][1])
    assert found[1][0] == found[0][0]


ROWS = [(way, n) for way in ("float32", "float64", "bfloat16") for n in (1, 37, 700)]
BLOCKS = [way_of("dynamic8", 256), way_of("dynamic4", 512)]


@pytest.mark.parametrize(("way", "length"), [*ROWS, *BLOCKS])
@pytest.mark.parametrize("name", ["adamw", "sophia"])
def test_gradients_of_some_rows(name: str, way: str, length: int, crowded: None) -> None:
    rule, w = formatted.RULES[name], WAYS[way]
    found = []
    for backend in ("native", "numba"):
        p, rng = draw(0, (300, length), w.p), np.random.default_rng(0)
        options = {"clip_norm": 0.5, "ema": 0.9, "stats": True, "zero_grads": True, **w.options}
        optimizer = fo.Optimizer({"p": p}, rule, backend=backend, **options)
        told = []
        for t in range(3):
            indices = rng.integers(0, 300, 90)
            grads, estimates = (
                {"p": fo.Rows(indices, draw(k + t, (90, length), w.g))} for k in (10, 20)
            )
            hessian = estimates if rule.takes_hessian and t != 1 else None
            told.append(optimizer.step(grads, hessian=hessian))
            assert not grads["p"].values.any()
        found.append((told, formatted.held(optimizer)))
    assert_same(found[1][1], found[0][1])
    assert found[1][0] == found[0][0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30, 1e-200, 1e200, np.inf])
def test_norms(size: float, dtype: Any, crowded: None) -> None:
    arrays = [draw(n, n, np.float64) for n in (0, 1, 17, 40_001)]
    with np.errstate(all="ignore"):
        arrays = [np.asarray(a * size, dtype) for a in arrays]
    native, own = (BACKENDS[name].sums_of_squares(arrays) for name in ("native", "numba"))
    np.testing.assert_array_equal(own, native)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_muons_matrix_products(dtype: Any) -> None:
    params = {"a": draw(0, (40, 24), dtype), "b": draw(1, (16, 50), dtype), "c": draw(2, 9, dtype)}
    rules = {"c": fo.AdamW(lr=0.01), "*": fo.Muon(lr=0.01, weight_decay=0.1)}
    results = []
    for backend in ("native", "numba"):
        mine = {name: p.copy() for name, p in params.items()}
        optimizer = fo.Optimizer(mine, rules, backend=backend)
        for t in range(3):
            optimizer.step({k: draw(10 + t, p.shape, dtype) for k, p in params.items()})
        results.append(mine)
    for name, p in results[0].items():
        np.testing.assert_allclose(results[1][name], p, rtol=1e-4, atol=1e-6)
    assert "Muon of shape (40, 24)" in optimizer.describe()


def test_optimizers_of_several_threads(crowded: None) -> None:
    c = case(fo.AdamW(), 50_000, np.float32)
    want = stepped(fo.AdamW(), [c])[0]
    results: list[tuple[Array, ...]] = []

    def work() -> None:
        for _ in range(5):
            results.append(stepped(fo.AdamW(), [c], backend="numba")[0])

    several = [threading.Thread(target=work) for _ in range(4)]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()
    assert len(results) == 20
    for got in results:
        assert_same_bits(got, want, "")


FORK = """
import os, numpy as np, fusedopt as fo
from fusedopt.system import threads
threads.use(4)
p = np.zeros(1_000_000, np.float32)
optimizer = fo.Optimizer(p, fo.Momentum(), backend="numba")
optimizer.step(np.ones_like(p))
child = os.fork()
optimizer.step(np.ones_like(p))
if child:
    _, status = os.waitpid(child, 0)
    assert status == 0
print(optimizer.fingerprint(), flush=True)
"""


@pytest.mark.slow
def test_fork_after_a_parallel_region() -> None:
    done = run_python(FORK)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    assert first == second


# ---------------------------------------------------------------- what is compiled, and kept

STEP = """
import numpy as np, fusedopt as fo
p = np.ones(3, np.float32)
fo.Optimizer(p, fo.SGD(lr=0.25), backend="numba").step(np.ones(3, np.float16))
print(p.tolist())
"""
NOWHERE = """
from numba.core import caching
for cache in (caching.CacheImpl, caching.CodeLibraryCacheImpl, caching.CompileResultCacheImpl):
    cache._locator_classes = []
"""


def stepped_apart(tmp_path: Any, before: str = "", cache: Any = None) -> None:
    done = run_python(before + STEP, {"NUMBA_CACHE_DIR": str(cache or tmp_path)})
    assert (done.returncode, done.stdout) == (0, "[0.75, 0.75, 0.75]\n"), done.stderr


@pytest.mark.slow
def test_compiled_kernels_are_kept(tmp_path: Any) -> None:
    stepped_apart(tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")}
    assert len(kept) >= 3  # the driver, the rule and the gradient's codec
    stepped_apart(tmp_path)
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")}


@pytest.mark.slow
def test_damaged_files_are_no_obstacle(tmp_path: Any) -> None:
    stepped_apart(tmp_path)
    for path in tmp_path.rglob("*.nbc"):
        path.write_bytes(b"damaged")
    stepped_apart(tmp_path)


@pytest.mark.slow
def test_nor_is_a_place_that_cannot_be_written(tmp_path: Any) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    stepped_apart(tmp_path, NOWHERE, blocked)


def test_warmup() -> None:
    from fusedopt.jit import tiles

    tiles.rule_tile.cache_clear()
    assert fo.warmup(fo.Lion(), dtype="bfloat16", backend="numba", state_dtype="float8") > 0
    compiled = tiles.rule_tile.cache_info().misses
    assert compiled == 1
    p = np.zeros((64, 64), np.float32)
    fo.Optimizer(p, fo.Lion(), backend="numba").step(p.copy())
    assert tiles.rule_tile.cache_info().misses == compiled
    with pytest.raises(ValueError, match="backend"):
        fo.warmup(fo.Lion(), backend="fortran")


# ---------------------------------------------------------------- instead of the compiled core

HIDDEN = """
import sys
sys.modules["fusedopt._core"] = None
import fusedopt as fo
assert "numba" not in sys.modules
info = fo.info()
assert info["backend"] == "numba", info
assert "could not be imported" in info["backends"]["native"]
import pytest
but = "not native and not describe and not newton_schulz"  # which name the compiled core
arguments = ["-q", "-p", "no:cacheprovider", "-W", "error", "-k", but]
sys.exit(pytest.main([*arguments, *FILES]))
"""
FILES = [
    *(f"rules/test_{name}.py" for name in ("golden", "muon")),
    *(f"unit/test_{name}.py" for name in ("optimizer", "bad_input", "hessian", "accumulate")),
]


@pytest.mark.slow
def test_the_suite_without_the_compiled_core() -> None:
    done = run_python(HIDDEN.replace("FILES", repr(FILES)), timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert " passed" in done.stdout
