"""The rules of ``fusedopt.examples`` against trajectories that optax computed itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from golden import problem

ENTRIES = json.loads((Path(__file__).parents[1] / "golden/examples.json").read_text())
RULES = [
    fo.examples.AdaBelief(lr=0.01, weight_decay=0.1),
    fo.examples.ADOPT(lr=0.01, maximize=True),
    fo.examples.AdEMAMix(lr=0.01, warmup=10, weight_decay=0.1, decay="decoupled"),
]


def rule_of(entry: dict[str, Any]) -> Any:
    return getattr(fo.examples, entry["rule"])(**entry["arguments"])


@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e['rule']}-{len(e['arguments'])}")
def test_trajectory_is_optaxs(entry: dict[str, Any], backend: str) -> None:
    start, params = problem.parameters(""), problem.parameters("")
    optimizer = fo.Optimizer(params, rule_of(entry), backend=backend)
    for step in range(1, problem.STEPS + 1):
        optimizer.step(problem.gradients("", step))
        for path, recorded in entry["after"].get(str(step), {}).items():
            want = np.array(recorded)
            size = np.maximum(np.abs(start[path]), np.abs(want))
            bound = (4 + step) * np.finfo(np.float64).eps * size + 1e-13 * step * 0.01
            assert (np.abs(params[path] - want) <= bound).all(), (step, path)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_compiled_step_is_the_textbooks(rule: fo.Rule, dtype: str) -> None:
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((40, 130)).astype(dtype), "b": np.zeros(3, dtype)}
    optimizer = fo.Optimizer(params, rule, verify=True)
    for _ in range(12):
        optimizer.step({k: rng.standard_normal(p.shape).astype(dtype) for k, p in params.items()})
    assert optimizer.step_count == 12
