"""Rules whose sums are those of each column: the bits of the transposed array's rows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from exactness import SERIAL
from fusedopt.system.isa import isas
from own_rules import Extremes, OwnRowLARS, RowLARS

pytest.importorskip("numba")

BACKENDS = ["native", "numba", "reference"]
NUMBERS: dict[str, Any] = {"lr": 0.5, "trust": 0.1, "weight_decay": 0.125}
SHAPES: dict[str, tuple[int, ...]] = {
    "long columns": (16_385, 3),
    "tails": (257, 5),
    "many": (560, SERIAL // 512),
    "kernels": (3, 3, 5, 6),
    "one column": (300, 1),
    "one row": (1, 9),
    "vector": (1000,),
    "number": (),
    "no columns": (5, 0),
    "empty columns": (0, 5),
}


def by_column(rule: Any) -> Any:
    """Return a rule that differs from one of rows in that its sums are those of columns."""
    return type(rule.__name__.replace("Row", "Column"), (rule,), {"over": "column"})


RULES: list[tuple[Any, dict[str, Any]]] = [
    (RowLARS, NUMBERS),
    (OwnRowLARS, NUMBERS),
    (Extremes, {}),
]
ColumnLARS, OwnColumnLARS = by_column(RowLARS), by_column(OwnRowLARS)


def tree(seed: int, dtype: Any = np.float32) -> dict[str, Any]:
    """Arrays in Fortran order."""
    rng = np.random.default_rng(seed)
    return {
        name: np.asfortranarray(rng.standard_normal(shape).astype(dtype))
        for name, shape in SHAPES.items()
    }


def transposed(values: dict[str, Any]) -> dict[str, Any]:
    return {name: a.T for name, a in values.items()}


def stepped(rule: Any, turn: Any, dtype: Any = np.float32, **options: Any) -> fo.Optimizer:
    opt = fo.Optimizer(turn(tree(0, dtype)), rule, **options)
    for step in range(3):
        opt.step(turn(tree(step + 1, dtype)))
    return opt


def contents(opt: fo.Optimizer) -> dict[str, Any]:
    """The parameters, and states by name."""
    return {
        name: (p, *[np.asarray(opt.state[name][state]) for state in sorted(opt.state[name])])
        for name, p in opt.params.items()
    }


@pytest.mark.parametrize(("rule", "numbers"), RULES, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize(
    "dtype",
    [np.float32, ml_dtypes.bfloat16, pytest.param(np.float64, marks=pytest.mark.slow)],
)
def test_columns_have_the_bits_of_rows(rule: Any, numbers: Any, dtype: Any) -> None:
    wanted = contents(stepped(rule(**numbers), transposed, dtype, threads=1))
    assert any(len(arrays) > 1 for arrays in wanted.values()) or rule is Extremes
    for options in ({}, {"threads": 1}, {"backend": "numba"}, {"verify": True}):
        found = contents(stepped(by_column(rule)(**numbers), dict, dtype, **options))
        for name, arrays in found.items():
            for mine, theirs in zip(arrays, wanted[name], strict=True):
                assert mine.T.tobytes() == theirs.tobytes(), (name, options)


@pytest.mark.parametrize("options", [{"state_dtype": "bfloat16"}, {"state_dtype": "float64"}])
@pytest.mark.parametrize("backend", ["native", "numba"])
def test_formats(options: Any, backend: str) -> None:
    wanted = contents(stepped(RowLARS(**NUMBERS), transposed, **options))
    found = contents(stepped(ColumnLARS(**NUMBERS), dict, backend=backend, **options))
    for name, arrays in found.items():
        for mine, theirs in zip(arrays, wanted[name], strict=True):
            assert mine.T.tobytes() == theirs.tobytes(), name


@pytest.mark.parametrize("isa", isas())
def test_every_instruction_set_has_the_same_bits(isa: str) -> None:
    wanted = stepped(ColumnLARS(**NUMBERS), dict).fingerprint()
    before = fo.get_isa()
    try:
        fo.set_isa(isa)
        assert stepped(ColumnLARS(**NUMBERS), dict).fingerprint() == wanted
    finally:
        fo.set_isa(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [ColumnLARS, OwnColumnLARS])
def test_it_is_the_textbook_of_each_column(rule: Any, backend: str) -> None:
    opt = stepped(rule(**NUMBERS, decay="decoupled"), dict, backend=backend)
    for name, start in tree(0).items():
        if start.ndim < 2 or not start.size:
            continue
        p = start.astype(np.float64)
        v = np.zeros_like(p)
        axes = tuple(range(p.ndim - 1))
        for step in range(3):
            g = tree(step + 1)[name].astype(np.float64)
            norms = (np.sqrt(np.sum(x * x, axis=axes, keepdims=True)) for x in (p, g))
            v = 0.9 * v + 0.5 * 0.1 * next(norms) / next(norms) * g
            p = p - v - 0.5 * 0.125 * p
        np.testing.assert_allclose(opt.params[name], p, rtol=8e-7, atol=4e-6 * np.abs(p).max())


def test_one_tensor_alone_and_from_a_checkpoint(tmp_path: Any) -> None:
    wanted, rule = stepped(ColumnLARS(**NUMBERS), dict), ColumnLARS(**NUMBERS)
    for name, p in tree(0).items():
        states = rule.init(p)
        for t in (1, 2, 3):
            fo.update(rule, t, p, tree(t)[name], *states)
        assert p.tobytes("A") == wanted.params[name].tobytes("A"), name
    first = fo.Optimizer(tree(0), rule)
    first.step(tree(1))
    first.save(tmp_path / "saved.safetensors")
    second = fo.Optimizer(tree(5), rule)
    second.load(tmp_path / "saved.safetensors")
    for t in (2, 3):
        second.step(tree(t))
    assert second.fingerprint() == wanted.fingerprint()


@pytest.mark.parametrize("backend", BACKENDS)
def test_refusals(backend: str) -> None:
    p, rule = np.ones((6, 5)), ColumnLARS(**NUMBERS)
    for wrong, axes in ((p, r"\(0, 1\)"), (np.ones((4, 3, 2)), r"\(0, 1, 2\)")):
        message = (
            rf"ColumnLARS takes sums over columns, .* the order {axes}; pass a copy in Fortran"
            " order, made with np.asfortranarray, and gradients alike"
        )
        with pytest.raises(ValueError, match=message):
            fo.Optimizer(wrong, rule, backend=backend)
        with pytest.raises(ValueError, match=message):
            rule.init(wrong)
    fo.Optimizer(np.ones((5, 1)), rule, backend=backend).step(np.ones((5, 1)))
    # One row of one column more is in both orders, and still no table with rows.
    opt = fo.Optimizer(np.ones((1, 5)), rule, backend=backend)
    with pytest.raises(ValueError, match="ColumnLARS measures parameters as a whole, not some"):
        opt.step(fo.Rows(np.array([0]), np.ones((1, 5))))
    assert opt.step_count == 0
    blocks: Any = {"state_dtype": "float8"}
    with pytest.raises(
        ValueError, match=r"takes sums over columns, but v is .* need columns of a mu.* have 100"
    ):
        fo.Optimizer(np.ones((100, 64), np.float32, order="F"), rule, backend=backend, **blocks)
    unlike = type("Unlike", (OwnColumnLARS,), {"measured": lambda self, t, lr, sums: sums[0]})(
        lr=0.1
    )
    with pytest.raises(TypeError, match=r"over = 'column' each sum is an array with a number for"):
        fo.Optimizer(np.ones(3), unlike, backend=backend)


def test_what_says_so() -> None:
    opt = fo.Optimizer(np.ones((3, 2), order="F"), ColumnLARS(**NUMBERS))
    assert "with sums of each column" in opt.describe()
    assert "with sums of each column" in fo.Optimizer(np.ones(3), OwnColumnLARS(lr=0.1)).describe()
