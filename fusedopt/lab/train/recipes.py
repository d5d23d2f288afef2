"""The recipe of each rule for the small GPT: learning rates that work, and its leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import fusedopt as fo

from ...schedules import (
    Constant,
    Cosine,
    Linear,
    OneCycle,
    Polynomial,
    Schedule,
    Step,
    WarmupStableDecay,
)

# Peak learning rates, under the schedule "cosine": of each rule the best on held-out text after
# 1000 steps of the default model, seed 0, among values a factor of 2 (Adam, AdamW, Muon) or 3
# apart. Three times SGD's and ten times Nesterov's make the loss explode. The last three are the
# best of two or three values: NorMuon of 0.01 and 0.02, AdaMuon of 0.005, 0.01 and 0.02, SOAP of
# 0.003 and 0.006. Shampoo's is the best of 0.001, 0.003, 0.006 and 0.012, and Dion's of 0.01, 0.02,
# 0.04 and 0.06, for the model of a quick race, and Adafactor's of 0.003, 0.01, 0.03 and 0.09 after
# 300 of its steps. Those from AdaMax to Schedule-Free AdamW are the best that the search of a quick
# race found, of values a factor of 3 apart, after 300 steps of its model; for the default model,
# which is wider, it gives the same rate for some rules and three times as much for others. Rprop
# takes gradients of whole data sets: with batches it does not train, whatever the rate.
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
    "adamax": 0.018,
    "adadelta": 3.0,
    "nadam": 3e-3,
    "radam": 0.018,
    "rprop": 1e-4,
    "signum": 9e-4,
    "adabelief": 2e-3,
    "adopt": 6e-3,
    "ademamix": 3e-3,
    "grams": 9e-3,
    "laprop": 3e-3,
    "adan": 0.015,
    "lars": 3.0,
    "lamb": 0.015,
    "cautiousadamw": 3e-3,
    "cautiouslion": 9e-4,
    "tiger": 0.01,
    "mars": 9e-3,
    "schedulefreeadamw": 7.5e-3,
    "adafactor": 0.03,
    "muon": 0.02,
    "normuon": 0.02,
    "adamuon": 5e-3,
    "soap": 6e-3,
    "shampoo": 3e-3,
    "dion": 0.04,
}


def peak_rate(name: str) -> float:
    """Return the peak learning rate of a rule: the table's, or else the rule's default."""
    default = fo.RULES[name]().lr
    return LEARNING_RATES.get(name, 1e-3 if callable(default) else default)


# Rules that take curvature get it at the first step and at every tenth step after it, as in the
# paper of Sophia.
HESSIAN_EVERY = 10

# What Sophia does with an estimate of curvature. Products with the Hessian can be negative, for
# which the paper's form is made, with its rho for them.
ESTIMATORS: dict[str, dict[str, Any]] = {
    "gnb": {},
    "hutchinson": {"estimator": "hutchinson", "form": "paper", "rho": 0.01},
}

# From the peak learning rate and the steps of a run. The first twentieth of these warms up.
SCHEDULES: dict[str, Callable[[float, int], Schedule]] = {
    "cosine": lambda lr, steps: Constant(lr, warmup=steps / 20) * Cosine(1.0, steps, final=0.1),
    "constant": lambda lr, steps: Constant(lr, warmup=steps / 20),
    "linear": lambda lr, steps: Linear(lr, steps, warmup=steps / 20),
    "polynomial": lambda lr, steps: Polynomial(lr, steps, warmup=steps / 20, power=2.0),
    "wsd": lambda lr, steps: WarmupStableDecay(lr, steps, warmup=steps / 20, decay=steps / 5),
    "onecycle": lambda lr, steps: OneCycle(lr, steps),
    "step": lambda lr, steps: (
        Constant(lr, warmup=steps / 20) * Step(1.0, every=-(-steps // 3), factor=0.1)
    ),
}


def replaces_schedule(name: str) -> bool:
    """Whether a rule takes no schedule of its learning rate."""
    return hasattr(fo.RULES[name], "warmup_steps")


def recipe(
    name: str,
    lr: float | None,
    steps: int,
    tokens: int,
    schedule: str = "cosine",
    estimator: str = "gnb",
) -> dict[str, fo.Rule]:
    """Path pattern -> rule, for a run of `steps` updates of `tokens` tokens.

    Schedule-Free rules warm up as the schedules do, and take none.
    lr: the peak learning rate; None takes `peak_rate`. schedule: a name in `SCHEDULES`.
    estimator: a name in `ESTIMATORS`, of Sophia. Rules for matrices, such as Muon, get those of the
    blocks; the embeddings, the head and all vectors then go to AdamW at its own rate of the table.
    """
    shape, peak = SCHEDULES[schedule], peak_rate(name) if lr is None else lr
    make: Callable[..., fo.Rule] = fo.RULES[name]
    if replaces_schedule(name):
        return {"*": make(lr=peak, warmup_steps=steps // 20)}
    rule = make(lr=shape(peak, steps))
    if isinstance(rule, fo.Sophia):
        rule = replace(rule, bs=tokens, **ESTIMATORS[estimator])
    if rule.refuses(np.ones(1)):
        rest = fo.AdamW(lr=shape(peak_rate("adamw"), steps))
        return {"blocks.*.w": rule, "*": rest}
    return {"*": rule}
