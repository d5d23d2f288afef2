"""Where a second thread begins to pay: times of one tensor's step by size.

Run it as `python benchmarks/threshold.py [--rule NAME] [--rounds N]`; README.md says how to build a
core that shares out small tensors too.
"""

from __future__ import annotations

import argparse

import fusedopt as fo
from fusedopt.lab.bench.measure import interleaved
from fusedopt.lab.bench.problems import Problem, Step, elementwise_rules, rule_of, tensors

SIZES = [2**k for k in range(12, 21)]


def step_with(problem: Problem, threads: int) -> Step:
    """The problem's step on at most so many threads."""
    optimizer = fo.Optimizer(problem.params, problem.rule, threads=threads)
    return lambda: optimizer.step(problem.grads)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times of one tensor's step by size.")
    parser.add_argument("--rule", choices=elementwise_rules(), default="adamw")
    parser.add_argument("--rounds", type=int, default=31, help="samples of each time")
    options = parser.parse_args()
    most = fo.get_threads()
    if most < 2:
        raise SystemExit("fusedopt may use one thread only here: there is nothing to compare")
    print(f"{options.rule}, float32, us per step; ratio: {most} threads over 1\n")
    columns = ("1", str(most), "ratio")
    head = ("elements", *(f"{c}, {how}" for how in ("awake", "asleep") for c in columns))
    print("".join(f"{cell:>15}" for cell in head))
    for size in SIZES:
        problem = Problem(tensors(1, size), rule_of(options.rule))
        steps = {str(threads): step_with(problem, threads) for threads in (1, most)}
        cells = [f"{size}"]
        for asleep in (False, True):
            times = interleaved(steps, options.rounds, asleep=asleep)
            cells += [f"{1e6 * seconds:.1f}" for seconds in times.medians().values()]
            cells.append(f"{times.ratio(str(most), '1'):.2f}")
        print("".join(f"{cell:>15}" for cell in cells))


if __name__ == "__main__":
    main()
