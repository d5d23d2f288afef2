"""Trains the small GPT with one rule, and reports: the work behind `fusedopt train`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import TimeRemainingColumn

import fusedopt as fo

from ..formats import BFLOAT16, FLOAT32
from ..progress import progress
from ..storage import Master, Rounding
from ..trees import Tree
from ..writable import claim_directory, claim_file
from . import gpt, report, steptime, text
from .recipes import HESSIAN_EVERY, SCHEDULES, recipe
from .report import Result, Status, say

EVALUATIONS = 20  # per run, not counting the one before the first step
HELD_OUT_WINDOWS = 256
DTYPES = {"float32": FLOAT32, "bfloat16": BFLOAT16}
PROMPT, SAMPLE = 32, 400  # characters


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What `fusedopt train` is asked for.

    data: a UTF-8 text, None for the default one. rule: a name in `fo.RULES`. steps, batch:
    updates, and windows per update. lr: peak learning rate, None for `recipes.LEARNING_RATES`.
    schedule: a name in `recipes.SCHEDULES`.
    context, layers, heads, width, tied: sizes, see `gpt.Config`. seed: of the parameters, batches
    and sample, at least 0. out: the directory for `run.json` and `loss.png`, made if it is not
    there; both are overwritten. json: a second place for the JSON. dtype: in which
    parameters are kept and gradients handed over, "float32" or "bfloat16"; the model computes in
    float32 all the same. state_dtype, master, rounding, backend, threads: of the optimizer; the
    threads of the model's products are NumPy's affair.
    Raises ValueError for a number out of range or a rule, schedule or dtype that does not exist.
    """

    data: Path | None = None
    rule: str = "adamw"
    steps: int = 4000
    lr: float | None = None
    schedule: str = "cosine"
    batch: int = 8
    context: int = 64
    layers: int = 2
    heads: int = 4
    width: int = 128
    tied: bool = True
    seed: int = 0
    out: Path = Path("runs/train")
    json: Path | None = None
    dtype: str = "float32"
    state_dtype: str | None = None
    master: Master | None = None
    rounding: Rounding = "nearest"
    backend: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.rule not in fo.RULES:
            raise ValueError(f"rule: expected one of {', '.join(fo.RULES)}, got {self.rule!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule: expected one of {', '.join(SCHEDULES)}, got {self.schedule!r}"
            )
        for name, least in (("steps", 1), ("batch", 1), ("context", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr: expected a positive number, got {self.lr}")

    @property
    def tokens(self) -> int:
        """Of one batch."""
        return self.batch * self.context

    @property
    def optimizer(self) -> dict[str, Any]:
        """The keyword arguments of the optimizer."""
        names = ("state_dtype", "master", "rounding", "seed", "backend", "threads")
        return {name: getattr(self, name) for name in names}


@dataclass
class History:
    """What a run did so far. tokens: those of one batch; the rest as in `Result`."""

    tokens: int
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"model": 0.0, "hessian": 0.0, "optimizer": 0.0, "evaluation": 0.0}
    )

    @property
    def tokens_per_second(self) -> float:
        return self.tokens * len(self.losses) / self._stepping if self.losses else 0.0

    @property
    def optimizer_share(self) -> float:
        return self.seconds["optimizer"] / self._stepping if self.losses else 0.0

    @property
    def summary(self) -> str:
        """Loss, speed and the optimizer's share of the time; needs a finished step."""
        recent = np.mean(self.losses[-50:])  # one small batch tells little
        speed, share = self.tokens_per_second, self.optimizer_share
        return f"training {recent:.3f}, {speed:,.0f} tokens/s, optimizer {share:.1%}"

    @property
    def _stepping(self) -> float:
        return sum(self.seconds.values()) - self.seconds["evaluation"]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """All that a run starts from; its generators and parameters move with the run.

    params: as they are kept. held_out: the windows (x, y) for evaluation. labels, draws:
    generators of the labels of curvature estimates and of the sample.
    """

    options: TrainOptions
    corpus: text.Corpus
    config: gpt.Config
    params: gpt.Params
    rules: dict[str, fo.Rule]
    optimizer: fo.Optimizer
    batches: Iterator[tuple[text.Ids, text.Ids]]
    held_out: tuple[text.Ids, text.Ids]
    bigram_loss: float
    labels: np.random.Generator
    draws: np.random.Generator

    @classmethod
    def of(cls, options: TrainOptions) -> Setup:
        """Read the text and draw the parameters; equal options give equal bits.

        Raises OSError where the text cannot be read, ValueError where it or a size does not fit.
        """
        corpus = text.load(options.data, options.context)
        config = gpt.Config(
            vocab=len(corpus.alphabet),
            context=options.context,
            layers=options.layers,
            heads=options.heads,
            width=options.width,
            tied=options.tied,
        )
        seeds = np.random.SeedSequence(options.seed).spawn(4)
        weights, places, labels, draws = map(np.random.default_rng, seeds)
        params = cast(gpt.init(weights, config), DTYPES[options.dtype])
        rules = recipe(options.rule, options.lr, options.steps, options.tokens, options.schedule)
        x, y = text.spread(corpus.held_out, HELD_OUT_WINDOWS, options.context)
        return cls(
            options=options,
            corpus=corpus,
            config=config,
            params=params,
            rules=rules,
            optimizer=fo.Optimizer(params, rules, **options.optimizer),
            batches=text.batches(corpus.train, options.batch, options.context, places),
            held_out=(x, y),
            bigram_loss=text.bigram_loss(corpus.train, x, y, config.vocab),
            labels=labels,
            draws=draws,
        )

    def weights(self) -> gpt.Params:
        """The parameters as the model computes with them, in float32."""
        return cast(self.params, FLOAT32)

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(leaf.value.size for leaf in Tree(self.params).leaves)


