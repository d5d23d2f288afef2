"""The layouts of PyTorch and optax as recorded from them, without the libraries."""

from __future__ import annotations

import copy
from collections import namedtuple
from functools import partial
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from formatted import BF16, assert_same, draw, held, refused
from fusedopt import interop

# ---------------------------------------------------------------- PyTorch

W, B = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([5.0, 6.0])
HOW = {"foreach": None, "differentiable": False, "fused": None, "maximize": False}
ADAM_GROUP = {
    "lr": 0.1,
    "betas": (0.9, 0.99),
    "eps": 1e-8,
    "weight_decay": 0.01,
    "amsgrad": True,
    "capturable": False,
    "decoupled_weight_decay": True,
    **HOW,
    "params": [0, 1],
}
ADAMW = fo.AdamW.like("torch", lr=0.1, betas=(0.9, 0.99), amsgrad=True)


def adam_states(a: Any) -> dict[str, Any]:
    step = np.array(3, np.float32)
    return {"step": step, "exp_avg": a, "exp_avg_sq": a + 1, "max_exp_avg_sq": a + 2}


def torch_adam() -> dict[str, Any]:
    state = {0: adam_states(W), 1: adam_states(B)}
    return {"state": state, "param_groups": [copy.deepcopy(ADAM_GROUP)]}


def fresh(rule: Any = ADAMW, **options: Any) -> fo.Optimizer:
    return fo.Optimizer({"w": W.copy(), "b": B.copy()}, rule, **options)


def test_torchs_layout() -> None:
    opt = fresh()
    interop.from_torch(opt, torch_adam())
    assert opt.step_count == 3
    for path, a in (("w", W), ("b", B)):
        for k, name in enumerate("mvx"):
            np.testing.assert_array_equal(opt.state[path][name], a + k)
    back = interop.to_torch(opt, tensors=False)
    np.testing.assert_equal(back, torch_adam())
    back["state"][0]["exp_avg"][...] = 7
    assert opt.state["w"]["m"][0, 0] == 1
    assert interop.rules_from_torch(back) == [ADAMW]


