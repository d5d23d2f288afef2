"""Schedules: the learning rate of each step, as values that can be compared, pickled and printed.

A schedule is called with the optimizer's step number, 1 for the first step. It is a rule's `lr`, or
any other of its numbers (`weight_decay=Linear(0.1, steps=1000)`), or `Optimizer(ema=...)`:

>>> import fusedopt as fo
>>> lr = fo.schedules.Cosine(1e-3, steps=1000, warmup=100, final=0.1)
>>> rule = fo.AdamW(lr=lr)
>>> [round(lr(step), 6) for step in (1, 50, 100, 1000, 1001)]
[1e-05, 0.0005, 0.001, 0.0001, 0.0001]

Its attribute `base` is the learning rate that the shape scales: the peak, and what weight decay of
the form "independent" divides by.

Every schedule counts alike. Its value in step t is what optax's closed form has at count t - 1, and
what PyTorch's scheduler has after t - 1 calls of its `step`: the first step has the peak, or the
first rung of the warm-up, which is never 0. A warm-up reaches `base` in step `warmup`. What falls
over `steps` steps is at its end in step `steps` + 1, so that the last step is not lost at zero.

Schedules can be multiplied with each other and with numbers, and `Sequential` runs one after
another.

Notes
-----
The same values elsewhere, in step t, with b = base, n = steps, w = max(warmup, 1), f = final.
PyTorch: after t - 1 calls of `step` of a scheduler of an optimizer whose lr is b. optax and Keras:
at count t - 1. A warm-up before any schedule S is the library's own in front of it:
`SequentialLR([LinearLR(1 / w, total_iters=w - 1), S], milestones=[w - 1])` and
`join_schedules([linear_schedule(b / w, b, w - 1), S], [w - 1])`.

====================  ===========================================================================
`Constant`            torch `ConstantLR(factor=1)`, optax `constant_schedule(b)`
`Linear`              torch `LinearLR(1, f, total_iters=n - w + 1)`,
                      optax `linear_schedule(b, f b, n - w + 1)`,
                      Keras `PolynomialDecay(b, n - w + 1, f b)`
`Polynomial`          the same with `power`: torch `PolynomialLR(n - w + 1, power)` (f = 0),
                      optax `polynomial_schedule(b, f b, power, n - w + 1)`,
                      Keras `PolynomialDecay(b, n - w + 1, f b, power)`
`Cosine`              torch `CosineAnnealingLR(n - w + 1, eta_min=f b)`,
                      optax `cosine_decay_schedule(b, n - w + 1, f)`; with its warm-up
                      `warmup_cosine_decay_schedule(b / w, b, w - 1, n, f b)`,
                      Keras `CosineDecay(b / w, n - w + 1, f, warmup_target=b, warmup_steps=w - 1)`
`CosineRestarts`      torch `CosineAnnealingWarmRestarts(period, growth, eta_min=f b)`,
                      optax `sgdr_schedule`, with one entry for each period,
                      Keras `CosineDecayRestarts(b, period, t_mul=growth, alpha=f)`
`WarmupStableDecay`   optax `join_schedules([constant_schedule(b), linear_schedule(b, f b, decay)],
                      [n - decay])`; torch `SequentialLR` in the same way
`OneCycle`            optax `cosine_onecycle_schedule(n, b, rise, 1 / start, start / f)`,
                      torch `OneCycleLR(b, total_steps=n + 1, pct_start=(rise n + 1) / (n + 1),
                      div_factor=1 / start, final_div_factor=start / f)`
`Step`                torch `StepLR(every, factor)`,
                      optax `exponential_decay(b, every, factor, staircase=True)`,
                      Keras `ExponentialDecay(b, every, factor, staircase=True)`
`Exponential`         torch `ExponentialLR(factor)` (every = 1),
                      optax `exponential_decay(b, every, factor)`,
                      Keras `ExponentialDecay(b, every, factor)`
`InverseSqrt`         torch `LambdaLR(lambda c: min((c + 1) / w, (w / (c + 1)) ** 0.5))`
`ReduceOnPlateau`     torch `ReduceLROnPlateau`, whose `step(loss)` is `tell(loss)`; Keras's
                      callback with patience + 1, whose `min_delta` is a difference, not a share
====================  ===========================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, asdict, dataclass, field
from itertools import pairwise
from math import cos, expm1, inf, log, pi, sqrt
from typing import Annotated, Any, Literal

from .rules.hyperparameters import Amount, Count, Number, Share, check_fields

__all__ = [
    "Constant",
    "Cosine",
    "CosineRestarts",
    "EmaDebiased",
    "EmaWarmup",
    "Exponential",
    "InverseSqrt",
    "Linear",
    "OneCycle",
    "Polynomial",
    "Product",
    "ReduceOnPlateau",
    "Schedule",
    "Sequential",
    "Step",
    "WarmupStableDecay",
]


Formula = tuple[str, tuple[float, ...], tuple[Any, ...]]
"""A kind, its numbers, and the formulas of parts: from these the compiled core (csrc/schedules.cpp)
computes the values of a schedule, in the same operations."""


def formula_of(schedule: Any) -> Formula | None:
    """The formula of a schedule of this module; None for what only Python can compute."""
    return schedule.formula if type(schedule).__module__ == __name__ else None


@dataclass(frozen=True)
class Schedule(ABC):
    """The base of all schedules: a base value, a call, products, and checks of arguments.

    base: learning rate, at least 0. Raises TypeError for a value of the wrong kind and ValueError
    for one out of range.
    """

    base: Amount

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def formula(self) -> Formula | None:
        """The numbers from which the core computes the values; None where it cannot."""
        return None

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The learning rate of a step; 1 is the first."""

    def __mul__(self, other: Schedule | float) -> Product:
        return Product(self, other if isinstance(other, Schedule) else Constant(other))

    __rmul__ = __mul__


