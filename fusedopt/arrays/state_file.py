"""Memory in a file, for states that are larger than memory: scratch, and no checkpoint."""

from __future__ import annotations

import errno
import json
import mmap
import os
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from .stored import WINDOW

DATA, NOTE = "scratch.bin", "scratch.json"
WHAT = (
    "The states of a running fusedopt optimizer: scratch, not a checkpoint. Nothing can go on from"
    " them, and the optimizer removes them. If its process has ended, delete both files."
)


class StateFile:
    """A directory of this optimizer's own, with a file of zeros that is mapped into memory.

    directory: an empty one, or a new one beside others. Both files go when this object does, and
    with a new directory the directory.

    block: the file's bytes, uint8. file: its descriptor. window: bytes to be in memory at a time.

    Raises FileExistsError where the directory holds anything, OSError where it cannot be made,
    RuntimeError on Windows; nothing is left behind then.
    """

    def __init__(self, directory: Path) -> None:
        if sys.platform == "win32":
            raise RuntimeError("state_path: Windows cannot remove files in use; leave it out")
        self.directory, self.window = directory, WINDOW
        self._pid = os.getpid()
        made = _make_empty(directory)
        try:
            self.file = os.open(directory / DATA, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:  # another process was faster
            raise _occupied(directory) from None
        except OSError as error:
            _remove_directory(directory, made)
            raise OSError(
                error.errno, f"state_path {directory}: cannot write there ({error.strerror})"
            ) from None
        self.remove = weakref.finalize(self, _remove, directory, made, self.file, self._pid)
        _lock(self.file)

    def reserve(self, size: int) -> np.ndarray:
        """Return a block of `size` zero bytes, for which the disk has room.

        Raises OSError where it has not, ValueError for none.
        """
        if not size:
            raise ValueError("state_path: no leaf has a state to keep there; leave it out")
        try:
            _reserve(self.file, size)
            self._map = mmap.mmap(self.file, size)
        except OSError as error:
            raise OSError(
                error.errno,
                f"state_path {self.directory}: cannot reserve {size} bytes for the states"
                f" ({error.strerror}); make room, or give a directory on another disk",
            ) from None
        self.block: np.ndarray = np.frombuffer(self._map, np.uint8)
        return self.block

    def note(self, arrays: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Write beside the file whose it is and what is in it: path -> name -> array."""
        start = self.block.__array_interface__["data"][0]
        layout = {
            path: {
                name: {
                    "dtype": a.dtype.name,
                    "shape": a.shape,
                    "offset": a.__array_interface__["data"][0] - start,
                }
                for name, a in own.items()
            }
            for path, own in arrays.items()
        }
        owner = {"pid": self._pid, "host": os.uname().nodename, "bytes": self.block.nbytes}
        text = json.dumps({"what": WHAT, **owner, "layout": layout}, indent=1)
        (self.directory / NOTE).write_text(text + "\n")

    def check_owner(self) -> None:
        """RuntimeError in a forked child, which shares the file with its parent."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"state_path {self.directory}: belongs to process {self._pid}, of which this is a"
                " fork; make an optimizer of the child's own"
            )

    def release(self) -> None:
        """Let go of the memory that the states take; the system writes them when it likes."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def flush(self) -> None:
        """Write the states to the disk, wait for it, and let go of their memory, caches too.

        Raises OSError where the disk failed.
        """
        self._map.flush()
        self.release()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.file, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def state_file_in(path: object) -> Iterator[StateFile]:
    """The scratch in a directory; removed again where what is done with it fails.

    Raises TypeError where it is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"state_path: expected a directory's path, got {path!r}")
    state_file = StateFile(Path(path).absolute())
    try:
        yield state_file
    except BaseException:
        state_file.remove()
        raise


def _make_empty(directory: Path) -> bool:
    """Return whether the directory had to be made."""
    try:
        directory.mkdir()
        return True
    except FileExistsError:
        pass
    except OSError as error:
        raise OSError(
            error.errno, f"state_path {directory}: cannot be made ({error.strerror})"
        ) from None
    if not directory.is_dir():
        raise FileExistsError(f"state_path {directory}: is no directory; give another one")
    if any(directory.iterdir()):
        raise _occupied(directory)
    return False


def _occupied(directory: Path) -> FileExistsError:
    """Return what is in a directory, and what to do about it."""
    names = sorted(os.listdir(directory))
    where = f"state_path {directory}"
    if DATA not in names:
        shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
        return FileExistsError(f"{where}: is not empty ({shown}); give an empty or a new directory")
    owner = "an unknown process"
    with suppress(OSError, ValueError, KeyError, TypeError):
        note = json.loads((directory / NOTE).read_text())
        owner = f"process {note['pid']} on {note['host']}"
    if _locked(directory / DATA):
        return FileExistsError(
            f"{where}: is in use by {owner}; give each optimizer a directory of its own"
        )
    return FileExistsError(
        f"{where}: was left by {owner}, which has ended; that is scratch, from which nothing can go"
        f" on: delete {directory / DATA} and {directory / NOTE}, or give another directory"
    )


def _lock(file: int) -> None:
    """Show that the owner lives, for as long as it does; some file systems have no locks."""
    import fcntl

    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _locked(path: Path) -> bool:
    import fcntl

    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _reserve(file: int, size: int) -> None:
    """Zeros, for which the disk has room: it could end in a step otherwise, which is a crash."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    zeros = memoryview(bytes(1 << 20))
    with open(file, "wb", closefd=False) as written:
        for at in range(0, size, len(zeros)):
            written.write(zeros[: size - at])
    os.fsync(file)


def _remove(directory: Path, made: bool, file: int, pid: int) -> None:
    if os.getpid() != pid:  # the parent goes on
        return
    with suppress(OSError):
        # If the user has removed them, what is there now may be somebody else's.
        if os.path.samestat(os.stat(directory / DATA), os.fstat(file)):
            (directory / NOTE).unlink(missing_ok=True)
            (directory / DATA).unlink()
            _remove_directory(directory, made)
    os.close(file)


def _remove_directory(directory: Path, made: bool) -> None:
    if made:
        with suppress(OSError):
            directory.rmdir()