SGD_GROUP = {
    "lr": 0.1,
    "momentum": 0.9,
    "dampening": 0.3,
    "weight_decay": 0.01,
    "nesterov": False,
    **HOW,
    "params": [0, 1],
}
MOMENTUM = fo.Momentum.like("torch", lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01)
LAYOUTS: dict[str, tuple[Any, dict[str, Any], dict[str, str]]] = {
    "momentum": (MOMENTUM, SGD_GROUP, {"momentum_buffer": "v"}),
    "nesterov": (
        fo.Nesterov.like("torch", lr=0.1, momentum=0.9, weight_decay=0.01),
        {**SGD_GROUP, "dampening": 0.0, "nesterov": True},
        {"momentum_buffer": "v"},
    ),
    "sgd": (
        fo.SGD.like("torch", lr=0.1, weight_decay=0.01),
        {**SGD_GROUP, "momentum": 0, "dampening": 0},
        {},
    ),
    "adagrad": (
        fo.AdaGrad.like("torch", lr=0.1, initial_accumulator=0.5),
        {
            "lr": 0.1,
            "lr_decay": 0.0,
            "eps": 1e-10,
            "weight_decay": 0.0,
            "initial_accumulator_value": 0.5,
            **HOW,
            "params": [0, 1],
        },
        {"sum": "G"},
    ),
    "rmsprop": (
        fo.RMSProp.like("torch", lr=0.1, momentum=0.9, centered=True),
        {
            "lr": 0.1,
            "momentum": 0.9,
            "alpha": 0.99,
            "eps": 1e-8,
            "centered": True,
            "weight_decay": 0.0,
            "capturable": False,
            "foreach": None,
            "differentiable": False,
            "maximize": False,
            "params": [0, 1],
        },
        {"square_avg": "v", "momentum_buffer": "b", "grad_avg": "a"},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_torchs_other_classes(name: str) -> None:
    rule, group, states = LAYOUTS[name]
    opt = fresh(rule)
    for t in (1, 2):
        opt.step({"w": W * t, "b": None if t == 1 else B})
    made = interop.to_torch(opt, tensors=False)
    assert made["param_groups"] == [group]
    for key, path, t in ((0, "w", 2), (1, "b", 1)):
        entry = made["state"].get(key, {})
        count = {} if name in ("momentum", "nesterov", "sgd") else {"step"}
        assert set(entry) == {*states, *count}
        assert entry.get("step", t) == t
        for theirs, ours in states.items():
            np.testing.assert_array_equal(entry[theirs], opt.state[path][ours])
    twin = fo.Optimizer(copy.deepcopy(opt.params), rule)
    interop.from_torch(twin, made, step=2)
    assert_same(held(twin), held(opt))
    assert interop.rules_from_torch(made) == [rule]


def test_parameters_that_torch_has_not_stepped() -> None:
    opt = fresh(MOMENTUM)
    state = {"state": {1: {"momentum_buffer": B}}, "param_groups": [SGD_GROUP]}
    interop.from_torch(opt, state, step=4)
    leaves = opt.state_dict()["leaves"]
    assert [leaves[path]["t"] for path in ("w", "b")] == [0, 4]
    np.testing.assert_array_equal(opt.state["w"]["v"], np.zeros((2, 2)))
    np.testing.assert_equal(
        interop.to_torch(opt, tensors=False)["state"], {1: {"momentum_buffer": B}}
    )


def test_what_torch_has_and_does_not_fit() -> None:
    opt = fresh()
    opt.step({"w": W, "b": B})
    state = torch_adam()
    state["param_groups"][0].update(betas=(0.8, 0.99), weight_decay=0.0, lr=0.2)
    state["state"][1]["exp_avg"] = np.ones(3)
    reasons = (
        "w: betas (0.9, 0.99) here, (0.8, 0.99) there",
        "b: weight_decay 0.01 here, 0.0 there",
        "w: lr 0.1 here, 0.2 there",
    )
    refused(lambda: interop.from_torch(opt, state), opt, *reasons)
    shape = "b: m has shape (2,) here, (3,) there"
    refused(lambda: interop.from_torch(opt, state, strict=False), opt, shape)
    state["state"][1]["exp_avg"] = B
    interop.from_torch(opt, state, strict=False)
    assert opt.lr == 0.1
    state = torch_adam()
    state["param_groups"][0].update(amsgrad=False)
    for strict in (True, False):
        reason = "amsgrad 'raw' here, False there"
        refused(partial(interop.from_torch, opt, state, strict=strict), opt, reason)
    state = torch_adam()
    del state["state"][0]["max_exp_avg_sq"]
    missing = "w: states ['m', 'v', 'x'] here, ['m', 'v'] there"
    refused(lambda: interop.from_torch(opt, state), opt, missing)
    refused(lambda: interop.from_torch(opt, torch_adam(), step=2), opt, "step: 2 given, 3 there")
    state = torch_adam()
    state["param_groups"][0].update(rho=3)
    refused(lambda: interop.from_torch(opt, state), opt, "no equal here has rho")
    state["param_groups"][0][None] = state["param_groups"][0].pop("rho")
    refused(lambda: interop.from_torch(opt, state), opt, "no equal here has None")
    state["param_groups"][0] = {"params": [0, 1], "lambd": 1e-4}
    refused(lambda: interop.from_torch(opt, state), opt, "expected a group of torch.optim's")
    refused(lambda: interop.from_torch(opt, {"w": W}), opt, "a dict with 'state'")
    old = torch_adam()
    del old["param_groups"][0]["decoupled_weight_decay"]
    refused(lambda: interop.rules_from_torch(old), opt, "whether that is Adam or AdamW")
    interop.from_torch(opt, old)


def test_the_order_of_parameters() -> None:
    split = torch_adam()
    groups = [{**ADAM_GROUP, "params": [k]} for k in (0, 1)]
    split["param_groups"] = groups
    opt = fresh()
    refused(lambda: interop.from_torch(opt, split), opt, "paths: torch has 2 groups")
    for wrong in (["w"], ["w", "w"], ["w", "c"]):
        paths = "paths: expected each of the paths ['w', 'b'] once"
        refused(partial(interop.from_torch, opt, split, paths=wrong), opt, paths)
    interop.from_torch(opt, split, paths=["w", "b"])
    turned = {"state": {0: adam_states(B), 1: adam_states(W)}, "param_groups": groups}
    interop.from_torch(opt, turned, paths=["b", "w"])
    two = fresh({"b": ADAMW, "w": ADAMW})
    interop.from_torch(two, turned)
    assert_same(held(two), held(opt))
    np.testing.assert_equal(interop.to_torch(two, tensors=False), turned)
    names = {**ADAM_GROUP, "param_names": ["b", "w"]}
    interop.from_torch(opt, {"state": turned["state"], "param_groups": [names]})
    assert_same(held(two), held(opt))


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (fo.Lion(), "torch.optim has no Lion"),
        (fo.Momentum(), "form 'ema' here, 'buffer' there in torch"),
        (fo.AdaGrad(), "eps_root 1e-16 here, 0.0 there in torch"),
        (fo.AdamW(amsgrad="corrected"), "amsgrad 'corrected' here, 'raw' there in torch"),
        (fo.AdamW(decay="independent"), "decay 'independent' here"),
        (fo.Adam(nesterov=True), "nesterov True here"),
        (fo.RMSProp(eps_root=0.0, bias_correction=True), "bias_correction True here"),
    ],
    ids=lambda x: x.summary() if isinstance(x, fo.Rule) else "",
)
def test_what_torch_does_not_have(rule: fo.Rule, reason: str) -> None:
    opt = fresh({"w": rule, "b": fo.SGD(decay="decoupled", weight_decay=0.1)})
    reasons = (f"'w': {reason}", "'b': decay 'decoupled' here, 'l2' there in torch")
    refused(lambda: interop.to_torch(opt, tensors=False), opt, *reasons)


