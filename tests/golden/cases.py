"""The settings of PyTorch, optax and Keras whose trajectories ``record.py`` takes down."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from golden import problem

Arguments = dict[str, Any]

CLASSES = {
    "sgd": "SGD",
    "momentum": "SGD",
    "nesterov": "SGD",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
    "adam": "Adam",
    "adamw": "AdamW",
    "lion": "Lion",
    "muon": "Muon",
    "adamax": "Adamax",
    "adadelta": "Adadelta",
    "nadam": "NAdam",
    "radam": "RAdam",
    "rprop": "Rprop",
    "adafactor": "Adafactor",
}
FUNCTIONS = {
    "torch": CLASSES,
    "keras": {**CLASSES, "nadam": "Nadam"},
    "optax": {
        "momentum": "sgd",
        "nesterov": "sgd",
        "schedulefreesgd": "schedule_free_sgd",
        "schedulefreeadamw": "schedule_free_adamw",
        "dadaptadam": "dadapt_adamw",
    },
}

# fusedopt's name -> the library's, where they differ. Several names take a tuple apart; None
# means that the library says it with other values, which the case gives itself.
NAMES: dict[str, dict[str, str | tuple[str, ...] | None]] = {
    "torch": {
        "rmsprop.rho": "alpha",
        "adafactor.eps": None,
        "eps_scale": None,
        "beta2_decay": None,
        "clip": "d",
        "initial_accumulator": "initial_accumulator_value",
        "amsgrad": None,
        "decay": None,
        "eps_inside": "eps",
        "scale": "adjust_lr_fn",
    },
    "optax": {
        "lr": "learning_rate",
        "betas": ("b1", "b2"),
        "prodigy.betas": "betas",
        "dadaptadam.betas": "betas",
        "d0": "estim_lr0",
        "coef": "estim_lr_coef",
        "beta2_decay": "decay_rate",
        "adafactor.clip": "clipping_threshold",
        "scale_parameter": "multiply_by_parameter_scale",
        "min_dim": "min_dim_size_to_factor",
        "safeguard": "safeguard_warmup",
        "ademamix.betas": ("b1", "b2", "b3"),
        "adan.betas": ("b1", "b2", "b3"),
        "signum.momentum": "beta",
        "schedulefreesgd.momentum": "b1",
        "amsgrad": None,
        "trust": "trust_coefficient",
        "eps_inside": "eps",
        "adagrad.eps_root": "eps",
        "adagrad.initial_accumulator": "initial_accumulator_value",
        "rmsprop.rho": "decay",
        "rmsprop.eps_root": "eps",
        "rmsprop.initial_accumulator": "initial_scale",
        "sophia.rho": "gamma",
        "clip": "clip_threshold",
        "muon.momentum": "beta",
        "ns_coefficients": "ns_coeffs",
        "scale": None,
    },
    "keras": {
        "lr": "learning_rate",
        "betas": ("beta_1", "beta_2"),
        "amsgrad": None,
        "eps": "epsilon",
        "eps_root": "epsilon",
        "initial_accumulator": "initial_accumulator_value",
        "ns_coefficients": ("muon_a", "muon_b", "muon_c"),
        "scale": None,
        "adafactor.eps": "epsilon_1",
        "eps_scale": "epsilon_2",
        "beta2_decay": None,
        "clip": "clip_threshold",
    },
}

COEFFICIENTS = (3.0, -4.0, 1.75)

# torch.optim.Muon iterates in bfloat16, keras.optimizers.Muon takes the norm in float32, and
# torch.optim.NAdam keeps the product of its momenta there, whatever the parameters are. What
# optax's radam finds of r - 4 is rounded a thousand times more than r. Most of D-Adaptation's
# product cancels. optax's adafactor finds t^-0.8 in float32, and Keras's its means. An element may
# be off by this share of the tensor's largest movement; the worst that was seen is 0.044, 2.5e-7,
# 1.3e-8, 3.6e-13, 1e-14, 1e-7 and 2.1e-7.
LOOSE = {
    ("torch", "muon"): 0.06,
    ("keras", "muon"): 1e-6,
    ("torch", "nadam"): 1e-7,
    ("optax", "radam"): 1e-12,
    ("optax", "dadaptadam"): 1e-13,
    ("optax", "adafactor"): 1e-6,
    ("keras", "adafactor"): 1e-6,
}


@dataclass(frozen=True)
class Case:
    """One rule of a library under one setting.

    ``function`` is the library's, ``hyperparameters`` are in fusedopt's names, and ``native``
    adds what the library has to be told in other words. What is not given keeps the library's
    default. ``schedule`` makes the learning rate vary by ``problem.learning_rate``.
    """

    library: str
    rule: str
    variant: str
    function: str
    hyperparameters: Arguments
    native: Arguments
    schedule: bool

    @property
    def tolerance(self) -> float | None:
        """The entry of ``LOOSE``, or None where the library computes in float64."""
        return LOOSE.get((self.library, self.rule))

    def lr(self, step: int) -> float:
        """The learning rate of a step, for a case that names one."""
        base: float = self.hyperparameters["lr"]
        return problem.learning_rate(base, step) if self.schedule else base

    def arguments(self) -> Arguments:
        """The library's arguments."""
        names = NAMES[self.library]
        arguments: Arguments = {"nesterov": True} if self.rule == "nesterov" else {}
        for name, value in self.hyperparameters.items():
            to = names.get(f"{self.rule}.{name}", names.get(name, name))
            if isinstance(to, str):
                arguments[to] = value
            elif to is not None:
                arguments |= zip(to, value, strict=True)
        return arguments | self.native