@dataclass(frozen=True)
class Constant(Schedule):
    """A learning rate that stays, after a warm-up: base min(1, t / warmup).

    Notes
    -----
    warmup: steps, not necessarily whole. Source of the warm-up: Goyal et al. 2017, section 2.2.

    Examples
    --------
    >>> lr = Constant(0.1, warmup=4)
    >>> [lr(step) for step in (1, 2, 4, 5)]
    [0.025, 0.05, 0.1, 0.1]
    """

    _: KW_ONLY
    warmup: Amount = 0.0

    @property
    def formula(self) -> Formula | None:
        return "constant", (self.base, self.warmup), ()

    def __call__(self, step: int) -> float:
        return self.base * (step / self.warmup if step < self.warmup else 1.0)


@dataclass(frozen=True)
class _Falling(Schedule):
    """A warm-up, and what falls from 1 to `final` times `base` between two steps after it."""

    steps: Count
    _: KW_ONLY
    warmup: Amount = 0.0
    final: Share = 0.0

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
        return self.base * self._fallen(_share(step, self._start, self.steps + 1.0))

    @property
    def formula(self) -> Formula | None:
        ends = (self._start, self.steps + 1.0)
        return self._kind, (self.base, self.warmup, *ends, self.final, *self._more), ()

    @property
    def _kind(self) -> str:
        """The name of the way down."""
        return type(self).__name__.lower()

    @property
    def _more(self) -> tuple[float, ...]:
        """The further numbers of its formula."""
        return ()

    @property
    def _start(self) -> float:
        """The last step at the peak."""
        return max(self.warmup, 1.0)

    @abstractmethod
    def _fallen(self, x: float) -> float:
        """Return what is left of `base` at a share of the way down."""


