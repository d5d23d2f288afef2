"""The backend "cuda" on a GPU: verified and timed in one command of a few minutes.

    python benchmarks/gpu.py [PART ...] [--elements 1000000000] [--rounds 21] [--seconds 300]
                             [--output FILE]

The parts, all of them where none is named:

bits       every rule on the device and on the CPU: bits are compared (of Muon and the other rules
           for matrices the values), for awkward sizes, arrays that are not on a 16-byte boundary,
           1000 small tensors, more than 2^31 bytes
streams    a step waits for all streams that write its arrays, and they for it
bandwidth  every rule over one large tensor, as a share of the bandwidth of a copy, and PyTorch's
           fused step beside it
formats    AdamW in every storage format over one large tensor, likewise
matrices   Muon and its kin over the matrices of GPT-2 small, and PyTorch's Muon beside it
lists      AdamW over GPT-2 small and over 1000 small tensors: the device's time and the host's
clipping   the same with gradients that are clipped, and with `wait=False`
cores      the host's own step, with 1 to all cores

Needs a CUDA device and PyTorch, and CuPy for `streams`. Every line is printed as it is measured,
and written to FILE as a line of JSON, so that a run that is stopped keeps what it had.
`--rehearse`, with NUMBA_ENABLE_CUDASIM=1, runs all of it on Numba's simulator in small sizes.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import fusedopt as fo
from fusedopt.lab.bench.formats import WAYS
from fusedopt.lab.bench.problems import gpt2_small
from gpu_machine import DTYPES, Machine, Step, machine
from targets import Row

SHARE_OF_COPY = 0.92
"""The target for 10^9 elements, of rules in float32, and in bfloat16 throughout."""

HOST_SECONDS = 20e-6
"""The target for the host's time to queue a step of 1000 tensors."""

RULES = {name: cls for name, cls in fo.RULES.items() if not cls().host_only}
"""The rules that the backend has."""

Lines = Iterator[Row]


@dataclass(frozen=True)
class Sizes:
    """How much is measured. processes: compile kernels for `bits`, each its share of the rules."""

    elements: int = 10**9
    large: int = 2**29 + 5
    small: int = 1000
    rounds: int = 21
    processes: int = 12
    raced: int = 1 << 16
    awkward: tuple[tuple[int, ...], ...] = ((257, 129), (1, 5), (64, 1024), (0, 3), (2, 8191))
    square: tuple[tuple[int, ...], ...] = ((129, 129), (64, 64), (0, 0))
    rehearse: bool = False

    @property
    def lists(self) -> dict[str, list[tuple[int, ...]]]:
        """Shapes of the tensors of whole models."""
        many: list[tuple[int, ...]] = [(self.small,)] * self.small
        gpt2: list[tuple[int, ...]] = list(gpt2_small().values())
        return {f"{self.small} of {self.small}": many} | (
            {} if self.rehearse else {"GPT-2 small": gpt2}
        )


# ---------------------------------------------------------------- bits


def difference(place: Machine, here: list[Any], there: list[Any], cpu: Any, gpu: Any) -> float:
    """The largest difference of two optimizers' parameters; infinite where only states differ."""
    if cpu.fingerprint() == gpu.fingerprint():
        return 0.0
    found = [place.host(t).astype(np.float64) for t in there]
    pairs = zip(here, found, strict=True)
    worst = max(
        (float(np.max(np.abs(a.astype(np.float64) - b))) for a, b in pairs if a.size), default=0.0
    )
    return worst or float("inf")


def compare(
    place: Machine,
    rule: fo.Rule,
    dtype: str,
    shapes: Sequence[tuple[int, ...]],
    *,
    offset: int = 0,
    steps: int = 3,
    **options: Any,
) -> float:
    """The difference between device and CPU after some steps; NaN counts as one."""
    rng = np.random.default_rng(0)
    draw = [rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes]
    here = [np.array(a) for a in draw]
    there = [place.array(a, offset) for a in draw]
    host_options = {k: v for k, v in options.items() if k != "wait"}
    cpu, gpu = fo.Optimizer(here, rule, **host_options), fo.Optimizer(there, rule, **options)
    for _ in range(steps):
        grads = [rng.standard_normal(a.shape).astype(a.dtype) for a in here]
        moved = [place.array(g, offset) for g in grads]
        second = rule.takes_hessian
        cpu.step(grads, hessian=grads if second else None)
        gpu.step(moved, hessian=moved if second else None)
    return difference(place, here, there, cpu, gpu)


