"""Describe an optimizer: a table and a digest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..arrays.storage import Storage
from ..arrays.stored import WEIGHTS, LeafState
from ..rules.base import Rule
from .assembly import Assembly


def describe(assembly: Assembly) -> str:
    """Return a table of what updates which leaf, and of the memory that it takes."""
    parameters, rules, leaf_states = assembly.parameters, assembly.rules, assembly.leaf_states
    given = [assembly.groups[k].rule for k in assembly.group_of]
    lines = table(assembly.storage, assembly.paths, parameters, given, leaf_states)
    backend, s = assembly.backend, assembly.state_file
    if not backend.textbook:
        notes = (rule.note(p.shape) for p, rule in zip(parameters, rules, strict=True))
        lines += dict.fromkeys(filter(None, notes))
    held = sum(p.nbytes for p in parameters)
    states_held = sum(a.nbytes for leaf_state in leaf_states for a in leaf_state.saved.values())
    where = f" in {s.directory} (scratch; a step has {s.window} in memory)" if s else ""
    lines.append(
        f"{held} bytes of parameters, {states_held} of states{where}, {assembly.plan.work_bytes}"
        f" of work space; backend {backend.name} ({backend.describe()}), step"
        f" {assembly.counters[0]}"
    )
    return "\n".join(lines)


def table(
    storage: Storage,
    paths: Sequence[str],
    parameters: Sequence[np.ndarray],
    rules: Sequence[Rule],
    leaf_states: Sequence[LeafState],
) -> list[str]:
    """A line for each leaf, below a head: what updates it, and what it has beside it."""
    rows = [("path", "shape", "dtype", "rule", "states")]
    for path, p, rule, leaf_state in zip(paths, parameters, rules, leaf_states, strict=True):
        states = [storage.describe(rule, name, p) for name in rule.states]
        states += [f"{name} {s.shape} {s.data.dtype}" for name, s in leaf_state.sides.items()]
        held = leaf_state.states
        states += [f"{name} {held[name].format.name}" for name in held if name in WEIGHTS]
        if leaf_state.extra:
            states.append(f"{leaf_state.extra[0]} {leaf_state.extra[1].dtype}")
        shown = ", ".join(states) or "-"
        rows.append((path, str(p.shape), p.dtype.name, rule.summary(), shown))
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]


def digest(
    paths: Sequence[str],
    parameters: Sequence[np.ndarray],
    states: Iterable[Mapping[str, np.ndarray]],
    counters: np.ndarray,
) -> str:
    """`Optimizer.fingerprint`; states: of each leaf the arrays that are saved."""
    import hashlib  # 3 ms of import, for this alone

    digest = hashlib.sha256()
    for path, p, saved, t in zip(paths, parameters, states, counters[1:], strict=True):
        digest.update(f"{path} {p.shape} {t}".encode())
        for a in (p, *saved.values()):
            canonical = a.copy()
            if a.dtype.kind not in "iu":
                canonical[np.isnan(canonical)] = np.nan
            bits = canonical.view(f"u{a.itemsize}")
            digest.update(bits.astype(f"<u{a.itemsize}").tobytes())
    digest.update(str(counters[0]).encode())
    return digest.hexdigest()
