"""The `Device` of arrays on a GPU: what is kept there, and how it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from ...arrays.formats import PLAIN_OF, compute_dtype
from ...arrays.storage import Storage, own_states
from ...arrays.storage import synchronize as take_parameter
from ...arrays.stored import WEIGHTS, ArraySpec, LeafState, Stored
from ...plan.options import Options, unsupported
from .arrays import DeviceArray, DeviceQuantized, DeviceStored, stored
from .buffers import Memory as Bytes
from .buffers import on_device, synchronize
from .checks import GradientChecks, check_apart, check_input, check_parameter, check_target
from .rows import unique_rows

if TYPE_CHECKING:
    from ...rules.base import Rule

__all__ = [
    "GradientChecks",
    "allocate",
    "blank",
    "check_apart",
    "check_options",
    "check_parameter",
    "check_state",
    "check_summed",
    "check_target",
    "same",
    "unique_rows",
]

check_summed = check_input

LINE = 256
"""Bytes: new arrays begin on a multiple of it."""


def check_options(options: Options, state_path: Any) -> None:
    """ValueError, with the name, for what there is on the host alone."""
    asked = {
        "stats with wait=False": options.stats and not options.wait,
        "clip_leaf": options.clip_leaf is not None,
        "clip_adaptive": options.clip_adaptive is not None,
        "centralize": options.centralize,
        "exact": options.exact,
        "verify": options.verify,
        "state_path": state_path is not None,
        "threads": options.threads is not None,
    }
    for name, given in asked.items():
        if given:
            raise ValueError(unsupported(name, "leave it out"))
    if options.skip_nonfinite and not options.wait:
        raise ValueError(
            "skip_nonfinite, wait: a step needs to know whether the one before was skipped, and"
            " wait=False does not wait for that; leave one of them out"
        )


def check_rule(rule: Rule) -> None:
    """ValueError for a rule that there is on the host alone."""
    name = type(rule).__name__
    if rule.program.measures:
        raise ValueError(unsupported(f"{name}, which measures", "take fo.AdamW"))
    if rule.host_only:
        raise ValueError(unsupported(name, "take fo.Muon or fo.SOAP"))


def check_state(label: str, state: Any) -> Stored:
    """An array that will be updated in place, or a quantised state of the device; errors as
    `check_target`."""
    return state if isinstance(state, DeviceQuantized) else stored(check_target(label, state))


def allocate(
    storage: Storage,
    rules: Sequence[Rule],
    parameters: Sequence[DeviceArray],
    copies: Sequence[DeviceArray | None],
    states_of: Callable[[Any], tuple[str, ...]] = own_states,
) -> list[LeafState]:
    """The memory of each leaf: see `Storage.allocate`. All that is new lies in one block."""
    wanted: list[ArraySpec] = []
    likes: Any = parameters
    for rule, p in zip(rules, likes, strict=True):
        check_rule(rule)
        if storage.keeps_more(p):
            format = storage.parameter(p.dtype)
            wanted.append(ArraySpec(format, p, beside=format.aux_dtype is not None))
        for name in states_of(rule):
            wanted.append(
                ArraySpec(storage.state(rule, name, p.dtype, p.size), p, rule.initial(name))
            )
        plain = PLAIN_OF[compute_dtype(p.dtype)]
        wanted += [ArraySpec(plain, p, shape=shape) for shape in rule.sides(p.shape).values()]
    fresh = iter(new_arrays(wanted))
    made = []
    for rule, p, copied in zip(rules, likes, copies, strict=True):
        own = next(fresh) if storage.keeps_more(p) else None
        states = {name: next(fresh) for name in states_of(rule)}
        sides = {name: next(fresh) for name in rule.sides(p.shape)}
        leaf_state = storage.leaf_state(stored(p), own, states, copied)  # type: ignore[arg-type]
        leaf_state = replace(leaf_state, sides=sides)
        take_parameter(leaf_state)
        for name in states.keys() & WEIGHTS:
            states[name].data[...] = leaf_state.parameter.data  # there is nothing beside it yet
        made.append(leaf_state)
    with on_device(parameters[0].device):
        synchronize()  # whatever stream has the first step
    return made


def new_arrays(wanted: Sequence[ArraySpec]) -> list[Stored]:
    """New arrays like others, in formats of their own; each on a line of its own in one block."""
    if not wanted:
        return []
    sizes = [-(-size // LINE) * LINE for w in wanted for size in w.sizes()]
    first: Any = wanted[0].like
    with on_device(first.device):
        block = Bytes.new(sum(sizes))
        block.written_on = first.current_stream
        block.fill(0, block.written_on)
        starts = accumulate(sizes, initial=block.address)
        return [_made(w, block, [next(starts) for _ in w.sizes()]) for w in wanted]


def _made(w: ArraySpec, block: Bytes, addresses: Sequence[int]) -> Stored:
    """An array at the addresses of its data and of what stands beside it."""
    like: Any = w.like
    format, size = w.format, like.size
    if w.shape is not None:
        return stored(like.like(addresses[0], format.dtype, block, w.shape))
    aux = None
    if format.aux_dtype is not None:
        shape = (format.aux_size(size),)
        aux = like.like(addresses[-1], format.aux_dtype, block, shape)
    if format.quantized:
        data = like.like(addresses[0], format.dtype, block, (format.data_size(size),))
        data.memory.fill(format.zero, block.written_on)
    else:
        data = like if w.beside else like.like(addresses[0], format.dtype, block)
    cls = DeviceQuantized if format.quantized else DeviceStored
    made = cls(format, data, aux, like.shape, like.order)
    if w.initial:
        made.fill(w.initial)
    return made


def blank(parameters: Sequence[DeviceArray]) -> list[Stored]:
    """New arrays like these, in the types that they are computed in."""
    likes: Any = parameters
    return new_arrays([ArraySpec(PLAIN_OF[compute_dtype(p.dtype)], p) for p in likes])


def same(a: DeviceArray, b: DeviceArray) -> bool:
    """Return whether two arrays have the same elements, any NaN being like any other."""
    return np.array_equal(a.copy(), b.copy(), equal_nan=True)
