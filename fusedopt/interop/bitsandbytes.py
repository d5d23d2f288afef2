"""The states of bitsandbytes' optimizers: 8-bit in blocks, and 32-bit where tensors are small."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays.formats import Blocks
from ..arrays.order import memory_order
from ..arrays.stored import Stored
from ..rules import RULES, Rule
from .common import (
    Arrival,
    Encoded,
    as_array,
    differences,
    initial_states,
    number,
    refuse,
    take_over,
)
from .torch import order_of, parameter_groups

if TYPE_CHECKING:
    from ..optimizer import Optimizer

STATES = {
    "adam": ("m", "v"),
    "adamw": ("m", "v"),
    "lion": ("m",),
    "momentum": ("v",),
    "rmsprop": ("v",),
    "adagrad": ("G",),
}
BLOCKS = (256, 2048)
"""Elements; the second in older versions."""
NESTED = "__bnb_optimizer_quant_state__"
MAP_TOLERANCE = 1e-6
"""Relative; their map and this one are rounded to float32 in other ways."""


def from_bitsandbytes(
    opt: Optimizer,
    state_dict: Mapping[str, Any],
    *,
    paths: Sequence[str] | None = None,
    strict: bool = True,
) -> None:
    """Go on from what the `state_dict()` of Adam8bit, AdamW8bit, Lion8bit, SGD8bit, RMSprop8bit
    or Adagrad8bit returned, or of their 32-bit forms.

    Where the optimizer stores a state in "dynamic8" and theirs has the same code map and blocks of
    256, codes and scales are taken as they are: bit for bit. Any other is decoded exactly, in
    float32, and stored as this optimizer stores it. Adam and AdamW both decay decoupled there; as
    `state_dict` does not tell the class, the rule here is taken to be it. paths, strict: as in
    `from_torch`. Weight decay of Lion, RMSProp and AdaGrad is refused where strict, as their
    backends disagree on it.

    Raises ValueError that lists everything that does not fit, such as states that are not in
    blocks; nothing has changed then.
    """
    groups = parameter_groups(state_dict)
    snapshot = opt.snapshot()
    order = iter(order_of(opt, groups, paths))
    problems: list[str] = []
    arrivals = {}
    for group in groups:
        for key in group["params"]:
            path = next(order)
            k = snapshot.paths.index(path)
            entry = dict(state_dict["state"].get(key, {}))
            entry |= entry.pop(NESTED, {})
            arrivals[path] = Arrival(int(number(entry.get("step", 0))), initial_states(opt, k))
            found = list(_unlike(snapshot.rules[k], group, arrivals[path].t, strict))
            if not found and entry:
                leaf_state = snapshot.leaf_states[k]
                for n, name in enumerate(STATES[snapshot.rules[k].name], 1):
                    value = _state(entry, n, leaf_state.states[name], leaf_state.caller)
                    if isinstance(value, str):
                        found.append(value)
                    else:
                        arrivals[path].states[name] = value
            problems += [f"{path}: {reason}" for reason in found]
    refuse("the state of bitsandbytes", problems)
    take_over(opt, max(arrival.t for arrival in arrivals.values()), arrivals)


def _unlike(rule: Rule, group: Mapping[str, Any], t: int, strict: bool) -> Iterator[str]:
    """Return how the rule differs from that of a group."""
    if rule.name not in STATES or rule.states != STATES[rule.name]:
        yield f"{rule.summary()} has other states than the rules of bitsandbytes"
        return
    missing = {"lr", "betas", "eps", "weight_decay"} - set(group)
    if missing:
        yield f"its group lacks {', '.join(sorted(missing))}"
        return
    lr, betas, eps, decay = (number(group[x]) for x in ("lr", "betas", "eps", "weight_decay"))
    values: dict[str, Any] = {"lr": lr, "weight_decay": decay}
    library = "torch"
    if rule.name in ("adam", "adamw"):
        name, values = "adamw", {**values, "betas": betas, "eps": eps}
    elif rule.name == "lion":
        name, library, values = "lion", "optax", {**values, "betas": betas}
    elif rule.name == "momentum":
        name, values = "momentum", {**values, "momentum": betas[0]}
    else:
        name, values = rule.name, {**values, "eps": eps}
        if name == "rmsprop":
            values["rho"] = betas[0]
    there = RULES[name].like(library, **values)
    if strict and decay and name in ("lion", "rmsprop", "adagrad"):
        yield f"weight_decay {decay!r} there, which the backends of {name} treat differently"
    yield from differences(rule, there, t + 1, strict)


def _state(entry: Mapping[str, Any], n: int, here: Stored, p: np.ndarray) -> Any:
    """The n-th state, as values or as codes to be taken over, or why it cannot be read."""
    if f"state{n}" not in entry:
        return f"has no state{n}"
    codes = as_array(entry[f"state{n}"])
    if codes.shape != p.shape:
        return f"state{n} has shape {codes.shape} there, {p.shape} here"
    if codes.dtype != np.uint8:
        return codes
    if f"qmap{n}" not in entry or f"absmax{n}" not in entry:
        return f"state{n} is not in blocks; make it with block_wise=True"
    qmap, absmax = (as_array(entry[f"{name}{n}"]) for name in ("qmap", "absmax"))
    fitting = [block for block in BLOCKS if absmax.shape == (-(-codes.size // block),)]
    if not fitting or qmap.shape != (256,):
        return f"state{n} has {absmax.shape} blocks and a map of {qmap.shape} values"
    block = fitting[0]
    if (
        isinstance(here.format, Blocks)
        and here.format.name == "dynamic8"
        and here.format.block == block
        and memory_order(p) == "C"
        and np.allclose(qmap, here.format.map, rtol=MAP_TOLERANCE, atol=0)
    ):
        return Encoded(codes.reshape(-1), absmax)
    scales = np.repeat(absmax.astype(np.float32), block)[: codes.size]
    return (qmap.astype(np.float32)[codes.reshape(-1)] * scales).reshape(p.shape)
