"""Who steps a problem: those of fusedopt/bench/contenders.py, a compiled limit, optax, DeepSpeed.

The limit is limit.cpp's in place of NumPy's. The libraries take part where they are installed.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from dataclasses import replace
from typing import Any

import fusedopt as fo
from fusedopt.lab.bench import contenders as shared
from fusedopt.lab.bench.contenders import LIMIT, Contender, Entrants, contender
from fusedopt.lab.bench.problems import Problem
from limit import Sweep, check_sweep

if fo.info()["backend"] != "native":
    raise RuntimeError(
        f"these benchmarks time the compiled core, and fusedopt in {fo.__path__[0]} runs on"
        f" {fo.info()['backend']!r}; install it with `pip install .`, and where that is the source"
        " folder, start `pytest` rather than `python -m pytest`"
    )


def limit(problem: Problem) -> Contender:
    """Read and write the same bytes with next to no arithmetic; all values stay as they are."""
    traffic = problem.traffic
    read, updated = map(len, traffic[0])
    sweep = Sweep(traffic, fo.get_threads())
    made = shared.idle(problem, sweep)

    def check() -> None:
        check_sweep(read, updated, problem.leaves[0].p.dtype, fo.get_threads())
        made.check()

    return replace(made, check=check)


# Of each rule optax's function, its names for our states, and its arguments.
OPTAX: dict[str, tuple[str, tuple[str, ...], Any]] = {
    "sgd": ("sgd", (), lambda rule: {}),
    "adam": ("adam", ("mu", "nu"), lambda rule: {"eps": rule.eps}),
    "adamw": (
        "adamw",
        ("mu", "nu"),
        lambda rule: {"eps": rule.eps, "weight_decay": rule.weight_decay},
    ),
    "lion": ("lion", ("mu",), lambda rule: {"weight_decay": rule.weight_decay}),
}


@functools.cache
def libraries() -> tuple[Any, Any]:
    """jax and optax, or None twice where they are not installed."""
    try:
        return importlib.import_module("jax"), importlib.import_module("optax")
    except ImportError:
        return None, None


def optax(problem: Problem) -> Contender:
    """optax, compiled, with its arrays given up to each step, for the float32 rules of OPTAX.

    jax keeps its own arrays, which are these ones' copies; the check writes its answer back. It
    takes as many threads as it likes.
    """
    jax, module = libraries()
    rule: Any = problem.rule
    function, names, arguments = OPTAX[rule.name]
    betas = dict(zip(("b1", "b2"), getattr(rule, "betas", ()), strict=False))
    transformation = getattr(module, function)(rule.lr, **betas, **arguments(rule))

    def copy(k: int) -> Any:
        return {n: jax.numpy.array(s) for n, s in zip(problem.params, by_state[k], strict=True)}

    by_state = list(zip(*(leaf.states for leaf in problem.leaves), strict=True))
    params, grads = ({n: jax.numpy.array(a) for n, a in tree.items()}
                     for tree in (problem.params, problem.grads))  # fmt: skip
    state = module.tree_utils.tree_set(
        transformation.init(params), **{name: copy(k) for k, name in enumerate(names)}
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def one(params: Any, state: Any, grads: Any) -> Any:
        updates, state = transformation.update(grads, state, params)
        return module.apply_updates(params, updates), state

    kept = [params, state]

    def step() -> None:
        kept[:] = jax.block_until_ready(one(*kept, grads))

    def check() -> None:
        problem.check(stepped_back)

    def stepped_back() -> None:
        step()
        for name, p in problem.params.items():
            p[...] = kept[0][name]
        for k, state_name in enumerate(names):
            found = module.tree_utils.tree_get(kept[1], state_name)
            for name, leaf in zip(problem.params, by_state[k], strict=True):
                leaf[...] = found[name]

    return Contender("optax", step, check)


# Of each rule DeepSpeed's class for CPUs, where it lies, its names for our states, its arguments.
DEEPSPEED: dict[str, tuple[str, str, tuple[str, ...], Any]] = {
    "adam": (
        "adam",
        "DeepSpeedCPUAdam",
        ("exp_avg", "exp_avg_sq"),
        lambda rule: {"betas": rule.betas, "eps": rule.eps, "adamw_mode": False},
    ),
    "adamw": (
        "adam",
        "DeepSpeedCPUAdam",
        ("exp_avg", "exp_avg_sq"),
        lambda rule: {"betas": rule.betas, "eps": rule.eps, "adamw_mode": True},
    ),
    "lion": ("lion", "DeepSpeedCPULion", ("exp_avg",), lambda rule: {"betas": rule.betas}),
}


@functools.cache
def deepspeed_class(module: str, name: str) -> Any:
    """DeepSpeed's optimizer, which it compiles at its first use; None where that is not to be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = getattr(importlib.import_module(f"deepspeed.ops.{module}"), name)
            torch = importlib.import_module("torch")
            found([torch.nn.Parameter(torch.ones(1))])
    except Exception:  # what it raises without a compiler depends on its version
        return None
    return found


def deepspeed(problem: Problem) -> Contender:
    """DeepSpeed's C++ step on the CPU, for the rules of DEEPSPEED."""
    torch, rule = importlib.import_module("torch"), problem.rule
    torch.set_num_threads(fo.get_threads())
    module, name, states, arguments = DEEPSPEED[rule.name]
    parameters = [torch.from_numpy(leaf.p) for leaf in problem.leaves]
    for parameter, leaf in zip(parameters, problem.leaves, strict=True):
        parameter.grad = torch.from_numpy(leaf.g)
    optimizer = deepspeed_class(module, name)(
        parameters, lr=rule.lr, weight_decay=rule.weight_decay, **arguments(rule)
    )
    for parameter, leaf in zip(parameters, problem.leaves, strict=True):
        named = dict(zip(states, map(torch.from_numpy, leaf.states), strict=True))
        optimizer.state[parameter] = {"step": 0, **named}
    return contender("DeepSpeed", problem, optimizer.step)


def entrants(rule: str, tensors: int) -> Entrants:
    """Who can step so many tensors by this rule here, by the contender's name."""
    able = shared.entrants(rule, tensors) | {LIMIT: limit}
    if rule in OPTAX and all(libraries()):
        able["optax"] = optax
    if rule in DEEPSPEED and deepspeed_class(*DEEPSPEED[rule][:2]) is not None:
        able["DeepSpeed"] = deepspeed
    return able


def enter(problem: Problem, *names: str) -> list[Contender]:
    """Return those of the named contenders that can step this problem here."""
    able = entrants(problem.rule.name, len(problem.leaves))
    return [able[name](problem) for name in names if name in able]
