"""Plugin for pytest: which tests were selected, and which code of the package they ran.

Files that are named in FUSEDOPT_MET get these, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

ran: set[CodeType] = set()


def note(frame: FrameType, event: str, argument: Any) -> None:
    if event == "call":
        ran.add(frame.f_code)


def pytest_collection_finish(session: pytest.Session) -> None:
    sys.setprofile(note)


def pytest_sessionfinish(session: pytest.Session) -> None:
    sys.setprofile(None)
    files = {code.co_filename for code in ran if code.co_name != "<module>"}
    found = {"tests": [item.nodeid for item in session.items], "files": sorted(files)}
    Path(os.environ["FUSEDOPT_MET"]).write_text(json.dumps(found))
