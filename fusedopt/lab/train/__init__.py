"""A small GPT in NumPy, trained with any rule: the work behind `fusedopt train`."""

from __future__ import annotations

from .options import TrainOptions
from .recipes import LEARNING_RATES, peak_rate
from .report import Result
from .trainer import train

__all__ = ["LEARNING_RATES", "Result", "TrainOptions", "peak_rate", "train"]
