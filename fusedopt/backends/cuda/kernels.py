"""Kernels from programs: every operation of a phase on each element, in registers.

A kernel takes the address of a table with a row of int64 for each leaf (elements, flags, `columns`
of its arrays), where flags are 1 if all arrays lie on 16-byte boundaries, plus twice the tiles that
come before, where this is but one row of a parameter; that of a list with an int64 for each
block (leaf << 32 | chunk), where gradients are clipped on the device that of their factor, where
rounding is random the steps that the leaves have behind them, and the scalars of its operations one
after the other. `blocks` has the kernels of arrays whose blocks share a scale.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...arrays.formats import FLOAT64, TILE, Format
from ...jit import scalar_codecs as bits
from ...jit.block_codecs import BLOCKS, element_functions
from ...jit.tiles import normal_or_zero_of
from ...programs.elements import ELEMENTS, OF_STATES, Element
from ...programs.program import HEAD, Operation, Program, loop_lines
from .toolkit import MAX_REGISTERS, MORE_REGISTERS, Kernel
from .vectors import VECTOR_BYTES, loader, storer, word_loader

FEW = 6
"""How many arrays a kernel can have with the usual number of registers: Adan's seven spill 24
bytes."""
THREADS = 128
VECTORS = 4
"""How many vectors each thread of a block works on. On an H200, over 10^9 elements, 128 threads
with 4 vectors reach 0.97 to 0.99 of a copy's bandwidth in float32 and 0.95 to 1.01 in bfloat16; 256
threads reached 0.93 to 1.01 and 0.88 to 0.97 with 4096 elements a block (benchmarks/gpu.py)."""

CODECS = {
    "float32": (bits.decode_float32, bits.encode_float32),
    "float64": (bits.decode_float64, bits.encode_float64),
    "bfloat16": (bits.decode_bfloat16, bits.encode_bfloat16),
    "float16": (bits.decode_float16, bits.encode_float16),
    "bfloat16_stochastic": (bits.decode_bfloat16, bits.stochastic_bfloat16),
    "float16_stochastic": (bits.decode_float16, bits.stochastic_float16),
    "split16": (bits.decode_split16, bits.encode_split16),
    "kahan": (bits.decode_kahan, bits.encode_kahan),
}
_NORMAL = float(np.finfo(np.float32).smallest_normal)


class Step(NamedTuple):
    """An operation as a kernel needs it.

    written: of the operands. scalars: their number, with those before the operation's own. mode: of
    the loop around a rule. state: stored as states are.
    """

    element: Element
    loop: str
    operands: tuple[str, ...]
    written: tuple[str, ...]
    scalars: int
    mode: str
    state: bool

    @classmethod
    def of(cls, program: Program, op: Operation) -> Step:
        """Return the kernel's form of an operation of a program."""
        states = op.operands[2:]
        written = op.operands[:1]
        if op.loop == "rule":
            written += states if op.written is None else states[: op.written]
        elif op.loop == "peek":
            written = op.operands[-1:]
        elif op.loop == "sum":
            written = ()
        element = op.element or ELEMENTS[str(op.kernel)]
        count = HEAD[op.loop] + len(op.scalars(1, 0.1))
        state = op.kernel in OF_STATES
        return cls(element, op.loop, op.operands, written, count, program.mode(op), state)


def columns(name: str, format: Format) -> Iterator[str]:
    """The words of an array in a row of the table: addresses, then the key of its random bits."""
    yield f"a_{name}"
    if format.quantized:
        yield f"scales_{name}"
    elif format.aux_dtype is not None:
        yield f"a_low_{name}"
    if format.random:
        yield f"key_{name}"


def planes(name: str, format: Format) -> list[tuple[str, int]]:
    """The names and bits of what an array has of each element, at an address of its own each."""
    pair = format.aux_dtype is not None and not format.quantized
    return [(name, format.bits)] + [(f"low_{name}", 16)] * pair


