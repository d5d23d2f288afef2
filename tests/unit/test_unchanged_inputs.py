"""Gradients from step to step: what passed in one step passes again only while it is the same.

One optimizer takes all steps, and so may know its inputs again; beside it, in a world of equal
arrays, each step is taken by a new one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedopt as fo
from fusedopt.system.isa import isas

SHAPES = ((6, 4), (700,), ())
RULES = {"adamw": fo.AdamW(), "sgd": fo.SGD(), "lamb": fo.LAMB(weight_decay=0.1)}


class World:
    """Parameters, and everything that a step may be given as their gradients."""

    def __init__(self) -> None:
        rng = np.random.default_rng(5)

        def draw(dtype: Any = np.float32) -> list[np.ndarray]:
            return [np.asarray(rng.standard_normal(s)).astype(dtype) for s in SHAPES]

        self.params = draw()
        self.given: dict[str, list[Any]] = {
            "usual": draw(),
            "other": draw(),
            "half": draw(np.float16),
            "bfloat16": draw(ml_dtypes.bfloat16),
            "double": draw(np.float64),
            "none": [None] * len(SHAPES),
            # Refused, and nothing has changed: the parameter's own memory, and that of another.
            "own": [p[...] for p in self.params],
            "first": [self.params[0].reshape(-1)[:1].reshape(()) if s == () else None
                      for s in SHAPES],
            "changed": draw(),
            "shared": [a[...] for a in draw()],
        }  # fmt: skip
        self.rows = fo.Rows(np.array([4, 1, 4]), np.ones((3, 4), np.float32))

    def change(self, leaf: int, how: int) -> None:
        """Give the array of a leaf another look under its own name."""
        a = self.given["changed"][leaf]
        if how == 0:
            a.setflags(write=not a.flags.writeable)
        elif how == 1 and a.ndim == 2 and any(a.strides):
            a.shape = a.shape[::-1]
        elif how == 2 and a.ndim:
            a.strides = (0,) * a.ndim
        elif how == 3 and (any(a.strides) or not a.ndim):
            with np.errstate(invalid="ignore"):
                a.dtype = np.int32 if a.dtype == np.float32 else np.float32
        else:
            self.given["changed"][leaf] = np.ones(SHAPES[leaf], np.float32)

    def step(self, opt: fo.Optimizer, picks: tuple[str, ...]) -> str:
        """Take a step with a pick for each leaf; return what came of it."""
        grads = [
            self.rows if pick == "rows" and k == 0 else self.given.get(pick, [None] * 3)[k]
            for k, pick in enumerate(picks)
        ]
        try:
            return str(opt.step(grads))
        except (ValueError, TypeError) as error:
            return f"{type(error).__name__}: {error}"

    def bytes(self) -> list[bytes]:
        """What is in all arrays."""
        own = [a.tobytes() for each in self.given.values() for a in each if a is not None]
        return [p.tobytes() for p in self.params] + own + [self.rows.values.tobytes()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of setting an array's dtype, for one
@pytest.mark.parametrize("options", [
    {}, {"zero_grads": True}, {"clip_norm": 1.0}, {"clip_norm": 1.0, "zero_grads": True},
    {"stats": True}, {"ema": 0.9, "skip_nonfinite": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", RULES)
def test_a_step_is_that_of_a_new_optimizer(
    name: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    rng = np.random.default_rng([len(str(options)), len(name)])
    one, two = World(), World()
    opt = fo.Optimizer(one.params, RULES[name], **options)
    state = opt.state_dict()
    request.addfinalizer(partial(fo.set_isa, fo.get_isa()))
    outcomes = set()
    picks = ["usual"] * len(SHAPES)
    kinds = [*["usual", "shared"] * 4, "rows", *one.given]
    for _ in range(150):
        for leaf in range(len(SHAPES)):
            if rng.random() < 0.3:
                picks[leaf] = kinds[rng.integers(len(kinds))]
        if rng.random() < 0.3:
            leaf, how = int(rng.integers(len(SHAPES))), int(rng.integers(5))
            one.change(leaf, how)
            two.change(leaf, how)
        if rng.random() < 0.1:  # the same memory for two leaves' gradients
            for world in (one, two):
                world.given["shared"][2] = world.given["shared"][1][:1].reshape(())
        new = fo.Optimizer(two.params, RULES[name], **options)
        new.load_state_dict(state)
        want = two.step(new, tuple(picks))
        assert one.step(opt, tuple(picks)) == want, picks
        assert one.bytes() == two.bytes()
        state = new.state_dict()
        assert opt.fingerprint() == new.fingerprint()
        outcomes.add(want.split("(")[0].split(":")[0])
        if rng.random() < 0.05:
            fo.set_isa(isas()[rng.integers(2)])
    assert outcomes >= {"StepInfo", "ValueError"}
