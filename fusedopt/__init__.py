"""Fused in-place optimizer steps for NumPy arrays, from SGD to Muon."""

from __future__ import annotations

from . import hessian, schedules
from .estimate import Estimate, estimate
from .functional import update
from .optimizer import Optimizer, StepInfo
from .orthogonalize import orthogonalize
from .rules import (
    RULES,
    SGD,
    AdaGrad,
    Adam,
    AdamW,
    Lion,
    Momentum,
    Muon,
    Nesterov,
    RMSProp,
    Rule,
    Sophia,
)
from .runtime import get_isa, get_threads, info, set_isa, set_threads
from .verify import VerificationError, verify

__version__ = "0.1.0"

__all__ = [
    "RULES",
    "SGD",
    "AdaGrad",
    "Adam",
    "AdamW",
    "Estimate",
    "Lion",
    "Momentum",
    "Muon",
    "Nesterov",
    "Optimizer",
    "RMSProp",
    "Rule",
    "Sophia",
    "StepInfo",
    "VerificationError",
    "estimate",
    "get_isa",
    "get_threads",
    "hessian",
    "info",
    "orthogonalize",
    "schedules",
    "set_isa",
    "set_threads",
    "update",
    "verify",
]
