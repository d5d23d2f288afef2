"""Parameter groups: the assignment of rules to leaves."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from ..arrays.trees import Leaf, Tree
from .base import Rule
from .hyperparameters import Schedule, field_names, number_names


class Group(NamedTuple):
    """The leaves of one rule. label: the pattern that chose them, or the rule's name."""

    label: str
    rule: Rule


RuleChoice = Rule | Mapping[str, Rule] | Callable[[str, np.ndarray], Rule]
RateChoice = float | Schedule | Mapping[str, float | Schedule]


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


def at_step(groups: Sequence[Group], step: int) -> list[Group]:
    """Return the groups with the values that schedules give a step, but for learning rates."""
    found = [Group(group.label, group.rule.at(step)) for group in groups]
    for group, now in zip(groups, found, strict=True):
        if now.rule is not group.rule and now.rule.states != group.rule.states:
            raise ValueError(
                f"{type(now.rule).__name__}: the states of {group.label!r} are"
                f" {group.rule.states}, and {now.rule.states} with the values of step {step}; a"
                " schedule cannot add or drop states"
            )
    return found


def only_numbers_differ(old: Sequence[Group], rules: Sequence[Rule]) -> bool:
    """Whether rules differ from the groups' in nothing that shapes or ways of computing are of."""
    return all(
        type(rule) is type(group.rule) and getattr(rule, name) == getattr(group.rule, name)
        for group, rule in zip(old, rules, strict=True)
        for name in {f.name for f in fields(rule)} - {"lr", *number_names(type(rule))}
    )


def rates_given(groups: Sequence[Group], lr: RateChoice) -> list[Mapping[str, Any]]:
    """Return the learning rate that a choice gives each group; nothing where it does not fit."""
    if len(groups) == 1:
        return [{"lr": lr}]
    if not isinstance(lr, Mapping) or set(lr) != {group.label for group in groups}:
        return []
    return [{"lr": lr[group.label]} for group in groups]


def with_rates(groups: Sequence[Group], lr: RateChoice) -> list[Rule]:
    """The groups' rules with other learning rates: one, or with several groups one by label."""
    if len(groups) == 1:
        return [replace(groups[0].rule, lr=cast(Any, lr))]  # which refuses a mapping
    labels = [group.label for group in groups]
    if not isinstance(lr, Mapping) or set(lr) != set(labels):
        raise ValueError(
            f"lr: expected a mapping with a rate for each of {labels}, got {lr!r}; replace(lr=...)"
            " gives all rules one rate"
        )
    return [replace(group.rule, lr=lr[group.label]) for group in groups]


def with_hyperparameters(
    groups: Sequence[Group], label: str | None, values: Mapping[str, Any]
) -> list[Rule]:
    """The groups' rules, with the values in those that have the name, or in the one of a label."""
    labels = [group.label for group in groups]
    if label is not None and label not in labels:
        raise ValueError(f"replace: expected one of {labels}, got {label!r}")
    rules, unknown = [], set(values)
    for group in groups:
        cls: Any = type(group.rule)
        known = field_names(cls) if label in (None, group.label) else ()
        own = {name: value for name, value in values.items() if name in known}
        unknown -= own.keys()
        rules.append(replace(group.rule, **own) if own else group.rule)
    if unknown:
        where = "none of the rules has" if label is None else f"the rule of {label!r} has no"
        raise TypeError(f"replace: {where} {', '.join(sorted(unknown))}")
    return rules


