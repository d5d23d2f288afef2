"""What a training loop has around its steps: guards, many tensors, changes, rows, the import.

Run it as `python benchmarks/loop.py [--rounds N] [--only PART ...] [--json F] [--markdown F]`.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import fusedopt as fo
from fusedopt.lab.bench.measure import interleaved
from fusedopt.lab.bench.problems import Array, Step
from targets import Parts, Row, main

VOCABULARY, WIDTH, ROWS = 50_000, 64, 65_536


SMALL, MANY = 1000, 1000
LR = fo.schedules.Cosine(1e-3, steps=10**7)
ALL: dict[str, Any] = {"clip_norm": 1.0, "skip_nonfinite": True}


class CarefulAdamW:
    """AdamW of one array in NumPy, without a temporary: what a careful trainer would write."""

    def __init__(self, p: np.ndarray, g: np.ndarray) -> None:
        self.p, self.g, self.t = p, g, 0
        self.m, self.v, self.a, self.b = (np.zeros_like(p) for _ in range(4))

    def step(self, lr: float = 1e-3, clip: bool = False, scale: float = 1.0) -> None:
        """Take a step, with the norm of the gradients where they are to be clipped."""
        g, a = self.g, self.a
        factor = 1.0 / scale
        if clip:
            norm = math.sqrt(np.dot(g, g)) * factor
            if not math.isfinite(norm):
                return
            factor *= min(1.0, 1.0 / norm)
        if factor != 1.0:
            g = np.multiply(g, np.float32(factor), out=self.b)
        self.direction(g)
        np.multiply(a, np.float32(lr / (1.0 - 0.9**self.t)), out=a)
        np.multiply(self.p, np.float32(1.0 - lr * 0.01), out=self.p)
        np.subtract(self.p, a, out=self.p)

    def direction(self, g: np.ndarray) -> None:
        """Update the averages, and find their quotient, without the first one's correction."""
        a = self.a
        self.t += 1
        np.multiply(self.m, np.float32(0.9), out=self.m)
        np.multiply(g, np.float32(0.1), out=a)
        np.add(self.m, a, out=self.m)
        np.multiply(self.v, np.float32(0.999), out=self.v)
        np.multiply(g, g, out=a)
        np.multiply(a, np.float32(0.001), out=a)
        np.add(self.v, a, out=self.v)
        np.divide(self.v, np.float32(1.0 - 0.999**self.t), out=a)
        np.sqrt(a, out=a)
        np.add(a, np.float32(1e-8), out=a)
        np.divide(self.m, a, out=a)

    def lamb(self, lr: float = 1e-3) -> None:
        """Take a step of LAMB, whose length is that of the parameter."""
        a, b = self.a, self.b
        self.direction(self.g)
        np.multiply(a, np.float32(1.0 / (1.0 - 0.9**self.t)), out=a)
        np.multiply(self.p, np.float32(0.01), out=b)
        np.add(a, b, out=a)
        ratio = math.sqrt(np.dot(self.p, self.p)) / math.sqrt(np.dot(a, a))
        np.multiply(a, np.float32(lr * ratio), out=a)
        np.subtract(self.p, a, out=self.p)

    def stats(self) -> tuple[float, float]:
        """Take a step, and return the norm of the gradient and the relative change."""
        np.copyto(self.b, self.p)
        self.step()
        weight = math.sqrt(np.dot(self.b, self.b))
        np.subtract(self.p, self.b, out=self.b)
        return math.sqrt(np.dot(self.g, self.g)), math.sqrt(np.dot(self.b, self.b)) / weight


