"""Checkpoints in files: every bit comes back, and no kill leaves half of one."""

from __future__ import annotations

import copy
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import fusedopt as fo
from formatted import (
    ADAMW,
    BF16,
    RULES,
    WAYS,
    Way,
    assert_same,
    draw,
    everything,
    grads,
    held,
    made,
)
from fusedopt.arrays import safetensors_file
from fusedopt.arrays.file_set import read_metadata

ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def tree(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"w": rng.standard_normal((80, 60)), "b": [rng.standard_normal(5).astype(np.float32)]}


# ---------------------------------------------------------------- every bit


@ways
@pytest.mark.parametrize("rule", [ADAMW, RULES["rmsprop"]], ids=lambda rule: rule.name)
def test_one_file_resumes_a_run(way: Way, rule: fo.Rule, tmp_path: Path) -> None:
    straight, resumed = made(way, rule, seed=3), made(way, rule, seed=50)
    for t in (10, 20):
        straight.step(grads(way, t))
    straight.save(tmp_path / "run")
    want = everything(straight)
    resumed.load(str(tmp_path / "run"))
    got = everything(resumed)
    for name, a in want.items():  # bits, NaNs too
        np.testing.assert_array_equal(got[name].view(np.uint8), a.view(np.uint8), err_msg=name)
    for opt in (straight, resumed):
        opt.step(grads(way, 30))
    assert_same(everything(resumed), everything(straight))
    assert resumed.fingerprint() == straight.fingerprint()


def odd(seed: int) -> dict[str, Any]:
    f = np.asfortranarray(draw(seed, (70, 80), np.float32))
    return {"f": f, "none": np.ones((0, 3)), "one": np.array(2.0 + seed), "": draw(seed, 4, BF16)}


ELEMENTWISE = [rule for rule in (cls() for cls in fo.RULES.values()) if rule.program.phases == 1]


@pytest.mark.parametrize("rule", ELEMENTWISE)
def test_every_rule_and_shape(rule: fo.Rule, tmp_path: Path) -> None:
    state_dtype = "float8" if rule.states else None
    opt = fo.Optimizer(odd(0), rule, seed=1 << 70, state_dtype=state_dtype, ema=0.9)
    opt.step({**odd(1), "none": None})
    opt.save(tmp_path / "run")
    twin = fo.Optimizer(odd(2), rule, state_dtype=state_dtype, ema=0.9)
    twin.load(tmp_path / "run")
    assert_same(held(twin), held(opt))
    saved = twin.state_dict()
    assert (saved["step"], saved["seed"]) == (1, 1 << 70)
    assert [entry["t"] for entry in saved["leaves"].values()] == [1, 0, 1, 1]


def test_states_alone(tmp_path: Path) -> None:
    opt, other = (fo.Optimizer(tree(seed), fo.AdamW()) for seed in (0, 1))
    opt.step(tree(2))
    opt.save(tmp_path / "states", parameters=False)
    opt.save(tmp_path / "all")
    before = everything(other)
    with pytest.raises(ValueError, match=r"states: holds no parameters.*parameters=False"):
        other.load(tmp_path / "states")
    assert_same(everything(other), before)
    for name in ("states", "all"):
        fresh = fo.Optimizer(tree(1), fo.AdamW())
        fresh.load(tmp_path / name, parameters=False)
        np.testing.assert_equal(fresh.params, tree(1))
        np.testing.assert_equal(fresh.state, opt.state)
        assert fresh.step_count == 1


def test_the_file_is_an_ordinary_one(tmp_path: Path) -> None:
    params: dict[str, Any] = {
        "block": [{"w": draw(0, (3, 4), BF16)}],
        "f": np.ones((2, 3), order="F"),
    }
    opt = fo.Optimizer(params, fo.Momentum(), master="split16")
    opt.step(copy.deepcopy(params))
    opt.save(tmp_path / "run.safetensors")
    found = load_file(tmp_path / "run.safetensors")
    names = {f"{kind}:{path}" for kind in "pv" for path in ("block.0.w", "f")}
    assert set(found) == names | {"low:block.0.w"}
    np.testing.assert_array_equal(found["p:block.0.w"], params["block"][0]["w"])
    np.testing.assert_array_equal(found["v:f"], opt.state["f"]["v"].T)
    assert found["low:block.0.w"].dtype == np.uint16


