"""Options in pairs and triples, and all that is done to an optimizer, against the NumPy model.

FUSEDOPT_FUZZ=N takes N of the triples instead of some (`.ci/fuzz`).

On the core each optimizer is there twice: as it is, and verified step by step without its options
of where and how. Both have the same bits; the model refuses the same, counts the same, and has
nearly the same parameters.
"""

from __future__ import annotations

import copy
import os
import pickle
import random
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from combining import Case, covering
from exactness import Array
from fusedopt.system.extension import core

TRIPLES = int(os.environ.get("FUSEDOPT_FUZZ", "100"))

pytestmark = pytest.mark.skipif(core is None, reason="compares the compiled core")

RULES: dict[str, Callable[[], fo.Rule]] = {
    "adamw": lambda: fo.AdamW(weight_decay=0.1, amsgrad="raw"),
    "scheduled": lambda: fo.Adam(lr=fo.schedules.Cosine(0.01, steps=50), weight_decay=0.01),
    "nesterov": lambda: fo.Nesterov(form="lookahead"),
    "sophia": lambda: fo.Sophia(),
    "rmsprop": lambda: fo.RMSProp(momentum=0.9, centered=True),
    "muon": lambda: fo.Muon(),
    "normuon": lambda: fo.NorMuon(),
    "soap": lambda: fo.SOAP(),
    "dion": lambda: fo.Dion(),
    "shampoo": lambda: fo.Shampoo(precondition_frequency=2, max_precond_dim=100),
    "adafactor": lambda: fo.Adafactor(min_dim=6),
}
DTYPES: dict[str, list[Any]] = {
    "float32": [np.float32] * 3,
    "float64": [np.float64] * 3,
    "bfloat16": [ml_dtypes.bfloat16] * 3,
    "mixed": [np.float32, ml_dtypes.bfloat16, np.float64],
}
SHAPES = {"table": (16, 256), "w": (7, 5), "b": (9,)}
FACTORS: dict[str, list[Any]] = {
    "rule": list(RULES),
    "dtype": list(DTYPES),
    "clip_norm": [None, 0.5],
    "clip_value": [None, 0.125],
    "clip_leaf": [None, 0.5],
    "clip_adaptive": [None, 0.125],
    "centralize": [False, True],
    "skip_nonfinite": [False, True],
    "zero_grads": [False, True],
    "state_dtype": [None, "bfloat16", "float8", "dynamic8", "dynamic4"],
    "rounding": ["nearest", "stochastic", "kahan"],
    "master": [None, "float32", "split16"],
    "copy_out": [False, True],
    "ema": [None, 0.5, fo.schedules.EmaDebiased(0.9)],
    "slow_weights": [None, fo.Lookahead(k=2), fo.Lookahead(k=1, alpha=0.25, reset=True)],
    "stats": [False, True],
    "exact": [False, True],
    "state_path": [False, True],
    "threads": [1, 2],
}
REFUSED = (TypeError, ValueError, RuntimeError, FloatingPointError)


def matrices(case: Case) -> bool:
    return case["rule"] in ("muon", "normuon", "soap", "shampoo", "dion")


class Twin:
    """An optimizer of a case, and what is done to it."""

    def __init__(self, case: Case, folder: Path | None, **changes: Any) -> None:
        self.case, self.folder, self.replaced = case, folder, False
        options = {name: case[name] for name in FACTORS if name not in ("rule", "dtype")}
        if options["copy_out"]:
            options["copy_out"] = {"table": np.zeros(SHAPES["table"], ml_dtypes.bfloat16),
                                   "w": None, "b": np.zeros(SHAPES["b"], np.float32)}  # fmt: skip
        else:
            options["copy_out"] = None
        options["state_path"] = folder and folder / "states" if options["state_path"] else None
        self.options = {**options, **changes}
        rng = np.random.default_rng(1)
        pairs = zip(SHAPES.items(), DTYPES[case["dtype"]], strict=True)
        self.params = {k: rng.standard_normal(s).astype(dtype) for (k, s), dtype in pairs}
        self.opt = self.another(self.params)

    def another(self, params: dict[str, Array], **changes: Any) -> fo.Optimizer:
        rule = RULES[self.case["rule"]]()
        rules: Any = {"b": fo.AdamW(), "*": rule} if matrices(self.case) else rule
        made = fo.Optimizer(params, rules, **{**self.options, **changes})
        if self.replaced:
            self.replace(made)
        return made

    def replace(self, opt: fo.Optimizer) -> None:
        opt.replace(weight_decay=0.05)
        opt.lr = dict.fromkeys(opt.groups, 0.02) if matrices(self.case) else 0.02
        self.replaced = True

    def gradients(self, seed: int, rows: bool = False) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        made: dict[str, Any] = {k: rng.standard_normal(s) for k, s in SHAPES.items()}
        made = {k: g.astype(np.float32) for k, g in made.items()}
        if rows:
            made["table"] = fo.Rows(np.array([3, 1, 3]), made["table"][:3].copy())
        return made


