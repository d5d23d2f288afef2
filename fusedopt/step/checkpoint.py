"""The state that travels: what an optimizer is, apart from its parameters."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import numpy as np

from ..arrays.checks import apart
from ..arrays.file_array import FileArray
from ..arrays.order import memory_order, turned
from ..arrays.stored import LeafState
from ..arrays.trees import Tree
from ..plan.spec import HALFWAY
from ..rules.base import Rule
from ..rules.groups import Group
from .rates import Rates

FORMAT = 1
MOST = 1 << 62
"""Steps; the counters have 64 bits."""

ENTRY: dict[str, Any] = {
    "rule": str,
    "hyperparameters": dict,
    "t": int,
    "shape": (tuple, list),
    "dtype": str,
    "order": str,
    "formats": dict,
    "state": dict,
}


class Snapshot:
    """Reader and writer of the states and counters of an optimizer's leaves.

    groups: the parameter groups; group_of: of each leaf its place among them. leaf_states: what a
    step writes of each leaf. counters: the step, then each leaf's own. seed: of the random bits.
    rates: the owner of the learning rates.
    """

    def __init__(
        self,
        tree: Tree,
        groups: Sequence[Group],
        group_of: Sequence[int],
        parameters: Sequence[np.ndarray],
        leaf_states: Sequence[LeafState],
        counters: np.ndarray,
        seed: int,
        rates: Rates,
    ) -> None:
        self.tree, self.groups, self.group_of = tree, groups, group_of
        self.paths = [leaf.path for leaf in tree.leaves]
        self.rules = [groups[k].rule for k in group_of]
        self.counters, self.seed, self.rates = counters, seed, rates
        self.parameters, self.leaf_states = parameters, leaf_states

    def take(self) -> dict[str, Any]:
        """Counters, and copies of the states."""
        saved = self._described()
        for path, leaf_state in zip(self.paths, self.leaf_states, strict=True):
            copies = {name: a.copy(order="K") for name, a in leaf_state.saved.items()}
            saved["leaves"][path]["state"] = copies
        return saved

    def restore(
        self, saved: Any, *, strict: bool, what: str = "state_dict", parameters: bool = False
    ) -> int:
        """Write what `take` returned, and return the seed.

        Where a file cannot be read to its end, OSError leaves the counter of steps at `HALFWAY`.

        strict: hyperparameters must be equal. parameters: the caller's arrays are among the states
        and are written too. Raises ValueError, which lists every misfit, before anything is
        written.
        """
        problems = list(self._problems(saved, strict, parameters))
        if problems:
            raise ValueError(f"{what} does not fit: " + "; ".join(problems))
        targets, sources = [], []
        for k, path in enumerate(self.paths):
            for name, held in self._held(k, parameters).items():
                targets.append(held)
                sources.append(saved["leaves"][path]["state"][name])
        sources = apart(sources, targets)
        self.counters[0] = HALFWAY
        for held, source in zip(targets, sources, strict=True):
            _fill(held, source)
        for k, path in enumerate(self.paths):
            self.counters[k + 1] = saved["leaves"][path]["t"]
        self.counters[0] = saved["step"]
        return int(saved["seed"])

    def save(self, file: str | os.PathLike[str], parameters: bool, metadata: Any) -> None:
        """Write a file that `load` reads; a tensor is called name:path, the parameter p:path."""
        from ..arrays.safetensors_file import write  # an optimizer may run without the module

        arrays = {}
        for k, path in enumerate(self.paths):
            for name, held in self._held(k, parameters).items():
                a = held if isinstance(held, np.ndarray) else held.copy()  # of a device
                arrays[f"{name}:{path}"] = turned(a, memory_order(held))
        write(file, arrays, {**self._described(), "metadata": metadata})

    def load(
        self, file: str | os.PathLike[str], *, strict: bool, parameters: bool
    ) -> tuple[int, Any]:
        """Write what `save` put into a file; return the seed and the metadata. Errors as in
        `restore`."""
        from ..arrays.file_set import open_tensors

        name = os.fspath(file)
        tensors = open_tensors(file)
        saved = tensors.table
        known = {path: self._held(k, True) for k, path in enumerate(self.paths)}
        try:
            leaves = saved["leaves"]
            for entry in leaves.values():
                entry["state"] = {}
            for tensor in tensors.shapes:
                kind, _, path = tensor.partition(":")
                a, held = tensors.whole(tensor), known.get(path, {}).get(kind)
                leaves[path]["state"][kind] = a if held is None else a.laid_out_as(held)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{name}: its table of leaves is spoilt: {error!r}") from error
        if not parameters:
            for entry in leaves.values():
                for kind in CALLERS:
                    entry["state"].pop(kind, None)
        elif not any("p" in entry["state"] for entry in leaves.values()):
            raise ValueError(
                f"{name}: holds no parameters; put them back yourself, and pass parameters=False"
            )
        seed = self.restore(saved, strict=strict, what=name, parameters=parameters)
        return seed, saved.get("metadata")

    def _described(self) -> dict[str, Any]:
        """Return everything but the arrays."""
        leaves = {}
        for k, (path, rule) in enumerate(zip(self.paths, self.rules, strict=True)):
            p = self.parameters[k]
            leaves[path] = {
                "rule": rule.name,
                "hyperparameters": hyperparameters(rule),
                "t": int(self.counters[k + 1]),
                "shape": p.shape,
                "dtype": p.dtype.name,
                "order": memory_order(p),
                "formats": _formats(self.leaf_states[k]),
            }
        return {
            "format": FORMAT,
            "step": int(self.counters[0]),
            "seed": self.seed,
            "leaves": leaves,
        }

    def _held(self, k: int, parameters: bool) -> Mapping[str, np.ndarray]:
        """The arrays of a leaf that are saved, by name."""
        leaf_state = self.leaf_states[k]
        callers = dict(zip(CALLERS, (leaf_state.caller, *leaf_state.copies), strict=False))
        return {**callers, **leaf_state.saved} if parameters else leaf_state.saved

    def _problems(self, saved: Any, strict: bool, parameters: bool) -> Iterator[str]:
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
            yield f"expected a dict of format {FORMAT}, got {found!r}"
            return
        leaves = saved.get("leaves")
        step, seed = saved.get("step"), saved.get("seed")
        if not isinstance(leaves, dict) or not _is_count(step) or not _is_integer(seed):
            yield f"expected a step >= 0 and below {MOST}, a seed >= 0 and a dict of leaves"
            return
        known = set(self.paths)
        yield from (f"{path}: is no leaf here" for path in leaves if path not in known)
        for k, path in enumerate(self.paths):
            if path not in leaves:
                yield f"{path}: is not in it"
                continue
            entry = leaves[path]
            if not isinstance(entry, dict) or not all(
                isinstance(entry.get(name), kind) for name, kind in ENTRY.items()
            ):
                yield f"{path}: expected a dict with {', '.join(ENTRY)}"
            else:
                differences = self._differences(k, entry, strict, parameters)
                yield from (f"{path}: {reason}" for reason in differences)

    def _differences(
        self, k: int, entry: dict[str, Any], strict: bool, parameters: bool
    ) -> Iterator[str]:
        p, rule, held = self.parameters[k], self.rules[k], self._held(k, parameters)
        if not _is_count(entry["t"]):
            yield f"expected t >= 0 and below {MOST}, got {entry['t']!r}"
        here = {
            "rule": rule.name,
            "shape": p.shape,
            "dtype": p.dtype.name,
            "order": memory_order(p),
            "formats": _formats(self.leaf_states[k]),
        }
        for what, value in here.items():
            there = tuple(entry[what]) if what == "shape" else entry[what]
            if there != value:
                yield f"{what} {value} here, {there} there"
        if entry["rule"] == rule.name:
            yield from _other_hyperparameters(rule, entry["hyperparameters"], strict)
        if set(entry["state"]) != set(held):
            yield f"states {list(held)} here, {list(entry['state'])} there"
        for name, a in entry["state"].items():
            own = held.get(name, p)
            is_array = isinstance(a, (np.ndarray, FileArray))
            if not is_array or (a.shape, a.dtype) != (own.shape, own.dtype):
                there = f"{a.dtype} of shape {a.shape}" if is_array else type(a)
                yield f"{name}: {own.dtype} of shape {own.shape} here, {there} there"


CALLERS = ("p", "copy")
"""The caller's arrays in a file: the parameter, and what `copy_out` has for it."""