def test_nothing_is_copied(tmp_path: Path) -> None:
    """In a process that may hold the optimizer once, and not one and a half times."""
    program = """
import resource, sys
import numpy as np, safetensors.numpy, fusedopt as fo
import fusedopt.arrays.safetensors_file
params = [np.ones((1000, 4000), np.float32, order="F") for _ in range(4)]
opt = fo.Optimizer(params, fo.AdamW())
opt.step([np.ones_like(params[0])] * 4)
held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
opt.save(sys.argv[1])
saved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
whole = 3 * 16 * 4_000_000  # a parameter and two states, four leaves of 4 bytes each
resource.setrlimit(resource.RLIMIT_AS, (size + whole + whole // 3, -1))  # the mapping, and a third
opt.load(sys.argv[1])
print(held, saved)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "run"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    before, after = map(int, done.stdout.split())
    assert after - before < 20_000, "KiB, of 192,000"


# ---------------------------------------------------------------- kills

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np, safetensors.numpy
import fusedopt as fo
path = Path(sys.argv[1])
def optimizer():
    params = {"a": np.zeros(60_000, np.float32), "f": np.zeros((3, 2), order="F")}
    return fo.Optimizer(params, fo.Momentum(), backend="reference")
def arrays(opt):
    return [opt.params["a"], opt.params["f"], *(s["v"] for s in opt.state.values())]
def save_on(n):
    opt = optimizer()
    saved = opt.state_dict()
    while True:
        n += 1
        opt.load_state_dict({**saved, "step": n})
        for a in arrays(opt):
            a[...] = n
        opt.save(path)
rng, last, strays = random.Random(0), 0, 0
optimizer().save(path)
for k in range(2000):
    if k >= 100 and last > 20 and strays > 10:
        break
    child = os.fork()
    if not child:
        save_on(last)
    time.sleep(rng.uniform(0, 0.03 + k / 5000))  # a busy machine needs more
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = optimizer()
    found.load(path)
    assert all((a == found.step_count).all() for a in arrays(found)), found.step_count
    assert found.step_count >= last
    last = found.step_count
    left = sorted(p.name for p in path.parent.iterdir())
    assert len(left) <= 2, left
    strays += len(left) - 1
optimizer().save(path)
print(last, strays, *(p.name for p in path.parent.iterdir()))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills by a signal")
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "run.safetensors"],
        capture_output=True, text=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    saves, strays, *left = done.stdout.split()
    assert int(saves) > 20  # files were replaced
    assert int(strays) > 10  # and kills did arrive in the middle of saves
    assert left == ["run.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="elsewhere directories cannot be opened")
def test_the_disk_has_the_file_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[tuple[str, int]] = []
    fsync, replace = os.fsync, Path.replace

    def recorded_fsync(file: int) -> None:
        happened.append(("fsync", os.fstat(file).st_ino))
        fsync(file)

    def recorded_replace(self: Path, target: Path) -> Path:
        happened.append(("replace", self.stat().st_ino))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    fo.Optimizer(tree(), ADAMW).save(tmp_path / "run")
    file, directory = ((tmp_path / name).stat().st_ino for name in ("run", "."))
    assert happened == [("fsync", file), ("replace", file), ("fsync", directory)]


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    opt = fo.Optimizer(tree(), fo.AdamW())
    opt.save(tmp_path / "run")
    before = (tmp_path / "run").read_bytes()
    opt.step(tree(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="run: could not be written"):
            opt.save(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(OSError, match="missing"):
        opt.save(tmp_path / "missing" / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run").read_bytes() == before


def test_what_else_belongs_to_the_moment_travels_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt, file = fo.Optimizer(tree(), fo.AdamW()), tmp_path / "run"
    opt.save(file)
    assert opt.load(file) is None
    kept = {"losses": [0.1, 1e-300], "generator": np.random.default_rng(1).bit_generator.state}
    opt.save(file, metadata=kept)
    assert opt.load(file) == read_metadata(file) == kept
    with pytest.raises(TypeError, match="complex"):
        opt.save(file, metadata=1j)
    monkeypatch.setattr(safetensors_file, "HEADER_MOST", 10_000)
    with pytest.raises(ValueError, match=r"run: \d+ bytes of metadata are too many to be read"):
        opt.save(file, metadata="x" * 5_000)
    assert read_metadata(file) == kept
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_links_and_permissions_stay(tmp_path: Path) -> None:
    opt = fo.Optimizer(tree(), fo.AdamW())
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/run")
    (tmp_path / "plain").touch()
    opt.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    real = tmp_path / "there" / "run"
    assert real.stat().st_mode == (tmp_path / "plain").stat().st_mode
    real.chmod(0o600)
    dead = 1 << 22  # beyond the numbers of processes
    others = real.with_name(
        f"{safetensors_file._beginning(real.with_name('more'))}{dead}-12345678.saving"
    )
    others.mkdir()
    mine = real.with_name(f"{safetensors_file._beginning(real)}{dead}-12345678.saving")
    mine.mkdir()
    opt.save(tmp_path / "link")
    assert real.stat().st_mode & 0o777 == 0o600
    assert {p.name for p in real.parent.iterdir()} == {"run", others.name}


def test_a_verified_optimizer_takes_what_was_loaded(tmp_path: Path) -> None:
    way = WAYS["masters and copies"]
    made(way, seed=3).save(tmp_path / "run")
    opt = made(way, verify=True)
    opt.step(grads(way, 10))
    opt.load(tmp_path / "run")
    assert opt.step(grads(way, 20)).step == 1
