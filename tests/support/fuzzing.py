"""Random optimizers, gradients and uses of them, for `test_fuzz.py` and `fuzz_core.py`.

A recipe is chosen once and carried out several times, on arrays that are alike and share nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

import fusedopt as fo
from exactness import RULES, SERIAL, Array, Guards

Choose = Callable[[Sequence[Any]], Any]
"""Takes one of several."""

DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
SEEDS = range(2**16)
EXTENTS = (0, 1, 2, 3, 7, 16, 17, 64, 65, 255, 256, 257, 300)
STORED = [None, None, "float32", "float64", "bfloat16", "float16", "float8", "dynamic8", "dynamic4"]


@dataclass(frozen=True)
class LeafRecipe:
    shape: tuple[int, ...]
    dtype: str
    order: str
    seed: int


def numbers(seed: int, shape: tuple[int, ...], dtype: str, odd: float = 0.0) -> Array:
    """Draw numbers of many magnitudes, and zeros; `odd` of them extreme, infinite or NaN."""
    rng = np.random.default_rng(seed)
    x = np.ldexp(rng.standard_normal(shape), rng.integers(-12, 4, shape))
    x = np.where(rng.random(shape) < 0.05, 0.0, x)
    extreme = rng.choice([np.inf, -np.inf, np.nan, -1e-30, 1e30, 1e300, -6e4], shape)
    x = np.where(rng.random(shape) < odd, extreme, x)
    with np.errstate(all="ignore"):
        return np.asarray(x).astype(DTYPES[dtype])


def leaf_recipe(choose: Choose, dtype: str) -> LeafRecipe:
    shape = tuple(choose(EXTENTS) for _ in range(choose(range(4))))
    while int(np.prod(shape)) > 30_000:
        shape = shape[1:]
    if choose(range(10)) == 0:
        shape = choose([(4096,), (64, 65), (SERIAL + 77,), (17, 5000)])
    return LeafRecipe(shape, dtype, choose("CCCF"), choose(SEEDS))


OPTIONS: dict[str, list[Any]] = {
    "clip_norm": [None, None, 0.5, 1e3],
    "clip_value": [None, None, 0.125],
    "skip_nonfinite": [False, True],
    "zero_grads": [False, True],
    "state_dtype": STORED,
    "rounding": ["nearest", "nearest", "stochastic", "kahan"],
    "master": [None, None, "float32", "split16"],
    "ema": [None, None, 0.5],
    "slow_weights": [None, None, fo.Lookahead(k=2)],
    "stats": [False, True],
    "exact": [False, False, True],
    "seed": [0, 5],
    "threads": [None, 1, 2, 7],
}


@dataclass(frozen=True)
class Recipe:
    """An optimizer: its leaves, rules by leaf, and options. copies: dtypes of `copy_out`."""

    leaves: tuple[LeafRecipe, ...]
    rules: tuple[str, ...]
    options: dict[str, Any]
    copies: tuple[str | None, ...] | None

    def nest(self, arrays: list[Any]) -> Any:
        """The tree of leaves; every number of them has a shape of its own."""
        if len(arrays) == 1:
            return arrays[0]
        return {"a": arrays[0], "b": [arrays[1], {"c": tuple(arrays[2:])}]}


def recipe(choose: Choose) -> Recipe:
    narrow = choose(["bfloat16", "bfloat16", "float16"])
    dtypes = choose([["float32"], ["float64"], [narrow], list(DTYPES)])
    leaves = tuple(leaf_recipe(choose, choose(dtypes)) for _ in range(choose(range(1, 5))))
    names = sorted(RULES)
    some = [choose(names), choose(names)][: choose([1, 2])]
    rules = tuple(choose(some) for _ in leaves)
    options = {key: choose(values) for key, values in OPTIONS.items()}
    copies = None
    if choose(range(4)) == 0:
        copies = tuple(choose([None, *DTYPES]) for _ in leaves)
    return Recipe(leaves, rules, options, copies)


@dataclass
class Twin:
    """One carrying out of a recipe, with guard bytes round every array that it is given."""

    recipe: Recipe
    changes: dict[str, Any]
    guards: Guards = field(default_factory=lambda: Guards(1))

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.params = [self.place(self.parameter(leaf)) for leaf in recipe.leaves]
        self.copies: list[Any] = []
        options = {**recipe.options, **self.changes}
        if recipe.copies is not None:
            for leaf, dtype in zip(recipe.leaves, recipe.copies, strict=True):
                like = np.zeros(leaf.shape, DTYPES[dtype or "float32"], leaf.order)  # type: ignore[call-overload]
                self.copies.append(None if dtype is None else self.place(like))
            options["copy_out"] = recipe.nest(self.copies)
        rule = dict(zip(map(id, self.params), recipe.rules, strict=True))
        self.opt = fo.Optimizer(
            recipe.nest(self.params), lambda path, a: RULES[rule[id(a)]], **options
        )

    def place(self, a: Array) -> Array:
        """Return the array, in its memory order, between guards."""
        if a.ndim > 1 and a.flags.f_contiguous and not a.flags.c_contiguous:
            return self.guards.place(a.T).T
        return self.guards.place(a)

    def written(self) -> list[Any]:
        """Arrays that a step may write."""
        states = (s for leaf in self.opt.state.values() for s in leaf.values())
        return [*self.params, *self.copies, *states]

    @staticmethod
    def parameter(leaf: LeafRecipe) -> Array:
        x = numbers(leaf.seed, leaf.shape, leaf.dtype)
        return np.asarray(x, order=leaf.order)  # type: ignore[call-overload,no-any-return]


Make = Callable[[Twin, int], Any]
"""Makes the k-th leaf's gradient."""