def train(options: TrainOptions, console: Console) -> Result:
    """Train, evaluate, sample and write; after a KeyboardInterrupt, with the steps done so far.

    Prints plain lines to `console`, and on a terminal a progress bar below them. Raises
    ValueError for a text or sizes that do not fit and OSError where a file cannot be read or
    written, both before any training; FloatingPointError where a loss is not finite.
    """
    setup = Setup.of(options)
    claim_directory("--out", options.out)
    if options.json is not None:
        claim_file("--json", options.json)
    _announce(console, setup)
    history = History(options.tokens)
    status = _fit(console, setup, history)
    result = _result(setup, history, status)
    files = [options.out / "run.json", options.out / "loss.png"]
    report.write_json(result, files[0])
    report.plot(result, files[1])
    if options.json is not None:
        report.write_json(result, options.json)
        files.append(options.json)
    report.conclude(console, result, files)
    return result


def descend(setup: Setup, history: History) -> Iterator[int]:
    """Train on batch after batch; yields the number of steps done, all of them in `history`.

    Raises FloatingPointError, before the update, at a loss that is not finite.
    """
    config, dtype = setup.config, DTYPES[setup.options.dtype]
    takes_hessian = any(rule.takes_hessian for rule in setup.rules.values())
    for step, (x, y) in enumerate(setup.batches, len(history.losses) + 1):
        start = perf_counter()
        params = setup.weights()
        with np.errstate(over="ignore", invalid="ignore"):  # the loss tells
            scores, cache = gpt.forward(params, x, config)
            loss, dlogits = gpt.cross_entropy(scores, y)
            _check_finite(loss, step)
            grads = cast(gpt.backward(params, cache, dlogits, config), dtype)
        modelled = perf_counter()
        hessian = None
        if takes_hessian and (step - 1) % HESSIAN_EVERY == 0:
            hessian = _curvature(setup, params, scores, cache)
        estimated = perf_counter()
        setup.optimizer.step(grads, hessian=hessian)
        done = perf_counter()
        history.losses.append(loss)
        history.seconds["model"] += modelled - start
        history.seconds["hessian"] += estimated - modelled
        history.seconds["optimizer"] += done - estimated
        yield step


