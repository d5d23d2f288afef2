"""The states of optax: the pytrees of `init` and `update`, in NumPy or JAX arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..arrays.formats import compute_dtype
from ..rules.base import Rule
from .common import Arrival, as_array, departures, refuse, take_over

if TYPE_CHECKING:
    from ..optimizer import Optimizer


class Part(NamedTuple):
    """A state of optax: the rules here that have it, its trees, and what they are called here."""

    rules: tuple[str, ...]
    trees: dict[str, str]


_ADAM, _RMS = ("adam", "adamw"), ("rmsprop",)
_STDDEV = Part(_RMS, {"mu": "a", "nu": "v"})
PARTS = {
    "ScaleByAdamState": Part((*_ADAM, "adamax", "radam", "adopt", "lamb"), {"mu": "m", "nu": "v"}),
    "ScaleByAmsgradState": Part(_ADAM, {"mu": "m", "nu": "v", "nu_max": "x"}),
    "ScaleByLionState": Part(("lion",), {"mu": "m"}),
    "ScaleByRssState": Part(("adagrad",), {"sum_of_squares": "G"}),
    "ScaleByRmsState": Part(_RMS, {"nu": "v"}),
    "ScaleByRmsWithCountState": Part((*_RMS, "schedulefreeadamw"), {"nu": "v"}),
    "ScaleByRStdDevState": _STDDEV,
    "ScaleByRStdDevWithCountState": _STDDEV,
    "ScaleByAdaDeltaState": Part(("adadelta",), {"e_g": "v", "e_x": "d"}),
    "ScaleByBeliefState": Part(("adabelief",), {"mu": "m", "nu": "s"}),
    "ScaleByAdemamixState": Part(("ademamix",), {"m1": "m", "m2": "slow", "nu": "v"}),
    "ScaleByAdanState": Part(("adan",), {"m": "m", "v": "d", "n": "n", "g": "prev"}),
    "EmaState": Part(("signum",), {"ema": "m"}),
    "SophiaState": Part(("sophia",), {"mu": "m", "nu": "h"}),
    "MuonState": Part(("muon",), {"mu": "m"}),
    "TraceState": Part(("momentum", "nesterov", "rmsprop", "lars"), {"trace": "v"}),
    "ScheduleFreeState": Part(("schedulefreesgd", "schedulefreeadamw"), {"z": "d"}),
    "ScaleByScheduleState": Part((), {}),
    "EmptyState": Part((), {}),
}
COUNTS = {"count": 0, "count_m2": 0, "t": 0, "step_count": 1}
"""Names that parts of a chain give to their number of steps, and where these begin."""
_NOTHING = Part((), {})
# Transformations that hold others; hyperparameters in them are the caller's.
HOLDERS = {
    "MaskedState": "inner_state",
    "PartitionState": "inner_states",
    "InjectHyperparamsState": "inner_state",
    "InjectStatefulHyperparamsState": "inner_state",
    "ScheduleFreeState": "base_optimizer_state",
}
FREE = ("lr", "weight_decay", "decay", "maximize", "norm", "gram", "ns_dtype", "split")
"""Hyperparameters that a chain may have in any form, those of Muon's products among them."""


