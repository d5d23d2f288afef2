"""The whole step: norm, clipping, update and zeroing in one; rows; accumulation.

Run it as `python benchmarks/whole.py [--rounds N] [--only PART ...] [--json F] [--markdown F]`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import fusedopt as fo
from fusedopt.lab.bench import naive
from fusedopt.lab.bench.contenders import LIMIT, Contender, pytorch
from fusedopt.lab.bench.measure import interleaved
from fusedopt.lab.bench.problems import Array, Shapes, gpt2_small, tensors
from limit import TILE, Streams, Sweep
from targets import Parts, Row, main, race, speedup

RULE = fo.AdamW(lr=1e-4, weight_decay=0.1)
CLIP = 1.0
READ = 0


class Whole:
    """Arrays of a clipped AdamW step that zeroes its gradients; all contenders work on these."""

    def __init__(self, shapes: Shapes) -> None:
        rng = np.random.default_rng(0)
        self.params, self.grads = (
            {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
            for _ in range(2)
        )
        self.optimizer = fo.Optimizer(self.params, RULE, clip_norm=CLIP, zero_grads=True)
        self.states = [tuple(state.values()) for state in self.optimizer.state.values()]
        self.refill()

    def refill(self) -> None:
        """Gradients and states as in a run, after a step has zeroed the gradients."""
        rng = np.random.default_rng(1)
        for g, (m, v) in zip(self.grads.values(), self.states, strict=True):
            g[...] = rng.standard_normal(g.shape, np.float32)
            np.multiply(g, np.float32(0.1), out=m)
            np.abs(m, out=v)

    @property
    def elements(self) -> int:
        """The number of elements of all parameters together."""
        return sum(p.size for p in self.params.values())

    @property
    def bytes_per_step(self) -> int:
        """One reading of the gradients, then four arrays read and written."""
        return (4 + 16 + 16) * self.elements

    def check(self, step: Callable[[], object], t: int) -> None:
        """Takes a t-th step; AssertionError where the smallest leaf is not what it should be."""
        self.refill()
        norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in self.grads.values()))
        (b1, b2), wide = RULE.betas, np.float64
        k = min(range(len(self.states)), key=lambda k: self.states[k][0].size)
        name = list(self.params)[k]
        p, g = self.params[name].astype(wide), self.grads[name].astype(wide) * CLIP / norm
        m, v = (s.astype(wide) for s in self.states[k])
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        assert isinstance(RULE.lr, float)
        p -= RULE.lr * (
            m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + RULE.eps) + RULE.weight_decay * p
        )
        step()
        for got, want in zip((self.params[name], *self.states[k]), (p, m, v), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)
        assert not any(g.any() for g in self.grads.values())


def limit(whole: Whole) -> Contender:
    """One reading of the gradients, then one pass that reads and writes all four arrays."""
    read = reading(list(whole.grads.values()))
    everything = zip(whole.params.values(), whole.grads.values(), whole.states, strict=True)
    update = Sweep([((), (p, g, *states)) for p, g, states in everything], fo.get_threads())

    def step() -> None:
        read()
        update()

    return Contender(LIMIT, step, step)


def reading(arrays: list[Array]) -> Streams:
    """One plain reading of float32 arrays."""
    return Streams([(a.size, [(a, 4 * TILE, READ)]) for a in arrays], fo.get_threads())


def fused(whole: Whole) -> Contender:
    """`Optimizer.step` with clip_norm and zero_grads."""
    optimizer, grads = whole.optimizer, whole.grads

    def step() -> None:
        optimizer.step(grads)

    return Contender("fusedopt", step, lambda: whole.check(step, optimizer.step_count + 1))


def numpy(whole: Whole) -> Contender:
    """NumPy with care: norms by dot products, and every pass in place."""
    adamw = naive.STEPS["adamw"]
    scratch = np.empty(max(p.size for p in whole.params.values()), np.float32)
    steps = [0]

    def step() -> None:
        steps[0] += 1
        flat = [g.reshape(-1) for g in whole.grads.values()]
        norm = float(np.sqrt(sum(float(g @ g) for g in flat)))
        leaves = zip(whole.params.values(), whole.grads.values(), whole.states, strict=True)
        for p, g, states in leaves:
            g *= min(1.0, CLIP / norm) if norm else 1.0
            adamw(RULE, steps[0], p, g, states, scratch[: p.size].reshape(p.shape))
            g[...] = 0

    return Contender("NumPy", step, lambda: whole.check(step, steps[0] + 1))


def torch(whole: Whole) -> Contender:
    """PyTorch's clip_grad_norm_, fused AdamW and zero_grad(set_to_none=False)."""
    module = pytorch()
    module.set_num_threads(fo.get_threads())
    parameters = [module.from_numpy(p) for p in whole.params.values()]
    for parameter, g in zip(parameters, whole.grads.values(), strict=True):
        parameter.grad = module.from_numpy(g)
    optimizer = module.optim.AdamW(
        parameters, lr=RULE.lr, betas=RULE.betas, eps=RULE.eps, weight_decay=RULE.weight_decay,
        fused=True,
    )  # fmt: skip
    for parameter, (m, v) in zip(parameters, whole.states, strict=True):
        optimizer.state[parameter] = {
            "step": module.zeros((), dtype=module.float32),
            "exp_avg": module.from_numpy(m),
            "exp_avg_sq": module.from_numpy(v),
        }
    steps = [0]

    def step() -> None:
        steps[0] += 1
        module.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return Contender("torch", step, lambda: whole.check(step, steps[0] + 1))