# ---------------------------------------------------------------- what is done

Action = Callable[[Twin, int], object]


def step(twin: Twin, seed: int) -> object:
    return twin.opt.step(twin.gradients(seed))


def some_rows(twin: Twin, seed: int) -> object:
    return twin.opt.step(twin.gradients(seed, rows=True))


def partly_none(twin: Twin, seed: int) -> object:
    return twin.opt.step({**twin.gradients(seed), "w": None}, grad_scale=4.0)


def not_finite(twin: Twin, seed: int) -> object:
    grads = twin.gradients(seed)
    grads["b"][2] = np.inf
    return twin.opt.step(grads) if twin.case["skip_nonfinite"] else None


def refreshed(twin: Twin, seed: int) -> object:
    rows = twin.case["exact"] and not matrices(twin.case)
    estimates = twin.gradients(seed + 1, rows=rows) if twin.case["rule"] == "sophia" else None
    return twin.opt.step(twin.gradients(seed, rows=rows), hessian=estimates)


def accumulated(twin: Twin, seed: int) -> object:
    if twin.case["exact"]:
        twin.opt.catch_up()
    rows = twin.case["exact"] and not matrices(twin.case)
    for k in range(2):
        twin.opt.accumulate(twin.gradients(seed + k, rows=rows))
    with pytest.raises(RuntimeError, match=r"accumulated|missed"):
        twin.opt.state_dict()
    return twin.opt.step(grad_scale=2.0, lr=None if twin.case["exact"] else 0.01)


def in_parts(twin: Twin, seed: int) -> object:
    grads = twin.gradients(seed)
    twin.opt.step_part(["w"], [grads["w"]])
    return twin.opt.step_part(["b", "table"], [grads["b"], grads["table"]], last=True)


def averaged(twin: Twin, seed: int) -> object:
    before = twin.opt.fingerprint()
    averages = twin.opt.averaged()
    with averages as params:
        assert fo.global_norm(params) > 0
        with pytest.raises(RuntimeError, match="averaged"):
            twin.opt.step(twin.gradients(seed))
    assert twin.opt.fingerprint() == before
    return None


def looked_ahead(twin: Twin, seed: int) -> object:
    before = twin.opt.fingerprint()
    with twin.opt.lookahead():
        pass
    assert twin.opt.fingerprint() == before
    return None


def caught_up(twin: Twin, seed: int) -> object:
    twin.opt.catch_up({"table": np.array([1, 5])})
    twin.opt.catch_up()
    return None


def saved(twin: Twin, seed: int) -> object:
    """What was saved comes back, here and in another optimizer, which goes on alike."""
    assert twin.folder is not None
    file, before = twin.folder / "run.safetensors", twin.opt.fingerprint()
    twin.opt.save(file, metadata=[seed])
    twin.opt.step(twin.gradients(seed))
    after = twin.opt.fingerprint()
    assert twin.opt.load(file) == [seed]
    assert twin.opt.fingerprint() == before
    other = twin.another({k: np.zeros_like(p) for k, p in twin.params.items()}, state_path=None)
    other.load(file)
    assert other.fingerprint() == before
    other.step(twin.gradients(seed))
    assert other.fingerprint() == after
    return None


def taken_and_put_back(twin: Twin, seed: int) -> object:
    state, before = twin.opt.state_dict(), twin.opt.fingerprint()
    params = {k: p.copy() for k, p in twin.params.items()}
    twin.opt.step(twin.gradients(seed))
    for k, p in twin.params.items():
        p[...] = params[k]
    twin.opt.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert twin.opt.fingerprint() == before
    return None


def copied(twin: Twin, seed: int) -> object:
    if twin.case["state_path"]:
        return None
    for pickled in (False, True):
        opt, same = twin.opt, twin.opt.fingerprint()
        other: fo.Optimizer = pickle.loads(pickle.dumps(opt)) if pickled else copy.deepcopy(opt)
        assert other.fingerprint() == same
        other.step(twin.gradients(seed))
        assert twin.opt.fingerprint() == same != other.fingerprint()
    return None


