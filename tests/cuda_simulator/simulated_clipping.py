"""Clipping that waits for nothing, on Numba's simulator: `test_cuda.py` runs this too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from simulated import on_device

import fusedopt as fo
from devices import OnDevice, Tensor
from exactness import DEFAULTS, Array, case, stepped
from formatted import assert_same, draw
from fusedopt.backends.cuda import kernels
from fusedopt.backends.cuda import reductions as sums_
from fusedopt.backends.cuda.arrays import DeviceArray
from fusedopt.backends.cuda.buffers import Echo, Memory

INF, NAN = math.inf, math.nan


# ---------------------------------------------------------------- the kernel


def decided(sums: list[float], limits: list[float], norm_of: list[int], stopped: int) -> Any:
    """What the kernel finds in its fifth step, of gradients that are not scaled: norms, scales,
    factors in both types, the number of the step that stopped it, and the sums that it kept."""
    table = np.array([[m, k] for k, m in enumerate(norm_of)], np.int64)
    control = np.zeros(sums_.FACTORS + 16 * len(limits), np.uint8)
    control[:8] = np.array([stopped]).view(np.uint8)
    given: list[Array] = [table, np.array(sums), np.array(limits), control]
    kept, told = np.zeros(len(sums)), np.zeros(2 * len(limits))
    t, s, m, c, k, n = (a.ctypes.data for a in (*given, kept, told))
    words = (t, s, len(sums), m, len(limits), c, k, n, 5)
    sums_.guard_kernel().launch(1, kernels.THREADS, (0, 0), words, [1.0])
    factors = control[sums_.FACTORS :].view(np.float64)
    narrow = control[sums_.FACTORS :].view(np.float32)
    number = int(control[:8].view(np.int64)[0])
    return told[::2].tolist(), told[1::2].tolist(), factors[::2], narrow[2::4], number, kept


def sums_of(kind: str, rng: np.random.Generator) -> list[float]:
    """Sums of squares whose total is hard to round."""
    n = int(rng.integers(1, 12))
    if kind == "wide":
        return list(np.ldexp(rng.random(n), rng.integers(-1060, 1010, n)).tolist())
    if kind == "ties":
        half = math.ldexp(1.0, int(rng.integers(-60, 60)))
        tail = [half * 2.0**-k * float(rng.integers(0, 2)) for k in (60, 100, 900)]
        odd = float(rng.integers(2**52, 2**53))
        return [odd * half * 2, half, *tail]
    if kind == "close":
        return list((rng.integers(0, 2**53, n) * 2.0**-40).tolist())
    return [0.0] * n


@pytest.mark.parametrize("kind", ["wide", "ties", "close", "zero"])
def test_the_norm_is_rounded_once(kind: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(25):
        sums = sums_of(kind, rng)
        rng.shuffle(sums)
        (norm,), *_ = decided(sums, [1.0], [0] * len(sums), 0)
        assert norm == math.sqrt(math.fsum(sums)), sums


def test_limits_of_groups() -> None:
    sums, limits = [9.0, 16.0, 4.0], [1.0, INF]
    norms, scales, factors, narrow, stopped, _ = decided(sums, limits, [0, 0, 1], 0)
    assert (norms, scales, stopped) == ([5.0, 2.0], [0.2, 1.0], 0)
    assert factors.tolist() == scales
    assert narrow.tolist() == [np.float32(0.2), 1.0]


@pytest.mark.parametrize(
    ("sums", "norm"),
    [
        ([1.0, INF, 2.0], INF),
        ([NAN, INF], NAN),
        ([-NAN, 1.0], NAN),
        ([1.5e308, 1.5e308], INF),
    ],
)
def test_what_is_not_finite_stops_it(sums: list[float], norm: float) -> None:
    norms, scales, factors, narrow, stopped, kept = decided(
        [*sums, 4.0], [1.0, 1.0], [0] * len(sums) + [1], 0
    )
    np.testing.assert_equal(norms, [norm, 2.0])
    assert np.isnan([*scales, *factors, *narrow]).all()
    assert stopped == 5
    np.testing.assert_equal(kept, [*sums, 4.0])


def test_what_stopped_it_stays() -> None:
    norms, scales, factors, _, stopped, kept = decided([NAN, 4.0], [1.0, 1.0], [0, 1], 3)
    assert stopped == 3
    assert not kept.any()
    assert np.isnan([*scales, *factors]).all()
    assert decided([4.0], [1.0], [0], 3)[0] == [2.0]
    assert norms[1] == 2.0


# ---------------------------------------------------------------- the bits


@contextmanager
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, the host may not wait for the device, and hears nothing of it either."""

    def refuse(*given: Any) -> Any:
        raise AssertionError("the host waits for the device")

    with monkeypatch.context() as patch:
        patch.setattr(Memory, "read", refuse)
        patch.setattr("fusedopt.backends.cuda.plan.synchronize", refuse)
        patch.setattr("fusedopt.backends.cuda.clipping.synchronize", refuse)
        patch.setattr(Echo, "arrived", lambda echo: False)
        yield


