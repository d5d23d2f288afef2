"""States in a file: the same bits, bounded memory, and a directory that nobody else uses."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

import fusedopt as fo
from exactness import RULES, SERIAL, Array, run_python
from formatted import ADAMW, BF16, WAYS, assert_same, held, run
from formatted import RULES as STORED
from fusedopt.arrays import state_file
from fusedopt.arrays.stored import WINDOW
from fusedopt.step.assembly import Assembly

resource = pytest.importorskip("resource", reason="state_path is for POSIX systems")

LEAVES = {"a": 5003, "b": 70_001, "c": 1, "d": 4096, "e": 0}
"""In the small windows of these tests, leaves in many parts and parts of many leaves."""


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_file, "WINDOW", 1 << 16)


def make(path: Path | str, n: int = 1000, **options: Any) -> tuple[fo.Optimizer, Array]:
    """An optimizer of one array, and a gradient."""
    p, g = np.random.default_rng(n).standard_normal((2, n), np.float32)
    return fo.Optimizer(p, fo.AdamW(), state_path=path, **options), g


# ---------------------------------------------------------------- results


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_format_has_the_same_bits(
    way: Any, threads: int, windows: None, tmp_path: Path
) -> None:
    for name, rule in STORED.items():
        want = run(rule, way, LEAVES, threads=threads)
        got = run(rule, way, LEAVES, state_path=tmp_path / name, threads=threads)
        assert_same(got, want, name)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule_has_the_same_bits(rule: fo.Rule, windows: None, tmp_path: Path) -> None:
    if rule.states:
        leaves = {"a": SERIAL + 300, "b": 700}
        want = run(rule, WAYS["float32"], leaves)
        assert_same(run(rule, WAYS["float32"], leaves, state_path=tmp_path), want, repr(rule))


def test_other_backends_and_verified_steps(windows: None, tmp_path: Path) -> None:
    ways: list[dict[str, Any]] = [{"backend": "reference"}, {"verify": True}]
    for options in ways:
        want = run(ADAMW, WAYS["float32"], LEAVES, **options)
        assert_same(run(ADAMW, WAYS["float32"], LEAVES, state_path=tmp_path, **options), want)


def test_what_changes_an_optimizer_changes_the_file(windows: None, tmp_path: Path) -> None:
    """Beside an optimizer in memory: masters, loading, new arrays, other hyperparameters."""
    rng = np.random.default_rng(0)
    start, g, other = (rng.standard_normal(70_001).astype(BF16) for _ in range(3))

    def history(**options: Any) -> dict[str, Array]:
        p = start.copy()
        optimizer = fo.Optimizer(p, fo.AdaGrad(initial_accumulator=0.1), **options)
        optimizer.step(g)
        saved = optimizer.state_dict()
        optimizer.step(other)
        optimizer.load_state_dict(saved)
        optimizer.replace(weight_decay=0.1)
        optimizer.rebind(other.copy())
        optimizer.step(g)
        optimizer.params[:100] = 1
        optimizer.sync()
        optimizer.flush()
        optimizer.step(g)
        return held(optimizer)

    want = history(master="float32")
    assert_same(history(master="float32", state_path=tmp_path), want)


def test_what_is_done_around_the_rules(windows: None, tmp_path: Path) -> None:
    """Clipping, averages and statistics, of accumulated gradients."""

    def history(**options: Any) -> tuple[list[fo.StepInfo], dict[str, Array]]:
        p, *grads = np.random.default_rng(0).standard_normal((4, SERIAL + 300), np.float32)
        optimizer = fo.Optimizer(p, ADAMW, clip_norm=1.0, ema=0.9, stats=True, **options)
        infos = []
        for g in grads:
            optimizer.accumulate(g)
            optimizer.accumulate(grads[0])
            infos.append(optimizer.step(grad_scale=2.0))
        return infos, held(optimizer)

    infos, want = history()
    stored_infos, got = history(state_path=tmp_path)
    assert stored_infos == infos
    assert_same(got, want)


def test_all_that_an_optimizer_keeps_is_in_the_file(tmp_path: Path) -> None:
    ways: dict[str, dict[str, Any]] = {
        "quantised": {"state_dtype": "dynamic8", "master": "float32"},
        "split16": {"master": "split16"},
        "kahan": {"rounding": "kahan"},
    }
    for name, options in ways.items():
        where = tmp_path / name
        p = np.ones((70, 80), BF16)
        optimizer = fo.Optimizer({"w": p}, ADAMW, state_path=where, **options)
        optimizer.step({"w": p.copy()})
        optimizer.flush()
        note = json.loads((where / "scratch.json").read_text())
        assert "not a checkpoint" in note["what"]
        assert (note["pid"], note["host"]) == (os.getpid(), os.uname().nodename)
        stored = (where / "scratch.bin").read_bytes()
        assert len(stored) == note["bytes"]
        saved = optimizer.state_dict()["leaves"]["w"]["state"]
        assert list(note["layout"]["w"]) == list(saved)
        for key, a in saved.items():
            place = note["layout"]["w"][key]
            assert (place["dtype"], tuple(place["shape"])) == (a.dtype.name, a.shape)
            at = place["offset"]
            assert stored[at : at + a.nbytes] == a.tobytes(), (name, key)


# ---------------------------------------------------------------- memory

RESIDENT = """
import re, sys
from pathlib import Path
import ml_dtypes, numpy as np
import fusedopt as fo
from fusedopt.step.assembly import Assembly

