"""`mpiexec -n N fusedopt train`: the same losses within rounding, and one voice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mpi_ranks import run_ranks

TEXT = Path(__file__)  # a short one: a few windows are held out
TRAIN = ["-m", "fusedopt", "train", "--clip", "1", "--steps", "4", "--data", str(TEXT)]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("alone")
    done = run_ranks(1, TRAIN, cwd=folder)
    assert done.returncode == 0, done.stderr
    return losses_of(folder)


def losses_of(folder: Path) -> list[float]:
    found: list[float] = json.loads((folder / "runs/train/run.json").read_text())["train_losses"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_are_those_of_one_rank(ranks: int, losses: list[float], tmp_path: Path) -> None:
    done = run_ranks(ranks, [*TRAIN, "--checkpoint", "kept"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before = losses_of(tmp_path)
    np.testing.assert_allclose(before, losses, rtol=1e-4)
    assert done.stdout.count("step 0: held out") == 1
    assert done.stdout.count("wrote") == 1
    assert len(list(tmp_path.glob("kept*"))) == 1 + ranks
    # A run that goes on alone has the ranks' losses.
    again = run_ranks(1, [*TRAIN, "--resume", "kept"], cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert losses_of(tmp_path) == before


def test_batches_that_cannot_be_divided(tmp_path: Path) -> None:
    done = run_ranks(3, TRAIN, cwd=tmp_path)
    assert done.returncode != 0
    assert "batch: expected a multiple of the 3 ranks, got 8" in done.stdout + done.stderr
