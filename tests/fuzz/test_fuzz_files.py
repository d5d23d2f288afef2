"""Spoilt checkpoint files and state_dicts are refused, and change nothing; or are as good as whole.

FUSEDOPT_FUZZ=N tries N of each (`.ci/fuzz`).
"""

from __future__ import annotations

import copy
import json
import os
import random
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo

CASES = int(os.environ.get("FUSEDOPT_FUZZ", "1500"))
HEADROOM = 1 << 20
"""Bytes that reading a file of a few kilobytes may take, importing the reader included."""

INTERESTING: tuple[Any, ...] = (
    None, True, 0, -1, 1, 7, 0.5, 1e308, float("nan"), "", "m", "F32", "U8", "w", [], {}, [0], "\0",
    [0, 0], [8, 0], 1 << 31, 1 << 62, 1 << 64, -(1 << 63), [1 << 40, 1 << 40], {"__metadata__": {}},
)  # fmt: skip


def fresh() -> fo.Optimizer:
    params = {
        "w": np.ones((70, 60), ml_dtypes.bfloat16),
        "v": [np.asfortranarray(np.ones((3, 5))), np.ones(())],
    }
    rules = {"w": fo.AdamW(), "*": fo.Nesterov()}
    return fo.Optimizer(params, rules, state_dtype="dynamic8", master="split16", ema=0.5)


def stepped() -> fo.Optimizer:
    opt = fresh()
    opt.step({"w": np.full((70, 60), 0.5), "v": [np.ones((3, 5)), np.ones(())]})
    return opt


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of nested dicts and lists."""
    found = []
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(items):
        found.append((node, key))
        if isinstance(value, (dict, list)):
            found += places(value)
    return found


def spoilt(rng: random.Random, table: Any) -> Any:
    """The table with one to three values replaced, removed, moved or renamed."""
    table = copy.deepcopy(table)
    for _ in range(rng.randint(1, 3)):
        node, key = rng.choice(places(table) or [({"": 0}, "")])
        action = rng.randrange(5)
        if action == 0:
            del node[key]
        elif action == 1 and isinstance(node, dict):
            node[rng.choice(["", "p:w", "m:w", "x", key])] = node.pop(key)
        elif action == 2:
            other, place = rng.choice(places(table))
            node[key] = copy.deepcopy(other[place])
        elif action == 3 and isinstance(node[key], int):
            node[key] += rng.choice([-1, 1, 8, 1 << 32])
        else:
            node[key] = copy.deepcopy(rng.choice(INTERESTING))
    return table


def mutated(rng: random.Random, whole: bytes) -> bytes:
    """Another file: of other bytes, another length, or with another header or table in it."""
    size = 8 + int.from_bytes(whole[:8], "little")
    kind = rng.randrange(5)
    if kind == 0:
        data = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(size if rng.random() < 0.9 else len(data))] = rng.randrange(256)
        return bytes(data)
    if kind == 1:
        cut = rng.randrange(len(whole))
        return whole[:cut] + whole[cut + rng.randint(0, 64) :] + bytes(rng.randint(0, 3))
    header = json.loads(whole[8:size])
    if kind == 2:
        table = spoilt(rng, json.loads(header["__metadata__"]["fusedopt"]))
        header["__metadata__"]["fusedopt"] = json.dumps(table)
    else:
        header = spoilt(rng, header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[size:]


def arrays_of(opt: fo.Optimizer) -> list[bytes]:
    return [opt.fingerprint().encode(), str(opt.step_count).encode()]


def attempted(opt: fo.Optimizer, act: Callable[[], object]) -> bool:
    """Whether it was accepted; what is refused changed nothing."""
    before = arrays_of(opt)
    try:
        act()
    except (ValueError, OSError):
        assert arrays_of(opt) == before
        return False
    return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "run"
    stepped().save(path)
    return path.read_bytes()


@pytest.mark.slow
def test_spoilt_files(whole: bytes, tmp_path: Path) -> None:
    rng, path, opt = random.Random(1), tmp_path / "run", fresh()
    accepted = 0
    for _ in range(CASES):
        path.write_bytes(mutated(rng, whole))
        strict = rng.random() < 0.5
        tracemalloc.start()
        ok = attempted(opt, partial(opt.load, path, strict=strict))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < HEADROOM, "memory by the file's own word"
        if ok:  # such as other values in a float array, or white space in the header
            accepted += 1
            opt.step({"w": np.full((70, 60), 0.5), "v": [np.ones((3, 5)), np.ones(())]})
            opt = fresh()
    assert 0 < accepted < CASES / 2


def test_spoilt_state_dicts() -> None:
    rng, opt, state = random.Random(2), fresh(), stepped().state_dict()
    for _ in range(CASES):
        hostile = spoilt(rng, state)
        if rng.random() < 0.3 and isinstance(hostile.get("leaves"), dict):
            for node, key in places(hostile):
                if isinstance(node[key], np.ndarray) and rng.random() < 0.3:
                    node[key] = misfit(rng, node[key])
        if attempted(opt, partial(opt.load_state_dict, hostile, strict=False)):
            opt = fresh()


def misfit(rng: random.Random, a: Any) -> Any:
    """An array that is nearly right."""
    return rng.choice(
        [np.atleast_1d(a)[:1], a.astype(">f4"),
         a.tolist(), a.astype(object), np.ma.masked_array(a), a[None],
         np.lib.stride_tricks.as_strided(a, a.shape, (0,) * a.ndim), a.T]
    )  # fmt: skip
