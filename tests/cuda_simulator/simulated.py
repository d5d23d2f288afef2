"""The CUDA backend's bits on Numba's simulator: `test_cuda.py` runs this in another process."""

from __future__ import annotations

import itertools
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import exactness
import fusedopt as fo
from devices import OnDevice
from exactness import (
    DEFAULTS,
    RULES,
    STEPS,
    Array,
    Case,
    Result,
    assert_same_bits,
    case,
    on_devices,
    operands,
    stepped,
)
from formatted import assert_same, draw
from fusedopt.backends.cuda import kernels
from fusedopt.backends.cuda.arrays import DeviceArray
from fusedopt.backends.cuda.matmul import Library


def on_device(rule: fo.Rule, cases: list[Case], **options: Any) -> list[Result]:
    """`exactness.stepped` on the device."""
    parameters = [c.p.copy(order="K") for c in cases]
    optimizer = fo.Optimizer([OnDevice(p) for p in parameters], rule, **options)
    live = [tuple(states.values()) for states in optimizer.state.values()]
    for states, c in zip(live, cases, strict=True):
        for state, start in zip(states, c.states, strict=True):
            state[...] = start
    for k in range(STEPS):
        estimates = [None if (h := c.hessians[k]) is None else OnDevice(h) for c in cases]
        given = any(h is not None for h in estimates)
        grads = [OnDevice(c.grads[k]) for c in cases]
        optimizer.step(grads, hessian=estimates if given else None)
    return [
        (p, *(state.copy() for state in states)) for p, states in zip(parameters, live, strict=True)
    ]


@pytest.mark.parametrize("rule", on_devices(RULES).values(), ids=on_devices(RULES))
def test_every_variant_has_the_bits_of_the_core(rule: fo.Rule, halved: None) -> None:
    c = case(rule, 35, np.float32, awkward=operands(rule))
    (got,), (want,) = on_device(rule, [c]), stepped(rule, [c])
    assert_same_bits(got, want, str(rule))


@pytest.mark.parametrize("rule", on_devices(DEFAULTS).values(), ids=on_devices(DEFAULTS))
@pytest.mark.parametrize("n", [(0, 1, 31, 96), (130, 3)])
def test_sizes_in_float64(rule: fo.Rule, n: tuple[int, ...], halved: None) -> None:
    cases = [case(rule, m, np.float64, seed=m) for m in n]
    for got, want in zip(on_device(rule, cases), stepped(rule, cases), strict=True):
        assert_same_bits(got, want, f"{rule} of {n}")


def trees(params: Any, grads: Any, backend: str, copies: Any, **options: Any) -> Any:
    """Parameters, copies, fingerprint and what was told of three steps."""
    device = backend == "cuda"
    wrap = OnDevice if device else lambda a: a
    mine, theirs = ({k: a.copy(order="K") for k, a in tree.items()} for tree in (params, copies))
    optimizer = fo.Optimizer(
        {k: wrap(a) for k, a in mine.items()},
        fo.AdamW(lr=0.01, weight_decay=0.1),
        copy_out={k: wrap(a) for k, a in theirs.items()} if theirs else None,
        **options,
    )
    told = [optimizer.step({k: wrap(a) for k, a in g.items()}, grad_scale=2.0) for g in grads]
    return {**mine, **{f"{k}/copy": a for k, a in theirs.items()}}, told, optimizer.fingerprint()


