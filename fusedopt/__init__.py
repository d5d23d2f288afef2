"""Fused in-place optimizer steps for NumPy arrays, from SGD to Muon."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__
from .system.isa import start

if TYPE_CHECKING:
    from . import examples as examples
    from . import hessian as hessian
    from . import interop as interop
    from . import schedules as schedules
    from .arrays.rows import Rows as Rows
    from .arrays.trees import Fixed as Fixed
    from .estimate import Estimate as Estimate
    from .estimate import estimate as estimate
    from .functional import global_norm as global_norm
    from .functional import update as update
    from .loss_scale import LossScaler as LossScaler
    from .optimizer import Optimizer as Optimizer
    from .orthogonalize import orthogonalize as orthogonalize
    from .plan.slow_weights import Lookahead as Lookahead
    from .rules import *  # noqa: F403
    from .runtime import info as info
    from .runtime import warmup as warmup
    from .sam import SAM as SAM
    from .step.info import StepInfo as StepInfo
    from .system.isa import get_isa as get_isa
    from .system.isa import get_threads as get_threads
    from .system.isa import set_isa as set_isa
    from .system.isa import set_threads as set_threads
    from .verification.plan import VerificationError as VerificationError
    from .verify import verify as verify

_SUBMODULES = ("examples", "hessian", "interop", "schedules")
_HOMES = {
    "arrays.rows": ("Rows",),
    "arrays.trees": ("Fixed",),
    "estimate": ("Estimate", "estimate"),
    "functional": ("global_norm", "update"),
    "loss_scale": ("LossScaler",),
    "optimizer": ("Optimizer",),
    "orthogonalize": ("orthogonalize",),
    "plan.slow_weights": ("Lookahead",),
    "runtime": ("info", "warmup"),
    "sam": ("SAM",),
    "step.info": ("StepInfo",),
    "system.isa": ("get_isa", "get_threads", "set_isa", "set_threads"),
    "verification.plan": ("VerificationError",),
    "verify": ("verify",),
}
"""Modules and their public names; those of `rules` are all its classes, and `RULES`."""


def __getattr__(name: str) -> Any:
    """Import everything at the first use of a public name: most of it is the making of classes,
    which would double the time that NumPy's own import takes."""
    if name in (*_SUBMODULES, "torch"):
        return import_module(f".{name}", __name__)
    if name == "__all__" or not name.startswith("_"):
        rules = vars(import_module(".rules", __name__))
        found = {n: rules[n] for n in rules if n == "RULES" or isinstance(rules[n], type)}
        for home, names in _HOMES.items():
            module = vars(import_module(f".{home}", __name__))
            found |= {n: module[n] for n in names}
        globals().update(found, __all__=sorted({*found, *_SUBMODULES}))
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


_FUNCTIONS = ("estimate", "orthogonalize", "verify")


class _Package(ModuleType):
    """The package's type: what has the name of its module is a function, and stays one when the
    module is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _FUNCTIONS or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
start()  # a bad value of an environment variable raises here