def array(seed: int, dtype: str, odd: float, layout: str) -> Make:
    def make(twin: Twin, k: int) -> Any:
        shape = twin.params[k].shape
        x = numbers(seed + k, shape, dtype, odd)
        if layout == "same":
            return twin.place(np.asarray(x, order=twin.recipe.leaves[k].order))  # type: ignore[call-overload]
        if layout == "other order":
            return twin.place(x.T.copy().T)
        if layout == "strided" and x.ndim:
            return twin.place(np.repeat(x, 2, axis=0))[::2]
        if layout == "backwards" and x.ndim:
            return twin.place(x[::-1].copy())[::-1]
        if layout == "broadcast" and x.ndim and x.shape[0]:
            return np.broadcast_to(twin.place(x[:1].copy()), shape)
        if layout == "unaligned":
            raw = twin.guards.place(np.zeros(x.nbytes + 1, np.uint8))
            there = np.ndarray(shape, x.dtype, raw.data, 1)
            there[...] = x
            return there
        if layout == "read-only":
            there = twin.place(x)
            there.flags.writeable = False
            return there
        return twin.place(x)

    return make


def rows(seed: int, dtype: str, odd: float, outside: bool) -> Make:
    def make(twin: Twin, k: int) -> Any:
        shape = twin.params[k].shape
        if not shape:
            return None
        rng = np.random.default_rng(seed + k)
        indices = rng.integers(0, max(1, shape[0]), min(shape[0], int(rng.integers(0, 9))))
        values = twin.place(numbers(seed, (indices.size, *shape[1:]), dtype, odd))
        return fo.Rows(indices + outside * shape[0], values)

    return make


def aliased(target: str) -> Make:
    """Memory that the step writes, or a plain misfit."""

    def make(twin: Twin, k: int) -> Any:
        p = twin.params[k]
        if target == "parameter":
            return p
        if target == "copy" and twin.copies and twin.copies[k] is not None:
            return twin.copies[k]
        if target == "state":
            path = list(twin.opt.state)[k]
            found = [s for s in twin.opt.state[path].values() if isinstance(s, np.ndarray)]
            return found[0] if found else p
        return {
            "text": "gradient",
            "integers": np.zeros(p.shape, np.int32),
            "complex": np.zeros(p.shape, np.complex64),
            "objects": np.full(p.shape, None, object),
            "swapped": np.zeros(p.shape, ">f4" if np.little_endian else "<f4"),
            "shape": np.zeros((*p.shape, 1), p.dtype),
            "list": np.zeros(p.shape).tolist(),
            "tree": {"x": p},
            "tuple": (
                np.zeros(1, np.int64),
                np.full(1, 2**40),
                np.zeros((1, *p.shape[1:]), p.dtype),
            ),
            "subclass": np.ma.masked_array(np.zeros(p.shape, p.dtype)),
        }.get(target, 3)

    return make


MISFITS = ("parameter", "copy", "state", "text", "integers", "complex", "objects", "swapped",
           "shape", "list", "tree", "tuple", "subclass", "number")  # fmt: skip


LAYOUTS = ("other order", "strided", "backwards", "broadcast", "unaligned", "read-only")


def gradients(choose: Choose) -> list[Make]:
    """Makers for four leaves."""
    seed, odd = choose(SEEDS), choose([0.0, 0.0, 0.0, 0.01])
    makers: list[Make] = []
    for _ in range(4):
        kind, dtype = choose(range(20)), choose(sorted(DTYPES))
        if kind == 0:
            makers.append(aliased(choose(MISFITS)))
        elif kind == 1:
            makers.append(lambda twin, k: None)
        elif kind < 5:
            makers.append(rows(seed, dtype, odd, choose(range(10)) == 0))
        else:
            layout = choose(LAYOUTS) if kind < 10 else "same"
            makers.append(array(seed, dtype, odd, layout))
    return makers


USES: dict[str, Callable[[Twin], object]] = {
    "lr": lambda t: setattr(t.opt, "lr", t.opt.lr if isinstance(t.opt.lr, dict) else 0.01),
    "replace": lambda t: t.opt.replace(weight_decay=0.05),
    "pickle": lambda t: t.opt.load_state_dict(copy.deepcopy(t.opt.state_dict())),
    "sync": lambda t: t.opt.sync(),
    "rebind": lambda t: rebound(t),
    "averaged": lambda t: inside(t.opt.averaged()),
    "lookahead": lambda t: inside(t.opt.lookahead()),
    "catch_up": lambda t: t.opt.catch_up(),
    "other step": lambda t: t.opt.step(),
}


def rebound(twin: Twin) -> None:
    fresh = [twin.place(p.copy(order="A")) for p in twin.params]
    twin.opt.rebind(twin.recipe.nest(fresh))
    twin.params = fresh


def inside(context: Any) -> None:
    with context:
        pass
