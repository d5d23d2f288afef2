"""Sums over leaves that a program has: a pass of its own before the step, which it computes too.

The order of adding is the core's: by segments, of which a thread has the elements of one lane.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...arrays.formats import SEGMENT
from ...arrays.rows import UniqueRows
from ...jit.tiles import LANES
from .buffers import Memory
from .kernels import (
    THREADS,
    Variant,
    all_scalars,
    code_arguments,
    indented,
    planes,
    sums_of_element,
)
from .launching import Place, segments_of, uploaded
from .reductions import GROUPS, REDUCED, totals_kernel
from .toolkit import MORE_REGISTERS, Kernel
from .vectors import loader, storer, word_loader

INPUTS = ("g", "hessian")
"""The arrays that have a touched row elsewhere than the parameter."""

_SUMS = """
def kernel({arguments}):
    lanes = cuda.shared.array(THREADS, SUM)
    thread = cuda.threadIdx.x
    lane = thread % LANES
    index = cuda.blockIdx.x * GROUPS + thread // LANES
{totals}
    if index < count:
        part = parts + 40 * index
        row = word(part)
        length = word(part + 8)
        start = word(part + 16)
{addresses}
        for k in range(word(part + 24), word(part + 32)):
            here = word(pairs + 16 * k)
            ahead = (word(pairs + 16 * k + 8) - here) * length
            begin = max(here * length, start)
            stop = min((here + 1) * length, start + SEGMENT)
            i = begin + (lane + LANES - begin % LANES) % LANES
            while i < stop:
{body}
                i += LANES
{reduced}
"""


@functools.cache
def sums_kernel(variant: Variant) -> Kernel:
    """Return the kernel of the sums of a variant's steps.

    It takes (parts, pairs, partial sums of the first, then of the next, ..., number of parts,
    scalars). A part: the address of the words of a leaf's arrays, elements of a row, where a
    segment begins, the first of its pairs and the one behind the last. A pair: a row of the
    parameter, and that of the inputs.
    """
    element, count = sums_of_element(variant)
    namespace: dict[str, Any] = {
        "sums_of": element,
        "word": word_loader(),
        "load_scale": loader(32, 1),
        "store": storer(64, 1),
        "half_byte": half_byte,
        "SUM": np.float64,
        "LANES": LANES,
        "SEGMENT": SEGMENT,
        "GROUPS": GROUPS,
        "THREADS": GROUPS * LANES,
    }
    for name, format in variant.loaded:
        for plane, bits in planes(name, format):
            namespace[f"load_{plane}"] = loader(max(bits, 8), 1)
    words = ["parts", "pairs", "partials", "count"]
    reduced = []
    for j in range(count):
        own = f"    total, partials = total{j}, partials + 8 * count * {min(j, 1)}\n"
        reduced.append(own + REDUCED.strip("\n"))
    scalars = all_scalars(variant)
    source = _SUMS.format(
        arguments=", ".join([*words, *scalars]),
        totals=indented(f"total{j} = SUM(0)" for j in range(count)),
        addresses="".join(
            f"        {name} = word(row + {8 * k})\n" for k, name in enumerate(variant.columns)
        ),
        body="".join(f"                {line}\n" for line in _body(variant, count)),
        reduced="\n    cuda.syncthreads()\n".join(reduced),
    )
    return Kernel(source, len(words), len(scalars), variant.dtype, namespace, MORE_REGISTERS)


def _body(variant: Variant, count: int) -> list[str]:
    """Return the lines of a thread's work on the i-th element."""
    lines = []
    for name, format in variant.loaded:
        at = "(i + ahead)" if name in INPUTS else "i"
        for plane, bits in planes(name, format):
            code = f"load_{plane}(a_{plane} + {at} * {bits} // 8)[0]"
            lines.append(f"code_{plane} = {f'half_byte({code}, i)' if bits == 4 else code}")
        if format.quantized:
            scale = f"scales_{name} + 4 * (i // {format.block})"
            lines.append(f"scale_{name} = load_scale({scale})[0]")
    arguments = ", ".join([*code_arguments(variant), *all_scalars(variant)])
    lines.append(f"sums = sums_of({arguments})")
    return lines + [f"total{j} += sums[{j}]" for j in range(count)]


def half_byte(code: Any, i: Any) -> Any:
    """The code of four bits of the i-th element, of which the even ones are high."""
    return np.uint32(code) & np.uint32(15) if i % 2 else np.uint32(code) >> np.uint32(4)


class SumLaunch:
    """The sums of a variant's steps over leaves, before these are carried out.

    leaves: by place among all, the gradient, an array or `UniqueRows`, and its arrays' places.
    columns: of `PlanSpec.results`, one for each sum.
    """

    random = False

    def __init__(
        self,
        variant: Variant,
        leaves: Mapping[int, tuple[Any, Sequence[Place]]],
        columns: Sequence[int],
        device: int,
        stream: int,
    ) -> None:
        self.dtype, self._device = variant.dtype, device
        self._kernel, self._columns = sums_kernel(variant), list(columns)
        self.leaves = np.array(list(leaves), np.int64)
        width = len(variant.columns)
        words = [[w for place in places for w in place.words] for _, places in leaves.values()]
        self._words = uploaded(np.array(words, np.int64), stream)
        parts: list[list[int]] = []
        pairs: list[np.ndarray] = []
        spans, before = [], 0
        for k, (g, _) in enumerate(leaves.values()):
            rows, length = np.zeros((1, 2), np.int64), 0
            if isinstance(g, UniqueRows):
                rows, length = np.stack([g.rows, g.places], axis=1), math.prod(g.values.shape[1:])
            else:
                length = g.size
            own = segments_of(rows[:, 0], length, before)
            spans.append((len(parts), len(own)))
            address = self._words.address + 8 * width * k
            parts += [[address, length, *segment] for segment in own]
            pairs.append(rows)
            before += len(rows)
        self._count = len(parts)
        self._parts = uploaded(np.array(parts, np.int64), stream)
        self._pairs = uploaded(np.concatenate(pairs), stream)
        sums = len(self._columns)
        self._partials = Memory.reused(8 * sums * self._count, stream)
        starts = [
            [self._partials.address + 8 * (j * self._count + first), count]
            for first, count in spans
            for j in range(sums)
        ]
        self._starts = uploaded(np.array(starts, np.int64), stream)
        self._sums = Memory.reused(8 * len(starts), stream)

    def run(self, scalars: Sequence[float], stream: int, *more: int) -> None:
        """Put the kernels on a stream: see `Launch.run`."""
        queue = self._device, stream
        if self._count:
            leaf_states = self._parts, self._pairs, self._partials
            words = (*(memory.address for memory in leaf_states), self._count)
            blocks, threads = -(-self._count // GROUPS), GROUPS * LANES
            self._kernel.launch(blocks, threads, queue, words, scalars)
        words = (self._starts.address, self._sums.address)
        totals_kernel().launch(self.leaves.size * len(self._columns), THREADS, queue, words)

    def read(self, results: np.ndarray, stream: int) -> None:
        """Fill in `PlanSpec.results`, when the sums are there."""
        sums = self._sums.read(stream).view(np.float64)
        results[self.leaves[:, None], self._columns] = sums.reshape(self.leaves.size, -1)
