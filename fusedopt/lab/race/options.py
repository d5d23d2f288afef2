"""The options of `fusedopt race`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fusedopt as fo

from ..train import TrainOptions


@dataclass(frozen=True, kw_only=True)
class RaceOptions:
    """The runners, their model and text, and where the report goes.

    rules: names in `fo.RULES`, each once. steps: updates of each rule; search_steps: of each
    short run that tries a learning rate, with the first seed alone. seeds: runs of each rule, with
    parameters and batches of their own. data, batch, context, layers, heads, width, seed (the
    first), backend, threads: as in `TrainOptions`, the same for every rule. target: the held-out
    loss, in nats per character, whose time is taken; None takes the bigram model's. out: the
    directory of the report, made if it is not there. search: try the learning rates anew where
    `out` has some. json: where the numbers go too.
    Raises ValueError for a number out of range or a rule that does not exist.
    """

    rules: tuple[str, ...] = tuple(fo.RULES)
    steps: int = 4000
    search_steps: int = 500
    data: Path | None = None
    batch: int = 8
    context: int = 64
    layers: int = 2
    heads: int = 4
    width: int = 128
    seed: int = 0
    seeds: int = 3
    target: float | None = None
    out: Path = Path("runs/race")
    search: bool = False
    json: Path | None = None
    backend: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if not self.rules or len(set(self.rules)) < len(self.rules):
            raise ValueError(f"rules: expected different rules, at least one, got {self.rules}")
        if self.search_steps < 1:
            raise ValueError(f"search_steps: expected at least 1, got {self.search_steps}")
        if self.seeds < 1:
            raise ValueError(f"seeds: expected at least 1, got {self.seeds}")
        if self.target is not None and not 0 < self.target < math.inf:
            raise ValueError(f"target: expected a positive number, got {self.target}")
        for rule in self.rules:
            self.run(rule, None, self.steps)

    def run(self, rule: str, lr: float | None, steps: int, number: int = 0) -> TrainOptions:
        """Return the options of one rule's run, or trial, of `steps` steps; number: of its seed."""
        return TrainOptions(
            rule=rule,
            lr=lr,
            steps=steps,
            data=self.data,
            batch=self.batch,
            context=self.context,
            layers=self.layers,
            heads=self.heads,
            width=self.width,
            seed=self.seed + number,
            backend=self.backend,
            threads=self.threads,
            stats=False,
        )


QUICK: dict[str, Any] = {
    "steps": 1200, "search_steps": 300, "context": 32, "width": 64, "seeds": 1
}  # fmt: skip
"""Options of a race of about ten seconds a rule on two cores."""
