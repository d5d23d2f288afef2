"""Schedules: the learning rate of each step, as values that can be compared, pickled and printed.

A schedule is called with the optimizer's step number, 1 for the first step, and is a rule's `lr`:

>>> import fusedopt as fo
>>> lr = fo.schedules.Cosine(1e-3, steps=1000, warmup=100, final=0.1)
>>> rule = fo.AdamW(lr=lr)
>>> [round(lr(step), 6) for step in (1, 50, 100, 550, 1000, 2000)]
[1e-05, 0.0005, 0.001, 0.00055, 0.0001, 0.0001]

Its attribute `base` is the learning rate that the shape scales: the peak, and what weight decay of
the form "independent" divides by. A warm-up rises from 0 at step 0, where there is none, to `base`
at step `warmup`; what falls is at its end in step `steps`, and stays there. torch counts from 0:
its schedulers give step t what these give step t - 1, so that its first step has the peak and its
last is not at the end. `OneCycle` and `Step` are counted as in torch.

Schedules can be multiplied with each other and with numbers, and `Sequential` runs one after
another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, field
from itertools import pairwise
from math import cos, pi, sqrt
from typing import Annotated, Any, Literal

from .rules.hyperparameters import Count, Fraction, NonNegative, Number, check_fields

__all__ = [
    "Constant",
    "Cosine",
    "Linear",
    "OneCycle",
    "Polynomial",
    "Product",
    "Schedule",
    "Sequential",
    "Step",
    "WarmupStableDecay",
]


@dataclass(frozen=True)
class Schedule(ABC):
    """What all have: a base, a call, products, and checks of what they are given.

    base: learning rate, at least 0. Raises TypeError for a value of the wrong kind and ValueError
    for one out of range.
    """

    base: NonNegative

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The learning rate of a step; 1 is the first."""

    def __mul__(self, other: Schedule | float) -> Product:
        return Product(self, other if isinstance(other, Schedule) else Constant(other))

    __rmul__ = __mul__


@dataclass(frozen=True)
class Constant(Schedule):
    """base min(1, t / warmup).

    warmup: steps, not necessarily whole. Source of the warm-up: Goyal et al. 2017, section 2.2.

    >>> lr = Constant(0.1, warmup=4)
    >>> [lr(step) for step in (1, 2, 4, 5)]
    [0.025, 0.05, 0.1, 0.1]
    """

    _: KW_ONLY
    warmup: NonNegative = 0.0

    def __call__(self, step: int) -> float:
        return self.base * (step / self.warmup if step < self.warmup else 1.0)


@dataclass(frozen=True)
class _Falling(Schedule):
    """A warm-up, and what falls from 1 to `final` times `base` between two steps after it."""

    steps: Count
    _: KW_ONLY
    warmup: NonNegative = 0.0
    final: Fraction = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup >= self.steps:
            raise ValueError(
                f"{type(self).__name__}(warmup): expected less than steps={self.steps}, got"
                f" {self.warmup!r}"
            )

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.base * (step / self.warmup)
        return self.base * self._fallen(_share(step, self._start, self.steps))

    @property
    def _start(self) -> float:
        """The step from which it falls."""
        return self.warmup

    @abstractmethod
    def _fallen(self, x: float) -> float:
        """What is left of `base` at a share of the way down."""


@dataclass(frozen=True)
class Linear(_Falling):
    """A straight line, up and then down.

        t < warmup    base t / warmup
        else          base (final + (1 - final) (1 - x)),
                      x = min(1, (t - warmup) / (steps - warmup))

    steps: the step at which it ends. warmup: fewer steps than that, not necessarily whole. final:
    share of `base` in [0, 1).

    >>> lr = Linear(0.1, steps=10, warmup=2)
    >>> [round(lr(step), 6) for step in (1, 2, 6, 10, 11)]
    [0.05, 0.1, 0.05, 0.0, 0.0]
    """

    def _fallen(self, x: float) -> float:
        return self.final + (1.0 - self.final) * (1.0 - x)


