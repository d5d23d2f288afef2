"""Compiling and launching by numba-cuda, or on its simulator.

This module, `vectors` and `buffers` are all that know numba-cuda.

With NUMBA_ENABLE_CUDASIM=1, set before Numba is imported, kernels are run by Python, slowly, and
"device" addresses are addresses of the host.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from struct import Struct
from types import FunctionType, SimpleNamespace
from typing import Any

import numba_cuda  # noqa: F401  # Numba's own module of that name is another one, and older
import numpy as np
from numba import cuda
from numba.core.config import ENABLE_CUDASIM

from ...jit.compiler import with_compiled_callees

SIMULATED = bool(ENABLE_CUDASIM)

OPTIONS = {"opt": 3, "fma": False}
"""Options of the compiler. Multiply and add stay two operations, so that the bits are the CPU's;
quotients and roots are IEEE's, and denormals are kept, by default."""

MAX_REGISTERS = {"float32": 64, "float64": 128}
"""Registers of a thread, by the dtype of a kernel's arithmetic; a float64 takes two. With more, too
few threads fit for the memory to be kept busy."""

MORE_REGISTERS = {"float32": 112, "float64": 168}
"""Registers of a thread where all its elements wait for the scales of their blocks, or are rounded
at random, or belong to many arrays: the numbers are then those without spilling to memory."""

if SIMULATED:
    from numba.cuda.simulator import kernelapi

    class _SharedArrays(kernelapi.FakeCUDAShared):  # type: ignore[misc]
        """Shared arrays on the simulator, one for all threads of a block.

        The simulator's own looks for an array and then makes one: threads that look at once get an
        array each, and what they write is lost.
        """

        def array(self, shape: Any, dtype: Any, *more: Any) -> Any:
            """Return the array of this line of the calling thread's block, at first all ones in
            every bit, which is NaN for floats."""
            if shape == 0:
                return super().array(shape, dtype, *more)
            caller, thread = sys._getframe(1), threading.current_thread()
            made = np.empty(shape, dtype)
            made.view(np.uint8)[...] = 255
            key = thread._manager, caller.f_code, caller.f_lineno  # type: ignore[attr-defined]
            return self._allocations.setdefault(key, made)

    kernelapi.FakeCUDAShared = _SharedArrays

Capability = tuple[int, int]


def unavailable() -> str | None:
    """Return why nothing can be run here."""
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


class Kernel:
    """The function `kernel` that `source` defines.

    words: the number of its leading arguments, int64. scalars: that of the rest, of dtype.
    namespace: constants, and plain functions, which are compiled too. registers: of a thread at
    most, by the type of the arithmetic. Compiled at the first launch.
    """

    def __init__(
        self,
        source: str,
        words: int,
        scalars: int,
        dtype: np.dtype,
        namespace: Mapping[str, Any],
        registers: Mapping[str, int] = MAX_REGISTERS,
    ) -> None:
        globals_: dict[str, Any] = {
            "__name__": __name__,
            "cuda": cuda,
            **{k: device(v) if isinstance(v, FunctionType) else v for k, v in namespace.items()},
        }
        exec(compile(source, "<fusedopt.backends.cuda>", "exec"), globals_)
        self._function = globals_["kernel"]
        self._arguments = ", ".join(["int64"] * words + [dtype.name] * scalars)
        self.registers = registers[dtype.name]
        self._count = scalars
        self._words, self._scalars = words, dtype
        self._bound: dict[int, int] = {}
        self._library: Any = None
        self._arguments_of = threading.local()

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
                    max_registers=self.registers,
                )
            name = result.fndesc.llvm_func_name
            result.library._entry_name = name
            kernel_fixup(result.library.get_function(name), False)
            self._library = result.library
        return self._library

    def launch(
        self,
        blocks: int,
        threads: int,
        queue: tuple[int, int],
        words: Sequence[int],
        scalars: Sequence[float] = (),
    ) -> None:
        """Queue a number of blocks.

        queue: the current device and a stream of it. words: the leading arguments, int64. scalars:
        the rest, which are cast to the kernel's type.
        """
        if SIMULATED:
            with np.errstate(under="ignore"):
                values = np.array(scalars, np.float64).astype(self._scalars)
            cuda.jit(self._function)[blocks, threads](*words, *values)
            return
        number, stream = queue
        kernel = self._bound.get(number) or self._bind(number)
        try:
            arguments = self._arguments_of.thread
        except AttributeError:
            arguments = self._arguments_of.thread = Arguments(
                self._words, self._count, self._scalars
            )
        arguments.put(*words, *scalars)
        # The driver's own call, which copies the arguments. That of cuda.core would make objects of
        # the stream, of the grid and of every argument first.
        call("cuLaunchKernel", kernel, blocks, 1, 1, threads, 1, 1, 0, stream, arguments.address, 0)

    def prepare(self, number: int) -> None:
        """Compile and load for the current device what `launch` would at first."""
        if not SIMULATED and number not in self._bound:
            self._bind(number)

    def _bind(self, number: int) -> int:
        """Compile the kernel for the current device, load it, and return its handle."""
        capability = tuple(cuda.get_current_device().compute_capability[:2])
        self._bound[number] = int(self._compiled(capability).get_cufunc().handle)
        return self._bound[number]


class Arguments:
    """The arguments of a kernel, where the driver reads them at a launch."""

    def __init__(self, words: int, scalars: int, dtype: np.dtype) -> None:
        form = Struct(f"={words}q{scalars}{dtype.char}")
        values: Any = np.zeros(form.size, np.uint8)
        self.put = partial(form.pack_into, values, 0)  # rounds to the nearest, and nothing warns
        starts = [8 * k for k in range(words)]
        starts += [8 * words + dtype.itemsize * k for k in range(scalars)]
        self._pointers = values.ctypes.data + np.array(starts, np.uint64)
        self.address = int(self._pointers.ctypes.data)


@functools.cache
def driver() -> Any:
    """Return the driver's functions."""
    from cuda.bindings import driver

    return driver


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the driver, and return its result; RuntimeError where it fails."""
    error, *results = getattr(driver(), name)(*arguments)
    if error:
        raise RuntimeError(f"{name} failed: {error!r}")
    return results[0] if results else None


def current_context() -> int:
    """Return the handle of the calling thread's context, 0 where there is none."""
    return int(call("cuCtxGetCurrent"))


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
