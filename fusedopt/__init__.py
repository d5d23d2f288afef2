"""Fused in-place optimizer steps for NumPy arrays, from SGD to Muon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import hessian
from ._version import __version__ as __version__
from .arrays.rows import Rows
from .arrays.trees import Fixed
from .estimate import Estimate, estimate
from .functional import global_norm, update
from .loss_scale import LossScaler
from .optimizer import Optimizer
from .orthogonalize import orthogonalize
from .rules import (
    ADOPT,
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

if TYPE_CHECKING:
    from . import examples, interop, schedules


__all__ = [
    "ADOPT",
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


def __getattr__(name: str) -> Any:
    if name in ("examples", "interop", "schedules"):  # 8 ms of dataclasses, for who uses them
        import importlib

        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
