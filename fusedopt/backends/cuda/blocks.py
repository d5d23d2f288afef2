"""Kernels of arrays whose blocks of elements share a scale, in two stages.

A group of threads has a tile of elements, some of them each. It computes their values in registers,
finds the largest of each block, and encodes by the scale that follows from it.
"""

from __future__ import annotations

import functools
import textwrap
from typing import Any, NamedTuple

import numpy as np

from ...arrays.formats import TILE, Format
from ...jit.block_codecs import BLOCKS, element_functions, negative_bits, positive_bits, scaling
from .kernels import (
    Variant,
    all_scalars,
    beginning,
    indented,
    kernel_names,
    one_values,
    place,
    planes,
    step_kernel,
)
from .toolkit import MORE_REGISTERS, Kernel
from .vectors import group_largest, loader, storer

WIDTH = 8
"""Elements of a thread. A tile is a warp's, so that no block is shared by two."""

LANES = TILE // WIDTH
WARPS = 4
"""Warps of a thread block."""

CHUNK = 1 << 12
"""Elements of a thread block."""

_STEP = """
def kernel({arguments}):
{beginning}
    tile = start + TILE * (cuda.threadIdx.x // LANES)
    while tile < stop:
        i = tile + WIDTH * (cuda.threadIdx.x % LANES)
        whole = flags & 1 != 0 and i + WIDTH <= stop
{body}
        tile += TILE * WARPS
"""


def kernel_of(variant: Variant) -> Kernel:
    """The kernel of a variant, with blocks or without."""
    return block_kernel(variant) if variant.blocked else step_kernel(variant)


@functools.cache
def block_kernel(variant: Variant) -> Kernel:
    """The kernel of a variant with blocks."""
    namespace = kernel_names(variant, WIDTH)
    namespace |= {"CHUNK": CHUNK, "LANES": LANES, "WARPS": WARPS, "zero": variant.dtype.type(0)}
    namespace |= {"load_scale": loader(32, 1), "store_scale": storer(32, 1)}
    for name, format in variant.arrays:
        if format.quantized:
            namespace[f"load_{name}"] = loader(format.bits, WIDTH)
            namespace[f"store_{name}"] = storer(format.bits, WIDTH)
            made = block_functions(format)
            namespace |= {f"{what}_{name}": f for what, f in made._asdict().items()}
        else:
            for plane, size in planes(name, format):
                own = (namespace[f"{what}{n}_{plane}"] for what in ("load", "store")
                       for n in (1, WIDTH))  # fmt: skip
                load, store = _guarded(size // 8, *own)
                namespace |= {f"load_{plane}": load, f"store_{plane}": store}
    source = _STEP.format(
        arguments=", ".join([*variant.words, *all_scalars(variant)]),
        beginning=indented(beginning(variant)),
        body=textwrap.indent(indented(_body(variant)), "    "),
    )
    words, scalars = len(variant.words), len(all_scalars(variant))
    return Kernel(source, words, scalars, variant.dtype, namespace, MORE_REGISTERS)


def _body(variant: Variant) -> list[str]:
    """Return the lines of a thread's work on its elements of a tile, from the i-th on."""
    lines = []
    for name, format in variant.loaded:
        if format.quantized:
            lines.append(f"v_{name} = load_{name}(a_{name} + i * {format.bits} // 8)")
            at = f"scales_{name} + 4 * (i // {format.block})"
            lines.append(f"scale_{name} = load_scale({at})[0]")
        else:
            lines += [f"v_{n} = load_{n}(a_{n}, i, stop, whole)" for n, _ in planes(name, format)]
    lines += [f"tile_{n} = subkey(fresh_{n}, before + i // TILE)" for n in variant.drawn]
    for k in range(WIDTH):
        values = [*one_values(variant, k, WIDTH), *all_scalars(variant)]
        lines.append(f"r{k} = one({', '.join(values)})")
    j, blocks = 0, []
    for name, format in variant.written:
        for n, _ in planes(name, format):
            if format.quantized:
                blocks.append((name, format, j))
            else:
                new = "".join(f"r{k}[{j}], " for k in range(WIDTH))
                lines.append(f"store_{n}(a_{n}, i, stop, whole, ({new}))")
            j += 1
    for block in blocks:
        lines += _encoding(*block)
    return lines


def _encoding(name: str, format: Format, j: int) -> list[str]:
    """Stores the j-th results as blocks."""
    values = [f"y{k}" for k in range(WIDTH)]
    lines = [f"y{k} = r{k}[{j}] if i + {k} < stop else zero" for k in range(WIDTH)]
    found = []
    for sign in ("positive", "negative"):
        largest = f"{sign}_{name}(y0)"
        for value in values[1:]:
            largest = f"max({largest}, {sign}_{name}({value}))"
        found.append(f"largest_{name}({largest})")
    codes = "".join(
        f"code_{name}({value}, good, factor, "
        + (f"tile_{name}, {place(k, WIDTH)}), " if format.random else "0, u32(0)), ")
        for k, value in enumerate(values)
    )
    return [
        *lines,
        f"good, scale, factor = scaled_{name}({', '.join(found)})",
        "if i < stop:",
        f"    store_{name}(a_{name} + i * {format.bits} // 8, ({codes}))",
        f"    if i % {format.block} == 0:",
        f"        store_scale(scales_{name} + 4 * (i // {format.block}), (scale,))",
    ]


# ---------------------------------------------------------------- one block


class BlockFunctions(NamedTuple):
    """The functions that encode a block.

    positive, negative: of a value, the bits whose largest is wanted. largest: that of all threads
    of the block. scaled: from both whether the block has a scale other than zero and NaN, the
    scale, and its inverse. code: of a value, with these.
    """

    positive: Any
    negative: Any
    largest: Any
    scaled: Any
    code: Any


@functools.cache
def block_functions(format: Format) -> BlockFunctions:
    """The functions of a format."""
    b = BLOCKS[format.codec.removesuffix("_stochastic")]
    _, nearest, stochastic = element_functions(b)
    encode = stochastic if format.random else nearest
    f32, zero = np.float32, np.float32(0)

    def code(x: Any, good: Any, factor: Any, key: Any, place: Any) -> Any:
        return encode(f32(x) if good else zero, factor, key, place)

    largest = group_largest(b.block // WIDTH)
    return BlockFunctions(positive_bits, negative_bits, largest, scaling(b), code)


def _guarded(size: int, load1: Any, load: Any, store1: Any, store: Any) -> tuple[Any, Any]:
    """Loads and stores of a thread's elements, of `size` bytes, that lie below `stop`.

    load1, store1: of one element; load, store: of all, where they are `whole`.
    """
    # On the device all paths must have one type, and an element there is none of is anything.
    lines = ", ".join(
        f"load1(a + {size * k} + {size} * i)[0] if i + {k} < stop else load1(a)[0]"
        for k in range(WIDTH)
    )
    stores = [
        line
        for k in range(WIDTH)
        for line in (
            f"    if i + {k} < stop:",
            f"        store1(a + {size * k} + {size} * i, (elements[{k}],))",
        )
    ]
    source = [
        "def some(a, i, stop, whole):",
        "    if whole:",
        f"        return load(a + {size} * i)",
        f"    return ({lines})",
        "def put(a, i, stop, whole, elements):",
        "    if whole:",
        f"        store(a + {size} * i, elements)",
        "        return",
        *stores,
    ]
    namespace = {"load1": load1, "load": load, "store1": store1, "store": store}
    namespace["__name__"] = __name__
    exec("\n".join(source), namespace)
    return namespace["some"], namespace["put"]
