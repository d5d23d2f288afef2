"""Who steps a problem: memory alone, fusedopt in two ways, NumPy in three, PyTorch if installed.

Each function takes a problem and returns a contender on the problem's own arrays. Threads: as many
for each as fusedopt uses; NumPy has one.
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

from . import naive
from .memory import Sweep
from .problems import Problem, Step

LIMIT = "limit"


@dataclass(frozen=True)
class Contender:
    """step: takes one step of the whole problem. check: takes the first, and looks at its answer;
    VerificationError where that is wrong."""

    name: str
    step: Step
    check: Callable[[], object]


def contender(name: str, problem: Problem, step: Step) -> Contender:
    """One whose step is the rule's, from the first on."""
    return Contender(name, step, functools.partial(problem.check, step))


def idle(problem: Problem, sweep: Step) -> Contender:
    """The limit: one whose step reads and writes, and changes nothing."""

    def check() -> None:
        before = problem.sample()
        sweep()
        if not all(map(np.array_equal, before, problem.sample())):
            raise fo.VerificationError("the sweep that is the limit changed the arrays")

    return Contender(LIMIT, sweep, check)


def memory(problem: Problem) -> Contender:
    """Read and write the same bytes with next to no arithmetic, by NumPy in threads."""
    return idle(problem, Sweep(problem.traffic))


def fused(problem: Problem) -> Contender:
    """`Optimizer.step` with another dict of gradients in each step."""
    optimizer, grads = problem.optimizer, problem.grads
    step, trees = optimizer.step, itertools.cycle([dict(grads), dict(grads)])  # not the last step's

    def check() -> None:
        problem.check(one, optimizer.step_count + 1)

    def one() -> object:
        return step(next(trees))

    return Contender("fusedopt", one, check)


def functional(problem: Problem) -> Contender:
    """`fusedopt.update`, for a problem of one tensor."""
    ((p, g, states),) = problem.leaves
    update, rule, steps = fo.update, problem.rule, itertools.count(1)
    return contender("fusedopt.update", problem, lambda: update(rule, next(steps), p, g, *states))


def numpy(problem: Problem, *, anew: bool = False) -> Contender:
    """Careful NumPy, for the rules of naive.py. anew: with temporaries made in every step."""
    one, rule, steps = naive.STEPS[problem.rule.name], problem.rule, itertools.count(1)
    scratch = np.empty(max(leaf.p.size for leaf in problem.leaves), problem.leaves[0].p.dtype)
    leaves = [
        (*leaf, None if anew else scratch[: leaf.p.size].reshape(leaf.p.shape))
        for leaf in problem.leaves
    ]

    def step() -> None:
        t = next(steps)
        for p, g, states, a in leaves:
            one(rule, t, p, g, states, a)

    return contender("NumPy, temporaries" if anew else "NumPy", problem, step)


def textbook(problem: Problem) -> Contender:
    """NumPy as one writes it down: the rule's reference, with a temporary for every operation."""
    rule, steps = problem.rule, itertools.count(1)

    def step() -> None:
        t = next(steps)
        for p, g, states in problem.leaves:
            p[...], new = rule.reference(p, g, states, t=t, lr=rule.lr_at(t))
            for state, value in zip(states, new, strict=True):
                state[...] = value

    return contender("textbook", problem, step)


Settings = Callable[[Any], dict[str, Any]]


def _sgd(rule: Any) -> dict[str, Any]:
    return {"momentum": rule.momentum, "dampening": rule.dampening}


def _adam(rule: Any) -> dict[str, Any]:
    return {"betas": rule.betas, "eps": rule.eps}


# For each rule PyTorch's class, its names for our states, its arguments, and its forms on a CPU,
# the fastest first.
TORCH: dict[str, tuple[str, tuple[str, ...], Settings, tuple[str, ...]]] = {
    "sgd": ("SGD", (), lambda rule: {}, ("fused", "foreach")),
    "momentum": ("SGD", ("momentum_buffer",), _sgd, ("fused", "foreach")),
    "nesterov": (
        "SGD",
        ("momentum_buffer",),
        lambda rule: {"momentum": rule.momentum, "nesterov": True},
        ("fused",),  # the other form adds the momentum to the gradients themselves
    ),
    "adagrad": ("Adagrad", ("sum",), lambda rule: {"eps": rule.eps}, ("fused", "foreach")),
    "rmsprop": (
        "RMSprop",
        ("square_avg",),
        lambda rule: {"alpha": rule.rho, "eps": rule.eps},
        ("foreach",),
    ),
    "adam": ("Adam", ("exp_avg", "exp_avg_sq"), _adam, ("fused", "foreach")),
    "adamw": ("AdamW", ("exp_avg", "exp_avg_sq"), _adam, ("fused", "foreach")),
}


@functools.cache
def pytorch() -> Any:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


def torch(problem: Problem, form: str) -> Contender:
    """PyTorch's optimizer in one of its forms, for the rules of TORCH."""
    module, rule = pytorch(), problem.rule
    module.set_num_threads(fo.get_threads())
    cls, names, arguments, _ = TORCH[rule.name]
    parameters = [module.from_numpy(leaf.p) for leaf in problem.leaves]
    for parameter, leaf in zip(parameters, problem.leaves, strict=True):
        parameter.grad = module.from_numpy(leaf.g)
    optimizer = getattr(module.optim, cls)(
        parameters,
        lr=rule.lr,
        weight_decay=rule.weight_decay,
        **arguments(rule),
        **{form: True},
    )
    for parameter, leaf in zip(parameters, problem.leaves, strict=True):
        optimizer.state[parameter] = {
            "step": module.zeros((), dtype=module.float32),
            **dict(zip(names, map(module.from_numpy, leaf.states), strict=True)),
        }
    return contender(f"torch {form}", problem, optimizer.step)


Entrants = dict[str, Callable[[Problem], Contender]]


def entrants(rule: str, tensors: int) -> Entrants:
    """Return the contenders that can step `tensors` tensors by this rule here, by name."""
    able: Entrants = {LIMIT: memory, "fusedopt": fused, "textbook": textbook}
    if tensors == 1:
        able["fusedopt.update"] = functional
    if rule in naive.STEPS:
        able["NumPy"] = numpy
        able["NumPy, temporaries"] = functools.partial(numpy, anew=True)
    if rule in TORCH and pytorch() is not None:
        for form in TORCH[rule][-1]:
            able[f"torch {form}"] = functools.partial(torch, form=form)
    return able


def enter(problem: Problem, *names: str) -> list[Contender]:
    """Return those of the named contenders that can step this problem here."""
    able = entrants(problem.rule.name, len(problem.leaves))
    return [able[name](problem) for name in names if name in able]
