"""The update rules, one module each, simplest first."""

from __future__ import annotations

from .adagrad import AdaGrad
from .adam import Adam, AdamW
from .base import Rule
from .custom import CustomRule
from .lion import Lion
from .momentum import Momentum
from .muon import Muon
from .nesterov import Nesterov
from .rmsprop import RMSProp
from .sgd import SGD
from .sophia import Sophia

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (SGD, Momentum, Nesterov, AdaGrad, RMSProp, Adam, AdamW, Lion, Sophia, Muon)
}
"""Every rule by its lower-case name."""

__all__ = [
    "RULES",
    "SGD",
    "AdaGrad",
    "Adam",
    "AdamW",
    "CustomRule",
    "Lion",
    "Momentum",
    "Muon",
    "Nesterov",
    "RMSProp",
    "Rule",
    "Sophia",
]
