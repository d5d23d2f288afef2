"""None in the place of a parameter, as of a layer without bias: the run of the tree without it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import fusedopt as fo
from exactness import Array
from fusedopt import interop
from fusedopt.hessian import hutchinson
from fusedopt.system.extension import core

WITH = {"a": [{"w": "w", "b": None}, None, {"w": "v", "b": ()}], "s": "s", "last": None}
WITHOUT = {"a": {"0": {"w": "w"}, "2": {"w": "v"}}, "s": "s"}
SHAPES = {"w": (4, 3), "v": (3, 2), "s": (5,)}
RULES = {"s": fo.Sophia(), "a.0.*": fo.Nesterov(form="lookahead"), "*": fo.AdamW()}
BACKENDS = ["native", "numba", "reference"] if core else ["numba", "reference"]

Trees = Callable[[Callable[[str], Any]], Any]
Action = Callable[[fo.Optimizer, Trees, Path], Any]


def trees(shape: Any) -> Trees:
    """Makes trees of a shape, of what a function makes of the leaves' names."""

    def filled(node: Any, fill: Callable[[str], Any]) -> Any:
        if isinstance(node, dict):
            return {key: filled(each, fill) for key, each in node.items()}
        if isinstance(node, (list, tuple)):
            return type(node)(filled(each, fill) for each in node)
        return None if node is None else fill(node)

    return lambda fill: filled(shape, fill)


def drawn(seed: int, dtype: Any = np.float32) -> Callable[[str], Array]:
    def draw(name: str) -> Array:
        rng = np.random.default_rng([seed, *name.encode()])
        return np.asarray(rng.standard_normal(SHAPES[name])).astype(dtype)

    return draw


def some_rows(name: str) -> Any:
    return fo.Rows(np.array([1]), np.ones((1, 3), np.float32)) if name == "w" else drawn(3)(name)


def loaded(opt: fo.Optimizer, tree: Trees, folder: Path) -> None:
    opt.save(folder / "run.safetensors")
    opt.step(tree(drawn(3)))
    opt.load(folder / "run.safetensors")


def copied(copier: Callable[[Any], Any]) -> Action:
    def act(opt: fo.Optimizer, tree: Trees, folder: Path) -> str:
        other: fo.Optimizer = copier(opt)
        other.step(tree(drawn(3)))
        return other.fingerprint()

    return act


def state_dict(opt: fo.Optimizer, tree: Trees, folder: Path) -> list[str]:
    state = opt.state_dict()
    opt.step(tree(drawn(3)))
    opt.load_state_dict(state)
    return list(state["leaves"])


def looked_ahead(opt: fo.Optimizer, tree: Trees, folder: Path) -> str:
    with opt.lookahead():
        return opt.fingerprint()


def averaged(opt: fo.Optimizer, tree: Trees, folder: Path) -> tuple[float, str]:
    with opt.averaged():
        return fo.global_norm(opt.averaged().params), opt.fingerprint()


def curvature(opt: fo.Optimizer, tree: Trees, folder: Path) -> float:
    rng = np.random.default_rng(0)
    product = hutchinson(lambda: tree(drawn(3)), opt.params, rng)
    assert (product.get("last", None), len(product["a"])) == (None, len(opt.params["a"]))
    return fo.global_norm(product)


def counted(opt: fo.Optimizer, tree: Trees, folder: Path) -> Any:
    info = opt.step(tree(drawn(3)))
    return info.grad_norm, info.stats, opt.describe(), fo.estimate(opt.params, RULES, ema=0.5)


