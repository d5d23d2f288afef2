"""Runs that move between libraries: the states of PyTorch, optax and bitsandbytes, both ways.

    from_torch(opt, state_dict)      to_torch(opt)              torch.optim: SGD, Adam, AdamW,
                                                                Adagrad, RMSprop, Muon
    from_optax(opt, state)           to_optax(opt, template)    the transformations of optax
    from_bitsandbytes(opt, state_dict)                          8-bit states, blockwise

`opt` is an `Optimizer` over the parameters as they are now, with the library's rule: of
`rules_from_torch(state_dict)`, or `Rule.like("torch", ...)` and `Rule.like("optax", ...)`. States
are stored as `opt` stores them, masters and averages begin anew as the parameters are, and the run
goes on with the library's trajectory but for rounding. What does not map is refused: ValueError
with every reason, and nothing has changed. No library is imported, but torch by `to_torch`.
"""

from __future__ import annotations

from .bitsandbytes import from_bitsandbytes
from .optax import from_optax, to_optax
from .torch import from_torch, rules_from_torch, to_torch

__all__ = [
    "from_bitsandbytes",
    "from_optax",
    "from_torch",
    "rules_from_torch",
    "to_optax",
    "to_torch",
]