@dataclass(frozen=True)
class Polynomial(_Falling):
    """A power of the share of the steps that is left.

        t < warmup    base t / warmup
        else          base (final + (1 - final) (1 - x)^power),
                      x = min(1, (t - warmup) / (steps - warmup))

    steps: the step at which it ends. warmup: fewer steps than that, not necessarily whole. final:
    share of `base` in [0, 1). power: at least 0.

    Source: the "poly" policy of Chen et al. 2017 (DeepLab).

    >>> lr = Polynomial(0.1, steps=10, power=2.0)
    >>> [round(lr(step), 6) for step in (1, 5, 10)]
    [0.081, 0.025, 0.0]
    """

    _: KW_ONLY
    power: NonNegative = 1.0

    def _fallen(self, x: float) -> float:
        left: float = (1.0 - x) ** self.power
        return self.final + (1.0 - self.final) * left


@dataclass(frozen=True)
class Cosine(_Falling):
    """Half a wave of the cosine.

        t < warmup    base t / warmup
        else          base ((1 + final) / 2 + (1 - final) / 2 cos(pi x)),
                      x = min(1, (t - warmup) / (steps - warmup))

    steps: the step at which it ends. warmup: fewer steps than that, not necessarily whole. final:
    share of `base` in [0, 1).

    Source: Loshchilov & Hutter 2017 (SGDR), eq. (5), without restarts.

    >>> lr = Cosine(0.1, steps=10, warmup=2, final=0.2)
    >>> [round(lr(step), 6) for step in (1, 2, 6, 10)]
    [0.05, 0.1, 0.06, 0.02]
    """

    def _fallen(self, x: float) -> float:
        return (1.0 + self.final) / 2.0 + (1.0 - self.final) / 2.0 * cos(pi * x)


