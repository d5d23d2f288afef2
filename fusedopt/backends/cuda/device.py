"""The `Space` of a device: what is kept there, and how it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from ...arrays.formats import PLAIN, SPLIT16, Format, compute_dtype
from ...arrays.storage import QUANTIZED_FROM, Storage, own_states
from ...arrays.stored import AVERAGE, Memory, Stored
from ...plan.options import Options
from .arrays import DeviceArray, stored
from .buffers import Memory as Bytes
from .buffers import on_device, synchronize
from .checks import Fit, check_apart, check_input, check_parameter, check_target

if TYPE_CHECKING:
    from ...rules import Rule

__all__ = [
    "Fit",
    "allocate",
    "blank",
    "check_apart",
    "check_input",
    "check_options",
    "check_parameter",
    "check_rule",
    "check_state",
    "check_target",
    "same",
]

LINE = 256
"""Bytes: new arrays begin on a multiple of it."""


def check_options(options: Options, state_path: Any) -> None:
    """ValueError, with the name, for what there is on the host alone."""
    asked = {
        "stats": options.stats,
        "exact": options.exact,
        "verify": options.verify,
        "state_path": state_path is not None,
        "threads": options.threads is not None,
        "rounding": options.rounding != "nearest",
        "master='split16'": options.master == "split16",
    }
    for name, given in asked.items():
        if given:
            raise ValueError(f"{name}: is not supported by the backend 'cuda'; leave it out")
    if options.skip_nonfinite and not options.wait:
        raise ValueError(
            "skip_nonfinite, wait: a step needs to know whether the one before was skipped, and"
            " wait=False does not wait for that; leave one of them out"
        )


def check_rule(rule: Rule, p: DeviceArray) -> None:
    """ValueError for a rule that there is on the host alone."""
    if rule.program.phases > 2 or rule.sides(p.shape):
        raise ValueError(
            f"{type(rule).__name__}: is not supported by the backend 'cuda'; take fo.Muon"
        )


def check_state(label: str, state: Any) -> Stored:
    """An array that will be updated in place; errors as `check_target`."""
    return stored(check_target(label, state))


def _supported(format: Format, name: str) -> Format:
    if format.quantized or format is SPLIT16:
        raise ValueError(
            f"state_dtype: {name!r} in {format.name} is not supported by the backend 'cuda'; take"
            " 'float32', 'bfloat16' or 'float16'"
        )
    return format


def allocate(
    storage: Storage,
    rules: Sequence[Rule],
    parameters: Sequence[DeviceArray],
    copies: Sequence[DeviceArray | None],
    states_of: Callable[[Any], tuple[str, ...]] = own_states,
) -> list[Memory]:
    """The memory of each leaf: see `Storage.allocate`. All that is new lies in one block."""
    wanted: list[tuple[DeviceArray, Format, float]] = []
    for rule, p in zip(rules, parameters, strict=True):
        check_rule(rule, p)
        own = storage.parameter(p.dtype)
        if own.dtype != p.dtype:
            wanted.append((p, own, 0.0))
        for name in states_of(rule):
            format = storage.state(rule, name, p.dtype, max(p.size, QUANTIZED_FROM))
            wanted.append((p, _supported(format, name), rule.initial(name)))
    fresh = iter(new_arrays(wanted))
    memories = []
    for rule, p, copied in zip(rules, parameters, copies, strict=True):
        own = storage.parameter(p.dtype)
        mirrors = () if copied is None else (copied,)
        master = next(fresh) if own.dtype != p.dtype else None
        states = {name: next(fresh) for name in states_of(rule)}
        if master is not None:
            master.data[...] = p
            memory = Memory(master, states, (p, *mirrors), ("master", master.data))  # type: ignore[arg-type]
        else:
            memory = Memory(stored(p), states, mirrors)  # type: ignore[arg-type]
        if AVERAGE in states:
            states[AVERAGE].data[...] = memory.parameter.data
        memories.append(memory)
    with on_device(parameters[0].device):
        synchronize()  # whatever stream has the first step
    return memories


def new_arrays(wanted: Sequence[tuple[DeviceArray, Format, float]]) -> list[Stored]:
    """New arrays like others, in formats of their own, with these values."""
    if not wanted:
        return []
    sizes = [-(-p.size * f.dtype.itemsize // LINE) * LINE for p, f, _ in wanted]
    first = wanted[0][0]
    with on_device(first.device):
        block = Bytes.new(sum(sizes))
        block.written_on = first.current_stream
        block.clear(block.written_on)
    made = []
    for (p, format, initial), start in zip(wanted, accumulate(sizes, initial=0), strict=False):
        address = block.address + start
        a = p.like(address, format.dtype, block)
        if initial:
            a[...] = initial
        made.append(stored(a))
    return made


def blank(parameters: Sequence[DeviceArray]) -> list[Stored]:
    """New arrays like these, in the types that they are computed in."""
    return new_arrays([(p, PLAIN[compute_dtype(p.dtype).name], 0.0) for p in parameters])


def same(a: DeviceArray, b: DeviceArray) -> bool:
    """Whether two arrays have the same elements, any NaN being like any other."""
    return np.array_equal(a.copy(), b.copy(), equal_nan=True)
