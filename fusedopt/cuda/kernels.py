"""Kernels from programs: every operation of a phase on each element, in registers.

A kernel takes the address of a table with a row of int64 for each leaf (elements, whether all
arrays lie on 16-byte boundaries, addresses), that of a list with an int64 for each block (leaf <<
32 | chunk), where gradients are clipped on the device that of their factor, and the scalars of its
operations one after the other.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..backends.base import HEAD
from ..formats import FLOAT64, Format
from ..jit import bits
from ..jit.kernels import LANES, MODES, SEGMENT, normal_or_zero_of
from ..rules.base import Operation, Program
from ..rules.elements import ELEMENTS, OF_STATES, Element, squares
from .toolkit import Kernel
from .vectors import VECTOR_BYTES, loader, storer, word_loader, word_storer

THREADS = 256
CHUNK = 1 << 12
"""So many elements are a block's."""

_CODECS = {
    "float32": (bits.decode_float32, bits.encode_float32),
    "float64": (bits.decode_float64, bits.encode_float64),
    "bfloat16": (bits.decode_bfloat16, bits.encode_bfloat16),
    "float16": (bits.decode_float16, bits.encode_float16),
}
_NORMAL = float(np.finfo(np.float32).smallest_normal)


class Step(NamedTuple):
    """An operation as a kernel needs it. written: of the operands. scalars: so many, with those
    before the operation's own. mode: of the loop round a rule. state: stored as states are."""

    element: Element
    loop: str
    operands: tuple[str, ...]
    written: tuple[str, ...]
    scalars: int
    mode: str
    state: bool

    @classmethod
    def of(cls, program: Program, op: Operation) -> Step:
        """That of an operation of a program."""
        states = op.operands[2:]
        written = op.operands[:1]
        if op.loop == "rule":
            written += states if op.written is None else states[: op.written]
        elif op.loop == "peek":
            written = op.operands[-1:]
        element = op.element or ELEMENTS[str(op.kernel)]
        count = HEAD[op.loop] + len(op.scalars(1, 0.1))
        state = op.kernel in OF_STATES
        return cls(element, op.loop, op.operands, written, count, program.mode(op), state)


@dataclass(frozen=True)
class Variant:
    """What leaves have in common that one kernel serves.

    steps: what is done, in order. scratch: names that are no arrays. dtype: of the arithmetic.
    formats: by name, of the arrays that the leaves have. mirrors: of the copies of the parameter.
    zeroed: the gradients are set to zero. clipped: the factor on the gradients is found on the
    device, see `guard_kernel`.
    """

    steps: tuple[Step, ...]
    scratch: tuple[str, ...]
    dtype: np.dtype
    formats: tuple[tuple[str, Format], ...]
    mirrors: tuple[Format, ...] = ()
    zeroed: bool = False
    clipped: bool = False

    @functools.cached_property
    def arrays(self) -> list[tuple[str, Format]]:
        """Those of a row of the table, by name, in its order."""
        used = {name for step in self.steps for name in step.operands}
        own = [(name, format) for name, format in self.formats if name in used]
        return own + list(zip(self.copies, self.mirrors, strict=False))

    @functools.cached_property
    def stored(self) -> list[str]:
        """The names of the arrays that are written, without copies."""
        written = dict.fromkeys(name for step in self.steps for name in step.written)
        kept = [name for name in written if name not in self.scratch]
        return kept + ["g"] * (self.zeroed and "p" in kept)

    @functools.cached_property
    def copies(self) -> list[str]:
        """The names that copies of the parameter have in the table."""
        return [f"copy{k}" for k in range(len(self.mirrors))] if "p" in self.stored else []

    @property
    def row_bytes(self) -> int:
        """Of the table."""
        return 8 * (2 + len(self.arrays))

    @property
    def width(self) -> int:
        """Elements that a thread works on at a time: a vector of the widest format. With two of
        float32 beside one of bfloat16, AdamW needs more registers than there are."""
        return VECTOR_BYTES * 8 // max(format.bits for _, format in self.arrays)


