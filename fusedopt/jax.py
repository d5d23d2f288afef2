"""Optimizers for JAX on the CPU: optax's transformations, with all tensors in one fused pass.

A step is one call of XLA, which updates parameters and states in the memory that `jax.jit` was
given with `donate_argnums`. States are optax's own, so that a run can go from one to the other.
JAX and optax are imported only here.

Examples
--------
>>> import jax, jax.numpy as jnp, fusedopt.jax
>>> opt = fusedopt.jax.adamw(1e-3)
>>> params = {"w": jnp.ones(3)}
>>> state = opt.init(params)
>>> step = jax.jit(opt.step, donate_argnums=(0, 1))
>>> params, state = step(params, state, {"w": jnp.ones(3)})
>>> print(params["w"])
[0.9989999 0.9989999 0.9989999]
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .backends.native import compiled
from .rules import RULES, Adam, AdamW, Lion, Rule
from .system.extension import core

try:
    from . import _jax
except ImportError as error:
    raise ImportError(
        "fusedopt.jax: the handler for XLA was not built: when fusedopt was built there were no"
        " headers of jaxlib; install jaxlib, then build with"
        " pip install --no-build-isolation --no-binary fusedopt fusedopt"
    ) from error

__all__ = ["Transformation", "adam", "adamw", "lion"]

TARGET = "fusedopt_step"
COMPUTED = ("float32", "float64")

jax.ffi.register_ffi_target(TARGET, _jax.handler, platform="cpu")


class Transformation(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
    """An `optax.GradientTransformationExtraArgs` that can also take a whole step at once.

    `init` and `update` are optax's own. `step(params, state, grads)` returns the new parameters and
    the new state from one pass, in place where parameters and state are donated. A function around
    it should take and return these in the same order: JAX pairs donated arrays with results of
    their shape one after the other.

    Notes
    -----
    `update` returns what is to be added to the parameters. XLA cannot fuse the addition with a call
    of FFI, so that a fused `update` and the addition would move as many bytes as XLA's own code,
    and take as long; `benchmarks/jax_step.py` shows it.
    """

    step: Callable[[Any, Any, Any], tuple[Any, Any]]


def adamw(
    learning_rate: Any,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    weight_decay: float = 1e-4,
) -> Transformation:
    """Make AdamW as `optax.adamw`.

    Parameters
    ----------
    learning_rate, b1, b2, eps, eps_root, weight_decay
        As in optax; the learning rate is a number, an array or a schedule.
    """
    rule = AdamW(betas=(b1, b2), eps=eps, eps_root=eps_root, weight_decay=weight_decay)
    own = optax.adamw(learning_rate, b1, b2, eps, eps_root, weight_decay=weight_decay)
    return _transformation(rule, own, learning_rate, ("mu", "nu"))


def adam(
    learning_rate: Any,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
) -> Transformation:
    """Make Adam as `optax.adam`.

    Parameters
    ----------
    learning_rate, b1, b2, eps, eps_root
        As in optax; the learning rate is a number, an array or a schedule.
    """
    rule = Adam(betas=(b1, b2), eps=eps, eps_root=eps_root)
    own = optax.adam(learning_rate, b1, b2, eps, eps_root)
    return _transformation(rule, own, learning_rate, ("mu", "nu"))


def lion(
    learning_rate: Any, b1: float = 0.9, b2: float = 0.99, weight_decay: float = 1e-3
) -> Transformation:
    """Make Lion as `optax.lion`.

    Parameters
    ----------
    learning_rate, b1, b2, weight_decay
        As in optax; the learning rate is a number, an array or a schedule.
    """
    rule = Lion(betas=(b1, b2), weight_decay=weight_decay, decay="decoupled")
    own = optax.lion(learning_rate, b1, b2, weight_decay=weight_decay)
    return _transformation(rule, own, learning_rate, ("mu",))


def _transformation(
    rule: Rule, own: Any, learning_rate: Any, moments: Sequence[str]
) -> Transformation:
    """own: optax's transformation, whose states these are; moments: their names in the first."""
    spec = json.dumps({"rule": rule.name, **{f.name: getattr(rule, f.name) for f in fields(rule)}})

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        first, *rest = state
        count = optax.safe_increment(first.count)
        lr = learning_rate(state[-1].count) if callable(learning_rate) else learning_rate
        given = [params, *(getattr(first, name) for name in moments), grads]
        leaves, shape = jax.tree.flatten(params)
        columns = [leaves, *(shape.flatten_up_to(tree) for tree in given[1:])]
        found = _stepped(spec, count, jnp.asarray(lr, jnp.result_type(float)), columns)
        trees = [jax.tree.unflatten(shape, column) for column in found]
        first = first._replace(count=count, **dict(zip(moments, trees[1:], strict=True)))
        if callable(learning_rate):
            rest[-1] = rest[-1]._replace(count=optax.safe_increment(rest[-1].count))
        return trees[0], (first, *rest)

    made = Transformation(own.init, own.update)
    made.step = step
    return made


def _stepped(spec: str, count: Any, lr: Any, columns: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """The new parameters and states, of parameters, states and gradients of all leaves."""
    found = [list(column) for column in columns[:-1]]
    places: dict[str, list[int]] = {}
    for k, p in enumerate(columns[0]):
        dtypes = {str(column[k].dtype) for column in columns}
        if len(dtypes) > 1 or not dtypes <= set(COMPUTED):
            raise TypeError(
                f"fusedopt.jax: leaf {k}, of shape {p.shape}: expected parameter, states and"
                f" gradient of float32 or all of float64, got {', '.join(sorted(dtypes))}; cast"
                " them, or use optax"
            )
        places.setdefault(dtypes.pop(), []).append(k)
    for chosen in places.values():
        arrays = [column[k] for column in columns[:-1] for k in chosen]
        grads = [columns[-1][k] for k in chosen]
        call = jax.ffi.ffi_call(
            TARGET,
            [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays],
            input_output_aliases={2 + k: k for k in range(len(arrays))},
        )
        new = iter(call(count, lr, *arrays, *grads, rule=spec, leaves=np.int64(len(chosen))))
        for column in found:
            for k in chosen:
                column[k] = next(new)
    return found


@functools.lru_cache
def _rule(spec: str) -> Rule:
    """A rule from the text that a compiled computation holds, also in another process."""
    values: dict[str, Any] = json.loads(spec)
    cls: Any = RULES[values.pop("rule")]
    rule: Rule = cls(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})
    return rule


def _run(
    spec: str, t: int, lr: float, wide: bool, elements: list[int], addresses: list[int]
) -> None:
    """Take a step; called by the handler, in a thread of XLA's."""
    program = _rule(spec).program
    core.step_at(compiled(program), program.numbers, t, lr, wide, elements, addresses)