def hyperparameters(rule: Rule) -> dict[str, Any]:
    """A rule's fields as JSON has them. A schedule is what it prints, any other callable is one."""
    return {field.name: _plain(getattr(rule, field.name)) for field in fields(rule)}


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    if callable(value):
        return repr(value) if is_dataclass(value) else "a callable"
    return value


def _other_hyperparameters(rule: Rule, there: dict[str, Any], strict: bool) -> Iterator[str]:
    """Return what differs; unless `strict`, only in what the states themselves depend on."""
    here = hyperparameters(rule)
    # A hyperparameter that came after the file was written.
    there = {f.name: _plain(f.default) for f in fields(rule) if f.default is not MISSING} | there
    for name in sorted(here.keys() | there.keys()):
        own, other = (side.get(name, "nothing") for side in (here, there))
        if own != other and (strict or name in rule.settled):
            yield f"{name} {own!r} here, {other!r} there"


def _formats(leaf_state: LeafState) -> dict[str, str]:
    """Return the formats of the parameter and of each state, where dtypes do not tell them."""
    stored = {"p": leaf_state.parameter, **leaf_state.states}
    return {name: s.format.name for name, s in stored.items()}


def _fill(held: Any, source: np.ndarray | FileArray) -> None:
    """Copy an array of the same dtype and shape into one of the optimizer's."""
    if not isinstance(source, FileArray):
        held[...] = source
    elif isinstance(held, np.ndarray):
        source.read_into(held)
    else:  # of a device
        held[...] = source.read()


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_count(value: Any) -> bool:
    return _is_integer(value) and value < MOST
