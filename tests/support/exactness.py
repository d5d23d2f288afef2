"""What the tests of exact results share: operands, ways to step them, and equality of bits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import fusedopt as fo
from fusedopt.system.extension import core
from fusedopt.system.isa import isas
from fusedopt.verify import variants

Array = npt.NDArray[Any]

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
SUPPORT = {"PYTHONPATH": os.pathsep.join(map(str, (TESTS / "support", TESTS)))}
"""What a new interpreter needs to import this folder and its neighbours."""
DTYPES = (np.float32, np.float64)
STEPS = 3


SIZES = core.sizes if core else {"SERIAL": 1 << 16, "SMALLEST_PART": 1 << 14}
"""Sizes from which the core divides work among threads; some tests run without it."""
SERIAL, PART = SIZES["SERIAL"], SIZES["SMALLEST_PART"]


def elementwise(rule: fo.Rule) -> fo.Rule:
    """The rule; where it has matrix products, with an elementwise stand-in for these.

    What BLAS returns may depend on how it is called; everything round it may not.
    """
    if not rule.program.matrices:
        return rule

    def between(self: fo.Rule, phase: int, works: Any, workspace: Any, members: Any) -> None:
        made = {op.operands[-1] for op in rule.operations() if op.loop == "peek"}
        for name, work in zip(rule.works, works, strict=True):
            if name not in made:  # by products alone
                np.copyto(work, works[0])
            work *= 0.5

    def sides(self: fo.Rule, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {}

    def before(self: fo.Rule, t: int, sides: Any) -> dict[str, np.ndarray]:
        return {}

    def textbook(self: fo.Rule, p: Any, g: Any, states: Any, *, t: int, lr: float) -> Any:
        own = (np.zeros(shape) for shape in rule.sides(p.shape).values())
        delta, new = rule.textbook(p, g, (*states, *own), t=t, lr=lr)
        return delta, new[: len(states)]

    members = {"between": between, "before": before, "sides": sides, "textbook": textbook}
    cls = type("Elementwise" + type(rule).__name__, (type(rule),), members)
    stand_in: fo.Rule = cls(**{field.name: getattr(rule, field.name) for field in fields(rule)})
    return stand_in


def apart(rule: fo.Rule) -> fo.Rule:
    """The rule; where it reads sums, with one that is the same whatever there is to add up."""
    if not rule.program.measures:
        return rule
    sums = (2.0,) * rule.program.measures

    def measured(self: fo.Rule, t: int, lr: float, _: Any, *kept: float) -> tuple[float, ...]:
        found = rule.measured(t, lr, sums, *kept)
        return (*found[: len(found) - len(kept)], *kept)

    cls = type("Apart" + type(rule).__name__, (type(rule),), {"measured": measured})
    stand_in: fo.Rule = cls(**{field.name: getattr(rule, field.name) for field in fields(rule)})
    return stand_in


def on_devices(rules: dict[str, fo.Rule]) -> dict[str, fo.Rule]:
    """Return the rules that the backend "cuda" has: those that measure nothing."""
    return {name: rule for name, rule in rules.items() if not rule.program.measures}


RULES = {
    f"{name}-{k}": elementwise(rule)
    for name, cls in fo.RULES.items()
    for k, rule in enumerate(variants(cls))
}
"""Every variant of every rule."""

DECAYING: dict[str, Any] = {"weight_decay": 0.1, "decay": "decoupled"}

DEFAULTS = {name: elementwise(cls(**DECAYING)) for name, cls in fo.RULES.items()}


@dataclass(frozen=True)
class Case:
    """The operands of STEPS steps of one tensor."""

    p: Array
    states: tuple[Array, ...]
    grads: tuple[Array, ...]
    hessians: tuple[Array | None, ...]

    def map(self, change: Callable[[Array], Array]) -> Case:
        """Return the case with every array changed."""
        return Case(
            change(self.p),
            tuple(map(change, self.states)),
            tuple(map(change, self.grads)),
            tuple(None if h is None else change(h) for h in self.hessians),
        )


def operands(rule: fo.Rule) -> tuple[str, ...]:
    return ("p", "g", *rule.states, *["hessian"] * rule.takes_hessian)


def shape_of(rule: fo.Rule, n: int) -> tuple[int, ...]:
    """A shape of n elements that the rule accepts."""
    return (n,) if not rule.program.matrices else (1, n)


def case(
    rule: fo.Rule,
    shape: int | tuple[int, ...],
    dtype: npt.DTypeLike,
    *,
    awkward: Collection[str] = (),
    seed: int = 0,
) -> Case:
    """Random operands, those named in `awkward` of awkward values."""
    rng = np.random.default_rng(seed)
    extent = shape_of(rule, shape) if isinstance(shape, int) else shape

    def draw(name: str) -> Array:
        values = ordinary(rng, extent, np.dtype(dtype))
        if name in rule.states:
            values = np.abs(values)
        return sprinkled(rng, values) if name in awkward else values

    refresh = [k == 1 and rule.takes_hessian for k in range(STEPS)]
    return Case(
        draw("p"),
        tuple(draw(name) for name in rule.states),
        tuple(draw("g") for _ in range(STEPS)),
        tuple(draw("hessian") if wanted else None for wanted in refresh),
    )


def ordinary(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Values of many orders of magnitude, with exact zeros."""
    values = np.ldexp(rng.standard_normal(shape), rng.integers(-20, 7, shape))
    return np.asarray(np.where(rng.random(shape) < 0.03, 0.0, values), dtype)


