"""Clipping that nobody waits for: norms and factors stay on the device, and so does what stops it.

A norm that is NaN or infinite is seen by the host some steps later. Until then the device does
nothing, so that these steps can be taken back.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from ...arrays.formats import FLOAT64
from ...plan.spec import PlanSpec
from .arrays import DeviceArray
from .buffers import Echo, Memory, synchronize
from .kernels import THREADS
from .launching import Sums, uploaded
from .reductions import FACTORS, guard_kernel

if TYPE_CHECKING:
    from ...plan.interface import Decision


class DeviceClipper:
    """The `GradientClipper` of steps that do not wait.

    clipper: is told, instead of being asked. first: an array that tells where the arrays of the
    steps are.
    """

    def __init__(self, spec: PlanSpec, clipper: Decision, first: DeviceArray, stream: int) -> None:
        self._spec, self._clipper, self._first = spec, clipper, first
        limits = np.array(clipper.limits)
        self._limits, self._norms = Memory.new(limits.nbytes), limits.size
        self._limits.write(limits, stream)
        self._control = Memory.new(FACTORS + 16 * self._norms)
        self._control.fill(0, stream)
        self._kept = Memory.new(8 * len(spec.leaves))
        synchronize()  # whatever stream has the first step
        self._echo = Echo(self._control.address)
        self._unsure: deque[tuple[int, np.ndarray]] = deque()
        self._asked = 0

    def table(self, sums: Sums, stream: int) -> Memory:
        """Return the table of these leaves that `queue` needs."""
        norms = np.array(self._spec.group_of)[sums.leaves] if self._norms > 1 else 0
        rows = np.stack([np.broadcast_to(norms, sums.leaves.shape), sums.leaves], axis=1)
        return uploaded(rows.astype(np.int64), stream)

    def factor(self, group: int, dtype: np.dtype) -> int:
        """The address of that on a group's gradients, in a type."""
        number = group if self._norms > 1 else 0
        return self._control.address + FACTORS + 16 * number + (0 if dtype == FLOAT64 else 8)

    def queue(self, sums: Sums, table: Memory, number: int, stream: int) -> None:
        """Find the factors of a step from sums that are queued before."""
        told = Memory.reused(16 * self._norms, stream)  # which later steps leave alone
        words = (
            table.address,
            sums.memory.address,
            sums.leaves.size,
            self._limits.address,
            self._norms,
            self._control.address,
            self._kept.address,
            told.address,
            number,
        )
        queue = self._first.device, stream
        guard_kernel().launch(1, THREADS, queue, words, [self._clipper.factor])
        told.written_on = stream  # where they are to be read, whatever stream is current by then
        scalars = [
            DeviceArray(
                told.address + 8 * k, (), FLOAT64, "C", self._first.device, told,
                self._first.library, self._first.named_stream,
            )
            for k in range(2 * self._norms)
        ]  # fmt: skip
        self._clipper.told(scalars[::2], scalars[1::2])

    def note(self, number: int, active: np.ndarray, stream: int) -> None:
        """Remember a step that was queued, of these leaves."""
        self._unsure.append((number, active))
        if not self._asked:
            self._echo.ask(stream)
            self._asked = number

    def look(self, idle: bool) -> None:
        """Raise FloatingPointError where a step was not taken; counters are those before it then.

        idle: all steps are done, and can be looked at; otherwise only what the host knows already.
        """
        if idle and self._unsure:
            self._echo.ask(self._first.stream)
            synchronize()
            self._asked = self._unsure[-1][0]
        if not self._asked or not self._echo.arrived():
            return
        stopped = self._echo.value
        sure = stopped - 1 if stopped else self._asked
        self._asked = 0
        while self._unsure and self._unsure[0][0] <= sure:
            self._unsure.popleft()
        if stopped:
            raise self._taken_back(stopped)

    def _taken_back(self, stopped: int) -> FloatingPointError:
        synchronize()  # steps after it are not to find that it was forgotten
        stream = self._first.stream
        sums = self._kept.read(stream).view(np.float64)
        counters = self._spec.counters
        took_part = self._unsure[0][1] if self._unsure else np.empty(0, np.int64)
        for _, active in self._unsure:
            counters[1:][active] -= 1
            counters[0] -= 1
        self._unsure.clear()
        self._control.fill(0, stream)
        return self._clipper.stopped(stopped, took_part[~np.isfinite(sums[took_part])])
