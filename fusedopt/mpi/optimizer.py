"""The optimizer whose states are shared out to the ranks of an MPI program."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial, wraps
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, get_args

import numpy as np

from ..arrays import host
from ..arrays.checks import GradientChecks
from ..arrays.file_set import open_tensors
from ..arrays.formats import TILE, compute_dtype
from ..arrays.order import memory_order
from ..arrays.rows import Rows, as_rows, check_indices, unique_rows, values_of
from ..arrays.stored import AVERAGE
from ..arrays.trees import Tree
from ..optimizer import Optimizer
from ..plan.options import check_grad_scale, positive
from ..rules.base import Rule
from ..rules.groups import RateChoice, RuleChoice, assign
from ..step.accumulate import ACCUMULATED
from ..step.assembly import Assembly, checked_arrays
from ..step.exchange import Exchange
from ..step.gradients import refuses_rows
from ..step.info import StepInfo
from ..step.rates import StepRate
from ..step.summary import digest
from ..system import threads as limits
from ..system.interrupts import Uninterrupted
from .checkpoint import SharedState
from .memory import places_of
from .norms import Norms
from .ranks import Ranks
from .reduction import Kind, Reduction
from .shares import cut, flat

if TYPE_CHECKING:
    from mpi4py import MPI

P = ParamSpec("P")
T = TypeVar("T")

Shard = Literal["states", "states+masters"] | None
SHARDS = ("states", "states+masters", None)
Reduce = Literal["mean", "sum"]
Order = Literal["exact", "fast"]


def _whole(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Make a method of an optimizer one that is called as a whole or not at all."""

    @wraps(method)
    def called(self: Any, /, *args: P.args, **keywords: P.kwargs) -> T:
        ranks: Ranks = self._ranks
        return ranks.run(partial(method, self, *args, **keywords))

    return called


class Share(Optimizer):
    """The part of an optimizer that one rank has: arrays that are parts of the parameters."""

    def __init__(self, first_tiles: Sequence[int], *args: Any, **options: Any) -> None:
        self._first_tiles = first_tiles
        super().__init__(*args, **options)
        self._assembly.share_out()

    @property
    def assembly(self) -> Assembly:
        """The parts of the optimizer."""
        return self._assembly


