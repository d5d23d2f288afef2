"""Checkpoints in files: every bit comes back, no kill leaves half of one, nothing else is taken."""

from __future__ import annotations

import copy
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import fusedopt as fo
from formatted import ADAMW, BF16, RULES, WAYS, Way, assert_same, draw, grads, held, made
from fusedopt import container, schedules

ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def everything(opt: fo.Optimizer) -> dict[str, Any]:
    """What an optimizer and its caller hold, copies and counters included."""
    copies = opt._options.copy_out
    found = held(opt, copies and {"a": copies["a"]})
    saved = opt.state_dict()
    counters = [saved["step"], saved["seed"], *(e["t"] for e in saved["leaves"].values())]
    return {**found, "counters": np.array(counters)}


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


@pytest.mark.parametrize("rule", [cls() for name, cls in fo.RULES.items() if name != "muon"])
def test_every_rule_and_shape(rule: fo.Rule, tmp_path: Path) -> None:
    state_dtype = "float8" if rule.states else None
    opt = fo.Optimizer(odd(0), rule, seed=1 << 70, state_dtype=state_dtype)
    opt.step({**odd(1), "none": None})
    opt.save(tmp_path / "run")
    twin = fo.Optimizer(odd(2), rule, state_dtype=state_dtype)
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
import fusedopt.container
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
for _ in range(100):
    child = os.fork()
    if not child:
        save_on(last)
    time.sleep(rng.uniform(0, 0.03))
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


@pytest.mark.skipif(os.name != "posix", reason="kills by a signal")
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "run.safetensors"],
        capture_output=True, text=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    saves, strays, *left = done.stdout.split()
    assert int(saves) > 100  # files were replaced
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
    others = tmp_path / "there" / ".run.more.12345678.saving"  # of the file run.more
    others.mkdir()
    (tmp_path / "there" / ".run.12345678.saving").mkdir()
    opt.save(tmp_path / "link")
    assert real.stat().st_mode & 0o777 == 0o600
    assert {p.name for p in real.parent.iterdir()} == {"run", others.name}


# ---------------------------------------------------------------- refusals


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    opt = fo.Optimizer(tree(), ADAMW)
    opt.step(tree(1))
    opt.save(tmp_path / "run")
    return tmp_path / "run"


def assert_refused(path: Path, match: str, **options: Any) -> None:
    opt = fo.Optimizer(tree(5), ADAMW)
    opt.step(tree(6))
    before = everything(opt)
    with pytest.raises(ValueError, match=match) as raised:
        opt.load(path, **options)
    assert str(path) in str(raised.value)
    assert_same(everything(opt), before)


def test_every_truncation_is_refused(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    cut = tmp_path / "cut"
    for n in (0, 1, 7, 8, 9, 100, size - 1, size, size + 1, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:n])
        assert_refused(cut, "not a whole safetensors file")
    cut.write_bytes(whole + b"\0")
    assert_refused(cut, "not a whole safetensors file")


HUGE = 1 << 60


def first(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = header["p:w"]
    return entry


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "shape": lambda h: first(h).update(shape=[HUGE, HUGE]),
    "zeros": lambda h: first(h).update(shape=[HUGE, HUGE, 0]),
    "dimensions": lambda h: first(h).update(shape=[1] * 100),
    "negative": lambda h: first(h).update(shape=[-80, -60]),
    "fraction": lambda h: first(h).update(shape=[80.0, 60]),
    "no shape": lambda h: first(h).pop("shape"),
    "dtype": lambda h: first(h).update(dtype="F128"),
    "unhashable": lambda h: first(h).update(dtype=[]),
    "beyond": lambda h: first(h).update(data_offsets=[HUGE, HUGE + 38400]),
    "before": lambda h: first(h).update(data_offsets=[-8, 38392]),
    "backwards": lambda h: first(h).update(data_offsets=[38400, 0]),
    "three": lambda h: first(h).update(data_offsets=[0, 1, 2]),
    "overlap": lambda h: first(h).update(h["m:w"], shape=[8, 600]),
    "no entry": lambda h: h.update({"p:w": None}),
    "metadata": lambda h: h.update(__metadata__=[]),
    "left out": lambda h: h.pop("p:w"),
}


