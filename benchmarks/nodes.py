"""Bytes that a step moves between the memory nodes of one machine: a model.

A machine with one node cannot show what two sockets do. This model hands out the parts of a step to
threads whose speeds vary from step to step, in the two ways that there are: in order, to whoever
comes next (one shared counter), and in fixed shares, from which others take only when their own is
done (what `csrc/parallel.cpp` does). Memory lies on the node of the thread that touched it in the
first step. It counts the bytes that later steps read and write on another node than their thread's.

Run it as `python benchmarks/nodes.py [--steps N] [--jitter X]`.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable

PARTS_PER_THREAD = 16  # as in csrc/driver.cpp
BYTES = 28  # of AdamW in float32, for each element
ELEMENTS = 124_439_808  # of GPT-2 small

Take = Callable[[int], int | None]


def shared_counter(parts: int, threads: int) -> Take:
    """Hand out parts in order to whoever comes."""
    left = deque(range(parts))
    return lambda thread: left.popleft() if left else None


def shares(parts: int, threads: int) -> Take:
    """Hand out each thread's own parts, then what is left of the next thread's, and so on."""
    each, rest = divmod(parts, threads)
    begins = [k * each + min(k, rest) for k in range(threads + 1)]
    left = [deque(range(a, b)) for a, b in itertools.pairwise(begins)]

    def take(thread: int) -> int | None:
        for k in range(threads):
            queue = left[(thread + k) % threads]
            if queue:
                return queue.popleft()
        return None

    return take


def step(take: Take, threads: int, jitter: float, chance: random.Random) -> dict[int, int]:
    """Return the thread that ran each part, where each part takes about as long as any other."""
    ran: dict[int, int] = {}
    speeds = [1 + jitter * chance.random() for _ in range(threads)]
    ready = [(0.0, chance.random(), thread) for thread in range(threads)]
    heapq.heapify(ready)
    while ready:
        now, _, thread = heapq.heappop(ready)
        part = take(thread)
        if part is not None:
            ran[part] = thread
            took = speeds[thread] * (1 + jitter * chance.random())
            heapq.heappush(ready, (now + took, chance.random(), thread))
    return ran


def remote_share(way: Callable[[int, int], Take], nodes: int, per_node: int, steps: int,
                 jitter: float, chance: random.Random) -> float:  # fmt: skip
    """Return the share of a step's parts whose memory lies on another node than their thread."""
    threads = nodes * per_node
    parts = PARTS_PER_THREAD * threads
    home = step(way(parts, threads), threads, jitter, chance)
    remote = 0
    for _ in range(steps):
        ran = step(way(parts, threads), threads, jitter, chance)
        remote += sum(home[k] // per_node != ran[k] // per_node for k in ran)
    return remote / (steps * parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Models remote bytes per step.")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=16, help="of each node")
    options = parser.parse_args()
    total = BYTES * ELEMENTS / 1e6
    print(f"AdamW, float32, GPT-2 small: MB on another node per step, of {total:.0f};")
    print(f"{options.threads} threads on each node, of which one is up to `jitter` slower\n")
    print("| nodes | jitter | one shared counter | shares of their own |")
    print("|---|---|---|---|")
    for nodes in (2, 4, 8):
        for jitter in (0.0, 0.02, 0.1, 0.5):
            cells = []
            for way in (shared_counter, shares):
                share = remote_share(
                    way, nodes, options.threads, options.steps, jitter, random.Random(1)
                )
                cells.append(f"{share * BYTES * ELEMENTS / 1e6:.0f}")
            print(f"| {nodes} | {jitter:g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