def cast(tree: gpt.Params, dtype: np.dtype) -> gpt.Params:
    """The tree with its arrays in a dtype; they themselves where they have it."""
    shape = Tree(tree)
    cast: gpt.Params = shape.build([leaf.value.astype(dtype, copy=False) for leaf in shape.leaves])
    return cast


def _curvature(setup: Setup, params: gpt.Params, scores: gpt.Array, cache: gpt.Cache) -> gpt.Params:
    def backward(drawn: gpt.Array) -> gpt.Params:
        _, dlogits = gpt.cross_entropy(scores, drawn)
        return gpt.backward(params, cache, dlogits, setup.config)

    estimate: gpt.Params = fo.hessian.gauss_newton_bartlett(scores, backward, setup.labels)
    return estimate


def _fit(console: Console, setup: Setup, history: History) -> Status:
    steps = setup.options.steps
    every = max(1, steps // EVALUATIONS)
    status: Status = "finished"
    bar = progress(console, TimeRemainingColumn())
    try:
        with bar:
            _evaluate(console, setup, history)
            task = bar.add_task("", total=steps)
            for step in islice(descend(setup, history), steps):
                bar.update(task, completed=step, description=history.summary)
                if step % every == 0:
                    _evaluate(console, setup, history)
    except KeyboardInterrupt:
        status = "interrupted"
    if not history.held_out or history.held_out[-1][0] < len(history.losses):
        _evaluate(console, setup, history)
    return status


def _evaluate(console: Console, setup: Setup, history: History) -> None:
    start = perf_counter()
    step = len(history.losses)
    with np.errstate(over="ignore", invalid="ignore"):
        loss = gpt.evaluate(setup.weights(), *setup.held_out, setup.config)
    _check_finite(loss, step)
    history.held_out.append((step, loss))
    history.seconds["evaluation"] += perf_counter() - start
    summary = f", {history.summary}" if step else ""
    say(console, f"step {step}: held out {loss:.3f}{summary}")


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"loss: expected a finite number, got {loss} at step {step}; take a smaller --lr"
        )


def _announce(console: Console, setup: Setup) -> None:
    corpus, config = setup.corpus, setup.config
    characters = f"{corpus.characters:,} characters, {config.vocab} distinct"
    say(console, f"text: {corpus.source}; {characters}, the last tenth held out")
    say(
        console,
        f"model: {config.layers} blocks of width {config.width}, {config.heads} heads, context"
        f" {config.context}; {setup.parameters:,} parameters",
    )
    for pattern, rule in setup.rules.items():
        peak = getattr(rule.lr, "base", rule.lr)
        say(console, f"rule for {pattern}: {type(rule).__name__}, learning rate up to {peak:g}")
    say(console, f"bigram model: held-out loss {setup.bigram_loss:.3f} nats per character")


def _result(setup: Setup, history: History, status: Status) -> Result:
    options, corpus, config = setup.options, setup.corpus, setup.config
    x, y = (part[: options.batch] for part in setup.held_out)
    params = setup.weights()
    _, grads = gpt.loss_and_grads(params, x, y, config)
    prompt = corpus.held_out[:PROMPT]
    ids = gpt.sample(params, prompt, SAMPLE, config, setup.draws)
    return Result(
        status=status,
        options=asdict(options),
        rules={pattern: repr(rule) for pattern, rule in setup.rules.items()},
        source=corpus.source,
        characters=corpus.characters,
        alphabet=corpus.alphabet,
        parameters=setup.parameters,
        train_losses=history.losses,
        held_out_losses=history.held_out,
        bigram_loss=setup.bigram_loss,
        seconds=history.seconds,
        tokens_per_second=history.tokens_per_second,
        optimizer_share=history.optimizer_share,
        step_times=steptime.compare(
            setup.params, cast(grads, DTYPES[options.dtype]), setup.rules, **options.optimizer
        ),
        prompt=corpus.decode(prompt),
        sample=corpus.decode(ids),
        machine=fo.info(),
    )