def check_successor(group: Group, rule: Rule) -> bool:
    """Return whether a rule differs from the group's at most in what plans take from elsewhere.

    Raises ValueError where the group's states are not the rule's.
    """
    old = group.rule
    for name in old.settled:
        if getattr(rule, name) != getattr(old, name):
            raise ValueError(
                f"{type(rule).__name__}({name}): the states of {group.label!r} were begun with"
                f" {getattr(old, name)!r}, got {getattr(rule, name)!r}; make a new optimizer"
            )
    if rule.states != old.states:
        raise ValueError(
            f"{type(rule).__name__}: {group.label!r} has the states {old.states}, and this rule"
            f" would need {rule.states}; make a new optimizer: {rule.summary()}"
        )
    rest = [field.name for field in fields(rule) if field.name != "lr"]
    same = all(getattr(rule, name) == getattr(old, name) for name in rest)
    return same and rule.decay != "independent"


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
        first = next((k for k, pattern in enumerate(rules) if matches(leaf.path, pattern)), None)
        if first is None:
            raise ValueError(
                f"{leaf.label}: no pattern of {list(rules)} matches its path {leaf.path!r}; add '*'"
                " for the rest"
            )
        group_of.append(first)
    return groups, group_of


def matches(path: str, pattern: str) -> bool:
    """Return whether a pattern chooses the leaf of this path."""
    return fnmatchcase(path, pattern) or fnmatchcase("." + path, pattern)


def _check_rule(where: str, rule: Any) -> Rule:
    if not isinstance(rule, Rule):
        hint = "; call the class" if isinstance(rule, type) and issubclass(rule, Rule) else ""
        raise TypeError(f"{where}: expected a rule such as fo.AdamW(), got {rule!r}{hint}")
    return rule


def _some(paths: Sequence[str]) -> str:
    shown = ", ".join(map(repr, paths[:8]))
    return shown + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")


# ---------------------------------------------------------------- a rule for matrices, or AdamW

NAMES = ("*embed*", "emb", "*_emb", "wte", "wpe", "head", "*_head", "classifier")
"""Common names of embeddings and output heads, which are matrices of another kind."""

Filters = Literal["matrices", "adamw"] | None


def by_kind(
    params: Any, matrix: Rule, adamw: Rule, names: Sequence[str] | None, filters: Filters
) -> dict[str, Rule]:
    """`MatrixRule.with_adamw`, which says what it does, with both rules made."""
    leaves = Tree(params).leaves
    parts = [set(leaf.path.lower().split(".")) for leaf in leaves]
    for name in names or ():
        if not any(_any_matches(own, [name]) for own in parts):
            raise ValueError(f"names: {name!r} matches no part of a path; leave it out")
    wanted = NAMES if names is None else names
    to_matrix = [
        _matrix(leaf, filters) and not _any_matches(own, wanted)
        for leaf, own in zip(leaves, parts, strict=True)
    ]
    rest = [leaf.path for leaf, chosen in zip(leaves, to_matrix, strict=True) if not chosen]
    rules = {}
    for leaf, chosen in zip(leaves, to_matrix, strict=True):
        if chosen:
            rules[_pattern(leaf.path, rest)] = matrix
    return {**rules, "*": adamw} if rest else rules


def _any_matches(parts: set[str], names: Sequence[str]) -> bool:
    return any(fnmatchcase(part, name.lower()) for part in parts for name in names)


def _matrix(leaf: Leaf, filters: Filters) -> bool:
    shape = getattr(leaf.value, "shape", None)
    if shape is None:
        raise TypeError(f"{leaf.label}: expected an array, got {leaf.value!r}")
    if len(shape) > 2 and filters is None:
        raise ValueError(
            f"{leaf.label}: has the shape {shape}; say filters='matrices' to flatten it to"
            f" {shape[0]} rows, or filters='adamw'"
        )
    return len(shape) == 2 or (len(shape) > 2 and filters == "matrices")


def _pattern(path: str, others: Sequence[str]) -> str:
    """A pattern for this path, and for those that differ in numbers, if it fits no other."""
    parts = [re.sub(r"([*?[])", r"[\1]", part) for part in path.split(".")]
    general = ".".join("*" if part.isdigit() else part for part in parts)
    return ".".join(parts) if any(matches(other, general) for other in others) else general
