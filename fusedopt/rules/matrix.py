"""The base of rules for matrices, whose steps have matrix products between two phases."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from ..linalg.newton_schulz import Iteration, Stack, Workspace
from ..programs.arithmetic import Array
from .adam import AdamW
from .base import Rule
from .groups import Filters, by_kind
from .hyperparameters import check_field


class Member(NamedTuple):
    """A parameter among those of one shape whose matrices are treated in one go.

    t: its step, 1 first. sides: its side states, live.
    """

    t: int
    sides: Mapping[str, np.ndarray]


class DeviceAlgebra(Protocol):
    """Operations of a library of arrays on a device, besides the operators of its arrays."""

    @property
    def wide(self) -> Any:
        """The library's float64."""

    def cast(self, x: Any, like: Any) -> Any:
        """The elements of x in the dtype of another array."""

    def normal(self, x: Any) -> Any:
        """The elements; zero where they are smaller than the smallest normal number."""

    def orthogonalized(self, x: Any, iteration: Iteration) -> Any:
        """The iterates of a stack (count, rows, columns)."""


@dataclass(frozen=True, kw_only=True)
class MatrixRule(Rule):
    """A rule whose operations have several phases, with matrix products between them."""

    works: ClassVar[tuple[str, ...]] = ("work",)

    @classmethod
    def with_adamw(
        cls,
        params: Any,
        adamw: AdamW | None = None,
        *,
        names: Sequence[str] | None = None,
        filters: Filters = None,
        **hyperparameters: Any,
    ) -> dict[str, Rule]:
        """Return rules for an `Optimizer`: this one for matrices, AdamW for everything else.

        Parameters
        ----------
        params : nested arrays
            Parameters, as for the optimizer.
        adamw : AdamW, optional
            Rule of what is no matrix; by default AdamW(lr=3e-4, betas=(0.9, 0.95), eps=1e-10,
            weight_decay=0), the usual one beside Muon.
        names : sequence of str, optional
            Patterns of matrices that go to AdamW: a part of the dotted path matches one of them. By
            default the names of embeddings and output heads, `fusedopt.rules.groups.NAMES`.
        filters : {"matrices", "adamw"}, optional
            What arrays of more than two dimensions are, which are refused without it.
        **hyperparameters
            Hyperparameters of this rule.

        Returns
        -------
        dict
            Rules by pattern; `Optimizer.describe` shows the rule of each leaf.

        Raises
        ------
        TypeError, ValueError
            If a name matches nothing, `filters` is needed, or a hyperparameter does not fit.

        Examples
        --------
        >>> import numpy as np, fusedopt as fo
        >>> block = {"w": np.ones((4, 4)), "gain": np.ones(4)}
        >>> params = {"embed": np.ones((9, 4)), "blocks": [block]}
        >>> for pattern, rule in fo.Muon.with_adamw(params, fo.AdamW(), lr=0.01).items():
        ...     print(pattern, rule.summary())
        blocks.*.w Muon(lr=0.01)
        * AdamW(lr=0.001)
        """
        if adamw is None:
            adamw = AdamW(lr=3e-4, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
        if filters is not None:
            check_field("with_adamw(filters)", Literal["matrices", "adamw"], filters)
        return by_kind(params, cls(**hyperparameters), adamw, names, filters)

    def matrices(self, shape: tuple[int, ...]) -> Stack:
        raise NotImplementedError

    def reserve(self, shape: tuple[int, ...]) -> int:
        """Return the bytes that `between` needs for a leaf, which must be free before a step."""
        return 0

    def before(self, t: int, sides: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return new values of a leaf's side states, which are in `sides` in `between`.

        They are found for all leaves before anything is written: whatever may raise or needs memory
        belongs here.
        """
        return {}

    def between(
        self,
        phase: int,
        works: Sequence[np.ndarray],
        space: Workspace,
        members: Sequence[Member | None],
    ) -> None:
        """Change the workspace between the phases of a rule, in place, after each but the last.

        phase: that which has just run. works: by name as `self.works`; the first axis is that of
        parameters of one shape; each lies at the beginning of one of the space's directions.
        members: of each of these parameters, None where it takes no part in the step. Must neither
        raise nor need memory beyond `reserve`: the matrices before these have been updated by then.
        """
        raise NotImplementedError

    def on_device(
        self, phase: int, works: Mapping[str, Any], sides: Mapping[str, Any], algebra: DeviceAlgebra
    ) -> dict[str, Any]:
        """Do the same as `between`, for one leaf, with arrays of a library on a device.

        works: by name, changed in place. sides: the leaf's side states. Returns new values of
        these, which are not written. A rule without this method is refused there.
        """
        raise NotImplementedError

    @property
    def host_only(self) -> bool:
        return type(self).on_device is MatrixRule.on_device

    def refuses(self, p: np.ndarray) -> str | None:
        if p.ndim > 1:
            return None
        own = type(self).__name__
        return (
            f"{own} updates arrays of two dimensions or more, got shape {p.shape}; send it to AdamW"
            f" by a pattern: {{'<this path>': fo.AdamW(), '*': fo.{own}()}}"
        )


def through(u: Array, function: Callable[[np.ndarray], Any], gain: float) -> Any:
    """`function` of a reference's array, which amplifies rounding up to `gain` times."""
    return function(u) if isinstance(u, np.ndarray) else u.through(function, gain)


def one(t: int, lr: float) -> tuple[float, ...]:
    """The scalars of an operation that takes the gradient as it is."""
    return (1.0,)


def multiply(
    left: np.ndarray | None, x: np.ndarray, right: np.ndarray | None, spare: np.ndarray
) -> None:
    """x := left x right, None standing for the identity; spare: of x's shape, overwritten."""
    if left is None:
        np.copyto(spare, x)
    else:
        np.matmul(left, x, out=spare)
    if right is None:
        np.copyto(x, spare)
    else:
        np.matmul(spare, right, out=x)


def accumulate(
    moment: np.ndarray, x: np.ndarray, spare: np.ndarray, keep: float, gain: float
) -> None:
    """moment := keep moment + gain x x^T, by as many rows at a time as there is room for.

    spare: with as many elements as x, contiguous, overwritten.
    """
    n, width = x.shape
    for k in range(0, n, width):
        part, rows = x[k : k + width], moment[k : k + width]
        product = spare.reshape(-1)[: rows.size].reshape(rows.shape)
        np.matmul(part, x.T, out=product)
        product *= gain
        rows *= keep
        rows += product
        without_denormals(rows, product)


@functools.cache
def limits(dtype: np.dtype) -> tuple[float, float]:
    """Return the smallest normal number and the largest, which take `np.finfo` a microsecond."""
    found = np.finfo(dtype)
    return float(found.smallest_normal), float(found.max)


def without_denormals(x: np.ndarray, spare: np.ndarray) -> None:
    """Put zero in the place of what is below the smallest normal number, as all states have it.

    spare: of x's shape, overwritten.
    """
    np.abs(x, out=spare)
    np.greater_equal(spare, limits(x.dtype)[0], out=spare)
    x *= spare
