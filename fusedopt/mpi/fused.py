"""Steps of a rank's share, piece by piece, while the sums of gradients are in the cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..arrays.formats import SEGMENT, TILE, compute_dtype
from ..arrays.stored import LeafState, Stored
from ..plan.spec import PlanSpec, results_for
from ..step.assembly import Assembly
from .reduction import WIDEST, Kind, Reduction, Span
from .shares import Cut

PIECE = 8 * SEGMENT
"""Elements whose sums stay in the second-level cache until the step reads them."""


class FusedStep:
    """Reduction and update in one pass, of gradients and parameters in memory of all ranks.

    The gradients of a piece are added up where they are, and the piece is updated before the next
    one is: the average is never written to memory. For rules of one phase, and steps that need not
    know all gradients before they begin.

    Parameters
    ----------
    assembly : Assembly
        This rank's part of an optimizer.
    reduction : Reduction
        The reduction of its gradients.
    cuts : sequence of Cut
        The shares.
    rank : int
        This rank.
    """

    def __init__(
        self, assembly: Assembly, reduction: Reduction, cuts: Sequence[Cut], rank: int
    ) -> None:
        self._assembly, self._reduction, self._cuts, self._rank = assembly, reduction, cuts, rank
        self._sums = np.empty(WIDEST * PIECE, np.uint8)
        bounds = [cut.bounds[rank : rank + 2] for cut in cuts]
        self._pieces = [
            Span(k, start, min(start + PIECE, end))
            for k, (begin, end) in enumerate(bounds)
            for start in range(begin, end, PIECE)
        ]
        self._counters = np.zeros(1 + len(self._pieces), np.int64)
        self._leaf_of = np.array([span.leaf for span in self._pieces], int)
        self._planned: Any = None
        self._plan: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of the sums of a piece."""
        return self._sums.nbytes

    @staticmethod
    def serves(assembly: Assembly) -> bool:
        """Return whether steps of an optimizer may be taken piece by piece."""
        options = assembly.options
        return not (
            assembly.decides
            or options.stats
            or options.exact
            or options.verify
            or assembly.state_file is not None
        )

    def leaves(self, kinds: Sequence[Sequence[Kind | None]]) -> set[int]:
        """The leaves that are updated piece by piece: those with gradients in common memory."""
        rules, leaf_states = self._assembly.rules, self._assembly.leaf_states
        return {
            k
            for k, of in enumerate(zip(*kinds, strict=True))
            if any(of)
            and all(kind is None or kind.place is not None for kind in of)
            and rules[k].program.phases == 1
            and not leaf_states[k].sides
        }

    def prepare(self) -> None:
        """Make ready for a step; raises as `Optimizer.step` where an array has moved."""
        assembly = self._assembly
        assembly.watch.check()
        settled = (assembly.plan, assembly.current, assembly.extras)
        if settled != self._planned:
            same_arrays = self._planned is not None and self._planned[0] is assembly.plan
            if not (same_arrays and self._plan.adopt(assembly.current, assembly.extras)):
                self._plan = self._plan_of_pieces()
            self._planned = (assembly.plan, list(assembly.current), assembly.extras)
        self._counters[1:] = assembly.counters[1 + self._leaf_of]

    def _plan_of_pieces(self) -> Any:
        assembly = self._assembly
        states = [
            _piece(assembly.leaf_states[span.leaf], start, start + span.size)
            for span, start in zip(self._pieces, self._starts(), strict=True)
        ]
        paths = [assembly.paths[span.leaf] for span in self._pieces]
        first_tiles = [span.start // TILE for span in self._pieces]
        programs = [assembly.extras.program(group.rule) for group in assembly.current]
        plan = assembly.backend.plan(
            PlanSpec(
                tree=list(range(len(states))),
                leaves=states,
                groups=assembly.current,
                group_of=[assembly.group_of[span.leaf] for span in self._pieces],
                rates=assembly.rates.values,
                factors=assembly.rates.factors,
                counters=self._counters,
                keys=assembly.storage.keys(assembly.seed, paths, states, first_tiles),
                results=results_for(programs, len(states)),
                extras=assembly.extras,
                threads=assembly.options.threads,
            )
        )
        plan.take(self)
        return plan

    def _starts(self) -> list[int]:
        """The first element of each piece in this rank's share of its leaf."""
        return [span.start - self._cuts[span.leaf].bounds[self._rank] for span in self._pieces]

    def run(self, elements: Sequence[Sequence[np.ndarray | None]], leaves: Collection[int]) -> None:
        """Take a step of leaves, after `prepare`.

        elements: what `Reduction.elements` returned.
        """
        assembly = self._assembly
        grads: list[Any] = [None] * len(self._pieces)
        for j, span in enumerate(self._pieces):
            if span.leaf not in leaves:
                continue
            dtype = compute_dtype(assembly.parameters[span.leaf].dtype)
            grads[j] = self._sums[: span.size * dtype.itemsize].view(dtype)
            given = [a[span.start : span.stop] for a in elements[span.leaf] if a is not None]
            self._reduction.average(given, grads[j])
            self._counters[0] = assembly.counters[0]
            if self._plan.step_leaves(grads, None) is None:
                raise RuntimeError("the core refused arrays that fit; please report this")
            grads[j] = None
        active = [k for k in leaves if self._cuts[k].holds(self._rank)]
        assembly.counters[1 + np.array(active, int)] += 1


def _piece(leaf_state: LeafState, start: int, stop: int) -> LeafState:
    """Elements [start, stop) of a leaf, in memory order, as a leaf of their own."""
    parameter = _part(leaf_state.parameter, start, stop)
    extra = leaf_state.extra and (leaf_state.extra[0], parameter.arrays[-1])
    mirrors = tuple(Stored.plain(a).flat(a)[start:stop] for a in leaf_state.mirrors)
    states = {name: _part(state, start, stop) for name, state in leaf_state.states.items()}
    return LeafState(parameter, states, mirrors, extra)


def _part(stored: Stored, start: int, stop: int) -> Stored:
    form = stored.format
    data = stored.flat_data[form.data_size(start) : form.data_size(stop)]
    aux = stored.aux
    if aux is not None:
        aux = aux[form.aux_size(start) : form.aux_size(stop)]
    return replace(stored, data=data, aux=aux, shape=(stop - start,), order="C")