def of_rule(name: str, sizes: Sizes) -> tuple[str, int, list[str]]:
    """How many cases of a rule were compared, and which of them differ; in a process of its own."""
    place = machine(sizes.rehearse)
    assert place is not None
    count, wrong = 0, []
    dtypes = list(DTYPES)[:1] if sizes.rehearse else list(DTYPES)
    for example, dtype in product(RULES[name].examples, dtypes):
        rule = RULES[name](**{"weight_decay": 0.1, **example})
        # Where the first gradient has not the full rank, SOAP's basis is LAPACK's choice.
        shapes = sizes.square if isinstance(rule, fo.SOAP) else sizes.awkward
        allowed = 0.0 if rule.program.phases == 1 else 0.05
        ways: list[dict[str, Any]] = [{"offset": 1}, {"clip_norm": 1.0}]
        if dtype == "float32":
            ways += [{"offset": 3}, {"clip_norm": 1.0, "wait": False}]
        for way in ways:
            count += 1
            found = compare(place, rule, dtype, shapes, **way)
            if not found <= allowed:
                wrong.append(f"{rule} in {dtype}, {way}: differs by up to {found}")
    return name, count, wrong


def of_formats(place: Machine, sizes: Sizes) -> Iterator[tuple[str, float]]:
    """Differences for many tensors, for one of more than 2^31 bytes, and for mixed formats."""
    rule = fo.AdamW(lr=0.01, weight_decay=0.1)
    many = [(sizes.small,)] * sizes.small
    yield f"{sizes.small} tensors of {sizes.small}", compare(place, rule, "float32", many)
    ways: tuple[tuple[str, dict[str, Any]], ...] = (
        ("bfloat16", {"master": "float32"}),
        ("float32", {"state_dtype": "bfloat16"}),
        ("float16", {"state_dtype": "float16", "ema": 0.9}),
        ("float32", {"clip_value": 0.5, "zero_grads": True}),
        *(("float32", {"state_dtype": name}) for name in ("float8", "dynamic8", "dynamic4")),
        ("float32", {"state_dtype": "float8", "rounding": "stochastic"}),
        ("bfloat16", {"master": "split16"}),
        ("bfloat16", {"rounding": "kahan"}),
        ("bfloat16", {"rounding": "stochastic", "state_dtype": "bfloat16"}),
        ("float32", {"stats": True, "clip_norm": 1.0}),
    )
    for dtype, options in ways:
        yield f"{dtype}, {options}", compare(place, rule, dtype, sizes.awkward, **options)
    yield "rows of a table", of_rows(place, sizes)
    large = [(sizes.large,)]
    yield f"{sizes.large} elements", compare(place, rule, "float32", large, steps=1)


