"""Records learning rates of the schedules of PyTorch and optax into ``schedules.json``.

Run it in an environment that holds the libraries (torch, jax, optax):

    cd tests && python -m golden.record_schedules

Entry k of a list is the learning rate with which the library takes step k + 1. Each case names
the library's own function and arguments, and the schedule, in fusedopt's names, that gives the
same values: what the table in the documentation of ``fusedopt.schedules`` says.
"""

import importlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("schedules.json")
STEPS = 30
BASE = 0.1


def torch_cases() -> dict[str, Callable[[Any], Any]]:
    """Schedules of ours, as text, and PyTorch's of an optimizer."""
    s = importlib.import_module("torch.optim.lr_scheduler")

    def warm(opt: Any, steps: int, after: Any) -> Any:
        first = s.LinearLR(opt, 1 / steps, total_iters=steps - 1)
        return s.SequentialLR(opt, [first, after], milestones=[steps - 1])

    return {
        "Constant(0.1)": lambda o: s.ConstantLR(o, factor=1.0),
        "Constant(0.1, warmup=4)": lambda o: s.LinearLR(o, 1 / 4, total_iters=3),
        "Linear(0.1, 20, final=0.25)": lambda o: s.LinearLR(o, 1.0, 0.25, total_iters=20),
        "Linear(0.1, 20, warmup=5, final=0.25)": lambda o: warm(
            o, 5, s.LinearLR(o, 1.0, 0.25, total_iters=16)
        ),
        "Polynomial(0.1, 20, power=2)": lambda o: s.PolynomialLR(o, 20, power=2.0),
        "Cosine(0.1, 20, final=0.1)": lambda o: s.CosineAnnealingLR(o, 20, eta_min=0.01),
        "Cosine(0.1, 20, warmup=5)": lambda o: warm(o, 5, s.CosineAnnealingLR(o, 16)),
        "CosineRestarts(0.1, 4, growth=2, final=0.2)": lambda o: s.CosineAnnealingWarmRestarts(
            o, 4, 2, eta_min=0.02
        ),
        "CosineRestarts(0.1, 7)": lambda o: s.CosineAnnealingWarmRestarts(o, 7),
        "WarmupStableDecay(0.1, 20, warmup=4, decay=8, final=0.1)": lambda o: s.SequentialLR(
            o,
            [
                s.LinearLR(o, 1 / 4, total_iters=3),
                s.ConstantLR(o, factor=1.0),
                s.LinearLR(o, 1.0, 0.1, total_iters=8),
            ],
            milestones=[3, 12],
        ),
        "OneCycle(0.1, 20)": lambda o: s.OneCycleLR(
            o, 0.1, total_steps=21, pct_start=7 / 21, div_factor=25, final_div_factor=1e4
        ),
        "Step(0.1, every=6, factor=0.5)": lambda o: s.StepLR(o, 6, gamma=0.5),
        "Exponential(0.1, factor=0.9)": lambda o: s.ExponentialLR(o, 0.9),
        "InverseSqrt(0.1, warmup=8)": lambda o: s.LambdaLR(
            o, lambda c: min((c + 1) / 8, (8 / (c + 1)) ** 0.5)
        ),
        "Sequential((Constant(0.1), Step(0.1, every=2, factor=0.5)), at=(3,))": (
            lambda o: s.SequentialLR(
                o, [s.ConstantLR(o, 1.0), s.StepLR(o, 2, gamma=0.5)], milestones=[3]
            )
        ),
    }


def optax_cases() -> dict[str, Any]:
    """Schedules of ours, as text, and optax's."""
    o = importlib.import_module("optax")

    return {
        "Constant(0.1)": o.constant_schedule(0.1),
        "Linear(0.1, 20, final=0.25)": o.linear_schedule(0.1, 0.025, 20),
        "Polynomial(0.1, 20, warmup=5, power=3, final=0.2)": o.join_schedules(
            [o.linear_schedule(0.02, 0.1, 4), o.polynomial_schedule(0.1, 0.02, 3, 16)], [4]
        ),
        "Cosine(0.1, 20, final=0.1)": o.cosine_decay_schedule(0.1, 20, 0.1),
        "Cosine(0.1, 20, warmup=5, final=0.1)": o.warmup_cosine_decay_schedule(
            0.02, 0.1, 4, 20, 0.01
        ),
        "CosineRestarts(0.1, 4, growth=2, final=0.2)": o.join_schedules(
            [o.cosine_decay_schedule(0.1, n, 0.2) for n in (4, 8, 16, 32)], [4, 12, 28]
        ),
        "WarmupStableDecay(0.1, 20, decay=8, final=0.1)": o.join_schedules(
            [o.constant_schedule(0.1), o.linear_schedule(0.1, 0.01, 8)], [12]
        ),
        "OneCycle(0.1, 20)": o.cosine_onecycle_schedule(20, 0.1, 0.3, 25, 1e4),
        "Step(0.1, every=6, factor=0.5)": o.exponential_decay(0.1, 6, 0.5, staircase=True),
        "Exponential(0.1, factor=0.5, every=6)": o.exponential_decay(0.1, 6, 0.5),
    }


LOSSES = [5, 4, 4, 4.1, 3, 3, 2.9999, 3, 3, 3, 2, float("inf"), 2, 2, 2, 2, 2, 1.9, 1.95, 2]


def plateau() -> list[float]:
    """PyTorch's learning rate after each loss."""
    torch = importlib.import_module("torch")
    opt = torch.optim.SGD([torch.zeros(1)], lr=BASE)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        opt, factor=0.5, patience=2, threshold=1e-3, cooldown=1, min_lr=0.03
    )
    rates = []
    for loss in LOSSES:
        scheduler.step(loss)
        rates.append(opt.param_groups[0]["lr"])
    return rates


def main() -> None:
    jax, torch = importlib.import_module("jax"), importlib.import_module("torch")
    warnings.simplefilter("ignore")
    jax.config.update("jax_enable_x64", True)
    recorded: dict[str, Any] = {"torch": {}, "optax": {}, "losses": LOSSES, "plateau": plateau()}
    for ours, make in torch_cases().items():
        opt = torch.optim.SGD([torch.zeros(1)], lr=BASE)
        scheduler, rates = make(opt), []
        # torch's OneCycleLR ends there, and its cosine rises again
        for _ in range(20 if ours.startswith(("OneCycle", "Cosine(")) else STEPS):
            rates.append(float(opt.param_groups[0]["lr"]))
            opt.step()
            scheduler.step()
        recorded["torch"][ours] = rates
    for ours, schedule in optax_cases().items():
        recorded["optax"][ours] = [float(schedule(jax.numpy.int64(c))) for c in range(STEPS)]
    FILE.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