def sprinkled(rng: np.random.Generator, values: Array) -> Array:
    """The values, half of them replaced by special ones."""
    limits = np.finfo(values.dtype)
    least, normal, largest = limits.smallest_subnormal, limits.smallest_normal, limits.max
    with np.errstate(under="ignore"):
        magnitudes = [0.0, least, normal / 2, normal - least, normal, normal * 3, 1e-20]
    magnitudes += [float(limits.eps), 1.0, 1e18, np.sqrt(largest), largest / 2, largest, np.inf]
    special = np.array([*magnitudes, *np.negative(magnitudes), np.nan], values.dtype)
    chosen = rng.random(values.shape) < 0.5
    return np.where(chosen, rng.choice(special, values.shape), values)


Result = tuple[Array, ...]


def stepped(
    rule: fo.Rule, cases: Sequence[Case], *, copy: bool = True, **options: Any
) -> list[Result]:
    """The parameter and states of each case after an optimizer's steps over all of them."""
    parameters = [c.p.copy(order="K") if copy else c.p for c in cases]
    optimizer = fo.Optimizer(parameters, rule, **{"backend": "native", **options})
    live = [
        tuple(state for name, state in states.items() if name not in rule.kept)
        for states in optimizer.state.values()
    ]
    for states, c in zip(live, cases, strict=True):
        for state, start in zip(states[: len(rule.states)], c.states, strict=True):
            state[...] = start
    for k in range(STEPS):
        estimates = [c.hessians[k] for c in cases]
        given = any(h is not None for h in estimates)
        optimizer.step([c.grads[k] for c in cases], hessian=estimates if given else None)
    return [(p, *states) for p, states in zip(parameters, live, strict=True)]


def updated(rule: fo.Rule, c: Case) -> Result:
    """Step one case with `fo.update`, on the case's own arrays."""
    kept = rule.init(c.p)[len(rule.states) :] if rule.kept else ()
    for k in range(STEPS):
        fo.update(rule, k + 1, c.p, c.grads[k], *c.states, *kept, hessian=c.hessians[k])
    return (c.p, *c.states)


def assert_same_bits(got: Result, want: Result, where: str) -> None:
    """Equal shapes, dtypes and bits, but that any NaN equals any NaN; `where` begins the message.

    Elements are compared by their indices, whatever the memory order.
    """
    assert len(got) == len(want), where
    for name, a, b in zip(("p", *map("state {}".format, range(len(got)))), got, want, strict=False):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{where}: {name}"
        differing = np.flatnonzero(bits(a) != bits(b))
        if differing.size:
            k = differing[0]
            raise AssertionError(
                f"{where}: {name} differs in {differing.size} of {a.size} elements, first in"
                f" element {k}: {a.flat[k]!r} instead of {b.flat[k]!r}"
            )


def bits(a: Array) -> npt.NDArray[np.unsignedinteger[Any]]:
    """The elements' bits, flat in C order, of one NaN for all."""
    one_nan = np.where(np.isnan(a), a.dtype.type(np.nan), a)
    flat: npt.NDArray[np.unsignedinteger[Any]] = one_nan.ravel().view(f"u{a.itemsize}")
    return flat


class Guards:
    """Places arrays in memory of their own at growing offsets of 0 to 3 elements from a cache
    line, with guard bytes round each.
    """

    MARGIN, LINE, FILL = 64, 64, 0xA5

    def __init__(self, first_offset: int) -> None:
        self._offset = first_offset
        self._placed: list[tuple[Array, int, int]] = []

    def place(self, a: Array) -> Array:
        buffer = np.full(a.nbytes + 2 * self.MARGIN + 2 * self.LINE, self.FILL, np.uint8)
        start = self.MARGIN - (buffer.ctypes.data + self.MARGIN) % self.LINE + self.LINE
        start += self._offset % 4 * a.itemsize
        self._offset += 1
        self._placed.append((buffer, start, start + a.nbytes))
        there: Array = np.ndarray(a.shape, a.dtype, buffer.data, start)
        there[...] = a
        return there

    def intact(self) -> bool:
        return all(
            bool((np.concatenate((buffer[:start], buffer[stop:])) == self.FILL).all())
            for buffer, start, stop in self._placed
        )


def stepped_on_each_isa(rule: fo.Rule, c: Case) -> dict[str, Result]:
    """The case's result on each instruction set that is to be had here."""
    before = fo.get_isa()
    try:
        results = {}
        for isa in isas():
            fo.set_isa(isa)
            results[isa] = stepped(rule, [c])[0]
        return results
    finally:
        fo.set_isa(before)


def run_python(
    code: str, environment: Mapping[str, str] | None = None, *, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that can import the tests; a hang raises TimeoutExpired."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FUSEDOPT_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=TESTS,
        env={**inherited, **SUPPORT, **(environment or {})},
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )


def step_and_digest(optimizer: fo.Optimizer, grads: Any) -> str:
    """What tests have another process do; here, where it can be imported from."""
    optimizer.step(grads)
    return optimizer.fingerprint()