@pytest.mark.parametrize("rule", DEFAULTS.values(), ids=DEFAULTS)
def test_every_rule_has_the_bits_of_the_core(rule: fo.Rule, halved: None) -> None:
    cases = [case(rule, n, np.float32, seed=n) for n in (35, 3)]
    got = on_device(rule, cases, clip_norm=2.0, wait=False)
    want = stepped(rule, cases, clip_norm=2.0)
    for mine, theirs in zip(got, want, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


SHAPES: dict[str, Any] = {"a": 75, "b": (), "c": (5, 7), "d": 0, "e": (3, 2)}
WAYS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "float32": (np.float32, np.float32, {"zero_grads": True}),
    "bfloat16": (ml_dtypes.bfloat16, ml_dtypes.bfloat16, {"ema": 0.9}),
    "masters": (ml_dtypes.bfloat16, np.float32, {"master": "float32", "copies": True}),
    "float64": (np.float64, np.float32, {"accumulated": True}),
}
RULES = {"a": fo.Lion(lr=0.01, maximize=True), "c": fo.Muon(lr=0.1), "*": fo.AdamW(lr=0.01)}
CLIPS: list[Any] = [0.25, {"a": 0.5, "c": None, "*": 0.01}]


class Run:
    """Four steps on a backend, some leaves missing; what it leaves behind."""

    def __init__(
        self, wrap: Any, way: str, clip: Any, during: AbstractContextManager[None], **more: Any
    ) -> None:
        p, g, options = WAYS[way]
        options = {**options, **more}
        self.params = {k: np.asarray(draw(j, s, p)) for j, (k, s) in enumerate(SHAPES.items())}
        copied, accumulated = (options.pop(k, False) for k in ("copies", "accumulated"))
        self.copies = {k: np.zeros_like(a, np.float16) for k, a in self.params.items()}
        self.grads: list[Any] = []
        self.infos: list[fo.StepInfo] = []
        self.optimizer = fo.Optimizer(
            {k: wrap(a) for k, a in self.params.items()},
            RULES,
            clip_norm=clip,
            copy_out={k: wrap(a) for k, a in self.copies.items()} if copied else None,
            **options,
        )
        with during:
            self._take_steps(wrap, g, accumulated)

    def _take_steps(self, wrap: Any, g: Any, accumulated: bool) -> None:
        for t in range(4):
            grads = {k: np.asarray(draw(9 + t, s, g)) for k, s in SHAPES.items()}
            self.grads.append(grads)
            given = {k: wrap(a) for k, a in grads.items()}
            given["abce"[t]] = None
            if accumulated:
                self.optimizer.accumulate(given)
                self.optimizer.accumulate(given)
                self.infos.append(self.optimizer.step(grad_scale=2.0))
            else:
                self.infos.append(self.optimizer.step(given, grad_scale=3.0))

    @property
    def left(self) -> dict[str, Array]:
        grads = {f"{k}/{t}": a for t, g in enumerate(self.grads) for k, a in g.items()}
        return {**self.params, **{f"{k}/copy": a for k, a in self.copies.items()}, **grads}

    @property
    def told(self) -> list[Any]:
        def number(x: Any) -> Any:
            return {k: float(v) for k, v in x.items()} if isinstance(x, dict) else float(x)

        return [(number(i.grad_norm), number(i.clip_scale), i.step, i.lr) for i in self.infos]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("clip", CLIPS, ids=["all", "groups"])