@dataclass(frozen=True)
class Linear(_Falling):
    """A straight line, up and then down.

    Notes
    -----
    ::

        t < warmup    base t / warmup
        else          base (final + (1 - final) (1 - x)),
                      x = min(1, (t - w) / (steps + 1 - w)),  w = max(warmup, 1)

    steps: number of steps of the run; it ends in the one after. warmup: fewer steps than that, not
    necessarily whole. final: share of `base` in [0, 1).

    Examples
    --------
    >>> lr = Linear(0.1, steps=10, warmup=2)
    >>> [round(lr(step), 6) for step in (1, 2, 5, 10, 11)]
    [0.05, 0.1, 0.066667, 0.011111, 0.0]
    """

    def _fallen(self, x: float) -> float:
        return self.final + (1.0 - self.final) * (1.0 - x)


@dataclass(frozen=True)
class Polynomial(_Falling):
    """A power of the share of the steps that is left.

    Notes
    -----
    ::

        t < warmup    base t / warmup
        else          base (final + (1 - final) (1 - x)^power),
                      x = min(1, (t - w) / (steps + 1 - w)),  w = max(warmup, 1)

    steps: number of steps of the run; it ends in the one after. warmup: fewer steps than that, not
    necessarily whole. final: share of `base` in [0, 1). power: at least 0.

    References
    ----------
    The "poly" policy of Chen et al. 2017 (DeepLab).

    Examples
    --------
    >>> lr = Polynomial(0.1, steps=10, power=2.0)
    >>> [round(lr(step), 6) for step in (1, 6, 10, 11)]
    [0.1, 0.025, 0.001, 0.0]
    """

    _: KW_ONLY
    power: Amount = 1.0

    @property
    def _more(self) -> tuple[float, ...]:
        return (self.power,)

    def _fallen(self, x: float) -> float:
        left: float = (1.0 - x) ** self.power
        return self.final + (1.0 - self.final) * left


@dataclass(frozen=True)
class Cosine(_Falling):
    """Half a wave of the cosine.

    Notes
    -----
    ::

        t < warmup    base t / warmup
        else          base ((1 + final) / 2 + (1 - final) / 2 cos(pi x)),
                      x = min(1, (t - w) / (steps + 1 - w)),  w = max(warmup, 1)

    steps: number of steps of the run; it ends in the one after. warmup: fewer steps than that, not
    necessarily whole. final: share of `base` in [0, 1).

    References
    ----------
    Loshchilov & Hutter 2017 (SGDR), eq. (5), without restarts.

    Examples
    --------
    >>> lr = Cosine(0.1, steps=11, warmup=2, final=0.2)
    >>> [round(lr(step), 6) for step in (1, 2, 7, 11, 12)]
    [0.05, 0.1, 0.06, 0.021958, 0.02]
    """

    def _fallen(self, x: float) -> float:
        return (1.0 + self.final) / 2.0 + (1.0 - self.final) / 2.0 * cos(pi * x)


