"""Functions that need no optimizer: one step of one tensor, and the norm of gradients."""

from __future__ import annotations

import operator
from typing import Any, SupportsIndex

import numpy as np

from .arrays import host
from .arrays.device_interface import on_device
from .arrays.formats import compute_dtype
from .arrays.rows import check_slices
from .arrays.stored import Stored
from .arrays.trees import leaves_of, values_of
from .backends import default_backend, get_backend
from .plan.spec import single
from .rules.base import Rule
from .rules.hyperparameters import Number
from .step.clipping import combined
from .system.interrupts import directly, uninterrupted


def update(
    rule: Rule,
    step: int,
    p: np.ndarray,
    g: np.ndarray,
    *states: Any,
    hessian: Any = None,
    lr: float | None = None,
) -> None:
    """Update one parameter and its states in place.

    Parameters
    ----------
    rule : Rule
        The rule, with its hyperparameters.
    step : int
        Number of the step, 1 for the first.
    p : array
        Dense parameter of float32, float64, bfloat16 or float16.
    g : array
        Gradient of the parameter's shape, in any of these dtypes. It is left alone.
    *states : array
        States as `rule.init(p)` made them, in its order.
    hessian : array, optional
        An estimate for Sophia, of the parameter's shape, which refreshes h after the update.
    lr : float, optional
        Learning rate of this step, instead of the rule's.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If an argument does not fit. Nothing has been written then.

    Notes
    -----
    Stored values are rounded to the nearest. All arrays may be on a CUDA device instead; an
    `Optimizer` is the fast way there.
    """
    if type(step) is not int or step < 1:
        step = _check_step(step)
    if not isinstance(rule, Rule):
        raise TypeError(f"rule: expected a fusedopt rule such as fo.AdamW(), got {rule!r}")
    if rule.scheduled:
        rule = rule.at(step)
    if lr is not None:
        lr = Number().accept("lr", lr)
    else:
        own = rule.lr
        lr = own if type(own) is float else rule.lr_at(step)
    backend = default_backend()
    alone = backend.update_alone
    if alone is not None and alone(rule, step, lr, (p, *states), g, hessian):
        return
    if on_device(p):
        backend = get_backend("auto", [p])
        alone = backend.update_alone
    arrays, g, hessian = _check(backend.device, rule, (p, *states), g, hessian)
    if alone is not None and alone(rule, step, lr, tuple(a.spec for a in arrays), g, hessian):
        return
    plan = backend.plan(single(rule, step, lr, arrays))
    as_a_whole = uninterrupted if backend.device is host else directly
    estimates = None if hessian is None else [hessian]
    if as_a_whole(lambda: plan.step_leaves([g], estimates)) is None:
        raise RuntimeError("the core refused arrays that passed the checks; please report this")


def _check_step(step: Any) -> int:
    if isinstance(step, bool) or not isinstance(step, SupportsIndex) or operator.index(step) < 1:
        raise ValueError(f"step: expected an integer >= 1, got {step!r}")
    return operator.index(step)


def _check(
    device: Any, rule: Rule, arrays: tuple[Any, ...], g: Any, hessian: Any
) -> tuple[tuple[Stored, ...], np.ndarray, np.ndarray | None]:
    p = device.check_parameter("p", arrays[0], rule)
    sides = rule.sides(p.shape)
    states = (*rule.states, *sides)
    if len(arrays) - 1 != len(states):
        names = f" ({', '.join(states)})" if states else ""
        raise TypeError(
            f"states: {type(rule).__name__} has {len(states)}{names}, got {len(arrays) - 1};"
            " make them with rule.init(p)"
        )
    checked = [device.check_state("p", p)]
    for name, state in zip(states, arrays[1:], strict=True):
        stored = device.check_state(name, state)
        _check_fit(name, stored, checked[0], sides.get(name))
        checked.append(stored)
    axis = rule.program.axis
    if axis is not None and rule.program.slices(p.shape):
        formats = {name: s.format for name, s in zip(states, checked[1:], strict=True)}
        check_slices("p", type(rule).__name__, p.shape, formats, axis)
    labels = ["p", *states]
    pieces = [(name, a) for name, s in zip(labels, checked, strict=True) for a in s.arrays]
    device.check_apart([name for name, _ in pieces], [a for _, a in pieces])
    gradient_checks = device.GradientChecks(["p"], [p], [[a for _, a in pieces]])
    gradient = gradient_checks.gradient(0, "g", g)
    if gradient is None:
        raise TypeError("g: expected an ndarray, got None")
    if hessian is not None:
        if not rule.takes_hessian:
            raise ValueError(f"hessian: {type(rule).__name__} takes none")
        hessian = gradient_checks.gradient(0, "hessian", hessian)
    return tuple(checked), gradient, hessian


def _check_fit(name: str, state: Stored, p: Stored, shape: tuple[int, ...] | None) -> None:
    """shape: of a side state, which is in C order and the compute type."""
    if shape is None:
        fits, wanted = state.shape == p.shape and state.order == p.order, "in p's memory order"
    else:
        dtype = compute_dtype(p.format.dtype)
        fits = (state.shape, state.order, state.format.dtype) == (shape, "C", dtype)
        wanted = f"in C order and {dtype}"
    if not fits:
        raise ValueError(
            f"{name}: expected shape {shape or p.shape} {wanted}, got {state.shape}; make it with"
            " rule.init(p)"
        )


def global_norm(grads: Any) -> float:
    """Return the Euclidean norm of all elements of all arrays.

    Parameters
    ----------
    grads : array, Rows, or nested dicts, lists and tuples of them
        Arrays of float32, float64, bfloat16 or float16 in any layout, all on the host or all on
        one CUDA device. None counts as nothing.

    Returns
    -------
    float
        The norm: NaN where an element is NaN, infinite where one is.

    Raises
    ------
    TypeError
        If a leaf is not an array, or has another dtype.

    Notes
    -----
    Squares are summed in float64, in an order that depends only on each array's elements in
    memory. The result has the same bits with any number of threads, on any instruction set and in
    any order of the leaves. Large elements do not overflow it.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> fo.global_norm({"w": np.float32([3.0, 0.0]), "b": [None, np.array(4.0)]})
    5.0
    """
    arrays = list(values_of(grads))
    found = default_backend().sums_of_squares(arrays)
    if found is None:
        there = any(map(on_device, arrays))
        backend = get_backend("auto", arrays) if there else default_backend()
        given = [(leaf.label, leaf.value) for leaf in leaves_of(grads, "grads")]
        arrays = [backend.device.check_summed(label, value) for label, value in given]
        found = backend.sums_of_squares(arrays)
    return combined(np.array(found, np.float64).reshape(-1, 2))
