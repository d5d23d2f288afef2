"""Rules whose sums are those of each row of a parameter."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from exactness import SERIAL
from fusedopt.arrays.stored import Stored
from fusedopt.system.isa import isas
from fusedopt.verification.judge import judge
from fusedopt.verification.running_error import Bounded
from own_rules import Extremes, OwnRowLARS, RowLARS

pytest.importorskip("numba")

BACKENDS = ["native", "numba", "reference"]


LENGTHS = (1, 7, 255, 257, 16385)
SHAPES: dict[str, tuple[int, ...]] = {
    **{f"rows of {n}": (3, n) for n in LENGTHS},
    "many": (SERIAL // 512, 560),
    "kernels": (6, 5, 3, 3),
    "one row": (1, 300),
    "vector": (1000,),
    "number": (),
    "no rows": (0, 5),
    "empty rows": (5, 0),
}
NUMBERS: dict[str, Any] = {"lr": 0.5, "trust": 0.1, "weight_decay": 0.125}


def tree(seed: int, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(s).astype(dtype) for name, s in SHAPES.items()}


def stepped(rule: Any, dtype: Any = np.float32, steps: int = 3, **options: Any) -> fo.Optimizer:
    opt = fo.Optimizer(tree(0, dtype), rule, **options)
    for step in range(steps):
        opt.step(tree(step + 1, dtype))
    return opt


def rows_of(values: dict[str, Any]) -> dict[str, Any]:
    """Each row as an array of its own."""
    return {
        f"{name} {k}": row.copy()
        for name, a in values.items()
        for k, row in enumerate(a.reshape(len(a), -1) if a.ndim > 1 and a.size else [a])
    }


@pytest.mark.parametrize("decay", ["l2", "decoupled", "decoupled_first", "cautious"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("rule", [RowLARS, OwnRowLARS])
def test_each_row_has_the_bits_that_it_has_alone(rule: Any, dtype: Any, decay: Any) -> None:
    alone = fo.Optimizer(rows_of(tree(0, dtype)), fo.LARS(**NUMBERS, decay=decay, maximize=True))
    for step in range(3):
        alone.step(rows_of(tree(step + 1, dtype)))
    wanted, wanted_states = alone.params, alone.state  # which are made anew each time
    by_row = rule(**NUMBERS, decay=decay, maximize=True)
    for options in ({"threads": 1}, {"threads": 2}, {"backend": "numba"}, {"verify": True}):
        opt = stepped(by_row, dtype, **options)
        for name, row in rows_of(opt.params).items():
            assert row.tobytes() == wanted[name].tobytes(), (name, options)
        states = rows_of({name: state["v"] for name, state in opt.state.items()})
        for name, row in states.items():
            assert row.tobytes() == wanted_states[name]["v"].tobytes(), (name, options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [RowLARS, OwnRowLARS])
def test_it_is_the_textbook_of_each_row(rule: Any, backend: str) -> None:
    opt = stepped(rule(**NUMBERS, decay="decoupled"), backend=backend)
    for name, start in tree(0).items():
        whole = start.astype(np.float64)
        p = whole.reshape(len(whole), -1) if whole.ndim > 1 and whole.size else whole.reshape(1, -1)
        v = np.zeros_like(p)
        for step in range(3):
            g = tree(step + 1)[name].astype(np.float64).reshape(p.shape)
            for row in range(len(p)):
                norms = np.linalg.norm(p[row]), np.linalg.norm(g[row])
                trust = 0.1 * norms[0] / norms[1] if all(norms) else 1.0
                v[row] = 0.9 * v[row] + 0.5 * trust * g[row]
            p = p - v - 0.5 * 0.125 * p
        got = opt.params[name].reshape(p.shape)
        np.testing.assert_allclose(got, p, rtol=8e-7, atol=4e-6 * np.abs(p).max(initial=0))


@pytest.mark.parametrize(
    "options", [{"state_dtype": "bfloat16"}, {"state_dtype": "float64"}], ids=str
)
@pytest.mark.parametrize(
    "dtype",
    [
        np.float32,
        *(pytest.param(d, marks=pytest.mark.slow) for d in (np.float64, ml_dtypes.bfloat16)),
    ],
)
def test_formats_have_the_same_bits_everywhere(dtype: Any, options: Any) -> None:
    wanted = stepped(RowLARS(**NUMBERS), dtype, threads=1, **options).fingerprint()
    for others in ({"threads": 2}, {"backend": "numba"}, {"verify": True}):
        for rule in (RowLARS(**NUMBERS), OwnRowLARS(**NUMBERS)):
            assert stepped(rule, dtype, **options, **others).fingerprint() == wanted, others


def test_what_has_no_elements_has_no_sums() -> None:
    wanted = stepped(Extremes()).fingerprint()  # 0 / 0 would be refused
    for options in ({"backend": "numba"}, {"verify": True}, {"stats": True}):
        assert stepped(Extremes(), **options).fingerprint() == wanted, options


@pytest.mark.parametrize("isa", isas())
def test_every_instruction_set_has_the_same_bits(isa: str) -> None:
    rule = RowLARS(**NUMBERS, nesterov=True)
    wanted = stepped(rule).fingerprint()
    before = fo.get_isa()
    try:
        fo.set_isa(isa)
        assert stepped(rule).fingerprint() == wanted
    finally:
        fo.set_isa(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_and_maxima_are_those_of_the_row(backend: str) -> None:
    p, g = np.zeros((3, 40_000)), np.ones((3, 40_000))
    g[0, 16_384] = 3.0
    g[1] *= -2.0
    g[2, -1] = np.nan
    fo.Optimizer(p, Extremes(), backend=backend).step(g)
    assert p[0] == pytest.approx(-(1 + 2 / 40_000 + 2))
    assert (p[1] == 2.0).all()
    assert np.isnan(p[2]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rule", [RowLARS(**NUMBERS), OwnRowLARS(**NUMBERS)], ids=["built in", "own"]
)
def test_rows_that_have_a_gradient_are_updated_alone(rule: Any, backend: str) -> None:
    rng = np.random.default_rng(0)
    start, values = rng.standard_normal((9, 257)), rng.standard_normal((5, 257))
    rows, other = np.array([7, 2, 7, 0, 5]), np.array([], int)
    for indices, given in ((rows, values), (other, values[:0])):
        some, whole = start.copy(), start.copy()
        g = np.zeros_like(start)
        np.add.at(g, indices, given)
        options: Any = {"backend": backend, "stats": True, "zero_grads": True, "clip_norm": 1e9}
        opt = fo.Optimizer({"w": some, "b": np.ones(3)}, rule, **options)
        info = opt.step({"w": fo.Rows(indices, given.copy()), "b": np.ones(3)})
        fo.Optimizer(whole, rule, backend=backend).step(g)
        untouched = np.setdiff1d(np.arange(9), indices)
        whole[untouched] = start[untouched]
        assert some.tobytes() == whole.tobytes()
        assert (some[indices] != start[indices]).all()
        assert info.stats is not None
        wanted = np.linalg.norm(g)
        assert info.stats["w"]["grad_norm"] == pytest.approx(wanted) if indices.size else True


@pytest.mark.parametrize("backend", ["native", "numba"])
def test_rows_catch_up(backend: str) -> None:
    start = np.random.default_rng(0).standard_normal((4, 30))
    dense, lazy = start.copy(), start.copy()
    first = fo.Optimizer(dense, RowLARS(**NUMBERS), backend=backend)
    second = fo.Optimizer(lazy, RowLARS(**NUMBERS), backend=backend, exact=True)
    for row in (0, 1, 2, 1):
        second.catch_up({"params": np.array([row])})
        g = np.zeros_like(dense)
        g[row] = row + 0.5
        first.step(g)
        second.step(fo.Rows(np.array([row]), g[[row]]))
    second.catch_up()
    assert dense.tobytes() == lazy.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_written_where_the_sums_of_one_row_are_refused(backend: str) -> None:
    class Refusing(OwnRowLARS):
        def measured(self, t: int, lr: float, sums: Any) -> tuple[Any, ...]:
            if (sums[1] > 1000).any():
                raise OverflowError("too large")
            return super().measured(t, lr, sums)

    p = {"a": np.ones((30, 20)), "b": np.ones((3, 20)), "c": np.ones(5)}
    opt = fo.Optimizer(p, Refusing(lr=0.1), backend=backend, zero_grads=True)
    opt.step({name: np.ones_like(a) for name, a in p.items()})
    before = opt.fingerprint()
    grads = {name: np.ones_like(a) for name, a in p.items()}
    grads["b"][2, 3] = 50.0
    with pytest.raises(OverflowError, match="too large"):
        opt.step(grads)
    assert opt.fingerprint() == before
    assert all(g.all() for g in grads.values())
    grads["b"][2, 3] = 1.0
    opt.step(grads)
    assert opt.step_count == 2


@pytest.mark.parametrize("backend", ["native", "numba"])
def test_scalars_that_do_not_fit_are_refused_unless_a_row_is_not_finite(backend: str) -> None:
    class Large(OwnRowLARS):
        def measured(self, t: int, lr: float, sums: Any) -> tuple[Any, ...]:
            return (1e38 * sums[0],)

    p, g = np.ones((4, 20), np.float32), np.ones((4, 20), np.float32)
    opt = fo.Optimizer(p, Large(lr=0.1), backend=backend)
    with pytest.raises(ValueError, match="is not finite in float32"):
        opt.step(g)
    assert (p == 1).all()
    p[...] = 0.1
    g[2, 0] = np.inf
    opt.step(g)
    assert np.isfinite(p[[0, 1, 3]]).all()
    p[...] = np.inf
    opt.step(g)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_orders(backend: str) -> None:
    rng = np.random.default_rng(0)
    start, g = rng.standard_normal((6, 5, 3, 3)), rng.standard_normal((6, 5, 3, 3))
    plain = start.copy()
    fo.Optimizer(plain, RowLARS(**NUMBERS), backend=backend).step(g)
    last = np.ascontiguousarray(start.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)  # channels
    fo.Optimizer(last, RowLARS(**NUMBERS), backend=backend, verify=True).step(g)
    np.testing.assert_allclose(last, plain, rtol=1e-12)
    for order, axes in (("F", "(3, 2, 1, 0)"), ("1,0,2,3", "(1, 0, 2, 3)")):
        turned = np.asfortranarray(start)
        if order != "F":
            turned = np.ascontiguousarray(start.transpose(1, 0, 2, 3)).transpose(1, 0, 2, 3)
        message = rf"takes sums over rows, .* \({axes[1:-1]}\); pass a copy in C order"
        with pytest.raises(ValueError, match=message):
            fo.Optimizer(turned, RowLARS(**NUMBERS), backend=backend)
        with pytest.raises(ValueError, match=message):
            RowLARS(**NUMBERS).init(turned)
    fo.Optimizer(np.asfortranarray(start[:1]), RowLARS(**NUMBERS), backend=backend).step(g[:1])


@pytest.mark.parametrize("backend", ["native", "numba"])
@pytest.mark.parametrize(
    "options",
    [
        {"state_dtype": "float8"},
        {"state_dtype": "dynamic4"},
        {"state_dtype": "bfloat16", "rounding": "stochastic"},
    ],
    ids=str,
)
def test_blocks_and_random_bits_that_rows_do_not_cut(options: Any, backend: str) -> None:
    start = np.random.default_rng(0).standard_normal((12, 1024)).astype(np.float32)
    found = []
    for own in (options, {**options, "threads": 1, "verify": "rounding" not in options}):
        p = start.copy()
        opt = fo.Optimizer(p, RowLARS(**NUMBERS), backend=backend, **own)
        for k in range(3):
            opt.step(start[::-1] * (k + 1))
        found.append(opt.fingerprint())
    native = fo.Optimizer(start.copy(), RowLARS(**NUMBERS), **options)
    for k in range(3):
        native.step(start[::-1] * (k + 1))
    assert {*found} == {native.fingerprint()}
    v = native.state["params"]["v"]
    v = v.dequantize() if hasattr(v, "dequantize") else v
    assert len({row.tobytes() for row in v}) == 12


def test_blocks_and_random_bits_that_rows_would_cut_are_refused() -> None:
    p = np.ones((64, 100), np.float32)
    rule = RowLARS(**NUMBERS)
    refused: Any = (
        ({"state_dtype": "float8"}, "takes sums over rows, but v is stored as float8, whose block"),
        ({"state_dtype": "bfloat16", "rounding": "stochastic"}, "whose random bits need rows of a"),
    )
    for options, message in refused:
        for make in (fo.Optimizer, fo.estimate):
            with pytest.raises(ValueError, match=message):
                make(p, rule, **options)
    with pytest.raises(ValueError, match="v is stored as dynamic8"):
        rule.init(p, "dynamic8")
    quantized = fo.LARS().init(p, "dynamic8")
    with pytest.raises(ValueError, match="v is stored as dynamic8"):
        fo.update(rule, 1, p, p.copy(), *quantized)
    for shape in ((6400,), (1, 6400)):  # one row
        fo.Optimizer(p.reshape(shape), rule, state_dtype="float8", verify=True).step(np.ones(shape))


def test_every_option_goes_with_it(tmp_path: Any) -> None:
    plain = stepped(RowLARS(**NUMBERS)).params
    copies = tree(5)
    options: Any = {"ema": 0.5, "stats": True, "clip_norm": 1e9, "copy_out": copies}
    stats = []
    for others in ({}, {"backend": "numba"}, {"verify": True}):
        opt = fo.Optimizer(tree(0), RowLARS(**NUMBERS), **options, **others)
        for step in range(3):
            stats.append(opt.step(tree(step + 1)).stats)
        for name, p in plain.items():
            assert p.tobytes() == opt.params[name].tobytes() == copies[name].tobytes(), name
    assert stats[:3] == stats[3:6] == stats[6:]
    norm = np.linalg.norm(tree(3)["many"].astype(np.float64))
    assert stats[2] is not None
    assert stats[2]["many"]["grad_norm"] == pytest.approx(norm)
    disk = stepped(RowLARS(**NUMBERS), state_path=tmp_path / "states", threads=2)
    assert all(disk.params[name].tobytes() == p.tobytes() for name, p in plain.items())


def test_a_checkpoint_goes_on(tmp_path: Any) -> None:
    wanted = stepped(RowLARS(**NUMBERS), steps=3)
    opt = stepped(RowLARS(**NUMBERS), steps=2)
    opt.save(tmp_path / "run")
    other = fo.Optimizer(tree(7), RowLARS(**NUMBERS))
    other.load(tmp_path / "run")
    other.step(tree(3))
    assert other.fingerprint() == wanted.fingerprint()


def test_parts_of_a_step_and_new_numbers() -> None:
    opt, parts = (stepped(RowLARS(**NUMBERS), steps=1) for _ in range(2))
    for each in (opt, parts):
        each.replace(trust=0.2, weight_decay=0.25)
    grads = tree(2)
    opt.step(grads)
    names = list(grads)
    parts.step_part(names[:3], [grads[name] for name in names[:3]])
    parts.step_part(names[3:], [grads[name] for name in names[3:]], last=True)
    assert opt.fingerprint() == parts.fingerprint()


def test_one_tensor_alone() -> None:
    start, g = tree(0)["kernels"], tree(1)["kernels"]
    p, whole = start.copy(), start.copy()
    rule = OwnRowLARS(**NUMBERS)
    fo.update(rule, 1, p, g, *rule.init(p))
    fo.Optimizer(whole, rule).step(g)
    assert p.tobytes() == whole.tobytes()


def test_the_reference_knows_the_sums_of_a_row_from_those_of_all() -> None:
    p, g = tree(0)["rows of 257"], tree(1)["rows of 257"]
    for rule, agrees in ((RowLARS(**NUMBERS), True), (fo.LARS(**NUMBERS), False)):
        new, v = p.copy(), np.zeros_like(p)
        fo.update(rule, 1, new, g, v)
        after = [Stored.plain(new), Stored.plain(v)]
        found = judge(RowLARS(**NUMBERS), [p, 0 * p], after, g, None, t=1, lr=0.5)
        assert all(worst.share <= 1 for worst in found) == agrees


def test_a_sign_that_is_up_to_rounding_is_judged_in_its_row() -> None:
    class RowTiger(fo.Tiger):
        over: ClassVar[Any] = "row"

        def measured(self, t: int, lr: float, sums: Any) -> tuple[Any, ...]:
            squares, count = sums
            return (lr * np.sqrt(squares / count),)

    p = np.ones((3, 6), np.float32)
    g = np.full_like(p, -0.2)
    rule = RowTiger(lr=0.1, weight_decay=0.125)
    opt = fo.Optimizer(p, rule, verify=True)
    m = opt.state["params"]["m"]
    m[...] = 0.1
    # 0.965 m + 0.035 g is about zero there, and its sign is that of its rounding.
    m[1, 2], g[1, 2] = 0.035, -0.965
    p0, g0, m0 = (Bounded.exact(a, p.dtype) for a in (p, g, m))
    new, _ = rule.reference(p0, g0, (m0,), t=1, lr=0.1)
    assert new.shape == (4, 3, 6)
    opt.step(g)


def test_what_says_so() -> None:
    opt = fo.Optimizer({"w": np.ones((3, 2)), "b": np.ones(2)}, RowLARS(lr=0.5))
    assert opt.describe().count("RowLARS: with sums of each row") == 1
    assert (
        "compiled by Numba, with sums of each row"
        in fo.Optimizer(np.ones(2), OwnRowLARS()).describe()
    )


def test_refusals() -> None:
    opt = fo.Optimizer({"w": np.ones((3, 2)), "b": np.ones(2)}, RowLARS(lr=0.5))
    with pytest.raises(ValueError, match="RowLARS measures parameters as a whole, not some"):
        opt.step({"w": None, "b": fo.Rows(np.array([1]), np.ones(1))})
    for members, message in (
        ({"over": "line"}, "over: expected 'row', 'column', 'parameter', 'group' or 'optimizer'"),
        ({"kept": ("d",)}, "kept: numbers are kept over a group or an optimizer"),
        ({"measure": None}, "`over`, `maxima` and `kept` are for rules that `measure`"),
    ):
        with pytest.raises(ValueError, match=message):
            fo.Optimizer(np.ones(3), type("Wrong", (OwnRowLARS,), members)(lr=0.1))
    for measured in (
        lambda self, t, lr, sums: (math.sqrt(sums[0]),),
        lambda self, t, lr, sums: (lr if sums[0] else 0.0,),
        lambda self, t, lr, sums: sums[0],
        lambda self, t, lr, sums: (np.ones(3),),
    ):
        for base in (OwnRowLARS, RowLARS):
            with pytest.raises(
                TypeError, match=r"measured: with over = 'row' each sum is an arr.*"
            ):
                fo.Optimizer(np.ones(3), type("Wrong", (base,), {"measured": measured})(lr=0.1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_stand_for_all_rows_and_sums_may_be_written(backend: str) -> None:
    class Writing(OwnRowLARS):
        def measured(self, t: int, lr: float, sums: Any) -> tuple[Any, ...]:
            sums[0][...] = np.nan
            return (lr * t,)

    p = np.ones((4, 3))
    fo.Optimizer(p, Writing(lr=0.5), backend=backend).step(np.ones((4, 3)))
    assert (p == 0.5).all()
