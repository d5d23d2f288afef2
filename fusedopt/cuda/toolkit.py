"""All that is taken from numba-cuda: compiling, launching, memory; and the same on its simulator.

With NUMBA_ENABLE_CUDASIM=1, set before Numba is imported, kernels are run by Python, slowly, and
"device" addresses are addresses of the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import numba_cuda  # noqa: F401  # Numba's own module of that name is another one, and older
import numpy as np
from llvmlite import ir
from numba import cuda
from numba.core.config import ENABLE_CUDASIM

from ..jit.compiler import with_compiled_callees

SIMULATED = bool(ENABLE_CUDASIM)

VECTOR_BYTES = 16
"""What one vector load or store moves."""

OPTIONS = {"opt": 3, "fma": False}
"""Of the compiler. Multiply and add stay two operations, so that the bits are the CPU's; quotients
and roots are IEEE's, and denormals are kept, by default."""

MAX_REGISTERS = {"float32": 64, "float64": 128}
"""Of a thread, by the type of a kernel's arithmetic: with more, too few threads fit for the memory
to be kept busy. A float64 takes two."""

Capability = tuple[int, int]


def unavailable() -> str | None:
    """Why nothing can be run here."""
    if SIMULATED or cuda.is_available():
        return None
    reason = " ".join(str(cuda.cuda_error() or "no CUDA device was found").split())
    return f"no CUDA device can be used ({reason})"


def describe() -> str:
    """The device in use, or the simulator."""
    if SIMULATED:
        return "Numba's CUDA simulator"
    device = cuda.get_current_device()
    name = device.name.decode() if isinstance(device.name, bytes) else device.name
    return f"{name}, compute capability {'.'.join(map(str, device.compute_capability[:2]))}"


# ---------------------------------------------------------------- functions on the device


@functools.cache
def device(function: FunctionType) -> Any:
    """A plain Python function for kernels, and with it the plain functions that it calls."""
    copy = with_compiled_callees(function, device)
    if not SIMULATED:
        return cuda.jit(device=True)(copy)
    # Python's own root refuses negative numbers.
    known = copy.__globals__
    known.update({name: np.sqrt for name, value in known.items() if value is math.sqrt})
    return copy


_WORDS = {32: np.float32, 64: np.float64, 16: np.uint32}
"""What an element of so many bits is in a kernel."""


def loader(bits: int, count: int) -> Any:
    """load(address) -> a tuple of so many elements; those of 16 bits are uint32 codes. Where there
    are several, up to 16 bytes are loaded at a time, and the address is a multiple of that."""
    return _simulated_loader(bits, count) if SIMULATED else _loader(bits, count)


def storer(bits: int, count: int) -> Any:
    """store(address, a tuple of so many elements), as `loader` has them."""
    return _simulated_storer(bits, count) if SIMULATED else _storer(bits, count)


def _simulated_loader(bits: int, count: int) -> Any:
    stored, kind = np.dtype(np.uint16 if bits == 16 else _WORDS[bits]), _WORDS[bits]

    def load(address: int) -> Any:
        raw = ctypes.string_at(int(address), stored.itemsize * count)
        return tuple(kind(x) for x in np.frombuffer(raw, stored))

    return load


def _simulated_storer(bits: int, count: int) -> Any:
    stored = np.dtype(np.uint16 if bits == 16 else _WORDS[bits])

    def store(address: int, elements: Any) -> None:
        ctypes.memmove(int(address), np.array(elements, stored).tobytes(), stored.itemsize * count)

    return store


