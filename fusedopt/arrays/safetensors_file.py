"""Arrays in a safetensors file: written so that a kill leaves no half of one, read where they go.

The library writes; it takes the arrays where they lie. Files are read here, because its reader
hands out copies, and no optimizer need be held twice.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from .file_array import File, FileArray, Part
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
    """Write C-ordered arrays and a table of JSON's kinds: in place of the file there, or anew.

    Whatever ends the process, the file there is the old one or the new one, whole and on the disk.
    The new one has the old one's permissions, access control lists included. Of several processes
    that save to one path at once, each succeeds, and the last one's file stays. What a save that
    was killed left behind is removed. Raises OSError where nothing can be written, or where the
    path leads to something else than a file, TypeError or ValueError for a table that JSON does
    not take or that is too large.
    """
    from safetensors import SafetensorError  # 8 ms of import, for those who save
    from safetensors.numpy import save_file

    text = json.dumps(table)
    if 2 * len(text) > HEADER_MOST:  # quotes and the arrays' entries come on top
        raise ValueError(
            f"{os.fspath(path)}: {len(text)} bytes of metadata are too many to be read"
        )

    def fill(fresh: Path) -> None:
        try:
            save_file(dict(arrays), fresh, {"fusedopt": text})
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written: {error}") from error

    replace_file(path, fill)


def replace_file(
    path: str | os.PathLike[str], fill: Callable[[Path], None], kept: str | None = None
) -> None:
    """Put a file that `fill` writes in the place of the one there, as a whole.

    kept: of the parts of a set of files (see `file_set`) those that the new file names; others are
    removed.
    """
    target = Path(os.path.realpath(path))  # what a link leads to, so that it stays one
    check_target(target)
    begin = _beginning(target)
    _remove_strays(target.parent, begin)
    # A directory, because the library writes under a name of its own first and renames.
    scratch = Path(tempfile.mkdtemp(SUFFIX, f"{begin}{os.getpid()}-", target.parent))
    try:
        scratch.chmod(0o700)  # which a umask may have taken away
        fresh = scratch / "arrays"
        fresh.touch()
        mode = fresh.stat().st_mode
        fill(fresh)
        _sync(fresh)
        _take_permissions(fresh, target, mode)
        fresh.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if os.name == "posix":  # elsewhere directories cannot be opened
        _sync(target.parent)
    _remove_parts(target, kept)


def part_name(target: str, token: str, number: int) -> str:
    """Return the name of one file of a set."""
    folder, name = os.path.split(target)
    return os.path.join(folder, f"{_stem(name)}.{token}.{number}")


LONGEST = 200
"""Bytes of a file's name that begins the names of others: a name may have 255."""


def _stem(name: str) -> str:
    """Return how the names of the files of a set begin."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= LONGEST else blake2b(encoded, digest_size=16).hexdigest()


def _remove_parts(target: Path, kept: str | None) -> None:
    part = re.compile(re.escape(_stem(target.name)) + r"\.([0-9a-f]{16})\.\d+")
    for entry in target.parent.iterdir():
        match = part.fullmatch(entry.name)
        if match and match[1] != kept:
            entry.unlink(missing_ok=True)


def check_target(target: Path) -> None:
    """Raise OSError where something else than a file stands there, which a file would replace."""
    if target.is_dir():
        number, found = errno.EISDIR, "is a directory"
    elif target.exists() and not target.is_file():
        number, found = errno.EINVAL, "is a device, a pipe or a socket"
    else:
        return
    raise OSError(
        number, f"{found}, which cannot be replaced; give the path of a file", f"{target}"
    )


def _sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    # Windows wants to write to what it flushes.
    opened = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _take_permissions(fresh: Path, target: Path, mode: int) -> None:
    """Give a new file the permissions of the one that it replaces, or those of any new file."""
    if not target.exists():
        fresh.chmod(mode & 0o777)
        return
    fresh.chmod(target.stat().st_mode & 0o777)
    if hasattr(os, "listxattr"):  # on Linux, where access control lists are such attributes
        with contextlib.suppress(OSError):
            for name in os.listxattr(target):
                os.setxattr(fresh, name, os.getxattr(target, name))


def _beginning(target: Path) -> str:
    """Return the beginning of the names of temporary folders for a file; the rest is the number of
    the process, and more. The file's own name may be as long as a name can be."""
    text = f"{platform.node()}/{target.name}".encode()
    return f".fusedopt-{blake2b(text, digest_size=8).hexdigest()}-"


def _remove_strays(folder: Path, begin: str) -> None:
    """Remove what processes have left that are no more."""
    stray = re.compile(re.escape(begin) + r"(\d+)-\w{8}" + re.escape(SUFFIX))
    for entry in folder.iterdir():
        found = stray.fullmatch(entry.name)
        if found and not _alive(int(found[1])):
            shutil.rmtree(entry, ignore_errors=True)


def _alive(process: int) -> bool:
    """Return whether there is a process of this number, as far as this one may know."""
    if os.name != "posix":  # where a signal would end it
        return process != os.getpid()
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid() or threading.active_count() > 1


def read(path: str | os.PathLike[str]) -> tuple[dict[str, FileArray], Any]:
    """The arrays, to be read, and the table that `write` put into a file.

    Nothing is allocated by what the file claims. Raises OSError where it cannot be opened and
    ValueError where it is no whole safetensors file, or not one of `write`.
    """
    file = File(path)
    try:
        header, begin = _header(file)
        metadata = header.pop("__metadata__", {})
        arrays = {name: _array(file, begin, entry) for name, entry in header.items()}
        if sum(a.size * a.dtype.itemsize for a in arrays.values()) != file.size - begin:
            raise ValueError("the arrays do not fill it")
        table = json.loads(metadata.get("fusedopt", "null"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: is not a whole safetensors file: {error}") from error
    if table is None:
        raise ValueError(f"{path}: is a safetensors file, but not one that Optimizer.save wrote")
    return arrays, table


def _header(file: File) -> tuple[dict[str, Any], int]:
    """The file's table of contents, and where the arrays begin."""
    size = int.from_bytes(file.read(0, 8), "little")
    if size > min(HEADER_MOST, file.size - 8):
        raise ValueError(f"its {file.size} bytes cannot begin with a header of {size}")
    header = json.loads(file.read(8, 8 + size).decode())
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    return header, 8 + size


def _array(file: File, begin: int, entry: Any) -> FileArray:
    dtype, shape, (first, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, first, end)):
        raise ValueError(f"sizes and offsets must be integers >= 0: {entry}")
    if end > file.size - begin or end - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array does not lie where it is said to: {entry}")
    return FileArray(dtype, shape, [Part(file, begin + first, begin + end)])
