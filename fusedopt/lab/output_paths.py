"""Finding out that a file cannot be written before the work, not after it."""

from __future__ import annotations

import errno
from pathlib import Path
from tempfile import TemporaryFile


def claim_directory(option: str, directory: Path) -> None:
    """Make the directory if it is not there; OSError, naming the option, if nothing can go in."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=directory).close()
    except OSError as error:
        raise OSError(
            f"{option} {directory}: cannot write there ({error.strerror}); give another directory"
        ) from None


def claim_file(option: str, file: Path) -> None:
    """OSError, naming the option, if the file cannot be written; its content stays."""
    try:
        file.open("a").close()
    except OSError as error:
        raise OSError(
            f"{option} {file}: cannot write there ({error.strerror}); give another file"
        ) from None


def claim_replaced(option: str, file: Path) -> None:
    """OSError, naming the option, if the file cannot be replaced as a whole; nothing is made."""
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a directory")
        TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise OSError(
            f"{option} {file}: cannot write there ({error.strerror}); give another file"
        ) from None
