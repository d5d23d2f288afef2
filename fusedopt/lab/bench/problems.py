"""The tensors of a benchmark: made once, and given to every contender alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import fusedopt as fo

from .memory import Traffic

Array = npt.NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]
Step = Callable[[], object]

SAMPLES = 1_000_000
"""The number of elements of a problem that are compared where a step is checked."""


def gpt2_block(prefix: str = "h.0") -> dict[str, tuple[int, ...]]:
    """The 12 parameters of one block of GPT-2 small, 7.1 million elements."""
    d = 768
    weights = {
        "ln_1": (d,),
        "attn.c_attn": (d, 3 * d),
        "attn.c_proj": (d, d),
        "ln_2": (d,),
        "mlp.c_fc": (d, 4 * d),
        "mlp.c_proj": (4 * d, d),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in weights.items():
        shapes |= {f"{prefix}.{name}.w": shape, f"{prefix}.{name}.b": shape[-1:]}
    return shapes


def gpt2_small() -> dict[str, tuple[int, ...]]:
    """The 148 parameters of GPT-2 small, 124.4 million elements."""
    shapes: dict[str, tuple[int, ...]] = {"wte": (50257, 768), "wpe": (1024, 768)}
    for block in range(12):
        shapes |= gpt2_block(f"h.{block}")
    return shapes | {"ln_f.w": (768,), "ln_f.b": (768,)}


def resnet50() -> dict[str, tuple[int, ...]]:
    """The 161 parameters of ResNet-50 (He et al. 2015, table 1), 25.6 million elements.

    A convolution has no bias; the normalisation after it has a scale and a shift.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, out: int, into: int, side: int) -> None:
        shapes[f"{name}.w"] = (out, into, side, side)
        shapes[f"{name}.scale"] = shapes[f"{name}.shift"] = (out,)

    convolution("stem", 64, 3, 7)
    into = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            name = f"{stage}.{block}"
            convolution(f"{name}.reduce", width, into, 1)
            convolution(f"{name}.middle", width, width, 3)
            convolution(f"{name}.expand", 4 * width, width, 1)
            if block == 0:
                convolution(f"{name}.shortcut", 4 * width, into, 1)
            into = 4 * width
    return shapes | {"head.w": (1000, into), "head.b": (1000,)}


def tensors(count: int, size: int) -> dict[str, tuple[int, ...]]:
    """Return a number of vectors of one size."""
    return {f"t{k}": (size,) for k in range(count)}


def rule_of(name: str) -> fo.Rule:
    """The rule in PyTorch's convention where there is one, so that all contenders do equal work."""
    cls: Any = fo.RULES[name]
    # Without momentum, PyTorch's default, its SGD would keep no buffer.
    settings = {"momentum": 0.9} if name in ("momentum", "nesterov") else {}
    rule: fo.Rule = cls.like("torch", **settings) if "torch" in cls.conventions else cls()
    # An estimate of the rate has no end where all gradients are the same.
    return replace(rule, lr=0.0) if cls.kept else rule


def elementwise_rules() -> list[str]:
    """The rules whose step is one pass over the arrays, to which a sweep's speed is the limit."""
    return [name for name in fo.RULES if rule_of(name).program.phases == 1]


class Leaf(NamedTuple):
    """One tensor: parameter, gradient and states, all of one shape and dtype."""

    p: Array
    g: Array
    states: tuple[Array, ...]


def moved(traffic: Traffic) -> int:
    """Bytes: what is updated is read and written."""
    return sum(
        sum(a.nbytes for a in read) + 2 * sum(a.nbytes for a in updated)
        for read, updated in traffic
    )


class Problem:
    """Parameters, gradients and states of one rule; every contender steps these very arrays.

    shapes: by name. dtype: float32 or float64, of everything. backend: of `optimizer`, which made
    the states. All values are random, the same in each run, and none is near a denormal.
    """

    def __init__(
        self, shapes: Shapes, rule: fo.Rule, dtype: type = np.float32, backend: str = "auto"
    ) -> None:
        rng = np.random.default_rng(0)

        def normal() -> dict[str, Array]:
            return {name: rng.standard_normal(shape, dtype) for name, shape in shapes.items()}

        self.rule = rule
        self.params, self.grads = normal(), normal()
        self.optimizer = fo.Optimizer(self.params, rule, backend=backend)
        self.leaves = [
            Leaf(p, self.grads[name], tuple(self.optimizer.state[name].values()))
            for name, p in self.params.items()
        ]
        for _, g, states in self.leaves:
            for state in states:
                np.abs(g, out=state)

    @property
    def written_states(self) -> list[int]:
        """Return the names of the states that a step changes."""
        p, g, *states = (np.ones(1) for _ in range(2 + len(self.rule.states)))
        _, new = self.rule.reference(p, g, tuple(states), t=1, lr=0.1)
        return [k for k, (a, b) in enumerate(zip(states, new, strict=True)) if a is not b]

    @property
    def elements(self) -> int:
        """The number of elements of all parameters together."""
        return sum(leaf.p.size for leaf in self.leaves)

    @property
    def traffic(self) -> list[tuple[list[Array], list[Array]]]:
        """Yield for each tensor the arrays that a step only reads, and those that it writes."""
        written = set(self.written_states)
        kept = set(range(len(self.rule.states))) - written
        return [
            ([g, *(states[k] for k in sorted(kept))], [p, *(states[k] for k in sorted(written))])
            for p, g, states in self.leaves
        ]

    @property
    def bytes_per_step(self) -> int:
        """The bytes that a step must move: each array once, and twice where it changes."""
        return moved(self.traffic)

    def sample(self) -> list[Array]:
        """Every so manieth element of parameters, gradients and each state, in float64."""
        # Odd, so that all lanes of a vector are seen.
        stride = self.elements // SAMPLES | 1
        arrays = zip(*((p, g, *states) for p, g, states in self.leaves), strict=True)
        return [
            np.concatenate([a.reshape(-1)[::stride].astype(np.float64) for a in same])
            for same in arrays
        ]

    def check(self, step: Step, t: int = 1) -> None:
        """Take a contender's t-th step; VerificationError where it is not what the rule says.

        Every sampled element must agree with the rule's reference within the rounding of a few
        operations.
        """
        p, g, *states = self.sample()
        step()
        p_new, g_new, *states_new = self.sample()
        expected, expected_states = self.rule.reference(
            p, g, tuple(states), t=t, lr=self.rule.lr_at(t)
        )
        if not np.array_equal(g_new, g):
            raise fo.VerificationError(f"{self.rule.name}: the step changed the gradients")
        names = ("p", *self.rule.states)
        olds, news = (p, *states), (p_new, *states_new)
        eps = np.finfo(self.leaves[0].p.dtype).eps
        for name, old, new, target in zip(
            names, olds, news, (expected, *expected_states), strict=True
        ):
            size, change = np.maximum(np.abs(old), np.abs(target)), np.abs(target - old)
            slack = eps * (4 * size + 64 * change)
            wrong = np.flatnonzero(~(np.abs(new - target) <= slack))
            if wrong.size:
                raise fo.VerificationError(
                    f"{self.rule.name}, {name}: {wrong.size} of {new.size} sampled elements are"
                    f" wrong, the first is {new[wrong[0]]!r} instead of {target[wrong[0]]!r}"
                )
