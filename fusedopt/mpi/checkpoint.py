"""Checkpoints of a sharded optimizer: files that all ranks write together, and whole states."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..arrays.file_array import FileArray
from ..arrays.file_set import Tensors, is_index_of, write_index
from ..arrays.order import axes_of, memory_order, turned_back, turned_shape
from ..arrays.safetensors_file import check_target, part_name, write
from ..arrays.stored import LeafState
from ..step.assembly import Assembly
from ..step.checkpoint import CALLERS, Snapshot
from .ranks import Ranks
from .shares import Cut, flat


class Held(NamedTuple):
    """The part of one leaf that a rank holds: step, formats, and the shape of each whole array.

    arrays: by name the shape of the whole array as files have it, the number of elements that this
    rank has, the dtype, and the memory order of the whole.
    """

    t: int
    formats: dict[str, str]
    arrays: dict[str, tuple[tuple[int, ...], int, np.dtype, str]]


class SharedState:
    """The states of all ranks as one.

    Parameters
    ----------
    ranks : Ranks
        The processes.
    local : Assembly
        This rank's part of an optimizer.
    whole : sequence of arrays
        All parameters.
    cuts : sequence of Cut
        The shares.
    """

    def __init__(
        self, ranks: Ranks, local: Assembly, whole: Sequence[np.ndarray], cuts: Sequence[Cut]
    ) -> None:
        self._ranks, self._local, self._whole, self._cuts = ranks, local, whole, cuts
        self._snapshot: Snapshot = local.snapshot

    # ---------------------------------------------------------------- all that ranks hold

    def held(self, parameters: bool) -> dict[int, Held]:
        """Return what this rank holds, by leaf."""
        described = self._snapshot._described()["leaves"]
        found = {}
        for k, path in enumerate(self._snapshot.paths):
            if self._cuts[k].holds(self._ranks.rank):
                arrays = {
                    name: (*self._extent(k, name, a), a.dtype, self._order(k, name))
                    for name, a in self._snapshot._held(k, parameters).items()
                }
                entry = described[path]
                found[k] = Held(entry["t"], entry["formats"], arrays)
        return found

    def _extent(self, k: int, name: str, a: np.ndarray) -> tuple[tuple[int, ...], int]:
        """The shape of the whole of an array, as files have it, and this rank's number of it."""
        cut = self._cuts[k].owner is None
        if cut and _is_flat(name):
            return (-1,), a.size
        whole = self._whole[k] if cut else a
        return turned_shape(whole.shape, self._order(k, name)), a.size

    def _order(self, k: int, name: str) -> str:
        """The memory order of the whole of an array that this rank has a part of."""
        if self._cuts[k].owner is None:
            return "C" if _is_flat(name) else memory_order(self._whole[k])
        own = self._snapshot._held(k, True).get(name)
        return "C" if own is None else memory_order(own)

    def described(self, of_ranks: Sequence[Mapping[int, Held]]) -> dict[str, Any]:
        """Return a description of the whole optimizer apart from its arrays."""
        table = self._snapshot._described()
        for k, path in enumerate(self._snapshot.paths):
            holder = next(of[k] for of in of_ranks if k in of)
            p = self._whole[k]
            table["leaves"][path] |= {
                "t": holder.t,
                "formats": holder.formats,
                "shape": p.shape,
                "order": memory_order(p),
            }
        return table

    def whole_arrays(self, k: int, of_ranks: Sequence[Mapping[int, Held]]) -> dict[str, np.ndarray]:
        """The states of one leaf, on all ranks."""
        holders = [of.get(k) for of in of_ranks]
        first = next(holder for holder in holders if holder is not None)
        mine = self._snapshot._held(k, False)
        arrays = {}
        for name, (shape, _, dtype, order) in first.arrays.items():
            sizes = [0 if h is None else h.arrays[name][1] for h in holders]
            starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
            whole = np.empty(sum(sizes), dtype)
            if holders[self._ranks.rank] is not None:
                begin = int(starts[self._ranks.rank])
                whole[begin : begin + mine[name].size] = flat(mine[name])
            self._ranks.share(whole, starts, sizes)
            arrays[name] = turned_back(whole.reshape(_shape(shape, sizes)), order)
        return arrays

    # ---------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str], parameters: bool, metadata: Any) -> None:
        """Write one set of files, each rank its own, and then the index, which makes it whole."""
        ranks = self._ranks
        target = os.path.realpath(path)
        with ranks.together() as reports:
            check_target(Path(target))  # before anything is written
            reports.mine = (secrets.token_hex(8), self.held(parameters))
        token = reports.all[0][0]
        of_ranks = [held for _, held in reports.all]
        own = part_name(target, token, ranks.rank)
        try:
            with ranks.together():
                arrays = {
                    f"{name}:{self._snapshot.paths[k]}": flat(a)
                    for k in of_ranks[ranks.rank]
                    for name, a in self._snapshot._held(k, parameters).items()
                }
                write(own, arrays, {"token": token})
            with ranks.together():
                if ranks.rank == 0:
                    table = {**self.described(of_ranks), "metadata": metadata}
                    write_index(path, token, ranks.size, self._shapes(of_ranks), table)
        except Exception as error:
            # A rank that died or is late may have written the index, or may yet do it; one that
            # failed may have failed after that. What no index names, the next save removes.
            if not (isinstance(error, TimeoutError) or is_index_of(path, token)):
                Path(own).unlink(missing_ok=True)
            raise

    def _shapes(self, of_ranks: Sequence[Mapping[int, Held]]) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for k, path in enumerate(self._snapshot.paths):
            holders = [of[k] for of in of_ranks if k in of]
            for name, (shape, *_) in holders[0].arrays.items():
                sizes = [holder.arrays[name][1] for holder in holders]
                shapes[f"{name}:{path}"] = _shape(shape, sizes)
        return shapes

    # ---------------------------------------------------------------- going on from either

    def part_of(self, tensors: Tensors, parameters: bool, what: str) -> dict[str, Any]:
        """Return this rank's part of a whole state, as its own snapshot takes it.

        Raises ValueError where leaves have other shapes, KeyError, TypeError or AttributeError
        where the table is spoilt.
        """
        saved: dict[str, Any] = dict(tensors.table)
        leaves = {path: dict(entry) for path, entry in saved["leaves"].items()}
        saved["leaves"] = leaves
        for entry in leaves.values():
            entry["state"] = {}
        for tensor in tensors.shapes:
            name, _, path = tensor.partition(":")
            if path not in self._snapshot.paths:
                leaves[path]["state"][name] = np.empty(0)  # which is no leaf here, and is told so
                continue
            k = self._snapshot.paths.index(path)
            held = self._snapshot._held(k, True)
            if not parameters and name in CALLERS:
                continue
            if name in held:
                leaves[path]["state"][name] = self._part(tensors, tensor, k, name, held[name])
            else:
                leaves[path]["state"][name] = tensors.whole(tensor)
        problems: list[str] = []
        for k, path in enumerate(self._snapshot.paths):
            if path in leaves:
                self._localize(k, leaves[path], parameters, problems)
        if problems:
            raise ValueError(f"{what} does not fit: " + "; ".join(problems))
        return saved

    def tensors_of(self, saved: Any) -> Tensors:
        """A `state_dict` as files have it."""
        shapes, parts = {}, {}
        for path, entry in saved["leaves"].items():
            here = path in self._snapshot.paths
            for name, a in entry["state"].items():
                order = self._order(self._snapshot.paths.index(path), name) if here else "C"
                if len(axes_of(order, a.ndim)) != a.ndim:  # which the shape will tell
                    order = "C"
                shapes[f"{name}:{path}"] = turned_shape(a.shape, order)
                parts[f"{name}:{path}"] = [FileArray.of(a, order)]
        return Tensors(shapes, parts, saved)

    def _part(self, tensors: Tensors, tensor: str, k: int, name: str, own: np.ndarray) -> FileArray:
        cut, leaf_state = self._cuts[k], self._snapshot.leaf_states[k]
        if cut.owner is not None:
            return tensors.whole(tensor).laid_out_as(own)
        start = _entries(leaf_state, name, cut.bounds[self._ranks.rank])
        part = tensors.part(tensor, start, start + own.size)
        return part.reshape(own.shape) if part.size == own.size else part

    def _localize(
        self, k: int, entry: dict[str, Any], parameters: bool, problems: list[str]
    ) -> None:
        """Replace the whole leaf's shape, if it is the right one, by that of this rank's part."""
        p, part = self._whole[k], self._snapshot.parameters[k]
        here, there = (p.shape, memory_order(p)), (tuple(entry["shape"]), entry["order"])
        if here != there:
            path = self._snapshot.paths[k]
            problems.append(f"{path}: shape and memory order {here} here, {there} there")
        entry["shape"], entry["order"] = part.shape, memory_order(part)
        if not self._cuts[k].holds(self._ranks.rank):
            own = self._snapshot._described()["leaves"][self._snapshot.paths[k]]
            entry["formats"] = own["formats"]
            entry["state"] = dict(self._snapshot._held(k, parameters))

    def restore(self, saved: dict[str, Any], *, strict: bool, what: str, parameters: bool) -> None:
        """Go on from what `part_of` made; on all ranks or, with an error on all, on none."""
        with self._ranks.together():
            problems = list(self._snapshot._problems(saved, strict, parameters))
            if problems:
                raise ValueError(f"{what} does not fit: " + "; ".join(problems))

        def restored() -> None:
            seed = self._snapshot.restore(saved, strict=strict, what=what, parameters=parameters)
            self._local.go_on(seed)

        with self._ranks.together(changing=True):
            self._local.loaded("load", restored)


def _is_flat(name: str) -> bool:
    """Return whether an array is flat whatever the shape of its leaf, as codes are."""
    return name.endswith((".codes", ".scales")) or name in ("low", "compensation")


def _shape(shape: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    return (sum(sizes),) if -1 in shape else tuple(shape)


def _entries(leaf_state: LeafState, name: str, elements: int) -> int:
    """The number of entries of an array that belong to the first elements of its leaf."""
    state, _, kind = name.rpartition(".")
    if kind == "codes":
        return leaf_state.states[state].format.data_size(elements)
    if kind == "scales":
        return leaf_state.states[state].format.aux_size(elements)
    return elements
