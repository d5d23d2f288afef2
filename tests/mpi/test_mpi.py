"""ShardedOptimizer on 1 to 4 ranks: the cases are in cases.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fusedopt as fo
from mpi_places import PLACES
from mpi_ranks import run_ranks

HERE = Path(__file__).parent


def test_some_cases(tmp_path: Path) -> None:
    assert check_cases(2, tmp_path, "--some") > 8


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_cases(ranks: int, tmp_path: Path) -> None:
    assert check_cases(ranks, tmp_path) > 20


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_interruptions(ranks: int, tmp_path: Path) -> None:
    assert check_cases(ranks, tmp_path, "interruptions_come_before_an_action_or_after_it") == 1


def check_cases(ranks: int, folder: Path, *names: str) -> int:
    """Run cases, as cases.py takes their names, and return their number."""
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


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_is_killed_is_an_error_on_the_others(place: str, tmp_path: Path) -> None:
    program = [str(HERE / "guarded.py"), str(HERE / "killed.py"), place]
    done = run_ranks(3, program, launcher=["-disable-auto-cleanup"], cwd=tmp_path)
    assert done.returncode != 0
    victim = PLACES[place].victim
    told = {path.name: path.read_text().splitlines() for path in tmp_path.glob("rank*")}
    expected = ["TimeoutError True", "RuntimeError True"]
    assert told == {f"rank{rank}": expected for rank in range(3) if rank != victim}
    # The checkpoint is that of the first step or, from where its index was written, the second.
    opt = fo.Optimizer({"w": np.zeros((700, 256), np.float32)}, fo.AdamW())
    opt.load(tmp_path / "kept")
    assert opt.step_count == (2 if place == "save, after the index" else 1)
    expected_digest = (tmp_path / f"digest{opt.step_count}").read_text()
    assert opt.fingerprint() == expected_digest


def test_mpi_is_not_imported_unasked() -> None:
    done = run_ranks(1, ["-c", "import fusedopt, sys; print('mpi4py' in sys.modules)"])
    assert done.stdout.strip() == "False"