@dataclass(frozen=True)
class WarmupStableDecay(_Falling):
    """A warm-up, a plateau, and a fall in the last `decay` steps.

        t < warmup    base t / warmup
        else          base (final + (1 - final) d(x)),
                      x = (t - (steps - decay)) / decay, from 0 to 1

    d by `form`: "linear" 1 - x, "cosine" (1 + cos(pi x)) / 2, "sqrt" 1 - sqrt(x). steps: the step
    at which it ends. warmup, decay: steps, together at most so many, not necessarily whole. final:
    share of `base` in [0, 1).

    Sources: Hu et al. 2024 (MiniCPM); the forms: Hagele et al. 2024.

    >>> lr = WarmupStableDecay(0.1, steps=10, warmup=2, decay=4)
    >>> [round(lr(step), 6) for step in (1, 2, 6, 8, 10)]
    [0.05, 0.1, 0.1, 0.05, 0.0]
    """

    _: KW_ONLY
    decay: NonNegative
    form: Literal["linear", "cosine", "sqrt"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup > self._start:
            raise ValueError(
                f"WarmupStableDecay(decay): expected at most {self.steps - self.warmup:g}, the"
                f" steps={self.steps} less those of the warm-up, got {self.decay!r}"
            )

    @property
    def _start(self) -> float:
        return self.steps - self.decay

    def _fallen(self, x: float) -> float:
        left = {"linear": 1.0 - x, "cosine": (1.0 + cos(pi * x)) / 2.0, "sqrt": 1.0 - sqrt(x)}
        return self.final + (1.0 - self.final) * left[self.form]


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Up along a cosine from `start` to the peak, and down to `final`.

        t < peak      base (start + (1 - start) (1 - cos(pi (t - 1) / (peak - 1))) / 2)
        else          base (final + (1 - final) (1 + cos(pi x)) / 2),
                      x = min(1, (t - peak) / (steps - peak))

    peak = max(1, rise steps), a step that need not be whole. rise: share of the steps. start,
    final: shares of `base`; the defaults are those of torch's OneCycleLR, whose values these are,
    step for step. Source: Smith & Topin 2018.

    >>> lr = OneCycle(0.1, steps=10)
    >>> [round(lr(step), 6) for step in (1, 2, 3, 10)]
    [0.004, 0.052, 0.1, 0.0]
    """

    steps: Count
    _: KW_ONLY
    rise: Fraction = 0.3
    start: Fraction = 0.04
    final: Fraction = 4e-6

    def __call__(self, step: int) -> float:
        peak = max(1.0, self.rise * self.steps)
        if step < peak:
            low, x = self.start, 1.0 - _share(step, 1.0, peak)
        else:
            low, x = self.final, _share(step, peak, self.steps)
        return self.base * (low + (1.0 - low) * (1.0 + cos(pi * x)) / 2.0)


@dataclass(frozen=True)
class Step(Schedule):
    """base factor^floor((t - 1) / every): the first `every` steps have `base`.

    factor: in [0, 1). As torch's StepLR, step for step. Source: He et al. 2016, section 3.4.

    >>> lr = Step(0.1, every=3, factor=0.5)
    >>> [lr(step) for step in (1, 3, 4, 7)]
    [0.1, 0.1, 0.05, 0.025]
    """

    _: KW_ONLY
    every: Count
    factor: Fraction = 0.1

    def __call__(self, step: int) -> float:
        return self.base * self.factor ** ((step - 1) // self.every)


@dataclass(frozen=True)
class _OneOf:
    """The kind of a field that holds a schedule."""

    def accept(self, where: str, value: Any) -> Schedule:
        if not isinstance(value, Schedule):
            raise TypeError(f"{where}: expected a schedule of fo.schedules, got {value!r}")
        return value


@dataclass(frozen=True)
class _Several:
    """A tuple of any number of one kind."""

    each: Any

    def accept(self, where: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{where}: expected a tuple, got {value!r}")
        return tuple(self.each.accept(f"{where}[{k}]", v) for k, v in enumerate(value))


@dataclass(frozen=True)
class Product(Schedule):
    """left(t) right(t), also written left * right; `base` is the product of theirs.

    >>> lr = Constant(0.1, warmup=2) * Cosine(1.0, steps=4)
    >>> [round(lr(step), 6) for step in (1, 2, 3, 4)]
    [0.042678, 0.05, 0.014645, 0.0]
    >>> 0.5 * Constant(0.5)
    Product(left=Constant(base=0.5, warmup=0.0), right=Constant(base=0.5, warmup=0.0))
    """

    base: NonNegative = field(init=False, repr=False, compare=False)
    left: Annotated[Schedule, _OneOf()]
    right: Annotated[Schedule, _OneOf()]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "base", self.left.base * self.right.base)

    def __call__(self, step: int) -> float:
        return self.left(step) * self.right(step)


@dataclass(frozen=True)
class Sequential(Schedule):
    """One schedule after another; `base` is the largest of theirs.

        parts[k](t - at[k - 1])  for at[k - 1] < t <= at[k],  where at[-1] = 0

    parts: schedules, of which each counts its own steps from 1. at: the last step of each but the
    last, rising.

    >>> lr = Sequential((Constant(0.1), Linear(0.1, steps=4)), at=(2,))
    >>> [round(lr(step), 6) for step in (1, 2, 3, 4, 6)]
    [0.1, 0.1, 0.075, 0.05, 0.0]
    """

    base: NonNegative = field(init=False, repr=False, compare=False)
    parts: Annotated[tuple[Schedule, ...], _Several(_OneOf())]
    at: Annotated[tuple[int, ...], _Several(Number(low=1, integer=True))]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.at) != len(self.parts) - 1 or any(b <= a for a, b in pairwise(self.at)):
            raise ValueError(
                "Sequential(at): expected rising steps, one fewer than there are parts"
                f" ({len(self.parts)}), got {self.at}"
            )
        object.__setattr__(self, "base", max(part.base for part in self.parts))

    def __call__(self, step: int) -> float:
        k = sum(step > end for end in self.at)
        return self.parts[k](step - (0, *self.at)[k])


def _share(step: float, low: float, high: float) -> float:
    """How far a step is between two others, from 0 to 1."""
    if step >= high:
        return 1.0
    return (step - low) / (high - low) if step > low else 0.0