def guarded(rounds: int) -> Iterator[Row]:
    """One small tensor: what is asked of a step beside the update, over the plain step."""
    rng = np.random.default_rng(0)
    p, g = rng.standard_normal(SMALL, np.float32), rng.standard_normal(SMALL, np.float32)

    def ours(lr: Any = 1e-3, scale: float = 1.0, **options: Any) -> Step:
        optimizer = fo.Optimizer(p.copy(), fo.AdamW(lr=lr), threads=1, **options)
        return lambda: optimizer.step(g, grad_scale=scale)

    def careful() -> CarefulAdamW:
        return CarefulAdamW(p.copy(), g)

    plain, scheduled, clipped, whole, told = (careful() for _ in range(5))
    times = interleaved(
        {
            "plain": ours(),
            "schedule": ours(LR),
            "clip": ours(clip_norm=1.0),
            "all": ours(LR, 2.0, **ALL),
            "stats": ours(stats=True),
            "grad_scale": ours(scale=2.0),
            "NumPy plain": plain.step,
            "NumPy schedule": lambda: scheduled.step(LR(scheduled.t + 1)),
            "NumPy clip": lambda: clipped.step(clip=True),
            "NumPy all": lambda: whole.step(LR(whole.t + 1), True, 2.0),
            "NumPy stats": told.stats,
        },
        rounds,
    )
    medians = times.medians()
    names = {
        "schedule": (1.5, "schedule"),
        "clip": (2.0, "clip_norm"),
        "all": (3.0, "schedule, clip_norm, skip_nonfinite, grad_scale"),
        "stats": (3.0, "stats"),
        "grad_scale": (1.5, "grad_scale"),
    }
    for name, (bound, label) in names.items():
        own = {k: medians[k] for k in (name, "plain")}
        target = f"adamw, one tensor of {SMALL}: {label}, time over the plain step"
        yield Row(target, times.ratio(name, "plain"), bound, own, at_least=False)
    for name in ("plain", "schedule", "clip", "all", "stats"):
        own = {k: medians[k] for k in (name, f"NumPy {name}")}
        label = names[name][1] if name in names else "plain"
        target = f"adamw, one tensor of {SMALL}: {label}, time over careful NumPy"
        yield Row(target, times.ratio(name, f"NumPy {name}"), 1.0, own, at_least=False)


def measured(rounds: int) -> Iterator[Row]:
    """Rules that read sums before they step: norms, counts, and what all parameters share."""
    rng = np.random.default_rng(0)
    bounds = {"lars": 2.0, "lamb": 3.0, "cautiousadamw": 3.0, "tiger": 2.0, "prodigy": 15.0}
    rules = {name: fo.RULES[name]() for name in bounds} | {"adamw": fo.AdamW()}

    def ours(rule: fo.Rule, count: int) -> Step:
        params, grads = (list(rng.standard_normal((count, SMALL), np.float32)) for _ in range(2))
        optimizer = fo.Optimizer(params, rule, threads=1)
        return lambda: optimizer.step(grads)

    for count, what in ((1, "one tensor"), (100, "100 tensors")):
        params, grads = (list(rng.standard_normal((count, SMALL), np.float32)) for _ in range(2))
        careful = [CarefulAdamW(p, g) for p, g in zip(params, grads, strict=True)]

        def lamb(careful: list[CarefulAdamW] = careful) -> None:
            for one in careful:
                one.lamb()

        steps = {name: ours(rule, count) for name, rule in rules.items()}
        times = interleaved({**steps, "NumPy lamb": lamb}, rounds)
        medians = times.medians()
        for name, bound in bounds.items():
            own = {k: medians[k] for k in (name, "adamw")}
            # Python makes numbers of each tensor's sums, in a microsecond.
            target = f"{name}, {what} of {SMALL}: time over adamw's plain step"
            limit = bound if count == 1 else max(bound, 6.0)
            yield Row(target, times.ratio(name, "adamw"), limit, own, at_least=False)
        own = {k: medians[k] for k in ("lamb", "NumPy lamb")}
        target = f"lamb, {what} of {SMALL}: time over careful NumPy"
        yield Row(target, times.ratio("lamb", "NumPy lamb"), 1.0, own, at_least=False)


