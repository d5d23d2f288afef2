"""The forms that other libraries give to the rules, with their defaults."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple


class Convention(NamedTuple):
    """A library's form of a rule.

    free: the hyperparameters that the library has, with its defaults (`REQUIRED`: it has none).
    fixed: the settings that make a rule the library's.
    spelled: what a value is called there, by hyperparameter (`amsgrad=True`).
    """

    free: Mapping[str, Any]
    fixed: Mapping[str, Any] = {}
    spelled: Mapping[str, Mapping[Any, Any]] = {}


REQUIRED = object()


def hyperparameters_of(
    rule: str,
    conventions: Mapping[str, Convention],
    library: str,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the hyperparameters of a rule in a library's convention.

    ValueError where the library lacks the rule, a name or a value that is given, or a default.
    """
    if library not in conventions:
        known = ", ".join(map(repr, conventions)) or "none"
        raise ValueError(f"{rule}.like: {library!r} has no such rule; libraries that have: {known}")
    convention = conventions[library]
    for name in given:
        if name not in convention.free:
            raise ValueError(
                f"{rule}.like({library!r}): {name!r} does not apply there; names that do:"
                f" {', '.join(convention.free)}"
            )
    values = {**convention.free, **given}
    for name, value in values.items():
        if value is REQUIRED:
            raise ValueError(
                f"{rule}.like({library!r}): {library} has no default for {name!r}; give one"
            )
        spelling = convention.spelled.get(name)
        if spelling is not None:
            if not isinstance(value, Hashable) or value not in spelling:
                raise ValueError(
                    f"{rule}.like({library!r}): {name}={value!r} is not available there; values"
                    f" that are: {', '.join(map(repr, spelling))}"
                )
            values[name] = spelling[value]
    return {**convention.fixed, **values}


_TORCH = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "amsgrad": False,
    "maximize": False,
}
_OPTAX = {
    "lr": REQUIRED,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "eps_root": 0.0,
    "nesterov": False,
}
_KERAS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-7, "amsgrad": False}
_RAW = {"amsgrad": {False: False, True: "raw", "raw": "raw"}}
_ADAMAX = {"betas": (0.9, 0.999), "weight_decay": 0.0}
_SCALES = {"scale": {"original": "original", "match_rms_adamw": "match_rms_adamw"}}