def test_muon_of_torch() -> None:
    matrix = draw(0, (4, 3), np.float64)
    for rule, reason in (
        (fo.Muon(eps=1e-7, ns_coefficients="polar_express"), "ns_coefficients"),
        (fo.Muon(eps=1e-7, scale="spectral"), "'spectral'"),
        (fo.Muon(eps=1e-7, norm="aol"), "norm 'aol' here, 'frobenius' there"),
    ):
        opt = fo.Optimizer(matrix.copy(), rule)
        refused(partial(interop.to_torch, opt, tensors=False), opt, reason)
    rule = fo.Muon(eps=1e-7, gram=True, scale="match_rms_adamw")
    opt = fo.Optimizer(matrix.copy(), rule)
    opt.step(matrix.copy())
    made = interop.to_torch(opt, tensors=False)
    group = made["param_groups"][0]
    assert (group["adjust_lr_fn"], group["ns_steps"]) == ("match_rms_adamw", 5)
    assert group["ns_coefficients"] == (3.4445, -4.775, 2.0315)
    np.testing.assert_array_equal(made["state"][0]["momentum_buffer"], opt.state["params"]["m"])
    refused(lambda: interop.from_torch(opt, made), opt, "step: torch.optim.SGD and Muon")


def test_states_are_stored_as_the_optimizer_stores_them() -> None:
    p = draw(0, 5003, BF16)
    m, v = draw(1, 5003, np.float32), np.abs(draw(2, 5003, np.float32))
    m[7], v[7] = 1e-40, 1e-40
    group = {**ADAM_GROUP, "amsgrad": False, "params": [0]}
    state = {"state": {0: {"step": 5, "exp_avg": m, "exp_avg_sq": v}}, "param_groups": [group]}
    rule = fo.AdamW.like("torch", lr=0.1, betas=(0.9, 0.99))
    opt = fo.Optimizer(
        p,
        rule,
        state_dtype={"m": "bfloat16", "v": "float8"},
        master="float32",
        ema=0.9,
        verify=True,
    )
    p[3] = 4.0  # masters are taken anew
    interop.from_torch(opt, state)
    here = opt.state["params"]
    np.testing.assert_array_equal(here["m"], np.where(m == m[7], 0, m).astype(BF16))
    np.testing.assert_allclose(here["v"].dequantize(), v, rtol=1 / 16, atol=v.max() / 50_000)
    assert here["master"][3] == here["average"][3] == 4
    assert set(interop.to_torch(opt, tensors=False)["state"][0]) == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    opt.step(draw(3, 5003, BF16))


# ---------------------------------------------------------------- optax

# Look-alikes of its named tuples.
ScaleByAdamState = namedtuple("ScaleByAdamState", "count mu nu")  # noqa: PYI024
ScaleByScheduleState = namedtuple("ScaleByScheduleState", "count")  # noqa: PYI024
ScaleByRStdDevState = namedtuple("ScaleByRStdDevState", "mu nu")  # noqa: PYI024
ScaleByYogiState = namedtuple("ScaleByYogiState", "count mu nu")  # noqa: PYI024
TraceState = namedtuple("TraceState", "trace")  # noqa: PYI024
EmptyState = namedtuple("EmptyState", "")  # noqa: PYI024
MaskedState = namedtuple("MaskedState", "inner_state")  # noqa: PYI024
MaskedNode = namedtuple("MaskedNode", "")  # noqa: PYI024