@dataclass(frozen=True)
class Variant:
    """The common properties of the leaves that one kernel serves.

    steps: what is done, in order. temporaries: names that are no arrays. dtype: of the arithmetic.
    formats: by name, of the arrays that the leaves have. mirrors: of the copies of the parameter.
    zeroed: the gradients are set to zero. clipped: the factor on the gradients is found on the
    device, see `sums.guard_kernel`.
    """

    steps: tuple[Step, ...]
    temporaries: tuple[str, ...]
    dtype: np.dtype
    formats: tuple[tuple[str, Format], ...]
    mirrors: tuple[Format, ...] = ()
    zeroed: bool = False
    clipped: bool = False

    @functools.cached_property
    def arrays(self) -> list[tuple[str, Format]]:
        """The arrays of a row of the table, by name, in its order."""
        used = {name for step in self.steps for name in step.operands}
        own = [(name, format) for name, format in self.formats if name in used]
        return own + list(zip(self.copies, self.mirrors, strict=False))

    @functools.cached_property
    def stored(self) -> list[str]:
        """The names of the arrays that are written, without copies."""
        written = dict.fromkeys(name for step in self.steps for name in step.written)
        kept = [name for name in written if name not in self.temporaries]
        return kept + ["g"] * (self.zeroed and "p" in kept)

    @functools.cached_property
    def copies(self) -> list[str]:
        """The names that copies of the parameter have in the table."""
        return [f"copy{k}" for k in range(len(self.mirrors))] if "p" in self.stored else []

    @functools.cached_property
    def loaded(self) -> list[tuple[str, Format]]:
        """The arrays that are read."""
        return [(name, format) for name, format in self.arrays if name not in self.copies]

    @functools.cached_property
    def written(self) -> list[tuple[str, Format]]:
        """The arrays that are stored, then the copies."""
        formats = dict(self.arrays)
        return [(name, formats[name]) for name in (*self.stored, *self.copies)]

    @functools.cached_property
    def columns(self) -> list[str]:
        """Return the words of a row of the table behind the first two."""
        return [word for name, format in self.arrays for word in columns(name, format)]

    @property
    def blocked(self) -> bool:
        """Whether there is an array whose blocks share a scale."""
        return any(format.quantized for _, format in self.arrays)

    @property
    def random(self) -> bool:
        """Whether there is an array that is rounded at random."""
        return any(format.random for _, format in self.arrays)

    @property
    def drawn(self) -> list[str]:
        """The names of the arrays that are rounded at random."""
        return [name for name, format in self.written if format.random]

    @property
    def chunk(self) -> int:
        """The number of elements that a block works on."""
        return VECTORS * THREADS * self.width

    @property
    def width(self) -> int:
        """Elements that a thread works on at a time: a vector of the widest format. With two of
        float32 beside one of bfloat16, AdamW needs more registers than there are."""
        return VECTOR_BYTES * 8 // max(format.bits for _, format in self.arrays)

    @property
    def words(self) -> list[str]:
        """The leading arguments of the kernel."""
        return ["table", "blocks", *["factor"] * self.clipped, *["behind"] * self.random]


def operations_of(
    program: Program, phase: int, refreshed: bool, sums: bool = False
) -> list[Operation]:
    """Return the operations that are carried out in a phase.

    refreshed: whether there is a Hessian estimate. sums: whether operations that sum are included.
    """
    return [
        op
        for op in program.operations
        if op.phase == phase and (refreshed or not op.needs) and (sums or op.loop != "sum")
    ]


# ---------------------------------------------------------------- one element


def _element_lines(step: Step, k: int) -> list[str]:
    """Return the lines of the k-th step, in variables that are named after its operands."""
    scalars, head = _scalars(step, k), HEAD[step.loop]
    operands = [f"x_{name}" for name in step.operands]
    if step.loop == "sum":
        return [f"{operands[0]} = element{k}({', '.join([*operands[1:], *scalars])})"]
    if step.loop in ("filter", "other"):
        value = f"element{k}({', '.join([*operands, *scalars])})"
        return [f"{operands[0]} = " + (f"normal({value})" if step.state else value)]
    p, g, *states = operands
    target = states.pop() if step.loop == "peek" else p
    gradient, before, after = loop_lines(step.mode, target, scalars[1])
    new = [f"x_{name}" for name in step.written[1:]] if step.loop == "rule" else []
    lines = [
        f"w = {p}",
        f"gradient = {scalars[0]} * {g}",
        gradient,
        before,
        f"result = element{k}({', '.join(['w', 'gradient', *states, *scalars[head:]])})",
        "delta = result[0]" if states else "delta = result",
        *(f"{name} = normal(result[{j}])" for j, name in enumerate(new, 1)),
        after,
    ]
    return [line for line in lines if line]


