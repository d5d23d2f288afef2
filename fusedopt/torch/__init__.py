"""Optimizers for PyTorch: `torch.optim`'s classes, fused and in place on the CPU.

Each class has the signature, the defaults and the layout of `state_dict` of its namesake in
`torch.optim`, and loads and saves that one's checkpoints; `Optimizer` takes any rule of fusedopt.
"""

from __future__ import annotations

from .adam import Adam, Adamax, AdamW, NAdam, RAdam
from .offload import CPUOffload
from .optimizer import Optimizer
from .own import SOAP, AdaMuon, Lion, NorMuon, Sophia
from .rules import SGD, Adadelta, Adafactor, Adagrad, Muon, RMSprop, Rprop

__all__ = [
    "SGD",
    "SOAP",
    "AdaMuon",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "CPUOffload",
    "Lion",
    "Muon",
    "NAdam",
    "NorMuon",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "Rprop",
    "Sophia",
]