def test_all_that_a_step_does_besides(
    way: str, clip: Any, halved: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Run(OnDevice, way, clip, no_waiting(monkeypatch), wait=False)
    waiting = Run(OnDevice, way, clip, nullcontext())
    assert mine.told == waiting.told
    assert_same(mine.left, waiting.left, way)
    assert mine.optimizer.fingerprint() == waiting.optimizer.fingerprint()
    one = mine.infos[0].clip_scale
    scale = one["*"] if isinstance(one, dict) else one
    assert isinstance(scale, DeviceArray)
    assert scale.shape == ()
    assert scale.dtype == np.float64


# ---------------------------------------------------------------- the stop


def stopping(monkeypatch: pytest.MonkeyPatch, way: str = "float32") -> Any:
    """An optimizer after a good step, a bad one and two more, of which the host knows nothing; a
    way to take a good step; what it was after the first; its parameters; what the others gave; and
    an optimizer on the host that took the first alone."""
    p, g, options = WAYS[way]
    options = {k: v for k, v in options.items() if k != "accumulated"}
    params = {"a": draw(0, 40, p), "b": draw(1, (3, 5), p), "c": draw(2, 9, p)}
    rule = fo.Adam(lr=fo.schedules.Linear(0.1, steps=9))
    host = {k: a.copy() for k, a in params.items()}
    twin = fo.Optimizer(host, rule, clip_norm=1.0, **options)
    there = {k: OnDevice(a) for k, a in params.items()}
    optimizer = fo.Optimizer(there, rule, clip_norm=1.0, wait=False, **options)

    def grads(bad: float = 1.0, without: str = "") -> dict[str, Array | None]:
        made = {k: draw(5, a.shape, g) for k, a in params.items()}
        made["b"][1, 2] = bad
        return {k: None if k == without else a for k, a in made.items()}

    def step(bad: float = 1.0, without: str = "") -> Any:
        given = grads(bad, without)
        before = {k: None if a is None else a.copy() for k, a in given.items()}
        info = optimizer.step({k: None if a is None else OnDevice(a) for k, a in given.items()})
        return info, given, before

    twin.step(step(without="c")[2])
    before = {k: a.copy() for k, a in params.items()}, optimizer.fingerprint()
    with no_waiting(monkeypatch):
        taken = [step(math.nan, without="a"), step(without="b"), step()]
    return optimizer, step, before, params, taken, twin


@pytest.mark.parametrize("way", ["float32", "bfloat16", "float64"])
def test_neither_a_bad_step_nor_later_ones_change_anything(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, step, (before, mark), params, taken, twin = stopping(monkeypatch, way)
    assert optimizer.step_count == 4
    assert_same(params, before, way)
    for info, given, original in taken:
        assert math.isnan(float(info.clip_scale))
        for k, a in given.items():
            assert a is None or a.tobytes() == original[k].tobytes()
    with pytest.raises(FloatingPointError) as caught:
        optimizer.synchronize()
    assert str(caught.value) == (
        "grads: no finite sum of squares in b, in step 2; neither that step nor one after it has"
        " changed anything, and step_count is 1 again"
    )
    assert optimizer.step_count == 1
    assert optimizer.fingerprint() == mark
    optimizer.synchronize()
    told = [float(info.grad_norm) for info, _, _ in taken]
    assert math.isnan(told[0])
    assert all(map(math.isfinite, told[1:]))
    for _ in range(2):  # leaves whose counts had become equal are apart again
        info, _, given = step()
        assert info[:2] == twin.step(given)[:2]
    assert optimizer.step_count == 3
    assert optimizer.fingerprint() == twin.fingerprint()


def test_the_same_arrays_after_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    p, g = ([draw(seed, n, np.float32) for n in (9, 5)] for seed in (0, 1))
    bad = np.full(5, NAN, np.float32)
    twin = fo.Optimizer([a.copy() for a in p], fo.Adam(), clip_norm=1.0)
    optimizer = fo.Optimizer([*map(OnDevice, p)], fo.Adam(), clip_norm=1.0, wait=False)
    there = [*map(OnDevice, g)]
    optimizer.step([there[0], None])
    with no_waiting(monkeypatch):
        optimizer.step([None, OnDevice(bad)])
        for _ in range(2):  # which have one launch for both leaves, of equal counts
            optimizer.step(there)
    with pytest.raises(FloatingPointError, match="in step 2"):
        optimizer.synchronize()
    optimizer.step(there)
    twin.step([g[0], None])
    twin.step(g)
    assert optimizer.fingerprint() == twin.fingerprint()


def test_the_next_step_tells_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, step, (_, mark), *_ = stopping(monkeypatch)
    with pytest.raises(FloatingPointError, match="in step 2"):
        step()
    assert optimizer.fingerprint() == mark
    assert step()[0].step == 2


@pytest.mark.parametrize(
    "use",
    [
        lambda o, path: o.state_dict(),
        lambda o, path: o.save(path / "run"),
        lambda o, path: o.fingerprint(),
        lambda o, path: o.load_state_dict({}),
        lambda o, path: o.load(path / "none"),
        lambda o, path: o.sync(),
        lambda o, path: o.replace(eps=1e-3),
        lambda o, path: o.rebind(o.params),
        lambda o, path: o.averaged().__enter__(),
    ],
)
def test_whatever_waits_tells(use: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, step, (_, mark), *_ = stopping(monkeypatch, "bfloat16")
    rule = optimizer.rule
    with pytest.raises(FloatingPointError, match="step_count is 1 again"):
        use(optimizer, tmp_path)
    assert optimizer.rule == rule
    assert optimizer.fingerprint() == mark
    assert step()[0].step == 2


def test_the_learning_rate_can_be_set_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, step, *_ = stopping(monkeypatch)
    with no_waiting(monkeypatch):
        optimizer.lr = 0.5
        assert step()[0].lr == 0.5


def test_what_a_step_told_stays() -> None:
    optimizer = fo.Optimizer(OnDevice(np.ones(3)), fo.SGD(), clip_norm=1.0, wait=False)
    kept = []
    for t in range(20):
        info: Any = optimizer.step(OnDevice(np.full(3, float(t))))
        if t % 2:
            kept.append((t, info))
    for t, info in kept:
        assert float(info.grad_norm) == math.sqrt(3.0 * t * t)
        assert float(info.clip_scale) == 1.0 / float(info.grad_norm)


def test_accumulated_sums_go_with_the_step_that_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, *_ = stopping(monkeypatch)
    g = {"a": OnDevice(np.ones(40, np.float32)), "b": None, "c": None}
    optimizer.accumulate(g)
    with pytest.raises(FloatingPointError):
        optimizer.step()
    optimizer.accumulate(g)
    assert optimizer.step().step == 2


def test_squares_of_float64_beyond_their_range_count_as_infinite() -> None:
    optimizer = fo.Optimizer(OnDevice(np.ones(3)), fo.SGD(), clip_norm=1.0, wait=False)
    info: Any = optimizer.step(OnDevice(np.full(3, 1e200)))
    assert float(info.grad_norm) == INF
    with pytest.raises(FloatingPointError, match="no finite sum of squares in params"):
        optimizer.synchronize()


def test_without_a_norm_there_is_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = fo.Optimizer(OnDevice(p := np.ones(3, np.float32)), fo.SGD(lr=1.0), wait=False)
    with no_waiting(monkeypatch):
        info = optimizer.step(OnDevice(np.full(3, NAN, np.float32)))
    assert info == (1, 1.0, None, 1.0, False, (), None)
    optimizer.synchronize()
    assert np.isnan(p).all()


def test_gradients_that_are_zeroed_must_lie_like_their_parameters(torch: list[int]) -> None:
    p, g = np.ones((3, 4), np.float32), np.ones((3, 4), np.float32, order="F")
    fo.Optimizer(Tensor(p), fo.SGD(), clip_norm=1.0, zero_grads=True).step(Tensor(g))
    assert not g.any()
    g[...] = 1
    optimizer = fo.Optimizer(Tensor(p), fo.SGD(), clip_norm=1.0, zero_grads=True, wait=False)
    before = p.copy()
    with pytest.raises(ValueError, match="grads: zero_grads with wait=False needs it in the"):
        optimizer.step(Tensor(g))
    assert g.all()
    assert (p == before).all()
    optimizer.step(Tensor(h := np.ones((3, 4), np.float32)))
    assert not h.any()


def test_steps_without_any_gradient() -> None:
    for wait in (True, False):
        optimizer = fo.Optimizer([OnDevice(np.ones(3))], fo.SGD(), clip_norm=1.0, wait=wait)
        info: Any = optimizer.step([None])
        assert (float(info.grad_norm), float(info.clip_scale), info.step) == (0.0, 1.0, 1)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="wait=False: is for arrays on a CUDA device"):
        fo.Optimizer(np.ones(3), fo.SGD(), wait=False)
    with pytest.raises(TypeError, match="wait: expected True or False"):
        fo.Optimizer(np.ones(3), fo.SGD(), wait=0)  # type: ignore[arg-type]
    p = OnDevice(np.ones((3, 4), np.float32))
    with pytest.raises(ValueError, match="skip_nonfinite, wait"):
        fo.Optimizer(p, fo.SGD(), skip_nonfinite=True, wait=False)
