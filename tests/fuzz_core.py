"""Lets a coverage-guided fuzzer choose what the compiled core is given, until it is stopped.

Optimizers of all rules and formats, their gradients and the uses of them are those of
`test_fuzz.py`; trees, tuples and arguments that no Python code of ours would pass come beside.
`.ci/fuzz` builds the core for it, with coverage and sanitizers.

python tests/fuzz_core.py -max_total_time=600 CORPUS      (needs `pip install atheris`)
"""

from __future__ import annotations

import os
import sys
from typing import Any

import atheris
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import fusedopt as fo
from exactness import RULES
from fusedopt import _core as core
from fusedopt.backends import native
from fuzzing import DTYPES, USES, Make, Twin, gradients, numbers, recipes
from test_fuzz import REFUSED, contents, outcome, stepped

JUNK: list[Any] = [None, 0, -1, 1 << 70, 0.5, "g", (), [], {}, {"a": None}, (None,) * 3, object()]


def arrays(draw: st.DrawFn) -> Any:
    """Any array, of any kind and layout."""
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 17, 300]), max_size=3)))
    a = numbers(draw(st.integers(0, 99)), shape, draw(st.sampled_from(sorted(DTYPES))), 0.1)
    return draw(
        st.sampled_from(
            [
                a,
                a.T,
                a[..., ::-1],
                a[::2] if a.ndim else a,
                np.broadcast_to(a, (2, *shape)),
                a.astype(np.int64, casting="unsafe") if np.isfinite(a).all() else a,
                a.view(np.uint8) if a.ndim and a.flags.c_contiguous else a,
                a.astype(object),
            ]
        )
    )


def trees(draw: st.DrawFn, leaves: list[Any], depth: int = 0) -> Any:
    """Any nesting of gradients that would fit, arrays that would not, and what is no array."""
    kind = draw(st.integers(0, 7))
    if kind < 3 and depth < 3:
        children = [trees(draw, leaves, depth + 1) for _ in range(draw(st.integers(0, 3)))]
        if kind == 0:
            return dict(zip("abc", children, strict=False))
        return children if kind == 1 else tuple(children)
    return draw(st.sampled_from([*JUNK, arrays(draw), *leaves, *leaves, *leaves]))


def spoilt(draw: st.DrawFn, value: Any, depth: int = 0) -> Any:
    """An argument with something in it changed."""
    if isinstance(value, (list, tuple)) and value and depth < 3 and draw(st.integers(0, 4)):
        k = draw(st.integers(0, len(value) - 1))
        changed = draw(
            st.sampled_from([[spoilt(draw, value[k], depth + 1)], [], [value[k], value[k]]])
        )
        return type(value)([*value[:k], *changed, *value[k + 1 :]])
    return draw(st.sampled_from([*JUNK, arrays(draw), value]))
