"""Runs that stop and go on: what is in a trainer's checkpoint, and when it fits."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

import fusedopt as fo

from ...arrays.file_set import read_metadata
from ...system.interrupts import deferred
from .history import History
from .recipes import peak_rate
from .setup import Setup

FORMAT = 1

FREE = frozenset(
    ("data", "out", "json", "checkpoint", "checkpoint_every", "resume", "backend", "threads")
)
"""Options that may differ: the text itself is compared, and the rest does not change a bit of what
is computed, but for the backend, which is among the surroundings."""

GENERATORS = ("places", "labels")


def save(setup: Setup, history: History, file: Path) -> None:
    """Write all that the run needs to go on, in one file, which is replaced as a whole.

    Between steps only. Raises OSError where it cannot be written.
    """
    generators = {name: getattr(setup, name).bit_generator.state for name in GENERATORS}
    metadata = {
        "train": FORMAT,
        "settings": _settings(setup),
        "surroundings": surroundings(setup.options.backend),
        "generators": generators,
        "history": asdict(history),
    }
    with deferred():
        setup.optimizer.save(file, metadata=metadata)


def go_on(setup: Setup, file: Path) -> tuple[History, list[str]]:
    """Take over what `save` wrote; what was done so far, and where the bits may become others.

    Raises OSError where the file cannot be read, ValueError where it is no checkpoint of the
    trainer, or one of a run with other options or another text, naming every difference.
    """
    metadata = read_metadata(file)
    if not isinstance(metadata, dict) or metadata.get("train") != FORMAT:
        raise ValueError(f"{file}: is not a checkpoint that this fusedopt train has written")
    differences = _compare(_settings(setup), metadata.get("settings"))
    if differences:
        raise ValueError(
            f"{file}: is a checkpoint of another run: {'; '.join(differences)}; give the options"
            " that it was started with"
        )
    metadata = setup.optimizer.load(file)
    try:
        history = History(**metadata["history"])
        history.held_out = [(step, loss) for step, loss in history.held_out]
        history.averaged = [(step, loss) for step, loss in history.averaged]
        for name in GENERATORS:
            getattr(setup, name).bit_generator.state = metadata["generators"][name]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: its record of the training is spoilt: {error!r}") from error
    return history, _remarks(surroundings(setup.options.backend), metadata.get("surroundings"))


def surroundings(backend: str) -> dict[str, Any]:
    """Return what influences the last bits beside the options, as values for JSON.

    blas, blas_threads: what multiplies NumPy's matrices, with how many threads; "unknown" and None
    where it does not tell.
    """
    found = {"blas": "unknown", "blas_threads": None}
    for pool in threadpool_info():
        if pool["user_api"] == "blas":  # the first is NumPy's
            name = f"{pool['internal_api']} {pool['version']} {pool.get('architecture') or ''}"
            found = {"blas": name.strip(), "blas_threads": pool["num_threads"]}
            break
    return {
        "fusedopt": fo.__version__,
        "numpy": np.__version__,
        "processor": fo.info()["processor"],
        "backend": fo.info()["backend"] if backend == "auto" else backend,
        **found,
    }


def _settings(setup: Setup) -> dict[str, Any]:
    """Return all that decides what a run computes."""
    options, corpus = setup.options, setup.corpus
    chosen = {name: value for name, value in asdict(options).items() if name not in FREE}
    if options.lr is None:
        chosen["lr"] = peak_rate(options.rule)
    if options.takes_hessian:
        chosen |= {"estimator": options.curvature, "hessian_every": options.refresh}
    text = corpus.alphabet.encode() + corpus.train.tobytes() + corpus.held_out.tobytes()
    return {**chosen, "text (sha256)": hashlib.sha256(text).hexdigest()[:16]}


def _compare(here: dict[str, Any], there: Any) -> list[str]:
    found = there if isinstance(there, dict) else {}
    return [
        f"{name} {here.get(name)!r} here, {found.get(name)!r} there"
        for name in {**here, **found}
        if here.get(name) != found.get(name)
    ]


def _remarks(here: dict[str, Any], there: Any) -> list[str]:
    """One line for each difference, with the remedy where there is one."""
    found = there if isinstance(there, dict) else {}
    threads, others = found.get("blas_threads"), {**here, "blas_threads": None}
    remarks = [
        f"{difference}: results may differ in the last bits"
        for difference in _compare(others, {**found, "blas_threads": None})
    ]
    if None not in (threads, here["blas_threads"]) and threads != here["blas_threads"]:
        variable = f"{here['blas'].split()[0].upper()}_NUM_THREADS"
        remarks.append(
            f"matrix products have {here['blas_threads']} threads here, {threads} there: results"
            f" may differ in the last bits; for the same ones start it with {variable}={threads}"
        )
    return remarks
