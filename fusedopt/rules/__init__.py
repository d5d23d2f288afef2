"""The update rules, one module each, simplest first."""

from __future__ import annotations

from .adabelief import AdaBelief
from .adadelta import Adadelta
from .adagrad import AdaGrad
from .adam import Adam, AdamW
from .adamax import AdaMax
from .adamuon import AdaMuon
from .adan import Adan
from .ademamix import AdEMAMix
from .adopt import ADOPT
from .base import Rule
from .custom import CustomRule
from .grams import Grams
from .lamb import LAMB
from .laprop import LaProp
from .lars import LARS
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
from .signum import Signum
from .soap import SOAP
from .sophia import Sophia

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        *(SGD, Momentum, Nesterov, AdaGrad, RMSProp, Adam, AdamW, Lion, Sophia),
        *(AdaMax, Adadelta, NAdam, RAdam, Rprop),
        *(Signum, AdaBelief, ADOPT, AdEMAMix, Grams, LaProp, Adan),
        *(LARS, LAMB),
        *(Muon, NorMuon, AdaMuon, SOAP),
    )
}
"""Every rule by its lower-case name."""

__all__ = [
    "ADOPT",
    "LAMB",
    "LARS",
    "RULES",
    "SGD",
    "SOAP",
    "AdEMAMix",
    "AdaBelief",
    "AdaGrad",
    "AdaMax",
    "AdaMuon",
    "Adadelta",
    "Adam",
    "AdamW",
    "Adan",
    "CustomRule",
    "Grams",
    "LaProp",
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
    "Signum",
    "Sophia",
]
