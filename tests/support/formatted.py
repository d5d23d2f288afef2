"""What the tests of storage formats share: ways to store, runs, maps from their sources."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from exactness import Array, elementwise, ordinary
from fusedopt.arrays.formats import Format
from fusedopt.arrays.stored import Quantized
from fusedopt.arrays.trees import Tree
from fusedopt.system.isa import isas
from fusedopt.verify import STORAGES

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
DTYPES = {dtype.name: dtype for dtype in (F32, F64, BF16, F16)}
BACKENDS = ["native", "reference"]
BLOCKED = ("float8", "dynamic8", "dynamic4")
SIZES = (4096, 4097, 5003, 100_003)
"""None below 4096, where states stay float32; with and without a rest in every block size."""


def on_each_isa() -> Iterator[str]:
    """Set one instruction set after the other, and in the end the first again."""
    before = fo.get_isa()
    try:
        for isa in isas():
            fo.set_isa(isa)
            yield isa
    finally:
        fo.set_isa(before)


def canonical(a: Array) -> Array:
    """The bits of an array's elements, with one NaN for all."""
    a = np.ascontiguousarray(a)
    if a.dtype.kind not in "iu":
        with np.errstate(invalid="ignore"):  # of a bfloat16 that signals
            a = np.where(np.isnan(a), a.dtype.type(np.nan), a)
    bits: Array = a.view(f"u{a.itemsize}")
    return bits


def assert_same(got: Mapping[str, Array], want: Mapping[str, Array], where: str = "") -> None:
    """Equal names, shapes, dtypes and bits, but that any NaN equals any NaN."""
    assert list(got) == list(want), where
    for name, a in got.items():
        b = want[name]
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{where}: {name}"
        differing = np.flatnonzero(canonical(a) != canonical(b))
        if differing.size:
            k = differing[0]
            raise AssertionError(
                f"{where}: {name} differs in {differing.size} of {a.size} elements, first in"
                f" element {k}: {a.flat[k]!r} instead of {b.flat[k]!r}"
            )


def arrays_of(state: Mapping[str, Any]) -> dict[str, Array]:
    """The arrays of a leaf's states by name; two of a quantised one."""
    found: dict[str, Array] = {}
    for name, a in state.items():
        if isinstance(a, Quantized):
            found |= {f"{name}.codes": a.codes, f"{name}.scales": a.scales}
        else:
            found[name] = a
    return found


def held(optimizer: fo.Optimizer, copies: Any = None) -> dict[str, Array]:
    """By name, copies of all that an optimizer holds or writes."""
    found = {leaf.path: leaf.value for leaf in Tree(optimizer.params).leaves}
    for path, state in optimizer.state.items():
        found |= {f"{path}/{name}": a for name, a in arrays_of(state).items()}
    if copies is not None:
        found |= {f"{leaf.path}/copy": leaf.value for leaf in Tree(copies).leaves}
    return {name: a.copy(order="K") for name, a in found.items()}


def everything(opt: fo.Optimizer) -> dict[str, Any]:
    """What an optimizer and its caller hold, copies and counters included."""
    copies = opt._assembly.options.copy_out
    found = held(opt, copies and {"a": copies["a"]})
    saved = opt.state_dict()
    counters = [saved["step"], saved["seed"], *(e["t"] for e in saved["leaves"].values())]
    return {**found, "counters": np.array(counters)}


@dataclass(frozen=True)
class Way:
    """How one thing is stored. mixed: formats that a rule's states take in turn."""

    p: Any
    g: Any = F32
    options: Mapping[str, Any] = field(default_factory=dict)
    mixed: tuple[str, ...] = ()
    copies: Any = None

    def arguments(self, rule: fo.Rule) -> dict[str, Any]:
        """Return the arguments of `Optimizer`, but for the copies."""
        turns = dict(zip(rule.states, cycle(self.mixed), strict=False))
        return {**self.options, "state_dtype": turns} if turns else dict(self.options)


WAYS: dict[str, Way] = {
    **{name: Way(DTYPES[p], DTYPES[p], options) for name, (p, options) in STORAGES.items()},
    "mixed states": Way(F32, BF16, mixed=("bfloat16", "float8", "float64")),
    "mixed quantised": Way(F16, F32, mixed=("dynamic4", "dynamic8")),
    "wide gradients": Way(BF16, F64, {"state_dtype": "float8", "rounding": "stochastic"}),
    "narrow gradients": Way(F64, BF16, {"state_dtype": "dynamic8"}),
    "masters and copies": Way(BF16, BF16, {"master": "float32"}, copies=F16),
    "split and copies": Way(BF16, F16, {"master": "split16", "zero_grads": True}, copies=BF16),
    "copies": Way(F32, F32, {"state_dtype": "dynamic4", "zero_grads": True}, copies=BF16),
}
"""Every storage that `fusedopt.verify` knows, and what they can be mixed to."""

RULES: dict[str, fo.Rule] = {
    "adamw": fo.AdamW(lr=0.01, weight_decay=0.1),
    "amsgrad": fo.Adam(lr=0.01, amsgrad="raw", weight_decay=0.1),
    "rmsprop": fo.RMSProp(centered=True, momentum=0.9, weight_decay=0.1, decay="decoupled_first"),
    "lion": fo.Lion(lr=0.01, weight_decay=0.1),
    "cautious": fo.Lion(lr=0.01, weight_decay=0.1, decay="cautious"),
    "sophia": fo.Sophia(lr=0.01, weight_decay=0.1),
    "muon": elementwise(fo.Muon(weight_decay=0.1)),
}


