"""States that move to and from PyTorch, optax and bitsandbytes; those layouts without them too."""

from __future__ import annotations

import copy
import importlib
import re
from collections import namedtuple
from functools import partial
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from formatted import BF16, assert_same, draw, held, published_map
from fusedopt import interop
from golden import problem, record
from golden.cases import CASES, Case

HALF = 10


def rule_of(case: Case) -> Any:
    arguments = dict(case.hyperparameters)
    if case.schedule:
        arguments["lr"] = partial(problem.learning_rate, arguments["lr"])
    return fo.RULES[case.rule].like(case.library, **arguments)


def optimizer(case: Case, params: problem.Tree) -> fo.Optimizer:
    return fo.Optimizer(copy.deepcopy(params), rule_of(case))


def curvature(case: Case, t: int) -> problem.Tree | None:
    refresh = case.rule == "sophia" and t % problem.HESSIAN_EVERY == 1
    return problem.curvature(case.rule, t) if refresh else None


def go_on(opt: fo.Optimizer, case: Case, first: int, last: int) -> None:
    for t in range(first, last + 1):
        opt.step(problem.gradients(case.rule, t), hessian=curvature(case, t))


def of_library(name: str) -> pytest.MarkDecorator:
    cases = [case for case in CASES if case.library == name]
    ids = [f"{case.rule}-{case.variant}" for case in cases]
    return pytest.mark.parametrize("case", cases, ids=ids)


def assert_trajectory(case: Case, got: problem.Tree, want: problem.Tree) -> None:
    start = problem.parameters(case.rule)
    for name, a in want.items():
        bound = problem.allowed(case.tolerance, problem.STEPS, start[name], a)
        share = (np.abs(got[name] - a) / bound).max()
        assert share <= 1, f"{name}: {share:.3g} times the allowed difference"


# ---------------------------------------------------------------- with the libraries


class TorchRun:
    """An optimizer of torch.optim on float64 tensors; the rate is set for the next step."""

    def __init__(self, case: Case, start: problem.Tree) -> None:
        self.torch = pytest.importorskip("torch")
        self.case = case
        self.tensors = {name: self.torch.tensor(p) for name, p in start.items()}
        cls = getattr(self.torch.optim, case.function)
        self.optimizer = cls(self.tensors.values(), **case.arguments())

    def go_on(self, first: int, last: int) -> None:
        for t in range(first, last + 1):
            for name, g in problem.gradients(self.case.rule, t).items():
                self.tensors[name].grad = self.torch.tensor(g)
            if self.case.schedule:
                self.optimizer.param_groups[0]["lr"] = self.case.lr(t)
            self.optimizer.step()
        if self.case.schedule:
            self.optimizer.param_groups[0]["lr"] = self.case.lr(last + 1)

    @property
    def params(self) -> problem.Tree:
        return {name: tensor.numpy().copy() for name, tensor in self.tensors.items()}


@of_library("torch")
def test_from_torch_and_on(case: Case) -> None:
    run = TorchRun(case, problem.parameters(case.rule))
    run.go_on(1, HALF)
    opt = optimizer(case, run.params)
    interop.from_torch(opt, run.optimizer.state_dict(), step=HALF)
    (rule,) = interop.rules_from_torch(run.optimizer.state_dict())
    if not case.schedule:
        assert rule == rule_of(case)
    assert opt.step_count == HALF
    run.go_on(HALF + 1, problem.STEPS)
    go_on(opt, case, HALF + 1, problem.STEPS)
    assert_trajectory(case, opt.params, run.params)


@of_library("torch")
def test_to_torch_and_on(case: Case) -> None:
    straight = TorchRun(case, problem.parameters(case.rule))
    straight.go_on(1, problem.STEPS)
    opt = optimizer(case, problem.parameters(case.rule))
    go_on(opt, case, 1, HALF)
    run = TorchRun(case, opt.params)
    groups = run.optimizer.state_dict()["param_groups"]
    made = interop.to_torch(opt)
    assert [set(group) for group in made["param_groups"]] == [set(group) for group in groups]
    run.optimizer.load_state_dict(made)
    run.go_on(HALF + 1, problem.STEPS)
    assert_trajectory(case, run.params, straight.params)