WAYS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "float32": (np.float32, np.float32, {}),
    "bfloat16": (ml_dtypes.bfloat16, ml_dtypes.bfloat16, {}),
    "float16": (np.float16, np.float16, {}),
    "masters": (ml_dtypes.bfloat16, np.float32, {"master": "float32"}),
    "low states": (np.float32, ml_dtypes.bfloat16, {"state_dtype": "bfloat16"}),
    "wide": (np.float64, np.float32, {"state_dtype": {"m": "float32", "v": "float16"}}),
    "all low": (np.float16, np.float64, {"state_dtype": "float16"}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("besides", ["nothing", "clip_norm", "clip_value"])
def test_formats_and_all_that_a_step_does_besides(way: str, besides: str) -> None:
    p, g, options = WAYS[way]
    shapes: dict[str, Any] = {"a": 75, "b": (), "c": (5, 7), "d": 0}
    params = {k: np.asarray(draw(j, s, p)) for j, (k, s) in enumerate(shapes.items())}
    params["c"] = np.asfortranarray(params["c"])
    grads = [{k: np.asarray(draw(10 + t, s, g), order="K") for k, s in shapes.items()}
             for t in range(3)]  # fmt: skip
    for each in grads:
        each["c"] = np.asfortranarray(each["c"])
    copies = {}
    if besides != "nothing":
        slow = fo.Lookahead(k=2, reset=besides == "clip_norm")
        options = {**options, besides: 0.25, "ema": 0.9, "slow_weights": slow}
        copies = {k: np.zeros_like(a, np.float16) for k, a in params.items()}
    found = [trees(params, grads, b, copies, **options) for b in ("cuda", "native")]
    assert_same(found[0][0], found[1][0], way)
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize(
    "rule",
    [
        fo.AdamW(weight_decay=fo.schedules.Linear(0.1, 3), betas=(lambda t: 1 - 0.2 / t, 0.99)),
        fo.Muon(momentum=lambda t: 1 - 0.2 / t),
    ],
    ids=["adamw", "muon"],
)
def test_schedules_of_hyperparameters(rule: fo.Rule, halved: None) -> None:
    rule = exactness.elementwise(rule)
    c = case(rule, 35, np.float32)
    (got,), (want,) = on_device(rule, [c]), stepped(rule, [c])
    assert_same_bits(got, want, str(rule))


@pytest.mark.parametrize("rule", on_devices(DEFAULTS).values(), ids=on_devices(DEFAULTS))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_updates_of_one_tensor(rule: fo.Rule, dtype: Any, halved: None) -> None:
    p = case(rule, 35, dtype).p
    mine, states = OnDevice(p.copy()), rule.init(OnDevice(p))  # type: ignore[arg-type]
    theirs, own = p.copy(), rule.init(p)
    for t in range(1, 4):
        g = draw(t, p.shape, np.float32)
        h = draw(9, p.shape, dtype) if rule.takes_hessian and t == 2 else None
        there: Any = None if h is None else OnDevice(h)
        fo.update(rule, t, mine, OnDevice(g), *states, hessian=there)  # type: ignore[arg-type]
        fo.update(rule, t, theirs, g, *own, hessian=h)
    assert all(isinstance(state, DeviceArray) for state in states)
    got = (mine.array, *(state.copy() for state in states))
    assert_same_bits(got, (theirs, *own), str(rule))


def test_norms() -> None:
    arrays: dict[str, Any] = {
        str(k): draw(k, s, d)
        for k, (s, d) in enumerate(
            [(40, np.float32), ((3, 5), ml_dtypes.bfloat16), ((), np.float64), (0, np.float16)]
        )
    }
    for size in (1.0, 1e-200, 1e200):
        arrays["wide"] = draw(9, 12, np.float64) * size
        there = {k: [OnDevice(a), None] for k, a in arrays.items()}
        assert fo.global_norm(there) == fo.global_norm(arrays)
    assert fo.global_norm(OnDevice(np.full(3, np.inf))) == np.inf


@pytest.mark.parametrize("size", [1.0, 1e-200, 1e200])
def test_norms_of_several_segments(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "VECTORS", 1 << 13)
    p, g = np.zeros(2 * 16384 + 77), draw(0, 2 * 16384 + 77, np.float64) * size
    infos = []
    for wrap in (OnDevice, lambda a: a):
        optimizer = fo.Optimizer(wrap(p.copy()), fo.SGD(), clip_norm=1.0)
        infos.append(optimizer.step(wrap(g)))
    assert infos[0] == infos[1]


def test_threads_that_ask_for_a_shared_array_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the simulator's threads take turns, those of a block have one array."""
    fresh = np.empty

    def slow(*given: Any, **more: Any) -> Array:
        made = fresh(*given, **more)
        time.sleep(0.002)  # the other threads look for the array meanwhile
        return made

    g = draw(0, 3 * 16384, np.float32)
    expected = fo.global_norm(g)
    there = OnDevice(g)
    monkeypatch.setattr(np, "empty", slow)
    assert fo.global_norm(there) == expected


def test_a_step_that_finds_no_number_is_refused_or_skipped() -> None:
    p = np.ones(40, np.float32)
    g = np.full(40, np.nan, np.float32)
    with pytest.raises(FloatingPointError, match="NaN or infinity in params"):
        fo.Optimizer(OnDevice(p), fo.SGD(), clip_norm=1.0).step(OnDevice(g))
    optimizer = fo.Optimizer(OnDevice(p), fo.SGD(), skip_nonfinite=True)
    info = optimizer.step(OnDevice(g))
    assert info.skipped
    assert info.bad_leaves == ("params",)
    assert optimizer.step_count == 0
    assert (p == 1).all()


def test_leaves_without_a_gradient_and_off_the_boundaries() -> None:
    rng = np.random.default_rng(0)
    block = rng.standard_normal(200).astype(np.float32)
    results = []
    for wrap in (OnDevice, lambda a: a):
        mine = block.copy()
        params = [wrap(mine[1:50]), wrap(mine[51:52]), wrap(mine[60:200])]
        optimizer = fo.Optimizer(params, fo.Adam(lr=0.1))
        for t in range(4):
            grads: list[Any] = [wrap(np.full(n, t + 1, np.float32)) for n in (49, 1, 140)]
            if t % 2:
                grads[t // 2] = None
            optimizer.step(grads)
        results.append((mine, optimizer.fingerprint()))
    assert_same_bits(results[0][:1], results[1][:1], "with None")
    assert results[0][1] == results[1][1]


def test_zeroed_and_accumulated_gradients() -> None:
    for zeroed in (False, True):
        results: list[Array] = []
        for wrap in (OnDevice, lambda a: a):
            p = draw(0, 50, np.float32)
            grads = [draw(k, 50, ml_dtypes.bfloat16) for k in (1, 2, 3)]
            optimizer = fo.Optimizer(wrap(p), fo.Adam(), zero_grads=zeroed)
            for g in grads[:2]:
                optimizer.accumulate(wrap(g))
            optimizer.step(grad_scale=2.0)
            optimizer.step(wrap(grads[2]))
            assert not zeroed or not any(g.any() for g in grads)
            results.append(p)
        assert_same_bits((results[0],), (results[1],), "accumulated")


PRODUCTS: dict[str, fo.Rule] = {
    "polar": fo.Muon(ns_coefficients="polar_express", ns_steps=8, gram=True, split=3),
    "aol": fo.Muon(weight_decay=0.1, norm="aol", ns_coefficients="you", ns_steps=4),
    "normuon": fo.NorMuon(weight_decay=0.1),
    "normuon-split": fo.NorMuon(split=3, eps_v=0.0, form="heavy_ball"),
    "adamuon": fo.AdaMuon(weight_decay=0.1),
    "adamuon-split": fo.AdaMuon(split=3, scale="original", beta2=0.9),
    # Longer sides would have moments without the full rank, of whose bases LAPACK takes any.
    "soap": fo.SOAP(precondition_frequency=2, max_precond_dim=6),
    "soap-narrow": fo.SOAP(precondition_frequency=1, max_precond_dim=5),
}


def of_matrices(wrap: Any, rule: fo.Rule, dtype: Any, **options: Any) -> tuple[fo.Optimizer, Any]:
    """An optimizer of matrices and a vector, and the trees of five steps, one of them tiny and one
    without a leaf."""
    shapes: dict[str, Any] = {"a": (12, 5), "b": (3, 2, 4), "c": 9, "d": (6, 6), "e": (0, 3)}

    def tree(seed: int) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        drawn = {k: np.asarray(rng.standard_normal(s), dtype) for k, s in shapes.items()}
        return {**drawn, "d": np.asfortranarray(drawn["d"])}

    params = tree(0)
    rules = {"c": fo.AdamW(), "*": rule}
    optimizer = fo.Optimizer({k: wrap(a) for k, a in params.items()}, rules, **options)
    grads = [tree(t) for t in range(1, 6)]
    grads[1]["a"] *= dtype(1e-12)
    grads[2]["b"] = None
    wrapped = [{k: a if a is None else wrap(a) for k, a in g.items()} for g in grads]
    return optimizer, (params, wrapped)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("wait", [True, False])
def test_matrix_products(rule: fo.Rule, dtype: Any, wait: bool) -> None:
    results = []
    for wrap, more in ((OnDevice, {"wait": wait}), (lambda a: a, {})):
        optimizer, (params, grads) = of_matrices(wrap, rule, dtype, clip_norm=1.0, **more)
        for g in grads:
            optimizer.step(g)
        states = {(k, n): a.copy() for k, own in optimizer.state.items() for n, a in own.items()}
        results.append({**params, **states})
    accuracy = float(np.finfo(dtype).eps) ** 0.5
    for k, want in results[1].items():
        np.testing.assert_allclose(results[0][k], want, accuracy, 0.1 * accuracy, err_msg=str(k))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", [fo.Muon, fo.NorMuon, fo.AdaMuon], ids=lambda kind: kind.name)
def test_products_of_bfloat16(kind: Any, dtype: Any) -> None:
    results = []
    for short in ("float32", "bfloat16"):
        rule = kind(ns_dtype=short, lr=1.0, scale="none", split=3)
        optimizer, (params, grads) = of_matrices(OnDevice, rule, dtype)
        before = {name: a.copy() for name, a in params.items()}
        for g in (grads[0], grads[3]):  # AdaMuon's first step is but signs
            optimizer.step(g)
        results.append({name: params[name] - before[name] for name in ("a", "b", "d")})
    for name, whole in results[0].items():
        # 1 / 256 is the rounding of a factor; see `SHORT_FACTOR` for the largest differences.
        difference = np.abs(results[1][name] - whole).max() / np.abs(whole).max()
        assert 1e-5 < difference < 0.15, (name, difference)


@pytest.mark.parametrize("rule", [fo.NorMuon(), fo.AdaMuon(), fo.SOAP()], ids=lambda r: r.name)
def test_updates_and_checkpoints_of_side_states(rule: fo.Rule, tmp_path: Path) -> None:
    p, *grads = (draw(k, (4, 4), np.float32) for k in range(9))
    there, here = OnDevice(p.copy()), p.copy()
    states, own = rule.init(there), rule.init(here)  # type: ignore[arg-type]
    for t, g in enumerate(grads, 1):
        fo.update(rule, t, there, OnDevice(g), *states)  # type: ignore[arg-type]
        fo.update(rule, t, here, g, *own)
    np.testing.assert_allclose(there.array, here, 1e-3, 1e-4)
    optimizer = fo.Optimizer({"w": OnDevice(p)}, rule)
    for g in grads[:4]:
        optimizer.step({"w": OnDevice(g)})
    optimizer.save(tmp_path / "run")
    saved, before = optimizer.state_dict(), p.copy()
    on_host = fo.Optimizer({"w": here}, rule)
    here[...] = before
    on_host.load(tmp_path / "run")
    assert on_host.fingerprint() == optimizer.fingerprint()
    ends = []
    for back in (lambda: None, lambda: optimizer.load(tmp_path / "run"),
                 lambda: optimizer.load_state_dict(saved)):  # fmt: skip
        p[...] = before
        back()
        for g in grads[4:]:
            optimizer.step({"w": OnDevice(g)})
        ends.append(optimizer.fingerprint())
    assert len({*ends}) == 1


class Failing:
    """Functions of which one raises MemoryError, at its beginning or at its end."""

    left = 0

    def wrap(self, function: Any) -> Any:
        def counted(*given: Any) -> Any:
            self._count()
            result = function(*given)
            self._count()
            return result

        return counted

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise MemoryError


@pytest.mark.parametrize(
    "rule", [fo.Muon(), fo.NorMuon(), fo.AdaMuon(), fo.SOAP()], ids=lambda rule: rule.name
)
@pytest.mark.parametrize("wait", [True, False])
def test_products_that_fail_leave_the_step_undone(
    rule: fo.Rule, wait: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = (3, 4), (4, 2), 5
    rules = {"2": fo.AdamW(), "*": rule}
    optimizer, twin = (
        fo.Optimizer([OnDevice(draw(k, s, np.float32)) for k, s in enumerate(shapes)], rules,
                     clip_norm=1.0, wait=wait)
        for _ in range(2)
    )  # fmt: skip
    grads = [[OnDevice(draw(t + k, s, np.float32)) for k, s in enumerate(shapes)] for t in (5, 9)]
    failing, failed = Failing(), 0
    places = [(Library, name) for name in ("where", "orthogonalized", "normal")]
    for owner, name in [*places, (type(rule), "on_device"), (type(rule), "before")]:
        monkeypatch.setattr(owner, name, failing.wrap(getattr(owner, name)))
    for g in grads:
        before = optimizer.fingerprint()
        for place in itertools.count(1):
            failing.left = place
            with suppress(MemoryError):
                optimizer.step(g)
            if failing.left > 0:  # there are fewer places
                break
            failed += 1
            assert optimizer.fingerprint() == before
        failing.left = 0
        twin.step(g)
        assert optimizer.fingerprint() == twin.fingerprint()
    assert failed > 10


def test_signals_wait_for_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, (_, grads) = of_matrices(OnDevice, fo.NorMuon(), np.float32)
    twin, _ = of_matrices(OnDevice, fo.NorMuon(), np.float32)
    twin.step(grads[0])
    whole = fo.NorMuon.on_device

    def interrupted(*given: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return whole(*given)

    monkeypatch.setattr(fo.NorMuon, "on_device", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(grads[0])
    assert optimizer.fingerprint() == twin.fingerprint()


@pytest.mark.parametrize("rule", [fo.NorMuon(), fo.AdaMuon(), fo.SOAP()], ids=lambda r: r.name)
def test_a_bad_step_of_matrices_changes_nothing(rule: fo.Rule) -> None:
    optimizer, (_, grads) = of_matrices(OnDevice, rule, np.float32, clip_norm=1.0, wait=False)
    for g in grads[:2]:
        optimizer.step(g)
    before = optimizer.fingerprint()
    bad = {**grads[3], "c": OnDevice(np.full(9, np.nan, np.float32))}
    optimizer.step(bad)
    with pytest.raises(FloatingPointError, match="in step 3"):
        optimizer.step(grads[4])
    optimizer.synchronize()
    assert optimizer.fingerprint() == before


class Halves(fo.CustomRule):
    """A rule of the user's own, with a branch and a state."""

    beta: float = 0.5

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        return self.beta, lr

    @staticmethod
    def element(p: float, g: float, m: float, beta: float, lr: float) -> tuple[float, float]:
        m = beta * m + g
        return (lr if m > 0 else -lr), m


def test_users_own_rules() -> None:
    c = case(Halves(lr=0.1), 70, np.float32, awkward=("g",))
    assert_same_bits(on_device(Halves(lr=0.1), [c])[0], stepped(Halves(lr=0.1), [c])[0], "own")


def test_what_the_optimizer_keeps_comes_back(tmp_path: Path) -> None:
    p = draw(0, (5, 8), np.float32)
    optimizer = fo.Optimizer({"w": OnDevice(p)}, fo.Adam(), ema=0.5)
    optimizer.step({"w": OnDevice(draw(1, (5, 8), np.float32))})
    before, saved = p.copy(), optimizer.state_dict()
    mark = optimizer.fingerprint()
    assert isinstance(optimizer.state["w"]["m"], DeviceArray)
    with optimizer.averaged():
        np.testing.assert_array_equal(p, saved["leaves"]["w"]["state"]["average"])
    np.testing.assert_array_equal(p, before)
    optimizer.step({"w": OnDevice(draw(2, (5, 8), np.float32))})
    assert optimizer.fingerprint() != mark
    p[...] = before
    optimizer.load_state_dict(saved)
    assert optimizer.fingerprint() == mark
    optimizer.save(tmp_path / "run")
    optimizer.step({"w": OnDevice(draw(2, (5, 8), np.float32))})
    optimizer.load(tmp_path / "run")
    assert optimizer.fingerprint() == mark
    moved = OnDevice(before)
    optimizer.rebind({"w": moved})
    optimizer.step({"w": OnDevice(before.copy())})
    assert not (before == p).all()


def test_masters_are_taken_anew() -> None:
    p = np.ones(40, ml_dtypes.bfloat16)
    optimizer = fo.Optimizer(OnDevice(p), fo.SGD(lr=1.0), master="float32")
    p[...] = 2
    optimizer.sync()
    optimizer.step(OnDevice(np.full(40, 0.5, np.float32)))
    assert (p == 1.5).all()


def test_lookahead() -> None:
    results = []
    for wrap in (OnDevice, lambda a: a):
        p = draw(0, 40, np.float32)
        optimizer = fo.Optimizer(wrap(p), fo.Nesterov(form="lookahead"))
        for _ in range(3):
            with optimizer.lookahead():
                g = p * np.float32(0.5)
            optimizer.step(wrap(g))
        results.append(p)
    assert_same_bits((results[0],), (results[1],), "lookahead")
