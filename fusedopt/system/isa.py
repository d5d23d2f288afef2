"""Instruction sets and threads: what steps use, and how many."""

from __future__ import annotations

from .environment import choice
from .extension import core
from .threads import available, check_threads, in_use, use


def get_isa() -> str:
    """Return the instruction set that the compiled core uses.

    Returns
    -------
    str
        Name of the instruction set; "none" where there is no compiled core.
    """
    return core.get_level() if core else "none"


def isas() -> list[str]:
    """Return the instruction sets that this build and this machine both have, lowest first."""
    return list(core.levels()) if core else []


def set_isa(name: str) -> None:
    """Set the instruction set that later steps run on.

    Parameters
    ----------
    name : str
        An instruction set of this build and machine, such as "x86_v3".

    Raises
    ------
    ValueError
        If this build or machine has no such instruction set. The message names those available.
    """
    if not core or not core.set_level(name):
        valid = ", ".join(isas()) or "none: there is no compiled core"
        raise ValueError(f"isa {name!r} is not available on this machine; available: {valid}")


def get_threads() -> int:
    """Return the number of threads that a step may use.

    Returns
    -------
    int
        Number of threads.
    """
    return in_use()


def set_threads(n: int) -> None:
    """Set the number of threads that later steps may use.

    Parameters
    ----------
    n : int
        Largest number of threads; no more are used than the process was granted.

    Raises
    ------
    TypeError, ValueError
        If `n` is not an integer of at least 1.
    """
    n = check_threads("set_threads", n)
    _use(min(n, *available().values()))


def _use(n: int) -> None:
    use(n)
    if core:
        core.set_threads(n)


def start() -> None:
    """Take what the environment asks for; ValueError where it names no instruction set."""
    forced = choice("FUSEDOPT_ISA", isas())
    _use(min(available().values()))
    if core and forced is not None:
        set_isa(forced)
