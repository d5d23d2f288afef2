"""The work of rules for matrices between their launches, as `backends.matrices` has it on the host.

The products are the array library's, on the device. What a rule finds before a step (SOAP's bases)
is found on the host, in float64, at the steps where it is due.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from ...arrays.formats import PLAIN
from ...arrays.stored import ArraySpec
from ...plan.spec import PlanSpec
from ...programs.program import Program
from ...rules.matrix import MatrixRule
from .arrays import DeviceArray
from .buffers import Memory
from .clipping import DeviceClipper
from .device import new_arrays
from .matmul import Library
from .stages import all_kept

Bases = Mapping[int, Mapping[str, DeviceArray]]
"""By leaf, new values of side states."""


class SideStates(Mapping[str, np.ndarray]):
    """The side states of a leaf as copies on the host, which wait for the device.

    settled: called before one is made.
    """

    def __init__(self, arrays: Mapping[str, DeviceArray], settled: Callable[[], None]) -> None:
        self._arrays, self._settled = arrays, settled

    def __getitem__(self, name: str) -> np.ndarray:
        found = self._arrays[name]
        self._settled()
        return found.copy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


class DeviceMatrices:
    """The leaves whose rule has several phases, with their work space.

    works: of each such leaf its arrays by name, those of the rule and copies of them that are kept.
    """

    def __init__(
        self, spec: PlanSpec, programs: Sequence[Program], dtypes: Sequence[np.dtype]
    ) -> None:
        leaves: list[Any] = [leaf_state.caller for leaf_state in spec.leaves]
        own = {k: programs[g] for k, g in enumerate(spec.group_of) if programs[g].phases > 1}
        self._first, self._group_of, self._dtypes = leaves[0], spec.group_of, dtypes
        self._kept = {k: all_kept(program) for k, program in own.items()}
        names = {k: [*program.works, *chain(*self._kept[k])] for k, program in own.items()}
        wanted = [
            ArraySpec(PLAIN[dtypes[k].name], leaves[k]) for k, some in names.items() for _ in some
        ]
        arrays: list[Any] = [stored.data for stored in new_arrays(wanted)]
        self.nbytes = sum(a.nbytes for a in arrays)
        fresh = iter(arrays)
        self.works: dict[int, dict[str, Any]] = {
            k: {name: next(fresh) for name in some} for k, some in names.items()
        }
        self._sides: dict[int, dict[str, Any]] = {
            k: {name: side.data for name, side in spec.leaves[k].sides.items()} for k in own
        }
        short = any(spec.groups[spec.group_of[k]].rule.short_products for k in own)
        self._library = Library(self._first.library, short) if own else None
        self._work_views = {k: self._viewed(works) for k, works in self.works.items()}
        self._side_views = {k: self._viewed(sides) for k, sides in self._sides.items()}
        self._factors: dict[int, Any] = {}

    def _viewed(self, arrays: Mapping[str, DeviceArray]) -> dict[str, Any]:
        """Arrays as the library of the products has them."""
        assert self._library is not None
        return {name: self._library.view(a) for name, a in arrays.items()}

    def on_stream(self, stream: int) -> Any:
        """A context in which the library works on this stream."""
        assert self._library is not None
        return self._library.on_stream(stream, self._first.device)

    def bases(
        self, k: int, rule: MatrixRule, t: int, settled: Callable[[], None], stream: int
    ) -> dict[str, DeviceArray]:
        """The side states of a leaf that its rule finds before the t-th step, as new arrays."""
        sides, found = self._sides[k], {}
        with np.errstate(all="ignore"):
            for name, value in rule.before(t, SideStates(sides, settled)).items():
                side = sides[name]
                memory = Memory.reused(side.nbytes, stream)
                memory.written_on = stream
                memory.write(np.ascontiguousarray(value, side.dtype), stream)
                found[name] = side.like(memory.address, side.dtype, memory)
        return found

    def begin(self, phase: int, leaves: Sequence[int]) -> None:
        """Keep, before the launches of a phase, what they overwrite."""
        for k in leaves:
            works = self._work_views[k]
            for copy, name in self._kept[k][phase].items() if phase < len(self._kept[k]) else ():
                works[copy][...] = works[name]

    def between(
        self,
        phase: int,
        leaves: Mapping[int, MatrixRule],
        bases: Bases,
        clipper: DeviceClipper | None,
    ) -> list[tuple[Any, Any]]:
        """Do what comes after a phase, in the work space of leaves with these rules.

        Returns the side states that are to be written, and their values.
        """
        assert self._library is not None
        new = []
        for k, rule in leaves.items():
            if phase >= len(self._kept[k]):
                continue
            live, fresh = self._side_views[k], self._viewed(bases.get(k, {}))
            found = fresh if phase == 0 else {}
            if self.works[k]["work"].size:
                made = rule.on_device(phase, self._work_views[k], live | fresh, self._library)
                found = found | made
            new += [(live[n], self._if_taken(k, x, live[n], clipper)) for n, x in found.items()]
        return new

    def _if_taken(self, k: int, value: Any, live: Any, clipper: DeviceClipper | None) -> Any:
        """The new value of a leaf's side state, or its own where the device takes no step."""
        if clipper is None:
            return value
        assert self._library is not None
        dtype = self._dtypes[k]
        at = clipper.factor(self._group_of[k], dtype)
        if at not in self._factors:
            self._factors[at] = self._library.view(self._first.like(at, dtype, clipper, ()))
        factor = self._factors[at]
        return self._library.where(factor == factor, value, live)  # NaN stops a step
