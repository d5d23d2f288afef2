"""The work for a leaf does not grow with their number."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from fusedopt.step import assembly

FEW, TIMES = 20, 8

Action = Callable[[fo.Optimizer, Any], object]

ACTIONS: dict[str, Action] = {
    "step": lambda opt, g: opt.step(g),
    "rows": lambda opt, g: opt.step({k: fo.Rows(np.array([2, 0]), a[:2]) for k, a in g.items()}),
    "accumulate": lambda opt, g: opt.accumulate(g),
    "state_dict": lambda opt, g: opt.state_dict(),
    "load_state_dict": lambda opt, g: opt.load_state_dict(opt.state_dict()),
    "replace": lambda opt, g: opt.replace(weight_decay=0.5),
    "fingerprint": lambda opt, g: opt.fingerprint(),
    "averaged": lambda opt, g: opt.averaged().__enter__(),
    "rebind": lambda opt, g: opt.rebind({k: a.copy() for k, a in g.items()}),
    "describe": lambda opt, g: opt.describe(),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guarded": {"clip_norm": 1.0, "skip_nonfinite": True, "stats": True},
    "transforms": {"clip_leaf": 1.0, "centralize": True},
    "slow weights": {"slow_weights": fo.Lookahead(k=1, reset=True)},
    "numba": {"backend": "numba"},
    "reference": {"backend": "reference"},
    "verified": {"verify": True},
}


def tree(count: int) -> dict[str, Any]:
    return {f"leaf{k}": np.full((4, 3), 0.5 + k / count) for k in range(count)}


def calls(action: Callable[[], object]) -> int:
    """The functions that are called, in Python or by Python."""
    found = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return found


def check(make: Callable[[int], fo.Optimizer], action: Action) -> None:
    found = []
    for count in (FEW, FEW * TIMES):
        optimizer, grads = make(count), tree(count)
        optimizer.step(grads)
        found.append(calls(lambda opt=optimizer, g=grads: action(opt, g)))  # type: ignore[misc]
    few, many = found
    assert many <= TIMES * few


@pytest.fixture(autouse=True)
def _in_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "uninterrupted", lambda function: function())


@pytest.mark.parametrize(
    "backend",
    ["native", *(pytest.param(b, marks=pytest.mark.slow) for b in ("numba", "reference"))],
)
@pytest.mark.parametrize("name", fo.RULES)
def test_a_step_of_every_rule(name: str, backend: str) -> None:
    if backend == "numba":
        pytest.importorskip("numba")
    check(lambda n: fo.Optimizer(tree(n), fo.RULES[name](), backend=backend), ACTIONS["step"])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step_with_options(options: dict[str, Any]) -> None:
    if options.get("backend") == "numba":
        pytest.importorskip("numba")
    check(lambda n: fo.Optimizer(tree(n), fo.AdamW(), **options), ACTIONS["step"])


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_what_else_there_is(action: Action) -> None:
    check(lambda n: fo.Optimizer(tree(n), fo.AdamW(), ema=0.5), action)


def test_files(tmp_path: Path) -> None:
    def through(opt: fo.Optimizer, _: Any) -> None:
        opt.save(tmp_path / "saved.safetensors")
        opt.load(tmp_path / "saved.safetensors")

    check(lambda n: fo.Optimizer(tree(n), fo.AdamW()), through)


def test_groups() -> None:
    def grouped(n: int) -> fo.Optimizer:
        rules = {f"leaf{k}": fo.AdamW(lr=1e-3 * (k + 1)) for k in range(n)}
        return fo.Optimizer(tree(n), rules, clip_norm=1.0)

    check(grouped, ACTIONS["step"])
    check(grouped, ACTIONS["state_dict"])
