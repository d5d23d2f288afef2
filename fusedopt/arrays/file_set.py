"""Arrays that are spread over several safetensors files, which an index file names.

The index is a small file of JSON at the path that the user gave; the others are beside it, under
names that no other set has. What replaces the index replaces the set.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .file_array import File, FileArray, joined
from .safetensors_file import part_name, read, replace_file

FORMAT = 1
START = b'{"fusedopt_set":'
MOST = 100_000_000
"""Bytes of an index."""


class Tensors:
    """Arrays by name, each in one flat part or several, and the table of JSON beside them.

    shapes: of the whole arrays. parts: flat, in order.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        parts: Mapping[str, Sequence[FileArray]],
        table: Any,
    ) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._parts, self.table = parts, table
        for name, shape in self.shapes.items():
            sizes, dtypes = [a.size for a in parts[name]], {a.dtype for a in parts[name]}
            if sum(sizes) != math.prod(shape) or len(dtypes) != 1:
                raise ValueError(
                    f"{name}: expected {math.prod(shape)} elements of one dtype, got parts of"
                    f" {sizes} elements of {sorted(map(str, dtypes))}"
                )

    def whole(self, name: str) -> FileArray:
        """An array in its shape."""
        return joined(self._parts[name], self.shapes[name])

    def part(self, name: str, start: int, stop: int) -> FileArray:
        """Some elements of an array, flat."""
        return self.whole(name).some(start, stop)


def write_index(
    path: str | os.PathLike[str],
    token: str,
    count: int,
    shapes: Mapping[str, Sequence[int]],
    table: Any,
) -> None:
    """Name the parts, which are whole and on the disk, in one step; parts of old sets are removed.

    token: 16 hexadecimal digits. count: the number of parts. Errors as `safetensors_file.write`
    raises them.
    """
    text = json.dumps(
        {"fusedopt_set": FORMAT, "token": token, "files": count, "shapes": shapes, "table": table},
        separators=(",", ":"),
    )
    if len(text) > MOST:
        raise ValueError(
            f"{os.fspath(path)}: {len(text)} bytes of metadata are too many to be read"
        )

    def fill(fresh: Path) -> None:
        fresh.write_text(text, encoding="utf-8")

    replace_file(path, fill, token)


def is_index_of(path: str | os.PathLike[str], token: str) -> bool:
    """Return whether a file is the index of the set with this token."""
    try:
        file = File(path)
        if file.read(0, len(START)) != START:
            return False
        return bool(json.loads(file.read(0, MOST))["token"] == token)
    except (OSError, ValueError, KeyError):
        return False


def open_tensors(path: str | os.PathLike[str]) -> Tensors:
    """Open what `safetensors_file.write` put into one file, or ranks into a set.

    Raises OSError where a file cannot be opened and ValueError where one is not
    whole or not of this set.
    """
    file = File(path)
    if file.read(0, len(START)) != START:
        arrays, table = read(path)
        shapes = {name: a.shape for name, a in arrays.items()}
        return Tensors(shapes, {name: [a] for name, a in arrays.items()}, table)
    try:
        index = json.loads(file.read(0, MOST))
        if index["fusedopt_set"] != FORMAT:
            raise ValueError(f"expected a set of format {FORMAT}, got {index['fusedopt_set']!r}")
        parts: dict[str, list[FileArray]] = {name: [] for name in index["shapes"]}
        target = os.path.realpath(path)
        for number in range(index["files"]):
            arrays, told = read(part_name(target, index["token"], number))
            if told != {"token": index["token"]}:
                raise ValueError(f"part {number} is of another set")
            for name, a in arrays.items():
                parts[name].append(a)
        return Tensors(index["shapes"], parts, index["table"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: is not a whole set of files: {error}") from error


def read_metadata(file: str | os.PathLike[str]) -> Any:
    """Return the metadata that `Optimizer.save` was given, without loading anything."""
    table = open_tensors(file).table
    return table.get("metadata") if isinstance(table, dict) else None
