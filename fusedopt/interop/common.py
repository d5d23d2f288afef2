"""The common part of all exchanges of states: arrays, equal rules, states put in place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays.formats import compute_dtype, least_state
from ..arrays.storage import synchronize
from ..arrays.stored import WEIGHTS, LeafState, Stored
from ..rules import Muon, Rule

if TYPE_CHECKING:
    from ..optimizer import Optimizer

RATE_TOLERANCE = 1e-6
"""Relative; a library may have computed a schedule's rate in float32."""


def as_array(value: Any) -> np.ndarray:
    """Return anything array-like as an array: the memory of a torch tensor, bfloat16 in float32.

    Raises ValueError for a tensor without dense memory.
    """
    if hasattr(value, "detach"):
        try:
            value = value.detach().cpu()
            value = (value.float() if "bfloat16" in str(value.dtype) else value).numpy()
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"expected dense tensors, got one on {value.device} with the layout {value.layout}"
            ) from error
    return np.asarray(value)


def number(value: Any) -> Any:
    """A hyperparameter as a rule takes it: numbers out of tensors, tuples of them.

    Raises ValueError for an array of several.
    """
    if isinstance(value, (tuple, list)):
        return tuple(map(number, value))
    if not hasattr(value, "dtype"):
        return value
    array = as_array(value)
    if array.size != 1:
        raise ValueError(f"expected a number, got {value!r}")
    return array.item()


@dataclass
class Arrival:
    """The state that arrived for one leaf: its own step count, and its states by name."""

    t: int = 0
    states: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """A state that came as it is to be stored."""

    data: np.ndarray
    aux: np.ndarray


def exchanged(rule: Rule, leaf_state: LeafState) -> dict[str, Stored]:
    """Return the states of a leaf by name, without the numbers that its rule keeps."""
    own = {name: leaf_state.states[name] for name in rule.states}
    return own | {n: side for n, side in leaf_state.sides.items() if n not in rule.kept}


def refuse(what: str, problems: Sequence[str]) -> None:
    """Raise ValueError where there are problems."""
    if problems:
        raise ValueError(f"{what} does not fit: " + "; ".join(dict.fromkeys(problems)))


def take_over(opt: Optimizer, step: int, arrivals: Mapping[str, Arrival]) -> None:
    """Store states, each as the optimizer stores it, and counters.

    Masters and averages begin anew, as the parameters are.

    Raises ValueError, which lists every misfit, before anything is written.
    """
    snapshot = opt.snapshot()
    saved = snapshot.take()
    saved["step"] = step
    problems = []
    for path, rule, leaf_state in zip(
        snapshot.paths, snapshot.rules, snapshot.leaf_states, strict=True
    ):
        arrival, entry = arrivals[path], saved["leaves"][path]
        own, dtype = exchanged(rule, leaf_state), compute_dtype(leaf_state.caller.dtype)
        if set(arrival.states) != set(own):
            problems.append(f"{path}: states {list(own)} here, {list(arrival.states)} there")
            continue
        for name, value in arrival.states.items():
            if not isinstance(value, Encoded):
                misfits = _misfits(own[name].shape, dtype, value)
                problems += (f"{path}: {name} {misfit}" for misfit in misfits)
        if not problems:
            entry["t"] = arrival.t
            entry["state"] = _stored(leaf_state, arrival.states).saved
    refuse("the state", problems)
    opt.load_state_dict(saved)


def _misfits(shape: tuple[int, ...], dtype: np.dtype, value: np.ndarray) -> Iterator[str]:
    """Yield why an array cannot be a state of this shape and compute type."""
    if value.dtype.kind not in "fiu" and value.dtype.name != "bfloat16":
        yield f"has dtype {value.dtype} there, expected floating-point numbers"
        return
    if value.shape != shape:
        yield f"has shape {shape} here, {value.shape} there"
    with np.errstate(all="ignore"):
        overflows = np.isfinite(value) & ~np.isfinite(value.astype(dtype))
    if overflows.any():
        yield f"has numbers there that {dtype.name} cannot hold, such as {value[overflows][0]!r}"


def _stored(leaf_state: LeafState, states: Mapping[str, Any]) -> LeafState:
    """The leaf's memory with these states, in arrays of their own."""
    extra = leaf_state.extra and (leaf_state.extra[0], leaf_state.extra[1].copy(order="K"))
    values = {**states, **{n: leaf_state.caller for n in leaf_state.states if n in WEIGHTS}}
    fresh, sides = (
        {n: _encoded(leaf_state, s.copy(), values[n]) for n, s in old.items() if n in values}
        for old in (leaf_state.states, leaf_state.sides)
    )
    trial = replace(leaf_state, states=fresh, extra=extra, sides={**leaf_state.sides, **sides})
    synchronize(trial)
    return trial


def _encoded(leaf_state: LeafState, state: Stored, value: Any) -> Stored:
    if isinstance(value, Encoded):
        state.write((value.data, value.aux))
        return state
    with np.errstate(all="ignore"):
        x = value.astype(compute_dtype(leaf_state.caller.dtype))
    # As the step itself stores it.
    x[np.abs(x) < least_state(x.dtype, state.format.dtype)] = 0
    state.write(state.format.encode(state.flat(x)))
    return state


def departures(opt: Optimizer) -> Iterator[tuple[str, Rule, Arrival]]:
    """Yield for each leaf its path, its rule, and copies of its states as they are computed."""
    snapshot = opt.snapshot()
    for k, (path, rule) in enumerate(zip(snapshot.paths, snapshot.rules, strict=True)):
        leaf_state = snapshot.leaf_states[k]
        states = {name: state.values for name, state in exchanged(rule, leaf_state).items()}
        yield path, rule, Arrival(int(snapshot.counters[k + 1]), states)


def initial_states(opt: Optimizer, k: int) -> dict[str, np.ndarray]:
    """Return the states of a leaf that has seen no step."""
    snapshot = opt.snapshot()
    rule, dtype = snapshot.rules[k], compute_dtype(snapshot.parameters[k].dtype)
    own = exchanged(rule, snapshot.leaf_states[k])
    return {name: np.full(state.shape, rule.initial(name), dtype) for name, state in own.items()}


def meaning(rule: Rule, step: int) -> dict[str, Any]:
    """Return what a rule does from a step on, under names that two ways to write it share."""
    found = {each.name: getattr(rule, each.name) for each in fields(rule)}
    found["lr"] = rule.lr_at(step)
    found["rule"] = {"adamw": "adam"}.get(rule.name, rule.name)
    if not rule.weight_decay:
        found["decay"] = "none"
    elif rule.decay == "decoupled_first":  # differs in rounding alone
        found["decay"] = "decoupled"
    if isinstance(rule, Muon):
        # The same values another way; the rows count the steps.
        del found["gram"], found["ns_dtype"], found["ns_steps"]
        found["ns_coefficients"] = rule.iteration.coefficients.rows
        found["prescale"] = rule.iteration.coefficients.prescale
    return found


def differences(here: Rule, there: Rule, step: int, strict: bool = True) -> Iterator[str]:
    """Return how a rule differs from another from a step on; unless `strict`, in its states."""
    own, other = meaning(here, step), meaning(there, step)
    names: Sequence[str] = ("rule",) if own["rule"] != other["rule"] else tuple(own)
    for name in names:
        a, b = own[name], other[name]
        same = math.isclose(a, b, rel_tol=RATE_TOLERANCE) if name == "lr" else a == b
        if not same and (strict or name in ("rule", *here.settled)):
            yield f"{name} {a!r} here, {b!r} there"