def tensors(rounds: int) -> Iterator[Row]:
    """Many small tensors against one flat one of as many elements."""
    rng = np.random.default_rng(0)
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "clip and zero": {"clip_norm": 1.0, "zero_grads": True},
        "all": {"lr": LR, **ALL},
        "stats": {"stats": True},
    }

    def ours(count: int, lr: Any = 1e-3, **options: Any) -> Step:
        shape = count, MANY * SMALL // count
        params, grads = (list(rng.standard_normal(shape, np.float32)) for _ in range(2))
        optimizer = fo.Optimizer(params, fo.AdamW(lr=lr), **options)
        return lambda: optimizer.step(grads)

    steps = {}
    for name, options in kinds.items():
        steps[name] = ours(MANY, **options)
        steps[f"flat {name}"] = ours(1, **options)
    times = interleaved(steps, rounds)
    medians = times.medians()
    over = f"adamw, {MANY} tensors of {SMALL}"
    own = {k: medians[k] for k in ("clip and zero", "plain")}
    ratio = times.ratio("clip and zero", "plain")
    yield Row(f"{over}: clip_norm, zero_grads, over the plain step", ratio, 2.0, own, False)
    for name in kinds:
        own = {k: medians[k] for k in (name, f"flat {name}")}
        ratio = times.ratio(name, f"flat {name}")
        yield Row(f"{over}: {name}, over one flat tensor", ratio, 1.15, own, False)


def transforms(rounds: int) -> Iterator[Row]:
    """What is done to each gradient on its own, against NumPy's own passes before a plain step."""
    rng = np.random.default_rng(0)
    params, grads = (list(rng.standard_normal((100, 25, 40), np.float32)) for _ in range(2))

    def clipped(g: Array, limit: Any, norm: Any) -> Array:
        return np.asarray(g * np.minimum(1.0, limit / norm).astype(np.float32))

    def by_leaf(p: Array, g: Array) -> Array:
        return clipped(g, 1.0, np.sqrt(np.vdot(g, g)))

    def by_row(p: Array, g: Array) -> Array:
        limit = np.maximum(np.linalg.norm(p, axis=1, keepdims=True), 1e-3)
        return clipped(g, 0.01 * limit, np.linalg.norm(g, axis=1, keepdims=True))

    def centred(p: Array, g: Array) -> Array:
        return np.asarray(g - g.mean(axis=1, keepdims=True))

    def ours(**options: Any) -> Step:
        optimizer = fo.Optimizer([p.copy() for p in params], fo.AdamW(), **options)
        return lambda: optimizer.step(grads)

    def numpys(change: Callable[[Array, Array], Array]) -> Step:
        own = [p.copy() for p in params]
        optimizer = fo.Optimizer(own, fo.AdamW())
        return lambda: optimizer.step([change(p, g) for p, g in zip(own, grads, strict=True)])

    kinds: dict[str, tuple[dict[str, Any], Callable[[Array, Array], Array]]] = {
        "clip_leaf": ({"clip_leaf": 1.0}, by_leaf),
        "clip_adaptive": ({"clip_adaptive": 0.01}, by_row),
        "centralize": ({"centralize": True}, centred),
    }
    steps: dict[str, Step] = {"plain": ours()}
    for name, (options, change) in kinds.items():
        steps |= {name: ours(**options), f"NumPy {name}": numpys(change)}
    times = interleaved(steps, rounds)
    medians = times.medians()
    for name in kinds:
        own = {k: medians[k] for k in (name, f"NumPy {name}", "plain")}
        target = f"adamw, 100 matrices of 25 x 40: {name}, over NumPy's and a plain step"
        yield Row(target, times.ratio(name, f"NumPy {name}"), 1.0, own, at_least=False)


