"""The report of a race: one HTML file that needs nothing else, and lines for the terminal."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

import fusedopt as fo

from ..plotting import save
from ..train.report import say
from .figures import curves, step_times
from .rates import FACTOR, Tried, best, bracketed
from .result import Outcome, Race

STYLE = """
:root { color-scheme: light }
body { margin: 0 auto; padding: 1rem; max-width: 50rem; background: #fff; color: #1a1a1a;
       font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; line-height: 1.2 } h2 { font-size: 1.2rem; margin-top: 2rem }
img { width: 100%; max-width: 40rem; height: auto }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; border-bottom: 1px solid #ddd }
td.n, th.n { text-align: right; white-space: nowrap } tr.first { font-weight: bold }
"""


def write(race: Race, out: Path) -> list[Path]:
    """Write `report.html` and, if any rule set out, `curves.png`; returns what was written."""
    report, picture = out / "report.html", out / "curves.png"
    report.write_text(page(race), encoding="utf-8")
    if not race.outcomes:
        return [report]
    save(curves(race, "step"), picture)
    return [report, picture]


def conclude(console: Console, race: Race, files: Sequence[Path]) -> None:
    """Print how the race ended, best first, and what was written."""
    say(console)
    if race.status == "interrupted":
        say(console, "Interrupted; this is what there is.")
    lines = [
        ("rule", "learning rate", "held out", f"to {race.target:.2f}", "step", "NumPy", "states")
    ]
    lines += [(o.rule, f"{o.lr:g}", *_ending(o, race), *_costs(o)) for o in ranked(race)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines if race.outcomes else ():
        say(console, "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
    say(console, f"wrote {', '.join(map(str, files))}")


def ranked(race: Race) -> list[Outcome]:
    """The outcomes, lowest loss first."""
    return sorted(race.outcomes, key=lambda outcome: outcome.loss)


def page(race: Race) -> str:
    """The whole report."""
    options = race.options
    parts = [f"<h1>{len(options.rules)} optimizers, one race</h1>", *_summary(race)]
    if race.outcomes:
        parts += [
            "<h2>The rules, by what they are</h2>",
            _kinds(race),
            "<h2>Loss</h2>",
            _image(curves(race, "step"), "Held-out loss of each rule by step"),
            _image(curves(race, "second"), "Held-out loss of each rule by second of training"),
            "<h2>The optimizer's step</h2>",
            _image(step_times(race), "Time of a step of each rule, fused and in plain NumPy"),
            _steps(race),
        ]
    parts += ["<h2>Learning rates</h2>", *_rates(race), "<h2>Machine</h2>", _machine(race)]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>fusedopt race</title>\n<style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _summary(race: Race) -> list[str]:
    options = race.options
    told = []
    if race.status == "interrupted":
        told.append("The race was interrupted: these are the steps done by then.")
    if race.outcomes:
        first, *_, last = [*ranked(race), ranked(race)[-1]]
        told.append(
            f"Lowest held-out loss: {first.name}, {_loss(first)}; highest: {last.name},"
            f" {_loss(last)}; a bigram model has {race.bigram_loss:.2f} (nats per character)."
        )
    told.append(
        f"Each rule trained the same small GPT ({options.layers} blocks of width {options.width},"
        f" context {options.context}, {race.parameters:,} parameters) from the same start on the"
        f" same batches of {options.batch} windows, {options.steps} steps planned,"
        f" {_seeds(race)}. Text: {race.source}, {race.characters:,} characters, the last tenth held"
        " out."
    )
    told.append(
        "One small model, one text: a race, not a verdict. Muon takes the matrices of the"
        " blocks and leaves the rest to AdamW. Sophia's curvature counts as training time, not as"
        " part of its step."
    )
    return [f"<p>{escape(line)}</p>" for line in told]


def _kinds(race: Race) -> str:
    target = f"Time to {race.target:.2f}"
    head = ("Year", "Rule", "What it is", "Rate", "Held out", target, "Step")
    rows = [(*_introduced(o), f"{o.lr:g}", *_ending(o, race), _costs(o)[0]) for o in race.outcomes]
    return _table(head, rows, numbers=3, bold=race.outcomes.index(ranked(race)[0]))


def _steps(race: Race) -> str:
    head = ("Rule", "Fused", "NumPy", "States", "Bytes per parameter")
    rows = [(o.name, *_costs(o), f"{o.state_bytes / race.parameters:.1f}") for o in race.outcomes]
    rounds = race.outcomes[0].step_times.rounds
    note = (
        f"Medians of {rounds} steps, fused and NumPy in turn, on the same tensors. NumPy is each"
        " rule's textbook form, tensor by tensor, with its temporaries."
    )
    return f"{_table(head, rows, numbers=1)}\n<p>{note}</p>"


def _rates(race: Race) -> list[str]:
    rows = []
    for rule in race.options.rules:
        tried = race.tried.get(rule, {})
        shown = "; ".join(f"{rate:g}: {_number(loss)}" for rate, loss in sorted(tried.items()))
        rate = f"{best(tried):g}{_edge(rule, tried)}" if tried else ""
        rows.append((fo.RULES[rule].__name__, rate, shown))
    note = (
        f"Held-out loss after {race.options.search_steps} steps at each peak rate that was tried:"
        f" values a factor of {FACTOR} apart round a known one, and on where the best was at an"
        " edge, with the first seed. A best rate that has no worse one on each side is said not to"
        " be bracketed. Of a rule that finds its rate itself, the factor 1 on it. The schedule"
        " rises in a twentieth of the steps and falls along a cosine to a tenth."
    )
    return [f"<p>{note}</p>", _table(("Rule", "Rate", "Loss by rate"), rows, numbers=3)]


def _edge(rule: str, tried: Tried) -> str:
    """Where a better rate than the best may lie, unless that is between two worse ones."""
    if fo.RULES[rule].kept or bracketed(tried):
        return ""
    return f", not bracketed {'from below' if best(tried) == min(tried) else 'from above'}"


def _seeds(race: Race) -> str:
    first, count = race.options.seed, race.options.seeds
    return f"seed {first}" if count == 1 else f"seeds {first} to {first + count - 1}"


def _machine(race: Race) -> str:
    rows = []
    for key, value in race.machine.items():
        several = [f"{k}: {v}" for k, v in value.items()] if isinstance(value, dict) else value
        rows.append((key, ", ".join(several) if isinstance(several, list) else str(value)))
    return _table(("What", "Found"), rows, numbers=2)


def _introduced(outcome: Outcome) -> tuple[str, str, str]:
    """Year, rule and idea."""
    rule = fo.RULES[outcome.rule]
    idea = (rule.__doc__ or "").partition("\n")[0].removesuffix(".")
    return str(rule.year or ""), outcome.name, idea


def _ending(outcome: Outcome, race: Race) -> tuple[str, str]:
    """Loss, and the time to the target."""
    seconds = outcome.seconds_to(race.target)
    return _loss(outcome), "not reached" if seconds is None else f"{seconds:.1f} s"


def _costs(outcome: Outcome) -> tuple[str, str, str]:
    """Time of a step, fused and naive, and the states' size."""
    times = outcome.step_times
    megabytes = outcome.state_bytes / 1e6
    return f"{1e3 * times.fused_s:.3f} ms", f"{1e3 * times.naive_s:.3f} ms", f"{megabytes:.2f} MB"


def _loss(outcome: Outcome) -> str:
    """The mean over the runs, and their lowest and highest where there are several."""
    if outcome.failed or len(outcome.runs) == 1:
        return outcome.failed or f"{outcome.loss:.3f}"
    low, high = outcome.spread
    return f"{outcome.loss:.3f} ({low:.3f} to {high:.3f})"


def _number(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else "not finite"


def _image(picture: Figure, alternative: str) -> str:
    raw = BytesIO()
    save(picture, raw)
    data = base64.b64encode(raw.getvalue()).decode("ascii")
    return f'<p><img src="data:image/png;base64,{data}" alt="{escape(alternative)}"></p>'


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int, bold: int | None = None
) -> str:
    """A table whose columns from `numbers` on are flush right; the row `bold` is in bold."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' * (k >= numbers)}>{escape(c)}</{tag}>" for k, c in enumerate(cells)
        )

    body = "\n".join(
        f"<tr{' class=first' * (k == bold)}>{line('td', row)}</tr>" for k, row in enumerate(rows)
    )
    return f'<div class="wide"><table>\n<tr>{line("th", head)}</tr>\n{body}\n</table></div>'
