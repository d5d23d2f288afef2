"""Order between streams on Numba's simulator: `test_cuda.py` runs this in another process.

Whatever a step reads or writes, and whichever library it comes from, the stream of the step waits
for the stream of that array before the first kernel, and that stream for the step after the last.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from devices import OnDevice, Tensor
from exactness import Array
from fusedopt.backends.cuda import launching, plan, toolkit
from fusedopt.backends.cuda.buffers import Memory
from fusedopt.backends.cuda.matmul import Library

TORCH, CUPY, NAMED = 7, 8, 5


class CupyArray(OnDevice):
    """An array of CuPy's, as far as it is looked at."""


CupyArray.__module__ = "cupy"


class Streams:
    """The streams that libraries work on, and what was queued on which stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.torch, self.cupy = TORCH, CUPY
        self.events: list[tuple[int, ...]] = []
        torch = SimpleNamespace(
            current_stream=lambda device: SimpleNamespace(cuda_stream=self.torch)
        )
        cupy = SimpleNamespace(get_current_stream=lambda device: SimpleNamespace(ptr=self.cupy))
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=torch))
        monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cupy))
        launch = toolkit.Kernel.launch

        def launched(kernel: Any, blocks: int, threads: int, queue: Any, *rest: Any) -> None:
            self.events.append((queue[1],))
            launch(kernel, blocks, threads, queue, *rest)

        def waited(stream: int, other: int) -> None:
            if stream != other:
                self.events.append((stream, other))

        monkeypatch.setattr(toolkit.Kernel, "launch", launched)
        for module in (plan, launching):
            monkeypatch.setattr(module, "wait_for", waited)

    def check(self, stream: int, others: set[int]) -> None:
        """Assert that all kernels ran on one stream, with one wait for each of the others before
        the first and one by each of the others after the last, and forget the events."""
        launched = [k for k, event in enumerate(self.events) if len(event) == 1]
        assert {self.events[k] for k in launched} == {(stream,)}
        before, after = self.events[: launched[0]], self.events[launched[-1] + 1 :]
        assert sorted(before) == sorted((stream, other) for other in others)
        assert sorted(after) == sorted((other, stream) for other in others)
        assert len(before) + len(launched) + len(after) == len(self.events)
        self.events.clear()


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    return Streams(monkeypatch)


PRODUCERS: dict[str, tuple[Callable[[Array], Any], int]] = {
    "torch": (Tensor, TORCH),
    "cupy": (CupyArray, CUPY),
    "named": (lambda a: OnDevice(a, stream=NAMED), NAMED),
    "unnamed": (OnDevice, 0),
}
"""How to make an array of each producer, and the stream that it works on."""


def ones(producer: str) -> Any:
    return PRODUCERS[producer][0](np.ones(40, np.float32))


@pytest.mark.parametrize(
    "producers", itertools.product(PRODUCERS, repeat=4), ids=lambda names: "-".join(names)
)
def test_every_array_of_a_step_is_fenced(streams: Streams, producers: tuple[str, ...]) -> None:
    p, q, g, copy = producers
    rule = fo.Sophia(lr=0.1, rho=1.0)
    optimizer = fo.Optimizer([ones(p), ones(q)], rule, copy_out=[ones(copy), None])
    streams.events.clear()
    grads = [ones(g), ones(g)]
    stream, *others = (PRODUCERS[name][1] for name in producers)
    for hessian, more in ((None, set()), ([ones("torch"), None], {TORCH}), (None, set())):
        optimizer.step(grads, hessian=hessian)
        streams.check(stream, ({*others} | more) - {stream})


@pytest.mark.parametrize(
    "rule", [fo.Muon(), fo.NorMuon(), fo.AdaMuon(), fo.SOAP()], ids=lambda rule: rule.name
)
def test_products_are_on_the_stream_of_their_step(
    rule: fo.Rule, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, read = [], []
    on_stream, whole = Library.on_stream, Memory.read

    def watched(library: Any, stream: int, device: int) -> Any:
        used.append(stream)
        return on_stream(library, stream, device)

    def reading(memory: Any, stream: int) -> Any:
        read.append(stream)
        return whole(memory, stream)

    monkeypatch.setattr(Library, "on_stream", watched)
    monkeypatch.setattr(Memory, "read", reading)
    p, g, copy = (
        PRODUCERS[name][0](np.ones((4, 5), np.float32)) for name in ("torch", "named", "cupy")
    )
    optimizer = fo.Optimizer([p], rule, copy_out=[copy])
    streams.events.clear()
    for stream, before in ((TORCH, set()), (TORCH, set()), (17, {TORCH})):
        streams.torch = stream
        optimizer.step([g])
        streams.check(stream, {NAMED, CUPY} | before)
    assert used == [TORCH, TORCH, 17]
    assert set(read) <= {TORCH}  # SOAP's second step finds its bases
    assert bool(read) == (rule.name == "soap")


@pytest.mark.parametrize("wait", [True, False])
def test_the_gradients_are_fenced_before_their_norm(streams: Streams, wait: bool) -> None:
    optimizer = fo.Optimizer([ones("named")], fo.AdamW(), clip_norm=1.0, wait=wait)
    streams.events.clear()
    optimizer.step([ones("torch")])
    streams.check(NAMED, {TORCH})


def test_a_step_on_another_stream_waits_for_the_states(streams: Streams) -> None:
    optimizer = fo.Optimizer([ones("torch")], fo.AdamW())
    streams.events.clear()
    optimizer.step([ones("torch")])
    streams.check(TORCH, set())
    streams.torch = 17
    optimizer.step([ones("torch")])
    streams.check(17, {TORCH})
    optimizer.step([ones("torch")])
    streams.check(17, set())


def test_sums_of_micro_batches_are_fenced(streams: Streams) -> None:
    optimizer = fo.Optimizer([ones("torch")], fo.AdamW())
    streams.events.clear()
    optimizer.accumulate([ones("named")])
    streams.check(TORCH, {NAMED})
    streams.torch = 17
    optimizer.step()
    streams.check(17, {TORCH})


def test_what_is_told_names_the_stream_of_its_step(streams: Streams) -> None:
    optimizer = fo.Optimizer([ones("torch")], fo.AdamW(), clip_norm=1.0, wait=False)
    info = optimizer.step([ones("torch")])
    streams.torch = 17
    for told in (info.grad_norm, info.clip_scale):
        assert told.stream == TORCH  # type: ignore[union-attr]
        assert told.__cuda_array_interface__["stream"] == TORCH  # type: ignore[union-attr]
    state = optimizer.state["0"]["m"]
    assert state.stream == TORCH
    optimizer.step([ones("torch")])
    assert state.stream == 17


def test_what_is_told_is_read_on_the_stream_of_its_step(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = fo.Optimizer([ones("torch")], fo.AdamW(), clip_norm=1.0, wait=False)
    info = optimizer.step([ones("torch")])
    streams.torch = 17
    read, found = Memory.read, []

    def watched(memory: Any, stream: int) -> Any:
        found.append(stream)
        return read(memory, stream)

    monkeypatch.setattr(Memory, "read", watched)
    assert float(info.grad_norm) == np.float32(40) ** 0.5  # type: ignore[arg-type]
    assert found == [TORCH]


def test_an_assignment_is_fenced(streams: Streams) -> None:
    optimizer = fo.Optimizer([ones("named")], fo.AdamW())
    state = optimizer.state["0"]["m"]
    source = fo.Optimizer([ones("cupy")], fo.AdamW()).state["0"]["v"]
    streams.events.clear()
    state[...] = source
    streams.check(NAMED, {CUPY})


def test_a_norm_waits_for_every_stream(streams: Streams) -> None:
    fo.global_norm([ones(name) for name in PRODUCERS])
    before = [event for event in streams.events if len(event) == 2]
    assert sorted(before) == sorted((TORCH, other) for other in (CUPY, NAMED, 0))
