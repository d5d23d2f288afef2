"""Which rule updates which leaf."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from .backends import Group
from .rules import Rule
from .trees import Leaf

RuleChoice = Rule | Mapping[str, Rule] | Callable[[str, np.ndarray], Rule]


def assign(leaves: Sequence[Leaf], rule: RuleChoice) -> tuple[list[Group], list[int]]:
    """The groups, and of each leaf its group.

    rule: one for all; a mapping of path patterns (`*` and `?` match dots too, `*.w` also a
    top-level w), the first that matches; or a callable of path and array. Raises TypeError for
    anything that is no rule and ValueError for a leaf without a rule or a pattern without a leaf.
    """
    if isinstance(rule, Rule):
        return [Group(rule.name, rule)], [0] * len(leaves)
    if isinstance(rule, Mapping):
        return _by_pattern(leaves, rule)
    if not callable(rule):
        raise TypeError(
            f"rule: expected a rule, a mapping of patterns to rules or a callable, got {rule!r}"
        )
    groups: list[Group] = []
    group_of = []
    for leaf in leaves:
        chosen = _check_rule(f"rule({leaf.path!r}, array)", rule(leaf.path, leaf.value))
        known = [group.rule for group in groups]
        if chosen not in known:
            same = sum(group.rule.name == chosen.name for group in groups)
            groups.append(Group(chosen.name + (f".{same + 1}" if same else ""), chosen))
        group_of.append([group.rule for group in groups].index(chosen))
    return groups, group_of


def _by_pattern(leaves: Sequence[Leaf], rules: Mapping[str, Rule]) -> tuple[list[Group], list[int]]:
    groups = [
        Group(pattern, _check_rule(f"rule[{pattern!r}]", rule)) for pattern, rule in rules.items()
    ]
    paths = [leaf.path for leaf in leaves]
    for pattern in rules:
        if not any(matches(path, pattern) for path in paths):
            raise ValueError(f"rule[{pattern!r}]: matches no leaf; the leaves are {_some(paths)}")
    group_of = []
    for leaf in leaves:
        found = [k for k, pattern in enumerate(rules) if matches(leaf.path, pattern)]
        if not found:
            raise ValueError(
                f"{leaf.label}: no pattern of {list(rules)} matches its path {leaf.path!r}; add '*'"
                " for the rest"
            )
        group_of.append(found[0])
    return groups, group_of


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern chooses the leaf of this path."""
    return fnmatchcase(path, pattern) or fnmatchcase("." + path, pattern)


def _check_rule(where: str, rule: Any) -> Rule:
    if not isinstance(rule, Rule):
        hint = "; call the class" if isinstance(rule, type) and issubclass(rule, Rule) else ""
        raise TypeError(f"{where}: expected a rule such as fo.AdamW(), got {rule!r}{hint}")
    return rule


def _some(paths: Sequence[str]) -> str:
    shown = ", ".join(map(repr, paths[:8]))
    return shown + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