def from_optax(opt: Optimizer, state: Any, *, step: int | None = None) -> None:
    """Go on from an optax state: of `optax.adamw` and its like, or a chain of their parts.

    state: what `init` or `update` returned, over parameters nested as here. Known are the states
    of scale_by_adam, _amsgrad, _lion, _rss, _rms, _stddev, _muon, of trace and schedules, Sophia,
    schedule_free, and inside of masks, partitions (`optax.contrib.muon`) and inject_hyperparams.
    step: how many steps were taken; to be given where no part of the state counts them. optax
    keeps no hyperparameters in a state, so that only their form is checked:
    `Rule.like("optax", ...)` with those of the chain. What `inject_hyperparams` holds is not read.

    Raises ValueError that lists everything that does not fit; nothing has changed then.
    """
    snapshot = opt.snapshot()
    problems = list(_unlike(opt))
    arrivals = {path: Arrival() for path in snapshot.paths}
    rules = dict(zip(snapshot.paths, snapshot.rules, strict=True))
    counts: list[int] = []
    own_counts: dict[str, int] = {}

    def take(node: Any) -> Any:
        kind = type(node).__name__
        count = next(
            (int(as_array(getattr(node, n))) - first for n, first in COUNTS.items()
             if n in node._fields),
            None,
        )  # fmt: skip
        counts.extend([] if count is None else [count])
        for theirs, ours in PARTS.get(kind, _NOTHING).trees.items():
            tree = snapshot.tree.flatten(_unmasked(getattr(node, theirs)), f"{kind}.{theirs}")
            for path, p, value in zip(snapshot.paths, snapshot.parameters, tree, strict=True):
                if value is None:
                    continue
                name, sign = _own(rules[path], ours, kind)
                if name in arrivals[path].states:
                    problems.append(f"{path}: {name} is there twice")
                arrived = sign * as_array(value)
                if kind == "ScheduleFreeState" and arrived.shape == p.shape:
                    arrived = arrived.astype(compute_dtype(p.dtype)) - p
                    problems.extend(f"{path}: {m}" for m in _weighted(rules[path], node))
                arrivals[path].states[name] = arrived
                problems.extend(f"{path}: {reason}" for reason in _unfit(rules[path], kind))
                if count is not None:
                    own_counts[path] = count
        return node

    _walked(state, take)
    if step is None:
        if not counts:
            raise ValueError("step: no part of this state counts the steps; give their number")
        step = max(counts)
    if max(counts, default=0) > step:
        problems.append(f"step: {step} given, {max(counts)} there")
    refuse("the state of optax", problems)
    for path, arrival in arrivals.items():
        arrival.t = own_counts.get(path, step)
    take_over(opt, step, arrivals)


def to_optax(opt: Optimizer, template: Any) -> Any:
    """An optax state that goes on from here: the template with these states and counts.

    template: what `init` of the optax transformation returned for the parameters, or any state of
    it; it is left alone. The result is nested alike, with NumPy arrays of the template's dtypes in
    the place of states and counts; anything else, such as Sophia's key or injected
    hyperparameters, is the template's. The transformation must have this optimizer's
    hyperparameters.

    Raises ValueError that lists what does not fit: a rule in another form than optax's, a part of
    the template without an equal here, or leaves of which some saw fewer steps than others.
    """
    problems = list(_unlike(opt))
    leaves = {path: (rule, leaf) for path, rule, leaf in departures(opt)}
    snapshot = opt.snapshot()
    params, arrays = snapshot.tree, dict(zip(snapshot.paths, snapshot.parameters, strict=True))
    given: dict[str, set[str]] = {path: set() for path in leaves}

    def put(node: Any) -> Any:
        kind = type(node).__name__
        changed: dict[str, Any] = {}
        seen: set[int] = set()
        for theirs, ours in PARTS.get(kind, _NOTHING).trees.items():
            old = getattr(node, theirs)
            new: list[Any] = []
            tree = params.flatten(_unmasked(old), f"{kind}.{theirs}")
            for (path, (rule, leaf)), value in zip(leaves.items(), tree, strict=True):
                name, sign = _own(rule, ours, kind)
                if value is None:
                    new.append(None)
                    continue
                if name not in leaf.states or np.shape(value) != leaf.states[name].shape:
                    problems.append(f"{path}: has no {name} for {kind}.{theirs} of this shape")
                    new.append(value)
                    continue
                problems.extend(f"{path}: {reason}" for reason in _unfit(rule, kind))
                state = sign * leaf.states[name]
                if kind == "ScheduleFreeState":
                    state = arrays[path] + state
                    changed |= _weights(rule, node, leaf.t)
                with np.errstate(all="ignore"):
                    new.append(state.astype(as_array(value).dtype))
                given[path].add(name)
                seen.add(leaf.t)
            changed[theirs] = _filled(opt.params, old, iter(new))
        for name in (name for name in COUNTS if name in node._fields):
            if len(seen) > 1:
                problems.append(f"{kind} has one count, and leaves here saw {sorted(seen)} steps")
            count = min(seen, default=opt.step_count)
            dtype = as_array(getattr(node, name)).dtype
            changed[name] = np.asarray(count + COUNTS[name], dtype)
        return node._replace(**changed)

    made = _walked(template, put)
    for path, (_, leaf) in leaves.items():
        if given[path] != set(leaf.states):
            problems.append(f"{path}: states {list(leaf.states)} here, {sorted(given[path])} there")
    refuse("the template of optax", problems)
    return made


