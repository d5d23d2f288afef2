"""Trains the small GPT with several rules, side by side: the work behind `fusedopt race`."""

from __future__ import annotations

import hashlib
import json
from time import perf_counter
from typing import Any

from rich.console import Console

import fusedopt as fo

from ..output_paths import claim_directory, claim_file
from ..train import peak_rate
from ..train.report import Status, say
from ..train.setup import Setup
from ..train.trainer import EVALUATIONS
from .board import Board
from .lanes import Lane
from .options import RaceOptions
from .rates import FACTOR, LEAST, MOST, RateBook, best, next_rate
from .report import conclude, write
from .result import Outcome, Race

RATES_FILE = "learning_rates.json"
PROBE = 10  # steps of each rule, timed to say how long the race will take


def race(options: RaceOptions, console: Console) -> Race:
    """Find learning rates, train, and write the report.

    Every rule gets the same parameters to start from and the same batches, those of each seed in a
    run of its own, and all go on in turn, a twentieth of the way at a time. Prints plain lines, or
    a live table on a terminal. A KeyboardInterrupt ends the race, and the report is of what is
    there. Raises ValueError for a text or sizes that do not fit and OSError where a file cannot be
    read or written, both before any training.
    """
    setup = Setup.of(options.run(options.rules[0], None, options.steps))
    claim_directory("--out", options.out)
    if options.json is not None:
        claim_file("--json", options.json)
    settings = _settings(options, setup)
    file = options.out / RATES_FILE
    book = RateBook(file, settings) if options.search else RateBook.open(file, settings)
    board, lanes = Board(console, options.rules), dict[str, list[Lane]]()
    status: Status = "finished"
    try:
        _announce(console, options, setup, book)
        with board.live():
            _search(options, book, board)
            _run(options, book, board, lanes)
    except KeyboardInterrupt:
        status = "interrupted"
    result = Race(
        status=status,
        options=options,
        source=setup.corpus.source,
        characters=setup.corpus.characters,
        parameters=setup.parameters,
        bigram_loss=setup.bigram_loss,
        target=setup.bigram_loss if options.target is None else options.target,
        tried=book.tried,
        outcomes=[Outcome.of(runs) for runs in lanes.values() if all(lane.clock for lane in runs)],
        machine=fo.info(),
    )
    files = write(result, options.out)
    if options.json is not None:
        text = json.dumps(result.record(), indent=1, default=str, allow_nan=False)
        options.json.write_text(text + "\n", encoding="ascii")
        files.append(options.json)
    conclude(console, result, files)
    return result


def _settings(options: RaceOptions, setup: Setup) -> dict[str, Any]:
    """Return all that decides which learning rate is best, but the rule."""
    corpus = setup.corpus
    text = corpus.alphabet.encode() + corpus.train.tobytes() + corpus.held_out.tobytes()
    names = ("search_steps", "batch", "context", "layers", "heads", "width", "seed")
    return {
        **{name: getattr(options, name) for name in names},
        "text": hashlib.sha256(text).hexdigest(),
    }


def _search(options: RaceOptions, book: RateBook, board: Board) -> None:
    board.title(
        f"learning rates: {LEAST} to {MOST} values a factor of {FACTOR} apart,"
        f" {options.search_steps} steps each"
    )
    for rule in options.rules:
        while (rate := _next_rate(book, rule)) is not None:
            board.trying(rule, rate, book.tried.get(rule, {}))
            lane = Lane(options.run(rule, rate, options.search_steps))
            lane.train(options.search_steps)
            lane.evaluate()
            book.add(rule, rate, lane.loss)
        board.chosen(rule, best(book.tried[rule]), book.tried[rule])


def _run(options: RaceOptions, book: RateBook, board: Board, lanes: dict[str, list[Lane]]) -> None:
    for rule in options.rules:
        rate = best(book.tried[rule])
        lanes[rule] = [
            Lane(options.run(rule, rate, options.steps, number)) for number in range(options.seeds)
        ]
        for lane in lanes[rule]:
            lane.evaluate()
    every = max(1, options.steps // EVALUATIONS)
    start = perf_counter()
    board.title(f"{options.steps} steps of each rule, {_seeds(options)}")
    for done in range(0, options.steps, every):
        to = min(done + every, options.steps)
        for rule, runs in lanes.items():
            for lane in runs:
                lane.train(to - done)
                lane.evaluate()
            board.moved(rule, runs)
        left = (perf_counter() - start) * (options.steps - to) / to
        board.round_done(f"step {to} of {options.steps}, {_minutes(left)} left")


def _announce(console: Console, options: RaceOptions, setup: Setup, book: RateBook) -> None:
    corpus, config = setup.corpus, setup.config
    text = f"text: {corpus.source}; {corpus.characters:,} characters, the last tenth held out"
    say(console, text)
    say(
        console,
        f"model: {config.layers} blocks of width {config.width}, {config.heads} heads, context"
        f" {config.context}; {setup.parameters:,} parameters",
    )
    known = sum(_next_rate(book, rule) is None for rule in options.rules)
    say(console, f"learning rates: {known} of {len(options.rules)} known from {book.file}")
    least, most = _forecast(options, book)
    say(
        console,
        f"{len(options.rules)} rules, {options.steps} steps each, {_seeds(options)}, in batches of"
        f" {options.batch}:"
        f" {_minutes(least)} to {_minutes(most)}; Ctrl-C ends it with what it has",
    )


def _forecast(options: RaceOptions, book: RateBook) -> tuple[float, float]:
    """Seconds that the race takes at least and at most, from a few steps of each rule."""
    least = most = 0.0
    for rule in options.rules:
        lane = Lane(options.run(rule, None, options.steps))
        lane.train(PROBE)
        start = perf_counter()
        lane.evaluate()
        evaluation, step = perf_counter() - start, lane.seconds / max(lane.steps, 1)
        run = options.seeds * (options.steps * step + (1 + EVALUATIONS) * evaluation)
        trial = options.search_steps * step + evaluation
        known, tried = _next_rate(book, rule) is None, len(book.tried.get(rule, {}))
        least += run + (0 if known else max(LEAST - tried, 0) * trial)
        most += run + (0 if known else (MOST - tried) * trial)
    return least, most


def _next_rate(book: RateBook, rule: str) -> float | None:
    tried = book.tried.get(rule, {})
    if fo.RULES[rule].kept:  # which finds its rate itself, in more steps than a search has
        return None if tried else peak_rate(rule)
    return next_rate(peak_rate(rule), tried)


def _seeds(options: RaceOptions) -> str:
    return f"{options.seeds} seeds" if options.seeds > 1 else "one seed"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 300 else f"{seconds:.0f} s"