class ShardedOptimizer:
    """An `Optimizer` whose states, and masters, are shared out to the ranks of a communicator.

    Every rank holds all parameters, with the same bits, and the states of its share. A step takes
    each rank's own gradients, brings every rank the average of its share, updates that, and
    gathers the parameters. The methods are those of `Optimizer`; every rank calls the same ones in
    the same order.

    Parameters
    ----------
    params : array or nested dicts, lists and tuples of arrays
        As `Optimizer` takes them, of equal shapes on all ranks. Rank 0's values are copied to all.
    rule : Rule, mapping or callable
        As `Optimizer` takes it.
    comm : mpi4py.MPI.Comm, optional
        Communicator, `MPI.COMM_WORLD` by default. It is duplicated.
    shard : {"states+masters", "states", None}, optional
        What each rank holds of its share alone. "states" is for parameters without masters. With
        None, every rank holds all states and makes the whole step with the average: only the data
        is parallel.
    reduce : {"mean", "sum"}, optional
        What becomes of the gradients of all ranks. A rank whose gradient is None counts as zero.
    reduction : {"exact", "fast"}, optional
        "exact" adds gradients in float32 (float64 for float64 parameters) in the order of the
        ranks: the parameters are bit for bit those of an `Optimizer` that is given this average.
        "fast" leaves the order to MPI, where all ranks have gradients of that very type: each sum
        then differs by at most (size - 1) 2**-24 (2**-53) times the sum of absolute values.
    bucket_bytes : int, optional
        Memory for gradients that are received, 8 MiB by default. While one half of it is filled,
        the other is added up.
    timeout : float, optional
        Seconds that a rank waits for the others, 300 by default. Then TimeoutError is raised, and
        the process ends with `MPI_Abort` when it exits.
    **options
        The keyword arguments of `Optimizer`. `state_path` gets a directory for each rank below it.
        `threads` is by default this rank's part of the processors that ranks of one host have in
        common.

    Raises
    ------
    TypeError, ValueError
        As `Optimizer` raises them, and where ranks differ in parameters or arguments. An error on
        one rank is raised on all, with its rank in the message.
    TimeoutError
        If a rank has died or does not take part.

    Notes
    -----
    Results depend on the ranks' gradients and not on how leaves are shared out. Matrices that a
    rule treats as a whole stay whole.

    Parameters and gradients from `shared_arrays` are not copied: see there. With both, a step that
    need not know all gradients before it begins (no `clip_norm`, `skip_nonfinite`, `stats`,
    `exact`) keeps no average of them either. A rank may write its gradients again when its step
    returns. Between steps any rank may read parameters in common memory; none may write them alone.
    """

    def __init__(
        self,
        params: Any,
        rule: RuleChoice,
        comm: MPI.Comm | None = None,
        *,
        shard: Shard = "states+masters",
        reduce: Reduce = "mean",
        reduction: Order = "exact",
        bucket_bytes: int = 8 << 20,
        timeout: float = 300.0,
        **options: Any,
    ) -> None:
        self._ranks = Ranks(comm, positive("timeout", timeout))
        with self._ranks.together() as reports:
            _check_choices(shard, reduce, reduction, bucket_bytes, options)
            self._shard, self._zero_grads = shard, bool(options.pop("zero_grads", False))
            self._tree = Tree(params)
            self._copy_out = options.pop("copy_out", None)
            groups, group_of = assign(self._tree.leaves, rule)
            rules = [groups[k].rule for k in group_of]
            for each in rules if shard is not None else ():
                if each.pooled:
                    raise ValueError(
                        f"rule: {type(each).__name__} takes sums over all parameters of a step,"
                        " which are shared out among ranks; take shard=None, or fo.AdamW"
                    )
            self._whole, self._copies = self._checked(params, rules)
            reports.mine = _summary(self._tree, self._whole, rules, self._copies, options)
        _check_equal(reports.all)
        self.params, self.rule = params, rule
        size = self._ranks.size
        self._shares = cut(self._whole, rules, size)
        self._common = self._find_common()
        private = zip(self._whole, self._common, strict=False)
        self._ranks.share_from_first([flat(p) for p, common in private if not common])
        options.setdefault("threads", _threads(self._ranks))
        with self._ranks.together():
            self._local = self._make(rule, rules, options)
        labels = [leaf.label.replace("params", "grads", 1) for leaf in self._tree.leaves]
        self._reduction = Reduction(
            self._ranks,
            labels,
            self._whole,
            self._shares,
            mean=reduce == "mean",
            fast=reduction == "fast",
            bucket_bytes=bucket_bytes,
        )
        self._unread = [] if shard is None else self._read_by_the_plan()
        self._accumulated: list[int] = []
        self._norms: Norms | None = None
        local = self._local
        if shard is not None and local.assembly.decides:
            self._norms = Norms(self._ranks, self._whole, self._shares, local.assembly.backend)
            local.assembly.clipper.agree = self._norms
        self._watch()

    def _checked(
        self, params: Any, rules: Sequence[Rule]
    ) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
        return checked_arrays(host, Tree(params), rules, self._copy_out)

    def _make(self, rule: RuleChoice, rules: Sequence[Rule], options: dict[str, Any]) -> Share:
        """Make this rank's optimizer, of its parts of the leaves."""
        options = dict(options)
        if options.get("state_path") is not None:
            above = Path(options["state_path"])
            above.mkdir(parents=True, exist_ok=True)
            options["state_path"] = above / f"rank{self._ranks.rank}"
        by_path = dict(zip((leaf.path for leaf in self._tree.leaves), rules, strict=True))
        chosen: Any = rule
        if not isinstance(rule, (Rule, Mapping)):
            chosen = lambda path, _: by_path[path]  # noqa: E731  (it has seen whole arrays)
        parts = self._parts(self._whole)
        first_tiles = [0] * len(parts)
        if self._shard is not None:
            rank = self._ranks.rank
            first_tiles = [c.bounds[rank] // TILE if c.owner is None else 0 for c in self._shares]
        if any(copy is not None for copy in self._copies):
            options["copy_out"] = self._tree.build(self._parts(self._copies))
        return Share(first_tiles, self._tree.build(parts), chosen, **options)

    def _read_by_the_plan(self) -> list[int]:
        """The leaves whose gradients nothing reads but the plan, once."""
        assembly = self._local.assembly
        options = assembly.options
        more = options.stats or options.exact or options.verify or options.transforms
        if more or assembly.decides or not assembly.backend.takes_means:
            return []
        return [
            k
            for k, (rule, leaf_state) in enumerate(
                zip(assembly.rules, assembly.leaf_states, strict=True)
            )
            if rule.program.phases == 1 and not leaf_state.sides
        ]

    def _parts(self, arrays: Sequence[Any]) -> list[Any]:
        """Return this rank's parts of arrays like the parameters."""
        if self._shard is None:
            return list(arrays)
        return [
            None if a is None else c.part(a, self._ranks.rank)
            for a, c in zip(arrays, self._shares, strict=True)
        ]

    def _watch(self) -> None:
        """Take note of what gradients must not share memory with."""
        labels = [leaf.label for leaf in self._tree.leaves]
        written = [
            [p, *([] if copied is None else [copied]), *leaf_state.saved.values()]
            for p, copied, leaf_state in zip(
                self._whole, self._copies, self._local.assembly.leaf_states, strict=True
            )
        ]
        counts = [int(copied is not None) for copied in self._copies]
        self._checks = GradientChecks(labels, self._whole, written, counts)

    # ---------------------------------------------------------------- steps

    @_whole
    def step(
        self,
        grads: Any = ACCUMULATED,
        *,
        grad_scale: float = 1.0,
        hessian: Any = None,
        lr: StepRate | None = None,
    ) -> StepInfo:
        """Update the parameters of all ranks with the average of their gradients.

        As `Optimizer.step`, called on every rank with its own gradients (and Hessian estimates,
        which are averaged too). What is returned is the same on all ranks. Norms are those of the
        average.
        """
        with self._ranks.together() as reports:
            check_grad_scale(grad_scale, self._local.assembly.narrowest)
            values = None if grads is ACCUMULATED else self._fitted(grads, "grads")
            estimates = None if hessian is None else self._fitted(hessian, "hessian")
            if values is not None and self._zero_grads:
                self._check_exclusive(grads, hessian)
            common = (self.step_count, grad_scale, self.lr if lr is None else lr)
            kinds = [v if v is None else self._reduction.kinds(v) for v in (values, estimates)]
            reports.mine = (*common, *kinds)
        gradients, hessians = self._agreed(reports.all)
        info = self._take_step(values, gradients, estimates, hessians, grad_scale, lr)
        self._accumulated = []
        if info.skipped:
            return info
        if self._zero_grads and values is not None:
            self._zero(grads)
        return info if info.stats is None else self._with_stats(info)

    def _take_step(
        self,
        values: Any,
        gradients: Any,
        estimates: Any,
        hessians: Any,
        grad_scale: float,
        lr: StepRate | None,
    ) -> StepInfo:
        """Reduce all gradients, update this rank's share, and gather the parameters."""
        share: Any = ACCUMULATED
        if gradients:
            reduced, share = self._reduced(values, gradients, "grads", self._unread)
            self._measure(reduced, _active(gradients))
        elif self._local.assembly.sums is not None:
            self._measure(self._local.assembly.sums.sums, self._accumulated)
        estimate = self._reduced(estimates, hessians, "hessian")[1] if hessians else None
        with self._ranks.together(changing=True):
            info = self._local.step(share, grad_scale=grad_scale, hessian=estimate, lr=lr)
        if not info.skipped:
            self._gather_parameters()
        return info

    @_whole
    def accumulate(self, grads: Any) -> int:
        """Add the average of all ranks' gradients of a micro-batch to this rank's sums.

        As `Optimizer.accumulate`, called on every rank. The sums take no more memory than the
        share.
        """
        with self._ranks.together() as reports:
            values = self._fitted(grads, "grads")
            if self._zero_grads:
                self._check_exclusive(grads, None)
            reports.mine = (self.step_count, 1.0, self.lr, self._reduction.kinds(values), None)
        gradients, _ = self._agreed(reports.all)
        share = self._reduced(values, gradients, "grads")[1]
        with self._ranks.together(changing=True):
            count = self._local.accumulate(share)
        self._accumulated = sorted({*self._accumulated, *_active(gradients)})
        if self._zero_grads:
            self._zero(grads)
        return count

    def _fitted(self, grads: Any, what: str) -> list[Any]:
        """The leaves of a tree of whole gradients, checked."""
        flat_leaves = self._tree.flatten(self._checks.opened(what, grads), what)
        return [self._fit_leaf(k, what, g) for k, g in enumerate(flat_leaves)]

    def _fit_leaf(self, k: int, what: str, g: Any) -> Any:
        label = self._tree.leaves[k].label.replace("params", what, 1)
        rows = as_rows(label, g)
        if rows is None:
            return self._checks.gradient(k, label, g)
        taken = unique_rows(label, rows, self._whole[k])
        refusal = refuses_rows(self._local.assembly.rules[k], self._local.assembly.leaf_states[k])
        if refusal:
            raise ValueError(f"{label}: {refusal}; give the whole gradient")
        self._checks.check_apart(label, taken.values)
        return taken

    def _check_exclusive(self, grads: Any, hessian: Any) -> None:
        given = []
        for what, tree in (("grads", grads), ("hessian", hessian)):
            leaves = [] if tree is None else self._tree.flatten(tree, what)
            given += [(f"{what} of {self._tree.leaves[k].path}", values_of(g))
                      for k, g in enumerate(leaves)]  # fmt: skip
        self._checks.check_exclusive(given, len(self._tree.leaves))

    def _zero(self, grads: Any) -> None:
        for g in self._tree.flatten(grads, "grads"):
            if g is not None:
                values_of(g)[...] = 0

    def _agreed(self, reports: Sequence[tuple[Any, ...]]) -> tuple[Any, Any]:
        """Each rank's kinds of gradients and of estimates; ValueError where ranks do not agree."""
        for name, found in zip(
            ("step_count", "grad_scale", "lr"), list(zip(*reports, strict=True))[:3], strict=True
        ):
            if len({repr(value) for value in found}) > 1:
                raise ValueError(f"{name}: expected the same on all ranks, got {list(found)}")
        agreed: list[Any] = []
        for at, what in ((3, "grads"), (4, "hessian")):
            kinds = [report[at] for report in reports]
            without = [rank for rank, kind in enumerate(kinds) if kind is None]
            if without and len(without) < len(kinds):
                raise ValueError(f"{what}: ranks {without} give none, the others do")
            agreed.append([] if without else kinds)
        return agreed[0], agreed[1]

    def _reduced(
        self,
        values: Any,
        kinds: Sequence[Sequence[Kind | None]],
        what: str,
        unread: Collection[int] = (),
    ) -> tuple[list[Any], Any]:
        """The shares of gradients, and the tree of them for this rank's optimizer."""
        shares = self._reduction.reduce(values, kinds, what, unread)
        given: Sequence[Any] = shares
        if self._shard is None:
            given = self._gather_shares(shares, kinds)
        return shares, self._tree.build(list(given))

    def _gather_parameters(self) -> None:
        """Bring every rank the parameters, and the copies of them, that others updated."""
        if self._shard is None:
            return
        requests = []
        arrays = [*self._whole, *self._copies]
        for a, c, common in zip(arrays, 2 * self._shares, self._common, strict=True):
            if a is not None and not common:
                requests += self._ranks.begin_share(flat(a), c.bounds[:-1], c.sizes)
        self._ranks.wait(requests)
        self._wait_for_common()

    def _wait_for_common(self) -> None:
        """Wait until all ranks have done what they do to arrays in common memory."""
        if any(self._common):
            self._ranks.wait([self._ranks.comm.Ibarrier()])

    def _find_common(self) -> list[bool]:
        """Whether each parameter, and then each copy, is the same memory on all ranks."""
        arrays = [*self._whole, *self._copies]
        of_ranks = self._ranks.gather(places_of(self._ranks, arrays))
        found = [len({*of}) == 1 and of[0] is not None for of in zip(*of_ranks, strict=True)]
        if self._ranks.size == 1:
            found = [False] * len(arrays)
        if any(found) and self._shard is None:
            raise ValueError(
                "shard=None: every rank updates all parameters, and these are in memory that the"
                " ranks have in common; give arrays of each rank's own"
            )
        return found

    def _gather_shares(
        self, shares: Sequence[Any], kinds: Sequence[Sequence[Kind | None]]
    ) -> list[Any]:
        """The whole reduced gradients, from all ranks' shares of them."""
        whole: list[Any] = [None] * len(shares)
        requests = []
        for k in _active(kinds):
            c, share, p = self._shares[k], shares[k], self._whole[k]
            if any(kind and kind.counts is not None for kind in (of[k] for of in kinds)):
                whole[k] = self._gather_rows(k, share)
                continue
            whole[k] = np.empty_like(p, compute_dtype(p.dtype))
            if share is not None:
                c.part(whole[k], self._ranks.rank)[...] = share
            requests += self._ranks.begin_share(flat(whole[k]), c.bounds[:-1], c.sizes)
        self._ranks.wait(requests)
        return whole

    def _gather_rows(self, k: int, share: Rows | None) -> Rows:
        c = self._shares[k]
        first = c.bounds[self._ranks.rank] // c.row if c.row else 0
        mine = None if share is None else (share.indices + first, share.values)
        parts = [part for part in self._ranks.gather(mine) if part is not None]
        indices, values = zip(*parts, strict=True)
        return Rows(np.concatenate(indices), np.concatenate(values))

    def _measure(self, shares: Sequence[Any], active: Sequence[int]) -> None:
        """Find the norms that the step at hand asks for."""
        if self._norms is not None:
            self._norms.measure(shares, active)

    def _with_stats(self, info: StepInfo) -> StepInfo:
        """Return the information of a step, with the sums of all ranks in place of this one's."""
        local = self._local
        if self._shard is None:
            return info
        results = local.assembly.results
        sizes = [results.size] * self._ranks.size
        found = self._ranks.gather_arrays(results.reshape(-1), sizes)
        of_ranks = np.stack(found).reshape(-1, *results.shape)
        if self._norms is None:  # otherwise all ranks have the same in the first two columns
            results[:, 1] = of_ranks[:, :, 1].max(axis=0)
        results[:, 2:] = of_ranks[:, :, 2:].sum(axis=0)
        return local.assembly.info_builder.info(info.step, info.lr)

    # ---------------------------------------------------------------- the rest of an Optimizer

    @property
    def step_count(self) -> int:
        """The number of steps that have been taken."""
        return self._local.step_count

    @property
    def lr(self) -> float | dict[str, float]:
        """The learning rate of the next step, as `Optimizer.lr`; set it alike on all ranks."""
        return self._local.lr

    @lr.setter
    @_whole
    def lr(self, lr: RateChoice) -> None:
        self._local.lr = lr

    @_whole
    def replace(self, label: str | None = None, /, **hyperparameters: Any) -> None:
        """Change hyperparameters from the next step on, alike on all ranks."""
        self._local.replace(label, **hyperparameters)

    @property
    def state(self) -> dict[str, dict[str, Any]]:
        """The live states of this rank's share: path -> name -> array, or `Quantized` object."""
        states = self._local.state
        held = zip(states, self._shares, strict=True)
        rank = self._ranks.rank
        return {path: states[path] for path, c in held if self._shard is None or c.holds(rank)}

    @_whole
    def sync(self) -> None:
        """Take the masters anew from the parameters, which were written alike on all ranks."""
        self._local.sync()

    @_whole
    def flush(self) -> None:
        """Write this rank's states in `state_path` to the disk, as `Optimizer.flush`."""
        self._local.flush()

    @_whole
    def rebind(self, params: Any) -> None:
        """Take new arrays in place of the old ones, as `Optimizer.rebind`."""
        with self._ranks.together(changing=True):
            tree = self._tree.successor(params)
            old, copies = self._whole, self._copies
            whole, _ = self._checked(params, self._local.assembly.rules)
            for leaf, p, q in zip(tree.leaves, whole, old, strict=True):
                if (p.shape, p.dtype, memory_order(p)) != (q.shape, q.dtype, memory_order(q)):
                    raise ValueError(
                        f"{leaf.label}: expected {q.dtype} of shape {q.shape} and memory order"
                        f" {memory_order(q)}, got {p.dtype} of {p.shape} and {memory_order(p)}"
                    )
            self._local.rebind(tree.build(self._parts(whole)))
            self._tree, self.params, self._whole, self._copies = tree, params, whole, copies
            self._reduction.rebind(whole)
            self._watch()
        self._common = self._find_common()

    @_whole
    def catch_up(self, rows: Mapping[str, np.ndarray] | None = None) -> None:
        """Replay the steps that rows missed, as `Optimizer.catch_up`; each rank gives its own."""
        with self._ranks.together() as reports:
            if rows is not None:
                by_path = {leaf.path: leaf.value for leaf in self._tree.leaves}
                for path, indices in rows.items():
                    if path in by_path:  # otherwise the optimizer says what is
                        check_indices(f"catch_up[{path!r}]", indices, by_path[path].shape)
            reports.mine = rows
        with self._ranks.together(changing=True):
            self._local.catch_up(None if None in reports.all else self._own_rows(reports.all))
        self._gather_parameters()

    def _own_rows(self, rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return the rows of all ranks that are in this rank's share."""
        paths = {leaf.path: k for k, leaf in enumerate(self._tree.leaves)}
        own = {}
        for path in dict.fromkeys(path for of in rows for path in of):
            indices = np.concatenate([of[path] for of in rows if path in of]).astype(np.int64)
            if path in paths and self._shard is not None:
                c, p = self._shares[paths[path]], self._whole[paths[path]]
                length = max(p.size // p.shape[0], 1)
                first, end = (c.bounds[self._ranks.rank + j] // length for j in (0, 1))
                indices = indices[(indices >= first) & (indices < end)] - first
            own[path] = indices
        return own

    def lookahead(self) -> Exchanged:
        """Move the parameters of all ranks to p - mu v, as `Optimizer.lookahead`."""
        context = self._local.lookahead()
        return Exchanged(
            self._ranks, context, self._whole, self._gather_parameters, self._wait_for_common
        )

    @_whole
    def averaged(self) -> Exchanged:
        """Return the averages of `ema`, or of Schedule-Free rules, on every rank.

        As `Optimizer.averaged`; the averages of `ema` are copies here.
        """
        context = self._local.averaged()  # which refuses it where there are none
        if self._local.assembly.options.ema is None:
            return Exchanged(
                self._ranks, context, self._whole, self._gather_parameters, self._wait_for_common
            )
        averages, requests = [], []
        leaf_states = self._local.assembly.leaf_states
        for p, c, leaf_state in zip(self._whole, self._shares, leaf_states, strict=True):
            mine = leaf_state.states[AVERAGE].data
            whole = np.empty_like(p, mine.dtype)
            averages.append(whole)
            if self._shard is None:
                whole[...] = mine
            else:
                c.part(whole, self._ranks.rank)[...] = mine
                requests += self._ranks.begin_share(flat(whole), c.bounds[:-1], c.sizes)
        self._ranks.wait(requests)

        def move() -> None:
            for p, average in zip(self._whole, averages, strict=True):
                with np.errstate(all="ignore"):
                    p[...] = average

        return GatheredAverages(
            self._ranks,
            context,
            self._whole,
            move,
            self._wait_for_common,
            self.params,
            self._tree.build(averages),
        )

    # ---------------------------------------------------------------- checkpoints

    @property
    def _state(self) -> SharedState:
        return SharedState(self._ranks, self._local.assembly, self._whole, self._shares)

    @_whole
    def save(
        self, path: str | os.PathLike[str], *, parameters: bool = True, metadata: Any = None
    ) -> None:
        """Write states, counters and parameters to one set of files, all ranks in parallel.

        `path` becomes an index of the files `path.TOKEN.RANK` beside it, in a directory that all
        ranks share. `load` takes it at any number of ranks, and so does `Optimizer.load`. A process
        that is killed at any moment leaves the old set or the new one. As `Optimizer.save`
        otherwise; rank 0's metadata is kept.
        """
        with self._ranks.together():
            self._check_settled("save")
            if self._shard is None and self._ranks.rank == 0:
                self._local.save(path, parameters=parameters, metadata=metadata)
        if self._shard is not None:
            self._state.save(path, parameters, metadata)

    @_whole
    def load(
        self, path: str | os.PathLike[str], *, parameters: bool = True, strict: bool = True
    ) -> Any:
        """Go on from a file or a set of files, of any number of ranks, as `Optimizer.load`."""
        name = os.fspath(path)
        if self._shard is None:
            with self._ranks.together(changing=True):
                return self._local.load(path, parameters=parameters, strict=strict)
        with self._ranks.together():
            self._local.assembly.check_at_home("load")
            tensors = open_tensors(path)
            try:
                saved = self._state.part_of(tensors, parameters, name)
            except (TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{name}: its table of leaves is spoilt: {error!r}") from error
            if parameters and not any(t.startswith("p:") for t in tensors.shapes):
                raise ValueError(
                    f"{name}: holds no parameters; put them back yourself, and pass"
                    " parameters=False"
                )
        self._state.restore(saved, strict=strict, what=name, parameters=parameters)
        self._accumulated = []
        if parameters:
            self._gather_parameters()
        return saved.get("metadata")

    @_whole
    def state_dict(self) -> dict[str, Any]:
        """Counters and copies of the states of all ranks, on every rank: see `Optimizer`."""
        if self._shard is None:
            return self._local.state_dict()
        with self._ranks.together() as reports:
            self._check_settled("state_dict")
            reports.mine = self._state.held(False)
        saved = self._state.described(reports.all)
        for k, leaf in enumerate(self._tree.leaves):
            saved["leaves"][leaf.path]["state"] = self._state.whole_arrays(k, reports.all)
        return saved

    @_whole
    def load_state_dict(self, state: dict[str, Any], *, strict: bool = True) -> None:
        """Go on from a `state_dict` of this or of an `Optimizer`, which all ranks have."""
        if self._shard is None:
            with self._ranks.together(changing=True):
                self._local.load_state_dict(state, strict=strict)
            return
        with self._ranks.together():
            self._local.assembly.check_at_home("load_state_dict")
            try:
                saved = self._state.part_of(self._state.tensors_of(state), False, "state_dict")
            except (TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"state_dict: expected one of an optimizer: {error!r}") from error
        self._state.restore(saved, strict=strict, what="state_dict", parameters=False)
        self._accumulated = []

    @_whole
    def fingerprint(self) -> str:
        """The digest that an `Optimizer` with the same parameters, states and counters has."""
        if self._shard is None:
            return self._local.fingerprint()
        with self._ranks.together() as reports:
            reports.mine = self._state.held(False)
        paths = [leaf.path for leaf in self._tree.leaves]
        holders = (next(of[k] for of in reports.all if k in of) for k in range(len(paths)))
        counters = np.array([self.step_count, *(holder.t for holder in holders)])
        state = self._state
        states = (state.whole_arrays(k, reports.all) for k in range(len(paths)))
        return digest(paths, self._whole, states, counters)

    def _check_settled(self, what: str) -> None:
        self._local.assembly.check_at_home(what)
        self._local.assembly.check_settled(what)

    def describe(self) -> str:
        """A table of this rank's share, and the memory that it takes."""
        ranks = self._ranks
        whole = sum(p.size for p in self._whole)
        own = whole if self._shard is None else sum(c.sizes[ranks.rank] for c in self._shares)
        return (
            f"{self._local.describe()}\nrank {ranks.rank} of {ranks.size} updates {own} of {whole}"
            f" elements (shard={self._shard!r}); {self._reduction.nbytes} bytes of buckets, and of"
            f" reduced gradients at most {self._reduced_bytes()}"
        )

    def _reduced_bytes(self) -> int:
        """Bytes of the largest reduced gradients that a step of this rank holds."""
        total = 0
        for p, c in zip(self._whole, self._shares, strict=True):
            width = compute_dtype(p.dtype).itemsize
            total += c.sizes[self._ranks.rank] * width
            total += p.size * width if self._shard is None else 0
        return total

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a ShardedOptimizer belongs to the ranks of its communicator; take its state_dict(),"
            " or save it"
        )


class Exchanged(Uninterrupted):
    """A context in which the parameters of all ranks are something else.

    context: that of this rank's optimizer. parameters: those that `move` writes; after the context
    they have their own bits again. settle: waits for all ranks where they share parameters. value:
    what the context gives.
    """

    def __init__(
        self,
        ranks: Ranks,
        context: Exchange,
        parameters: Sequence[np.ndarray],
        move: Callable[[], None],
        settle: Callable[[], None],
        value: Any = None,
    ) -> None:
        super().__init__(self._enter, self._leave, helped=ranks.helped)
        self._context, self._parameters, self._move = context, parameters, move
        self._settle, self._value = settle, value

    def _enter(self) -> Any:
        backup = [p.copy(order="K") for p in self._parameters]
        self._settle()
        self._context.__enter__()
        self._backup = backup
        try:
            self._settle()  # every rank has its backup
            self._move()
        except BaseException:
            self._leave()
            raise
        return self._value

    def _leave(self) -> None:
        self._settle()
        for p, original in zip(self._parameters, self._backup, strict=True):
            p[...] = original
        self._settle()
        self._context.__exit__(None, None, None)


class GatheredAverages(Exchanged):
    """Averages of weights of all ranks: `params`, copies, nested like the parameters.

    As a context manager, puts them in the parameters' place, and gives the parameters.
    """

    def __init__(
        self,
        ranks: Ranks,
        context: Exchange,
        parameters: Sequence[np.ndarray],
        move: Callable[[], None],
        settle: Callable[[], None],
        value: Any,
        averages: Any,
    ) -> None:
        super().__init__(ranks, context, parameters, move, settle, value)
        self.params = averages


def _active(kinds: Sequence[Sequence[Kind | None]]) -> list[int]:
    """The leaves of which some rank has a gradient."""
    return [k for k, of in enumerate(zip(*kinds, strict=True)) if any(x is not None for x in of)]


def _check_choices(
    shard: Any, reduce: Any, reduction: Any, bucket_bytes: Any, options: Mapping[str, Any]
) -> None:
    for name, value, known in (
        ("shard", shard, SHARDS),
        ("reduce", reduce, get_args(Reduce)),
        ("reduction", reduction, get_args(Order)),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected one of {known}, got {value!r}")
    if not isinstance(bucket_bytes, int) or isinstance(bucket_bytes, bool) or bucket_bytes < 1:
        raise ValueError(f"bucket_bytes: expected an integer >= 1, got {bucket_bytes!r}")
    for name in ("clip_leaf", "clip_adaptive", "centralize"):
        if options.get(name):
            raise ValueError(
                f"{name}: is not supported by ShardedOptimizer, whose ranks have parts of arrays;"
                " leave it out"
            )
    if shard == "states" and options.get("master") is not None:
        raise ValueError(
            f"shard='states': with master={options['master']!r} masters are shared out too; give"
            " shard='states+masters'"
        )


def _summary(
    tree: Tree,
    parameters: Sequence[np.ndarray],
    rules: Sequence[Rule],
    copies: Sequence[Any],
    options: Mapping[str, Any],
) -> list[str]:
    """Return what must be equal on all ranks."""
    leaves = zip(tree.leaves, parameters, rules, copies, strict=True)
    free = ("threads", "state_path")
    return [
        *(
            f"{leaf.label}: {p.dtype} of shape {p.shape}, memory order {memory_order(p)},"
            f" {rule.summary()}, copy {None if copied is None else copied.dtype}"
            for leaf, p, rule, copied in leaves
        ),
        *(f"{name}={value!r}" for name, value in sorted(options.items()) if name not in free),
    ]


def _check_equal(summaries: Sequence[list[str]]) -> None:
    for rank, summary in enumerate(summaries):
        if summary != summaries[0]:
            pairs = zip_longest(summaries[0], summary)
            first, other = next((a, b) for a, b in pairs if a != b)
            raise ValueError(
                f"expected the same parameters and arguments on all ranks: rank 0 has {first!r},"
                f" rank {rank} {other!r}"
            )


def _threads(ranks: Ranks) -> int:
    """Return this rank's part of the threads that the ranks on its host share."""
    import socket

    granted = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    mine = (socket.gethostname(), granted)
    return max(1, limits.in_use() // ranks.gather(mine).count(mine))
