"""Gradients of some rows on Numba's CUDA simulator: `test_cuda.py` runs this in another process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from devices import Exported, OnDevice
from exactness import DEFAULTS, Array
from formatted import BLOCKED, arrays_of, assert_same, draw
from fusedopt.arrays import storage
from fusedopt.backends.cuda import launching

COUNT = 23
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
ELEMENTWISE = {name: rule for name, rule in DEFAULTS.items() if rule.program.phases == 1}


@pytest.fixture(autouse=True)
def quantized_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "QUANTIZED_FROM", 500)


def chosen(t: int) -> list[int]:
    """Rows in no order; from the second step on some come twice and thrice."""
    return [[22, 3, 0, 7], [5, 22, 5, 1, 5, 1], [], [4, 2, 4]][t]


def run(
    rule: fo.Rule,
    backend: str,
    length: int,
    p: np.dtype = F32,
    g: np.dtype = F32,
    copies: Any = None,
    **options: Any,
) -> Any:
    """All that there is after four steps of some rows, beside a leaf with whole gradients."""
    wrap: Any = OnDevice if backend == "cuda" else lambda a: a
    mine = {"table": draw(0, (COUNT, length), p), "b": draw(1, 40, p)}
    copied = None if copies is None else {"table": draw(2, (COUNT, length), copies), "b": None}
    optimizer = fo.Optimizer(
        {k: wrap(a) for k, a in mine.items()},
        rule,
        copy_out=copied and {**copied, "table": wrap(copied["table"])},
        backend=backend,
        **options,
    )
    told = []
    for t in range(4):
        indices = np.array(chosen(t), np.int64)
        values = draw(10 + t, (indices.size, length), g)
        grads: dict[str, Any] = {"table": fo.Rows(indices, wrap(values)), "b": wrap(draw(t, 40, g))}
        hessian = None
        if rule.takes_hessian and t != 3:
            order = np.argsort(indices, kind="stable")
            estimates = fo.Rows(indices[order], wrap(draw(20 + t, values.shape, g)[order]))
            hessian = {"table": estimates, "b": None}
        info = optimizer.step(grads, hessian=hessian)
        told.append((info.step, info.grad_norm, info.clip_scale))
        if options.get("zero_grads"):
            assert not values.any()
    found = {**mine, **({} if copied is None else {"copy": copied["table"]})}
    for path, state in optimizer.state.items():
        found |= {f"{path}/{name}": a.copy() for name, a in arrays_of(state).items()}
    return found, told


def compared(rule: fo.Rule, length: int, *rest: Any, **options: Any) -> None:
    (found, told), (wanted, known) = (run(rule, b, length, *rest, **options) for b in BACKENDS)
    assert_same(found, wanted, f"{rule} {length}")
    assert told == known


BACKENDS = ("cuda", "native")


@pytest.mark.parametrize("rule", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_every_rule(rule: fo.Rule) -> None:
    for length in (1, 37):
        compared(rule, length)


@pytest.mark.parametrize(("p", "g"), [(F64, F32), (BF16, BF16), (F16, F64), (F32, BF16)])
def test_dtypes(p: np.dtype, g: np.dtype) -> None:
    compared(fo.AdamW(weight_decay=0.1), 16, p, g, F16, clip_value=0.5, ema=0.9, zero_grads=True)


@pytest.mark.parametrize("options", [{"rounding": "kahan"}, {"master": "split16"}], ids=str)
def test_parameters_of_two_parts(options: dict[str, Any]) -> None:
    compared(fo.AdamW(), 24, BF16, F32, **options)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("format", [*BLOCKED, "bfloat16"])
def test_formats(format: str, rounding: str) -> None:
    compared(fo.Lion(), 256, BF16, F32, state_dtype=format, rounding=rounding)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_norms(dtype: np.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    compared(fo.SGD(), 3001, dtype, dtype, clip_norm=0.5)
    compared(fo.AdamW(), 9, BF16, dtype, clip_norm=0.5, skip_nonfinite=True)


def test_segments() -> None:
    """The segments that rows touch, and which rows these are."""
    for rows, length, unit in (([0, 3, 9], 3, 4), ([1], 40, 4), ([2, 3, 7], 1, 4), ([], 5, 4)):
        found = segments(rows, length, unit)
        wanted: dict[int, list[int]] = {}
        for k, row in enumerate(rows):
            for segment in sorted({i // unit for i in range(row * length, (row + 1) * length)}):
                wanted.setdefault(segment, []).append(k)
        assert found == {segment: (ks[0], ks[-1] + 1) for segment, ks in wanted.items()}


def segments(rows: Sequence[int], length: int, unit: int) -> dict[int, tuple[int, int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "SEGMENT", unit)
        parts = launching.segments_of(np.array(rows, np.int64), length, 5)
    return {start // unit: (first - 5, last - 5) for start, first, last in parts}


class Tensor:
    """Indices on a device, as PyTorch has them."""

    is_cuda = True

    def __init__(self, array: Array) -> None:
        self._array = array

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> Array:
        return self._array


Tensor.__module__ = "torch"


def test_indices_on_the_device() -> None:
    p, values = draw(0, (5, 3), F32), draw(1, (2, 3), F32)
    q = p.copy()
    indices: Any = Tensor(np.array([4, 1]))
    fo.Optimizer(OnDevice(p), fo.SGD()).step(fo.Rows(indices, OnDevice(values)))  # type: ignore[arg-type]
    fo.Optimizer(q, fo.SGD()).step(fo.Rows(np.array([4, 1]), values))
    assert_same({"p": p}, {"p": q})


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "values on the host": (np.ones((1, 2), F32), TypeError, "values: expected an array on a CUDA"),
    "shape": (OnDevice(np.ones((1, 3), F32)), ValueError, r"values: expected the shape \(1, 2\)"),
    "device": (Exported(np.ones((1, 2), F32), 1), ValueError, "is on the device 1, and its param"),
    "order": (OnDevice(np.ones((4, 2), F32)[::2][:1]), ValueError, "dense|C order"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    values, error, match = REFUSED[name]
    if name == "order":
        indices, values = np.array([1, 2]), OnDevice(np.asfortranarray(np.ones((2, 2), F32)))
    else:
        indices = np.array([1])
    optimizer = fo.Optimizer(OnDevice(np.ones((4, 2), F32)), fo.SGD())
    with pytest.raises(error, match=match):
        optimizer.step(fo.Rows(indices, values))
    assert optimizer.step_count == 0


def test_what_rows_are_refused() -> None:
    p = np.ones((4, 2), F32)
    optimizer = fo.Optimizer(OnDevice(p), fo.SGD())
    with pytest.raises(ValueError, match=r"accumulate\(Rows\): is not supported by the backend 'c"):
        optimizer.accumulate(fo.Rows(np.array([1]), OnDevice(np.ones((1, 2), F32))))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shares memory with params"):
        optimizer.step(fo.Rows(np.array([1]), OnDevice(p[1:2])))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected integers in"):
        optimizer.step(fo.Rows(np.array([4]), OnDevice(np.ones((1, 2), F32))))  # type: ignore[arg-type]
    assert (p == 1).all()