def operations_of(program: Program, phase: int, refreshed: bool) -> list[Operation]:
    """Those that are carried out in a phase; refreshed: there is a Hessian estimate."""
    return [op for op in program.operations if op.phase == phase and (refreshed or not op.needs)]


# ---------------------------------------------------------------- one element


def _element_lines(step: Step, k: int) -> list[str]:
    """What the k-th step does to variables that are named after its operands."""
    scalars, head = _scalars(step, k), HEAD[step.loop]
    operands = [f"x_{name}" for name in step.operands]
    if step.loop in ("filter", "other"):
        value = f"element{k}({', '.join([*operands, *scalars])})"
        return [f"{operands[0]} = " + (f"normal({value})" if step.state else value)]
    gradient, before, after = MODES[step.mode]
    p, g, *states = operands
    if step.loop == "peek":
        after = f"{states.pop()} = delta"
    new = [f"x_{name}" for name in step.written[1:]] if step.loop == "rule" else []
    lines = [
        f"w = {p}",
        f"gradient = {scalars[0]} * {g}",
        gradient.replace("decay", scalars[1]),
        before.replace("decay", scalars[1]),
        f"result = element{k}({', '.join(['w', 'gradient', *states, *scalars[head:]])})",
        "delta = result[0]" if states else "delta = result",
        *(f"{name} = normal(result[{j}])" for j, name in enumerate(new, 1)),
        after.replace("p[i]", p).replace("decay", scalars[1]),
    ]
    return [line for line in lines if line]


def _scalars(step: Step, k: int) -> list[str]:
    return [f"c{k}_{j}" for j in range(step.scalars)]


def _all_scalars(variant: Variant) -> list[str]:
    return [name for k, step in enumerate(variant.steps) for name in _scalars(step, k)]


def _one(variant: Variant) -> str:
    """The function of one element: from codes and scalars to the codes that are stored."""
    loaded = [name for name, _ in variant.arrays if name not in variant.copies]
    codes = [
        "encode_g(zero, none)" if name == "g" else f"encode_{name}(kept_{name}(x_{name}), none)"
        for name in variant.stored
    ]
    codes += [f"encode_{name}(x_p, none)" for name in variant.copies]
    lines = [
        *(f"x_{name} = T(decode_{name}(code_{name}))" for name in loaded),
        *(f"x_{name} = zero" for name in variant.scratch),
        *(line for k, step in enumerate(variant.steps) for line in _element_lines(step, k)),
        f"return {', '.join(codes)},",
    ]
    arguments = ", ".join([*(f"code_{name}" for name in loaded), *_all_scalars(variant)])
    return f"def one({arguments}):\n" + _indented(lines)


def _indented(lines: Iterable[str]) -> str:
    return "".join(f"    {line}\n" for line in lines)


def _surroundings(variant: Variant) -> dict[str, Any]:
    """What the functions of one element use."""
    namespace: dict[str, Any] = {
        "__name__": __name__,
        "T": variant.dtype.type,
        "zero": variant.dtype.type(0),
        "none": np.uint32(0),
        "normal": normal_or_zero_of(variant.dtype),
    }
    for k, step in enumerate(variant.steps):
        namespace[f"element{k}"] = step.element
    for name, format in variant.arrays:
        decode, encode = _CODECS[format.codec]
        namespace |= {f"decode_{name}": decode, f"encode_{name}": encode}
        # Doubles that are denormal floats; what is denormal in the compute type is gone already.
        narrow = variant.dtype == FLOAT64 and format.dtype != FLOAT64
        namespace[f"kept_{name}"] = normal_or_zero_of(variant.dtype, _NORMAL) if narrow else _same
    return namespace


def _same(x: Any) -> Any:
    return x


# ---------------------------------------------------------------- all elements