def rss(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

def mapped():
    smaps = Path("/proc/self/smaps").read_text()
    return int(re.search(r"scratch\\.bin\\n(?:.*\\n)*?Rss:\\s+(\\d+)", smaps)[1]) << 10

n, small = 1 << 25, 1000
params = [np.ones(n - 999 * small, ml_dtypes.bfloat16), *np.ones((999, small), ml_dtypes.bfloat16)]
grads = [np.full(p.shape, 0.1, p.dtype) for p in params]
path, threads = sys.argv[1:]
options = {"state_dtype": "float64", "state_path": path, "threads": int(threads)}
optimizer = fo.Optimizer(params, fo.Adam(), **options)
for _ in range(2):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = rss("VmRSS")
    optimizer.step(grads)
    print(rss("VmHWM") - before, mapped())
optimizer.flush()
print(mapped(), optimizer.state["0"]["v"][-1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded and measured on Linux")
@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_step_has_a_window_in_memory(threads: str, tmp_path: Path) -> None:
    """512 MiB of states; in memory, at most 64 MiB more in the step, and next to none after it."""
    command = [sys.executable, "-c", RESIDENT, str(tmp_path), threads]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second, flushed = (line.split() for line in done.stdout.splitlines())
    for peak, left in (first, second):
        assert int(peak) < 64 << 20, f"{peak} bytes at a time"
        assert int(left) < 1 << 20, f"{left} bytes after the step"
    assert int(flushed[0]) == 0
    assert float(flushed[1]) > 0


def test_what_is_said(tmp_path: Path) -> None:
    n = 10_000_000
    p = np.broadcast_to(np.float32(0), n)
    known = fo.estimate(p, fo.AdamW(), state_path=tmp_path / "x")
    assert (known.states, known.disk) == (WINDOW, 8 * n)
    assert known.total == 4 * n + WINDOW
    assert fo.estimate(p, fo.AdamW()).disk == 0
    assert not (tmp_path / "x").exists()
    optimizer, _ = make(tmp_path / "x")
    assert f"8000 of states in {tmp_path / 'x'} (scratch;" in optimizer.describe()


# ---------------------------------------------------------------- directories


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refused(path: Any, kind: type[Exception], *words: str) -> None:
    with pytest.raises(kind) as caught:
        make(path)
    message = str(caught.value)
    assert all(word in message for word in ("state_path", *words)), message


def test_two_optimizers_do_not_share_a_directory(tmp_path: Path) -> None:
    optimizer, g = make(tmp_path)
    before = contents(tmp_path)
    refused(tmp_path, FileExistsError, str(tmp_path), f"in use by process {os.getpid()} on")
    assert contents(tmp_path) == before
    optimizer.step(g)


def test_a_killed_process_leaves_scratch_that_is_refused(tmp_path: Path) -> None:
    program = """
import os, signal, sys
import numpy as np
import fusedopt as fo
from fusedopt.step.assembly import Assembly
optimizer = fo.Optimizer(np.ones(1000), fo.Adam(), state_path=sys.argv[1])
optimizer.step(np.ones(1000))
print(os.getpid(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = contents(tmp_path)
    pid = int(done.stdout)
    refused(tmp_path, FileExistsError, f"process {pid} on", "has ended", "delete", "scratch.bin")
    assert contents(tmp_path) == before
    (tmp_path / "scratch.json").write_text("[]")
    refused(tmp_path, FileExistsError, "an unknown process", "has ended")
    for name in before:
        (tmp_path / name).unlink()
    make(tmp_path)


def test_other_directories_are_refused(tmp_path: Path) -> None:
    for k in range(5):
        (tmp_path / f"mine{k}").write_text("dear")
    before = contents(tmp_path)
    refused(tmp_path, FileExistsError, "not empty (mine0, mine1, mine2, ...)", "empty or a new")
    refused(tmp_path / "mine0", FileExistsError, "no directory")
    refused(tmp_path / "none" / "x", OSError, "cannot be made (No such file")
    refused(3, TypeError, "expected a directory's path, got 3")
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match="state_path: no leaf has a state"):
        fo.Optimizer(np.ones(3), fo.SGD(), state_path=tmp_path / "new")
    assert contents(tmp_path) == before


def test_windows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    refused(tmp_path / "new", RuntimeError, "Windows", "leave it out")
    assert contents(tmp_path) == {}


def test_files_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", denied)
        refused(tmp_path / "new", OSError, "cannot write there (Permission denied)")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", denied)
        with pytest.raises(PermissionError):
            make(tmp_path / "new")
    assert contents(tmp_path) == {}


# ---------------------------------------------------------------- full disks


@pytest.fixture(params=["posix_fallocate", "zeros"])
def reserving(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to reserve space."""
    if request.param == "zeros":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)


def full(path: Path, code: int) -> None:
    """Construction fails, says so, and leaves nothing, neither in an old directory nor in a new."""
    for where in (path, path / "new"):
        with pytest.raises(OSError, match=r"cannot reserve 8000064 bytes.*make room") as caught:
            make(where, n=1_000_000)
        assert caught.value.errno == code
        assert contents(path) == {}


def test_a_limit_on_file_sizes(tmp_path: Path, reserving: None) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        full(tmp_path, errno.EFBIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk(tmp_path: Path, reserving: None) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk cannot be mounted here")
    try:
        full(tmp_path, errno.ENOSPC)
        make(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_file_systems_that_cannot_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: int) -> NoReturn:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    optimizer, g = make(tmp_path, n=1_000_000)
    status = (tmp_path / "scratch.bin").stat()
    assert status.st_blocks * 512 >= status.st_size >= 8_000_000
    optimizer.step(g)


# ---------------------------------------------------------------- the end


def test_the_files_go_with_the_optimizer(tmp_path: Path) -> None:
    for where in (tmp_path, tmp_path / "new"):
        optimizer, g = make(where)
        optimizer.step(g)
        m = optimizer.state["params"]["m"]
        kept = m.copy()
        (where / "mine").write_text("dear")
        assert sorted(contents(where)) == ["mine", "scratch.bin", "scratch.json"]
        del optimizer
        assert contents(where) == {"mine": b"dear"}
        assert m.tobytes() == kept.tobytes()
        (where / "mine").unlink()
    optimizer, _ = make(tmp_path / "newer")
    del optimizer
    assert not (tmp_path / "newer").exists()


def test_what_was_put_in_their_place_stays(tmp_path: Path) -> None:
    first, _ = make(tmp_path)
    for name in contents(tmp_path):
        (tmp_path / name).unlink()
    second, g = make(tmp_path)
    before = contents(tmp_path)
    del first
    assert contents(tmp_path) == before
    second.step(g)


def test_the_files_go_with_the_process(tmp_path: Path) -> None:
    run_python(
        "import sys, numpy as np, fusedopt as fo\n"
        f"opt = fo.Optimizer(np.ones(9), fo.Adam(), state_path={str(tmp_path)!r})\n"
        "opt.step(np.ones(9))"
    )
    assert contents(tmp_path) == {}


def test_nothing_stays_of_what_could_not_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(Assembly, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy], ids=["pickle", "deepcopy"])
def test_copies_are_refused(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    optimizer, _ = make(tmp_path)
    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*state_dict"):
        copied(optimizer)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_refused(tmp_path: Path) -> None:
    optimizer, g = make(tmp_path, ema=0.5)
    saved, averages = optimizer.state_dict(), optimizer.averaged()
    calls: list[Callable[[], Any]] = [
        lambda: optimizer.step(g),
        lambda: optimizer.accumulate(g),
        lambda: optimizer.step_part(["params"], [g]),
        lambda: optimizer.load_state_dict(saved),
        lambda: optimizer.save(tmp_path / "never"),
        lambda: optimizer.rebind(optimizer.params.copy()),
        lambda: optimizer.replace(weight_decay=0.5),
        lambda: optimizer.state,
        averages.__enter__,
        optimizer.averaged,
        optimizer.fingerprint,
        optimizer.flush,
        optimizer.state_dict,
        optimizer.synchronize,
        optimizer.sync,
    ]
    child = os.fork()
    if child == 0:
        refusals = 0
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                refusals += "fork" in str(error)
        del optimizer, averages, calls, call
        os._exit(refusals)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == len(calls)
    assert sorted(contents(tmp_path)) == ["scratch.bin", "scratch.json"]
    optimizer.step(g)