def rewritten(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def taken_apart(path: Path) -> tuple[dict[str, Any], bytes]:
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:size]), whole[size:]


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers(spoil: Callable[[dict[str, Any]], object], saved: Path) -> None:
    header, data = taken_apart(saved)
    spoil(header)
    rewritten(saved, header, data)
    assert_refused(saved, r"not a whole safetensors file|does not fit")


@pytest.mark.parametrize(
    "text", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000]
)
def test_hostile_texts(text: bytes, saved: Path) -> None:
    _, data = taken_apart(saved)
    rewritten(saved, text, data)
    assert_refused(saved, "not a whole safetensors file")


def test_lengths_by_the_files_own_word(saved: Path) -> None:
    for size in (1 << 63, (1 << 64) - 1, container.HEADER_MOST + 1):
        saved.write_bytes(size.to_bytes(8, "little") + b"{}")
        assert_refused(saved, "cannot begin with a header of")


SPOILT: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "later": (lambda d: d.update(format=2), "expected a dict of format 1, got 2"),
    "no leaves": (lambda d: d.pop("leaves"), "table of leaves"),
    "list": (lambda d: d.update(leaves=[]), "table of leaves"),
    "no leaf": (lambda d: d["leaves"].update(w=3), "table of leaves"),
    "no order": (lambda d: d["leaves"]["w"].pop("order"), "table of leaves"),
    "step": (lambda d: d.update(step=True), "expected a step"),
    "late": (lambda d: d.update(step=1 << 64), "expected a step"),
    "seed": (lambda d: d.update(seed=-1), "a seed >= 0"),
    "t": (lambda d: d["leaves"]["b.0"].update(t=1 << 63), "b.0: expected t >= 0 and below"),
    "rule": (lambda d: d["leaves"]["w"].update(rule="lion"), "w: rule adamw here, lion there"),
    "order": (lambda d: d["leaves"]["w"].update(order="F"), "w: order C here, F there"),
    "formats": (lambda d: d["leaves"]["w"].update(formats={}), "w: formats"),
    "value": (
        lambda d: d["leaves"]["w"]["hyperparameters"].update(betas=[0.9, 0.98]),
        r"w: betas \[0.9, 0.999\] here, \[0.9, 0.98\] there",
    ),
}


@pytest.mark.parametrize(("spoil", "match"), SPOILT.values(), ids=SPOILT)
def test_spoilt_tables(spoil: Callable[[dict[str, Any]], object], match: str, saved: Path) -> None:
    header, data = taken_apart(saved)
    table = json.loads(header["__metadata__"]["fusedopt"])
    spoil(table)
    header["__metadata__"]["fusedopt"] = json.dumps(table)
    rewritten(saved, header, data)
    assert_refused(saved, match)


