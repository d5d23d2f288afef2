"""All rules on one model, side by side: the work behind `fusedopt race`."""

from __future__ import annotations

from .options import QUICK, RaceOptions
from .result import Outcome, Race
from .run import race

__all__ = ["QUICK", "Outcome", "Race", "RaceOptions", "race"]
