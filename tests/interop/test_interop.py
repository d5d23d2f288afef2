"""Runs that move to and from PyTorch and optax, where these are installed."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from formatted import BF16, draw
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


class OptaxRun:
    """A transformation of optax, compiled."""

    def __init__(self, case: Case) -> None:
        optax = pytest.importorskip("optax")
        self.jax, self.case = importlib.import_module("jax"), case
        transformation = record.optax_transformation(case)
        self.init = transformation.init

        def step(params: Any, state: Any, grads: Any, extra: Any) -> Any:
            updates, state = transformation.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        self.step = self.jax.jit(step)

    def go_on(self, params: problem.Tree, state: Any, first: int, last: int) -> Any:
        """The parameters and the state after these steps."""
        name, tree = self.case.rule, self.jax.tree.map(self.jax.numpy.array, params)
        for t in range(first, last + 1):
            extra = {"curvature": problem.curvature(name, t)} if name == "sophia" else {}
            tree, state = self.step(tree, state, problem.gradients(name, t), extra)
        return {name: np.array(p) for name, p in tree.items()}, state


@of_library("optax")
def test_optax_both_ways(case: Case) -> None:
    start, run = problem.parameters(case.rule), OptaxRun(case)
    params, state = run.go_on(start, run.init(start), 1, HALF)
    # In units of the estimate here, which the states there are not, or turned there.
    if fo.RULES[case.rule]().sides((2, 2)):
        with pytest.raises(ValueError, match="has no equal here"):
            interop.from_optax(optimizer(case, params), state, step=HALF)
        return
    want, _ = run.go_on(params, state, HALF + 1, problem.STEPS)
    opt = optimizer(case, params)
    interop.from_optax(opt, state, step=HALF)
    assert opt.step_count == HALF
    go_on(opt, case, HALF + 1, problem.STEPS)
    assert_trajectory(case, opt.params, want)
    back = optimizer(case, start)
    go_on(back, case, 1, HALF)
    there = interop.to_optax(back, run.init(start))
    got, _ = run.go_on(back.params, there, HALF + 1, problem.STEPS)
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


def test_schedule_free_of_optax_with_other_weights_is_refused() -> None:
    optax = pytest.importorskip("optax")
    params, grads = {"w": np.ones((4, 3), np.float32)}, {"w": draw(0, (4, 3), np.float32)}
    theirs = optax.contrib.schedule_free_sgd(0.5, warmup_steps=4)
    state = theirs.init(params)
    for _ in range(3):
        _, state = theirs.update(grads, state, params)
    opt = fo.Optimizer(copy.deepcopy(params), fo.ScheduleFreeSGD.like("optax", lr=0.5))
    with pytest.raises(
        ValueError, match=r"max_lr of 3 steps 0\.5 here, 0\.375 there; .*weight_sum"
    ):
        interop.from_optax(opt, state)
    adan = fo.Optimizer(copy.deepcopy(params), fo.Adan.like("optax", lr=0.5))
    with pytest.raises(ValueError, match="ScheduleFreeState is none of Adan"):
        interop.to_optax(adan, theirs.init(params))


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


def moments(value: Any, step: Any = 3) -> dict[str, Any]:
    """A state of torch's Adam on one parameter, with something odd in it."""
    state = {"step": step, "exp_avg": value, "exp_avg_sq": np.ones(4, np.float32)}
    group = {"params": [0], "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    group |= {"amsgrad": False, "maximize": False, "decoupled_weight_decay": False}
    return {"state": {0: state}, "param_groups": [group]}


FINE = np.ones(4, np.float32)
ODD: dict[str, tuple[Any, str]] = {
    "no groups": ({"state": {}, "param_groups": None}, "expected a list of dicts with 'params'"),
    "a group of nothing": ({"state": {}, "param_groups": [3]}, "expected a list of dicts"),
    "no params": ({"state": {}, "param_groups": [{"lr": 1.0}]}, "expected a list of dicts"),
    "a state of nothing": ({**moments(FINE), "state": {0: 7}}, "expected a dict of dicts"),
    "no state": ({**moments(FINE), "state": None}, "expected a dict of dicts"),
    "infinitely many steps": (moments(FINE, np.inf), r"state\[0\]\['step'\]: expected a number"),
    "half a step": (moments(FINE, 0.5), "expected a number of steps"),
    "fewer than no steps": (moments(FINE, -1), "expected a number of steps"),
    "several counts": (moments(FINE, np.ones(2)), "expected a number of steps"),
    "text for a count": (moments(FINE, "3"), "expected a number of steps"),
    "complex": (moments(np.ones(4, np.complex64)), "has dtype complex64 there"),
    "text": (moments("abc"), "has dtype <U3 there"),
    "another shape": (moments(np.ones(5)), r"has shape \(4,\) here, \(5,\) there"),
    "too large": (moments(np.full(4, 1e300)), "that float32 cannot hold, such as .*1e.300"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_states_of_torch_are_refused_and_nothing_changes(name: str) -> None:
    state, message = ODD[name]
    opt = fo.Optimizer(np.ones(4, np.float32), fo.Adam.like("torch"))
    before = opt.fingerprint()
    with pytest.raises(ValueError, match=message):
        fo.interop.from_torch(opt, state)
    assert opt.fingerprint() == before


OWN_WORDS = "expected|taken|does not fit|not available|no equal|no default|make the rule"
GONE = object()
ANYTHING: tuple[Any, ...] = (
    None, -1, 0.5, 10**400, np.nan, np.inf, 1 + 2j, True, "text", b"text", [], {}, set(), [1],
    {"a": 1}, object(), np.ones(2), np.array("text"), np.array(None), GONE,
)  # fmt: skip


def tensors() -> tuple[Any, ...]:
    torch = pytest.importorskip("torch")
    return (
        torch.ones(4).to_sparse(), torch.ones(4, device="meta"), torch.ones(4, dtype=torch.int64),
        torch.tensor(0.5), torch.ones(4, dtype=torch.complex64),
        torch.full((2, 2), 1e300, dtype=torch.float64),
    )  # fmt: skip


def places(node: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to all that is in a state_dict."""
    keys: Any = node if isinstance(node, dict) else ()
    for key in range(len(node)) if isinstance(node, list) else keys:
        yield (*way, key)
        yield from places(node[key], (*way, key))


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Rprop", "Adagrad", "Muon", "Adafactor"])
def test_anything_anywhere_in_a_state_of_torch(name: str) -> None:
    """It is taken, or refused in words of the package's own."""
    torch = pytest.importorskip("torch")
    w = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = getattr(torch.optim, name)([w], **({"momentum": 0.9} if name == "SGD" else {}))
    w.grad = torch.ones(2, 2)
    optimizer.step()
    fine = optimizer.state_dict()
    (rule,) = interop.rules_from_torch(fine)
    strays = []
    for way in places(fine):
        for odd in (*ANYTHING, *tensors()):
            state = copy.deepcopy(fine)
            inner = state
            for key in way[:-1]:
                inner = inner[key]
            if odd is GONE:
                del inner[way[-1]]
            else:
                inner[way[-1]] = odd
            opt = fo.Optimizer(np.ones((2, 2), np.float32), rule)
            told = "taken"
            try:
                interop.from_torch(opt, state, step=3)
            except (ValueError, TypeError) as error:
                told = str(error)
            if not re.search(
                "expected|taken|does not fit|not avail|no equal|no default|make the", told
            ):
                strays.append((way, odd, told))
    assert not strays, [stray[2] for stray in strays]


@pytest.mark.parametrize("step", [-1, 1.5, True, "3"])
def test_the_number_of_steps_is_an_integer(step: Any) -> None:
    opt = fo.Optimizer(np.ones(4, np.float32), fo.Adam.like("torch"))
    with pytest.raises(ValueError, match="step: expected an integer >= 0"):
        fo.interop.from_torch(opt, moments(FINE), step=step)


def test_what_is_not_odd_is_taken() -> None:
    opt = fo.Optimizer(np.ones(4, np.float32), fo.Adam.like("torch"))
    fo.interop.from_torch(opt, moments(FINE))
    assert opt.step_count == 3
    assert opt.state["params"]["m"].tolist() == [1.0] * 4