ADAMW = RULES["adamw"]


def shaped(rule: fo.Rule, n: int) -> tuple[int, ...]:
    return (n,) if not rule.program.matrices else (1, n)


def draw(seed: int, shape: Any, dtype: Any, *, special: bool = False) -> Array:
    """Values of many orders of magnitude; special: one infinity and one NaN among them."""
    rng = np.random.default_rng(seed)
    values = ordinary(rng, shape, F64)
    with np.errstate(over="ignore"):
        values = values.astype(dtype)
    if special:
        values.flat[[1000, -1]] = np.inf, np.nan
    return values


def run(
    rule: fo.Rule,
    way: Way,
    leaves: Mapping[str, int],
    *,
    special: bool = False,
    place: Callable[[Array], Array] = np.copy,
    steps: int = 3,
    **options: Any,
) -> dict[str, Array]:
    """What is there after some steps over leaves of these names and sizes.

    A leaf's values depend on its name alone. place: puts arrays where they are to lie.
    """
    shapes = {name: shaped(rule, n) for name, n in leaves.items()}

    def tree(kind: int, dtype: Any, special: bool = False) -> dict[str, Array]:
        return {
            name: place(draw(100 * kind + ord(name), shape, dtype, special=special))
            for name, shape in shapes.items()
        }

    params, copies = tree(0, way.p), None if way.copies is None else tree(1, way.copies)
    arguments = {"backend": "native", **way.arguments(rule), **options}
    optimizer = fo.Optimizer(params, rule, copy_out=copies, **arguments)
    for t in range(steps):
        estimates = tree(20 + t, way.g) if rule.takes_hessian and t % 2 == 0 else None
        optimizer.step(tree(10 + t, way.g, special), hessian=estimates)
    return held(optimizer, copies)


def made(way: Way, rule: fo.Rule = ADAMW, seed: int = 0, **options: Any) -> fo.Optimizer:
    """An optimizer over two leaves, the second of which keeps states in float32."""
    params = {"a": draw(seed, 5003, way.p), "b": [draw(seed + 1, (7, 9), way.p)]}
    arguments = way.arguments(rule)
    if way.copies is not None:
        arguments["copy_out"] = {"a": np.zeros(5003, way.copies), "b": [None]}
    return fo.Optimizer(params, rule, **{**arguments, **options})


def grads(way: Way, seed: int) -> Any:
    return {"a": draw(seed, 5003, way.g), "b": [draw(seed + 1, (7, 9), way.g)]}


def quantized(format: Format, n: int) -> Quantized:
    """A state of zeros."""
    codes = np.full(format.data_size(n), format.zero, np.uint8)
    return Quantized(format, codes, np.zeros(format.aux_size(n), np.float32), (n,), "C")


def stored(format: Format, x: Array) -> Quantized:
    """What the compiled core makes of values, float32 or float64."""
    state = quantized(format, x.size)
    fo.update(fo.Momentum(momentum=0.0), 1, np.zeros_like(x), x, state)
    return state


def loaded(state: Quantized) -> Array:
    """What the compiled core reads there, unless that overflows or underflows when halved."""
    p = np.zeros(state.shape, np.float32)
    rule = fo.Momentum(momentum=0.5, form="heavy_ball")
    fo.update(rule, 1, p, np.zeros_like(p), state)  # p := 0 - v / 2, and v is stored as v / 2
    return 0 - 2 * p  # a zero comes out as +0


def dynamic_map(counts: Sequence[int], *, signed: bool) -> Array:
    """Decades of so many values each, the highest last: in the middles of equal intervals."""
    positive = [1.0]
    for k, count in enumerate(counts, 1 - len(counts)):
        edges = np.linspace(0.1, 1.0, count + 1)
        positive += [*((edges[:-1] + edges[1:]) / 2 * 10.0**k)]
    negative = [-x for x in positive if x != 1.0] if signed else []
    return np.sort([*negative, 0.0, *positive])


def published_map(codec: str) -> Array:
    """The values of all codes of a format in float64, from the definitions of its source."""
    codes = np.arange(256)
    if codec == "e4m3":
        e4m3: Array = codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return e4m3
    if codec == "e5m3":  # sixteen octaves to each side of one; all normal, but that 0 is zero
        return np.where(codes == 0, 0.0, (1 + codes % 8 / 8) * 2.0 ** (codes // 8 - 16))
    return {
        "dynamic8": dynamic_map([2**i for i in range(7)], signed=True),
        "dynamic8_unsigned": dynamic_map([2 ** (i + 1) for i in range(7)], signed=False),
        "dynamic4": dynamic_map([1, 2, 4], signed=True),
        "dynamic4_unsigned": np.arange(1, 17) / 16,
    }[codec]


def refused(act: Callable[[], object], opt: fo.Optimizer, *parts: str) -> None:
    """A ValueError with these parts in its message, after which nothing has changed."""
    before = held(opt) | {"t": np.array(opt.step_count)}
    with pytest.raises(ValueError, match=re.escape(parts[0])) as raised:
        act()
    for part in parts:
        assert part in str(raised.value)
    assert_same(held(opt) | {"t": np.array(opt.step_count)}, before)