@dataclass(frozen=True)
class WarmupStableDecay(_Falling):
    """A warm-up, a plateau, and a fall in the last `decay` steps.

    Notes
    -----
    ::

        t < warmup    base t / warmup
        else          base (final + (1 - final) d(x)),
                      x = (t - 1 - (steps - decay)) / decay, from 0 to 1

    d by `form`: "linear" 1 - x, "cosine" (1 + cos(pi x)) / 2, "sqrt" 1 - sqrt(x). steps: number of
    steps of the run; it ends in the one after. warmup, decay: numbers of steps, together at most
    `steps`, not necessarily whole. final: share of `base` in [0, 1).

    References
    ----------
    Hu et al. 2024 (MiniCPM); the forms: Hagele et al. 2024.

    Examples
    --------
    >>> lr = WarmupStableDecay(0.1, steps=10, warmup=2, decay=4)
    >>> [round(lr(step), 6) for step in (1, 2, 6, 8, 10)]
    [0.05, 0.1, 0.1, 0.075, 0.025]
    """

    _: KW_ONLY
    decay: Amount
    form: Literal["linear", "cosine", "sqrt"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup > self.steps - self.decay:
            raise ValueError(
                f"WarmupStableDecay(decay): expected at most {self.steps - self.warmup:g}, the"
                f" steps={self.steps} less those of the warm-up, got {self.decay!r}"
            )

    @property
    def _kind(self) -> str:
        return {"linear": "linear", "cosine": "half cosine", "sqrt": "root"}[self.form]

    @property
    def _start(self) -> float:
        return self.steps - self.decay + 1.0

    def _fallen(self, x: float) -> float:
        left = {"linear": 1.0 - x, "cosine": (1.0 + cos(pi * x)) / 2.0, "sqrt": 1.0 - sqrt(x)}
        return self.final + (1.0 - self.final) * left[self.form]


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Up along a cosine from `start` to the peak, and down to `final`.

    Notes
    -----
    ::

        t <= 1 + r    base (start + (1 - start) (1 - cos(pi (t - 1) / r)) / 2),  r = rise steps
        else          base (final + (1 - final) (1 + cos(pi x)) / 2),
                      x = min(1, (t - 1 - r) / (steps - r))

    steps: number of steps of the run; it ends in the one after. rise: share of the steps. start,
    final: shares of `base`; the defaults are those of torch's OneCycleLR.

    References
    ----------
    Smith & Topin 2018.

    Examples
    --------
    >>> lr = OneCycle(0.1, steps=10)
    >>> [round(lr(step), 6) for step in (1, 2, 4, 10, 11)]
    [0.004, 0.028, 0.1, 0.004952, 0.0]
    """

    steps: Count
    _: KW_ONLY
    rise: Share = 0.3
    start: Share = 0.04
    final: Share = 4e-6

    @property
    def formula(self) -> Formula | None:
        peak, end = 1.0 + self.rise * self.steps, self.steps + 1.0
        return "one cycle", (self.base, peak, end, self.start, self.final), ()

    def __call__(self, step: int) -> float:
        peak, end = 1.0 + self.rise * self.steps, self.steps + 1.0
        if step < peak:
            low, x = self.start, 1.0 - _share(step, 1.0, peak)
        else:
            low, x = self.final, _share(step, peak, end)
        return self.base * (low + (1.0 - low) * (1.0 + cos(pi * x)) / 2.0)


@dataclass(frozen=True)
class CosineRestarts(Schedule):
    """Half waves of the cosine, each `growth` times as long as the one before.

    Notes
    -----
    ::

        base ((1 + final) / 2 + (1 - final) / 2 cos(pi x)),
        x = share of the present wave that is over, 0 in its first step

    period: number of steps of the first wave. growth: at least 1. final: share of `base` in [0, 1).

    References
    ----------
    Loshchilov & Hutter 2017 (SGDR), eq. (5).

    Examples
    --------
    >>> lr = CosineRestarts(0.1, period=2, growth=2)
    >>> [round(lr(step), 6) for step in (1, 2, 3, 5, 7)]
    [0.1, 0.05, 0.1, 0.05, 0.1]
    """

    period: Count
    _: KW_ONLY
    growth: Annotated[float, Number(low=1.0)] = 1.0
    final: Share = 0.0

    @property
    def formula(self) -> Formula | None:
        return "restarts", (self.base, self.period, self.growth, self.final), ()

    def __call__(self, step: int) -> float:
        since, length = float(step - 1), float(self.period)
        if self.growth == 1.0:
            since %= length
        while since >= length:
            since -= length
            length *= self.growth
        half = (1.0 - self.final) / 2.0
        return self.base * (self.final + half * (1.0 + cos(pi * since / length)))


@dataclass(frozen=True)
class Step(Schedule):
    """A stair: base factor^floor((t - 1) / every), so that the first `every` steps have `base`.

    Notes
    -----
    factor: in [0, 1).

    References
    ----------
    He et al. 2016, section 3.4.

    Examples
    --------
    >>> lr = Step(0.1, every=3, factor=0.5)
    >>> [lr(step) for step in (1, 3, 4, 7)]
    [0.1, 0.1, 0.05, 0.025]
    """

    _: KW_ONLY
    every: Count
    factor: Share = 0.1

    @property
    def formula(self) -> Formula | None:
        return "stair", (self.base, self.factor, self.every), ()

    def __call__(self, step: int) -> float:
        return self.base * self.factor ** ((step - 1) // self.every)


@dataclass(frozen=True)
class Exponential(Schedule):
    """An exponential: base factor^((t - 1) / every).

    Notes
    -----
    factor: in [0, 1), what is left after each `every` steps.

    Examples
    --------
    >>> lr = Exponential(0.1, factor=0.25, every=2)
    >>> [lr(step) for step in (1, 2, 3)]
    [0.1, 0.05, 0.025]
    """

    _: KW_ONLY
    factor: Share
    every: Count = 1

    @property
    def formula(self) -> Formula | None:
        return "exponential", (self.base, self.factor, self.every), ()

    def __call__(self, step: int) -> float:
        left: float = self.factor ** ((step - 1) / self.every)
        return self.base * left


@dataclass(frozen=True)
class InverseSqrt(Schedule):
    """A warm-up, and the inverse square root: base min(t / warmup, sqrt(warmup / t)).

    Notes
    -----
    warmup: number of steps. With base = (width warmup)^-1/2 it is the schedule of the source,
    Vaswani et al. 2017, section 5.3 (known as Noam).

    Examples
    --------
    >>> lr = InverseSqrt(0.1, warmup=4)
    >>> [lr(step) for step in (1, 4, 16)]
    [0.025, 0.1, 0.05]
    """

    _: KW_ONLY
    warmup: Count

    @property
    def formula(self) -> Formula | None:
        return "inverse sqrt", (self.base, self.warmup), ()

    def __call__(self, step: int) -> float:
        return self.base * min(step / self.warmup, sqrt(self.warmup / step))


@dataclass
class _Told:
    """The result that a `ReduceOnPlateau` has drawn from the losses that it was told."""

    rate: float
    best: float = inf
    bad: int = 0
    rest: int = 0


@dataclass(frozen=True)
class ReduceOnPlateau(Schedule):
    """A learning rate that falls by `factor` when the loss, of which it is told, stops falling.

    Parameters
    ----------
    factor : float in [0, 1)
        By what a reduction multiplies the learning rate.
    patience : int
        How many losses in a row may be no better than the best before the rate is reduced.
    threshold : float in [0, 1)
        A loss is better if it is below the best by this share of the best.
    cooldown : int
        How many losses after a reduction are not counted against `patience`.
    minimum : float
        The rate never falls below this number.

    Notes
    -----
    The object changes with what it is told, and the value of a step is that of now, whatever the
    step's number. What it was told is no part of an optimizer's checkpoint: save its `state_dict()`
    beside one. Losses count as in torch's ReduceLROnPlateau; NaN is not better than anything.

    Examples
    --------
    >>> lr = ReduceOnPlateau(0.1, factor=0.5, patience=1)
    >>> for loss in (3.0, 2.0, 2.0, 2.0):
    ...     lr.tell(loss)
    >>> lr(5)
    0.05
    """

    _: KW_ONLY
    factor: Share = 0.1
    patience: Annotated[int, Number(integer=True)] = 10
    threshold: Share = 1e-4
    cooldown: Annotated[int, Number(integer=True)] = 0
    minimum: Amount = 0.0
    _told: _Told = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_told", _Told(self.base))

    def tell(self, loss: float) -> None:
        """Take note of a loss, after an epoch or whenever one is known."""
        told = self._told
        better = loss < told.best - self.threshold * abs(told.best)
        if told.best == inf:
            better = loss < inf
        if better:
            told.best = float(loss)
        told.bad = 0 if better else told.bad + 1
        if told.rest > 0:
            told.rest, told.bad = told.rest - 1, 0
        if told.bad > self.patience:
            told.rate = max(told.rate * self.factor, min(self.minimum, self.base))
            told.rest, told.bad = self.cooldown, 0

    def state_dict(self) -> dict[str, float]:
        """The learning rate, the best loss, and what is counted for patience and cooldown."""
        return asdict(self._told)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from what `state_dict` gave."""
        object.__setattr__(self, "_told", _Told(**state))  # type: ignore[arg-type]

    def __call__(self, step: int) -> float:
        return self._told.rate


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

    Examples
    --------
    >>> lr = Constant(0.1, warmup=2) * Cosine(1.0, steps=4)
    >>> [round(lr(step), 6) for step in (1, 2, 3, 4)]
    [0.05, 0.085355, 0.05, 0.014645]
    >>> 0.5 * Constant(0.5)
    Product(left=Constant(base=0.5, warmup=0.0), right=Constant(base=0.5, warmup=0.0))
    """

    base: Amount = field(init=False, repr=False, compare=False)
    left: Annotated[Schedule, _OneOf()]
    right: Annotated[Schedule, _OneOf()]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "base", self.left.base * self.right.base)

    @property
    def formula(self) -> Formula | None:
        parts = formula_of(self.left), formula_of(self.right)
        return None if None in parts else ("product", (), parts)

    def __call__(self, step: int) -> float:
        return self.left(step) * self.right(step)


@dataclass(frozen=True)
class Sequential(Schedule):
    """One schedule after another; `base` is the largest of theirs.

    Notes
    -----
    ::

        parts[k](t - at[k - 1])  for at[k - 1] < t <= at[k],  where at[-1] = 0

    parts: schedules, of which each counts its own steps from 1. at: the last step of each but the
    last, rising.

    Examples
    --------
    >>> lr = Sequential((Constant(0.1), Linear(0.1, steps=4)), at=(2,))
    >>> [round(lr(step), 6) for step in (1, 2, 3, 4, 6)]
    [0.1, 0.1, 0.1, 0.075, 0.025]
    """

    base: Amount = field(init=False, repr=False, compare=False)
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

    @property
    def formula(self) -> Formula | None:
        parts = tuple(map(formula_of, self.parts))
        return None if None in parts else ("sequential", self.at, parts)

    def __call__(self, step: int) -> float:
        k = sum(step > end for end in self.at)
        return self.parts[k](step - (0, *self.at)[k])


@dataclass(frozen=True)
class EmaWarmup:
    """A warm-up of averages of weights: min(decay, (1 + t) / (10 + t)), for `Optimizer(ema=...)`.

    decay: in [0, 1). The first steps move the average nearly to the parameters, so that what these
    were initialised with is soon forgotten.

    >>> [round(EmaWarmup(0.999)(step), 3) for step in (1, 90, 100_000)]
    [0.182, 0.91, 0.999]
    """

    decay: Share

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, step: int) -> float:
        """Return the share of the average that a step keeps."""
        return min(self.decay, (1 + step) / (10 + step))


@dataclass(frozen=True)
class EmaDebiased:
    """Averages of weights without bias: after t steps, sum decay^(t-k) p_k / sum decay^(t-k).

    decay: in [0, 1). As `Optimizer(ema=EmaDebiased(decay))` a step keeps the share
    decay (1 - decay^(t-1)) / (1 - decay^t), 0 in the first, so that the average is that of Adam's
    bias correction, of the parameters after each step.

    >>> [round(EmaDebiased(0.9)(step), 4) for step in (1, 2, 1000)]
    [0.0, 0.4737, 0.9]
    """

    decay: Share

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, step: int) -> float:
        """Return the share of the average that a step keeps."""
        if not self.decay:
            return 0.0
        rate = log(self.decay)
        return self.decay * (expm1((step - 1) * rate) / expm1(step * rate))


def _share(step: float, low: float, high: float) -> float:
    """Return how far a step is between two others, from 0 to 1."""
    if step >= high:
        return 1.0
    return (step - low) / (high - low) if step > low else 0.0
