"""Trees, patterns, counters, and the state that travels."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from fusedopt.arrays.trees import Tree

BACKENDS = ["native", "reference"]


def tree(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "embed": draw(11, 4),
        "block": [{"w": draw(4, 7), "b": draw(7)}, {"w": draw(7, 3), "b": draw(3)}],
        "last": (draw(5), np.float64(draw(2))),
    }


MIXED = {"block.*.w": fo.Muon(lr=0.01), "embed": fo.Sophia(bs=7), "*": fo.AdamW(lr=0.01)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_names(backend: str) -> None:
    opt = fo.Optimizer(tree(), fo.AdamW(), backend=backend)
    assert list(opt.state) == [
        "embed",
        "block.0.w",
        "block.0.b",
        "block.1.w",
        "block.1.b",
        "last.0",
        "last.1",
    ]
    assert list(opt.state["block.0.w"]) == ["m", "v"]
    assert opt.state["last.1"]["m"].dtype == np.float64
    assert fo.Optimizer(np.ones(3), fo.SGD()).state == {"params": {}}


def test_step_info_and_rates() -> None:
    opt = fo.Optimizer(tree(), fo.AdamW(lr=lambda step: 0.1 / step))
    assert opt.lr == 0.1
    assert opt.step(tree(1)) == fo.StepInfo(step=1, lr=0.1)
    assert opt.step(tree(1))[:2] == (2, 0.05)
    assert opt.step_count == 2
    opt = fo.Optimizer(tree(), MIXED)
    assert opt.step(tree(1)).lr == {"block.*.w": 0.01, "embed": 1e-4, "*": 0.01} == opt.lr


def test_first_pattern_wins_and_stars_match_the_top_level() -> None:
    params: Any = {"w": np.ones((2, 2)), "a": {"w": np.ones((2, 2)), "b": np.ones(2)}}
    opt = fo.Optimizer(params, {"*.w": fo.SGD(lr=1.0), "*": fo.SGD(lr=2.0)})
    opt.step({"w": np.ones((2, 2)), "a": {"w": np.ones((2, 2)), "b": np.ones(2)}})
    assert (params["w"] == 0).all()
    assert (params["a"]["w"] == 0).all()
    assert (params["a"]["b"] == -1).all()


def test_callable_choice() -> None:
    def choose(path: str, a: np.ndarray) -> fo.Rule:
        return fo.AdamW(weight_decay=0.1 if a.ndim > 1 else 0.0, lr=1.0 if "w" in path else 0.5)

    opt = fo.Optimizer(tree(), choose)
    assert opt.lr == {"adamw": 0.5, "adamw.2": 1.0, "adamw.3": 0.5}
    assert opt.step(tree(1)).step == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_none_leaves_a_leaf_and_its_count_alone(backend: str) -> None:
    params, alone = tree(), tree()
    opt = fo.Optimizer(params, MIXED, backend=backend)
    some = tree(1)
    some["embed"] = None
    some["block"][0]["w"] = None
    before = copy.deepcopy(opt.state_dict())
    opt.step(some)
    after = opt.state_dict()
    for path in ("embed", "block.0.w"):
        assert after["leaves"][path]["t"] == 0
        np.testing.assert_equal(after["leaves"][path], before["leaves"][path])
    np.testing.assert_array_equal(params["embed"], alone["embed"])
    assert after["leaves"]["block.0.b"]["t"] == 1
    assert opt.step({"embed": None, "block": [{"w": None, "b": None}] * 2, "last": [None] * 2})
    assert opt.step_count == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_and_tuples_and_orders_of_keys_are_alike(backend: str) -> None:
    runs = []
    for grads in (tree(1), OrderedDict(reversed(tree(1).items()))):
        params = tree()
        grads["last"] = list(grads["last"])
        fo.Optimizer(params, fo.AdamW(), backend=backend).step(grads)
        runs.append(params)
    np.testing.assert_equal(runs[0], runs[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rule", [MIXED, *(r for r in (cls() for cls in fo.RULES.values()) if not r.program.matrices)]
)
def test_resuming_gives_the_bits_of_not_stopping(rule: Any, backend: str) -> None:
    params = tree()
    opt = fo.Optimizer(params, rule, backend=backend)
    for seed in (1, 2):
        opt.step(tree(seed))
    saved = opt.state_dict()
    resumed_params = copy.deepcopy(params)
    for seed in (3, 4):
        opt.step(tree(seed))
    resumed = fo.Optimizer(resumed_params, rule, backend=backend)
    resumed.load_state_dict(pickle.loads(pickle.dumps(saved)))
    assert resumed.step_count == 2
    for seed in (3, 4):
        resumed.step(tree(seed))
    assert resumed.fingerprint() == opt.fingerprint()


def test_state_dicts_are_copies_both_ways() -> None:
    params = tree()
    opt = fo.Optimizer(params, fo.AdamW())
    opt.step(tree(1))
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    opt.step(tree(2))
    np.testing.assert_equal(saved, kept)
    opt.load_state_dict(saved)
    opt.step(tree(2))
    np.testing.assert_equal(saved, kept)


def test_state_dicts_that_do_not_fit() -> None:
    opt = fo.Optimizer(tree(), fo.AdamW())
    other = tree()
    other["embed"] = np.ones((3, 4), np.float32)
    other["more"] = np.ones(1)
    other["block"][0]["w"] = other["block"][0]["w"].astype(np.float64)
    saved = fo.Optimizer(other, {"last.*": fo.Lion(), "*": fo.AdamW(amsgrad="raw")}).state_dict()
    before = opt.fingerprint()
    with pytest.raises(ValueError, match="does not fit") as raised:
        opt.load_state_dict(saved)
    for part in (
        "more: is no leaf here",
        "embed: shape (11, 4) here, (3, 4) there",
        "block.0.w: dtype float32 here, float64 there",
        "last.0: rule adamw here, lion there",
        "embed: states ['m', 'v'] here, ['m', 'v', 'x'] there",
    ):
        assert part in str(raised.value)
    for broken in (None, {}, {"format": 2}, {"format": 1}, {"format": 1, "step": 1, "leaves": []}):
        with pytest.raises(ValueError, match="state_dict"):
            opt.load_state_dict(broken)  # type: ignore[arg-type]
    good = opt.state_dict()
    spoilers: list[Any] = [
        lambda d: d.update(step=-1),
        lambda d: d["leaves"]["embed"].update(t="1"),
        lambda d: d["leaves"]["embed"].pop("rule"),
        lambda d: d["leaves"]["embed"]["state"].update(m=[1.0]),
        lambda d: d["leaves"].update(embed=3),
    ]
    for spoil in spoilers:
        bad = copy.deepcopy(good)
        spoil(bad)
        with pytest.raises(ValueError, match="state_dict"):
            opt.load_state_dict(bad)
    assert opt.fingerprint() == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_rebind(backend: str) -> None:
    params, fresh = tree(), tree()
    opt = fo.Optimizer(params, MIXED, backend=backend)
    opt.step(tree(1))
    twin = copy.deepcopy(opt)
    for ours, theirs in zip(Tree(fresh).leaves, Tree(params).leaves, strict=True):
        ours.value[...] = theirs.value
    opt.rebind(fresh)
    kept = copy.deepcopy(params)
    opt.step(tree(2))
    np.testing.assert_equal(params, kept)
    twin.step(tree(2))
    assert opt.fingerprint() == twin.fingerprint()
    assert opt.params is fresh


def test_rebind_refuses_other_arrays() -> None:
    params = tree()
    opt = fo.Optimizer(params, fo.AdamW())
    other = tree()
    other["embed"] = np.asfortranarray(other["embed"])
    with pytest.raises(ValueError, match=r"params\['embed'\]: expected \(shape, dtype, memory"):
        opt.rebind(other)
    with pytest.raises(ValueError, match="missing"):
        opt.rebind({"embed": params["embed"]})
    shared = tree()
    shared["last"] = (shared["block"][0]["b"][:5], shared["last"][1])
    with pytest.raises(ValueError, match="shares memory"):
        opt.rebind(shared)
    before = params["embed"].copy()
    opt.step(tree(1))
    assert (params["embed"] != before).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_have_their_own_arrays(backend: str) -> None:
    params = tree()
    opt = fo.Optimizer(params, MIXED, backend=backend, threads=1)
    opt.step(tree(1))
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        before = opt.fingerprint()
        assert twin.fingerprint() == before
        twin.step(tree(2))
        assert opt.fingerprint() == before
    with pytest.raises(TypeError, match=r"copy\.deepcopy"):
        copy.copy(opt)


def test_a_model_and_its_optimizer_stay_together() -> None:
    params = tree()
    model: Any = {"params": params, "opt": fo.Optimizer(params, MIXED)}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = twin["params"]["embed"].copy()
        twin["opt"].step(tree(1))
        assert (twin["params"]["embed"] != before).any()


def test_fingerprints() -> None:
    params = {"a": np.array([1.0, np.nan]), "b": np.ones((2, 3))}
    opt = fo.Optimizer(params, fo.Momentum())
    first = opt.fingerprint()
    params["a"].view(np.uint64)[1] ^= np.uint64(1)  # another NaN
    assert opt.fingerprint() == first
    seen = {first}
    params["b"][1, 2] = np.nextafter(1.0, 2.0)
    seen.add(opt.fingerprint())
    opt.state["b"]["v"][0, 0] = -0.0
    seen.add(opt.fingerprint())
    opt.step({"a": None, "b": None})
    seen.add(opt.fingerprint())
    assert len(seen) == 4
    # Known bits: the digest is the same on every machine.
    known = "94706cef0d075afdeb25efd428bc2cf3b95a54b9e1a97f91cae960d7c6a37da0"
    assert fo.Optimizer(np.arange(3.0), fo.SGD()).fingerprint() == known


def test_describe() -> None:
    opt = fo.Optimizer(tree(), MIXED)
    opt.step(tree(1))
    text = opt.describe()
    sophia = "Sophia(lr=0.0001, bs=7)"
    for part in ("block.1.w", "(7, 3)", "Muon(lr=0.01)", sophia, "m float32, h float32", "step 1"):
        assert part in text
    assert f"backend native ({fo.get_isa()}" in text


@pytest.mark.parametrize("rule", [MIXED, fo.Adam(amsgrad="raw"), fo.SGD()])
def test_estimate(rule: Any) -> None:
    class Shaped:
        def __init__(self, a: np.ndarray) -> None:
            self.shape, self.dtype = a.shape, a.dtype

    params = tree()
    shapes = {**params, "last": tuple(Shaped(a) for a in params["last"])}
    found = fo.estimate(shapes, rule)
    opt = fo.Optimizer(params, rule)
    assert found.parameters == sum(leaf.value.nbytes for leaf in Tree(params).leaves)
    assert found.states == sum(a.nbytes for s in opt.state.values() for a in s.values())
    assert f"{found.work} of work space" in opt.describe()
    assert found.total == found.parameters + found.states + found.work
    with pytest.raises(ValueError, match="Muon updates arrays of two"):
        fo.estimate(shapes, fo.Muon())
    with pytest.raises(TypeError, match="got int64"):
        fo.estimate({"a": np.ones(2, int)}, fo.SGD())


def test_update_is_a_step() -> None:
    for cls in fo.RULES.values():
        for example in cls.examples:
            rule = cls(**example, weight_decay=0.1)
            p, q = np.ones((3, 4), np.float32), np.ones((3, 4), np.float32)
            opt, states = fo.Optimizer(p, rule), rule.init(q)
            for t in (1, 2, 3):
                g = np.sin(np.arange(12, dtype=np.float32)).reshape(3, 4) * t
                h = g * g if rule.takes_hessian else None
                opt.step(g, hessian=h)
                fo.update(rule, t, q, g, *states, hessian=h)
            np.testing.assert_array_equal(p, q)
            np.testing.assert_equal(tuple(opt.state["params"].values()), states)


def test_nothing_keeps_a_dropped_optimizer_alive() -> None:
    params = tree()
    opt = fo.Optimizer(params, MIXED)
    grads = tree(1)
    opt.step(grads)
    held = [weakref.ref(opt.state["embed"]["m"]), weakref.ref(params["embed"])]
    gradient = weakref.ref(grads["embed"])
    del grads
    assert gradient() is None
    del opt, params
    gc.collect()
    assert [ref() for ref in held] == [None, None]


# Look-ahead


@pytest.mark.parametrize("backend", BACKENDS)
def test_lookahead_restores_exact_bits(backend: str) -> None:
    rng = np.random.default_rng(0)
    params: Any = {
        "a": rng.standard_normal(1000).astype(np.float32),
        "b": np.ones((3, 2), order="F"),
    }
    rules = {"a": fo.Nesterov(form="lookahead", momentum=0.9), "b": fo.Nesterov()}
    opt = fo.Optimizer(params, rules, backend=backend)
    opt.step({"a": rng.standard_normal(1000), "b": np.ones((3, 2))})
    before, v = params["a"].copy(), opt.state["a"]["v"]
    with opt.lookahead():
        np.testing.assert_allclose(params["a"], before - np.float32(0.9) * v, rtol=1e-6)
        assert (params["a"] != before).any()
        with pytest.raises(RuntimeError, match="inside of lookahead"):
            opt.step({"a": before, "b": np.ones((3, 2))})
        with pytest.raises(RuntimeError, match="already inside"), opt.lookahead():
            pass
        with pytest.raises(RuntimeError, match="lookahead"):
            copy.deepcopy(opt)
    np.testing.assert_array_equal(params["a"], before)
    with pytest.raises(KeyError), opt.lookahead():
        raise KeyError
    np.testing.assert_array_equal(params["a"], before)
    assert opt.step({"a": before.copy(), "b": None}).step == 2


def test_lookahead_without_the_form() -> None:
    opt = fo.Optimizer(np.ones(3), fo.Nesterov())
    with pytest.raises(ValueError, match="no leaf is updated by"), opt.lookahead():
        pass


# Step by step verification


@pytest.mark.parametrize("backend", BACKENDS)
def test_verified_steps_are_the_same_steps(backend: str) -> None:
    results = []
    for verify in (True, False):
        params = tree()
        opt = fo.Optimizer(params, MIXED, backend=backend, verify=verify)
        for seed in (1, 2):
            opt.step(tree(seed), hessian={**none_like(), "embed": tree(seed)["embed"]})
        results.append(opt.fingerprint())
        assert opt.step_count == 2
    assert results[0] == results[1]


def none_like() -> dict[str, Any]:
    return {"embed": None, "block": [{"w": None, "b": None}] * 2, "last": (None, None)}


def test_a_diverging_step_is_not_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    true_scalars = fo.AdamW.scalars
    factor = 1.0

    def scalars(self: fo.AdamW, t: int, lr: float) -> tuple[float, ...]:
        *head, step, eps_root, eps = true_scalars(self, t, lr)
        return (*head, step * factor, eps_root, eps)

    monkeypatch.setattr(fo.AdamW, "scalars", scalars)
    opt = fo.Optimizer(tree(), fo.AdamW(lr=0.01), verify=True)
    opt.step(tree(1))
    before = opt.fingerprint()
    factor = 1 + 1e-5
    message = r"params\['embed'\]: p\[\d+\] is .*, the reference .*, the bound on"
    with pytest.raises(fo.VerificationError, match=message) as raised:
        opt.step(tree(2))
    assert "in step 2 of AdamW" in str(raised.value)
    assert opt.fingerprint() == before
    factor = 1.0
    assert opt.step(tree(2)).step == 2
