"""Fused in-place optimizer steps for NumPy arrays, from SGD to Muon."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__
from .system.isa import start

if TYPE_CHECKING:
    from . import examples, hessian, interop, schedules
    from .arrays.rows import Rows
    from .arrays.trees import Fixed
    from .estimate import Estimate, estimate
    from .functional import global_norm, update
    from .loss_scale import LossScaler
    from .optimizer import Optimizer
    from .orthogonalize import orthogonalize
    from .rules import (
        ADOPT,
        LAMB,
        LARS,
        RULES,
        SGD,
        SOAP,
        AdaBelief,
        Adadelta,
        AdaGrad,
        Adam,
        AdaMax,
        AdaMuon,
        AdamW,
        Adan,
        AdEMAMix,
        CustomRule,
        Grams,
        LaProp,
        Lion,
        Momentum,
        Muon,
        NAdam,
        Nesterov,
        NorMuon,
        RAdam,
        RMSProp,
        Rprop,
        Rule,
        Signum,
        Sophia,
    )
    from .runtime import info, warmup
    from .step.info import StepInfo
    from .system.isa import get_isa, get_threads, set_isa, set_threads
    from .verification.plan import VerificationError
    from .verify import verify

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
    "Estimate",
    "Fixed",
    "Grams",
    "LaProp",
    "Lion",
    "LossScaler",
    "Momentum",
    "Muon",
    "NAdam",
    "Nesterov",
    "NorMuon",
    "Optimizer",
    "RAdam",
    "RMSProp",
    "Rows",
    "Rprop",
    "Rule",
    "Signum",
    "Sophia",
    "StepInfo",
    "VerificationError",
    "estimate",
    "examples",
    "get_isa",
    "get_threads",
    "global_norm",
    "hessian",
    "info",
    "interop",
    "orthogonalize",
    "schedules",
    "set_isa",
    "set_threads",
    "update",
    "verify",
    "warmup",
]

_SUBMODULES = ("examples", "hessian", "interop", "schedules", "torch")
_HOMES = (
    "arrays.rows",
    "arrays.trees",
    "estimate",
    "functional",
    "loss_scale",
    "optimizer",
    "orthogonalize",
    "rules",
    "runtime",
    "step.info",
    "system.isa",
    "verification.plan",
    "verify",
)


def __getattr__(name: str) -> Any:
    """Import everything at the first use of a public name: most of it is the making of classes,
    which would double the time that NumPy's own import takes."""
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for home in _HOMES:
        found = vars(import_module(f".{home}", __name__))
        globals().update({n: found[n] for n in set(__all__) & found.keys() - {*_SUBMODULES}})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package's type: `verify`, `estimate` and `orthogonalize` are functions, and stay so when
    the modules of these names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in __all__ or name in _SUBMODULES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
start()  # a bad value of an environment variable raises here