def _walked(node: Any, act: Callable[[Any], Any]) -> Any:
    """The state rebuilt with what `act` makes of each of its parts."""
    kind = type(node).__name__
    if kind in HOLDERS:
        inner = HOLDERS[kind]
        held = node._replace(**{inner: _walked(getattr(node, inner), act)})
        return act(held) if kind in PARTS or "count" in node._fields else held
    if isinstance(node, dict):
        return {key: _walked(each, act) for key, each in node.items()}
    if hasattr(node, "_fields"):
        if kind not in PARTS:
            raise ValueError(f"optax: {kind} has no equal here; known are {', '.join(PARTS)}")
        return act(node)
    if isinstance(node, (tuple, list)):
        return type(node)(_walked(each, act) for each in node)
    raise ValueError(f"optax: expected the state of a transformation, got a {kind}")


def _own(rule: Rule, name: str, kind: str) -> tuple[str, int]:
    """Return the name of a state here, and the factor on it.

    The RMSProp and LARS of optax trace -lr u.
    """
    if kind == "TraceState" and rule.name in ("rmsprop", "lars"):
        return ("b" if rule.name == "rmsprop" else name), -1
    return ("u" if (rule.name, name) == ("adamax", "v") else name), 1


def _weights(rule: Any, node: Any, t: int) -> dict[str, np.ndarray]:
    """Return what a Schedule-Free state has of the weights of t steps; nothing of other rules."""
    if rule.name not in PARTS["ScheduleFreeState"].rules:
        return {}
    found = {"max_lr": rule.lr, "weight_sum": rule.total(t) * rule.lr**rule.weight_lr_power}
    return {
        name: np.asarray(value if t else 0.0, as_array(getattr(node, name)).dtype)
        for name, value in found.items()
    }


def _weighted(rule: Rule, node: Any) -> Iterator[str]:
    """Return where steps had other weights than the rule gives them, by other learning rates."""
    t = int(as_array(node.step_count)) - COUNTS["step_count"]
    for name, here in _weights(rule, node, t).items():
        there = as_array(getattr(node, name))
        if not np.isclose(there, here, rtol=1e-2):  # optax adds up in the parameters' dtype
            yield f"{name} of {t} steps {here} here, {there} there"


def _unlike(opt: Optimizer) -> Iterator[str]:
    """Return where rules do what optax cannot."""
    for group in opt.snapshot().groups:
        rule = group.rule
        if "optax" not in rule.conventions:
            yield f"{group.label!r}: optax has no {type(rule).__name__}"
            continue
        convention = rule.conventions["optax"]
        for each in fields(rule):
            value = getattr(rule, each.name)
            spelled = convention.spelled.get(each.name)
            if each.name == "lr_in_buffer" and not getattr(rule, "momentum", 0):
                continue  # there is no buffer
            if spelled is not None:
                accepted = list(dict.fromkeys(spelled.values()))
            elif each.name in convention.free or each.name in FREE:
                continue
            else:
                accepted = [convention.fixed.get(each.name, each.default)]
            if value not in accepted:
                shown = " or ".join(map(repr, accepted))
                yield f"{group.label!r}: {each.name} {value!r} here, {shown} in optax"


def _unfit(rule: Rule, kind: str) -> Iterator[str]:
    """Return where a state is another rule's, or of another form of the rule."""
    if rule.name not in PARTS[kind].rules:
        yield f"{kind} is none of {type(rule).__name__}"
    if rule.name == "rmsprop" and kind != "TraceState":
        corrected = bool(getattr(rule, "bias_correction", False))
        if corrected != kind.endswith("WithCountState"):
            yield f"bias_correction {corrected} here, {not corrected} in {kind}"


def _is_masked(tree: Any) -> bool:
    return type(tree).__name__ == "MaskedNode"


def _unmasked(tree: Any) -> Any:
    """The tree with None for what a mask hides."""
    if _is_masked(tree):
        return None
    if isinstance(tree, dict):
        return {key: _unmasked(each) for key, each in tree.items()}
    return [_unmasked(each) for each in tree] if isinstance(tree, (list, tuple)) else tree


def _filled(like: Any, tree: Any, fresh: Iterator[Any]) -> Any:
    """The tree with other leaves, which come in the order of the parameters `like`."""
    if like is None:
        return tree
    if isinstance(like, dict):
        new = {key: _filled(each, tree[key], fresh) for key, each in like.items()}
        return {key: new[key] for key in tree}
    if isinstance(like, (list, tuple)):
        return type(tree)(_filled(a, b, fresh) for a, b in zip(like, tree, strict=True))
    value = next(fresh)
    return tree if _is_masked(tree) else value
