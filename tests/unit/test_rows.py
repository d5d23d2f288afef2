"""Gradients of some rows: the lazy form, the exact one, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import scipy.sparse

import fusedopt as fo
from exactness import DEFAULTS, Array
from fusedopt.arrays import rows as rows_module
from fusedopt.system.isa import isas
from fusedopt.verify import STORAGES, variants

ROWS, LENGTH = 301, 256
BACKENDS = ("native", "numba", "reference")
ELEMENTWISE = {name: rule for name, rule in DEFAULTS.items() if rule.program.phases == 1}

rng = np.random.default_rng(23)
every_rule = pytest.mark.parametrize("rule", ELEMENTWISE.values(), ids=ELEMENTWISE)


def draw(*shape: int, dtype: Any = np.float32) -> Array:
    drawn: Array = rng.standard_normal(shape).astype(dtype)
    return drawn


def some(count: int = 40, dtype: Any = np.float32, length: int = LENGTH) -> fo.Rows:
    """Rows in no order, each once."""
    return fo.Rows(rng.permutation(ROWS)[:count], draw(count, length, dtype=dtype))


@pytest.mark.parametrize("length", [1, 37, 256, 700])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@every_rule
def test_the_touched_rows_take_a_dense_step_and_the_others_none(
    rule: fo.Rule, dtype: Any, length: int
) -> None:
    p = draw(ROWS, length, dtype=dtype)
    opt = fo.Optimizer(p, rule)
    opt.step(draw(ROWS, length, dtype=dtype))
    for _ in range(3):
        given = some(dtype=dtype, length=length)
        hessian = fo.Rows(given.indices, draw(40, length, dtype=dtype))
        before = {"p": p.copy(), **copy.deepcopy(opt.state["params"])}
        states = [opt.state["params"][name][given.indices] for name in rule.states]
        expected = [p[given.indices], *states]
        t = opt.step_count + 1
        estimate = hessian.values if rule.takes_hessian else None
        fo.update(rule, t, expected[0], given.values, *states, hessian=estimate)
        opt.step(given, hessian=hessian if rule.takes_hessian else None)
        others = np.setdiff1d(np.arange(ROWS), given.indices)
        arrays = [p, *(opt.state["params"][name] for name in rule.states)]
        for name, array, want in zip(before, arrays, expected, strict=True):
            assert array[given.indices].tobytes() == want.tobytes(), name
            assert array[others].tobytes() == before[name][others].tobytes(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", STORAGES)
def test_every_storage_verified(way: str, backend: str) -> None:
    name, options = STORAGES[way]
    dtype = ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
    p, copied = draw(ROWS, LENGTH, dtype=dtype), draw(ROWS, LENGTH, dtype=dtype)
    opt = fo.Optimizer(
        p, fo.AdamW(weight_decay=0.1), verify=True, copy_out=copied, ema=0.9, clip_norm=1.0,
        backend=backend, **options,
    )  # fmt: skip
    # Then no state is zero, and most of them stay as they are.
    opt.step(fo.Rows(np.arange(ROWS), draw(ROWS, LENGTH, dtype=dtype)))
    for _ in range(2):
        given, kept = some(dtype=dtype), copied.copy()
        opt.step(given)
        others = np.setdiff1d(np.arange(ROWS), given.indices)
        assert copied[others].tobytes() == kept[others].tobytes()


@pytest.mark.parametrize("zero_grads", [False, True])
@pytest.mark.parametrize("way", STORAGES)
@every_rule
def test_exact_rows_have_the_bits_of_dense_steps(rule: fo.Rule, way: str, zero_grads: bool) -> None:
    name, options = STORAGES[way]
    dtype = ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
    p = draw(ROWS, LENGTH, dtype=dtype)
    q = p.copy()
    lr = 0.1 if hasattr(rule, "warmup_steps") else lambda t: 0.1 / t  # unless it takes none
    rule = type(rule)(lr=lr, weight_decay=0.1, decay="l2")
    every = {"clip_norm": 0.5, "ema": 0.8, "seed": 5, "zero_grads": zero_grads, **options}
    sparse = fo.Optimizer(p, rule, exact=True, **every)
    dense = fo.Optimizer(q, rule, **every)
    for step in range(6):
        given = some(dtype=dtype)
        whole = np.zeros((ROWS, LENGTH), dtype)
        whole[given.indices] = given.values
        refreshed = rule.takes_hessian and step % 2
        hessian = fo.Rows(given.indices, draw(40, LENGTH)) if refreshed else None
        curvature = np.zeros((ROWS, LENGTH), np.float32) if refreshed else None
        if refreshed and hessian is not None and curvature is not None:
            curvature[given.indices] = hessian.values
        sparse.catch_up({"params": given.indices})
        assert p[given.indices].tobytes() == q[given.indices].tobytes()
        one = sparse.step(given, hessian=hessian)
        two = dense.step(whole, hessian=curvature)
        assert one == two
        assert np.any(given.values) == (not zero_grads)
    sparse.catch_up()
    assert sparse.fingerprint() == dense.fingerprint()
    assert sparse.step_count == dense.step_count == 6
    sparse.catch_up()  # nothing is left to do
    whole = draw(ROWS, LENGTH, dtype=dtype)
    sparse.step(whole.copy())  # a whole gradient is welcome now
    dense.step(whole)
    assert sparse.fingerprint() == dense.fingerprint()


@pytest.mark.parametrize("rule", [r for c in fo.RULES.values() for r in variants(c)], ids=repr)
def test_exact_rows_of_every_variant(rule: fo.Rule) -> None:
    if rule.program.phases > 1:
        with pytest.raises(ValueError, match=r"(updates matrices|measures parameters) as a whole"):
            fo.Optimizer(draw(ROWS, 8), rule).step(some(length=8))
        return
    p = draw(ROWS, 8)
    q = p.copy()
    sparse, dense = fo.Optimizer(p, rule, exact=True), fo.Optimizer(q, rule)
    for _ in range(4):
        given = some(length=8)
        whole = np.zeros((ROWS, 8), np.float32)
        whole[given.indices] = given.values
        sparse.catch_up({"params": given.indices})
        sparse.step(given)
        dense.step(whole)
    sparse.catch_up()
    assert sparse.fingerprint() == dense.fingerprint()


def test_rows_that_were_not_caught_up_are_refused() -> None:
    params = {"e": draw(10, 4), "b": draw(3)}
    opt = fo.Optimizer(params, fo.Adam(), exact=True, ema=0.9)
    grads = {"e": fo.Rows(np.array([1, 2]), draw(2, 4)), "b": draw(3)}
    opt.step(grads)
    opt.step(grads)
    before = opt.fingerprint()
    stale = {"e": fo.Rows(np.array([2, 7]), draw(2, 4)), "b": draw(3)}
    with pytest.raises(ValueError, match=r"e: row 7 has missed 2 steps; call catch_up\(\{'e'"):
        opt.step(stale)
    with pytest.raises(ValueError, match="row 0 has missed 2 steps"):
        opt.step({"e": draw(10, 4), "b": None})
    for refused in (
        opt.state_dict,
        opt.sync,
        lambda: opt.replace(eps=1.0),
        opt.averaged,
    ):
        with pytest.raises(RuntimeError, match=r"rows of e have missed steps; call catch_up\(\)"):
            refused()
    assert opt.fingerprint() == before
    opt.catch_up({"e": np.array([7, 7])})
    opt.step(stale)
    with pytest.raises(ValueError, match=r"catch_up: expected paths of leaves such as 'e'"):
        opt.catch_up({"x": np.array([1])})
    with pytest.raises(ValueError, match=r"catch_up\['e'\]: expected integers in \[0, 10\)"):
        opt.catch_up({"e": np.array([10])})
    opt.catch_up()
    opt.replace(eps=1.0)
    opt.state_dict()
    with pytest.raises(RuntimeError, match="make the optimizer with exact=True"):
        fo.Optimizer(params, fo.Adam()).catch_up()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_duplicates_are_added_up_first_in_order(dtype: Any) -> None:
    indices = np.array([5, 3, 5, 0, 5, 3])
    values = (draw(6, 33) * 10.0 ** rng.integers(-3, 4, (6, 33))).astype(dtype)
    p = np.zeros((7, 33), np.float32)
    q = p.copy()
    wide = values.astype(np.float32)
    whole = np.zeros((7, 33), np.float32)
    whole[0], whole[3], whole[5] = wide[3], wide[1] + wide[5], wide[0] + wide[2] + wide[4]
    info = fo.Optimizer(p, fo.SGD(lr=1.0), stats=True).step(fo.Rows(indices, values))
    fo.Optimizer(q, fo.SGD(lr=1.0)).step(whole)
    assert p.tobytes() == q.tobytes()
    assert info.grad_norm == pytest.approx(fo.global_norm(whole), rel=1e-13)
    if dtype is np.float32:
        assert fo.global_norm(fo.Rows(indices, values)) == fo.global_norm(whole[[0, 3, 5]])


def test_threads_and_instruction_sets_change_no_bit() -> None:
    p, given = draw(30_000, 64), fo.Rows(rng.permutation(30_000)[:9000], draw(9000, 64))
    found = set()
    isa, threads = fo.get_isa(), fo.get_threads()
    try:
        for level in isas():
            for count in (1, 2, 3):
                fo.set_isa(level)
                fo.set_threads(count)
                q = p.copy()
                opt = fo.Optimizer(q, fo.AdamW(), clip_norm=0.1, stats=True)
                found.add((str(opt.step(given)), opt.fingerprint()))
    finally:
        fo.set_isa(isa)
        fo.set_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize("make", [scipy.sparse.csr_array, scipy.sparse.csr_matrix])
def test_csr_matrices(make: Any) -> None:
    whole = np.zeros((50, 12), np.float32)
    whole[[4, 40]] = draw(2, 12)
    whole[4, 3] = 0
    p, q = np.ones((50, 12), np.float32), np.ones((50, 12), np.float32)
    opt = fo.Optimizer(p, fo.Adam(weight_decay=0.1, decay="decoupled"), zero_grads=True)
    sparse = make(whole)
    opt.step(sparse)
    assert not sparse.data.any()
    fo.Optimizer(q, fo.Adam(weight_decay=0.1, decay="decoupled")).step(
        fo.Rows(np.array([4, 40]), whole[[4, 40]])
    )
    assert p.tobytes() == q.tobytes()
    assert fo.global_norm(make(whole)) == pytest.approx(np.linalg.norm(whole), rel=1e-6)


def test_zero_grads_zeroes_the_values() -> None:
    for indices in (np.array([3, 1]), np.array([3, 3])):
        given = fo.Rows(indices, draw(2, 5))
        fo.Optimizer(draw(6, 5), fo.SGD(), zero_grads=True).step(given)
        assert not given.values.any()


def test_values_that_cannot_be_zeroed() -> None:
    given = fo.Rows(np.array([1, 3]), draw(2, 5))
    given.values.flags.writeable = False
    opt = fo.Optimizer(draw(6, 5), fo.SGD(), zero_grads=True)
    for act in (opt.step, opt.accumulate):
        with pytest.raises(ValueError, match="read-only, and zero_grads is to zero it"):
            act(given)
    with pytest.raises(RuntimeError, match="nothing was accumulated"):
        opt.step()


def test_micro_batches_of_rows() -> None:
    params = {"e": draw(20, 6), "w": draw(4, 4)}
    twin = copy.deepcopy(params)
    opt, want = fo.Optimizer(params, fo.Adam()), fo.Optimizer(twin, fo.Adam())
    one, two = (fo.Rows(rng.integers(0, 20, 9), draw(9, 6)) for _ in range(2))
    w = draw(4, 4)
    opt.accumulate({"e": one, "w": w})
    kept = two.values.copy()
    opt.accumulate({"e": two, "w": None})
    two.values[...] = np.nan  # they were taken already
    with pytest.raises(ValueError, match="either Rows or whole gradients"):
        opt.accumulate({"e": draw(20, 6), "w": None})
    opt.step()
    table = np.zeros((2, 20, 6), np.float32)
    for k, (indices, values) in enumerate(((one.indices, one.values), (two.indices, kept))):
        for i, value in zip(indices, values, strict=True):
            table[k, i] += value
    touched = np.union1d(one.indices, two.indices)
    want.step({"e": fo.Rows(touched, (table[0] + table[1])[touched]), "w": w})
    assert opt.fingerprint() == want.fingerprint()


def test_no_rows_and_nothing_but_rows() -> None:
    p = draw(5, 3)
    opt = fo.Optimizer(p, fo.Adam(), clip_norm=1.0)
    before = p.copy()
    info = opt.step(fo.Rows(np.zeros(0, np.int64), np.zeros((0, 3), np.float32)))
    assert (info.step, info.grad_norm) == (1, 0.0)
    assert p.tobytes() == before.tobytes()
    vector = np.zeros(9)
    fo.Optimizer(vector, fo.SGD(lr=1.0)).step(fo.Rows(np.array([8, 2]), np.array([1.0, 2.0])))
    np.testing.assert_array_equal(vector, [0, 0, -2, 0, 0, 0, 0, 0, -1])


BAD = [
    (([1, 2], np.ones((2, 3))), TypeError, r"grads\.indices: expected an ndarray of integers"),
    ((np.array([1.0]), np.ones((1, 3))), TypeError, r"integers, got float64"),
    ((np.array([[1]]), np.ones((1, 3))), ValueError, r"expected one dimension"),
    ((np.array([1, 5]), np.ones((2, 3))), ValueError, r"integers in \[0, 5\), got 5 at 1"),
    ((np.array([-1]), np.ones((1, 3))), ValueError, r"got -1 at 0"),
    ((np.array([1]), np.ones((2, 3))), ValueError, r"values: expected the shape \(1, 3\)"),
    ((np.array([1]), np.ones((1, 3), int)), TypeError, r"grads\.values: expected float32"),
    ((np.array([1]), [[1.0, 2.0, 3.0]]), TypeError, r"expected an ndarray"),
]


@pytest.mark.parametrize(("parts", "kind", "message"), BAD)
def test_what_is_no_gradient_of_rows(parts: Any, kind: type[Exception], message: str) -> None:
    p = np.ones((5, 3))
    opt = fo.Optimizer(p, fo.Adam())
    with pytest.raises(kind, match=message):
        opt.step(fo.Rows(*parts))
    assert (p == 1).all()
    assert opt.step_count == 0


def test_storages_that_cannot_be_split() -> None:
    given = fo.Rows(np.array([1]), draw(1, 100))
    for options, message in (
        ({"state_dtype": "float8"}, r"blocks need rows of a multiple of \d+ elements.* 100"),
        ({"state_dtype": "bfloat16", "rounding": "stochastic"}, "random bits need rows"),
    ):
        opt = fo.Optimizer(draw(100, 100), fo.Adam(), **options)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            opt.step(given)
    fortran = np.asfortranarray(draw(100, 100))
    with pytest.raises(ValueError, match="not in C order"):
        fo.Optimizer(fortran, fo.Adam()).step(given)
    with pytest.raises(ValueError, match=r"the parameter has no rows"):
        fo.Optimizer(np.array(1.0), fo.Adam()).step(fo.Rows(np.array([0]), np.array([1.0])))
    p = draw(100, 100)
    with pytest.raises(ValueError, match=r"grads: shares memory with params"):
        fo.Optimizer(p, fo.Adam()).step(fo.Rows(np.array([1]), p[1:2]))


def test_estimates_of_other_rows_are_refused() -> None:
    opt = fo.Optimizer(draw(5, 3), fo.Sophia())
    given = fo.Rows(np.array([1, 2]), draw(2, 3))
    for other in (fo.Rows(np.array([1, 3]), draw(2, 3)), draw(5, 3)):
        with pytest.raises(ValueError, match="hessian: expected Rows of the gradient's indices"):
            opt.step(given, hessian=other)


def test_rows_of_states_on_disk(tmp_path: Path) -> None:
    p = draw(40_000, 64)
    q, given = p.copy(), fo.Rows(rng.permutation(40_000)[:9000], draw(9000, 64))
    there = fo.Optimizer(p, fo.Adam(), state_path=tmp_path / "states", exact=True)
    here = fo.Optimizer(q, fo.Adam(), exact=True)
    for opt in (there, here):
        opt.step(given)
        opt.catch_up()
        opt.step(given)
    assert there.fingerprint() == here.fingerprint()


# Rows that come more than once, and padding


def added_one_by_one(
    indices: np.ndarray, values: np.ndarray, dtype: Any, padding: int | None
) -> dict[int, np.ndarray]:
    sums: dict[int, np.ndarray] = {}
    for index, value in zip(indices.tolist(), values.astype(dtype), strict=True):
        if index != padding:
            sums[index] = sums[index] + value if index in sums else value
    return sums


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("padding", [None, 0, 7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, np.float16])
def test_merged_rows_are_added_in_order(
    compiled: bool, padding: int | None, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(rows_module, "reason", "not built")
    for length, highest in ((1, 9), (300, 40), (64, 200), (3, 1 << 40)):
        indices = np.minimum(rng.zipf(1.3, 500), highest) * min(highest // 9, 1 << 20)
        indices[:20] = 0
        values = (draw(500, length) * 10.0 ** rng.integers(-3, 4, (500, length))).astype(dtype)
        values[0] = -0.0
        for compute in (np.dtype(np.float32), np.dtype(np.float64)):
            merged = rows_module._unique(indices, values, compute, padding)
            expected = added_one_by_one(indices, values, compute, padding)
            assert merged.rows.tolist() == sorted(expected)
            found = merged.gathered
            assert found.dtype == compute
            assert found.tobytes() == b"".join(expected[k].tobytes() for k in sorted(expected))


@pytest.mark.parametrize("zero_grads", [False, True])
def test_padding_is_as_if_it_were_not_given(zero_grads: bool) -> None:
    params = {"e": draw(20, 6)}
    twin = copy.deepcopy(params)
    indices, values = np.array([3, 7, 3, 7, 1]), draw(5, 6)
    kept = indices != 7
    opt, want = (fo.Optimizer(p, fo.Adam(), zero_grads=zero_grads) for p in (params, twin))
    for act, wanted in ((opt.accumulate, want.accumulate), (opt.step, want.step)):
        act({"e": fo.Rows(indices, values.copy(), padding_index=7)})
        wanted({"e": fo.Rows(indices[kept], values[kept])})
        if act == opt.accumulate:
            opt.step()
            want.step()
    assert opt.fingerprint() == want.fingerprint()
    padded = fo.Rows(indices, values, padding_index=7)
    assert fo.global_norm(padded) == fo.global_norm(fo.Rows(indices[kept], values[kept]))
    if zero_grads:
        opt.step({"e": padded})
        assert not values.any()
    only = fo.Rows(np.array([7, 7]), draw(2, 6), padding_index=7)
    before = params["e"].copy()
    opt.step({"e": only})
    assert params["e"].tobytes() == before.tobytes()


@pytest.mark.parametrize(
    ("padding", "error"), [(20, ValueError), (-1, ValueError), (1.0, TypeError)]
)
def test_padding_out_of_range(padding: Any, error: type[Exception]) -> None:
    opt = fo.Optimizer(draw(20, 6), fo.SGD())
    with pytest.raises(error, match=r"padding_index: expected an integer in \[0, 20\)"):
        opt.step(fo.Rows(np.array([1]), draw(1, 6), padding_index=padding))


def test_the_norm_of_rows_wants_integers() -> None:
    with pytest.raises(TypeError, match="indices: expected an ndarray of integers, got float64"):
        fo.global_norm(fo.Rows(np.array([1.5]), draw(1, 6)))
