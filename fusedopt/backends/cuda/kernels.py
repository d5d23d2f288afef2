"""Kernels from programs: every operation of a phase on each element, in registers.

A kernel takes the address of a table with a row of int64 for each leaf (elements, whether all
arrays lie on 16-byte boundaries, addresses), that of a list with an int64 for each block (leaf <<
32 | chunk), where gradients are clipped on the device that of their factor, and the scalars of its
operations one after the other.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...arrays.formats import FLOAT64, Format
from ...jit import scalar_codecs
from ...jit.tiles import MODES, normal_or_zero_of
from ...programs.elements import ELEMENTS, OF_STATES, Element
from ...programs.program import HEAD, Operation, Program
from .toolkit import Kernel
from .vectors import VECTOR_BYTES, loader, storer, word_loader

THREADS = 128
VECTORS = 4
"""How many vectors each thread of a block works on. On an H200, over 10^9 elements, 128 threads
with 4 vectors reach 0.98 of a copy's bandwidth in float32 and 0.93 to 0.95 in bfloat16, where 256
threads reach 0.95 and 0.86 to 0.93."""

CODECS = {
    "float32": (scalar_codecs.decode_float32, scalar_codecs.encode_float32),
    "float64": (scalar_codecs.decode_float64, scalar_codecs.encode_float64),
    "bfloat16": (scalar_codecs.decode_bfloat16, scalar_codecs.encode_bfloat16),
    "float16": (scalar_codecs.decode_float16, scalar_codecs.encode_float16),
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
    device, see `sums.guard_kernel`.
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
    def chunk(self) -> int:
        """How many elements a block works on."""
        return VECTORS * THREADS * self.width

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
    return f"def one({arguments}):\n" + indented(lines)


def indented(lines: Iterable[str]) -> str:
    """As a function's body."""
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
        decode, encode = CODECS[format.codec]
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
        "CHUNK": variant.chunk,
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
        clipping=indented(_clipping_lines(variant)),
        addresses=indented(
            f"a_{name} = word(row + {8 * k})" for k, (name, _) in enumerate(variant.arrays, 2)
        ),
        vectors=textwrap.indent(indented(_body(variant, width)), "    "),
        rest=textwrap.indent(indented(_body(variant, 1)), "    "),
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
