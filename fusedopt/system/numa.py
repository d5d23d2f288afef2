"""The memory nodes of this machine."""

from __future__ import annotations

import re
from pathlib import Path

_NODES = Path("/sys/devices/system/node")


def nodes() -> dict[str, str]:
    """The processors of each NUMA node, as Linux writes them ("0-15,32-47"); empty where the
    system names no nodes."""
    found = {}
    try:
        for node in sorted(_NODES.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
            found[re.sub(r"\D", "", node.name)] = (node / "cpulist").read_text().strip()
    except OSError:
        return {}
    return found
