"""The report of a training run: a record, its JSON, its picture, and what it prints."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rich.console import Console

from ..plotting import BLACK, BLUE, GREEN, SMALL, TEXT, VERMILION, figure, save, tidy
from .steptime import StepTimes

Status = Literal["finished", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run of the trainer. Losses are in nats per character.

    status: "interrupted" after Ctrl-C. rules: path pattern -> the rule in words. source: where the
    text is from; characters: its length. parameters: how many numbers were trained. train_losses:
    of each step's batch, before its update. held_out_losses: (step, loss) pairs, step 0 before the
    first update; averaged_losses: those of the averaged parameters, where asked for. grad_norms: of
    each step before clipping, where measured. win_rates: of each step, the share of elements whose
    update Sophia did not clip, empty for other rules. bigram_loss: of the baseline, on the same
    held-out characters. seconds: where the time went; "model", "hessian" and "optimizer" make up
    the steps, "evaluation" is apart. tokens_per_second, optimizer_share: of the steps alone, 0
    where no step was finished. prompt, sample: the start of the held-out text, and how the model
    goes on. fingerprint: the optimizer's, of the bits of parameters, states and counters. resumed:
    None, or the "step" that a checkpoint was of and "remarks" on what differs from where it was
    made. surroundings: what has a say in the last bits. machine: `fo.info()`.
    """

    status: Status
    options: dict[str, Any]
    rules: dict[str, str]
    source: str
    characters: int
    alphabet: str
    parameters: int
    train_losses: list[float]
    held_out_losses: list[tuple[int, float]]
    averaged_losses: list[tuple[int, float]]
    grad_norms: list[float]
    win_rates: list[float]
    bigram_loss: float
    seconds: dict[str, float]
    tokens_per_second: float
    optimizer_share: float
    step_times: StepTimes
    prompt: str
    sample: str
    fingerprint: str
    resumed: dict[str, Any] | None
    surroundings: dict[str, Any]
    machine: dict[str, Any]

    @property
    def steps(self) -> int:
        """The number of steps that were done."""
        return len(self.train_losses)

    @property
    def held_out_loss(self) -> float:
        """The last loss on held-out text."""
        return self.held_out_losses[-1][1]

    @property
    def averaged_loss(self) -> float | None:
        """The last loss of the averaged parameters on held-out text."""
        return self.averaged_losses[-1][1] if self.averaged_losses else None

    @property
    def clipped_steps(self) -> int:
        """The number of steps whose gradient had a norm above `clip`."""
        limit = self.options["clip"]
        return 0 if limit is None else sum(norm > limit for norm in self.grad_norms)

    @property
    def win_rate(self) -> float | None:
        """The mean over all steps."""
        return fmean(self.win_rates) if self.win_rates else None

    @property
    def summary(self) -> dict[str, Any]:
        """The numbers above, by name."""
        names = ("steps", "held_out_loss", "averaged_loss", "clipped_steps", "win_rate")
        return {name: getattr(self, name) for name in names}


def say(console: Console, line: str = "") -> None:
    """Print a line as it is, with what the terminal cannot show, or would obey, as escapes."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in line)
    shown = shown.encode(console.encoding, "backslashreplace").decode(console.encoding)
    wrap = not console.is_terminal  # a pipe gets whole lines
    console.print(shown, markup=False, highlight=False, soft_wrap=wrap)


def conclude(console: Console, result: Result, files: list[Path]) -> None:
    """Print how the run ended."""
    times = result.step_times
    faster = result.bigram_loss - result.held_out_loss
    side = "below" if faster >= 0 else "above"
    say(console)
    if result.status == "interrupted":
        say(console, f"Interrupted after {result.steps} steps; this is what they gave.")
        if (file := result.options["checkpoint"]) is not None:
            say(console, f"To go on, give the same options and --resume {file}")
    say(
        console,
        f"held-out loss {result.held_out_loss:.3f} nats per character, {abs(faster):.3f} {side}"
        f" the bigram model's {result.bigram_loss:.3f}",
    )
    if result.averaged_loss is not None:
        say(console, f"averaged parameters: {result.averaged_loss:.3f} nats per character")
    if (limit := result.options["clip"]) is not None:
        clipped, steps = result.clipped_steps, result.steps
        say(console, f"gradients clipped in {clipped} of {steps} steps, where above {limit:g}")
    if result.win_rate is not None:
        last = fmean(result.win_rates[-50:])
        say(
            console,
            f"win rate {result.win_rate:.2f}, {last:.2f} at the end: the share of elements whose"
            " update was not clipped",
        )
    say(
        console,
        f"optimizer step {1e3 * times.fused_s:.3f} ms; the same step in plain NumPy"
        f" {1e3 * times.naive_s:.3f} ms, {times.naive_s / times.fused_s:.1f} times as long"
        f" (medians of {times.rounds}, in turn, on the same tensors)",
    )
    say(console)
    say(console, f"sample, going on from {result.prompt!r}:")
    say(console)
    say(console, result.sample)
    say(console)
    say(console, f"wrote {', '.join(map(str, files))}")


def write_json(result: Result, path: Path) -> None:
    """The whole record, with the `summary`, as one JSON object in ASCII."""
    record = {**asdict(result), **result.summary}
    path.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="ascii")


def plot(result: Result, path: Path) -> None:
    """The losses over the steps as a PNG."""
    picture = figure(3.4)
    axes = picture.add_subplot()
    axes.plot(
        range(1, result.steps + 1), result.train_losses,
        color=BLUE, alpha=0.4, linewidth=0.8, label="training batches",
    )  # fmt: skip
    steps, losses = zip(*result.held_out_losses, strict=True)
    axes.plot(steps, losses, color=VERMILION, marker="o", markersize=4, label="held-out text")
    if result.averaged_losses:
        steps, losses = zip(*result.averaged_losses, strict=True)
        axes.plot(steps, losses, color=GREEN, linewidth=1.2, label="averaged parameters")
    axes.axhline(
        result.bigram_loss, color=BLACK, linestyle="--", linewidth=1.2, label="bigram model"
    )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per character)")
    axes.set_title(
        f"{result.options['rule']}: {result.held_out_loss:.2f} on held-out text,"
        f" bigram model {result.bigram_loss:.2f}",
        fontsize=TEXT,
    )
    axes.legend(fontsize=SMALL, frameon=False)
    tidy(axes)
    save(picture, path)
