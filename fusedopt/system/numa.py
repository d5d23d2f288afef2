"""The memory nodes of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

_NODES = Path("/sys/devices/system/node")


def nodes() -> dict[str, str]:
    """Return the processors of each NUMA node, as Linux writes them ("0-15,32-47").

    Empty where the system names no nodes.
    """
    found = {}
    try:
        for node in sorted(_NODES.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
            found[re.sub(r"\D", "", node.name)] = (node / "cpulist").read_text().strip()
    except OSError:
        return {}
    return found


def thread_nodes(processors: Sequence[Sequence[int]]) -> list[str]:
    """Return for each thread the nodes on which it may run ("0,1"), from its processors.

    A thread of more than one is not bound: the system may move it away from the memory that it
    touched first.
    """
    of = {k: name for name, listed in nodes().items() for k in _listed(listed)}
    return [",".join(sorted({of[k] for k in own if k in of}, key=int)) for own in processors]


def _listed(processors: str) -> Iterator[int]:
    """Yield the numbers in a list such as "0-15,32-47"."""
    for part in filter(None, processors.split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)
