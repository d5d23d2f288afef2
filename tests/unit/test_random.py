"""Drawn shapes, layouts, dtypes and trees: the same bits as plain contiguous arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fusedopt as fo
from fusedopt.arrays.stored import Stored
from fusedopt.verification.judge import judge
from fusedopt.verify import variants

RULES = [rule for cls in fo.RULES.values() for rule in variants(cls)]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)
DTYPES = st.sampled_from([np.float32, np.float64])


def laid_out(draw: Any, values: np.ndarray) -> np.ndarray:
    """Return the values in a drawn memory layout."""
    axes = draw(st.permutations(range(values.ndim)))
    steps = [draw(st.sampled_from([1, 2, -1])) for _ in range(values.ndim)]
    stretched = [n * abs(s) for n, s in zip(values.shape, steps, strict=True)]
    base = np.zeros([stretched[a] for a in axes], values.dtype).transpose(np.argsort(axes))
    index: Any = (*(slice(None, None, s) for s in steps), ...)
    view: np.ndarray = base[index]
    view[...] = values
    return view


@st.composite
def problems(draw: Any) -> Any:
    rule = draw(st.sampled_from(RULES))
    leaves = []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(SHAPES.filter(lambda s: len(s) >= 2 or rule.program.phases == 1))
        dtype = draw(DTYPES)
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        p = np.array(rng.standard_normal(shape), dtype, order=draw(st.sampled_from("CF")))
        gradients = []
        for _ in range(2):
            g = np.asarray(rng.standard_normal(shape) * 10.0 ** rng.integers(-9, 9), draw(DTYPES))
            gradients.append(None if draw(st.integers(0, 5)) == 0 else laid_out(draw, g))
        leaves.append((p, gradients))
    return rule, leaves


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(problems())
def test_layouts_and_trees(problem: Any) -> None:
    rule, leaves = problem
    alone = [np.array(p, order="C") for p, _ in leaves]
    opt = fo.Optimizer({"leaves": [p for p, _ in leaves]}, rule)
    kept = [[None if g is None else g.copy() for g in gradients] for _, gradients in leaves]
    for t in range(2):
        opt.step({"leaves": [gradients[t] for _, gradients in leaves]})
    for k, (p, gradients) in enumerate(leaves):
        q, states = alone[k], rule.init(alone[k])
        steps = [g for g in gradients if g is not None]
        for t, g in enumerate(steps, 1):
            before = [a.copy() for a in (q, *states)]
            # float64 folding of the learning rate: it is a number in every variant
            fo.update(rule, t, q, np.array(g, q.dtype, order="C"), *states)
            for worst in judge(
                rule, before, [*map(Stored.plain, (q, *states))], g, None, t=t, lr=rule.lr_at(t)
            ):
                assert worst.share <= 1, f"{rule}: {worst}"
        if rule.program.phases == 1:  # a matrix product may round otherwise in another layout
            np.testing.assert_array_equal(p, q)
            state = opt.state[f"leaves.{k}"].values()
            for a, b in zip(state, states, strict=True):
                np.testing.assert_array_equal(a, b)
        for g, original in zip(gradients, kept[k], strict=True):
            assert (g is None) == (original is None)
            if g is not None:
                np.testing.assert_array_equal(g, original)