CONVENTIONS: Mapping[str, Mapping[str, Convention]] = {
    "sgd": {
        "torch": Convention({"lr": 1e-3, "weight_decay": 0.0, "maximize": False}),
        "optax": Convention({"lr": REQUIRED}),
        "keras": Convention({"lr": 1e-2, "weight_decay": 0.0}, {"decay": "decoupled"}),
    },
    "momentum": {
        "torch": Convention(
            {
                "lr": 1e-3,
                "momentum": 0.0,
                "dampening": 0.0,
                "weight_decay": 0.0,
                "maximize": False,
            },
            {"form": "buffer"},
        ),
        "optax": Convention({"lr": REQUIRED, "momentum": 0.0}, {"form": "buffer"}),
        "keras": Convention(
            {"lr": 1e-2, "momentum": 0.0, "weight_decay": 0.0},
            {"form": "heavy_ball", "decay": "decoupled"},
        ),
    },
    "nesterov": {
        "torch": Convention({"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0, "maximize": False}),
        "optax": Convention({"lr": REQUIRED, "momentum": 0.9}),
        "keras": Convention(
            {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.0},
            {"form": "heavy_ball", "decay": "decoupled"},
        ),
    },
    "adagrad": {
        "torch": Convention(
            {
                "lr": 1e-2,
                "lr_decay": 0.0,
                "weight_decay": 0.0,
                "initial_accumulator": 0.0,
                "eps": 1e-10,
                "maximize": False,
            },
            {"eps_root": 0.0},
        ),
        "optax": Convention({"lr": REQUIRED, "initial_accumulator": 0.1, "eps_root": 1e-7}),
        "keras": Convention(
            {"lr": 1e-3, "initial_accumulator": 0.1, "eps_root": 1e-7, "weight_decay": 0.0},
            {"decay": "decoupled"},
        ),
    },
    "rmsprop": {
        "torch": Convention(
            {
                "lr": 1e-2,
                "rho": 0.99,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "momentum": 0.0,
                "centered": False,
                "maximize": False,
            },
            {"eps_root": 0.0},
        ),
        "optax": Convention(
            {
                "lr": REQUIRED,
                "rho": 0.9,
                "eps_root": 1e-8,
                "eps": 0.0,
                "initial_accumulator": 0.0,
                "centered": False,
                "momentum": 0.0,
                "nesterov": False,
                "bias_correction": False,
            },
            {"lr_in_buffer": True},
        ),
        "keras": Convention(
            {
                "lr": 1e-3,
                "rho": 0.9,
                "momentum": 0.0,
                "eps_root": 1e-7,
                "centered": False,
                "weight_decay": 0.0,
            },
            {"lr_in_buffer": True, "decay": "decoupled"},
        ),
    },
    "adadelta": {
        "torch": Convention(
            {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.0, "maximize": False}
        ),
        "optax": Convention({"lr": REQUIRED, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.0}),
        "keras": Convention(
            {"lr": 1e-3, "rho": 0.95, "eps": 1e-7, "weight_decay": 0.0}, {"decay": "decoupled"}
        ),
    },
    "rprop": {
        "torch": Convention(
            {"lr": 1e-2, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0), "maximize": False}
        )
    },
    "adam": {
        "torch": Convention({**_TORCH, "weight_decay": 0.0}, spelled=_RAW),
        "optax": Convention(
            {**_OPTAX, "amsgrad": False},
            spelled={"amsgrad": {False: False, True: "corrected", "corrected": "corrected"}},
        ),
        "keras": Convention(
            {**_KERAS, "weight_decay": 0.0}, {"hat": True, "decay": "decoupled"}, _RAW
        ),
    },
    "adamw": {
        "torch": Convention({**_TORCH, "weight_decay": 1e-2}, {"decay": "decoupled_first"}, _RAW),
        "optax": Convention({**_OPTAX, "weight_decay": 1e-4}, {"decay": "decoupled"}),
        "keras": Convention(
            {**_KERAS, "weight_decay": 4e-3}, {"hat": True, "decay": "decoupled"}, _RAW
        ),
    },
    "adamax": {
        "torch": Convention({**_ADAMAX, "lr": 2e-3, "eps_inside": 1e-8, "maximize": False}),
        "optax": Convention({"lr": REQUIRED, "betas": (0.9, 0.999), "eps_inside": 1e-8}),
        "keras": Convention({**_ADAMAX, "lr": 1e-3, "eps": 1e-7}, {"decay": "decoupled"}),
    },
    "nadam": {
        "torch": Convention(
            {
                "lr": 2e-3,
                "betas": (0.9, 0.999),
                "eps": 1e-8,
                "weight_decay": 0.0,
                "momentum_decay": 4e-3,
                "decay": "l2",
                "maximize": False,
            },
            spelled={"decay": {"l2": "l2", "decoupled": "decoupled_first"}},
        ),
        "keras": Convention(
            {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-7, "weight_decay": 0.0},
            {"momentum_decay": 1.0, "decay": "decoupled"},
        ),
    },
    "radam": {
        "torch": Convention(
            {
                "lr": 1e-3,
                "betas": (0.9, 0.999),
                "eps": 1e-8,
                "weight_decay": 0.0,
                "decay": "l2",
                "maximize": False,
            },
            {"hat": True},
            {"decay": {"l2": "l2", "decoupled": "decoupled_first"}},
        ),
        "optax": Convention(
            {
                "lr": REQUIRED,
                "betas": (0.9, 0.999),
                "eps": 1e-8,
                "eps_root": 0.0,
                "threshold": 5.0,
            }
        ),
    },
    "adabelief": {
        "optax": Convention(
            {"lr": REQUIRED, "betas": (0.9, 0.999), "eps": 1e-16, "eps_root": 1e-16}
        )
    },
    "ademamix": {
        "optax": Convention(
            {
                "lr": REQUIRED,
                "betas": (0.9, 0.999, 0.9999),
                "alpha": 5.0,
                "eps": 1e-8,
                "weight_decay": 0.0,
            }
        )
    },
    "adan": {
        "optax": Convention(
            {
                "lr": REQUIRED,
                "betas": (0.98, 0.92, 0.99),
                "eps": 1e-8,
                "eps_root": 1e-8,
                "weight_decay": 0.0,
            },
            {"form": "optax"},
        )
    },
    "lars": {
        "optax": Convention(
            {
                "lr": REQUIRED,
                "weight_decay": 0.0,
                "trust": 1e-3,
                "eps": 0.0,
                "momentum": 0.9,
                "nesterov": False,
            }
        )
    },
    "lamb": {
        "optax": Convention(
            {
                "lr": REQUIRED,
                "betas": (0.9, 0.999),
                "eps": 1e-6,
                "eps_root": 0.0,
                "weight_decay": 0.0,
            }
        )
    },
    "adopt": {"optax": Convention({"lr": REQUIRED, "betas": (0.9, 0.9999), "eps": 1e-6})},
    "lion": {
        "optax": Convention({"lr": REQUIRED, "betas": (0.9, 0.99), "weight_decay": 1e-3}),
        "keras": Convention({"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.0}),
    },
    "adafactor": {
        "torch": Convention(
            {
                "lr": 1e-2,
                "beta2_decay": 0.8,
                "eps": 2.0**-23,
                "eps_scale": 1e-3,
                "clip": 1.0,
                "weight_decay": 0.0,
                "maximize": False,
            },
            {"floor": "least"},
        ),
        "optax": Convention(
            {
                "lr": REQUIRED,
                "beta2_decay": 0.8,
                "eps": 1e-30,
                "clip": 1.0,
                "scale_parameter": True,
                "min_dim": 128,
            },
            {"relative_step": False},
        ),
        "keras": Convention(
            {
                "lr": 1e-3,
                "beta2_decay": 0.8,
                "eps": 1e-30,
                "eps_scale": 1e-3,
                "clip": 1.0,
                "weight_decay": 0.0,
            },
            {"decay": "decoupled_first"},
        ),
    },
    "prodigy": {
        "optax": Convention(
            {
                "lr": 1.0,
                "betas": (0.9, 0.999),
                "eps": 1e-8,
                "d0": 1e-6,
                "coef": 1.0,
                "weight_decay": 0.0,
                "safeguard": False,
            },
            {"bias_correction": True},
        )
    },
    "dadaptadam": {
        "optax": Convention(
            {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-8, "d0": 1e-6, "weight_decay": 0.0},
            {"bias_correction": True},
        )
    },
    "schedulefreesgd": {
        "optax": Convention(
            {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.0, "weight_lr_power": 2.0}
        )
    },
    "schedulefreeadamw": {
        "optax": Convention(
            {
                "lr": 2.5e-3,
                "betas": (0.9, 0.999),
                "eps": 1e-8,
                "weight_decay": 0.0,
                "weight_lr_power": 2.0,
            }
        )
    },
    "signum": {"optax": Convention({"lr": REQUIRED, "momentum": 0.9})},
    "sophia": {
        "optax": Convention(
            {
                "lr": REQUIRED,
                "betas": (0.965, 0.99),
                "eps": 1e-8,
                "weight_decay": 1e-4,
                "rho": 0.01,
                "clip": 1.0,
            },
            {"form": "paper", "estimator": "hutchinson", "bias_correction": True},
        ),
    },
    "muon": {
        "torch": Convention(
            {
                "lr": 1e-3,
                "weight_decay": 0.1,
                "momentum": 0.95,
                "nesterov": True,
                "ns_coefficients": (3.4445, -4.7750, 2.0315),
                "eps": 1e-7,
                "ns_steps": 5,
                "scale": "original",
            },
            {"decay": "decoupled_first"},
            _SCALES,
        ),
        "optax": Convention(
            {
                "lr": REQUIRED,
                "momentum": 0.95,
                "nesterov": True,
                "ns_coefficients": (3.4445, -4.7750, 2.0315),
                "ns_steps": 5,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "scale": "original",
            },
            {"bias_correction": True},
            _SCALES,
        ),
        "keras": Convention(
            {
                "lr": 1e-3,
                "momentum": 0.95,
                "nesterov": True,
                "ns_coefficients": (3.4445, -4.7750, 2.0315),
                "ns_steps": 5,
                "weight_decay": 4e-3,
                "scale": "match_rms_adamw",
            },
            {"form": "heavy_ball", "eps": 1e-7},
            {"scale": {"match_rms_adamw": "match_rms_adamw", "none": "none"}},
        ),
    },
}
"""Forms of each rule in the libraries that have it, by the rule's name."""
