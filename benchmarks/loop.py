"""What a training loop has around its steps: rows that repeat, and the import of the package.

Run it as `python benchmarks/loop.py [--rounds N] [--only PART ...] [--json F] [--markdown F]`.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from collections.abc import Iterator

import numpy as np

import fusedopt as fo
from fusedopt.lab.bench.measure import interleaved
from targets import Parts, Row, main

VOCABULARY, WIDTH, ROWS = 50_000, 64, 65_536


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


PARTS: Parts = {part.__name__: part for part in (duplicates, imports)}

if __name__ == "__main__":
    main("Measures the targets of a training loop.", PARTS)
