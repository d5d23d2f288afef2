"""What a training run leaves behind: a record, its JSON, its picture, and what it prints."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ..plotting import BLACK, BLUE, SMALL, TEXT, VERMILION, figure, save, tidy
from .steptime import StepTimes

Status = Literal["finished", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run of the trainer. Losses are in nats per character.

    status: "interrupted" after Ctrl-C. rules: path pattern -> the rule in words. source: where the
    text is from; characters: its length. parameters: how many numbers were trained. train_losses:
    of each step's batch, before its update. held_out_losses: (step, loss) pairs, step 0 before the
    first update. bigram_loss: of the baseline, on the same held-out characters. seconds: where the
    time went; "model", "hessian" and "optimizer" make up the steps, "evaluation" is apart.
    tokens_per_second, optimizer_share: of the steps alone, 0 where no step was finished. prompt,
    sample: the start of the held-out text, and how the model goes on. machine: `fo.info()`.
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
    bigram_loss: float
    seconds: dict[str, float]
    tokens_per_second: float
    optimizer_share: float
    step_times: StepTimes
    prompt: str
    sample: str
    machine: dict[str, Any]

    @property
    def steps(self) -> int:
        """How many steps were done."""
        return len(self.train_losses)

    @property
    def held_out_loss(self) -> float:
        """The last loss on held-out text."""
        return self.held_out_losses[-1][1]


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
    say(
        console,
        f"held-out loss {result.held_out_loss:.3f} nats per character, {abs(faster):.3f} {side}"
        f" the bigram model's {result.bigram_loss:.3f}",
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
    """The whole record, with `steps` and `held_out_loss`, as one JSON object in ASCII."""
    record = {**asdict(result), "steps": result.steps, "held_out_loss": result.held_out_loss}
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