def rebound(twin: Twin, seed: int) -> object:
    before = twin.opt.fingerprint()
    fresh = {k: p.copy() for k, p in twin.params.items()}
    twin.opt.rebind(fresh)
    twin.params = fresh
    assert twin.opt.fingerprint() == before
    return None


def replaced(twin: Twin, seed: int) -> object:
    twin.replace(twin.opt)
    return None


def synchronized(twin: Twin, seed: int) -> object:
    own = twin.params["w"].copy()
    twin.params["w"][...] = own * 0.5
    try:
        twin.opt.sync()
    except RuntimeError:
        twin.params["w"][...] = own
        raise
    return None


ACTIONS: dict[str, Action] = {
    action.__name__: action
    for action in (
        step, some_rows, partly_none, not_finite, refreshed, accumulated, in_parts, averaged,
        looked_ahead, caught_up, saved, taken_and_put_back, copied, rebound, replaced, synchronized,
    )
}  # fmt: skip


# ---------------------------------------------------------------- comparison


def outcome(action: Callable[[], object]) -> Any:
    """What came back, or the kind of the refusal."""
    try:
        return action()
    except fo.VerificationError:
        raise
    except REFUSED as error:
        return type(error)


def possible(case: Case) -> bool:
    """Whether such an optimizer can be made; the NumPy model has no states in a file."""
    return isinstance(outcome(lambda: Twin(case, None, state_path=None)), Twin)


def is_close(case: Case) -> bool:
    """Whether the model's rounding leads nowhere else: no code flips, and no basis turns."""
    plain = case["state_dtype"] is None and case["master"] is None and case["rounding"] != "kahan"
    return (
        plain
        and case["dtype"] in ("float32", "float64")
        and case["rule"] not in ("soap", "shampoo", "dion")
    )


def compare(case: Case, folder: Path) -> None:
    """All actions in some order, on the core, on the core verified, and on the model."""
    names = sorted(ACTIONS) * 2
    random.Random(repr(sorted(case.items(), key=str))).shuffle(names)
    folders = [folder / name for name in ("core", "verified", "model")]
    for each in folders:
        each.mkdir(parents=True)
    twins = [
        Twin(case, folders[0], backend="native"),
        Twin(case, folders[1], backend="native", state_path=None, verify=not matrices(case)),
        Twin(case, folders[2], backend="reference", state_path=None),
    ]
    first, second, model = twins
    for seed, name in enumerate(["step", *names]):
        before = [(twin.opt.fingerprint(), twin.opt.step_count) for twin in twins]
        results = [outcome(partial(ACTIONS[name], twin, 10 * seed)) for twin in twins]
        kinds = [result if isinstance(result, type) else None for result in results]
        where = f"{name} in {case}: {results}"
        assert kinds[0] == kinds[1] == kinds[2], where
        assert first.opt.fingerprint() == second.opt.fingerprint(), where
        assert first.opt.step_count == model.opt.step_count, where
        if kinds[0] is not None and name not in ("accumulated", "in_parts"):
            after = [(twin.opt.fingerprint(), twin.opt.step_count) for twin in twins]
            assert after == before, where
        if kinds[0] is not None and case["exact"]:  # or all that follows would be refused too
            for twin in twins:
                twin.opt.catch_up()
        if isinstance(results[0], fo.StepInfo):
            assert results[0].skipped == results[2].skipped, where
            assert results[0].lr == results[2].lr, where
        if is_close(case):
            for k, p in first.params.items():
                np.testing.assert_allclose(p, model.params[k], rtol=2e-3, atol=2e-4, err_msg=where)


def test_some_pairs(tmp_path: Path) -> None:
    for number, case in enumerate(islice(covering(FACTORS, 2, possible), 3)):
        compare(case, tmp_path / f"{number}")


@pytest.mark.slow
@pytest.mark.parametrize(("strength", "least"), [(2, 40), (3, min(TRIPLES, 150))])
def test_pairs_and_triples(strength: int, least: int, tmp_path: Path) -> None:
    number, cases = 0, covering(FACTORS, strength, possible)
    for number, case in enumerate(islice(cases, TRIPLES if strength == 3 else None), 1):
        compare(case, tmp_path / f"{number}")
    assert number >= least
