"""Arrays in a safetensors file: written so that a kill leaves no half of one, read by mapping.

The library writes; it takes the arrays where they lie. Files are mapped and their headers read
here, because its reader hands out copies: one that cannot be allocated would end a load halfway.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .formats import BFLOAT16

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
}
HEADER_MOST = 100_000_000
"""Bytes; the library's own limit."""

SUFFIX = ".saving"


def write(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], table: Any) -> None:
    """Writes C-ordered arrays and a table of JSON's kinds: in place of the file there, or anew.

    Whatever ends the process, the file there is the old one or the new one, whole and on the disk.
    What earlier saves to this path left behind is removed, and so is what another process is
    saving there just now: that one gets an OSError. Raises OSError where nothing can be written,
    TypeError or ValueError for a table that JSON does not take or that is too large.
    """
    from safetensors import SafetensorError  # 8 ms, for those who save
    from safetensors.numpy import save_file

    text = json.dumps(table)
    if 2 * len(text) > HEADER_MOST:  # quotes and the arrays' entries come on top
        raise ValueError(
            f"{os.fspath(path)}: {len(text)} bytes of metadata are too many to be read"
        )
    target = Path(os.path.realpath(path))  # what a link leads to, so that it stays one
    _remove_strays(target)
    # A directory, because the library writes under a name of its own first and renames.
    scratch = Path(tempfile.mkdtemp(SUFFIX, f".{target.name}.", target.parent))
    try:
        fresh = scratch / "arrays"
        fresh.touch()
        mode = (target if target.exists() else fresh).stat().st_mode & 0o777
        save_file(dict(arrays), fresh, {"fusedopt": text})
        fresh.chmod(mode)
        with fresh.open("r+b") as file:
            os.fsync(file.fileno())
        fresh.replace(target)
    except SafetensorError as error:
        raise OSError(f"{target}: could not be written: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if os.name == "posix":  # elsewhere directories cannot be opened
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _remove_strays(target: Path) -> None:
    stray = re.compile(re.escape(f".{target.name}.") + r"\w{8}" + re.escape(SUFFIX))
    for entry in target.parent.iterdir():
        if stray.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], Any]:
    """The arrays, read-only and mapped, and the table that `write` put into a file.

    Nothing is allocated by what the file claims. Raises OSError where it cannot be opened and
    ValueError where it is no whole safetensors file, or not one of `write`.
    """
    with open(path, "rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            header, begin = _header(data)
            metadata = header.pop("__metadata__", {})
            arrays = {name: _array(data, begin, entry) for name, entry in header.items()}
            if sum(a.nbytes for a in arrays.values()) != len(data) - begin:
                raise ValueError("the arrays do not fill it")
            table = json.loads(metadata.get("fusedopt", "null"))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: is not a whole safetensors file: {error}") from error
    if table is None:
        raise ValueError(f"{path}: is a safetensors file, but not one that Optimizer.save wrote")
    return arrays, table


def _header(data: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The file's table of contents, and where the arrays begin."""
    size = int.from_bytes(data[:8], "little")
    if size > min(HEADER_MOST, len(data) - 8):
        raise ValueError(f"its {len(data)} bytes cannot begin with a header of {size}")
    header = json.loads(data[8 : 8 + size].decode())
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    return header, 8 + size


def _array(data: mmap.mmap, begin: int, entry: Any) -> np.ndarray:
    dtype, shape, (first, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, first, end)):
        raise ValueError(f"sizes and offsets must be integers >= 0: {entry}")
    if end > len(data) - begin or end - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array does not lie where it is said to: {entry}")
    return np.ndarray(shape, dtype, data, begin + first)