def test_other_files(tmp_path: Path) -> None:
    save_file({"p:w": np.ones(3)}, tmp_path / "run")
    assert_refused(tmp_path / "run", "is a safetensors file, but not one that Optimizer.save wrote")
    opt = fo.Optimizer(tree(), ADAMW)
    with pytest.raises(FileNotFoundError):
        opt.load(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        opt.load(tmp_path)


def test_every_misfit_is_named(saved: Path) -> None:
    params = {"w": np.ones((80, 60), np.float32), "c": np.ones(3)}
    opt = fo.Optimizer(params, {"w": fo.AdamW(lr=1.0, amsgrad="raw"), "c": fo.Lion()})
    with pytest.raises(ValueError, match="does not fit") as raised:
        opt.load(saved)
    for part in (
        "b.0: is no leaf here",
        "c: is not in it",
        "w: dtype float32 here, float64 there",
        "w: lr 1.0 here, 0.01 there",
        "w: amsgrad 'raw' here, False there",
        "w: p: float32 of shape (80, 60) here, float64 of shape (80, 60) there",
        "w: states ['p', 'm', 'v', 'x'] here, ",
    ):
        assert part in str(raised.value)


def test_hyperparameters() -> None:
    opt = fo.Optimizer(tree(), fo.RMSProp(lr=schedules.Linear(0.1, steps=9)))
    saved = opt.state_dict()
    for rule, differing in (
        (fo.RMSProp(lr=schedules.Linear(0.1, steps=8)), "lr 'Linear"),
        (fo.RMSProp(lr=0.1), "lr 0.1 here, 'Linear"),
        (fo.RMSProp(lr=lambda step: 0.1), "lr 'a callable' here"),
        (fo.RMSProp(lr=schedules.Linear(0.1, steps=9), rho=0.99), "rho 0.99 here, 0.9 there"),
    ):
        other = fo.Optimizer(tree(), rule)
        with pytest.raises(ValueError, match="does not fit") as raised:
            other.load_state_dict(saved)
        assert all(f"{path}: {differing}" in str(raised.value) for path in ("w", "b.0"))
        other.load_state_dict(saved, strict=False)
    settled = fo.Optimizer(tree(), fo.RMSProp(initial_accumulator=1.0))
    with pytest.raises(ValueError, match=r"initial_accumulator 1.0 here, 0.0 there") as raised:
        settled.load_state_dict(saved, strict=False)
    assert "lr" not in str(raised.value)
    same = fo.Optimizer(tree(), fo.RMSProp(lr=schedules.Linear(0.1, steps=9)))
    same.load_state_dict(saved)


def test_hyperparameters_of_files(saved: Path) -> None:
    other = fo.Optimizer(tree(), fo.AdamW(lr=0.5))
    with pytest.raises(ValueError, match=r"lr 0.5 here, 0.01 there"):
        other.load(saved)
    other.load(saved, strict=False)
    assert other.step(tree(1)).lr == 0.5


def test_codes_of_another_memory_order_are_refused() -> None:
    """They lie in the parameter's order, so that they would be paired with other elements."""
    p = draw(0, (64, 80), np.float32)
    for state_dtype in ("dynamic8", None):
        opt = fo.Optimizer(p, fo.AdamW(), state_dtype=state_dtype)
        turned = fo.Optimizer(np.asfortranarray(p), fo.AdamW(), state_dtype=state_dtype)
        with pytest.raises(ValueError, match=r"params: order F here, C there"):
            turned.load_state_dict(opt.state_dict())


def test_counters_beyond_the_cores_change_nothing() -> None:
    opt = fo.Optimizer(tree(), fo.AdamW())
    opt.step(tree(1))
    saved, before = opt.state_dict(), everything(opt)
    for spoil in ({"step": 1 << 63}, {"step": True}):
        with pytest.raises(ValueError, match="state_dict does not fit"):
            opt.load_state_dict({**copy.deepcopy(saved), **spoil})
    late = copy.deepcopy(saved)
    late["leaves"]["b.0"]["t"] = 1 << 63
    late["leaves"]["w"]["state"]["m"] += 1
    with pytest.raises(ValueError, match=r"b\.0: expected t"):
        opt.load_state_dict(late)
    assert_same(everything(opt), before)


def test_inside_of_lookahead(tmp_path: Path) -> None:
    opt = fo.Optimizer(tree(), fo.Nesterov(form="lookahead"))
    opt.save(tmp_path / "run")
    with opt.lookahead():
        for act in (opt.save, opt.load):
            with pytest.raises(RuntimeError, match=r"inside of lookahead\(\): leave the context"):
                act(tmp_path / "run")
    with safe_open(tmp_path / "run", "np") as file:
        assert len(file.keys()) == 4
