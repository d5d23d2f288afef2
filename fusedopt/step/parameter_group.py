"""A parameter group as its user sees it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Protocol

from ..rules.base import Rule
from .assembly import Assembly


class Replaceable(Protocol):
    """The part of an `Optimizer` that a group needs."""

    def replace(self, label: str, /, **hyperparameters: Any) -> None:
        """Change hyperparameters of the group of a label."""


class ParameterGroup:
    """A parameter group, whose hyperparameters are attributes that can be read and set.

    `group.lr = 1e-4` is `opt.replace(label, lr=1e-4)`. `rule` is the group's rule, `paths` are its
    leaves, `label` is the pattern that chose them, or the rule's name.
    """

    __slots__ = ("_assembly", "_number", "_optimizer")

    def __init__(self, optimizer: Replaceable, assembly: Assembly, number: int) -> None:
        for name, value in zip(self.__slots__, (assembly, number, optimizer), strict=True):
            object.__setattr__(self, name, value)

    @property
    def label(self) -> str:
        """The pattern that chose the leaves, or the rule's name."""
        return str(self._group.label)

    @property
    def rule(self) -> Rule:
        """The rule, with schedules as they were given."""
        rule: Rule = self._group.rule
        return rule

    @property
    def _group(self) -> Any:
        return self._assembly.groups[self._number]

    @property
    def paths(self) -> list[str]:
        """The dotted paths of the leaves."""
        pairs = zip(self._assembly.paths, self._assembly.group_of, strict=True)
        return [path for path, number in pairs if number == self._number]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)

    def __setattr__(self, name: str, value: Any) -> None:
        known = [field.name for field in fields(self.rule)]
        if name not in known:
            raise AttributeError(
                f"group {self.label!r}: {type(self.rule).__name__} has no hyperparameter {name!r};"
                f" it has {', '.join(known)}"
            )
        self._optimizer.replace(self.label, **{name: value})

    def __repr__(self) -> str:
        return f"ParameterGroup({self.label!r}, {self.rule.summary()}, {len(self.paths)} leaves)"