def optax_run(
    case: Case, params: problem.Tree, state: Any, first: int, last: int
) -> tuple[problem.Tree, Any]:
    """Steps of an optax transformation; state: where it begins, None for its `init`."""
    optax = pytest.importorskip("optax")
    jax = importlib.import_module("jax")
    transformation = record.optax_transformation(case)
    tree: Any = {name: jax.numpy.array(p) for name, p in params.items()}
    state = transformation.init(tree) if state is None else state
    for t in range(first, last + 1):
        extra = {"curvature": problem.curvature(case.rule, t)} if case.rule == "sophia" else {}
        grads = problem.gradients(case.rule, t)
        updates, state = transformation.update(grads, state, tree, **extra)
        tree = optax.apply_updates(tree, updates)
    return {name: np.array(p) for name, p in tree.items()}, state


@of_library("optax")
def test_optax_both_ways(case: Case) -> None:
    start = problem.parameters(case.rule)
    params, state = optax_run(case, start, None, 1, HALF)
    want, _ = optax_run(case, params, state, HALF + 1, problem.STEPS)
    opt = optimizer(case, params)
    interop.from_optax(opt, state, step=HALF)
    assert opt.step_count == HALF
    go_on(opt, case, HALF + 1, problem.STEPS)
    assert_trajectory(case, opt.params, want)
    back = optimizer(case, start)
    go_on(back, case, 1, HALF)
    _, template = optax_run(case, start, None, 1, 0)
    there = interop.to_optax(back, template)
    got, _ = optax_run(case, back.params, there, HALF + 1, problem.STEPS)
    assert_trajectory(case, got, want)


def test_optax_masks_and_injected_hyperparameters() -> None:
    optax = pytest.importorskip("optax")
    jax = importlib.import_module("jax")
    params = {"w": np.ones((4, 3), np.float32), "b": [np.ones(3, np.float32)]}
    grads = {"w": draw(0, (4, 3), np.float32), "b": [draw(1, 3, np.float32)]}
    muon = optax.contrib.muon(0.1)
    _, state = muon.update(grads, muon.init(params), params)
    rules = {
        "w": fo.Muon.like("optax", lr=0.1),
        "b.*": fo.AdamW.like("optax", lr=0.1, weight_decay=0.0),
    }
    opt = fo.Optimizer(copy.deepcopy(params), rules)
    interop.from_optax(opt, state)
    returned = interop.to_optax(opt, muon.init(params))
    jax.tree.map(np.testing.assert_array_equal, returned, state)
    injected = optax.inject_hyperparams(optax.adam)(0.1)
    _, state = injected.update(grads, injected.init(params), params)
    opt = fo.Optimizer(copy.deepcopy(params), fo.Adam.like("optax", lr=0.1))
    interop.from_optax(opt, state)
    returned = interop.to_optax(opt, injected.init(params))
    jax.tree.map(np.testing.assert_array_equal, returned, state)


def test_torchs_low_precision_and_groups() -> None:
    torch = pytest.importorskip("torch")
    tensors = [torch.ones(n, dtype=torch.bfloat16, requires_grad=True) for n in (3, 4, 5)]
    for tensor in tensors:
        tensor.grad = torch.arange(len(tensor)).to(torch.bfloat16) / 3
    named = [{"params": [("c", tensors[2])]}, {"params": [("b", tensors[1]), ("a", tensors[0])]}]
    adamw = torch.optim.AdamW(named, lr=0.1)
    adamw.step()
    params = {name: np.ones(n, BF16) for name, n in zip("abc", (3, 4, 5), strict=True)}
    opt = fo.Optimizer(params, fo.AdamW.like("torch", lr=0.1), state_dtype="bfloat16")
    interop.from_torch(opt, adamw.state_dict())
    for name, tensor in zip("abc", tensors, strict=True):
        theirs = adamw.state[tensor]["exp_avg_sq"].float().numpy()
        np.testing.assert_array_equal(opt.state[name]["v"].astype(np.float32), theirs)


