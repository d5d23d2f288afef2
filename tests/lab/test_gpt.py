"""The small GPT: its gradients against differences, causality, and what surrounds it."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from fusedopt.arrays.trees import Tree
from fusedopt.lab.train import gpt

TINY = gpt.Config(vocab=7, context=5, layers=2, heads=2, width=6)
UNTIED = gpt.Config(vocab=7, context=5, layers=2, heads=2, width=6, tied=False)


def tokens(config: gpt.Config, shape: tuple[int, int], seed: int = 1) -> Any:
    return np.random.default_rng(seed).integers(config.vocab, size=shape)


def shaken(config: gpt.Config) -> gpt.Params:
    """Parameters of which none is 0 or 1, so that no term of a gradient vanishes."""
    rng = np.random.default_rng(0)
    params = gpt.init(rng, config, np.float64)
    for leaf in Tree(params).leaves:
        leaf.value[...] += 0.3 * rng.standard_normal(leaf.value.shape)
    return params


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_every_gradient_is_the_central_difference(config: gpt.Config) -> None:
    params = shaken(config)
    x, y = tokens(config, (3, 4)), tokens(config, (3, 4), seed=2)  # shorter than the context
    loss, grads = gpt.loss_and_grads(params, x, y, config)
    assert loss == pytest.approx(gpt.evaluate(params, x, y, config), rel=1e-14)
    tree, h = Tree(params), 1e-5
    for leaf, grad in zip(tree.leaves, tree.flatten(grads, "grads"), strict=True):
        difference = np.empty_like(leaf.value)
        for index, kept in np.ndenumerate(leaf.value):
            leaf.value[index] = kept + h
            above = gpt.evaluate(params, x, y, config)
            leaf.value[index] = kept - h
            below = gpt.evaluate(params, x, y, config)
            leaf.value[index] = kept
            difference[index] = (above - below) / (2 * h)
        np.testing.assert_allclose(grad, difference, rtol=1e-6, atol=1e-9, err_msg=leaf.path)
        assert np.any(grad), leaf.path


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_gradients_have_the_shape_dtype_and_order_of_their_parameters(config: gpt.Config) -> None:
    params = gpt.init(np.random.default_rng(0), config)
    _, grads = gpt.loss_and_grads(params, tokens(config, (2, 5)), tokens(config, (2, 5)), config)
    tree = Tree(params)
    for leaf, grad in zip(tree.leaves, tree.flatten(grads, "grads"), strict=True):
        assert (grad.shape, grad.dtype) == (leaf.value.shape, np.float32), leaf.path
        assert grad.flags.c_contiguous, leaf.path


def test_no_position_sees_a_later_one() -> None:
    params = shaken(TINY)
    x = tokens(TINY, (2, 5))
    before = gpt.logits(params, x, TINY)
    for t in range(5):
        changed = x.copy()
        changed[:, t] = (changed[:, t] + 1) % TINY.vocab
        after = gpt.logits(params, changed, TINY)
        np.testing.assert_allclose(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        # Every position from t on does see it.
        assert np.all(np.abs(after[:, t:] - before[:, t:]).max(axis=-1) > 1e-6)


def test_sequences_of_a_batch_are_apart() -> None:
    params = shaken(TINY)
    x = tokens(TINY, (4, 5))
    alone = np.concatenate([gpt.logits(params, row[None], TINY) for row in x])
    np.testing.assert_allclose(gpt.logits(params, x, TINY), alone, rtol=0, atol=1e-12)


def test_initial_sizes() -> None:
    params = gpt.init(np.random.default_rng(0), gpt.Config(vocab=103, layers=2, width=128))
    first = params["blocks"][0]
    for weights, std in [
        (params["wte"], 0.02),
        (first["qkv"]["w"], 128**-0.5),
        (first["out"]["w"], 128**-0.5 / 2),
        (first["down"]["w"], 512**-0.5 / 2),
    ]:
        assert weights.std() == pytest.approx(std, rel=0.05)
        assert abs(weights.mean()) < 0.05 * std
    assert np.all(first["norm1"]["g"] == 1)
    assert not np.any(first["qkv"]["b"])


@pytest.mark.parametrize("tied", [True, False])
def test_the_first_loss_is_near_that_of_guessing(tied: bool) -> None:
    config = gpt.Config(vocab=103, tied=tied)
    params = gpt.init(np.random.default_rng(0), config)
    x, y = tokens(config, (8, 64)), tokens(config, (8, 64), seed=2)
    assert gpt.loss_and_grads(params, x, y, config)[0] == pytest.approx(math.log(103), abs=0.1)


def test_a_forward_pass_serves_several_backward_passes() -> None:
    params = shaken(TINY)
    x, y = tokens(TINY, (2, 5)), tokens(TINY, (2, 5), seed=2)
    scores, cache = gpt.forward(params, x, TINY)
    _, dlogits = gpt.cross_entropy(scores, y)
    kept = deepcopy((scores, dlogits))
    first, second = (gpt.backward(params, cache, dlogits, TINY) for _ in range(2))
    tree = Tree(params)
    for a, b in zip(tree.flatten(first, "first"), tree.flatten(second, "second"), strict=True):
        assert a.tobytes() == b.tobytes()
    assert scores.tobytes() == kept[0].tobytes()
    assert dlogits.tobytes() == kept[1].tobytes()


def test_cross_entropy_of_large_logits() -> None:
    logits = np.array([[[1e4, 0.0], [-1e4, 1e4]]], np.float32)
    loss, dlogits = gpt.cross_entropy(logits, np.array([[0, 0]]))
    assert loss == pytest.approx(1e4)
    np.testing.assert_array_equal(dlogits, [[[0.0, 0.0], [-0.5, 0.5]]])


def test_evaluate_weighs_windows_not_batches() -> None:
    params = shaken(TINY)
    x, y = tokens(TINY, (5, 4)), tokens(TINY, (5, 4), seed=2)
    whole = gpt.loss_and_grads(params, x, y, TINY)[0]
    assert gpt.evaluate(params, x, y, TINY, batch=2) == pytest.approx(whole, rel=1e-13)


def test_sample_draws_from_the_model() -> None:
    params = shaken(TINY)
    prompt = tokens(TINY, (1, 9))[0]  # longer than the context

    def draw(seed: int, temperature: float = 0.8) -> list[int]:
        rng = np.random.default_rng(seed)
        return list(gpt.sample(params, prompt, 40, TINY, rng, temperature))

    assert len(draw(0)) == 40
    assert set(draw(0)) <= set(range(TINY.vocab))
    assert draw(0) == draw(0) != draw(1)
    best = int(gpt.logits(params, prompt[None, -TINY.context :], TINY)[0, -1].argmax())
    assert draw(0, temperature=1e-6)[0] == best


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 0}, "layers: expected at least 1, got 0"),
        ({"heads": 3, "width": 8}, r"width: expected a multiple of heads \(3\), got 8"),
    ],
)
def test_sizes_that_make_no_model(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpt.Config(vocab=7, **sizes)


def test_more_positions_than_the_context() -> None:
    with pytest.raises(ValueError, match="expected at most 5 positions, got 6"):
        gpt.logits(gpt.init(np.random.default_rng(0), TINY), tokens(TINY, (1, 6)), TINY)