def of_rows(place: Machine, sizes: Sizes) -> float:
    """The difference after three steps with gradients of some rows, of which some come twice."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((sizes.small, 8), np.float32)
    here, there = np.array(table), place.array(table)
    cpu, gpu = (fo.Optimizer(p, fo.AdamW(weight_decay=0.1)) for p in (here, there))
    for _ in range(3):
        indices = rng.integers(0, sizes.small, 2 * sizes.small)
        values = rng.standard_normal((indices.size, 8), np.float32)
        cpu.step(fo.Rows(indices, values))
        gpu.step(fo.Rows(indices, place.array(values)))
    return difference(place, [here], [there], cpu, gpu)


def bits(place: Machine, sizes: Sizes) -> Lines:
    """Compare every rule on the device with the CPU."""
    count = min(sizes.processes, len(RULES))
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))
    asked = [pool.submit(of_rule, name, sizes) for name in RULES]
    try:
        for done in as_completed(asked):
            name, cases, wrong = done.result()
            for line in wrong:
                print(line, flush=True)
            yield Row(f"{name}: of {cases} cases differ", len(wrong), 0, {}, False, "cases")
    finally:
        pool.shutdown(cancel_futures=True)
    for what, found in of_formats(place, sizes):
        yield Row(f"AdamW, {what}: largest difference", found, 0.0, {}, False, "")
    yield Row("a NaN changes nothing", float(what_a_nan_changes(place)), 0, {}, False, "")


def what_a_nan_changes(place: Machine) -> bool:
    """Whether a step that does not wait, and found NaN, changed anything, or was not told of."""
    ones = np.ones(1000, np.float32)
    p, good, bad = place.array(ones), place.array(ones), place.array(ones * np.float32("nan"))
    optimizer = fo.Optimizer(p, fo.AdamW(), clip_norm=1.0, wait=False)
    optimizer.step(good)
    before = optimizer.fingerprint()
    try:
        for g in (bad, good, good):
            optimizer.step(g)
        optimizer.synchronize()
    except FloatingPointError:
        return optimizer.fingerprint() != before
    return True


# ---------------------------------------------------------------- streams


def races(place: Machine, library: str, role: str, n: int) -> bool:
    """Whether a step is in order with a stream of another library that is kept busy.

    The other library's array is changed behind a delay just before a step on PyTorch's stream, and
    once more right after it, by which time the step itself is behind a delay.
    """
    make = place.array if library == "torch" else place.other
    plain = [np.full(n, value, np.float32) for value in (1.0, 2.0, 3.0)]
    p, q, g, h = (place.array(a) for a in (*plain, plain[2]))
    copy = place.array(np.zeros(n, np.float32))
    other = make(plain[1] if role == "parameter" else plain[2])
    if role == "parameter":
        q = other
    elif role == "gradient":
        h = other
    else:
        copy = other
    with ExitStack() as inside:
        inside.enter_context(place.stream("torch"))
        optimizer = fo.Optimizer([p, q], fo.SGD(lr=1.0), copy_out=[None, copy])
        optimizer.step([g, h])  # compiled
        place.host(p)
        if library != "torch":
            inside.enter_context(place.stream(library))
        place.delay(library)
        place.add_one(other)
        place.delay("torch")
        optimizer.step([g, h])
        place.add_one(other)
        found = [place.host(a) for a in (p, q, copy, h)]
    plus = {"parameter": (1, 0), "gradient": (0, 1), "copy": (0, 0)}[role]
    # Two steps from 2 with gradients of 3; the second sees what was added before it.
    q_after = 2 - 3 + plus[0] - 3 - plus[1]
    want = [1 - 6, q_after, q_after, 3]
    want[{"parameter": 1, "gradient": 3, "copy": 2}[role]] += 1 + (role == "gradient")
    return all(bool((a == value).all()) for a, value in zip(found, want, strict=True))


def told_in_order(place: Machine, n: int) -> bool:
    """Whether the norm of a step that does not wait is read on that step's stream."""
    p, g = (place.array(np.ones(n, np.float32)) for _ in range(2))
    optimizer = fo.Optimizer(p, fo.SGD(), clip_norm=1.0, wait=False)
    with place.stream("torch"):
        optimizer.step(g)
        place.host(p)
        place.delay("torch")
        info = optimizer.step(g)
    with place.stream("torch"):
        norm: Any = info.grad_norm
        return float(norm) ** 2 == n


def streams(place: Machine, sizes: Sizes) -> Lines:
    """Provoke races between streams, five times each."""
    for library, role in product(("torch", "cupy"), ("parameter", "gradient", "copy")):
        wrong = sum(not races(place, library, role, sizes.raced) for _ in range(5))
        yield Row(f"{role} of {library}: runs out of order", wrong, 0, {}, False, "of 5")
    wrong = sum(not told_in_order(place, sizes.raced) for _ in range(5))
    yield Row("a norm read on another stream: runs out of order", wrong, 0, {}, False, "of 5")


# ---------------------------------------------------------------- timed


def arrays_moved(rule: fo.Rule) -> int:
    """How many arrays a step reads and how many it writes, together."""
    from fusedopt.backends.cuda import kernels  # 0.7 s, and not everywhere

    operations = kernels.operations_of(rule.program, 0, refreshed=False)
    steps = [kernels.Step.of(rule.program, op) for op in operations]
    read = {name for step in steps for name in step.operands}
    return len(read) + len({name for step in steps for name in step.written})


def ours(p: list[Any], g: Any, rule: fo.Rule, **options: Any) -> Step:
    """Return a function that takes a step."""
    optimizer = fo.Optimizer(p, rule, **options)
    return lambda: optimizer.step(g)


def copied(place: Machine, target: Any, source: Any, rounds: int) -> float:
    """The time of a copy, the measure of bandwidth."""
    return place.seconds(lambda: place.copy(target, source), rounds)


