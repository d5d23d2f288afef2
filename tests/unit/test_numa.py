"""The memory nodes that `info` shows."""

from __future__ import annotations

from pathlib import Path

import pytest

import fusedopt as fo
from fusedopt.system import numa


def test_nodes_and_their_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "_NODES", tmp_path)
    assert numa.nodes() == {}
    for node, processors in {"node10": "40-43", "node2": "0,2", "node0": "1,3-9"}.items():
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(processors + "\n")
    (tmp_path / "has_cpu").mkdir()
    expected = {"0": "1,3-9", "2": "0,2", "10": "40-43"}
    assert list(numa.nodes().items()) == list(expected.items())
    assert fo.info()["numa_nodes"] == expected
    (tmp_path / "node2" / "cpulist").unlink()
    assert numa.nodes() == {}


def test_nodes_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "_NODES", tmp_path)
    for name, listed in {"node0": "0-1,4-5", "node1": "2-3,6", "node2": ""}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpulist").write_text(listed + "\n")
    threads = [[0], [6, 2], [5, 3], [], [99]]
    assert numa.thread_nodes(threads) == ["0", "1", "0,1", "", ""]
