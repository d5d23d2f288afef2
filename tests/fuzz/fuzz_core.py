"""Lets a coverage-guided fuzzer choose what the compiled core is given, until it is stopped.

Optimizers of all rules and formats, their gradients and the uses of them are those of
`test_fuzz.py`; trees, tuples and arguments that no Python code of ours would pass come beside.
`.ci/fuzz` builds the core for it, with coverage and sanitizers.

python tests/fuzz/fuzz_core.py -max_total_time=600 CORPUS      (needs `pip install atheris`)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import atheris
import numpy as np
from test_fuzz import contents, outcome, stepped

from exactness import RULES
from fusedopt import _core as core
from fusedopt.backends import native
from fuzzing import DTYPES, USES, Choose, Twin, gradients, numbers, recipe

JUNK: list[Any] = [None, 0, -1, 1 << 70, 0.5, "g", (), [], {}, (None,), [[0]], {"a": None}]


def chooser(data: bytes) -> Choose:
    """Whose choices the bytes are, one after the other; the first of all, where these end."""
    rest = iter(data)

    def choose(values: Sequence[Any]) -> Any:
        number = next(rest, 0)
        if len(values) > 256:
            number += next(rest, 0) << 8
        return values[number % len(values)]

    return choose


def any_array(choose: Choose) -> Any:
    """Draw an array of any kind and layout."""
    shape = tuple(choose([0, 1, 2, 3, 17]) for _ in range(choose(range(4))))
    a = numbers(0, shape, choose(list(DTYPES)))
    others = [a, a.T, a[..., ::-1] if shape else a, np.broadcast_to(a, (2, *shape)), a[..., None]]
    return choose([*others, a.astype(np.int64), a.astype(np.uint8), a.astype(object)])


def any_leaf(choose: Choose, fitting: list[Any]) -> Any:
    return choose([any_array(choose), choose(JUNK), *fitting, *fitting])


def any_tree(choose: Choose, fitting: list[Any], depth: int = 0) -> Any:
    kind = choose(range(6))
    if kind > 2 or depth > 3:
        return any_leaf(choose, fitting)
    children = [any_tree(choose, fitting, depth + 1) for _ in range(choose(range(4)))]
    return (list, tuple, lambda items: dict(zip("abc", items, strict=False)))[kind](children)


def spoilt(choose: Choose, value: Any) -> Any:
    """Return a tree with something in it changed, left out or doubled."""
    if isinstance(value, (list, tuple)) and value and choose(range(4)):
        k = choose(range(len(value)))
        changed = choose([[spoilt(choose, value[k])], [], [value[k], value[k]]])
        return type(value)([*value[:k], *changed, *value[k + 1 :]])
    return any_leaf(choose, [value])


def refused(action: Callable[[], Any]) -> bool:
    """What is wrong with arguments that none of our code passes may be said in any words."""
    try:
        result = action()
    except Exception:
        return True
    return result is None or result is False


# ---------------------------------------------------------------- entry points


def ordinary_step(choose: Choose, twin: Twin) -> None:
    estimates = choose([None, gradients(choose)])
    stepped(twin, gradients(choose), 1.0, estimates, choose(range(2)))


def bare_step(choose: Choose, twin: Twin) -> None:
    """The plan itself, with any tree; or any list of leaves, but that only our code makes rows."""
    plan, reader = twin.opt._assembly.plan, twin.opt._assembly.reader
    grads = [
        make(twin, k) for k, make in zip(range(len(twin.params)), gradients(choose), strict=False)
    ]
    flat = choose([False, True])
    if flat:
        fitted = [outcome(lambda k=k, g=g: reader.fit_leaf(k, "", g)) for k, g in enumerate(grads)]
        tree = fitted if choose([False, True]) else [any_leaf(choose, fitted) for _ in fitted]
    else:
        tree = twin.recipe.nest(grads) if choose([False, True]) else any_tree(choose, grads)
    hessian = choose([None, tree])
    fingerprint, before = twin.opt.fingerprint(), [contents(g) for g in grads]
    arguments = (tree, hessian) if flat else (tree, hessian, 1.0, None)
    if refused(lambda: (plan.step_leaves if flat else plan.whole_step)(*arguments)):
        assert twin.opt.fingerprint() == fingerprint, "a step that was refused changed something"
        assert [contents(g) for g in grads] == before, "gradients were written"


def single_update(choose: Choose, twin: Twin) -> None:
    k = choose(range(len(twin.params)))
    rule, p = RULES[twin.recipe.rules[k]], twin.params[k]
    arrays = tuple(twin.place(a) for a in (p, *rule.init(p)))
    given = spoilt(choose, arrays) if choose([False, True]) else arrays
    g, hessian = (any_leaf(choose, [p, *arrays]) for _ in range(2))
    t = choose([1, 2, 0, -1, 1 << 62])
    before, program = [a.tobytes() for a in arrays], native.compiled(rule.program)
    if refused(lambda: core.update(program, rule.program.numbers, t, 0.1, g, hessian, given)):
        assert [a.tobytes() for a in arrays] == before, "an update that was refused wrote"


def sums(choose: Choose, twin: Twin) -> None:
    refused(lambda: core.sums_of_squares([any_leaf(choose, twin.params) for _ in range(3)]))


def use(choose: Choose, twin: Twin) -> None:
    outcome(lambda: USES[choose(sorted(USES))](twin))


def settings(choose: Choose, twin: Twin) -> None:
    core.set_level(choose([*core.levels(), "none"]))
    core.set_threads(choose(range(-1, 6)))


def spoilt_plan(choose: Choose, twin: Twin) -> None:
    """A plan of wrong arguments; if it is made, a step of it."""
    make = core.Plan

    def misled(description: Any) -> Any:
        name = choose(sorted(description._fields))
        return make(description._replace(**{name: spoilt(choose, getattr(description, name))}))

    def steps() -> Any:
        other = Twin(twin.recipe, {"backend": "native"}, twin.guards)
        return other.opt.step(other.recipe.nest([p.copy(order="A") for p in other.params]))

    with mock.patch.object(core, "Plan", misled):
        refused(steps)


ENTRIES = [ordinary_step, bare_step, single_update, sums, use, settings, spoilt_plan]


def one(data: bytes) -> None:
    """Whatever is given, nothing is written that may not be."""
    choose = chooser(data)
    twin = outcome(lambda: Twin(recipe(choose), {"backend": "native"}))
    for _ in range(choose(range(1, 5)) if isinstance(twin, Twin) else 0):
        choose(ENTRIES)(choose, twin)
        assert twin.guards.intact(), "written outside of the arrays"


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