def _scalars(step: Step, k: int) -> list[str]:
    return [f"c{k}_{j}" for j in range(step.scalars)]


def all_scalars(variant: Variant) -> list[str]:
    return [name for k, step in enumerate(variant.steps) for name in _scalars(step, k)]


def _codes(name: str, format: Format) -> list[str]:
    """The arguments of an array's decoder."""
    codes = [f"code_{plane}" for plane, _ in planes(name, format)]
    return codes + [f"scale_{name}"] * format.quantized


def code_arguments(variant: Variant) -> list[str]:
    """The arguments of `one` that an element is decoded from."""
    return [code for name, format in variant.loaded for code in _codes(name, format)]


def one_arguments(variant: Variant) -> list[str]:
    """The arguments of `one`, without the scalars."""
    codes = code_arguments(variant)
    random = [name for name in variant.drawn if not dict(variant.arrays)[name].quantized]
    return codes + ["place"] * bool(random) + [f"tile_{name}" for name in random]


def _encoded(variant: Variant, name: str, format: Format) -> str:
    """The codes of an element, one after the other; of a block, its value."""
    value = "zero" if name == "g" else f"x_{'p' if name in variant.copies else name}"
    if format.quantized:
        return value
    if name not in (*variant.copies, "g"):
        value = f"kept_{name}({value})"
    if len(planes(name, format)) > 1:
        return f"*encode_{name}({value})"
    random = f"random_bits(tile_{name}, place)" if format.random else "none"
    return f"encode_{name}({value}, {random})"


def _computed(variant: Variant) -> list[str]:
    """Return the lines for one element between its loads and its stores."""
    return [
        *(f"x_{n} = T(decode_{n}({', '.join(_codes(n, f))}))" for n, f in variant.loaded),
        *(f"x_{name} = zero" for name in variant.temporaries),
        *(line for k, step in enumerate(variant.steps) for line in _element_lines(step, k)),
    ]


def _one(variant: Variant) -> str:
    """The function of one element: from codes and scalars to the codes that are stored."""
    lines, results = _computed(variant), []
    for name, format in variant.written:
        value = _encoded(variant, name, format)
        if value.startswith("*"):
            lines.append(f"high_{name}, low_{name} = {value[1:]}")
            results += [f"high_{name}", f"low_{name}"]
        else:
            results.append(value)
    lines.append(f"return {', '.join(results)},")
    arguments = ", ".join([*one_arguments(variant), *all_scalars(variant)])
    return f"def one({arguments}):\n" + indented(lines)


def indented(lines: Iterable[str]) -> str:
    """Return lines as the body of a function."""
    return "".join(f"    {line}\n" for line in lines)


def one_element(variant: Variant) -> Any:
    """The function of one element: see `_one`."""
    surroundings = _surroundings(variant)
    exec(_one(variant), surroundings)
    return surroundings["one"]


def sums_of_element(variant: Variant) -> tuple[Any, int]:
    """The function of one element: from codes and scalars to what it adds to each sum; and how many
    sums there are."""
    names = [f"x_{step.operands[0]}" for step in variant.steps if step.loop == "sum"]
    arguments = ", ".join([*code_arguments(variant), *all_scalars(variant)])
    lines = [*_computed(variant), f"return {', '.join(names)},"]
    surroundings = _surroundings(variant)
    exec(f"def sums_of({arguments}):\n" + indented(lines), surroundings)
    return surroundings["sums_of"], len(names)


def _surroundings(variant: Variant) -> dict[str, Any]:
    """Return the names that the function of one element uses."""
    namespace: dict[str, Any] = {
        "__name__": __name__,
        "T": variant.dtype.type,
        "zero": variant.dtype.type(0),
        "none": np.uint32(0),
        "normal": normal_or_zero_of(variant.dtype),
        "random_bits": bits.random_bits,
    }
    for k, step in enumerate(variant.steps):
        namespace[f"element{k}"] = step.element
    for name, format in variant.arrays:
        if format.quantized:
            block = BLOCKS[format.codec.removesuffix("_stochastic")]
            namespace[f"decode_{name}"] = element_functions(block)[0]
            continue
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
{beginning}
    whole = start
    if flags & 1:
        whole = stop - (stop - start) % WIDTH
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
    """The kernel of a variant without blocks."""
    width = variant.width
    namespace = kernel_names(variant, width) | {"CHUNK": variant.chunk, "THREADS": THREADS}
    source = _STEP.format(
        arguments=", ".join([*variant.words, *all_scalars(variant)]),
        beginning=indented(beginning(variant)),
        vectors=textwrap.indent(indented(_body(variant, width)), "    "),
        rest=textwrap.indent(indented(_body(variant, 1)), "    "),
    )
    words, scalars = len(variant.words), len(all_scalars(variant))
    many = bool(variant.drawn) or len(variant.arrays) > FEW
    registers = MORE_REGISTERS if many else MAX_REGISTERS
    return Kernel(source, words, scalars, variant.dtype, namespace, registers)


