"""Arrays on a device: what `fusedopt.arrays` and `fusedopt.states` are for those of the host."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..around import AVERAGE, Around
from ..arrays import EXPECTED
from ..formats import DTYPES, PLAIN, SPLIT16, Format, compute_dtype
from ..options import Options
from ..states import Memory, Stored
from ..storage import QUANTIZED_FROM, Storage
from . import foreign

if TYPE_CHECKING:
    from ..rules import Rule
    from .toolkit import Memory as Bytes

LINE = 256
"""Bytes: new arrays begin on a multiple of it."""


class DeviceArray:
    """A dense array on a CUDA device, over memory of its owner.

    Other libraries take it by `__cuda_array_interface__` (bfloat16 as uint16, its bits). `copy`
    makes an ndarray on the host, and `a[...] = b` takes one, or another array of the device, and
    converts.
    """

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        dtype: np.dtype,
        order: Literal["C", "F"],
        device: int,
        owner: Any,
        library: str,
        stream: int = 0,
    ) -> None:
        self.address, self.shape, self.dtype, self.order = address, shape, dtype, order
        self.device, self.owner, self.library, self.named_stream = device, owner, library, stream
        self.ndim, self.size = len(shape), math.prod(shape)
        self.itemsize = dtype.itemsize
        self.nbytes = self.size * self.itemsize

    def like(self, address: int, dtype: np.dtype, owner: Any) -> DeviceArray:
        """An array of the same shape and order elsewhere, which works on the same stream."""
        return DeviceArray(
            address,
            self.shape,
            dtype,
            self.order,
            self.device,
            owner,
            self.library,
            self.named_stream,
        )

    @property
    def flags(self) -> Any:
        """In which orders the elements lie."""
        both = self.ndim < 2 or self.size < 2
        return SimpleNamespace(
            c_contiguous=both or self.order == "C", f_contiguous=both or self.order == "F"
        )

    @property
    def stream(self) -> int:
        """The handle of the stream on which its library works now."""
        return foreign.current_stream(self.library, self.device, self.named_stream)

    @property
    def unmoved(self) -> bool:
        """Whether the owner still has the same memory."""
        moves = foreign.library_of(self.owner) == "torch"
        return not moves or bool(self.owner.data_ptr() == self.address)

    @property
    def memory(self) -> Bytes:
        """Its bytes."""
        from . import toolkit

        return toolkit.Memory(self.address, self.nbytes, self)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        steps = [self.itemsize, *(self.shape if self.order == "F" else self.shape[::-1])]
        strides = tuple(accumulate(steps, lambda x, y: x * y))[: self.ndim]
        return {
            "shape": self.shape,
            "typestr": "<u2" if self.dtype not in _TYPED else self.dtype.str,
            "data": (self.address, False),
            "strides": strides if self.order == "F" else strides[::-1],
            "stream": self.stream or 1,
            "version": 3,
        }

    def copy(self, order: str = "A") -> np.ndarray:
        """The elements on the host, in the same order in memory."""
        from . import toolkit

        with toolkit.on_device(self.device):
            flat = self.memory.read(self.stream).view(self.dtype)
        return flat.reshape(self.shape, order=self.order)

    def __setitem__(self, key: Any, value: Any) -> None:
        if key is not Ellipsis:
            raise TypeError(f"only whole arrays can be assigned to, with a[...], got a[{key!r}]")
        from . import toolkit
        from .launching import convert

        with toolkit.on_device(self.device):
            if isinstance(value, DeviceArray):
                convert(self, value)
                return
            host = np.broadcast_to(np.asarray(value), self.shape).astype(self.dtype)
            flat = np.ascontiguousarray(host.reshape(-1, order=self.order))
            self.memory.write(flat, self.stream)

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype.name}, device={self.device})"


_TYPED = tuple(map(np.dtype, (np.float32, np.float64, np.float16)))


class DeviceStored(Stored):
    """The elements of an array on a device."""

    @property
    def values(self) -> Any:
        """The array itself: kernels decode it."""
        return self.data


# ---------------------------------------------------------------- what the caller gives


def _read(label: str, array: Any) -> tuple[foreign.Description, np.dtype]:
    if isinstance(array, np.ndarray) or not foreign.on_device(array):
        raise TypeError(
            f"{label}: expected an array on a CUDA device, got a {type(array).__name__} in the"
            " host's memory; move it, or take another backend with all arrays on the host"
        )
    if foreign.library_of(array) in ("jax", "jaxlib"):
        raise TypeError(
            f"{label}: JAX's arrays cannot be written to; take CuPy's, PyTorch's or Numba's"
        )
    if isinstance(array, DeviceArray):
        strides = array.__cuda_array_interface__["strides"]
        d = foreign.Description(
            array.address, array.shape, strides, array.dtype, array.device, array.named_stream,
            True, array.library,
        )  # fmt: skip
        return d, array.dtype
    try:
        d = foreign.describe(array)
    except TypeError as error:
        raise TypeError(f"{label}: {error}") from error
    if d.dtype is None or d.dtype not in DTYPES:
        found = getattr(array, "dtype", d.dtype)
        raise TypeError(
            f"{label}: expected {EXPECTED}, got {found}; pass an array of one of these dtypes"
        )
    return d, next(dtype for dtype in DTYPES if dtype == d.dtype)


def _order(shape: tuple[int, ...], strides: Sequence[int] | None, size: int) -> str:
    """In which orders the elements lie densely: "C", "F", both, or none."""
    if strides is None or 0 in shape:
        return "CF" if sum(n > 1 for n in shape) < 2 or 0 in shape else "C"
    found = ""
    for name, axes in (("C", range(len(shape) - 1, -1, -1)), ("F", range(len(shape)))):
        expected, dense = size, True
        for axis in axes:
            dense &= shape[axis] == 1 or strides[axis] == expected
            expected *= shape[axis]
        found += name * dense
    return found


def _device_array(d: foreign.Description, dtype: np.dtype, order: Any, owner: Any) -> DeviceArray:
    from . import toolkit

    device = toolkit.current_device() if d.device is None else d.device
    return DeviceArray(d.address, d.shape, dtype, order, device, owner, d.library, d.stream)


def check_target(label: str, array: Any) -> DeviceArray:
    """An array that will be updated in place.

    Raises TypeError for another kind or dtype, ValueError where it is read-only, unaligned or not
    dense.
    """
    if isinstance(array, DeviceArray):
        return array
    d, dtype = _read(label, array)
    if not d.writeable:
        raise ValueError(f"{label}: is read-only, and is to be updated in place; pass a copy")
    if d.address % dtype.itemsize:
        raise ValueError(f"{label}: is not aligned in memory; pass a copy")
    order = _order(d.shape, d.strides, dtype.itemsize)
    if not order:
        raise ValueError(
            f"{label}: is not dense (shape {d.shape}, strides {d.strides}), and a copy would be"
            " updated instead of it; pass a contiguous array, and copy it back"
        )
    return _device_array(d, dtype, order[0], array)


def check_parameter(label: str, array: Any, rule: Rule) -> DeviceArray:
    """A parameter that this rule can update; raises as `check_target`, and where it cannot."""
    a = check_target(label, array)
    reason = rule.refuses(a)  # type: ignore[arg-type]  # it looks at the shape
    if reason:
        raise ValueError(f"{label}: {reason}")
    return a


def check_apart(labels: Sequence[str], arrays: Sequence[DeviceArray]) -> None:
    """ValueError where these arrays are not all on one device, or two share memory."""
    for label, a in zip(labels, arrays, strict=True):
        if a.device != arrays[0].device:
            raise ValueError(
                f"{label}: is on the device {a.device}, and {labels[0]} on {arrays[0].device}; give"
                " each device an optimizer of its own"
            )
    ranges = sorted((a.address, a.address + a.nbytes, k) for k, a in enumerate(arrays) if a.size)
    for (_, end, first), (begin, _, second) in pairwise(ranges):
        if begin < end:
            x, y = sorted((first, second))
            raise ValueError(
                f"{labels[y]}: shares memory with {labels[x]}, so that one update would disturb the"
                " other; pass each array once, or a copy"
            )


class Fit:
    """Checks gradients against the arrays that a step writes: see `fusedopt.arrays.Fit`."""

    def __init__(
        self,
        labels: Sequence[str],
        parameters: Sequence[DeviceArray],
        written: Sequence[Sequence[DeviceArray]],
        copies: Sequence[int] | None = None,
    ) -> None:
        self._labels, self._parameters = labels, parameters
        self._copies = copies or [0] * len(labels)
        ranges = (
            (a.address, a.address + a.nbytes, k, j)
            for k, group in enumerate(written)
            for j, a in enumerate(group)
        )
        self._ranges = sorted(r for r in ranges if r[0] < r[1])

    def check_unmoved(self) -> None:
        """ValueError where a parameter has other memory than it had when it was handed over."""
        for label, p in zip(self._labels, self._parameters, strict=True):
            if not p.unmoved:
                raise ValueError(f"{label}: has moved in memory; call rebind(params)")

    def check_exclusive(self, inputs: Sequence[tuple[str, Any]], grads: int) -> None:
        """ValueError where gradients that are to be zeroed are read-only or share memory."""
        given = [(label, check_target(label, g)) for label, g in inputs if g is not None]
        if given:
            check_apart([label for label, _ in given], [g for _, g in given])

    def gradient(self, k: int, label: str, g: Any) -> DeviceArray | None:
        """The k-th leaf's gradient in its parameter's layout: itself, or a copy by its library.

        None stays None. Raises TypeError for another kind or dtype, ValueError for another shape or
        device, or for memory that the step writes.
        """
        if g is None:
            return None
        d, dtype = _read(label, g)
        p = self._parameters[k]
        if d.shape != p.shape:
            raise ValueError(
                f"{label}: expected the shape {p.shape} of {self._labels[k]}, got {d.shape}"
            )
        self._check_range(label, d, dtype.itemsize)
        order = _order(d.shape, d.strides, dtype.itemsize)
        if p.order not in order or d.address % dtype.itemsize:
            g = foreign.relaid(g, d.library, p.order)
            if g is None:
                raise ValueError(
                    f"{label}: expected the memory order {p.order} of {self._labels[k]}, got"
                    f" strides {d.strides}; pass a dense copy in that order"
                )
            d, dtype = _read(label, g)
        taken = _device_array(d, dtype, p.order, g)
        if taken.device != p.device:
            raise ValueError(
                f"{label}: is on the device {taken.device}, and {self._labels[k]} on {p.device};"
                " move it there"
            )
        return taken

    def check_apart(self, label: str, g: Any) -> None:
        """TypeError: what is asked for is the values of `Rows`."""
        raise TypeError(f"{label}: Rows are not supported by the backend 'cuda'; {_REMEDY}")

    def _check_range(self, label: str, d: foreign.Description, size: int) -> None:
        if 0 in d.shape:
            return
        strides = d.strides
        if strides is None:
            low, high = d.address, d.address + size * math.prod(d.shape)
        else:
            steps = [(n - 1) * s for n, s in zip(d.shape, strides, strict=True)]
            low = d.address + sum(s for s in steps if s < 0)
            high = d.address + sum(s for s in steps if s > 0) + size
        # Those that the step writes are apart, so only the last that begins before `high` counts.
        at = bisect_left(self._ranges, (high,)) - 1
        if at >= 0 and self._ranges[at][1] > low:
            _, _, k, j = self._ranges[at]
            p = self._labels[k]
            what = p if j == 0 else f"a state of {p}"
            if 0 < j <= self._copies[k]:
                what = "copy_out" + p.removeprefix("params")
            raise ValueError(
                f"{label}: shares memory with {what}, which this step writes; pass a copy"
            )


# ---------------------------------------------------------------- what the optimizer keeps

_REMEDY = "give whole gradients"


def check_options(options: Options, state_path: Any) -> None:
    """ValueError, with the name, for what there is on the host alone."""
    asked = {
        "stats": options.stats,
        "exact": options.exact,
        "verify": options.verify,
        "state_path": state_path is not None,
        "threads": options.threads is not None,
        "rounding": options.rounding != "nearest",
        "master='split16'": options.master == "split16",
    }
    for name, given in asked.items():
        if given:
            raise ValueError(f"{name}: is not supported by the backend 'cuda'; leave it out")


def _supported(format: Format, name: str) -> Format:
    if format.quantized or format is SPLIT16:
        raise ValueError(
            f"state_dtype: {name!r} in {format.name} is not supported by the backend 'cuda'; take"
            " 'float32', 'bfloat16' or 'float16'"
        )
    return format


def allocate(
    storage: Storage,
    rules: Sequence[Rule],
    parameters: Sequence[DeviceArray],
    copies: Sequence[DeviceArray | None],
    around: Around,
) -> list[Memory]:
    """The memory of each leaf: see `Storage.allocate`. All that is new lies in one block."""
    wanted: list[tuple[DeviceArray, Format, float]] = []
    for rule, p in zip(rules, parameters, strict=True):
        own = storage.parameter(p.dtype)
        if own.dtype != p.dtype:
            wanted.append((p, own, 0.0))
        for name in around.states(rule):
            format = storage.state(rule, name, p.dtype, max(p.size, QUANTIZED_FROM))
            wanted.append((p, _supported(format, name), rule.initial(name)))
    fresh = iter(new_arrays(wanted))
    memories = []
    for rule, p, copied in zip(rules, parameters, copies, strict=True):
        own = storage.parameter(p.dtype)
        mirrors = () if copied is None else (copied,)
        master = next(fresh) if own.dtype != p.dtype else None
        states = {name: next(fresh) for name in around.states(rule)}
        if master is not None:
            master.data[...] = p
            memory = Memory(master, states, (p, *mirrors), ("master", master.data))  # type: ignore[arg-type]
        else:
            memory = Memory(stored(p), states, mirrors)  # type: ignore[arg-type]
        if AVERAGE in states:
            states[AVERAGE].data[...] = memory.parameter.data
        memories.append(memory)
    return memories


def stored(a: DeviceArray) -> Stored:
    """An array as it is."""
    data: Any = a
    return DeviceStored(PLAIN[a.dtype.name], data, None, a.shape, a.order)


def new_arrays(wanted: Sequence[tuple[DeviceArray, Format, float]]) -> list[Stored]:
    """New arrays like others, in formats of their own, with these values."""
    from . import toolkit

    if not wanted:
        return []
    sizes = [-(-p.size * f.dtype.itemsize // LINE) * LINE for p, f, _ in wanted]
    first = wanted[0][0]
    with toolkit.on_device(first.device):
        block = toolkit.Memory.new(sum(sizes))
        block.clear(first.stream)
    made = []
    for (p, format, initial), start in zip(wanted, accumulate(sizes, initial=0), strict=False):
        address = block.address + start
        a = p.like(address, format.dtype, block)
        if initial:
            a[...] = initial
        made.append(stored(a))
    return made


def blank(parameters: Sequence[DeviceArray]) -> list[Stored]:
    """New arrays like these, in the types that they are computed in."""
    return new_arrays([(p, PLAIN[compute_dtype(p.dtype).name], 0.0) for p in parameters])


def same(a: DeviceArray, b: DeviceArray) -> bool:
    """Whether two arrays have the same elements, any NaN being like any other."""
    return np.array_equal(a.copy(), b.copy(), equal_nan=True)
