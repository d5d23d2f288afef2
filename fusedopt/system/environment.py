"""The environment variables, read at import; a bad value raises then."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager


@contextmanager
def sleepy_openmp() -> Iterator[None]:
    """An OpenMP runtime that is loaded inside lets its threads sleep soon after a parallel region.

    By default GNU's spin for milliseconds, and take a core from whatever the trainer does next:
    `fusedopt train` made 22000 tokens a second on two cores of a Zen 5 machine, and 42000 with this
    (about 30 us of spinning). With the other core busy, a step of 0.1 ms took 8 ms, and 0.3 with
    this. A wish in OMP_WAIT_POLICY or GOMP_SPINCOUNT stands; the runtime reads them when loaded.
    """
    wished = "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ
    if wished:
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = "2000"
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]


def choice(name: str, accepted: Collection[str]) -> str | None:
    """The variable's value, None where it is unset or empty; ValueError where not accepted."""
    value = os.environ.get(name) or None
    if value is not None and value not in accepted:
        valid = ", ".join(accepted) or "none, there is no choice here"
        raise ValueError(f"{name}={value!r}: expected one of {valid}")
    return value


def positive_integer(name: str) -> int | None:
    """The variable's value, None where it is unset or empty; ValueError where it is none."""
    value = os.environ.get(name, "").strip()
    if not value:
        return None
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise ValueError(f"{name}={value!r}: expected an integer >= 1")
    return int(value)