def bandwidth(place: Machine, sizes: Sizes) -> Lines:
    """Every rule over one large tensor, as a share of a copy's bandwidth."""
    for dtype in ("float32", "bfloat16"):
        width = np.dtype(DTYPES[dtype]).itemsize
        (p,), (g,) = (place.random([(sizes.elements,)], dtype) for _ in range(2))
        whole = copied(place, p, g, sizes.rounds)
        rate = 2 * sizes.elements * width / whole
        for name, cls in RULES.items():
            rule = cls()
            if rule.program.phases > 1:
                continue
            step = ours([p], [g], rule, state_dtype=dtype)
            medians = {"fusedopt": place.seconds(step, sizes.rounds), "copy": whole}
            rival = place.rival(name, [p], [g])
            if rival is not None:
                medians["torch fused"] = place.seconds(rival, sizes.rounds)
            share = arrays_moved(rule) * sizes.elements * width / medians["fusedopt"] / rate
            what = (
                f"{name}, {sizes.elements:.0e} in {dtype}: share of copy ({rate / 1e12:.2f} TB/s)"
            )
            yield Row(what, share, SHARE_OF_COPY, medians)
            if rival is not None:
                faster = medians["torch fused"] / medians["fusedopt"]
                yield Row(f"{name} in {dtype}: times as fast as torch fused", faster, 1.0, medians)
            del step, rival
            gc.collect()  # of states that are some gigabytes


def formats(place: Machine, sizes: Sizes) -> Lines:
    """AdamW in every storage format, as a share of a copy's bandwidth."""
    shape = [(sizes.elements,)]
    target, source = place.random(shape * 2, "float32")
    rate = 8 * sizes.elements / copied(place, target, source, sizes.rounds)
    del target, source
    for name, way in WAYS.items():
        (p,), (g,) = (
            place.random(shape, np.dtype(dtype).name) for dtype in (way.parameter, way.gradient)
        )
        copies = place.random(shape, "bfloat16") if way.copy else None
        optimizer = fo.Optimizer([p], fo.AdamW(), copy_out=copies, **way.options)
        held = optimizer.leaf_state("0")[0]
        moved = sum(2 * stored.nbytes for stored in held.stored)
        moved += sum(mirror.nbytes for mirror in held.mirrors)
        moved += np.dtype(way.gradient).itemsize * sizes.elements
        seconds = place.seconds(partial(optimizer.step, [g]), sizes.rounds)
        what = f"AdamW, {name}: share of copy ({rate / 1e12:.2f} TB/s)"
        yield Row(what, moved / seconds / rate, SHARE_OF_COPY, {"fusedopt": seconds})
        del p, g, copies, optimizer, held
        gc.collect()  # of states that are some gigabytes


def matrices(place: Machine, sizes: Sizes) -> Lines:
    """Rules for matrices over those of GPT-2 small."""
    model = sizes.square if sizes.rehearse else sizes.lists["GPT-2 small"]
    shapes = [shape for shape in model if len(shape) == 2 and max(shape) < 10_000]
    p, g = (place.random(shapes, "float32") for _ in range(2))
    rules = {name: cls() for name, cls in RULES.items() if cls().program.phases > 1}
    rules["muon, bfloat16"] = fo.Muon(ns_dtype="bfloat16")
    medians = {name: place.seconds(ours(p, g, rule), sizes.rounds) for name, rule in rules.items()}
    rival = place.rival("muon", p, g)
    if rival is not None:
        medians["torch.optim.Muon"] = place.seconds(rival, sizes.rounds)
        for name in rules:
            faster = medians["torch.optim.Muon"] / medians[name]
            yield Row(f"{name}: times as fast as torch.optim.Muon", faster, 1.0, medians)


def _steps(
    place: Machine, sizes: Sizes, pairs: dict[str, str], ways: Callable[[Any], dict[str, Any]]
) -> Lines:
    """AdamW over lists of tensors, in several ways.

    pairs: each way, and the rival that it is compared with. ways: from gradients to what is given
    to `step`, with options of the optimizer.
    """
    for (problem, shapes), dtype in product(sizes.lists.items(), ("float32", "bfloat16")):
        p, g = (place.random(shapes, dtype) for _ in range(2))
        steps = {
            name: ours(p, given, fo.AdamW(), state_dtype=dtype, **options)
            for name, (given, options) in ways(g).items()
        }
        steps |= dict(place.rivals(p, g))
        device = {name: place.seconds(step, sizes.rounds) for name, step in steps.items()}
        host = {name: place.host_seconds(step, sizes.rounds) for name, step in steps.items()}
        for name, rival in pairs.items():
            what = f"{problem}, {dtype}: {name}"
            yield Row(
                f"{what}, times as fast as {rival}", device[rival] / device[name], 1.0, device
            )
            microseconds = 1e6 * host[name]
            yield Row(f"{what}, of the host", microseconds, 1e6 * HOST_SECONDS, host, False, "us")


