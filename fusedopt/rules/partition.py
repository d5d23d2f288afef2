"""Which parameters of a network go to Muon, and which to AdamW."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from ..arrays.trees import Leaf, Tree
from . import Rule
from .groups import matches

NAMES = ("*embed*", "emb", "*_emb", "wte", "wpe", "head", "*_head", "classifier")
"""What embeddings and output heads are called; matrices both, but of another kind."""

Filters = Literal["muon", "adamw"] | None


def by_kind(
    params: Any, muon: Rule, adamw: Rule, names: Sequence[str] | None, filters: Filters
) -> dict[str, Rule]:
    """`Muon.with_adamw`, which says what it does, with both rules made."""
    leaves = Tree(params).leaves
    parts = [set(leaf.path.lower().split(".")) for leaf in leaves]
    for name in names or ():
        if not any(_any_matches(own, [name]) for own in parts):
            raise ValueError(f"names: {name!r} matches no part of a path; leave it out")
    wanted = NAMES if names is None else names
    to_muon = [
        _matrix(leaf, filters) and not _any_matches(own, wanted)
        for leaf, own in zip(leaves, parts, strict=True)
    ]
    rest = [leaf.path for leaf, chosen in zip(leaves, to_muon, strict=True) if not chosen]
    rules = {}
    for leaf, chosen in zip(leaves, to_muon, strict=True):
        if chosen:
            rules[_pattern(leaf.path, rest)] = muon
    return {**rules, "*": adamw} if rest else rules


def _any_matches(parts: set[str], names: Sequence[str]) -> bool:
    return any(fnmatchcase(part, name.lower()) for part in parts for name in names)


def _matrix(leaf: Leaf, filters: Filters) -> bool:
    shape = getattr(leaf.value, "shape", None)
    if shape is None:
        raise TypeError(f"{leaf.label}: expected an array, got {leaf.value!r}")
    if len(shape) > 2 and filters is None:
        raise ValueError(
            f"{leaf.label}: has the shape {shape}; say filters='muon' for Muon to flatten it to"
            f" {shape[0]} rows, or filters='adamw'"
        )
    return len(shape) == 2 or (len(shape) > 2 and filters == "muon")


def _pattern(path: str, others: Sequence[str]) -> str:
    """A pattern for this path, and for those that differ in numbers, if it fits no other."""
    parts = [re.sub(r"([*?[])", r"[\1]", part) for part in path.split(".")]
    general = ".".join("*" if part.isdigit() else part for part in parts)
    return ".".join(parts) if any(matches(other, general) for other in others) else general
