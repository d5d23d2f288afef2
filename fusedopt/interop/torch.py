"""The states of torch.optim: `state_dict()` of its optimizers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from ..arrays.formats import compute_dtype
from ..rules import RULES, Adafactor, Muon, Rule
from .common import (
    Arrival,
    as_array,
    departures,
    differences,
    initial_states,
    number,
    refuse,
    take_over,
)

if TYPE_CHECKING:
    from ..optimizer import Optimizer


@dataclass(frozen=True)
class Layout:
    """A class of torch.optim.

    marks: the hyperparameters by which its groups are known, where no class before it has them.
    states: torch's names, and ours. named: torch's hyperparameters, and ours. flags: the rest of a
    group. counted: whether there is a step count. follows: what torch keeps beside the states,
    though a rule and its step count say it.
    """

    cls: str
    marks: tuple[str, ...]
    states: Mapping[str, str]
    named: Mapping[str, str]
    flags: Mapping[str, Any]
    counted: bool = True
    follows: Mapping[str, Callable[[Any, int], float]] = field(default_factory=dict)


_ALL = {"lr": "lr", "weight_decay": "weight_decay"}
_BOTH = {**_ALL, "maximize": "maximize"}
_MOMENTS = {"betas": "betas", "eps": "eps"}
# Options of how torch computes, not of what.
_FOREACH = {"foreach": None, "differentiable": False}
_FUSED = {**_FOREACH, "fused": None}
_CAPTURABLE = {"capturable": False}
HOW = ("foreach", "differentiable", "fused", "capturable")
IGNORED = (*HOW, "initial_lr", "params", "param_names")
"""`initial_lr` is a scheduler's note."""

