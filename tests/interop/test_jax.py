"""fusedopt.jax against optax: trajectories, states, and memory that stays where it is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
if importlib.util.find_spec("fusedopt._jax") is None:
    pytest.skip("built without jaxlib's headers", allow_module_level=True)

import fusedopt.jax as fj  # noqa: E402

SHAPES = {"w": (30, 70), "block": [(5,), (), (1, 1)]}
STEPS = 25
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 5, 30)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {"learning_rate": 1e-2}),
    ("adamw", {"learning_rate": SCHEDULE, "weight_decay": 0.1, "b1": 0.8, "b2": 0.9}),
    ("adamw", {"learning_rate": 1e-2, "eps": 1e-3, "eps_root": 1e-4}),
    ("adam", {"learning_rate": SCHEDULE}),
    ("lion", {"learning_rate": SCHEDULE, "b1": 0.8}),
]
IDS = [f"{name}-{'-'.join(arguments)}" for name, arguments in CASES]


def tree(seed: int, dtype: type = np.float32) -> Any:
    """Arrays of normal numbers of all sizes, the same at every call with a seed."""
    source = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> Any:
        wide = source.standard_normal(shape) * 10 ** source.uniform(-3, 1, shape)
        return jax.numpy.asarray(wide.astype(np.float32).astype(dtype))

    return jax.tree.map(draw, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


def equal(ours: Any, theirs: Any) -> bool:
    """Whether two trees have the same elements."""
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, ours, theirs)))


def applied(opt: Any) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """The two calls of optax in one."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(opt: Any, step: Any, dtype: type = np.float32) -> tuple[Any, Any]:
    """Parameters and state after some steps."""
    params = tree(0, dtype)
    state = opt.init(params)
    for k in range(STEPS):
        params, state = step(params, state, tree(1 + k, dtype))
    return params, state


def assert_near(ours: Any, theirs: Any, exact: Any) -> None:
    """Two runs in float32 part by their roundings, which optax's own shows."""
    leaves = (jax.tree.leaves(found) for found in (ours, theirs, exact))
    for a, b, c in zip(*leaves, strict=True):
        if not np.issubdtype(c.dtype, np.floating):
            assert a == b == c
            continue
        found, other, wide = (np.asarray(x, np.float64) for x in (a, b, c))
        bound = 4 * np.abs(other - wide).max() + 16 * np.finfo(np.float32).eps * np.abs(wide)
        assert (np.abs(found - wide) <= bound).all()


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=IDS)
@pytest.mark.parametrize("way", ["donated", "kept", "not compiled"])
def test_a_run_is_that_of_optax(name: str, arguments: dict[str, Any], way: str) -> None:
    a, b = (getattr(module, name)(**arguments) for module in (fj, optax))
    steps = {
        "donated": jax.jit(a.step, donate_argnums=(0, 1)),
        "kept": jax.jit(a.step),
        "not compiled": a.step,
    }
    ours = run(a, steps[way])
    theirs = run(b, jax.jit(applied(b)))
    with jax.enable_x64(True):
        exact = run(b, jax.jit(applied(b)), np.float64)
        wide = run(a, jax.jit(a.step), np.float64)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert_near(ours, theirs, exact)
    for p, q in zip(jax.tree.leaves(wide[0]), jax.tree.leaves(exact[0]), strict=True):
        assert np.allclose(p, q, rtol=1e-9, atol=1e-11)


def test_donated_arrays_stay_where_they_are() -> None:
    opt = fj.adamw(1e-2)
    params = tree(0)
    state = opt.init(params)
    step = jax.jit(opt.step, donate_argnums=(0, 1))
    moments = (state[0].mu, state[0].nu)
    before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, moments))]
    grads = tree(1)
    params, state = step(params, state, grads)
    moments = (state[0].mu, state[0].nu)
    assert before == [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, moments))]
    assert equal(grads, tree(1))


def test_what_is_not_donated_is_left_alone() -> None:
    opt = fj.adamw(1e-2)
    params, grads = tree(0), tree(1)
    state = opt.init(params)
    new, _ = jax.jit(opt.step)(params, state, grads)
    assert equal(params, tree(0))
    assert not np.array_equal(new["w"], params["w"])
    assert not np.asarray(state[0].mu["w"]).any()


def test_a_run_goes_from_optax_to_fusedopt_and_back() -> None:
    ours, theirs = fj.adamw(SCHEDULE), optax.adamw(SCHEDULE)
    assert isinstance(ours, optax.GradientTransformationExtraArgs)
    expected = run(theirs, jax.jit(applied(ours)))
    params = tree(0)
    state = theirs.init(params)
    steps = [jax.jit(applied(theirs)), jax.jit(ours.step)]
    for k in range(STEPS):
        params, state = steps[k // 5 % 2](params, state, tree(1 + k))
    assert jax.tree.structure(state) == jax.tree.structure(expected[1])
    for p, q in zip(*map(jax.tree.leaves, (params, expected[0])), strict=True):
        assert np.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_updated_is_refused() -> None:
    opt = fj.adamw(1e-2)
    params = {"w": jax.numpy.ones(3, jax.numpy.bfloat16)}
    with pytest.raises(TypeError, match="got bfloat16"):
        opt.step(params, opt.init(params), params)


def test_an_error_in_the_step_arrives() -> None:
    call = jax.ffi.ffi_call(fj.TARGET, [jax.ShapeDtypeStruct((3,), np.float32)])
    with pytest.raises(Exception, match="nothing"):
        jax.block_until_ready(
            call(np.int32(1), np.float32(1), jax.numpy.ones(3), rule='{"rule": "nothing"}',
                 leaves=np.int64(1))
        )  # fmt: skip
