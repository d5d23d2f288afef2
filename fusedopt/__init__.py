"""Fused in-place optimizer steps for NumPy arrays, from SGD to Muon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import hessian
from .estimate import Estimate, estimate
from .functional import update
from .norms import global_norm
from .optimizer import Optimizer
from .orthogonalize import orthogonalize
from .rows import Rows
from .rules import (
    RULES,
    SGD,
    SOAP,
    Adadelta,
    AdaGrad,
    Adam,
    AdaMax,
    AdaMuon,
    AdamW,
    CustomRule,
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
    Sophia,
)
from .runtime import get_isa, get_threads, info, set_isa, set_threads, warmup
from .scaler import LossScaler
from .stepping import StepInfo
from .trees import Fixed
from .verify import VerificationError, verify

if TYPE_CHECKING:
    from . import examples, interop, schedules

__version__ = "0.1.0"

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
    "Estimate",
    "Fixed",
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