# ---------------------------------------------------------------- recorded layouts

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


def refused(act: Any, opt: fo.Optimizer, *parts: str) -> None:
    before = held(opt) | {"t": np.array(opt.step_count)}
    with pytest.raises(ValueError, match=re.escape(parts[0])) as raised:
        act()
    for part in parts:
        assert part in str(raised.value)
    assert_same(held(opt) | {"t": np.array(opt.step_count)}, before)


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
        p, rule, state_dtype={"m": "bfloat16", "v": "float8"}, master="float32", verify=True
    )
    p[3] = 4.0  # masters are taken anew
    interop.from_torch(opt, state)
    here = opt.state["params"]
    np.testing.assert_array_equal(here["m"], np.where(m == m[7], 0, m).astype(BF16))
    np.testing.assert_allclose(here["v"].dequantize(), v, rtol=1 / 16, atol=v.max() / 50_000)
    assert here["master"][3] == 4
    opt.step(draw(3, 5003, BF16))


# optax, in look-alikes of its named tuples.
ScaleByAdamState = namedtuple("ScaleByAdamState", "count mu nu")  # noqa: PYI024
ScaleByScheduleState = namedtuple("ScaleByScheduleState", "count")  # noqa: PYI024
ScaleByRStdDevState = namedtuple("ScaleByRStdDevState", "mu nu")  # noqa: PYI024
ScaleByBeliefState = namedtuple("ScaleByBeliefState", "count mu nu")  # noqa: PYI024
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
        ((ScaleByBeliefState(*adam),), "ScaleByBeliefState has no equal here"),
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


# ---------------------------------------------------------------- bitsandbytes

N = 5003
BNB_GROUP = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01, "params": [0, 1]}
BNB_RULE = fo.AdamW(lr=0.1, betas=(0.9, 0.99))


