"""Trains the small GPT with one rule, and reports: the work behind `fusedopt train`."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import TimeRemainingColumn

import fusedopt as fo

from ...system.interrupts import deferred
from ..output_paths import claim_directory, claim_file, claim_replaced
from ..progress import progress
from . import gpt, report, resume, steptime
from .descent import check_finite, descend, timed
from .history import History
from .options import DTYPES, TrainOptions
from .ranks import Ranks
from .report import Result, Status, say
from .setup import Setup, cast

EVALUATIONS = 20  # per run, not counting the one before the first step
PROMPT, SAMPLE = 32, 400  # characters


def train(options: TrainOptions, console: Console) -> Result:
    """Train, evaluate, sample and write; after a KeyboardInterrupt, with the steps done so far.

    Prints plain lines to `console`, and on a terminal a progress bar below them. Raises
    ValueError for a text, sizes or a checkpoint that do not fit and OSError where a file cannot be
    read or written, both before any training (but for a disk that fills up: OSError, and the last
    checkpoint is there); FloatingPointError where a loss is not finite.
    """
    ranks = Ranks.of_process()
    if ranks.rank > 0:
        console = Console(quiet=True)
    setup = Setup.of(options, ranks)
    with ranks.first_alone() as first:
        if first:
            _claim(options)
    history, resumed = History(options.tokens), None
    if options.resume is not None:
        history, remarks = resume.go_on(setup, options.resume)
        resumed = {"step": len(history.losses), "remarks": remarks}
    _announce(console, setup, resumed)
    status = _fit(console, setup, history)
    result = _result(setup, history, status, resumed)
    if ranks.rank > 0:
        return result
    files = [options.out / "run.json", options.out / "loss.png"]
    report.write_json(result, files[0])
    report.plot(result, files[1])
    if options.json is not None:
        report.write_json(result, options.json)
        files.append(options.json)
    if options.checkpoint is not None:
        files.append(options.checkpoint)
    report.conclude(console, result, files)
    return result


def _claim(options: TrainOptions) -> None:
    """Raise OSError or ValueError where something cannot be written in the end."""
    claim_directory("--out", options.out)
    if options.json is not None:
        claim_file("--json", options.json)
    if options.checkpoint is not None:
        claim_replaced("--checkpoint", options.checkpoint)


def _fit(console: Console, setup: Setup, history: History) -> Status:
    options = setup.options
    every = max(1, options.steps // EVALUATIONS)
    status: Status = "finished"
    bar = progress(console, TimeRemainingColumn())
    try:
        with bar:
            if len(history.losses) % every == 0:
                _evaluate(console, setup, history)
            task = bar.add_task("", total=options.steps, completed=len(history.losses))
            for step in islice(descend(setup, history), options.steps - len(history.losses)):
                bar.update(task, completed=step, description=history.summary)
                if step % every == 0:
                    _evaluate(console, setup, history)
                if options.checkpoint_every and step % options.checkpoint_every == 0:
                    _save(setup, history)
    except KeyboardInterrupt:
        status = "interrupted"
    # Saved before an evaluation that an uninterrupted run would not have.
    _save(setup, history)
    _evaluate(console, setup, history)
    return status


def _save(setup: Setup, history: History) -> None:
    if setup.options.checkpoint is not None:
        resume.save(setup, history, setup.options.checkpoint)


def _evaluate(console: Console, setup: Setup, history: History) -> None:
    """Take the held-out loss, unless this step's is there."""
    step = len(history.losses)
    if history.held_out and history.held_out[-1][0] == step:
        return
    with timed(history.seconds, "evaluation"):
        with setup.evaluated():
            losses = [_held_out_loss(setup, step)]
        if setup.options.ema is not None:
            with setup.optimizer.averaged():
                losses.append(_held_out_loss(setup, step))
    with deferred():
        for points, loss in zip((history.held_out, history.averaged), losses, strict=False):
            points.append((step, loss))
    averaged = f", averaged {losses[1]:.3f}" if len(losses) > 1 else ""
    summary = f", {history.summary}" if step else ""
    say(console, f"step {step}: held out {losses[0]:.3f}{averaged}{summary}")


def _held_out_loss(setup: Setup, step: int) -> float:
    """Return the held-out loss of the parameters as they are."""
    with np.errstate(over="ignore", invalid="ignore"):
        loss = gpt.evaluate(setup.weights(), *setup.held_out, setup.config)
    check_finite(loss, step)
    return loss


def _announce(console: Console, setup: Setup, resumed: dict[str, Any] | None) -> None:
    options, corpus, config = setup.options, setup.corpus, setup.config
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
    if options.accumulate > 1:
        say(
            console,
            f"each update: the mean gradient of {options.accumulate} batches of {options.batch}"
            f" windows, as of one of {options.accumulate * options.batch}",
        )
    if options.takes_hessian:
        say(console, f"curvature: {options.curvature}, every {options.refresh} steps")
    say(console, f"bigram model: held-out loss {setup.bigram_loss:.3f} nats per character")
    if resumed is not None:
        say(console, f"going on from {options.resume} at step {resumed['step']} of {options.steps}")
        for remark in resumed["remarks"]:
            say(console, f"note: {remark}")


def _result(
    setup: Setup, history: History, status: Status, resumed: dict[str, Any] | None
) -> Result:
    options, corpus, config = setup.options, setup.corpus, setup.config
    x, y = (part[: options.batch] for part in setup.held_out)
    _, grads = gpt.loss_and_grads(setup.weights(), x, y, config)
    prompt = corpus.held_out[:PROMPT]
    with setup.evaluated():
        ids = gpt.sample(setup.weights(), prompt, SAMPLE, config, setup.draws)
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
        averaged_losses=history.averaged,
        grad_norms=history.grad_norms,
        win_rates=history.win_rates,
        bigram_loss=setup.bigram_loss,
        seconds=history.seconds,
        tokens_per_second=history.tokens_per_second,
        optimizer_share=history.optimizer_share,
        step_times=steptime.compare(
            setup.params, cast(grads, DTYPES[options.dtype]), setup.rules, **options.storage
        ),
        prompt=corpus.decode(prompt),
        sample=corpus.decode(ids),
        fingerprint=setup.optimizer.fingerprint(),
        resumed=resumed,
        surroundings=resume.surroundings(options.backend),
        machine=fo.info(),
    )