def kernel_names(variant: Variant, width: int) -> dict[str, Any]:
    """Return the names that every kernel of a variant uses, at `width` elements a thread."""
    namespace: dict[str, Any] = {
        "one": one_element(variant),
        "word": word_loader(),
        "subkey": bits.subkey,
        "unsigned": unsigned,
        "u32": np.uint32,
        "ROW": 8 * (2 + len(variant.columns)),
        "WIDTH": width,
        "TILE": TILE,
    }
    for name, format in variant.arrays:
        for plane, size in [] if format.quantized else planes(name, format):
            for count in (1, width):
                namespace[f"load{count}_{plane}"] = loader(size, count)
                namespace[f"store{count}_{plane}"] = storer(size, count)
    if variant.clipped:
        namespace["loaded"] = loader(variant.dtype.itemsize * 8, 1)
    return namespace


def unsigned(word: Any) -> Any:
    """The bits of an int64 as a key."""
    return np.int64(word).view(np.uint64)


def beginning(variant: Variant) -> list[str]:
    """Return the lines before a thread's first element: the factor, its row, addresses and keys."""
    lines = []
    if variant.clipped:
        signs = [f"c{k}_0" for k, step in enumerate(variant.steps) if HEAD[step.loop] == 2]
        stopped = ["if clip != clip:", "    return"]  # NaN: this step is not to be taken
        lines += ["clip = loaded(factor)[0]", *stopped, *(f"{s} = clip * {s}" for s in signs)]
    lines += [
        "where = word(blocks + 8 * cuda.blockIdx.x)",
        "row = table + (where >> 32) * ROW",
        "start = (where & 0xFFFFFFFF) * CHUNK",
        "stop = min(start + CHUNK, word(row))",
        "flags = word(row + 8)",
        "before = flags >> 1",
        *(f"{name} = word(row + {8 * k})" for k, name in enumerate(variant.columns, 2)),
    ]
    return lines + [f"fresh_{n} = subkey(unsigned(key_{n}), behind)" for n in variant.drawn]


def _body(variant: Variant, count: int) -> list[str]:
    """Return the lines that load `count` elements from the i-th on, compute and store them."""
    loaded = [plane for name, format in variant.loaded for plane in planes(name, format)]
    written = [plane for name, format in variant.written for plane in planes(name, format)]
    lines = [f"v_{n} = load{count}_{n}(a_{n} + {size // 8} * i)" for n, size in loaded]
    lines += [f"tile_{n} = subkey(fresh_{n}, before + i // TILE)" for n in variant.drawn]
    for k in range(count):
        values = [*one_values(variant, k, count), *all_scalars(variant)]
        lines.append(f"r{k} = one({', '.join(values)})")
    for j, (n, size) in enumerate(written):
        new = "".join(f"r{k}[{j}], " for k in range(count))
        lines.append(f"store{count}_{n}(a_{n} + {size // 8} * i, ({new}))")
    return lines


def place(k: int, count: int) -> str:
    """The place in its tile of the k-th of `count` elements, of which the i-th is the first.

    So written that the compiler sees which elements share a draw of random bits.
    """
    return f"u32(i // {count} % {TILE // count} * {count} + {k})"


def one_values(variant: Variant, k: int, count: int) -> list[str]:
    """Return the arguments of `one` for the k-th of `count` elements, without the scalars."""
    values = []
    for name in one_arguments(variant):
        if name == "place":
            values.append(place(k, count))
        else:
            code = name.startswith("code_")
            values.append(f"v_{name.removeprefix('code_')}[{k}]" if code else name)
    return values
