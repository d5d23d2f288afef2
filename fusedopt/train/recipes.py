"""What each rule trains the small GPT with: learning rates that work, and which leaves it gets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import cos, pi

import fusedopt as fo

# Peak learning rates, under `WarmupCosine`: of each rule the best on held-out text after 1000 steps
# of the default model, seed 0, among values a factor of 2 (Adam, AdamW, Muon) or 3 apart. Three
# times SGD's and ten times Nesterov's make the loss explode.
LEARNING_RATES = {
    "sgd": 0.3,
    "momentum": 1.0,
    "nesterov": 0.1,
    "adagrad": 0.01,
    "rmsprop": 1e-3,
    "adam": 2e-3,
    "adamw": 2e-3,
    "lion": 3e-4,
    "sophia": 3e-4,
    "muon": 0.02,
}

# Rules that take curvature get it at the first step and at every so many steps after it, as in
# Sophia's paper.
HESSIAN_EVERY = 10


@dataclass(frozen=True)
class WarmupCosine:
    """A schedule: up to `base` in the first 5 % of `steps`, then a cosine to a tenth of it."""

    base: float
    steps: int

    def __call__(self, step: int) -> float:
        rising = min(1.0, 20 * step / self.steps)
        falling = 0.55 + 0.45 * cos(pi * min(1.0, step / self.steps))
        return self.base * rising * falling

    def __str__(self) -> str:
        return f"learning rate up to {self.base:g}"


def recipe(name: str, lr: float | None, steps: int, tokens: int) -> dict[str, fo.Rule]:
    """Path pattern -> rule, for a run of `steps` batches of `tokens` tokens.

    lr: the peak learning rate; None takes the table's. Muon gets the matrices of the blocks; the
    embeddings, the head and all vectors then go to AdamW at its own rate of the table.
    """
    rule = fo.RULES[name](lr=WarmupCosine(LEARNING_RATES[name] if lr is None else lr, steps))
    if isinstance(rule, fo.Sophia):
        rule = replace(rule, bs=tokens)
    if isinstance(rule, fo.Muon):
        rest = fo.AdamW(lr=WarmupCosine(LEARNING_RATES["adamw"], steps))
        return {"blocks.*.w": rule, "*": rest}
    return {"*": rule}