def eight_bit(seed: int, suffix: int, block: int) -> tuple[dict[str, Any], Any]:
    """One state in their layout, and its values."""
    rng = np.random.default_rng(seed)
    qmap = published_map("dynamic8" if suffix == 1 else "dynamic8_unsigned").astype(np.float32)
    codes = rng.integers(0, 256, N, dtype=np.uint8)
    absmax = 10 ** rng.uniform(-6, 0, -(-N // block)).astype(np.float32)
    values = qmap[codes] * np.repeat(absmax, block)[:N]
    return {f"state{suffix}": codes, f"qmap{suffix}": qmap, f"absmax{suffix}": absmax}, values


def bnb_state(block: int = 256, nested: bool = False) -> tuple[dict[str, Any], Any, Any]:
    (first, m), (second, v) = eight_bit(0, 1, block), eight_bit(1, 2, block)
    large: dict[str, Any] = {**first, **second}
    if nested:
        large = {"__bnb_optimizer_quant_state__": large}
    small = {"step": 6, "state1": B.astype(np.float32), "state2": 2 * B.astype(np.float32)}
    state = {0: {"step": 6, **large}, 1: small}
    return {"state": state, "param_groups": [dict(BNB_GROUP)]}, m, v


def bnb_optimizer(rule: Any = BNB_RULE, **options: Any) -> fo.Optimizer:
    return fo.Optimizer({"w": draw(0, N, np.float32), "b": B.astype(np.float32)}, rule, **options)


@pytest.mark.parametrize("nested", [False, True])
def test_codes_of_bitsandbytes_are_taken_as_they_are(nested: bool) -> None:
    state, m, v = bnb_state(nested=nested)
    opt = bnb_optimizer(state_dtype="dynamic8")
    interop.from_bitsandbytes(opt, state)
    found = opt.state["w"]
    entry = bnb_state()[0]["state"][0]
    for name, suffix, values in (("m", 1, m), ("v", 2, v)):
        np.testing.assert_array_equal(found[name].codes, entry[f"state{suffix}"])
        np.testing.assert_array_equal(found[name].scales, entry[f"absmax{suffix}"])
        np.testing.assert_allclose(found[name].dequantize(), values, rtol=1e-6)
    np.testing.assert_array_equal(opt.state["b"]["v"], (2 * B).astype(np.float32))
    assert opt.step_count == 6
    opt.step({"w": draw(1, N, np.float32), "b": B})


@pytest.mark.parametrize("block", [256, 2048])
def test_codes_of_bitsandbytes_are_decoded_exactly(block: int) -> None:
    state, m, v = bnb_state(block)
    opt = bnb_optimizer()
    interop.from_bitsandbytes(opt, state)
    np.testing.assert_array_equal(opt.state["w"]["m"], m)
    np.testing.assert_array_equal(opt.state["w"]["v"], v)
    again = bnb_optimizer(state_dtype={"m": "float32", "v": "dynamic8"})
    other = copy.deepcopy(state)
    other["state"][0]["qmap2"] = np.linspace(0, 1, 256, dtype=np.float32)
    interop.from_bitsandbytes(again, other)  # another map: encoded anew
    values = other["state"][0]["qmap2"][state["state"][0]["state2"]]
    values = values * np.repeat(state["state"][0]["absmax2"], block)[:N]
    # Half of the gap between the map's values, where the least of these lies.
    np.testing.assert_allclose(again.state["w"]["v"].dequantize(), values, rtol=0.15)


def test_other_optimizers_of_bitsandbytes() -> None:
    one, m = eight_bit(0, 1, 256)
    group = {**BNB_GROUP, "weight_decay": 0.0, "params": [0]}
    state = {"state": {0: {"step": 3, **one}}, "param_groups": [group]}
    for rule, name in (
        (fo.Lion(lr=0.1, betas=(0.9, 0.99)), "m"),
        (fo.Momentum.like("torch", lr=0.1, momentum=0.9), "v"),
    ):
        opt = fo.Optimizer(draw(0, N, np.float32), rule)
        interop.from_bitsandbytes(opt, state)
        np.testing.assert_array_equal(opt.state["params"][name], m)


def test_what_does_not_fit_bitsandbytes() -> None:
    opt = bnb_optimizer(state_dtype="dynamic8")

    def spoilt(**changes: Any) -> Any:
        state = bnb_state()[0]
        entry = state["state"][0]
        for name, value in changes.items():
            entry.pop(name) if value is None else entry.update({name: value})
        return partial(interop.from_bitsandbytes, opt, state)

    refused(spoilt(absmax1=None), opt, "w: state1 is not in blocks; make it with block_wise=True")
    refused(spoilt(absmax1=np.ones(7)), opt, "w: state1 has (7,) blocks and a map of (256,)")
    refused(spoilt(qmap2=np.ones(16)), opt, "w: state2 has (20,) blocks and a map of (16,)")
    refused(spoilt(state2=None), opt, "w: has no state2")
    refused(spoilt(state1=np.ones((2, N), np.uint8)), opt, f"state1 has shape (2, {N}) there")
    state = bnb_state()[0]
    state["param_groups"][0]["betas"] = (0.9, 0.95)
    betas = "w: betas (0.9, 0.99) here, (0.9, 0.95) there"
    refused(lambda: interop.from_bitsandbytes(opt, state), opt, betas, betas.replace("w", "b", 1))
    other = bnb_optimizer(fo.Sophia())
    act = partial(interop.from_bitsandbytes, other, state)
    refused(act, other, "has other states than the rules of bitsandbytes")
    lion = bnb_optimizer(fo.Lion(lr=0.1, betas=(0.9, 0.95), weight_decay=0.01))
    act = partial(interop.from_bitsandbytes, lion, state)
    refused(act, lion, "weight_decay 0.01 there, which the backends of lion treat differently")
