"""The addresses that a release has in its metadata."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def add_urls(address: str, path: Path) -> int:
    command = [sys.executable, str(ROOT / ".ci" / "urls"), address, str(path)]
    return subprocess.run(command, capture_output=True, check=False).returncode


def test_a_release_names_its_repository(tmp_path: Path) -> None:
    copy = tmp_path / "pyproject.toml"
    shutil.copy(ROOT / "pyproject.toml", copy)
    before = tomllib.loads(copy.read_text(encoding="utf-8"))
    assert "urls" not in before["project"]
    assert add_urls("https://github.com/Some-One/fusedopt", copy) == 0
    after = tomllib.loads(copy.read_text(encoding="utf-8"))
    assert after["project"].pop("urls") == {
        "Documentation": "https://some-one.github.io/fusedopt/",
        "Source": "https://github.com/Some-One/fusedopt",
        "Issues": "https://github.com/Some-One/fusedopt/issues",
        "Changelog": "https://github.com/Some-One/fusedopt/blob/main/CHANGELOG.md",
    }
    assert after == before
    written = copy.read_bytes()
    assert add_urls("https://github.com/Some-One/fusedopt", copy) != 0  # they are there already
    assert copy.read_bytes() == written