def case(
    library: str,
    rule: str,
    variant: str = "defaults",
    *,
    native: Arguments | None = None,
    function: str | None = None,
    schedule: bool = False,
    **hyperparameters: Any,
) -> Case:
    """A row of the table: a ``Case`` with its hyperparameters as keywords."""
    name = function or FUNCTIONS[library].get(rule, rule)
    return Case(library, rule, variant, name, hyperparameters, native or {}, schedule)


AMSGRAD = {"amsgrad": True}
EPS_OUTSIDE = {"eps_in_sqrt": False, "eps": 1e-4}
DECOUPLED = {"decoupled_weight_decay": True}
MATCH_RMS = {"consistent_rms": 0.2}

torch = partial(case, "torch")
optax = partial(case, "optax")
keras = partial(case, "keras")

CASES = [
    torch("sgd"),
    torch("sgd", "decay", lr=0.1, weight_decay=0.05, schedule=True),
    torch("sgd", "maximize", lr=0.1, weight_decay=0.05, maximize=True),
    torch("momentum", "default-lr", momentum=0.9),
    torch("momentum", "decay", lr=0.05, momentum=0.8, weight_decay=0.05, schedule=True),
    torch("momentum", "dampening", lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.05),
    torch("momentum", "maximize", lr=0.05, momentum=0.9, weight_decay=0.05, maximize=True),
    torch("nesterov", "default-lr", momentum=0.9),
    torch("nesterov", "decay", lr=0.05, momentum=0.8, weight_decay=0.05, schedule=True),
    torch("nesterov", "maximize", lr=0.05, momentum=0.8, weight_decay=0.05, maximize=True),
    torch("adagrad"),
    torch("adagrad", "lr-decay", lr=0.05, lr_decay=0.1, eps=1e-5, weight_decay=0.05),
    torch("adagrad", "accumulator", lr=0.05, initial_accumulator=1e-3, schedule=True),
    torch("adagrad", "maximize", lr=0.05, lr_decay=0.1, weight_decay=0.05, maximize=True),
    torch("rmsprop"),
    torch("rmsprop", "decay", lr=3e-3, rho=0.95, eps=1e-4, weight_decay=0.05),
    torch("rmsprop", "centered", lr=3e-3, centered=True, weight_decay=0.05),
    torch("rmsprop", "momentum", lr=3e-3, momentum=0.9, eps=1e-4, schedule=True),
    torch("rmsprop", "maximize", lr=3e-3, momentum=0.8, centered=True, maximize=True),
    torch("adam"),
    torch("adam", "decay", lr=0.01, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.05),
    torch("adam", "maximize", lr=0.01, weight_decay=0.05, maximize=True),
    torch("adam", "amsgrad", native=AMSGRAD, amsgrad="raw", betas=(0.8, 0.9), weight_decay=0.05),
    torch("adamw"),
    torch("adamw", "decay", lr=0.01, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.3),
    torch("adamw", "maximize", lr=0.01, weight_decay=0.3, maximize=True, schedule=True),
    torch("adamw", "amsgrad", native=AMSGRAD, amsgrad="raw", betas=(0.8, 0.9), weight_decay=0.3),
    torch("adamax"),
    torch("adamax", "decay", lr=0.01, betas=(0.8, 0.9), eps_inside=1e-3, weight_decay=0.05),
    torch("adamax", "maximize", lr=0.01, weight_decay=0.05, maximize=True, schedule=True),
    torch("adadelta"),
    torch("adadelta", "decay", lr=2.0, rho=0.8, eps=1e-4, weight_decay=0.05, schedule=True),
    torch("adadelta", "maximize", rho=0.8, eps=1e-4, weight_decay=0.05, maximize=True),
    torch("nadam"),
    torch("nadam", "decay", lr=0.01, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.05),
    torch("nadam", "warm-up", lr=0.01, momentum_decay=1.0, maximize=True, schedule=True),
    torch("nadam", "decoupled", native=DECOUPLED, decay="decoupled", weight_decay=0.3),
    torch("radam"),
    torch("radam", "decay", lr=0.01, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.05),
    torch("radam", "maximize", lr=0.01, betas=(0.8, 0.7), maximize=True, schedule=True),
    torch("radam", "decoupled", native=DECOUPLED, decay="decoupled", weight_decay=0.3),
    torch("rprop"),
    torch("rprop", "bounds", lr=0.02, etas=(0.3, 2.0), step_sizes=(5e-3, 0.1)),
    torch("rprop", "maximize", lr=0.02, maximize=True),
    torch("muon"),
    torch("muon", "plain-momentum", lr=0.02, momentum=0.8, nesterov=False, weight_decay=0.3),
    torch("muon", "match-rms", lr=0.02, scale="match_rms_adamw", schedule=True),
    torch("muon", "coefficients", lr=0.02, ns_steps=3, ns_coefficients=COEFFICIENTS),
    optax("sgd", "constant-lr", lr=0.1),
    optax("sgd", "schedule", lr=0.1, schedule=True),
    optax("momentum", "constant-lr", lr=0.05, momentum=0.9),
    optax("momentum", "schedule", lr=0.05, momentum=0.8, schedule=True),
    optax("nesterov", "constant-lr", lr=0.05, momentum=0.9),
    optax("nesterov", "schedule", lr=0.05, momentum=0.8, schedule=True),
    optax("adagrad", lr=0.05),
    optax("adagrad", "eps", lr=0.05, initial_accumulator=1e-3, eps_root=1e-5, schedule=True),
    optax("adagrad", "zero-accumulator", lr=0.05, initial_accumulator=0.0, eps_root=0.0),
    optax("rmsprop", lr=3e-3),
    optax("rmsprop", "eps-outside", native=EPS_OUTSIDE, lr=3e-3, eps=1e-4, eps_root=0.0),
    optax("rmsprop", "centered", lr=3e-3, rho=0.95, centered=True, initial_accumulator=0.5),
    optax("rmsprop", "momentum", lr=3e-3, eps_root=1e-5, momentum=0.9, schedule=True),
    optax("rmsprop", "nesterov", lr=3e-3, momentum=0.9, nesterov=True, schedule=True),
    optax("rmsprop", "bias-correction", lr=3e-3, eps_root=1e-6, bias_correction=True),
    # The first corrected variance is 0, up to a rounding that only a large eps_root hides.
    optax(
        "rmsprop",
        "centered-bias-correction",
        lr=3e-3,
        eps_root=0.05,
        centered=True,
        bias_correction=True,
    ),
    optax("adam", lr=0.01),
    optax("adam", "eps-root", lr=0.01, betas=(0.8, 0.95), eps=1e-4, eps_root=1e-6),
    optax("adam", "nesterov", lr=0.01, nesterov=True, eps_root=1e-8, schedule=True),
    optax("adam", "amsgrad", function="amsgrad", lr=0.01, betas=(0.8, 0.9), amsgrad="corrected"),
    optax("adamw", lr=0.01),
    optax("adamw", "eps-root", lr=0.01, betas=(0.8, 0.95), eps_root=1e-6, weight_decay=0.3),
    optax("adamw", "nesterov", lr=0.01, nesterov=True, weight_decay=0.3, schedule=True),
    optax("adamax", lr=0.01),
    optax("adamax", "eps", lr=0.01, betas=(0.8, 0.9), eps_inside=1e-3, schedule=True),
    optax("adadelta", lr=1.0),
    optax("adadelta", "decay", lr=2.0, rho=0.8, eps=1e-4, weight_decay=0.05, schedule=True),
    optax("radam", lr=0.01),
    optax("radam", "eps-root", lr=0.01, betas=(0.8, 0.95), eps=1e-4, eps_root=1e-6, threshold=7.5),
    optax("radam", "schedule", lr=0.01, betas=(0.8, 0.9), schedule=True),
    optax("signum", lr=0.01),
    optax("signum", "schedule", lr=0.01, momentum=0.6, schedule=True),
    optax("adabelief", lr=0.01),
    optax("adabelief", "eps", lr=0.01, betas=(0.8, 0.9), eps=1e-4, eps_root=1e-6, schedule=True),
    optax("adopt", lr=0.01),
    optax("adopt", "eps", lr=0.01, betas=(0.8, 0.9), eps=1e-3, schedule=True),
    optax("ademamix", lr=0.01),
    optax("ademamix", "decay", lr=0.01, betas=(0.8, 0.9, 0.99), alpha=3.0, weight_decay=0.3),
    optax("ademamix", "schedule", lr=0.01, eps=1e-4, schedule=True),
    optax("adan", lr=0.01),
    optax("adan", "decay", lr=0.01, betas=(0.9, 0.8, 0.95), eps=1e-4, weight_decay=0.3),
    optax("adan", "schedule", lr=0.01, eps_root=1e-5, schedule=True),
    optax("lars", lr=1.0),
    optax("lars", "decay", lr=2.0, momentum=0.8, trust=0.02, eps=1e-3, weight_decay=0.3),
    optax("lars", "nesterov", lr=1.0, trust=0.01, nesterov=True, schedule=True),
    # What the default, None, is for float32.
    torch("adafactor", native={"eps": (2.0**-23, 1e-3)}),
    torch(
        "adafactor",
        "decay",
        lr=0.3,
        eps=1e-3,
        eps_scale=0.5,
        clip=1.5,
        beta2_decay=0.5,
        weight_decay=0.3,
        native={"eps": (1e-3, 0.5), "beta2_decay": -0.5},
    ),
    torch(
        "adafactor",
        "schedule",
        lr=0.05,
        maximize=True,
        schedule=True,
        native={"eps": (2.0**-23, 1e-3)},
    ),
    optax("adafactor", lr=0.05),
    optax("adafactor", "factored", lr=0.05, min_dim=1),
    optax(
        "adafactor",
        "clip",
        lr=0.05,
        min_dim=2,
        clip=0.5,
        eps=1e-6,
        beta2_decay=0.5,
        scale_parameter=False,
        schedule=True,
    ),
    optax("prodigy"),
    optax("prodigy", "decay", lr=0.5, betas=(0.8, 0.9), d0=0.01, weight_decay=0.3, eps=1e-4),
    optax("prodigy", "schedule", lr=1.0, d0=0.01, coef=2.0, safeguard=True, schedule=True),
    optax("dadaptadam"),
    optax("dadaptadam", "decay", lr=0.5, betas=(0.8, 0.9), d0=0.01, weight_decay=0.3, eps=1e-4),
    optax("dadaptadam", "schedule", lr=1.0, d0=0.01, schedule=True),
    optax("lamb", lr=0.01),
    optax("lamb", "decay", lr=0.01, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.3),
    optax("lamb", "eps-root", lr=0.01, eps_root=1e-6, schedule=True),
    optax("schedulefreesgd", lr=0.1),
    optax("schedulefreesgd", "decay", lr=0.5, momentum=0.7, weight_decay=0.3),
    optax("schedulefreeadamw", lr=0.01),
    optax("schedulefreeadamw", "decay", lr=0.02, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.3),
    optax("lion", lr=0.01),
    optax("lion", "decay", lr=0.01, betas=(0.8, 0.95), weight_decay=0.3, schedule=True),
    optax("sophia", lr=0.01),
    optax("sophia", "decay", lr=0.01, betas=(0.8, 0.9), rho=0.5, eps=1e-5, weight_decay=0.3),
    optax("sophia", "clip", lr=0.01, rho=0.5, clip=0.3, weight_decay=0.3, schedule=True),
    optax("muon", lr=0.02),
    optax("muon", "plain-momentum", lr=0.02, momentum=0.8, nesterov=False, weight_decay=0.3),
    optax("muon", "match-rms", native=MATCH_RMS, lr=0.02, scale="match_rms_adamw", schedule=True),
    optax("muon", "coefficients", lr=0.02, ns_steps=3, ns_coefficients=COEFFICIENTS),
    keras("sgd"),
    keras("sgd", "decay", lr=0.1, weight_decay=0.05, schedule=True),
    keras("momentum", "default-lr", momentum=0.9),
    keras("momentum", "decay", lr=0.05, momentum=0.8, weight_decay=0.05, schedule=True),
    keras("nesterov", "default-lr", momentum=0.9),
    keras("nesterov", "decay", lr=0.05, momentum=0.8, weight_decay=0.05, schedule=True),
    keras("adagrad"),
    keras("adagrad", "decay", lr=0.05, initial_accumulator=1e-3, eps_root=1e-5, weight_decay=0.3),
    keras("rmsprop"),
    keras("rmsprop", "decay", lr=3e-3, rho=0.95, eps_root=1e-4, weight_decay=0.3, schedule=True),
    keras("rmsprop", "momentum", lr=3e-3, momentum=0.9, schedule=True),
    keras("rmsprop", "centered", lr=3e-3, momentum=0.8, centered=True, weight_decay=0.3),
    keras("adam"),
    keras("adam", "decay", lr=0.01, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.3, schedule=True),
    keras("adam", "amsgrad", native=AMSGRAD, lr=0.01, betas=(0.8, 0.9), amsgrad="raw"),
    keras("adamw"),
    keras("adamw", "decay", lr=0.01, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.3),
    keras("adamw", "amsgrad", native=AMSGRAD, amsgrad="raw", betas=(0.8, 0.9), weight_decay=0.3),
    keras("adamax"),
    keras("adamax", "decay", lr=0.01, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3, schedule=True),
    keras("adadelta"),
    keras("adadelta", "decay", lr=1.0, rho=0.8, eps=1e-4, weight_decay=0.3, schedule=True),
    keras("nadam"),
    keras("nadam", "decay", lr=0.01, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.3, schedule=True),
    keras("adafactor"),
    keras(
        "adafactor",
        "decay",
        native={"beta_2_decay": -0.5},
        lr=0.3,
        beta2_decay=0.5,
        eps=1e-6,
        eps_scale=0.5,
        clip=0.5,
        weight_decay=0.3,
        schedule=True,
    ),
    keras("lion"),
    keras("lion", "decay", lr=0.01, betas=(0.8, 0.95), weight_decay=0.3, schedule=True),
    keras("muon"),
    keras("muon", "plain-momentum", lr=0.02, momentum=0.8, nesterov=False, weight_decay=0.3),
    keras("muon", "no-scale", native={"rms_rate": None}, lr=0.02, scale="none", schedule=True),
    keras("muon", "coefficients", lr=0.02, ns_steps=3, ns_coefficients=COEFFICIENTS),
]