def _vector(bits: int, count: int) -> tuple[ir.Type, int, int]:
    """What is loaded at a time, how many elements that holds, and in how many words."""
    element = {16: ir.IntType(16), 32: ir.FloatType(), 64: ir.DoubleType()}[bits]
    if count == 1:
        return element, 1, 1
    size = 8 * min(VECTOR_BYTES, bits * count // 8)
    words = size // max(bits, 32)
    element = ir.IntType(32) if bits == 16 else element
    return ir.VectorType(element, words), size // bits, words


def _pointer(builder: Any, address: Any, kind: Any, offset: int) -> Any:
    moved = builder.add(address, ir.Constant(ir.IntType(64), offset))
    return builder.inttoptr(moved, ir.PointerType(kind, 1))  # 1: global memory


@functools.cache
def _loader(bits: int, count: int) -> Any:
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    kind, each, words = _vector(bits, count)
    result = types.UniTuple({16: types.uint32, 32: types.float32, 64: types.float64}[bits], count)
    wide, half = ir.IntType(32), ir.Constant(ir.IntType(32), 16)

    def taken(builder: Any, value: Any) -> Any:
        if count == 1:
            yield builder.zext(value, wide) if bits == 16 else value
            return
        for k in range(words):
            word = builder.extract_element(value, ir.Constant(wide, k))
            if bits == 16:
                yield builder.and_(word, ir.Constant(wide, 0xFFFF))
                yield builder.lshr(word, half)
            else:
                yield word

    @intrinsic
    def load(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            elements = []
            for k in range(count // each):
                pointer = _pointer(builder, values[0], kind, VECTOR_BYTES * k)
                value = builder.load(pointer, align=bits * each // 8)
                elements += taken(builder, value)
            return context.make_tuple(builder, result, elements)

        return result(types.int64), generate

    return load


@functools.cache
def _storer(bits: int, count: int) -> Any:
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    kind, each, _ = _vector(bits, count)
    given = types.UniTuple({16: types.uint32, 32: types.float32, 64: types.float64}[bits], count)
    wide, half = ir.IntType(32), ir.Constant(ir.IntType(32), 16)

    def packed(builder: Any, elements: Any) -> Any:
        if count == 1:
            return builder.trunc(elements[0], kind) if bits == 16 else elements[0]
        if bits == 16:
            pairs = zip(elements[::2], elements[1::2], strict=True)
            elements = [builder.or_(low, builder.shl(high, half)) for low, high in pairs]
        value = ir.Constant(kind, ir.Undefined)
        for k, element in enumerate(elements):
            value = builder.insert_element(value, element, ir.Constant(wide, k))
        return value

    @intrinsic
    def store(typing: Any, address: Any, elements: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            all_ = [builder.extract_value(values[1], k) for k in range(count)]
            for k in range(count // each):
                value = packed(builder, all_[k * each : (k + 1) * each])
                pointer = _pointer(builder, values[0], kind, VECTOR_BYTES * k)
                builder.store(value, pointer, align=bits * each // 8)
            return context.get_dummy_value()

        return types.void(types.int64, given), generate

    return store


@functools.cache
def word_loader() -> Any:
    """load(address) -> the int64 there."""
    if SIMULATED:
        return lambda address: ctypes.c_int64.from_address(int(address)).value
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    @intrinsic
    def load(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.load(_pointer(builder, values[0], ir.IntType(64), 0), align=8)

        return types.int64(types.int64), generate

    return load


# ---------------------------------------------------------------- kernels


class Kernel:
    """The function `kernel` that `source` defines.

    words: so many int64 are its leading arguments. scalars: so many of dtype are the rest.
    namespace: constants, and plain functions, which are compiled too. Compiled at the first launch.
    """

    def __init__(
        self, source: str, words: int, scalars: int, dtype: np.dtype, namespace: Mapping[str, Any]
    ) -> None:
        globals_: dict[str, Any] = {
            "__name__": __name__,
            "cuda": cuda,
            **{k: device(v) if isinstance(v, FunctionType) else v for k, v in namespace.items()},
        }
        exec(compile(source, "<fusedopt.cuda>", "exec"), globals_)
        self._function = globals_["kernel"]
        self._arguments = ", ".join(["int64"] * words + [dtype.name] * scalars)
        self._registers = MAX_REGISTERS[dtype.name]
        self._bound: dict[tuple[int, int], Any] = {}
        self._library: Any = None

    def ptx(self, capability: Capability) -> str:
        """The assembly for a compute capability; needs no device."""
        text: str = self._compiled(capability).get_asm_str(cc=capability)
        return text

    def _compiled(self, capability: Capability) -> Any:
        """Numba's intermediate code, which is the same for all capabilities."""
        if self._library is None:
            # What `cuda.jit` does, whose options do not reach the compiler.
            from numba.cuda import types
            from numba.cuda.compiler import compile_cuda, kernel_fixup
            from numba.cuda.core.sigutils import normalize_signature

            arguments, _ = normalize_signature(f"void({self._arguments})")
            with _compiling_for(capability):
                result = compile_cuda(
                    self._function,
                    types.void,
                    arguments,
                    nvvm_options=dict(OPTIONS),
                    cc=capability,
                    max_registers=self._registers,
                )
            name = result.fndesc.llvm_func_name
            result.library._entry_name = name
            kernel_fixup(result.library.get_function(name), False)
            self._library = result.library
        return self._library

    def launch(
        self, blocks: int, threads: int, stream: int, words: Sequence[int], scalars: Any
    ) -> None:
        """Queues so many blocks on a stream of the current device.

        words: the leading arguments, int64. scalars: the rest, an array of the kernel's type.
        """
        if SIMULATED:
            cuda.jit(self._function)[blocks, threads](*words, *scalars)
            return
        from cuda.core import LaunchConfig, Stream, launch

        number = cuda.current_context().device.id
        if (number, stream) not in self._bound:
            capability = tuple(cuda.get_current_device().compute_capability[:2])
            function = self._compiled(capability).get_cufunc()
            self._bound[number, stream] = function.kernel, Stream.from_handle(stream)
        kernel, queue = self._bound[number, stream]
        kind = ctypes.c_float if scalars.dtype == np.float32 else ctypes.c_double
        values = [*map(ctypes.c_int64, words), *map(kind, scalars.tolist())]
        launch(queue, LaunchConfig(grid=blocks, block=threads), kernel, *values)


@contextlib.contextmanager
def _compiling_for(capability: Capability) -> Iterator[None]:
    """Numba compiles the functions that a kernel calls for the current device; here for another
    one, which need not be there."""
    from numba.cuda import dispatcher
    from numba.cuda.core.compiler_lock import global_compiler_lock

    with global_compiler_lock:
        original = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
        try:
            yield
        finally:
            dispatcher.get_current_device = original


# ---------------------------------------------------------------- memory


class Memory:
    """Bytes on the current device. owner: what keeps them alive."""

    def __init__(self, address: int, size: int, owner: Any) -> None:
        self.address, self.size, self.owner = address, size, owner
        self._data: Any = None

    @classmethod
    def new(cls, size: int) -> Memory:
        """Bytes that nothing was written to, on a 256-byte boundary."""
        if not SIMULATED:
            array = cuda.device_array(max(size, 1), np.uint8)
            return cls(array.__cuda_array_interface__["data"][0], size, array)
        block = np.empty(size + 256, np.uint8)
        start = block.__array_interface__["data"][0]
        return cls(start + -start % 256, size, block)

    def _view(self) -> Any:
        if SIMULATED:
            return simulated_view(self.address, np.dtype(np.uint8), self.size)
        interface = {"shape": (self.size,), "typestr": "|u1", "data": (self.address, False)}
        return cuda.from_cuda_array_interface({**interface, "version": 2}, self.owner)

    def clear(self, stream: int) -> None:
        """Sets all bytes to zero."""
        if not self.size:
            return
        if SIMULATED:
            self._view()[:] = 0
            return
        from numba.cuda.cudadrv.driver import device_memset

        device_memset(self._view().gpu_data, 0, self.size, stream=cuda.external_stream(stream))

    def read(self, stream: int) -> np.ndarray:
        """The bytes, after all that was queued on the stream: a copy on the host."""
        if not self.size:
            return np.empty(0, np.uint8)
        if SIMULATED:
            return np.array(self._view())
        queue = cuda.external_stream(stream)
        host = self._view().copy_to_host(stream=queue)
        queue.synchronize()
        return np.asarray(host)

    def write(self, data: np.ndarray, stream: int, *, wait: bool = True) -> None:
        """Puts bytes of the host there, behind all that was queued on the stream.

        wait: until that is done; otherwise `data` must not change as long as this object lives.
        """
        if not self.size:
            return
        if SIMULATED:
            self._view()[:] = data.reshape(-1).view(np.uint8)
            return
        queue = cuda.external_stream(stream)
        self._view().copy_to_device(data.reshape(-1).view(np.uint8), stream=queue)
        if wait:
            queue.synchronize()
        else:
            self._data = data

    def take(self, other: Memory, stream: int) -> None:
        """Copies as many bytes of the same device."""
        if not self.size:
            return
        if SIMULATED:
            self._view()[:] = other._view()
            return
        self._view().copy_to_device(other._view(), stream=cuda.external_stream(stream))


def simulated_view(address: int, dtype: np.dtype, size: int) -> np.ndarray:
    """So many elements at an address of the simulator, flat."""
    kind = ctypes.c_uint8 * (size * dtype.itemsize)
    return np.ctypeslib.as_array(kind.from_address(address)).view(dtype)


def on_device(number: int) -> Any:
    """A context in which a device is the current one."""
    return contextlib.nullcontext() if SIMULATED else cuda.gpus[number]


def current_device() -> int:
    """The number of the device in use."""
    return 0 if SIMULATED else int(cuda.current_context().device.id)


def wait_for(stream: int, other: int) -> None:
    """Makes a stream wait for what was queued on another one."""
    if SIMULATED or stream == other:
        return
    event = cuda.event(timing=False)
    event.record(cuda.external_stream(other))
    event.wait(cuda.external_stream(stream))
