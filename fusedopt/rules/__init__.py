"""The update rules, one module each, simplest first."""

from __future__ import annotations

from .adadelta import Adadelta
from .adagrad import AdaGrad
from .adam import Adam, AdamW
from .adamax import AdaMax
from .adamuon import AdaMuon
from .base import Rule
from .custom import CustomRule
from .lion import Lion
from .momentum import Momentum
from .muon import Muon
from .nadam import NAdam
from .nesterov import Nesterov
from .normuon import NorMuon
from .radam import RAdam
from .rmsprop import RMSProp
from .rprop import Rprop
from .sgd import SGD
from .soap import SOAP
from .sophia import Sophia

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        *(SGD, Momentum, Nesterov, AdaGrad, RMSProp, Adam, AdamW, Lion, Sophia),
        *(AdaMax, Adadelta, NAdam, RAdam, Rprop),
        *(Muon, NorMuon, AdaMuon, SOAP),
    )
}
"""Every rule by its lower-case name."""

__all__ = [
    "RULES",
    "SGD",
    "SOAP",
    "AdaGrad",
    "AdaMax",
    "AdaMuon",
    "Adadelta",
    "Adam",
    "AdamW",
    "CustomRule",
    "Lion",
    "Momentum",
    "Muon",
    "NAdam",
    "Nesterov",
    "NorMuon",
    "RAdam",
    "RMSProp",
    "Rprop",
    "Rule",
    "Sophia",
]
