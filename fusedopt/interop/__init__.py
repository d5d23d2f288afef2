"""Exchange the states of a run with PyTorch, optax and bitsandbytes.

`from_torch` and `to_torch` read and write the states of torch.optim's SGD, Adam, AdamW, Adagrad,
RMSprop and Muon, `from_optax` and `to_optax` those of optax's transformations. `from_bitsandbytes`
reads blockwise 8-bit states.

The argument `opt` is an `Optimizer` over the parameters as they are now, with the library's rule,
which `rules_from_torch(state_dict)`, `Rule.like("torch", ...)` or `Rule.like("optax", ...)` makes.
States are stored as `opt` stores them, masters and averages begin anew from the parameters, and the
run goes on with the library's trajectory but for rounding. A state that does not map raises
ValueError with every reason, and nothing has changed then. No library is imported, except torch by
`to_torch`.
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