def count(n: int) -> Any:
    return np.array(n, np.int32)


def scaled(a: float) -> dict[str, Any]:
    return {"b": a * B, "w": a * W}  # in the order that JAX gives keys


def test_optaxs_layout() -> None:
    opt = fresh(fo.AdamW.like("optax", lr=lambda step: 0.1))
    adam = ScaleByAdamState(count(4), scaled(1), scaled(2))
    state = (adam, EmptyState(), ScaleByScheduleState(count(4)))
    interop.from_optax(opt, state)
    assert (opt.step_count, opt.state_dict()["leaves"]["b"]["t"]) == (4, 4)
    np.testing.assert_array_equal(opt.state["w"]["v"], 2 * W)
    zeros = (
        ScaleByAdamState(count(0), scaled(0), scaled(0)),
        EmptyState(),
        ScaleByScheduleState(count(0)),
    )
    there = interop.to_optax(opt, zeros)
    np.testing.assert_equal(there, state)
    assert list(there[0].mu) == ["b", "w"]
    assert type(there[0]).__name__ == "ScaleByAdamState"
    there[0].mu["w"][...] = 9
    assert opt.state["w"]["m"][0, 0] == 1
    assert zeros[0].count == 0


def test_optaxs_rmsprop_traces_downwards() -> None:
    opt = fresh(fo.RMSProp.like("optax", lr=0.1, momentum=0.9, centered=True))
    state = (ScaleByRStdDevState(scaled(1), scaled(2)), EmptyState(), TraceState(scaled(-3)))
    refused(lambda: interop.from_optax(opt, state), opt, "step: no part of this state counts")
    interop.from_optax(opt, state, step=2)
    np.testing.assert_array_equal(opt.state["b"]["b"], 3 * B)
    np.testing.assert_array_equal(opt.state["b"]["a"], B)
    np.testing.assert_equal(interop.to_optax(opt, state), state)


def test_optaxs_masks() -> None:
    rules = {"w": fo.Adam.like("optax", lr=0.1), "b": fo.Nesterov.like("optax", lr=0.1)}
    opt = fresh(rules)
    only_w = {"w": W, "b": MaskedNode()}
    adam = MaskedState((ScaleByAdamState(count(2), only_w, only_w), EmptyState()))
    state = (adam, MaskedState((TraceState({"w": MaskedNode(), "b": B}), EmptyState())))
    interop.from_optax(opt, state)
    np.testing.assert_array_equal(opt.state["b"]["v"], B)
    np.testing.assert_equal(interop.to_optax(opt, state), state)


def test_what_does_not_fit_optax() -> None:
    adam = ScaleByAdamState(count(2), scaled(1), scaled(2))
    act = interop.from_optax
    opt = fresh(fo.Adam.like("optax", lr=0.1))
    for state, reason in (
        ((ScaleByYogiState(*adam),), "ScaleByYogiState has no equal here"),
        ((adam, adam), "w: m is there twice"),
        ((EmptyState(),), "step: no part"),
        ((ScaleByScheduleState(count(2)),), "b: states ['m', 'v'] here, [] there"),
        ((adam._replace(mu={"w": W}),), "ScaleByAdamState.mu: the keys differ"),
        ((adam._replace(mu={"w": W, "b": W}),), "b: m has shape (2,) here, (2, 2) there"),
        (3, "expected the state of a transformation, got a int"),
    ):
        refused(partial(act, opt, state), opt, reason)
    refused(lambda: act(opt, (adam,), step=1), opt, "step: 1 given, 2 there")
    for rule, reason in (
        (fo.Adam(hat=True), "hat True here, False in optax"),
        (fo.Adam(amsgrad="raw"), "amsgrad 'raw' here, False or 'corrected' in optax"),
        (fo.Momentum(), "form 'ema' here, 'buffer' in optax"),
        (fo.Lion(), "ScaleByAdamState is none of Lion"),
    ):
        other = fresh(rule)
        refused(partial(act, other, (adam,)), other, reason)
        refused(partial(interop.to_optax, other, (adam,)), other, reason)
    opt.step({"w": W, "b": None})
    counts = "ScaleByAdamState has one count, and leaves here saw [0, 1] steps"
    refused(lambda: interop.to_optax(opt, (adam,)), opt, counts)
    lacking = "w: states ['m', 'v'] here, [] there"
    refused(lambda: interop.to_optax(opt, (EmptyState(),)), opt, lacking)
