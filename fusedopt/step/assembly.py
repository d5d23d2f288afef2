"""The arrays that an optimizer is given, checked together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays.checks import memory_order
from ..arrays.trees import Leaf, Tree
from ..rules import Rule

Arrays = tuple[list[np.ndarray], list[np.ndarray | None]]


def checked_arrays(device: Any, tree: Tree, rules: Sequence[Rule], copy_out: Any) -> Arrays:
    """The parameters, and of each the array that gets a copy of it, or None.

    device: the backend's. Raises TypeError or ValueError where one does not fit, or where two share
    memory.
    """
    parameters = [
        device.check_parameter(leaf.label, leaf.value, rule)
        for leaf, rule in zip(tree.leaves, rules, strict=True)
    ]
    copies = _copies(device, tree, parameters, copy_out)
    named = [(leaf.label, p) for leaf, p in zip(tree.leaves, parameters, strict=True)]
    named += [
        (_label(leaf), copied)
        for leaf, copied in zip(tree.leaves, copies, strict=True)
        if copied is not None
    ]
    device.check_apart([label for label, _ in named], [a for _, a in named])
    return parameters, copies


def _copies(
    device: Any, tree: Tree, parameters: Sequence[np.ndarray], copy_out: Any
) -> list[np.ndarray | None]:
    if copy_out is None:
        return [None] * len(parameters)
    copies: list[np.ndarray | None] = []
    given = tree.flatten(copy_out, "copy_out")
    for leaf, p, array in zip(tree.leaves, parameters, given, strict=True):
        if array is None:
            copies.append(None)
            continue
        copied = device.check_target(_label(leaf), array)
        if copied.shape != p.shape or memory_order(copied) != memory_order(p):
            raise ValueError(
                f"{_label(leaf)}: expected the shape {p.shape} and memory order {memory_order(p)}"
                f" of {leaf.label}, got {copied.shape} and {memory_order(copied)}"
            )
        copies.append(copied)
    if all(copied is None for copied in copies):
        raise ValueError("copy_out: has an array for no leaf; leave it out")
    return copies


def _label(leaf: Leaf) -> str:
    return "copy_out" + leaf.label.removeprefix("params")
