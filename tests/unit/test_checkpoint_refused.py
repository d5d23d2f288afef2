"""Files and state_dicts that do not fit, truncated and hostile ones among them, change nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import fusedopt as fo
from formatted import ADAMW, assert_same, draw, everything
from fusedopt import schedules
from fusedopt.arrays import safetensors_file


def tree(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"w": rng.standard_normal((80, 60)), "b": [rng.standard_normal(5).astype(np.float32)]}


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
    for size in (1 << 63, (1 << 64) - 1, safetensors_file.HEADER_MOST + 1):
        saved.write_bytes(size.to_bytes(8, "little") + b"{}")
        assert_refused(saved, "cannot begin with a header of")


SPOILT: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "later": (lambda d: d.update(format=2), "expected a dict of format 1, got 2"),
    "no leaves": (lambda d: d.pop("leaves"), "table of leaves"),
    "list": (lambda d: d.update(leaves=[]), "table of leaves"),
    "no leaf": (lambda d: d["leaves"].update(w=3), "table of leaves"),
    "no order": (lambda d: d["leaves"]["w"].pop("order"), "w: expected a dict with"),
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
    """States lie in the parameter's order: in another they would be paired with other elements."""
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


def test_where_parameters_are_not_themselves(tmp_path: Path) -> None:
    opt = fo.Optimizer(tree(), fo.Nesterov(form="lookahead"), ema=0.9)
    opt.save(tmp_path / "run")
    for context in (opt.lookahead, opt.averaged):
        with context():
            for act in (opt.save, opt.load):
                inside = rf"inside of {context.__name__}\(\): leave the context first"
                with pytest.raises(RuntimeError, match=inside):
                    act(tmp_path / "run")
    opt.accumulate(tree(1))
    with pytest.raises(RuntimeError, match=r"accumulated gradients would be lost; call step"):
        opt.save(tmp_path / "run")
    opt.load(tmp_path / "run")  # to which they do not belong
    with pytest.raises(RuntimeError, match="nothing was accumulated"):
        opt.step()
    with safe_open(tmp_path / "run", "np") as file:
        assert {name.partition(":")[0] for name in file.keys()} == {"p", "v", "average"}  # noqa: SIM118
