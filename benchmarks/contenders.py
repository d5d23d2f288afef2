"""Who steps a problem: the limit, fusedopt in two ways, NumPy in two ways, PyTorch if installed.

Each function takes a problem and returns a contender on the problem's own arrays. Threads: as many
for each as fusedopt uses.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import fusedopt as fo
import naive
from limit import Sweep, check_sweep
from problems import Problem, Step

if fo.info()["backend"] != "native":
    raise RuntimeError(
        f"these benchmarks time the compiled core, and fusedopt in {fo.__path__[0]} runs on"
        f" {fo.info()['backend']!r}; install it with `pip install .`, and where that is the source"
        " folder, start `pytest` rather than `python -m pytest`"
    )


@dataclass(frozen=True)
class Contender:
    """step: takes one step of the whole problem. check: takes the first, and asserts its answer."""

    name: str
    step: Step
    check: Callable[[], None]


def _contender(name: str, problem: Problem, step: Step) -> Contender:
    return Contender(name, step, functools.partial(problem.check_first, step))


def limit(problem: Problem) -> Contender:
    """The same reads and writes with next to no arithmetic; it leaves all values as they are."""
    written = set(problem.written_states)
    kept = set(range(len(problem.rule.states))) - written
    sweep = Sweep(
        [
            ((g, *(states[k] for k in kept)), (p, *(states[k] for k in written)))
            for p, g, states in problem.leaves
        ],
        fo.get_threads(),
    )

    def check() -> None:
        check_sweep(1 + len(kept), 1 + len(written), problem.leaves[0].p.dtype, fo.get_threads())
        before = problem.sample()
        sweep()
        np.testing.assert_array_equal(problem.sample(), before)

    return Contender("limit", sweep, check)


def fused(problem: Problem) -> Contender:
    """`Optimizer.step` with another dict of gradients in each step."""
    step, grads = problem.optimizer.step, problem.grads
    trees = itertools.cycle([dict(grads), dict(grads)])  # never the last step's
    return _contender("fusedopt", problem, lambda: step(next(trees)))


def functional(problem: Problem) -> Contender:
    """`fusedopt.update`, for a problem of one tensor."""
    ((p, g, states),) = problem.leaves
    update, rule, steps = fo.update, problem.rule, itertools.count(1)
    return _contender("fusedopt.update", problem, lambda: update(rule, next(steps), p, g, *states))


def numpy(problem: Problem) -> Contender:
    """Careful NumPy, for the rules of naive.py."""
    one, rule, steps = naive.STEPS[problem.rule.name], problem.rule, itertools.count(1)
    scratch = np.empty(max(leaf.p.size for leaf in problem.leaves), problem.leaves[0].p.dtype)
    leaves = [(*leaf, scratch[: leaf.p.size].reshape(leaf.p.shape)) for leaf in problem.leaves]

    def step() -> None:
        t = next(steps)
        for p, g, states, a in leaves:
            one(rule, t, p, g, states, a)

    return _contender("NumPy", problem, step)


def textbook(problem: Problem) -> Contender:
    """NumPy as one writes it down: the rule's reference, with a temporary for every operation."""
    rule, steps = problem.rule, itertools.count(1)

    def step() -> None:
        t = next(steps)
        for p, g, states in problem.leaves:
            p[...], new = rule.reference(p, g, states, t=t, lr=rule.lr_at(t))
            for state, value in zip(states, new, strict=True):
                state[...] = value

    return _contender("textbook", problem, step)


# Of each rule PyTorch's class, its names for our states, and its fastest form on a CPU: fused
# where it exists, else foreach.
TORCH: dict[str, tuple[str, tuple[str, ...], Callable[[Any], dict[str, Any]]]] = {
    "sgd": ("SGD", (), lambda rule: {"fused": True}),
    "momentum": (
        "SGD",
        ("momentum_buffer",),
        lambda rule: {"momentum": rule.momentum, "dampening": rule.dampening, "fused": True},
    ),
    "nesterov": (
        "SGD",
        ("momentum_buffer",),
        lambda rule: {"momentum": rule.momentum, "nesterov": True, "fused": True},
    ),
    "adagrad": ("Adagrad", ("sum",), lambda rule: {"eps": rule.eps, "fused": True}),
    "rmsprop": (
        "RMSprop",
        ("square_avg",),
        lambda rule: {"alpha": rule.rho, "eps": rule.eps, "foreach": True},
    ),
    "adam": (
        "Adam",
        ("exp_avg", "exp_avg_sq"),
        lambda rule: {"betas": rule.betas, "eps": rule.eps, "fused": True},
    ),
    "adamw": (
        "AdamW",
        ("exp_avg", "exp_avg_sq"),
        lambda rule: {"betas": rule.betas, "eps": rule.eps, "fused": True},
    ),
}


@functools.cache
def pytorch() -> Any:
    """The module, or None where it is not installed."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    torch.set_num_threads(fo.get_threads())
    return torch


def torch(problem: Problem) -> Contender:
    """PyTorch's optimizer in its fastest form on a CPU, for the rules of TORCH."""
    module, rule = pytorch(), problem.rule
    cls, names, arguments = TORCH[rule.name]
    parameters = [module.from_numpy(leaf.p) for leaf in problem.leaves]
    for parameter, leaf in zip(parameters, problem.leaves, strict=True):
        parameter.grad = module.from_numpy(leaf.g)
    optimizer = getattr(module.optim, cls)(
        parameters, lr=rule.lr, weight_decay=rule.weight_decay, **arguments(rule)
    )
    for parameter, leaf in zip(parameters, problem.leaves, strict=True):
        optimizer.state[parameter] = {
            "step": module.zeros((), dtype=module.float32),
            **dict(zip(names, map(module.from_numpy, leaf.states), strict=True)),
        }
    return _contender("torch", problem, optimizer.step)


def entrants(rule: str, tensors: int) -> dict[str, Callable[[Problem], Contender]]:
    """Who can step so many tensors by this rule here, by the contender's name."""
    able: dict[str, Callable[[Problem], Contender]] = {
        "limit": limit,
        "fusedopt": fused,
        "textbook": textbook,
    }
    if tensors == 1:
        able["fusedopt.update"] = functional
    if rule in naive.STEPS:
        able["NumPy"] = numpy
    if rule in TORCH and pytorch() is not None:
        able["torch"] = torch
    return able


def enter(problem: Problem, *names: str) -> list[Contender]:
    """Those of the named contenders that can step this problem here."""
    able = entrants(problem.rule.name, len(problem.leaves))
    return [able[name](problem) for name in names if name in able]
