"""What ranks must find, each a function of the communicator: `mpiexec -n 4 python cases.py`.

Names choose cases, `--some` every third. Prints one line of JSON: the traceback of each case on
each rank, or null.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

import fusedopt as fo
from fusedopt.mpi import ShardedOptimizer, checkpoint, shared_arrays
from interrupting import FromOutside, interrupted_at

Case = Callable[[MPI.Comm], None]
CASES: dict[str, Case] = {}
BUCKET = 1 << 20
"""Bytes, so that gradients come in several rounds."""


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def parameters(dtype: Any = np.float32, seed: int = 0) -> dict[str, Any]:
    """Leaves that are cut, that are not, empty ones, one in Fortran order; places of none."""
    rng = np.random.default_rng(seed)

    def of(*shape: int) -> np.ndarray:
        return np.asarray(rng.standard_normal(shape)).astype(dtype)

    return {
        "embed": of(3000, 64),
        "block": [
            {"w": of(200, 300), "b": of(300)},
            {"w": np.asfortranarray(of(320, 256)), "b": None},
        ],
        "absent": None,
        "empty": of(0, 5),
        "scale": np.asarray(of()),
        "head": of(64, 128),
    }


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [x for value in tree.values() for x in leaves(value)]
    if isinstance(tree, list):
        return [x for value in tree for x in leaves(value)]
    return [] if tree is None else [tree]


def mapped(function: Callable[..., Any], *trees: Any) -> Any:
    first = trees[0]
    if isinstance(first, dict):
        return {k: mapped(function, *(tree[k] for tree in trees)) for k in first}
    if isinstance(first, list):
        return [mapped(function, *each) for each in zip(*trees, strict=True)]
    return None if first is None else function(*trees)


def gradients(like: Any, rank: int, step: int, dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng((rank, step))
    return mapped(
        lambda p: np.asarray(
            np.asarray(rng.standard_normal(p.shape)).astype(dtype),
            order="F" if p.flags.fnc else "C",
        ),
        like,
    )


def average(trees: list[Any], like: Any, mean: bool = True) -> Any:
    """In the order of the ranks, in the type that is computed in."""

    def of(p: np.ndarray, *grads: np.ndarray) -> np.ndarray:
        wide: Any = np.float64 if p.dtype == np.float64 else np.float32
        total = np.asarray(grads[0]).astype(wide)
        for g in grads[1:]:
            total += g.astype(wide)
        return np.asarray(total / wide(len(grads)) if mean else total)

    return mapped(of, like, *trees)


def equal(a: Any, b: Any) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.tobytes("A") == y.tobytes("A"), np.flatnonzero(x.ravel() != y.ravel())[:5]


def check(
    comm: MPI.Comm,
    rule: Any,
    *,
    dtype: Any = np.float32,
    grad_dtype: Any = np.float32,
    steps: int = 3,
    sharding: dict[str, Any] | None = None,
    common: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """A sharded run against one of an Optimizer that is given the average, bit for bit.

    common: parameters and gradients are in memory of all ranks.
    """
    params, expected = parameters(dtype), parameters(dtype)
    if common:
        params = shared_arrays(params, comm)
        own = shared_arrays(gradients(params, comm.rank, 0, grad_dtype), comm, each=True)
    sharding = {"bucket_bytes": BUCKET, **(sharding or {})}
    opt = ShardedOptimizer(params, rule, comm, **sharding, **options)
    whole = fo.Optimizer(expected, rule, **options)
    for step in range(steps):
        trees = [gradients(params, rank, step, grad_dtype) for rank in range(comm.size)]
        mine = trees[comm.rank]
        if common:
            mapped(np.copyto, own, mine)
            mine = own
        info = opt.step(mine)
        told = whole.step(average(trees, expected, sharding.get("reduce", "mean") == "mean"))
        equal(params, expected)
        assert info._replace(stats=None) == told._replace(stats=None), (info, told)
        for path, found in (told.stats or {}).items():
            for name, value in found.items():
                np.testing.assert_allclose((info.stats or {})[path][name], value, rtol=1e-12)
    return opt, whole


MIXED = {
    "block.*.w": fo.Muon(lr=0.02),
    "embed": fo.Lion(lr=1e-3),
    "*": fo.AdamW(lr=fo.schedules.Cosine(1e-2, 10)),
}


@case
def adamw(comm: MPI.Comm) -> None:
    check(comm, fo.AdamW(lr=1e-2))


@case
def sums_instead_of_means(comm: MPI.Comm) -> None:
    check(comm, fo.SGD(lr=1e-2), sharding={"reduce": "sum"})


@case
def several_rules_and_whole_matrices(comm: MPI.Comm) -> None:
    check(comm, MIXED)


@case
def only_data_parallel(comm: MPI.Comm) -> None:
    check(comm, MIXED, sharding={"shard": None}, clip_norm=1.0, stats=True)


@case
def rules_that_measure(comm: MPI.Comm) -> None:
    check(comm, {"embed": fo.LARS(lr=0.1), "*": fo.LAMB()})
    check(comm, fo.Prodigy(d0=0.01), sharding={"shard": None})
    raises(
        ValueError, "Prodigy takes sums", lambda: ShardedOptimizer(parameters(), fo.Prodigy(), comm)
    )


class RowLARS(fo.LARS):
    over: ClassVar[Any] = "row"

    def measured(self, t: int, lr: float, sums: Any) -> tuple[Any, ...]:
        p, g = np.sqrt(sums)
        return (lr * np.where((p > 0) & (g > 0), self.trust * p / g, 1.0),)


@case
def sums_of_each_row(comm: MPI.Comm) -> None:
    by_row = RowLARS(lr=0.1, weight_decay=0.1)
    rules = {"block.*": fo.AdamW(), "*": by_row}
    opt, _ = check(comm, rules, clip_norm=1.0, stats=True)
    held = opt.state.get("embed", {"v": np.zeros((0, 64))})["v"].shape[0]
    assert comm.allreduce(held) == 3000
    assert comm.size == 1 or held < 3000
    check(
        comm,
        {"block.*": fo.AdamW(), "*": by_row},
        state_dtype="bfloat16",
        master="float32",
        dtype=ml_dtypes.bfloat16,
    )


@case
def soap(comm: MPI.Comm) -> None:
    check(comm, {"head": fo.SOAP(lr=1e-3), "*": fo.Adam()})


@case
def float64(comm: MPI.Comm) -> None:
    check(comm, fo.Adam(), dtype=np.float64, grad_dtype=np.float64, clip_norm=0.5, stats=True)


@case
def clipped(comm: MPI.Comm) -> None:
    check(comm, fo.AdamW(), clip_norm=0.3, stats=True)


@case
def clipped_by_group(comm: MPI.Comm) -> None:
    check(comm, MIXED, clip_norm={"block.*.w": 1.0, "embed": None, "*": 0.1})


@case
def clipped_by_value_with_statistics(comm: MPI.Comm) -> None:
    check(comm, fo.Sophia(), clip_value=0.01, stats=True)


@case
def bfloat16_with_masters(comm: MPI.Comm) -> None:
    bf16 = ml_dtypes.bfloat16
    for master in ("float32", "split16"):
        check(comm, fo.AdamW(), dtype=bf16, grad_dtype=bf16, master=master)


@case
def random_bits(comm: MPI.Comm) -> None:
    bf16 = ml_dtypes.bfloat16
    check(
        comm, fo.AdamW(), dtype=bf16, grad_dtype=bf16, rounding="stochastic",
        state_dtype={"m": "bfloat16", "v": "float8"}, seed=3,
    )  # fmt: skip


@case
def blocks(comm: MPI.Comm) -> None:
    for name in ("dynamic8", "dynamic4"):
        check(comm, fo.AdamW(), state_dtype=name)


@case
def other_backends(comm: MPI.Comm) -> None:
    check(
        comm, fo.Adam(), steps=1, backend="reference",
        dtype=ml_dtypes.bfloat16, rounding="stochastic",
    )  # fmt: skip


@case
def verified(comm: MPI.Comm) -> None:
    check(comm, fo.AdamW(), steps=1, verify=True, rounding="stochastic", state_dtype="bfloat16")


IN_COMMON: tuple[tuple[Any, dict[str, Any]], ...] = (
    (fo.AdamW(lr=fo.schedules.Cosine(1e-2, 10), weight_decay=0.1), {}),
    (MIXED, {"ema": 0.9}),
    (fo.AdamW(), {"clip_norm": 0.3, "stats": True}),
    (fo.Adam(), {"dtype": np.float64, "grad_dtype": np.float64, "clip_value": 0.5}),
    (fo.AdamW(), {"dtype": ml_dtypes.bfloat16, "master": "float32"}),
    (
        fo.AdamW(),
        {
            "dtype": ml_dtypes.bfloat16, "grad_dtype": ml_dtypes.bfloat16,
            "rounding": "stochastic", "state_dtype": {"m": "dynamic8", "v": "dynamic4"}, "seed": 3,
        },
    ),
    (fo.SGD(), {"sharding": {"reduction": "fast"}}),  # where nothing is left to MPI
    (fo.SGD(), {"sharding": {"reduce": "sum"}}),
)  # fmt: skip


@case
def memory_in_common(comm: MPI.Comm) -> None:
    for rule, options in IN_COMMON:
        opt, whole = check(comm, rule, common=True, **options)
        assert opt.fingerprint() == whole.fingerprint()
        everywhere = comm.allgather(opt.params["head"].tobytes())
        assert len(set(everywhere)) == 1
    private = gradients(opt.params, comm.rank, 5)  # goes with parameters in common too
    opt.step(private)
    whole.step(average([gradients(opt.params, r, 5) for r in range(comm.size)], opt.params, False))
    equal(opt.params, whole.params)


@case
def contexts_with_memory_in_common(comm: MPI.Comm) -> None:
    params, expected = shared_arrays(parameters(), comm), parameters()
    rule = fo.Nesterov(form="lookahead")
    opt = ShardedOptimizer(params, rule, comm, ema=0.5)
    whole = fo.Optimizer(expected, rule, ema=0.5)
    for step in range(2):
        trees = [gradients(params, rank, step) for rank in range(comm.size)]
        opt.step(trees[comm.rank])
        whole.step(average(trees, expected))
        with opt.lookahead(), whole.lookahead():
            equal(params, expected)
        with opt.averaged(), whole.averaged():
            equal(params, expected)
        equal(params, expected)
    opt.save("in.common")
    opt.step(gradients(params, comm.rank, 9))
    opt.load("in.common")
    equal(params, expected)
    assert opt.fingerprint() == whole.fingerprint()


@case
def memory_in_common_that_is_refused(comm: MPI.Comm) -> None:
    params = shared_arrays({"w": np.full((300, 100), comm.rank, np.float32)}, comm)
    assert not params["w"].any(), "rank 0's values are everybody's"
    if comm.size == 1:
        return
    raises(
        ValueError, "every rank updates all",
        lambda: ShardedOptimizer(params, fo.SGD(), comm, shard=None),
    )  # fmt: skip
    opt = ShardedOptimizer(params, fo.SGD(), comm)
    grads = shared_arrays(params, comm, each=True)
    before = params["w"].copy()
    wrong = {"w": grads["w"][1:]} if comm.rank else grads
    raises(ValueError, "grads['w']", lambda: opt.step(wrong))
    equal(params, {"w": before})
    comm.Barrier()
    grads["w"][...] = 1.0 + comm.rank
    opt.step(grads)
    mean = np.float32((1 + comm.size) / 2)
    np.testing.assert_allclose(params["w"], before - np.float32(1e-2) * mean, rtol=1e-6)


@case
def fast_within_its_bound(comm: MPI.Comm) -> None:
    params = {"w": np.zeros((700, 256), np.float32)}
    ShardedOptimizer(params, fo.SGD(lr=1.0), comm, reduction="fast", reduce="sum").step(
        gradients(params, comm.rank, 0)
    )
    trees = [gradients(params, rank, 0)["w"].astype(np.float64) for rank in range(comm.size)]
    bound = (comm.size - 1) * 2.0**-24 * sum(np.abs(g) for g in trees)
    assert (np.abs(params["w"] + sum(trees)) <= bound).all()
    everywhere = comm.allgather(params["w"].tobytes())
    assert len(set(everywhere)) == 1


@case
def fast_leaves_bfloat16_exact(comm: MPI.Comm) -> None:
    check(comm, fo.SGD(), grad_dtype=ml_dtypes.bfloat16, sharding={"reduction": "fast"}, steps=1)


@case
def ranks_without_gradients(comm: MPI.Comm) -> None:
    params, expected = parameters(), parameters()
    opt = ShardedOptimizer(params, fo.AdamW(), comm, bucket_bytes=BUCKET)
    whole = fo.Optimizer(expected, fo.AdamW())
    for step in range(2):
        trees = [gradients(params, rank, step) for rank in range(comm.size)]
        mean = average(trees, expected)
        for rank in range(comm.size):
            trees[rank]["head"] = None
            if rank:
                trees[rank]["embed"] = None
        mean["head"], mean["embed"] = None, trees[0]["embed"] / np.float32(comm.size)
        opt.step(trees[comm.rank])
        whole.step(mean)
        equal(params, expected)


def rows_of(rank: int, step: int, shape: tuple[int, ...]) -> fo.Rows:
    rng = np.random.default_rng((7, rank, step))
    indices = rng.integers(0, shape[0], 40)
    return fo.Rows(indices, rng.standard_normal((40, *shape[1:])).astype(np.float32))


def average_rows(comm: MPI.Comm, step: int, shape: tuple[int, ...]) -> fo.Rows:
    """Equal rows are added in the order of the ranks, then divided."""
    parts = [rows_of(rank, step, shape) for rank in range(comm.size)]
    found: dict[int, np.ndarray] = {}
    for part in parts:
        own: dict[int, np.ndarray] = {}
        for index, value in zip(part.indices.tolist(), part.values, strict=True):
            own[index] = own[index] + value if index in own else value
        for index, value in own.items():
            found[index] = found[index] + value if index in found else value
    indices = np.array(sorted(found))
    return fo.Rows(indices, np.stack([found[k] for k in indices]) / np.float32(comm.size))


@case
def some_rows(comm: MPI.Comm) -> None:
    rules: tuple[fo.Rule, ...] = fo.Adam(lr=1e-2), RowLARS(lr=0.1)
    for exact, rule in itertools.product((False, True), rules):
        for shard in ("states", None):
            params, expected = ({"e": parameters()["embed"]} for _ in range(2))
            options: dict[str, Any] = {"exact": exact, "clip_norm": 1.0}
            opt = ShardedOptimizer(params, rule, comm, shard=shard, **options)
            whole = fo.Optimizer(expected, rule, **options)
            for step in range(3):
                if exact:
                    mine = rows_of(comm.rank, step, params["e"].shape).indices
                    opt.catch_up({"e": mine})
                    whole.catch_up({"e": average_rows(comm, step, params["e"].shape).indices})
                info = opt.step({"e": rows_of(comm.rank, step, params["e"].shape)})
                told = whole.step({"e": average_rows(comm, step, params["e"].shape)})
                equal(params, expected)
                assert info == told
            if exact:
                opt.catch_up()
                whole.catch_up()
                equal(params, expected)


@case
def accumulated(comm: MPI.Comm) -> None:
    params, expected = parameters(), parameters()
    opt = ShardedOptimizer(params, fo.AdamW(), comm, clip_norm=1.0, zero_grads=True)
    whole = fo.Optimizer(expected, fo.AdamW(), clip_norm=1.0)
    for step in range(2):
        for micro in range(2):
            trees = [gradients(params, rank, 2 * step + micro) for rank in range(comm.size)]
            whole.accumulate(average(trees, expected))
            assert opt.accumulate(trees[comm.rank]) == micro + 1
            assert not any(g.any() for g in leaves(trees[comm.rank]))
        assert opt.step(grad_scale=2.0) == whole.step(grad_scale=2.0)
        equal(params, expected)


@case
def averages_and_copies(comm: MPI.Comm) -> None:
    bf16 = ml_dtypes.bfloat16
    params, expected = parameters(), parameters()
    copies, others = (mapped(lambda p: p.astype(bf16), tree) for tree in (params, expected))
    opt = ShardedOptimizer(params, MIXED, comm, ema=0.9, copy_out=copies)
    whole = fo.Optimizer(expected, MIXED, ema=0.9, copy_out=others)
    for step in range(2):
        trees = [gradients(params, rank, step) for rank in range(comm.size)]
        opt.step(trees[comm.rank])
        whole.step(average(trees, expected))
    equal(copies, others)
    equal(opt.averaged().params, whole.averaged().params)
    with opt.averaged() as here, whole.averaged() as there:
        equal(here, there)
    equal(params, expected)


@case
def looking_ahead(comm: MPI.Comm) -> None:
    rule = fo.Nesterov(form="lookahead")
    params, expected = parameters(), parameters()
    opt, whole = ShardedOptimizer(params, rule, comm), fo.Optimizer(expected, rule)
    for step in range(2):
        trees = [gradients(params, rank, step) for rank in range(comm.size)]
        with opt.lookahead(), whole.lookahead():
            equal(params, expected)
        opt.step(trees[comm.rank])
        whole.step(average(trees, expected))
    equal(params, expected)


@case
def curvature(comm: MPI.Comm) -> None:
    params, expected = parameters(), parameters()
    opt, whole = ShardedOptimizer(params, fo.Sophia(), comm), fo.Optimizer(expected, fo.Sophia())
    for step in range(2):
        trees = [gradients(params, rank, step) for rank in range(comm.size)]
        estimates = [gradients(params, rank, 10 + step) for rank in range(comm.size)]
        opt.step(trees[comm.rank], hessian=estimates[comm.rank])
        whole.step(average(trees, expected), hessian=average(estimates, expected))
    equal(params, expected)


@case
def changed_hyperparameters(comm: MPI.Comm) -> None:
    params, expected = parameters(), parameters()
    opt, whole = ShardedOptimizer(params, fo.AdamW(), comm), fo.Optimizer(expected, fo.AdamW())
    for step in range(3):
        trees = [gradients(params, rank, step) for rank in range(comm.size)]
        for each in (opt, whole):
            each.replace(weight_decay=0.1 * step)
            each.lr = 1e-2 / (step + 1)
        params = mapped(lambda p: p.copy(order="K"), params)
        opt.rebind(params)
        opt.step(trees[comm.rank])
        whole.step(average(trees, expected))
        equal(params, expected)


@case
def a_nan_on_one_rank_skips_on_all(comm: MPI.Comm) -> None:
    for shard in ("states", None):
        params, before = parameters(), parameters()
        opt = ShardedOptimizer(params, fo.AdamW(), comm, shard=shard, skip_nonfinite=True)
        grads = gradients(params, comm.rank, 0)
        if comm.rank == comm.size - 1:
            grads["block"][0]["b"][7] = np.nan
        info = opt.step(grads)
        assert info.skipped
        assert info.bad_leaves == ("block.0.b",)
        assert opt.step_count == 0
        equal(params, before)


@case
def a_nan_on_one_rank_raises_on_all(comm: MPI.Comm) -> None:
    params, before = parameters(), parameters()
    opt = ShardedOptimizer(params, fo.AdamW(), comm, clip_norm=1.0)
    grads = gradients(params, comm.rank, 0)
    if comm.rank == 0:
        grads["embed"][-1, -1] = np.inf
    raises(FloatingPointError, "NaN or infinity in embed", lambda: opt.step(grads))
    equal(params, before)
    opt.step(gradients(params, comm.rank, 0))


def raises(kind: type[Exception], message: str, function: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        function()


@case
def bad_input_on_one_rank_raises_on_all(comm: MPI.Comm) -> None:
    params, before = parameters(), parameters()
    opt = ShardedOptimizer(params, fo.AdamW(), comm)
    culprit = comm.size - 1
    for kind in (ValueError, TypeError):
        grads = gradients(params, comm.rank, 0)
        if comm.rank == culprit:
            grads["head"] = grads["head"][1:] if kind is ValueError else grads["head"].tolist()
        named = "" if comm.rank == culprit else f"rank {culprit} of {comm.size}: "
        raises(kind, named + "grads['head']", functools.partial(opt.step, grads))
        equal(params, before)
    opt.step(gradients(params, comm.rank, 0))
    assert opt.step_count == 1


@case
def ranks_that_do_not_agree(comm: MPI.Comm) -> None:
    if comm.size == 1:
        return
    params = {"w": np.zeros((300, 7 + comm.rank), np.float32)}
    raises(ValueError, "expected the same parameters", lambda: ShardedOptimizer(params, fo.SGD()))
    for name in ("clip_leaf", "clip_adaptive", "centralize"):
        options: dict[str, Any] = {name: name == "centralize" or 0.5}
        refused = functools.partial(ShardedOptimizer, params, fo.SGD(), **options)
        raises(ValueError, f"{name}: is not supported by ShardedOptimizer", refused)
    params = {"w": np.full((300, 100), comm.rank, np.float32)}
    opt = ShardedOptimizer(params, fo.SGD(), comm)
    assert not params["w"].any(), "rank 0's values are everybody's"
    g = {"w": np.ones_like(params["w"])}
    raises(ValueError, "grad_scale", lambda: opt.step(g, grad_scale=1.0 + comm.rank))
    rows = fo.Rows(np.array([1]), np.ones((1, 100), np.float32))
    mixed = {"w": rows} if comm.rank else g
    raises(ValueError, "give Rows, others the whole", lambda: opt.step(mixed))
    missing = None if comm.rank else g
    raises(ValueError, "give none", lambda: opt.step(g, hessian=missing))
    opt.lr = 0.1 * (1 + comm.rank)
    raises(ValueError, "lr: expected the same", lambda: opt.step(g))


@case
def states_are_shared_out(comm: MPI.Comm) -> None:
    params = {str(k): np.zeros((400, 512), np.float32) for k in range(24)}
    opt = ShardedOptimizer(params, fo.AdamW(), comm)
    whole = sum(p.nbytes for p in params.values())
    own = sum(m.nbytes for state in opt.state.values() for m in state.values())
    assert own <= 1.02 * 2 * whole / comm.size
    assert sum(comm.allgather(own)) == 2 * whole
    assert f"rank {comm.rank} of {comm.size} updates" in opt.describe()
    matrices = {str(k): np.zeros((64 * (1 + k % 3), 192), np.float32) for k in range(24)}
    muon = ShardedOptimizer(matrices, fo.Muon(), comm)
    counts = comm.allgather(len(muon.state))
    assert sum(counts) == len(matrices)


KEPT: tuple[tuple[Any, dict[str, Any]], ...] = (
    (MIXED, {"ema": 0.9}),
    (MIXED, {"slow_weights": fo.Lookahead(k=2)}),
    ({"head": fo.SOAP(), "block.*.w": fo.Muon(), "*": fo.Adam()}, {}),
    (fo.AdamW(), {"state_dtype": "dynamic4", "rounding": "stochastic", "seed": 5}),
    (fo.AdamW(), {"dtype": ml_dtypes.bfloat16, "master": "float32", "state_dtype": "float8"}),
    (fo.AdamW(), {"dtype": ml_dtypes.bfloat16, "master": "split16"}),
    (fo.AdamW(), {"sharding": {"shard": None}}),
)


@case
def checkpoints_at_any_number_of_ranks(comm: MPI.Comm) -> None:
    for number, (rule, options) in enumerate(KEPT):
        opt, whole = check(comm, rule, steps=2, **options)
        assert opt.fingerprint() == whole.fingerprint()
        sharded, alone = f"{number}.sharded", f"{number}.alone"
        opt.save(sharded, metadata=[number])
        if comm.rank == 0:
            whole.save(alone, metadata=[number])
        comm.Barrier()
        options = dict(options)
        dtype, sharding = options.pop("dtype", np.float32), options.pop("sharding", {})
        other = fo.Optimizer(parameters(dtype, seed=1), rule, **options)
        assert other.load(sharded) == [number]
        assert other.fingerprint() == whole.fingerprint()
        fewer = comm.Split(int(comm.rank > 0))
        for ranks in (comm, fewer):
            for file in (sharded, alone):
                params = parameters(dtype, seed=1)
                again = ShardedOptimizer(params, rule, ranks, **sharding, **options)
                assert again.load(file) == [number]
                equal(params, whole.params)
                assert again.fingerprint() == whole.fingerprint()
            again.step(gradients(params, 0, 9))
        grads = gradients(params, 0, 9)
        other.step(grads)
        if fewer.size == 1:  # otherwise the average is taken of equal gradients, and rounded
            equal(params, other.params)


@case
def whole_states_in_memory(comm: MPI.Comm) -> None:
    for rule, given in KEPT:
        opt, whole = check(comm, rule, steps=1, **given)
        state, expected = opt.state_dict(), whole.state_dict()
        options = dict(given)
        dtype, sharding = options.pop("dtype", np.float32), options.pop("sharding", {})
        for kept in (state, expected):
            params = mapped(lambda p: p.copy(order="K"), opt.params)
            again = ShardedOptimizer(params, rule, comm, **sharding, **options)
            again.load_state_dict(kept)
            assert again.fingerprint() == whole.fingerprint()
        fresh = fo.Optimizer(params, rule, **options)
        fresh.load_state_dict(state)
        assert fresh.fingerprint() == whole.fingerprint()
        assert dtype == params["head"].dtype


@case
def checkpoints_that_do_not_fit(comm: MPI.Comm) -> None:
    opt, whole = check(comm, fo.AdamW(), steps=1)
    opt.save("fits")
    before = opt.fingerprint()
    other = ShardedOptimizer(parameters(), fo.AdamW(betas=(0.5, 0.9)), comm)
    untouched = other.fingerprint()
    raises(ValueError, "betas", lambda: other.load("fits"))
    assert other.fingerprint() == untouched
    other.load("fits", strict=False)
    assert other.fingerprint() == before == whole.fingerprint()
    small = ShardedOptimizer({"head": np.zeros((3, 4), np.float32)}, fo.AdamW(), comm)
    raises(ValueError, "order ((3, 4), 'C') here, ((64, 128), 'C')", lambda: small.load("fits"))
    small = ShardedOptimizer({"head": np.zeros((64, 128), np.float32)}, fo.AdamW(), comm)
    raises(ValueError, "embed: is no leaf here", lambda: small.load("fits"))
    raises(FileNotFoundError, "nowhere", lambda: opt.load("nowhere"))
    comm.Barrier()
    if comm.rank == 0:
        part = next(Path().glob("fits.*.0"))
        part.write_bytes(part.read_bytes()[:-5])
    comm.Barrier()
    raises(ValueError, "fits: is not a whole set of files", lambda: opt.load("fits"))
    assert opt.fingerprint() == before


@case
def checkpoints_are_replaced_as_a_whole(comm: MPI.Comm) -> None:
    opt, _ = check(comm, fo.AdamW(), steps=1)
    opt.save("kept")
    before, names = opt.fingerprint(), comm.bcast(sorted(p.name for p in Path().glob("kept*")))
    assert len(names) == 1 + comm.size
    opt.step(gradients(opt.params, comm.rank, 5))
    for victim in ("write", "write_index"):
        with pytest.MonkeyPatch.context() as patch:
            if comm.rank == (0 if victim == "write_index" else comm.size - 1):
                patch.setattr(checkpoint, victim, full)
            raises(OSError, "disk is full", lambda: opt.save("kept"))
        comm.Barrier()
        assert sorted(p.name for p in Path().glob("kept*")) == names
        again = ShardedOptimizer(parameters(), fo.AdamW(), comm)
        again.load("kept")
        assert again.fingerprint() == before
    if comm.rank == 0:
        Path("kept." + 16 * "0" + ".7").write_bytes(b"of a process that was killed")
    comm.Barrier()
    opt.save("kept")
    again.load("kept")
    assert again.fingerprint() == opt.fingerprint()
    assert len(list(Path().glob("kept*"))) == 1 + comm.size


def full(*_: Any) -> None:
    raise OSError("disk is full")


@case
def names_as_long_as_names_can_be(comm: MPI.Comm) -> None:
    opt, _ = check(comm, fo.AdamW(), steps=1)
    folder = Path("names")
    if comm.rank == 0:
        folder.mkdir()
    comm.Barrier()
    lengths = (3, 200, 201, 238, 239, 255)
    for length in lengths:
        name = folder / f"{length}".ljust(length, "n")
        for _ in range(2):  # the second replaces the files of the first
            opt.step(gradients(opt.params, comm.rank, 5))
            opt.save(name)
        again = ShardedOptimizer(parameters(), fo.AdamW(), comm)
        again.load(name)
        assert again.fingerprint() == opt.fingerprint()
        comm.Barrier()
    assert len(list(folder.iterdir())) == len(lengths) * (1 + comm.size)


@case
def nothing_is_written_where_no_file_can_be(comm: MPI.Comm) -> None:
    opt, _ = check(comm, fo.AdamW(), steps=1)
    if comm.rank == 0:
        Path("folder").mkdir()
    comm.Barrier()
    before = sorted(p.name for p in Path().iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write", None)
        raises(OSError, "is a directory", lambda: opt.save("folder"))
    assert sorted(p.name for p in Path().iterdir()) == before


ACTIONS: dict[str, Callable[[ShardedOptimizer, Any], object]] = {
    "step": lambda o, g: o.step(g),
    "accumulate": lambda o, g: o.accumulate(g),
    "step of sums": lambda o, g: (o.accumulate(g), o.step()),
    "save": lambda o, g: o.save("here"),
    "load": lambda o, g: o.load("there"),
    "state_dict": lambda o, g: o.state_dict(),
    "averaged": lambda o, g: inside(o.averaged()),
    "lookahead": lambda o, g: inside(o.lookahead()),
    "sync": lambda o, g: o.sync(),
    "rebind": lambda o, g: o.rebind(mapped(lambda p: p.copy(order="K"), o.params)),
}


def inside(context: Any) -> None:
    with context:
        pass


@case
def interruptions_come_before_an_action_or_after_it(comm: MPI.Comm) -> None:
    """At each bytecode; of each rank on its own, since others would wait for it."""
    rules = {"m": fo.Muon(), "s": fo.SOAP(), "v": fo.Nesterov(form="lookahead")}
    rng = np.random.default_rng(0)
    shapes = {"m": (4, 6), "s": (3, 4), "v": (5,)}
    params, grads = ({k: rng.standard_normal(s) for k, s in shapes.items()} for _ in range(2))
    opt = ShardedOptimizer(params, rules, MPI.COMM_SELF, ema=0.5, clip_norm=1.0)

    def contents() -> tuple[Any, ...]:
        sums = opt._local.assembly.sums
        return (
            opt.fingerprint(),
            [p.tobytes() for p in leaves(opt.params)],
            sums and [None if s is None else repr(s) for s in sums.sums],
        )

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        opt.step(grads)
        opt.accumulate(grads)
        opt.step()
        opt.save("there")
        for name, action in ACTIONS.items():
            opt.load("there")
            whole = [contents()]
            action(opt, grads)
            whole.append(contents())
            if name == "step of sums":
                opt.load("there")
                opt.accumulate(grads)
                whole.append(contents())
            for place in itertools.count(1):
                opt.load("there")
                if not interrupted_at(place, functools.partial(action, opt, grads)):
                    break
                assert contents() in whole, f"{name}: half of it, at bytecode {place}"
                if not opt._local.assembly.accumulated:
                    opt.step(grads)
            assert place > 1


@case
def handlers_of_signals_run_after_a_step(comm: MPI.Comm) -> None:
    """A handler that raises, at a moment of a step of all ranks that each rank knows alike."""
    opt, whole = check(comm, {"block.*.w": fo.Muon(), "*": fo.AdamW()}, steps=1)

    def handler(*_: Any) -> None:
        raise FromOutside

    previous = signal.signal(signal.SIGTERM, handler)
    reduce = opt._reduction.reduce
    try:
        for step in range(2):
            trees = [gradients(opt.params, rank, step) for rank in range(comm.size)]

            def reduced(*arguments: Any) -> Any:
                os.kill(os.getpid(), signal.SIGTERM)
                return reduce(*arguments)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(opt._reduction, "reduce", reduced)
                with pytest.raises(FromOutside):
                    opt.step(trees[comm.rank])
            whole.step(average(trees, whole.params))
            equal(opt.params, whole.params)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert opt.fingerprint() == whole.fingerprint()


def main() -> None:
    comm = MPI.COMM_WORLD
    slow = "interruptions_come_before_an_action_or_after_it"
    wanted = [name for name in CASES if name != slow]
    if sys.argv[1:] == ["--some"]:
        wanted = wanted[::3]
    elif sys.argv[1:]:
        wanted = sys.argv[1:]
    found: dict[str, str | None] = {}
    for name in wanted:
        try:
            CASES[name](comm)
            found[name] = None
        except TimeoutError:
            traceback.print_exc()
            comm.Abort(1)
        except Exception:
            found[name] = traceback.format_exc()
    everything = comm.gather(found)
    if everything is not None:
        print(json.dumps(everything))


if __name__ == "__main__":
    main()