def changes(rounds: int) -> Iterator[Row]:
    """What changes between steps: numbers that are set or scheduled, and a rule that is made."""
    values = itertools.cycle(np.random.default_rng(0).uniform(1e-4, 1e-3, 10**5).tolist())
    few, many = ([np.zeros(SMALL, np.float32) for _ in range(n)] for n in (1, 150))
    grads = [p + 1 for p in few]
    plain, numerous = (fo.Optimizer(params, fo.AdamW()) for params in (few, many))
    decayed = fo.Optimizer([p.copy() for p in few], fo.AdamW(weight_decay=LR))
    times = interleaved(
        {
            "opt.lr = x": lambda: setattr(plain, "lr", next(values)),
            "opt.replace": lambda: plain.replace(weight_decay=next(values)),
            "150 leaves": lambda: numerous.replace(weight_decay=next(values)),
            "fo.AdamW(lr=x)": lambda: fo.AdamW(lr=next(values)),
            "plain": lambda: plain.step(grads),
            "scheduled": lambda: decayed.step(grads),
        },
        rounds,
    )
    targets = {
        "opt.lr = x": ("opt.lr = x", 2.0),
        "opt.replace": ("opt.replace(weight_decay=x)", 2.0),
        "150 leaves": ("opt.replace(weight_decay=x), 150 leaves", 2.0),
        "fo.AdamW(lr=x)": ("fo.AdamW(lr=x)", 10.0),
    }
    for name, (target, bound) in targets.items():
        seconds = times.median(name)
        yield Row(target, seconds * 1e6, bound, {name: seconds}, at_least=False, unit="us")
    own = {k: times.median(k) for k in ("scheduled", "plain")}
    added = times.difference("scheduled", "plain") * 1e6
    yield Row("a schedule on weight decay, each step", added, 2.0, own, at_least=False, unit="us")


def duplicates(rounds: int) -> Iterator[Row]:
    """A step with rows that come more than once, against NumPy's addition of these rows alone."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((ROWS, WIDTH), np.float32)
    uniform = rng.integers(0, VOCABULARY, ROWS)
    given = {
        "uniform": (uniform, 0.5),
        "Zipf 1.2": (np.minimum(rng.zipf(1.2, ROWS), VOCABULARY) - 1, 1.0),
        "half of one index": (np.where(rng.random(ROWS) < 0.5, 0, uniform), 1.0),
    }
    for name, (indices, bound) in given.items():
        table = np.zeros((VOCABULARY, WIDTH), np.float32)
        sums = np.zeros_like(table)
        optimizer = fo.Optimizer(table, fo.SGD(lr=1.0))
        optimizer.step(fo.Rows(indices, values))
        np.add.at(sums, indices, values)
        assert np.array_equal(-table, sums), "the rows are not added up in their order"
        times = interleaved(
            {
                "step": lambda o=optimizer, i=indices: o.step(fo.Rows(i, values)),  # type: ignore[misc]
                "np.add.at": lambda s=sums, i=indices: np.add.at(s, i, values),  # type: ignore[misc]
            },
            rounds,
        )
        target = f"sgd, {ROWS} rows of {WIDTH}, {name}: time over np.add.at"
        ratio = times.ratio("step", "np.add.at")
        yield Row(target, ratio, bound, times.medians(), at_least=False)


def _import_ms(module: str) -> float:
    """Milliseconds that a fresh process takes to import a module, with all that it imports."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.findall(rf"\| +(\d+) \| {module}$", report, re.MULTILINE)[0]) / 1e3


def imports(rounds: int) -> Iterator[Row]:
    """What `import fusedopt` adds to `import numpy`."""
    times: dict[str, list[float]] = {"fusedopt": [], "numpy": []}
    for _ in range(rounds):
        for module, found in times.items():
            found.append(_import_ms(module))
    medians = {name: statistics.median(found) for name, found in times.items()}
    added = medians["fusedopt"] - medians["numpy"]
    seconds = {name: ms / 1e3 for name, ms in medians.items()}
    yield Row("import: time over NumPy's", added, 25, seconds, at_least=False, unit="ms")


PARTS: Parts = {
    part.__name__: part
    for part in (guarded, measured, tensors, transforms, changes, duplicates, imports)
}

if __name__ == "__main__":
    main("Measures the targets of a training loop.", PARTS)
