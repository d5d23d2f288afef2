"""ShardedOptimizer on 1 to 4 ranks: the cases are in cases.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpi_ranks import run_ranks

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4))]
)
def test_cases(ranks: int, tmp_path: Path) -> None:
    assert check_cases(ranks, tmp_path) > 20


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_interruptions(ranks: int, tmp_path: Path) -> None:
    assert check_cases(ranks, tmp_path, "interruptions_come_before_an_action_or_after_it") == 1


def check_cases(ranks: int, folder: Path, *names: str) -> int:
    """Run cases, all but the slow one if none is named, and return their number."""
    done = run_ranks(ranks, [str(HERE / "cases.py"), *names], cwd=folder)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == ranks
    failed = [
        f"{name} on rank {rank}:\n{trace}"
        for rank, of in enumerate(found)
        for name, trace in of.items()
        if trace
    ]
    assert not failed, "\n".join(failed)
    return len(found[0])


def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path: Path) -> None:
    script = str(HERE / "dying.py")
    done = run_ranks(3, [script], launcher=["-disable-auto-cleanup"], cwd=tmp_path)
    assert done.returncode != 0
    told = {path.name: path.read_text().splitlines() for path in tmp_path.iterdir()}
    expected = ["TimeoutError True", "RuntimeError True"]
    assert told == {"rank0": expected, "rank2": expected}


def test_mpi_is_not_imported_unasked() -> None:
    done = run_ranks(1, ["-c", "import fusedopt, sys; print('mpi4py' in sys.modules)"])
    assert done.stdout.strip() == "False"
