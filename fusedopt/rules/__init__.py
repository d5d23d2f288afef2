"""The update rules, one module each, simplest first: a new one is a line here."""
# ruff: noqa: I001

from __future__ import annotations

from .base import Rule as Rule
from .custom import CustomRule as CustomRule
from .sgd import SGD as SGD
from .momentum import Momentum as Momentum
from .nesterov import Nesterov as Nesterov
from .adagrad import AdaGrad as AdaGrad
from .rmsprop import RMSProp as RMSProp
from .adam import Adam as Adam, AdamW as AdamW
from .lion import Lion as Lion
from .sophia import Sophia as Sophia
from .adamax import AdaMax as AdaMax
from .adadelta import Adadelta as Adadelta
from .nadam import NAdam as NAdam
from .radam import RAdam as RAdam
from .rprop import Rprop as Rprop
from .signum import Signum as Signum
from .adabelief import AdaBelief as AdaBelief
from .adopt import ADOPT as ADOPT
from .ademamix import AdEMAMix as AdEMAMix
from .grams import Grams as Grams
from .laprop import LaProp as LaProp
from .adan import Adan as Adan
from .lars import LARS as LARS
from .lamb import LAMB as LAMB
from .cautious import CautiousAdamW as CautiousAdamW, CautiousLion as CautiousLion
from .tiger import Tiger as Tiger
from .mars import MARS as MARS
from .prodigy import Prodigy as Prodigy
from .dadapt import DAdaptAdam as DAdaptAdam, DAdaptSGD as DAdaptSGD
from .schedule_free import ScheduleFreeAdamW as ScheduleFreeAdamW
from .schedule_free import ScheduleFreeSGD as ScheduleFreeSGD
from .adafactor import Adafactor as Adafactor
from .muon import Muon as Muon
from .normuon import NorMuon as NorMuon
from .adamuon import AdaMuon as AdaMuon
from .soap import SOAP as SOAP
from .shampoo import Shampoo as Shampoo
from .dion import Dion as Dion

RULES: dict[str, type[Rule]] = {
    found.name: found
    for found in [*globals().values()]
    if isinstance(found, type) and issubclass(found, Rule) and found not in (Rule, CustomRule)
}
"""Every rule by its lower-case name."""
