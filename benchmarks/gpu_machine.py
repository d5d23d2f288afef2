"""Where `gpu.py` runs: a CUDA device with PyTorch, or a rehearsal of it on Numba's simulator."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
Step = Callable[[], object]


class Machine(Protocol):
    """What `gpu.py` asks of the place where it runs."""

    name: str

    def array(self, host: np.ndarray, offset: int = 0) -> Any:
        """Return an array of the device with these bits, so many elements behind a boundary."""

    def other(self, host: np.ndarray) -> Any:
        """Return such an array of another library, which has streams of its own."""

    def host(self, array: Any) -> np.ndarray:
        """Return the elements of an array of `array` or `other`, when all work is done."""

    def random(self, shapes: Sequence[tuple[int, ...]], dtype: str) -> list[Any]:
        """Return normally distributed arrays."""

    def copy(self, target: Any, source: Any) -> None:
        """Queue the copy of an array, the measure of bandwidth."""

    def seconds(self, step: Step, rounds: int) -> float:
        """Return the median time that the device takes for a step."""

    def host_seconds(self, step: Step, rounds: int) -> float:
        """Return the median time that the host takes to queue a step for an idle device."""

    def rivals(self, p: list[Any], g: list[Any]) -> Iterator[tuple[str, Step]]:
        """Yield the AdamW of others over the same arrays."""

    def rival(self, rule: str, p: list[Any], g: list[Any]) -> Step | None:
        """Return the fused step of PyTorch for a rule, or None where there is none."""

    def stream(self, library: str) -> contextlib.AbstractContextManager[None]:
        """A context in which "torch" or "cupy" works on a new stream."""

    def delay(self, library: str) -> None:
        """Keep the current stream of a library busy for some milliseconds."""

    def add_one(self, array: Any) -> None:
        """Queue array += 1 on the current stream of its library."""


class Cuda:
    """A CUDA device, by PyTorch, and by CuPy as the other library."""

    def __init__(self) -> None:
        import torch

        self._torch: Any = torch
        self.name = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"

    @property
    def _cupy(self) -> Any:
        import cupy

        return cupy

    def array(self, host: np.ndarray, offset: int = 0) -> Any:
        torch = self._torch
        bits = torch.from_numpy(np.ascontiguousarray(host).view(f"i{host.itemsize}").reshape(-1))
        room = torch.empty(bits.numel() + offset, dtype=bits.dtype, device="cuda")
        room[offset:].copy_(bits)
        return room[offset:].view(getattr(torch, host.dtype.name)).reshape(host.shape)

    def other(self, host: np.ndarray) -> Any:
        return self._cupy.asarray(host)

    def host(self, array: Any) -> np.ndarray:
        torch = self._torch
        torch.cuda.synchronize()
        if not isinstance(array, torch.Tensor):
            return np.asarray(array.get())
        size, name = array.element_size(), str(array.dtype).removeprefix("torch.")
        found = array.view(getattr(torch, f"int{8 * size}")).cpu().numpy()
        return np.asarray(found.view(DTYPES[name]))

    def random(self, shapes: Sequence[tuple[int, ...]], dtype: str) -> list[Any]:
        kind = getattr(self._torch, dtype)
        return [self._torch.randn(shape, device="cuda", dtype=kind) for shape in shapes]

    def copy(self, target: Any, source: Any) -> None:
        target.copy_(source)

    def seconds(self, step: Step, rounds: int) -> float:
        cuda = self._torch.cuda
        for _ in range(3):
            step()
        times = []
        for _ in range(rounds):
            start, end = (cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            times.append(float(start.elapsed_time(end)) / 1e3)
        return statistics.median(times)

    def host_seconds(self, step: Step, rounds: int) -> float:
        times = []
        for _ in range(rounds + 3):
            self._torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        self._torch.cuda.synchronize()
        return statistics.median(times[3:])

    def rivals(self, p: list[Any], g: list[Any]) -> Iterator[tuple[str, Step]]:
        torch = self._torch
        for a, b in zip(p, g, strict=True):
            a.grad = b
        for way in ("fused", "foreach"):
            optimizer = torch.optim.AdamW(p, **{way: True})
            yield f"torch {way}", optimizer.step
            if way == "fused":

                def clipped(optimizer: Any = optimizer) -> None:
                    torch.nn.utils.clip_grad_norm_(p, 1.0)
                    optimizer.step()

                yield "torch fused, clipped", clipped

    def rival(self, rule: str, p: list[Any], g: list[Any]) -> Step | None:
        optim = self._torch.optim
        makers: dict[str, Callable[[], Any]] = {
            "sgd": lambda: optim.SGD(p, lr=1e-3, fused=True),
            "momentum": lambda: optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
            "nesterov": lambda: optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True, fused=True),
            "adam": lambda: optim.Adam(p, fused=True),
            "adamw": lambda: optim.AdamW(p, fused=True),
            "muon": lambda: optim.Muon(p),
        }
        if rule not in makers:
            return None
        for a, b in zip(p, g, strict=True):
            a.grad = b
        step: Step = makers[rule]().step
        return step

    @contextlib.contextmanager
    def stream(self, library: str) -> Iterator[None]:
        module = self._torch if library == "torch" else self._cupy
        if library == "torch":
            with module.cuda.stream(module.cuda.Stream()):
                yield
        else:
            with module.cuda.Stream(non_blocking=True):
                yield

    def delay(self, library: str) -> None:
        torch, cycles = self._torch, 20_000_000
        if library == "torch":
            torch.cuda._sleep(cycles)
            return
        handle = self._cupy.cuda.get_current_stream().ptr
        with torch.cuda.stream(torch.cuda.ExternalStream(handle)):
            torch.cuda._sleep(cycles)

    def add_one(self, array: Any) -> None:
        array += 1


class Rehearsal:
    """Numba's simulator with NumPy's arrays and a clock that goes on by a microsecond a look: what
    it shows is that every line of the script runs."""

    name = "a rehearsal on Numba's simulator; no figure means anything"

    def __init__(self) -> None:
        self._ticks = itertools.count()

    def array(self, host: np.ndarray, offset: int = 0) -> Any:
        room = np.empty(host.size + offset, host.dtype)
        room[offset:] = host.reshape(-1)
        return Simulated(room[offset:].reshape(host.shape))

    def other(self, host: np.ndarray) -> Any:
        return self.array(host)

    def host(self, array: Any) -> np.ndarray:
        return np.array(array.data)

    def random(self, shapes: Sequence[tuple[int, ...]], dtype: str) -> list[Any]:
        rng = np.random.default_rng(0)
        return [self.array(rng.standard_normal(shape).astype(DTYPES[dtype])) for shape in shapes]

    def copy(self, target: Any, source: Any) -> None:
        target.data[...] = source.data

    def seconds(self, step: Step, rounds: int) -> float:
        start = next(self._ticks)
        for _ in range(rounds):
            step()
        return 1e-6 * (next(self._ticks) - start)

    host_seconds = seconds

    def rivals(self, p: list[Any], g: list[Any]) -> Iterator[tuple[str, Step]]:
        for name in ("torch fused", "torch fused, clipped", "torch foreach"):
            yield name, lambda: None

    def rival(self, rule: str, p: list[Any], g: list[Any]) -> Step | None:
        return None if rule == "lion" else lambda: None

    def stream(self, library: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def delay(self, library: str) -> None:
        """Do nothing: the simulator does at once what it is told."""

    def add_one(self, array: Any) -> None:
        array.data[...] += 1


class Simulated:
    """An array of the simulator's device."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.dtype, self.shape = data, data.dtype, data.shape

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        told = {k: v for k, v in self.data.__array_interface__.items() if k != "descr"}
        low = self.dtype == ml_dtypes.bfloat16
        return {**told, "typestr": "<V2" if low else told["typestr"], "version": 3}

    def __getitem__(self, key: Any) -> Simulated:
        return Simulated(self.data[key])


def machine(rehearse: bool) -> Machine | None:
    """Return the place to run, or None, with the reason on stderr."""
    import fusedopt as fo

    reason = fo.info()["backends"]["cuda"]
    if reason != "available":
        print(f"nothing can be measured here: {reason}", file=sys.stderr)
        return None
    if rehearse:
        return Rehearsal()
    try:
        found = Cuda()
    except (ImportError, RuntimeError, AssertionError) as error:
        print(f"nothing can be measured here: PyTorch for CUDA: {error}", file=sys.stderr)
        return None
    return found
