"""The update rules, one module each, simplest first."""

from __future__ import annotations

from .adagrad import AdaGrad
from .adam import Adam, AdamW
from .adamuon import AdaMuon
from .base import Rule
from .custom import CustomRule
from .lion import Lion
from .momentum import Momentum
from .muon import Muon
from .nesterov import Nesterov
from .normuon import NorMuon
from .rmsprop import RMSProp
from .sgd import SGD
from .soap import SOAP
from .sophia import Sophia

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        *(SGD, Momentum, Nesterov, AdaGrad, RMSProp, Adam, AdamW, Lion, Sophia),
        *(Muon, NorMuon, AdaMuon, SOAP),
    )
}
"""Every rule by its lower-case name."""

__all__ = [
    "RULES",
    "SGD",
    "SOAP",
    "AdaGrad",
    "AdaMuon",
    "Adam",
    "AdamW",
    "CustomRule",
    "Lion",
    "Momentum",
    "Muon",
    "Nesterov",
    "NorMuon",
    "RMSProp",
    "Rule",
    "Sophia",
]
