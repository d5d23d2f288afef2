"""Random optimizers do what the reference does, refuse what it refuses, and write nowhere else.

FUSEDOPT_FUZZ=N draws N cases instead of a few (`.ci/fuzz`).
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import fusedopt as fo
from exactness import RULES
from fuzzing import USES, Choose, Recipe, Twin, gradients, recipe

CASES = int(os.environ.get("FUSEDOPT_FUZZ", "60"))
fuzzed = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=CASES < 1000,
    database=None,
    suppress_health_check=list(HealthCheck),
)

REFUSED = (TypeError, ValueError, RuntimeError, FloatingPointError)


def outcome(action: Any) -> Any:
    """What came back, or the kind and words of the refusal."""
    try:
        return action()
    except fo.VerificationError:
        raise
    except REFUSED as error:
        return type(error)


def made(recipe: Recipe, **changes: Any) -> Any:
    return outcome(lambda: Twin(recipe, changes))


def stepped(twin: Twin, makers: Any, scale: float, hessian: Any, accumulate: int) -> Any:
    """One step of gradients that are made anew; what came of it."""
    indices = range(len(twin.params))
    grads = [makers[k](twin, k) for k in indices]
    if accumulate:  # the sum may read what the step will write
        grads = [None if any(g is a for a in twin.written()) else g for g in grads]
    before = [contents(g) for g in grads]
    estimates = None
    if hessian is not None:
        takes = [RULES[name].takes_hessian for name in twin.recipe.rules]
        estimates = twin.recipe.nest([hessian[k](twin, k) if takes[k] else None for k in indices])
    fingerprint, count = twin.opt.fingerprint(), twin.opt.step_count

    def act() -> Any:
        tree = twin.recipe.nest(grads)
        for _ in range(accumulate):
            twin.opt.accumulate(tree)
        if accumulate:
            return twin.opt.step(grad_scale=scale, hessian=estimates)
        return twin.opt.step(tree, grad_scale=scale, hessian=estimates)

    result = outcome(act)
    taken = isinstance(result, fo.StepInfo) and not result.skipped
    if not taken:
        assert twin.opt.fingerprint() == fingerprint, "a step that was not taken changed something"
        assert twin.opt.step_count == count
    zeroed = twin.recipe.options["zero_grads"]
    if not zeroed or (not taken and not accumulate):
        assert [contents(g) for g in grads] == before, "gradients were written"
    elif taken:
        assert not any(c.strip(b"\0") for c in map(contents, grads) if c), "not zeroed"
    return result


def contents(g: Any) -> bytes:
    values = g.values if isinstance(g, fo.Rows) else g
    return np.ascontiguousarray(values).tobytes() if isinstance(values, np.ndarray) else b""


def chooser(data: st.DataObject) -> Choose:
    return lambda values: data.draw(st.sampled_from(values))


@fuzzed
@given(st.data())
def test_against_the_reference(data: st.DataObject) -> None:
    choose = chooser(data)
    chosen = recipe(choose)
    matrices = any(RULES[name].program.matrices for name in chosen.rules)
    twins = [made(chosen, backend="native")]
    twins.append(made(chosen, backend="native", verify=not matrices, threads=1))
    twins.append(made(chosen, backend="reference"))
    kinds = {t if isinstance(t, type) else Twin for t in twins}
    assert len(kinds) == 1, kinds
    event(str(kinds))
    if kinds != {Twin}:
        return
    for _ in range(choose(range(1, 5))):
        if choose(range(4)) == 0:
            use = choose(sorted(USES))
            results = [outcome(partial(USES[use], t)) for t in twins]
            event(use)
        else:
            makers, estimates = gradients(choose), gradients(choose)
            hessian = choose([None, estimates])
            scale = choose([1.0, 1.0, 256.0])
            times = choose([0, 0, 0, 1, 2])
            results = [stepped(t, makers, scale, hessian, times) for t in twins]
            event("refused" if isinstance(results[0], type) else "taken")
        first, second, third = ((r if isinstance(r, type) else None) for r in results)
        assert first == second == third, results
        assert twins[0].opt.fingerprint() == twins[1].opt.fingerprint()
        assert twins[0].opt.step_count == twins[2].opt.step_count
        for mine, theirs in zip(twins[0].copies, twins[1].copies, strict=True):
            assert mine is None or mine.tobytes() == theirs.tobytes()
        assert all(twin.guards.intact() for twin in twins), "written outside of the arrays"
        if first is None and results[0] is not None:
            same_info(results[0], results[1])


def same_info(a: fo.StepInfo, b: fo.StepInfo) -> None:
    assert repr(a) == repr(b)


def test_an_array_that_was_resized_is_not_written() -> None:
    for size in (0, 10, 5000):
        p, g = np.ones(1000), np.ones(1000)
        optimizer = fo.Optimizer(p, fo.AdamW())
        optimizer.step(g)
        p.resize(size, refcheck=False)
        with pytest.raises((ValueError, RuntimeError)):
            optimizer.step(g)