def lists(place: Machine, sizes: Sizes) -> Lines:
    """AdamW over GPT-2 small and over many small tensors."""
    return _steps(
        place,
        sizes,
        {"fusedopt": "torch fused", "fusedopt, Fixed": "torch fused"},
        lambda g: {"fusedopt": (g, {}), "fusedopt, Fixed": (fo.Fixed(g), {})},
    )


def clipping(place: Machine, sizes: Sizes) -> Lines:
    """AdamW over the lists of tensors, with gradients that are clipped."""
    norm = {"clip_norm": 1.0}
    waiting, not_waiting = "clipped", "clipped, Fixed, not waiting"
    return _steps(
        place,
        sizes,
        {waiting: "torch fused, clipped", not_waiting: "torch fused, clipped"},
        lambda g: {waiting: (g, norm), not_waiting: (fo.Fixed(g), {**norm, "wait": False})},
    )


def cores(place: Machine, sizes: Sizes) -> Lines:
    """The host's own step over GPT-2 small, with 1 to all cores."""
    rng = np.random.default_rng(0)
    shapes = list(sizes.lists.values())[-1]
    available = len(os.sched_getaffinity(0))
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= available]
    for dtype in ("float32", "bfloat16"):
        p, g = (
            [rng.standard_normal(s, np.float32).astype(DTYPES[dtype]) for s in shapes]
            for _ in range(2)
        )
        optimizers = {n: fo.Optimizer(p, fo.AdamW(), state_dtype=dtype, threads=n) for n in counts}
        times: dict[int, list[float]] = {n: [] for n in counts}
        for k in range(2 + min(sizes.rounds, 11)):
            for n, optimizer in optimizers.items():
                start = time.perf_counter()
                optimizer.step(g)
                if k > 1:
                    times[n].append(time.perf_counter() - start)
        medians = {f"{n} cores": float(np.median(t)) for n, t in times.items()}
        for n, name in zip(counts, medians, strict=True):
            value = medians["1 cores"] / medians[name]
            yield Row(f"host, {dtype}: {n} cores, times as fast as 1", value, 0.0, medians)


PARTS: dict[str, Callable[[Machine, Sizes], Lines]] = {
    "bits": bits,
    "streams": streams,
    "bandwidth": bandwidth,
    "formats": formats,
    "matrices": matrices,
    "lists": lists,
    "clipping": clipping,
    "cores": cores,
}


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--elements", type=int, default=Sizes.elements)
    parser.add_argument("--rounds", type=int, default=Sizes.rounds)
    parser.add_argument("--seconds", type=float, default=300.0, help="no more rows after these")
    parser.add_argument("--output", type=Path, help="a file for lines of JSON")
    parser.add_argument("--rehearse", action="store_true", help="small sizes, on the simulator")
    arguments = parser.parse_args(given)
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    place = machine(arguments.rehearse)
    if place is None:
        return 2
    sizes = Sizes(elements=arguments.elements, rounds=arguments.rounds)
    if arguments.rehearse:
        sizes = Sizes(100, 70, 3, 1, 2, 16, ((3, 5), (1, 5)), ((4, 4),), True)
    began, missed = time.perf_counter(), 0
    print(place.name, flush=True)
    print("| target | accepted | measured | met | medians |\n|---|---|---|---|---|", flush=True)
    for part in arguments.parts or PARTS:
        try:
            for row in PARTS[part](place, sizes):
                missed += not row.met
                told = {"part": part, "after": time.perf_counter() - began, **asdict(row)}
                print("|", " | ".join(row.cells()), "|", flush=True)
                if arguments.output:
                    with arguments.output.open("a") as file:
                        file.write(json.dumps({"machine": place.name, **told}) + "\n")
                if told["after"] > arguments.seconds:
                    print(f"stopped after {told['after']:.0f} s, in {part}", flush=True)
                    return 1
        except Exception as error:  # the other parts are worth having
            missed += 1
            print(f"{part}: {type(error).__name__}: {error}", flush=True)
            traceback.print_exc()
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
