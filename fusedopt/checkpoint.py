"""The state that travels: what an optimizer is, apart from its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .rules import Rule
from .states import Memory
from .trees import Leaf

FORMAT = 1
ENTRY: dict[str, Any] = {
    "rule": str,
    "t": int,
    "shape": (tuple, list),
    "dtype": str,
    "formats": dict,
    "state": dict,
}


class Snapshot:
    """Reads and writes the states and counters of an optimizer's leaves.

    memories: what a step writes of each leaf. counters: the step, then each leaf's own. seed: of
    the random bits.
    """

    def __init__(
        self,
        leaves: Sequence[Leaf],
        rules: Sequence[Rule],
        parameters: Sequence[np.ndarray],
        memories: Sequence[Memory],
        counters: np.ndarray,
        seed: int,
    ) -> None:
        self._paths = [leaf.path for leaf in leaves]
        self._rules, self._counters, self._seed = rules, counters, seed
        self._parameters, self._memories = parameters, memories

    def take(self) -> dict[str, Any]:
        """Counters, and copies of the states."""
        leaves = {}
        for k, (path, rule) in enumerate(zip(self._paths, self._rules, strict=True)):
            p, memory = self._parameters[k], self._memories[k]
            leaves[path] = {
                "rule": rule.name,
                "t": int(self._counters[k + 1]),
                "shape": p.shape,
                "dtype": p.dtype.name,
                "formats": _formats(memory),
                "state": {name: a.copy(order="A") for name, a in memory.saved.items()},
            }
        step = int(self._counters[0])
        return {"format": FORMAT, "step": step, "seed": self._seed, "leaves": leaves}

    def restore(self, saved: Any) -> int:
        """Writes what `take` returned, and returns the seed.

        Raises ValueError, which lists every misfit, before anything is written.
        """
        problems = list(self._problems(saved))
        if problems:
            raise ValueError("state_dict does not fit: " + "; ".join(problems))
        for k, path in enumerate(self._paths):
            entry = saved["leaves"][path]
            for name, a in self._memories[k].saved.items():
                a[...] = entry["state"][name]
            self._counters[k + 1] = entry["t"]
        self._counters[0] = saved["step"]
        return int(saved["seed"])

    def _problems(self, saved: Any) -> Iterator[str]:
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
            yield f"expected a dict of format {FORMAT}, got {found!r}"
            return
        leaves = saved.get("leaves")
        counts = (saved.get("step"), saved.get("seed"))
        if not isinstance(leaves, dict) or not all(map(_is_count, counts)):
            yield "expected a step >= 0, a seed >= 0 and a dict of leaves"
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
        p, rule, memory = self._parameters[k], self._rules[k], self._memories[k]
        if not _is_count(entry["t"]):
            yield f"expected t >= 0, got {entry['t']!r}"
        here = {
            "rule": rule.name,
            "shape": p.shape,
            "dtype": p.dtype.name,
            "formats": _formats(memory),
        }
        for what, value in here.items():
            there = tuple(entry[what]) if what == "shape" else entry[what]
            if there != value:
                yield f"{what} {value} here, {there} there"
        saved = memory.saved
        if set(entry["state"]) != set(saved):
            yield f"states {list(saved)} here, {list(entry['state'])} there"
        for name, a in entry["state"].items():
            own = saved.get(name, p)
            if not isinstance(a, np.ndarray) or (a.shape, a.dtype) != (own.shape, own.dtype):
                there = f"{a.dtype} of shape {a.shape}" if isinstance(a, np.ndarray) else type(a)
                yield f"{name}: {own.dtype} of shape {own.shape} here, {there} there"


def _formats(memory: Memory) -> dict[str, str]:
    """What the parameter is computed with and each state is stored in, where dtypes do not tell."""
    stored = {"p": memory.parameter, **memory.states}
    return {name: s.format.name for name, s in stored.items()}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0
