"""The scale of the loss, for gradients in a dtype of narrow range."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

from .rules.hyperparameters import Count, Number, check_fields

LOWEST, HIGHEST = 2.0**-126, 2.0**127  # within float32's normal numbers


@dataclass(kw_only=True)
class LossScaler:
    """Scale of the loss, which grows while gradients are finite and shrinks when one is not.

    Parameters
    ----------
    scale : float in [2^-126, 2^127), default 65536
        Factor of the loss, so that small gradients do not vanish in float16.
    growth_factor : float, default 2
        At least 1. Multiplies the scale after `growth_interval` steps in a row without a skip.
    backoff_factor : float in (0, 1), default 0.5
        Multiplies the scale after a skipped step.
    growth_interval : int, default 2000
        Number of steps.
    good_steps : int, default 0
        Number of steps since the scale last changed.

    Raises
    ------
    TypeError
        If a value is of the wrong kind.
    ValueError
        If a value is out of range.

    Notes
    -----
    Defaults and semantics are those of torch.amp.GradScaler. A scale that would leave its range
    stays. Fields can be set; only `update` reads them.

    Examples
    --------
    >>> scaler = LossScaler(scale=1024.0, growth_interval=2)
    >>> for skipped in (True, False, False, False):
    ...     scaler.update(skipped)
    ...     print(scaler.scale)
    512.0
    512.0
    1024.0
    1024.0
    """

    scale: Annotated[float, Number(low=LOWEST, high=HIGHEST)] = 65536.0
    growth_factor: Annotated[float, Number(low=1.0)] = 2.0
    backoff_factor: Annotated[float, Number(low=LOWEST, high=1.0)] = 0.5
    growth_interval: Count = 2000
    good_steps: Annotated[int, Number(integer=True)] = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def update(self, skipped: bool) -> None:
        """Adapt the scale to a step.

        Parameters
        ----------
        skipped : bool
            Whether the step was skipped for a NaN or an infinity: `StepInfo.skipped`.

        Raises
        ------
        TypeError
            If `skipped` is no bool.
        """
        if not isinstance(skipped, bool):
            raise TypeError(f"skipped: expected True or False, got {skipped!r}")
        if skipped:
            self.good_steps = 0
            self._multiply(self.backoff_factor)
            return
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.good_steps = 0
            self._multiply(self.growth_factor)

    def _multiply(self, factor: float) -> None:
        if LOWEST <= self.scale * factor < HIGHEST:
            self.scale *= factor

    def state_dict(self) -> dict[str, float | int]:
        """Return all fields.

        Returns
        -------
        dict
            Numbers by the names of the fields.
        """
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set all fields.

        Parameters
        ----------
        state : dict
            Result of `state_dict`.

        Raises
        ------
        TypeError, ValueError
            If a name is missing or unknown, or a value does not fit. Nothing has changed then.
        """
        names = [field.name for field in fields(self)]
        if not isinstance(state, dict) or set(state) != set(names):
            raise ValueError(f"state_dict: expected a dict with {', '.join(names)}, got {state!r}")
        vars(self).update(vars(type(self)(**state)))