_STEP = """
def kernel({arguments}):
{clipping}
    where = word(blocks + 8 * cuda.blockIdx.x)
    row = table + (where >> 32) * ROW
    start = (where & 0xFFFFFFFF) * CHUNK
    stop = min(start + CHUNK, word(row))
    whole = start
    if word(row + 8):
        whole = stop - (stop - start) % WIDTH
{addresses}
    i = start + WIDTH * cuda.threadIdx.x
    while i < whole:
{vectors}
        i += WIDTH * THREADS
    i = whole + cuda.threadIdx.x
    while i < stop:
{rest}
        i += THREADS
"""


@functools.cache
def step_kernel(variant: Variant) -> Kernel:
    """The kernel of a variant."""
    surroundings = _surroundings(variant)
    exec(_one(variant), surroundings)
    width = variant.width
    namespace: dict[str, Any] = {
        "one": surroundings["one"],
        "word": word_loader(),
        "ROW": variant.row_bytes,
        "CHUNK": CHUNK,
        "WIDTH": width,
        "THREADS": THREADS,
    }
    for name, format in variant.arrays:
        for count in (1, width):
            namespace[f"load{count}_{name}"] = loader(format.bits, count)
            namespace[f"store{count}_{name}"] = storer(format.bits, count)
    words = ["table", "blocks", *["factor"] * variant.clipped]
    source = _STEP.format(
        arguments=", ".join([*words, *_all_scalars(variant)]),
        clipping=_indented(_clipping_lines(variant)),
        addresses=_indented(
            f"a_{name} = word(row + {8 * k})" for k, (name, _) in enumerate(variant.arrays, 2)
        ),
        vectors=textwrap.indent(_indented(_body(variant, width)), "    "),
        rest=textwrap.indent(_indented(_body(variant, 1)), "    "),
    )
    if variant.clipped:
        namespace["loaded"] = loader(variant.dtype.itemsize * 8, 1)
    return Kernel(source, len(words), len(_all_scalars(variant)), variant.dtype, namespace)


def _clipping_lines(variant: Variant) -> list[str]:
    """What puts the factor of the device on those of the operations, which are signs."""
    if not variant.clipped:
        return []
    signs = [f"c{k}_0" for k, step in enumerate(variant.steps) if HEAD[step.loop] == 2]
    stopped = ["if clip != clip:", "    return"]  # NaN: this step is not to be taken
    return ["clip = loaded(factor)[0]", *stopped, *(f"{s} = clip * {s}" for s in signs)]