def contenders(whole: Whole) -> dict[str, Callable[[], Contender]]:
    """Who can take this step here."""
    able: dict[str, Callable[[], Contender]] = {
        "fusedopt": functools.partial(fused, whole),
        "NumPy": functools.partial(numpy, whole),
    }
    if pytorch() is not None:
        able["torch"] = functools.partial(torch, whole)
    return able


def norm(rounds: int) -> Iterator[Row]:
    """The global norm of GPT-2 small's gradients against one plain reading of these."""
    rng = np.random.default_rng(0)
    grads = [rng.standard_normal(shape, np.float32) for shape in gpt2_small().values()]
    found = fo.global_norm(grads)
    expected = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    times = interleaved({LIMIT: reading(grads), "norm": lambda: fo.global_norm(grads)}, rounds)
    target = "global norm, GPT-2 small: speed relative to a plain reading"
    yield Row(target, times.ratio(LIMIT, "norm"), 0.9, times.medians())


def whole(rounds: int) -> Iterator[Row]:
    """Clipping, AdamW and zeroing over GPT-2 small."""
    arrays = Whole(gpt2_small())
    times = race([limit(arrays), *(make() for make in contenders(arrays).values())], rounds)
    where = "clip + adamw + zero, GPT-2 small"
    share = times.ratio(LIMIT, "fusedopt")
    yield Row(f"{where}: speed relative to the limit", share, 0.93, times.medians())
    yield speedup(where, times, "torch", 1.5)


def rows(rounds: int) -> Iterator[Row]:
    """1 % of the rows of an embedding table against all of them."""
    shape = (50257, 768)
    rng = np.random.default_rng(0)
    tables = [rng.standard_normal(shape, np.float32) for _ in range(2)]
    dense = rng.standard_normal(shape, np.float32)
    indices = rng.permutation(shape[0])[: shape[0] // 100]
    given = fo.Rows(indices, dense[indices])
    lazy, whole = (fo.Optimizer(table, RULE) for table in tables)
    before = tables[0].copy()
    lazy.step(given)
    assert np.flatnonzero((tables[0] != before).any(1)).tolist() == sorted(indices)
    steps = {"rows": lambda: lazy.step(given), "whole": lambda: whole.step(dense)}
    times = interleaved(steps, rounds)
    target = "adamw, 1 % of the rows of 50257 x 768: time over the whole table's"
    yield Row(target, times.ratio("rows", "whole"), 0.03, times.medians(), at_least=False)


def accumulation(rounds: int) -> Iterator[Row]:
    """Adding gradients up, against a sweep that reads them and reads and writes the sums."""
    rng = np.random.default_rng(0)
    shapes: Any = gpt2_small()
    params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    grads = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    optimizer = fo.Optimizer(params, fo.SGD(lr=1.0))
    optimizer.accumulate(grads)
    optimizer.accumulate(grads)
    optimizer.step(grad_scale=2)
    assert all(np.array_equal(-params[name], grads[name]) for name in shapes)
    sweep = Sweep([((g,), (params[name],)) for name, g in grads.items()], fo.get_threads())
    optimizer.accumulate(grads)
    times = interleaved({LIMIT: sweep, "accumulate": lambda: optimizer.accumulate(grads)}, rounds)
    target = "accumulate, GPT-2 small: speed relative to the limit"
    yield Row(target, times.ratio(LIMIT, "accumulate"), 0.9, times.medians())


def many_small(rounds: int) -> Iterator[Row]:
    """What clipping adds to a step of many small tensors."""
    shapes = tensors(1000, 1000)
    arrays = Whole(shapes)
    plain = fo.Optimizer({k: p.copy() for k, p in arrays.params.items()}, RULE)
    grads = {k: g.copy() for k, g in arrays.grads.items()}
    steps = {"clipped": fused(arrays).step, "plain": lambda: plain.step(grads)}
    if pytorch() is not None:
        steps["torch"] = torch(Whole(shapes)).step
    times = interleaved(steps, rounds)
    target = "clip + adamw + zero, 1000 tensors of 1000: time over adamw alone"
    yield Row(target, times.ratio("clipped", "plain"), 2.0, times.medians(), at_least=False)


PARTS: Parts = {part.__name__: part for part in (norm, whole, rows, accumulation, many_small)}

if __name__ == "__main__":
    main("Measures the targets of the whole step.", PARTS)