LAYOUTS = (
    Layout(
        "SGD",
        ("dampening",),
        {"momentum_buffer": "v"},
        {**_BOTH, "momentum": "momentum", "dampening": "dampening"},
        {"nesterov": False, **_FUSED},
        counted=False,
    ),
    Layout(
        "Adam",
        ("amsgrad",),
        {"exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "x"},
        {**_BOTH, **_MOMENTS},
        {"amsgrad": False, "decoupled_weight_decay": False, **_CAPTURABLE, **_FUSED},
    ),
    Layout(
        "Adagrad",
        ("initial_accumulator_value",),
        {"sum": "G"},
        {
            **_BOTH,
            "lr_decay": "lr_decay",
            "eps": "eps",
            "initial_accumulator_value": "initial_accumulator",
        },
        _FUSED,
    ),
    Layout(
        "RMSprop",
        ("centered",),
        {"square_avg": "v", "momentum_buffer": "b", "grad_avg": "a"},
        {**_BOTH, "alpha": "rho", "eps": "eps", "momentum": "momentum", "centered": "centered"},
        {**_CAPTURABLE, **_FOREACH},
    ),
    Layout(
        "Muon",
        ("ns_coefficients",),
        {"momentum_buffer": "m"},
        {
            **_ALL,
            "momentum": "momentum",
            "nesterov": "nesterov",
            "ns_coefficients": "ns_coefficients",
            "ns_steps": "ns_steps",
            "eps": "eps",
        },
        {"adjust_lr_fn": None},
        counted=False,
    ),
    Layout(
        "NAdam",
        ("momentum_decay",),
        {"exp_avg": "m", "exp_avg_sq": "v"},
        {**_BOTH, **_MOMENTS, "momentum_decay": "momentum_decay"},
        {"decoupled_weight_decay": False, **_CAPTURABLE, **_FOREACH},
        follows={"mu_product": lambda rule, t: rule.product(t)},
    ),
    Layout(
        "RAdam",
        ("decoupled_weight_decay",),
        {"exp_avg": "m", "exp_avg_sq": "v"},
        {**_BOTH, **_MOMENTS},
        {"decoupled_weight_decay": False, **_CAPTURABLE, **_FOREACH},
    ),
    Layout(
        "Adadelta",
        ("rho",),
        {"square_avg": "v", "acc_delta": "d"},
        {**_BOTH, "rho": "rho", "eps": "eps"},
        {**_CAPTURABLE, **_FOREACH},
    ),
    Layout(
        "Rprop",
        ("etas",),
        {"prev": "prev", "step_size": "s"},
        {"lr": "lr", "maximize": "maximize", "etas": "etas", "step_sizes": "step_sizes"},
        {**_CAPTURABLE, **_FOREACH},
    ),
    Layout(
        "Adamax",
        ("betas", "capturable"),
        {"exp_avg": "m", "exp_inf": "u"},
        {**_BOTH, "betas": "betas", "eps": "eps_inside"},
        {**_CAPTURABLE, **_FOREACH},
    ),
    Layout(
        "Adafactor",
        ("d",),
        {"row_var": "row", "col_var": "col", "variance": "v"},
        {**_BOTH, "d": "clip"},
        {"beta2_decay": -0.8, "eps": (None, 1e-3), "foreach": None},
    ),
)
CLASSES = {
    "sgd": "SGD",
    "momentum": "SGD",
    "nesterov": "SGD",
    "adam": "Adam",
    "adamw": "Adam",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
    "muon": "Muon",
    "nadam": "NAdam",
    "radam": "RAdam",
    "adadelta": "Adadelta",
    "rprop": "Rprop",
    "adamax": "Adamax",
    "adafactor": "Adafactor",
}


def rules_from_torch(state_dict: Mapping[str, Any]) -> list[Rule]:
    """The rules of a torch optimizer's groups, in their order, with its hyperparameters.

    state_dict: what its `state_dict()` returned; learning rates are those of the next step. Raises
    ValueError for another class than those of `fusedopt.interop`, and for what has no equal here.
    """
    return [_rule(group) for group in parameter_groups(state_dict)]


def from_torch(
    opt: Optimizer,
    state_dict: Mapping[str, Any],
    *,
    paths: Sequence[str] | None = None,
    step: int | None = None,
    strict: bool = True,
) -> None:
    """Go on from what a torch optimizer's `state_dict()` returned.

    state_dict: with torch tensors or arrays. paths: the leaves' paths (`block.0.w`) in the order
    of torch's parameters; without it the names that torch has, where all are paths here, or else
    the order of the leaves, group by group. step: how many steps were taken; to be given for SGD
    and Muon, which do not count them, by default the largest of torch's counts. strict:
    hyperparameters must be equal, the rate that of the next step; otherwise this optimizer's own
    hold. Flags that say how torch computes (`foreach`, `fused`, `capturable`, `differentiable`)
    have no meaning here.

    Raises ValueError that lists everything that does not fit; nothing has changed then.
    """
    groups = parameter_groups(state_dict)
    snapshot = opt.snapshot()
    order = order_of(opt, groups, paths)
    ids = [key for group in groups for key in group["params"]]
    group_of = [group for group in groups for _ in group["params"]]
    state: Mapping[Any, Any] = state_dict["state"]
    layouts = [_layout(group) for group in group_of]
    counts = {key: _count(key, state[key]) for key in ids if "step" in state.get(key, {})}
    latest = max(counts.values(), default=0)
    if step is not None and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
        raise ValueError(f"step: expected an integer >= 0, got {step!r}")
    if step is None:
        if not all(layout.counted for layout in layouts):
            raise ValueError(
                "step: torch.optim.SGD and Muon do not count their steps; give their number"
            )
        step = latest
    problems = [f"step: {step} given, {latest} there"] if latest > step else []
    arrivals = {}
    for key, path, group, layout in zip(ids, order, group_of, layouts, strict=True):
        k = snapshot.paths.index(path)
        rule, dtype = snapshot.rules[k], snapshot.parameters[k].dtype
        found = differences(rule, _rule(group, rule.decay != "l2", dtype), step + 1, strict)
        problems += [f"{path}: {reason}" for reason in found]
        arrivals[path] = _arrival(
            state.get(key, {}), layout, counts.get(key, step), initial_states(opt, k)
        )
    refuse("the state of torch", problems)
    take_over(opt, step, arrivals)


def to_torch(opt: Optimizer, *, tensors: bool = True) -> dict[str, Any]:
    """Return what `load_state_dict` of the torch optimizer with the same rules takes.

    Parameters are numbered as torch does, group by group (the rules of a mapping, in its order),
    in each in the order of the leaves. States are copies in float32, or float64 for float64
    parameters; hyperparameters are this optimizer's, with the rate of the next step. tensors: with
    False arrays stand in the place of torch tensors, and torch is not imported.

    Raises ValueError that lists every rule and hyperparameter that torch does not have.
    """
    step = opt.step_count + 1
    problems = []
    groups: list[dict[str, Any]] = []
    for group in opt.snapshot().groups:
        try:
            nearest = _group(group.rule, step)
            found = differences(group.rule, _rule(nearest), step)
            problems += [f"{group.label!r}: {reason} in torch" for reason in found]
            groups.append({**nearest, "params": []})
        except ValueError as error:
            problems.append(f"{group.label!r}: {error}")
    refuse("the rule", problems)
    leaves, group_of = list(departures(opt)), opt.snapshot().group_of
    state: dict[int, dict[str, Any]] = {}
    for k in _by_group(opt):
        there, (_, rule, leaf) = groups[group_of[k]], leaves[k]
        key = sum(len(each["params"]) for each in groups)
        there["params"].append(key)
        entry = _entry(_layout(there), rule, leaf)
        if entry:
            state[key] = entry
    if tensors:
        torch = importlib.import_module("torch")
        state = {
            key: {name: torch.from_numpy(a) for name, a in entry.items()}
            for key, entry in state.items()
        }
    return {"state": state, "param_groups": groups}


def parameter_groups(state_dict: Any) -> list[Mapping[str, Any]]:
    """The groups of a state_dict, after a look whether it is one."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            "state_dict: expected what a torch optimizer's state_dict() returns, a dict with"
            f" 'state' and 'param_groups', got {type(state_dict).__name__}"
        )
    groups, state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(groups, (list, tuple)) or not all(
        isinstance(group, Mapping)
        and isinstance(group.get("params"), (list, tuple))
        and all(isinstance(key, (int, str)) for key in group["params"])
        for group in groups
    ):
        raise ValueError(
            "state_dict['param_groups']: expected a list of dicts with 'params', which are numbers"
        )
    if not isinstance(state, Mapping) or not all(isinstance(s, Mapping) for s in state.values()):
        raise ValueError("state_dict['state']: expected a dict of dicts, one for each parameter")
    return list(groups)


def _count(key: Any, entry: Mapping[str, Any]) -> int:
    """Return the step count of a parameter's state; ValueError where it is none."""
    value = as_array(entry["step"])
    if value.size == 1 and value.dtype.kind in "iuf":
        count = float(value.item())
        if count.is_integer() and 0 <= count < 2.0**53:
            return int(count)
    raise ValueError(f"state[{key!r}]['step']: expected a number of steps, got {entry['step']!r}")


def _layout(group: Mapping[str, Any]) -> Layout:
    for layout in LAYOUTS:
        if all(mark in group for mark in layout.marks):
            unknown = set(group) - {*layout.named, *layout.flags, *IGNORED}
            if unknown:
                listed = ", ".join(sorted(map(str, unknown)))
                raise ValueError(f"torch.optim.{layout.cls}: no equal here has {listed}")
            return layout
    known = ", ".join(layout.cls for layout in LAYOUTS)
    raise ValueError(f"expected a group of torch.optim's {known}, got one with {list(group)}")


def _rule(
    group: Mapping[str, Any], decoupled: bool | None = None, dtype: DTypeLike = np.float32
) -> Rule:
    """The rule of a torch group; decoupled: that of Adam, where an older torch does not tell."""
    return rule_of(group, _layout(group), decoupled, dtype)


def rule_of(
    group: Mapping[str, Any],
    layout: Layout,
    decoupled: bool | None = None,
    dtype: DTypeLike = np.float32,
) -> Rule:
    """The rule of a group of a known class, which may hold other things beside.

    dtype: of the parameters, whose epsilon Adafactor may ask for.
    """
    values = {ours: number(group[name]) for name, ours in layout.named.items() if name in group}
    flags = {name: number(group.get(name, default)) for name, default in layout.flags.items()}
    if layout.cls == "SGD":
        if not values.get("momentum"):
            values = {n: v for n, v in values.items() if n not in ("momentum", "dampening")}
            name = "sgd"
        elif flags["nesterov"]:
            values.pop("dampening", None)  # torch refuses any
            name = "nesterov"
        else:
            name = "momentum"
    elif layout.cls == "Adam":
        values["amsgrad"] = flags["amsgrad"]
        if "decoupled_weight_decay" in group or not values["weight_decay"]:
            decoupled = flags["decoupled_weight_decay"]
        if decoupled is None:
            raise ValueError(
                "this torch does not say whether that is Adam or AdamW; make the rule with"
                " Adam.like('torch', ...) or AdamW.like('torch', ...)"
            )
        name = "adamw" if decoupled else "adam"
    else:
        name = layout.cls.lower()
        if name == "muon":
            values["scale"] = flags["adjust_lr_fn"] or "original"
        elif name == "adafactor":
            if not isinstance(flags["eps"], tuple) or len(flags["eps"]) != 2:
                raise ValueError(f"eps: expected a pair, got {flags['eps']!r}")
            least, values["eps_scale"] = flags["eps"]
            epsilon = np.finfo(compute_dtype(np.dtype(dtype))).eps
            values["eps"] = float(epsilon) if least is None else least
            power = flags["beta2_decay"]
            values["beta2_decay"] = -power if isinstance(power, (float, int)) else power
        elif "decoupled_weight_decay" in flags:
            values["decay"] = "decoupled" if flags["decoupled_weight_decay"] else "l2"
    return RULES[name].like("torch", **values)


def _group(rule: Rule, step: int) -> dict[str, Any]:
    """The torch group that comes nearest to a rule; what it lacks, `differences` finds."""
    if rule.name not in CLASSES:
        raise ValueError(f"torch.optim has no {type(rule).__name__}")
    (layout,) = (each for each in LAYOUTS if each.cls == CLASSES[rule.name])
    group = dict(layout.flags)
    for name, ours in layout.named.items():
        group[name] = getattr(rule, ours, 0)  # plain descent has no momentum
    group["lr"] = rule.lr_at(step)
    if layout.cls == "SGD":
        group["nesterov"] = rule.name == "nesterov"
    elif layout.cls == "Adam":
        group["amsgrad"] = bool(getattr(rule, "amsgrad", False))
    elif isinstance(rule, Muon):
        group["ns_coefficients"] = rule.iteration.coefficients.rows[0]
        if rule.scale != "original":
            group["adjust_lr_fn"] = rule.scale
    elif isinstance(rule, Adafactor):
        group["eps"], group["beta2_decay"] = (rule.eps, rule.eps_scale), -rule.beta2_decay
    if "decoupled_weight_decay" in group:
        group["decoupled_weight_decay"] = rule.decay.startswith("decoupled")
    return group


def _by_group(opt: Optimizer) -> list[int]:
    """The leaves' numbers as torch would number their parameters."""
    group_of = opt.snapshot().group_of
    return sorted(range(len(group_of)), key=group_of.__getitem__)


def order_of(
    opt: Optimizer, groups: Sequence[Mapping[str, Any]], paths: Sequence[str] | None
) -> Sequence[str]:
    """The leaf of each of torch's parameters."""
    snapshot = opt.snapshot()
    own, count_here = snapshot.paths, len(snapshot.groups)
    count = sum(len(group["params"]) for group in groups)
    names = [name for group in groups for name in group.get("param_names", ())]
    if paths is not None:
        found = list(paths)
    elif sorted(names) == sorted(own):
        found = names
    elif len(groups) != count_here and len(own) > 1:
        raise ValueError(
            f"paths: torch has {len(groups)} groups and this optimizer {count_here}; give the"
            " leaves' paths in the order of torch's parameters"
        )
    else:
        found = [own[k] for k in _by_group(opt)]
    if len(found) != count or sorted(found) != sorted(own):
        raise ValueError(
            f"paths: expected each of the paths {own} once, for {count} parameters, got {found}"
        )
    return found


def _arrival(
    entry: Mapping[str, Any], layout: Layout, t: int, initial: Mapping[str, Any]
) -> Arrival:
    """Return the state that torch has of a parameter, or the initial one where it has none."""
    other = ("step", *layout.follows)
    there = {name: a for name, a in entry.items() if name not in other and a is not None}
    states = {layout.states.get(name, name): as_array(a) for name, a in there.items()}
    if initial and not states:
        return Arrival(0, dict(initial))
    return Arrival(t, states)


def _entry(layout: Layout, rule: Rule, leaf: Arrival) -> dict[str, np.ndarray]:
    """Return the state that torch would have of a parameter."""
    if not leaf.t and layout.cls != "Adagrad":  # whose states are there from the beginning
        return {}
    names = {ours: name for name, ours in layout.states.items()}
    count = {"step": np.array(leaf.t, np.float32)} if layout.counted else {}
    for name, of in layout.follows.items():
        count[name] = np.array(of(rule, leaf.t), np.float32)
    return {**count, **{names[ours]: a for ours, a in leaf.states.items()}}
