"""The command line: `fusedopt info`, `verify`, `bench`, `train`, `landscape`, `race`."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import numpy as np

import fusedopt as fo

from .arrays.storage import STATE_DTYPES
from .backends import BACKENDS as KNOWN
from .verify import STORAGES

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit(
        f"fusedopt: the command line needs {error.name}; install it with"
        " pip install 'fusedopt[cli]'"
    ) from None

if TYPE_CHECKING:
    from .verify import Check

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")
console = Console(highlight=False)

RULES, BACKENDS = (f"One of {', '.join(names)}." for names in (fo.RULES, KNOWN))
INTERRUPTED = 130  # the exit code that shells give to Ctrl-C
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this file too.")]


@app.callback()
def _about() -> None:
    """Fused in-place optimizer steps for NumPy arrays, from SGD to Muon."""


@app.command()
def info(json: Json = None) -> None:
    """Show what fusedopt runs on here, and why not on the rest.

    Example: `fusedopt info`
    """
    found = fo.info()
    for key, value in found.items():
        for line in _lines(key, value):
            console.print(line, markup=False)
    if found["isa"] == "none":
        console.print("There is no compiled core: steps run on the slow NumPy reference.")
    _write(json, found)


@app.command()
def verify(
    rule: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable; all without. {RULES}")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable; all without. {BACKENDS}")
    ] = None,
    storage: Annotated[
        list[str] | None,
        typer.Option(help=f"Repeatable; all without. One of {', '.join(STORAGES)}."),
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="Elements of each array.")] = 4201,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each variant.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the data.")] = 0,
    json: Json = None,
) -> None:
    """Check every rule on this machine, element by element, against the float64 reference.

    Exit code 1 where an element leaves its bound.

    Example: `fusedopt verify --rule adamw --storage dynamic8 --size 100003`
    """
    try:
        checks = fo.verify(
            rule, backends=backend, storages=storage, size=size, steps=steps, seed=seed
        )
    except (ValueError, RuntimeError) as error:
        _stop("verify", error)
    _print_checks(checks)
    _write(json, [_check_row(check) for check in checks])
    failed = [check for check in checks if not check.passed]
    for check in failed:
        console.print(f"FAILED {check.rule}: {check.worst}, with {check.settings}", markup=False)
    raise typer.Exit(1 if failed else 0)


@app.command()
def bench(
    rule: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable; all without. {RULES}")
    ] = None,
    size: Annotated[int, typer.Option(help="Elements of the large tensor.")] = 1 << 24,
    rounds: Annotated[int, typer.Option(help="Samples of each time, at most.")] = 15,
    seconds: Annotated[float, typer.Option(help="Of measuring, in all.")] = 40.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every contender.")] = None,
    out: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("runs/bench"),
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Measure nothing; compare two runs' JSON files."),
    ] = None,
    json: Json = None,
) -> None:
    """Measure this machine's steps against its memory, NumPy, and PyTorch where it is installed.

    In about a minute: every rule over one large tensor, storage formats, small tensors. Writes
    `bench.json` and `roofline.png` into the directory. Ctrl-C ends it with what it has, and exit
    code 130; exit code 1 where a step gives a wrong answer, or, with --compare, where a step of
    fusedopt became slower beyond the noise.

    Example: `fusedopt bench --rule adamw --rule lion --seconds 10 --out runs/new`, and then
    `fusedopt bench --compare runs/old/bench.json runs/new/bench.json`
    """
    from .lab.bench import BenchOptions  # brings in matplotlib
    from .lab.bench import bench as run
    from .lab.bench import compare as show
    from .lab.bench.compare import slower

    try:
        if compare is not None:
            changes = show(*compare, console)
            _write(json, [{**vars(c), "verdict": c.verdict} for c in changes])
            raise typer.Exit(1 if slower(changes) else 0)
        options = BenchOptions(
            rules=tuple(dict.fromkeys(rule or fo.RULES)),
            size=size,
            rounds=rounds,
            seconds=seconds,
            out=out,
            threads=threads,
            json=json,
        )
        result = run(options, console)
    except fo.VerificationError as error:
        _stop("bench", error, 1)
    except (OSError, ValueError) as error:
        _stop("bench", error)
    raise typer.Exit(INTERRUPTED if result.status == "interrupted" else 0)


@app.command()
def train(
    data: Annotated[
        Path | None, typer.Option(help="A UTF-8 text; Python's own reference without.")
    ] = None,
    rule: Annotated[str, typer.Option(help=RULES)] = "adamw",
    steps: Annotated[int, typer.Option(help="Updates.")] = 4000,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate; the rule's own without.")
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(
            help="Of the learning rate: cosine, constant, linear, polynomial, wsd (constant, then"
            " down in the last fifth), onecycle or step. All but onecycle warm up in the first"
            " twentieth of the steps."
        ),
    ] = "cosine",
    batch: Annotated[int, typer.Option(help="Windows of text in each batch.")] = 8,
    accumulate: Annotated[
        int,
        typer.Option(
            help="Batches whose gradients are averaged into one update: with --batch 8"
            " --accumulate 4 the same windows as with --batch 32, in the memory of 8."
        ),
    ] = 1,
    clip: Annotated[
        float | None, typer.Option(help="Largest norm of all gradients together; any without.")
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(help="Decay of an average of the parameters, evaluated too, e.g. 0.99."),
    ] = None,
    estimator: Annotated[
        str | None,
        typer.Option(
            help="Of Sophia's curvature: gnb (Gauss-Newton-Bartlett, the default) or hutchinson."
        ),
    ] = None,
    hessian_every: Annotated[
        int | None, typer.Option(help="Steps from one of these estimates to the next; 10 without.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of parameters, batches and sample.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("runs/train"),
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A file for all that --resume needs; written at the end and at Ctrl-C."),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Write it each time after this number of steps, too.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on from such a file, with the options that it was started with."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the parameters: float32 or bfloat16.")] = "float32",
    state_dtype: Annotated[
        str | None, typer.Option(help=f"Of the states: {', '.join(STATE_DTYPES)}.")
    ] = None,
    master: Annotated[
        str | None, typer.Option(help="Of bfloat16 parameters: float32 or split16.")
    ] = None,
    rounding: Annotated[str, typer.Option(help="nearest, stochastic or kahan.")] = "nearest",
    backend: Annotated[str, typer.Option(help=f"auto, or {BACKENDS.lower()}")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the optimizer.")] = None,
    json: Json = None,
) -> None:
    """Train a small character-level GPT, in NumPy, with one of the rules.

    Writes `run.json` and `loss.png` into the directory. Ctrl-C ends it after the step with what it
    has, and exit code 130. A run that was killed and resumed ends with the same bits as one that
    was not, with the same number of threads in NumPy's matrix products (OPENBLAS_NUM_THREADS).

    Example: `fusedopt train --rule lion --steps 1000 --out runs/lion`

    Example: `fusedopt train --accumulate 4 --clip 1 --ema 0.99`

    Example: `fusedopt train --rule sophia --estimator hutchinson --hessian-every 10`

    Example: `fusedopt train --checkpoint run.ckpt --checkpoint-every 200`, and after a kill
    `fusedopt train --checkpoint run.ckpt --checkpoint-every 200 --resume run.ckpt`
    """
    from .lab.train import TrainOptions
    from .lab.train import train as run  # brings in matplotlib

    try:
        options = TrainOptions(
            data=data,
            rule=rule,
            steps=steps,
            lr=lr,
            schedule=schedule,
            batch=batch,
            accumulate=accumulate,
            clip=clip,
            ema=ema,
            estimator=estimator,
            hessian_every=hessian_every,
            seed=seed,
            out=out,
            json=json,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            resume=resume,
            dtype=dtype,
            state_dtype=state_dtype,
            master=cast(Any, master),  # checked by the optimizer
            rounding=cast(Any, rounding),
            backend=backend,
            threads=threads,
        )
        result = run(options, console)
    except (OSError, ValueError, RuntimeError, FloatingPointError) as error:
        _stop("train", error)
    raise typer.Exit(INTERRUPTED if result.status == "interrupted" else 0)


@app.command()
def landscape(
    scene: Annotated[
        list[str] | None, typer.Option(help="Repeatable; all without. A wrong one lists them.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("runs/landscape"),
    gif: Annotated[bool, typer.Option(help="Animate them too.")] = True,
    json: Json = None,
) -> None:
    """Draw the paths of the rules over losses of two weights, and say what they show.

    Writes a PNG and an animated GIF of each scene. Exit code 1 where the numbers do not bear out
    what a scene is there to show, 130 after Ctrl-C, with what was finished.

    Example: `fusedopt landscape --scene valley --scene nesterov --out runs/valley`
    """
    from .lab.landscape import choose, show  # brings in matplotlib

    try:
        shown, whole = show(choose(scene), out, console, moving=gif, json_file=json)
    except (OSError, ValueError, RuntimeError, FloatingPointError) as error:
        _stop("landscape", error)
    if not whole:
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(0 if all(one.claim.holds for one in shown) else 1)


@app.command()
def race(
    rules: Annotated[
        str | None, typer.Option(help="Names with commas between; all without.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Ten seconds a rule: a smaller model, fewer steps.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Updates of each rule.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A UTF-8 text; Python's own reference without.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The first, of parameters and batches.")] = 0,
    seeds: Annotated[
        int | None, typer.Option(help="Runs of each rule; 3, one with --quick.")
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="Loss whose time is taken; the bigram model's without.")
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="Try the learning rates anew.")] = False,
    out: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("runs/race"),
    backend: Annotated[str, typer.Option(help=f"auto, or {BACKENDS.lower()}")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the optimizer.")] = None,
    json: Json = None,
) -> None:
    """Train the small GPT with every rule, side by side, and write a report.

    A small search finds each rule's learning rate and keeps it in `learning_rates.json`, which the
    next race takes from there if it fits. `report.html` needs no network and no other file. Ctrl-C
    ends the race with what it has, and exit code 130.

    Example: `fusedopt race --quick`, or `fusedopt race --rules adamw,lion,muon --out runs/three`
    """
    from .lab.race import QUICK, RaceOptions  # brings in matplotlib
    from .lab.race import race as run

    chosen = {
        "rules": tuple(rules.split(",")) if rules else None, "steps": steps, "seeds": seeds
    }  # fmt: skip
    try:
        options = RaceOptions(
            **(QUICK if quick else {}) | {k: v for k, v in chosen.items() if v is not None},
            data=data,
            seed=seed,
            target=target,
            search=search,
            out=out,
            json=json,
            backend=backend,
            threads=threads,
        )
        result = run(options, console)
    except (OSError, ValueError, RuntimeError) as error:
        _stop("race", error)
    raise typer.Exit(INTERRUPTED if result.status == "interrupted" else 0)


def _stop(command: str, error: Exception, code: int = 2) -> NoReturn:
    console.print(f"fusedopt {command}: {error}", markup=False)
    raise typer.Exit(code) from None


def _lines(key: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{key + ':':15}", *(f"  {k + ':':20}{v}" for k, v in value.items())]
    return [f"{key + ':':15}{', '.join(value) if isinstance(value, list) else value}"]


def _print_checks(checks: list[Check]) -> None:
    names = ("rule", "backend", "isa", "storage", "variants", "worst, of its bound", "ulps", "")
    table = Table(*names)
    for c in checks:
        worst = c.worst
        table.add_row(
            c.rule,
            c.backend,
            c.isa,
            c.storage,
            str(c.variants),
            f"{worst.share:.2f} at {worst.array}\\[{worst.index}]",
            f"{worst.ulps:.2f}",
            "ok" if c.passed else "FAILED",
        )
    console.print(table)


def _check_row(check: Check) -> dict[str, Any]:
    return {
        **{name: value for name, value in vars(check).items() if name != "worst"},
        **{f"worst_{name}": value for name, value in vars(check.worst).items()},
        "passed": check.passed,
    }


def _write(file: Path | None, value: Any) -> None:
    if file is not None:
        file.write_text(jsonlib.dumps(value, indent=1, default=np.generic.item) + "\n")


def main() -> None:
    """The console script."""
    app()