ACTIONS: dict[str, Action] = {
    "step": lambda o, t, f: o.step(t(drawn(3))),
    "a gradient that is None": lambda o, t, f: o.step(
        t(lambda n: None if n == "v" else drawn(3)(n))
    ),
    "hessian": lambda o, t, f: o.step(
        t(drawn(3)), hessian=t(lambda n: drawn(4)(n) if n == "s" else None)
    ),
    "rows": lambda o, t, f: o.step(t(some_rows)),
    "accumulate": lambda o, t, f: (o.accumulate(t(drawn(3))), o.accumulate(t(drawn(4))), o.step())[
        0
    ],
    "part": lambda o, t, f: o.step_part(["s"], [drawn(3)("s")], last=True),
    "rebind": lambda o, t, f: o.rebind(t(drawn(8, np.float16))),
    "load": loaded,
    "state_dict": state_dict,
    "pickle": copied(lambda o: pickle.loads(pickle.dumps(o))),
    "deepcopy": copied(copy.deepcopy),
    "lookahead": looked_ahead,
    "averaged": averaged,
    "hutchinson": curvature,
    "what is told": counted,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("action", ACTIONS)
def test_actions(action: str, backend: str, tmp_path: Path) -> None:
    found = []
    for shape in (WITH, WITHOUT):
        parts = action in ("rows", "part")  # of a gradient, of which there is no norm
        options: dict[str, Any] = {} if parts else {"clip_norm": 1.0, "stats": True}
        tree = trees(shape)
        copies = tree(drawn(1))
        opt = fo.Optimizer(
            tree(drawn(0, np.float16)), RULES, backend=backend, master="float32", ema=0.5,
            copy_out=copies, **options,
        )  # fmt: skip
        opt.step(tree(drawn(2)))
        result = ACTIONS[action](opt, tree, tmp_path)
        opt.step(tree(drawn(9)))
        found.append((repr(result), opt.fingerprint(), fo.global_norm(copies)))
    assert found[0] == found[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_rows_missed(backend: str) -> None:
    found = []
    for shape in (WITH, WITHOUT):
        tree = trees(shape)
        opt = fo.Optimizer(tree(drawn(0)), fo.AdamW(), exact=True, backend=backend)
        opt.step(tree(some_rows))
        opt.step(tree(some_rows))
        opt.catch_up()
        found.append(opt.fingerprint())
    assert found[0] == found[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_trees_are_refused(backend: str) -> None:
    tree = trees(WITH)
    opt = fo.Optimizer(tree(drawn(0)), fo.AdamW(), backend=backend)
    grads = tree(drawn(1))
    before = opt.fingerprint()
    for wrong, message in (
        ({**grads, "last": np.ones(3)}, r"\['last'\]: expected None, as the parameters have .*nda"),
        ({**grads, "a": [grads["a"][0], {}, grads["a"][2]]}, r"\['a'\]\[1\]: expected None.* dict"),
        ({k: g for k, g in grads.items() if k != "last"}, r"missing \['last'\]"),
    ):
        for act in (opt.step, opt.accumulate, opt.rebind):
            with pytest.raises((TypeError, ValueError), match=message):
                act(wrong)
    with pytest.raises(TypeError, match=r"params\['s'\]: expected an array, got None"):
        opt.rebind({**tree(drawn(0)), "s": None})
    assert opt.fingerprint() == before
    # What the caller does to the containers later does not change what the gradients are like.
    opt.params["last"] = np.ones(3)
    opt.accumulate(grads)
    opt.step()


def test_no_parameter_at_all() -> None:
    for params in (None, [None, {"w": None}]):
        with pytest.raises(ValueError, match="found no arrays"):
            fo.Optimizer(params, fo.AdamW())


class ScaleByAdamState(NamedTuple):
    """The state of optax's adam."""

    count: Any
    mu: Any
    nu: Any


def test_states_of_optax() -> None:
    tree = trees(WITH)
    rule = fo.Adam.like("optax", lr=0.1)
    there = (ScaleByAdamState(np.int32(3), tree(drawn(1)), tree(lambda n: drawn(2)(n) ** 2)),)
    opt = fo.Optimizer(tree(drawn(0)), rule)
    interop.from_optax(opt, there)
    assert opt.step_count == 3
    np.testing.assert_array_equal(opt.state["a.2.w"]["m"], there[0].mu["a"][2]["w"])
    back = interop.to_optax(opt, there)
    np.testing.assert_equal(back, there)


def test_states_of_torch() -> None:
    found = []
    for shape in (WITH, WITHOUT):
        tree = trees(shape)
        opt = fo.Optimizer(tree(drawn(0)), fo.Adam.like("torch"))
        opt.step(tree(drawn(1)))
        state = interop.to_torch(opt, tensors=False)
        other = fo.Optimizer(tree(drawn(0)), fo.Adam.like("torch"))
        interop.from_torch(other, state)
        other.step(tree(drawn(2)))
        found.append((repr(state), other.fingerprint()))
    assert found[0] == found[1]


def test_tensors_of_layers_without_bias() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.Linear(4, 2))
    params = [{"w": layer.weight, "b": layer.bias} for layer in net]
    opt = fo.Optimizer(params, fo.AdamW())
    before = [p.detach().clone() for p in net.parameters()]
    net(torch.ones(5, 3)).sum().backward()
    opt.step([{"w": p["w"].grad, "b": p["b"] if p["b"] is None else p["b"].grad} for p in params])
    assert all((a != b).any() for a, b in zip(before, net.parameters(), strict=True))
