"""The state that travels: what an optimizer is, apart from its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .rules import Rule
from .trees import Leaf

FORMAT = 1
ENTRY: dict[str, Any] = {"rule": str, "t": int, "shape": (tuple, list), "dtype": str, "state": dict}


class Snapshot:
    """Reads and writes the states and counters of an optimizer's leaves.

    arrays: of each leaf its parameter and states. counters: the step, then each leaf's own.
    """

    def __init__(
        self,
        leaves: Sequence[Leaf],
        rules: Sequence[Rule],
        arrays: Sequence[Sequence[np.ndarray]],
        counters: np.ndarray,
    ) -> None:
        self._paths = [leaf.path for leaf in leaves]
        self._rules, self._arrays, self._counters = rules, arrays, counters

    def take(self) -> dict[str, Any]:
        """Counters, and copies of the states."""
        leaves = {}
        for k, (path, rule) in enumerate(zip(self._paths, self._rules, strict=True)):
            p, *states = self._arrays[k]
            copies = [a.copy(order="A") for a in states]
            leaves[path] = {
                "rule": rule.name,
                "t": int(self._counters[k + 1]),
                "shape": p.shape,
                "dtype": p.dtype.name,
                "state": dict(zip(rule.states, copies, strict=True)),
            }
        return {"format": FORMAT, "step": int(self._counters[0]), "leaves": leaves}

    def restore(self, saved: Any) -> None:
        """Writes what `take` returned; ValueError, which lists every misfit, before that."""
        problems = list(self._problems(saved))
        if problems:
            raise ValueError("state_dict does not fit: " + "; ".join(problems))
        for k, path in enumerate(self._paths):
            entry = saved["leaves"][path]
            for name, a in zip(self._rules[k].states, self._arrays[k][1:], strict=True):
                a[...] = entry["state"][name]
            self._counters[k + 1] = entry["t"]
        self._counters[0] = saved["step"]

    def _problems(self, saved: Any) -> Iterator[str]:
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
            yield f"expected a dict of format {FORMAT}, got {found!r}"
            return
        leaves = saved.get("leaves")
        if not isinstance(leaves, dict) or not _is_count(saved.get("step")):
            yield "expected a step >= 0 and a dict of leaves"
            return
        yield from (f"{path}: is no leaf here" for path in leaves if path not in self._paths)
        for k, path in enumerate(self._paths):
            if path not in leaves:
                yield f"{path}: is not in it"
                continue
            entry = leaves[path]
            if not isinstance(entry, dict) or not all(
                isinstance(entry.get(name), kind) for name, kind in ENTRY.items()
            ):
                yield f"{path}: expected a dict with {', '.join(ENTRY)}"
            else:
                yield from (f"{path}: {reason}" for reason in self._differences(k, entry))

    def _differences(self, k: int, entry: dict[str, Any]) -> Iterator[str]:
        p, rule = self._arrays[k][0], self._rules[k]
        if not _is_count(entry["t"]):
            yield f"expected t >= 0, got {entry['t']!r}"
        here = {"rule": rule.name, "shape": p.shape, "dtype": p.dtype.name}
        for what, value in here.items():
            there = tuple(entry[what]) if what == "shape" else entry[what]
            if there != value:
                yield f"{what} {value} here, {there} there"
        if set(entry["state"]) != set(rule.states):
            yield f"states {list(rule.states)} here, {list(entry['state'])} there"
        for name, a in entry["state"].items():
            if not isinstance(a, np.ndarray) or (a.shape, a.dtype) != (p.shape, p.dtype):
                there = f"{a.dtype} of shape {a.shape}" if isinstance(a, np.ndarray) else type(a)
                yield f"{name}: {p.dtype} of shape {p.shape} here, {there} there"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0