def _body(variant: Variant, count: int) -> list[str]:
    """Loads of so many elements from the i-th on, then the function of each, then the stores."""
    sizes = {name: format.bits // 8 for name, format in variant.arrays}
    loaded = [name for name in sizes if name not in variant.copies]
    lines = [f"v_{n} = load{count}_{n}(a_{n} + {sizes[n]} * i)" for n in loaded]
    scalars = _all_scalars(variant)
    for k in range(count):
        lines.append(f"r{k} = one({', '.join([*(f'v_{n}[{k}]' for n in loaded), *scalars])})")
    for j, n in enumerate([*variant.stored, *variant.copies]):
        new = "".join(f"r{k}[{j}], " for k in range(count))
        lines.append(f"store{count}_{n}(a_{n} + {sizes[n]} * i, ({new}))")
    return lines


# ---------------------------------------------------------------- sums of squares

GROUPS = 8
"""So many segments are a block's; each has a thread for each lane."""

_SQUARES = """
def kernel(table, blocks, partials, count, scale):
    lanes = cuda.shared.array(THREADS, SUM)
    thread = cuda.threadIdx.x
    lane = thread % LANES
    index = cuda.blockIdx.x * GROUPS + thread // LANES
    total = SUM(0)
    if index < count:
        where = word(blocks + 8 * index)
        row = table + (where >> 32) * 16
        start = (where & 0xFFFFFFFF) * SEGMENT
        stop = min(start + SEGMENT, word(row))
        x = word(row + 8)
        i = start + lane
        while i + {ahead} < stop:
{loads}
{additions}
            i += {step}
        while i < stop:
            total += squares(T(decode(load(x + SIZE * i)[0])), scale)
            i += LANES
    lanes[thread] = total
    cuda.syncthreads()
    half = LANES // 2
    while half:
        if lane < half:
            lanes[thread] += lanes[thread + half]
        cuda.syncthreads()
        half //= 2
    if lane == 0 and index < count:
        store(partials + 8 * index, (lanes[thread],))
"""
UNROLLED = 8


@functools.cache
def squares_kernel(format: Format, dtype: np.dtype) -> Kernel:
    """Sums of squares of arrays, one for each segment: (table, blocks, partial sums, so many
    segments, scale). A row of the table: elements, address."""
    namespace = {
        "__name__": __name__,
        "word": word_loader(),
        "load": loader(format.bits, 1),
        "store": storer(64, 1),
        "decode": _CODECS[format.codec][0],
        "squares": squares,
        "T": dtype.type,
        "SUM": np.float64,
        "SIZE": format.bits // 8,
        "LANES": LANES,
        "SEGMENT": SEGMENT,
        "GROUPS": GROUPS,
        "THREADS": GROUPS * LANES,
    }
    wide = textwrap.indent
    source = _SQUARES.format(
        ahead=(UNROLLED - 1) * LANES,
        step=UNROLLED * LANES,
        loads=wide(_indented(f"v{k} = load(x + SIZE * (i + {k * LANES}))[0]" for k in
                             range(UNROLLED)), " " * 8),
        additions=wide(_indented(f"total += squares(T(decode(v{k})), scale)" for k in
                                 range(UNROLLED)), " " * 8),
    )  # fmt: skip
    return Kernel(source, 4, 1, dtype, namespace)


_TOTALS = """
def kernel(table, sums):
    tile = cuda.shared.array(THREADS, SUM)
    thread = cuda.threadIdx.x
    row = table + 16 * cuda.blockIdx.x
    partials = word(row)
    count = word(row + 8)
    total = SUM(0)
    start = 0
    while start < count:
        if start + thread < count:
            tile[thread] = load(partials + 8 * (start + thread))[0]
        cuda.syncthreads()
        if thread == 0:
            for k in range(min(THREADS, count - start)):
                total += tile[k]
        cuda.syncthreads()
        start += THREADS
    if thread == 0:
        store(sums + 8 * cuda.blockIdx.x, (total,))
"""


@functools.cache
def totals_kernel() -> Kernel:
    """Sums up each leaf's partial sums in index order, a block for each: (table, sums). A row of
    the table: the address of a leaf's partial sums, and how many there are."""
    return Kernel(_TOTALS, 2, 0, FLOAT64, _float64_names())


def _float64_names() -> dict[str, Any]:
    return {
        "word": word_loader(),
        "load": loader(64, 1),
        "store": storer(64, 1),
        "SUM": np.float64,
        "THREADS": THREADS,
    }


# ---------------------------------------------------------------- the norm, and what it decides

BINS = 68
"""Of 32 bits, together as long as a float64's range, with room for carries."""

_GUARD = """
def kernel(table, sums, count, limits, norms, control, kept, told, number, unscaled):
    bins = cuda.shared.array(BINS, WORD)
    flags = cuda.shared.array(1, WORD)
    thread = cuda.threadIdx.x
    for m in range(norms):
        k = thread
        while k < BINS:
            bins[k] = 0
            k += THREADS
        if thread == 0:
            flags[0] = 0
        cuda.syncthreads()
        i = thread
        while i < count:
            if word(table + 16 * i) == m:
                bits = word(sums + 8 * i) & 0x7FFFFFFFFFFFFFFF
                exponent = bits >> 52
                mantissa = bits & 0xFFFFFFFFFFFFF
                if exponent == 2047:
                    cuda.atomic.max(flags, 0, 2 if mantissa else 1)
                else:
                    if exponent:
                        mantissa |= 0x10000000000000
                        exponent -= 1
                    low = (mantissa & 0xFFFFFFFF) << (exponent & 31)
                    high = (mantissa >> 32) << (exponent & 31)
                    k = exponent >> 5
                    cuda.atomic.add(bins, k, low & 0xFFFFFFFF)
                    cuda.atomic.add(bins, k + 1, (low >> 32) + (high & 0xFFFFFFFF))
                    cuda.atomic.add(bins, k + 2, high >> 32)
            i += THREADS
        cuda.syncthreads()
        if thread == 0:
            norm = NAN if flags[0] == 2 else INFINITE
            if flags[0] == 0:
                norm = sqrt(rounded(bins)) * unscaled
            store(told + 16 * m, (norm,))
        cuda.syncthreads()
    if thread == 0:
        stopped = word(control) != 0
        finite = True
        for m in range(norms):
            if not load(told + 16 * m)[0] < INFINITE:
                finite = False
        flags[0] = 0
        if not stopped and not finite:
            flags[0] = 1
            store_word(control, number)
        for m in range(norms):
            norm = load(told + 16 * m)[0]
            limit = load(limits + 8 * m)[0]
            scale = limit / norm if norm > limit else ONE
            if stopped or not finite:
                scale = NAN
            store(told + 16 * m + 8, (scale,))
            store(control + FACTORS + 16 * m, (unscaled * scale,))
            store32(control + FACTORS + 16 * m + 8, (SINGLE(unscaled * scale),))
    cuda.syncthreads()
    if flags[0]:
        i = thread
        while i < count:
            store(kept + 8 * word(table + 16 * i + 8), (load(sums + 8 * i)[0],))
            i += THREADS
"""

FACTORS = 16
"""Bytes of the control block before its factors."""


def rounded(bins: Any) -> Any:
    """The number that stands in bins, rounded once: no order of what was added shows."""
    carry = 0
    for k in range(BINS):
        value = bins[k] + carry
        bins[k] = value & 0xFFFFFFFF
        carry = value >> 32
    top = BINS - 1
    while top > 2 and bins[top] == 0:
        top -= 1
    rest = 0
    for k in range(top - 2):
        if bins[k] != 0:
            rest = 1
    high = bins[top] << 20 | bins[top - 1] >> 12
    low = (bins[top - 1] & 0xFFF) << 33 | bins[top - 2] << 1 | rest
    # Both are exact, and so is the larger one's scaling: only the sum is rounded.
    total = np.float64(high) * 2.0**45 + np.float64(low)
    exponent = 32 * top - 64 - 1075
    half = exponent // 2
    return total * power(half) * power(exponent - half)


def power(exponent: Any) -> Any:
    """2 to a power, of normal numbers."""
    return np.int64((np.int64(exponent) + 1023) << 52).view(np.float64)


@functools.cache
def guard_kernel() -> Kernel:
    """Norms from leaves' sums, and the factors on the gradients of one step, in one block.

    Words: a table with a row for each leaf (its norm, its place among all), the leaves' sums, how
    many, limits, how many norms, the control block, where to keep the sums, what is told, the
    step's number. Scalar: the inverse of the gradients' scale. The control block: the number of the
    first step that found a norm that was not finite, 0 as long as there was none, and from FACTORS
    on, for each norm, its factor as float64 and as float32, 16 bytes apart: NaN where the step is
    not to be taken, because its own norm or one before is not finite. kept: float64 by place, the
    sums of that first step. told: for each norm itself and its clip scale, or NaN.
    """
    names = {
        **_float64_names(),
        "WORD": np.int64,
        "BINS": BINS,
        "FACTORS": FACTORS,
        "SINGLE": np.float32,
        "ONE": 1.0,
        "NAN": math.nan,
        "INFINITE": math.inf,
        "rounded": rounded,
        "sqrt": math.sqrt,
        "store32": storer(32, 1),
        "store_word": word_storer(),
    }
    return Kernel(_GUARD, 9, 1, FLOAT64, names)
