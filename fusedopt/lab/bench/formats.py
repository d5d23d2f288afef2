"""Ways to store parameters and states, and a step with each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import fusedopt as fo

from ...arrays.formats import BFLOAT16
from ...verification.judge import judge
from .problems import Array, Shapes, moved

LARGEST_CHECKED = 1 << 20
"""Elements: of larger leaves the check would take longer than the benchmark."""
CHECKED = 1


@dataclass(frozen=True)
class Way:
    """Dtypes of parameters and gradients, and arguments of `Optimizer`. copy: with `copy_out`."""

    parameter: Any = np.float32
    gradient: Any = np.float32
    options: Mapping[str, Any] = field(default_factory=dict)
    copy: bool = False


_LOW: dict[str, Any] = {"parameter": BFLOAT16, "gradient": BFLOAT16}
WAYS = {
    "float32": Way(),
    "all bfloat16": Way(**_LOW, options={"state_dtype": "bfloat16"}),
    "all bfloat16, stochastic": Way(
        **_LOW, options={"state_dtype": "bfloat16", "rounding": "stochastic"}
    ),
    "all float16": Way(np.float16, np.float16, {"state_dtype": "float16"}),
    "bfloat16, split16": Way(**_LOW, options={"master": "split16"}),
    "bfloat16, kahan": Way(**_LOW, options={"rounding": "kahan"}),
    "bfloat16, float32 masters": Way(**_LOW, options={"master": "float32"}),
    "float32, bfloat16 gradient and copy": Way(gradient=BFLOAT16, copy=True),
    "float8 states": Way(options={"state_dtype": "float8"}),
    "dynamic8 states": Way(options={"state_dtype": "dynamic8"}),
    "dynamic4 states": Way(options={"state_dtype": "dynamic4"}),
}


class Stored:
    """Parameters and gradients stored in one way, random and the same in each run.

    shapes: by name. rule: steps all of them. `step` takes one step.
    """

    def __init__(self, way: Way, shapes: Shapes, rule: fo.Rule) -> None:
        rng = np.random.default_rng(0)

        def draw(dtype: Any, scale: float) -> dict[str, Array]:
            drawn = {}
            for name, shape in shapes.items():
                values = rng.standard_normal(shape, np.float32)
                values *= scale
                drawn[name] = values.astype(dtype)
            return drawn

        self.rule = rule
        self.params, self.grads = draw(way.parameter, 0.02), draw(way.gradient, 1e-3)
        copies = {name: p.astype(BFLOAT16) for name, p in self.params.items()} if way.copy else None
        self.optimizer = fo.Optimizer(self.params, rule, copy_out=copies, **way.options)

    def step(self) -> object:
        return self.optimizer.step(self.grads)

    def textbook(self) -> None:
        """A step of the rule's reference, in the type in which arrays of no special format are."""
        t = self.optimizer.step_count + 1
        for name, p in self.params.items():
            states = tuple(self.optimizer.state[name].values())
            p[...], new = self.rule.reference(
                p, self.grads[name], states, t=t, lr=self.rule.lr_at(t)
            )
            for state, value in zip(states, new, strict=True):
                state[...] = value

    @property
    def elements(self) -> int:
        """The number of elements of all parameters together."""
        return sum(p.size for p in self.params.values())

    @property
    def traffic(self) -> list[tuple[list[Array], list[Array]]]:
        """Yield for each tensor its gradient, and the parameter with all that a step writes."""
        leaf_states = {name: self.optimizer.leaf_state(name)[0] for name in self.params}
        return [
            ([self.grads[name]], [a for stored in memory.stored for a in stored.arrays])
            for name, memory in leaf_states.items()
        ]

    @property
    def bytes_per_step(self) -> int:
        """The bytes that a step must read and write; copies are only written."""
        copies = (a for name in self.params for a in self.optimizer.leaf_state(name)[0].mirrors)
        return moved(self.traffic) + sum(a.nbytes for a in copies)

    def check(self) -> None:
        """Take a step; VerificationError where an element of some leaves leaves its bound."""
        looked_at = [name for name, p in self.params.items() if p.size <= LARGEST_CHECKED]
        leaf_states = {name: self.optimizer.leaf_state(name) for name in looked_at[:CHECKED]}
        before = {
            name: [s.values for s in memory.stored] for name, (memory, _) in leaf_states.items()
        }
        self.step()
        t = self.optimizer.step_count
        for name, (memory, keys) in leaf_states.items():
            for worst in judge(
                self.rule,
                before[name],
                memory.stored,
                self.grads[name],
                None,
                t=t,
                lr=self.rule.lr_at(t),
                keys=keys,
            ):
                if worst.share > 1.0:
                    raise fo.VerificationError(f"{name}: {worst}, in step {t} of {self.rule}")
