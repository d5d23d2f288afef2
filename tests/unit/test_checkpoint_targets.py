"""What a checkpoint may be saved to and loaded from: files, nothing that a file would replace."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import fusedopt as fo
from exactness import run_python
from fusedopt.arrays.file_array import File

pytestmark = pytest.mark.skipif(
    os.name != "posix", reason="devices, pipes and permissions of POSIX"
)


def optimizer(value: float = 1.0) -> fo.Optimizer:
    return fo.Optimizer(np.full(4, value, np.float32), fo.AdamW())


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(os.fspath(path))


def make_device(path: Path) -> None:
    with suppress(PermissionError):  # an ordinary user links to one instead
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        return
    path.symlink_to("/dev/null")


SPECIAL: dict[str, Callable[[Path], None]] = {
    "pipe": lambda path: os.mkfifo(path),
    "socket": make_socket,
    "device": make_device,
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("linked", [False, True])
def test_saving_replaces_no_special_file(kind: str, linked: bool, tmp_path: Path) -> None:
    path = tmp_path / "special"
    SPECIAL[kind](path)
    given = tmp_path / "link" if linked else path
    if linked:
        given.symlink_to(path)
    before = path.stat()
    with pytest.raises(OSError, match=f"give the path of a file.*{path.name}|{path.name}"):
        optimizer().save(given)
    after = path.stat()
    assert (after.st_mode, after.st_ino) == (before.st_mode, before.st_ino)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, given.name}


@pytest.mark.parametrize("kind", SPECIAL)
def test_loading_a_special_file_does_not_wait(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "special"
    SPECIAL[kind](path)
    opt = optimizer()
    before = opt.fingerprint()
    with pytest.raises(OSError, match=path.name):
        opt.load(path)
    assert opt.fingerprint() == before


USER = """
import os, sys
import numpy as np, fusedopt as fo
path = sys.argv[1]
opt = fo.Optimizer(np.ones(4, np.float32), fo.AdamW())
opt.save(path + ".warm")
if os.getuid() == 0:
    os.setuid(65534)
opt.save(path)
os.chmod(path, 0o444)
opt.step(np.ones(4, np.float32))
opt.save(path)
assert os.stat(path).st_mode & 0o777 == 0o444
os.umask(0o222)
opt.save(path + ".new")
assert os.stat(path + ".new").st_mode & 0o777 == 0o444
found = fo.Optimizer(np.zeros(4, np.float32), fo.AdamW())
found.load(path)
assert found.fingerprint() == opt.fingerprint()
"""


def test_an_ordinary_user_saves_over_a_file_that_is_read_only() -> None:
    # Not below pytest's own folder, which each pytest that begins takes for its user alone.
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        place.chmod(0o777)
        for folder in place.parents:  # of the tests' user alone
            if folder.owner() == place.owner() and folder != Path(folder.root):
                with suppress(PermissionError):
                    folder.chmod(folder.stat().st_mode | 0o011)
        code = USER.replace("sys.argv[1]", repr(os.fspath(place / "run")))
        done = run_python(code)
        assert done.returncode == 0, done.stderr


def test_a_name_may_be_as_long_as_a_name_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    opt = optimizer()
    opt.save(path)
    found = optimizer(0.0)
    found.load(path)
    assert found.fingerprint() == opt.fingerprint()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


SAVER = """
import sys
import numpy as np, fusedopt as fo
value = float(sys.argv[2])
opt = fo.Optimizer(np.full(1000, value, np.float32), fo.AdamW())
for _ in range(25):
    opt.save(sys.argv[1])
"""


def test_several_processes_that_save_to_one_path_all_succeed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    savers = [
        subprocess.Popen(
            [sys.executable, "-c", SAVER, path, str(k)], stderr=subprocess.PIPE, text=True
        )
        for k in range(4)
    ]
    for saver in savers:
        _, told = saver.communicate(timeout=120)
        assert saver.returncode == 0, told
    p = np.empty(1000, np.float32)
    fo.Optimizer(p, fo.AdamW()).load(path)
    assert (p == p[0]).all()
    assert p[0] in range(4)
    assert [f.name for f in tmp_path.iterdir()] == ["run"]


def damage(path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Have the file shortened when so many pieces of it have been read."""
    read_into = File.read_into
    count = iter(range(1000))

    def read(file: File, memory: memoryview, begin: int) -> None:
        if file.path == os.fspath(path) and next(count) == after:
            os.truncate(path, begin + len(memory) // 2)
        read_into(file, memory, begin)

    monkeypatch.setattr(File, "read_into", read)


@pytest.mark.parametrize("after", range(3, 10))
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_file_that_is_truncated_while_it_is_read(
    after: int, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(value: float) -> fo.Optimizer:
        params = [np.full((40, 128), value, np.float32, "F"), np.full(3, value, np.float32)]
        return fo.Optimizer(params, fo.AdamW(), state_dtype="dynamic8", backend=backend)

    grads = [np.ones((40, 128), np.float32), np.ones(3, np.float32)]
    saved = make(3.0)
    saved.step(grads)
    saved.save(tmp_path / "run")
    saved.save(tmp_path / "damaged")
    opt = make(1.0)
    before = opt.fingerprint()
    with monkeypatch.context() as patch:
        damage(tmp_path / "damaged", patch, after)
        with pytest.raises(OSError, match=r"ended while it was read.*damaged"):
            opt.load(tmp_path / "damaged")
    if opt.fingerprint() != before:
        for use in (
            lambda: opt.step(grads),
            lambda: opt.accumulate(grads),
            opt.state_dict,
            lambda: opt.save(tmp_path / "never"),
        ):
            with pytest.raises(RuntimeError, match="load a whole file first"):
                use()
    opt.load(tmp_path / "run")
    for each in (saved, opt):
        each.step(grads)
    assert opt.fingerprint() == saved.fingerprint()
