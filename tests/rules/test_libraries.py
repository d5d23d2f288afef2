"""``Rule.like`` against trajectories that PyTorch, optax and Keras computed themselves."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from golden import problem

Entry = dict[str, Any]

ENTRIES: list[Entry] = json.loads((Path(__file__).parents[1] / "golden/libraries.json").read_text())


def identifier(entry: Entry) -> str:
    return f"{entry['library']}-{entry['rule']}-{entry['variant']}"


def rule_of(entry: Entry) -> Any:
    arguments = dict(entry["hyperparameters"])
    if entry["schedule"]:
        arguments["lr"] = partial(problem.learning_rate, arguments["lr"])
    return fo.RULES[entry["rule"]].like(entry["library"], **arguments)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("entry", ENTRIES, ids=identifier)
def test_trajectory_is_the_librarys(entry: Entry, backend: str) -> None:
    name = entry["rule"]
    start, params = problem.parameters(name), problem.parameters(name)
    optimizer = fo.Optimizer(params, rule_of(entry), backend=backend)
    for step in range(1, problem.STEPS + 1):
        refresh = name == "sophia" and step % problem.HESSIAN_EVERY == 1
        hessian = problem.curvature(name, step) if refresh else None
        optimizer.step(problem.gradients(name, step), hessian=hessian)
        for path, recorded in entry["after"].get(str(step), {}).items():
            want, got = np.array(recorded), params[path]
            bound = problem.allowed(entry["tolerance"], step, start[path], want)
            share = np.abs(got - want) / bound
            worst = np.unravel_index(np.argmax(share), share.shape)
            assert share[worst] <= 1.0, (
                f"step {step}, {path}[{', '.join(map(str, worst))}]: {got[worst]!r} where "
                f"{entry['library']} {entry['version']} {entry['call']} gives {want[worst]!r}, "
                f"{share[worst]:.3g} times the allowed difference"
            )


# What the libraries' own signatures and documentation give (optax asks for the learning rate).
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "eps_root": 0.0, "amsgrad": False, "hat": False}
RMS = {"centered": False, "momentum": 0.0, "initial_accumulator": 0.0}
L2 = {"weight_decay": 0.0, "decay": "l2"}
NS = {
    "nesterov": True,
    "momentum": 0.95,
    "ns_steps": 5,
    "ns_coefficients": (3.4445, -4.775, 2.0315),
}
DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("torch", "sgd"): {"lr": 1e-3, "weight_decay": 0.0},
    ("torch", "momentum"): {
        "lr": 1e-3,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "form": "buffer",
    },
    ("torch", "nesterov"): {"lr": 1e-3, "weight_decay": 0.0, "form": "rearranged"},
    ("torch", "adagrad"): {
        "lr": 1e-2,
        "lr_decay": 0.0,
        "weight_decay": 0.0,
        "initial_accumulator": 0.0,
        "eps": 1e-10,
        "eps_root": 0.0,
    },
    ("torch", "rmsprop"): {"lr": 1e-2, "rho": 0.99, "eps": 1e-8, "eps_root": 0.0, **RMS},
    ("torch", "adam"): {"lr": 1e-3, "weight_decay": 0.0, "decay": "l2", **ADAM},
    ("torch", "adamw"): {"lr": 1e-3, "weight_decay": 1e-2, **ADAM},
    ("torch", "adamax"): {"lr": 2e-3, "eps_inside": 1e-8, "eps": 0.0, **L2},
    ("torch", "adadelta"): {"lr": 1.0, "rho": 0.9, "eps": 1e-6, **L2},
    ("torch", "nadam"): {"lr": 2e-3, "eps": 1e-8, "momentum_decay": 4e-3, **L2},
    ("torch", "radam"): {"lr": 1e-3, "eps": 1e-8, "hat": True, "threshold": 5.0, **L2},
    ("torch", "rprop"): {"lr": 1e-2, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0)},
    ("torch", "muon"): {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-7, "scale": "original", **NS},
    ("optax", "sgd"): {"weight_decay": 0.0},
    ("optax", "momentum"): {"momentum": 0.0, "form": "buffer", "dampening": 0.0},
    ("optax", "nesterov"): {"form": "rearranged"},
    ("optax", "adagrad"): {"initial_accumulator": 0.1, "eps_root": 1e-7, "eps": 0.0},
    ("optax", "rmsprop"): {"rho": 0.9, "eps_root": 1e-8, "eps": 0.0, "nesterov": False, **RMS},
    ("optax", "adam"): {"weight_decay": 0.0, "nesterov": False, **ADAM},
    ("optax", "adamw"): {"weight_decay": 1e-4, "nesterov": False, **ADAM},
    ("optax", "adamax"): {"betas": (0.9, 0.999), "eps_inside": 1e-8, "eps": 0.0},
    ("optax", "adadelta"): {"rho": 0.9, "eps": 1e-6, "weight_decay": 0.0},
    ("optax", "radam"): {"eps": 1e-8, "eps_root": 0.0, "threshold": 5.0, "hat": False},
    ("optax", "signum"): {"momentum": 0.9, "weight_decay": 0.0},
    ("optax", "adabelief"): {"betas": (0.9, 0.999), "eps": 1e-16, "eps_root": 1e-16},
    ("optax", "adopt"): {"betas": (0.9, 0.9999), "eps": 1e-6},
    ("optax", "ademamix"): {"betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "eps": 1e-8},
    ("optax", "adan"): {"betas": (0.98, 0.92, 0.99), "eps": 1e-8, "eps_root": 1e-8},
    ("optax", "lars"): {"momentum": 0.9, "trust": 1e-3, "eps": 0.0, "nesterov": False, **L2},
    ("optax", "lamb"): {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "decay": "scaled"},
    ("optax", "schedulefreesgd"): {"momentum": 0.9, "r": 0.0, "weight_lr_power": 2.0},
    ("optax", "schedulefreeadamw"): {"betas": (0.9, 0.999), "decay": "scaled"},
    ("optax", "lion"): {"betas": (0.9, 0.99), "weight_decay": 1e-3},
    ("optax", "sophia"): {
        "betas": (0.965, 0.99),
        "rho": 0.01,
        "eps": 1e-8,
        "weight_decay": 1e-4,
        "clip": 1.0,
        "form": "paper",
        "estimator": "hutchinson",
    },
    ("optax", "muon"): {"weight_decay": 0.0, "eps": 1e-8, "scale": "original", **NS},
    ("keras", "sgd"): {"lr": 1e-2, "weight_decay": 0.0},
    ("keras", "momentum"): {"lr": 1e-2, "momentum": 0.0, "weight_decay": 0.0, "form": "heavy_ball"},
    ("keras", "nesterov"): {"lr": 1e-2, "weight_decay": 0.0, "form": "heavy_ball"},
    ("keras", "adagrad"): {"lr": 1e-3, "initial_accumulator": 0.1, "eps_root": 1e-7, "eps": 0.0},
    ("keras", "rmsprop"): {"lr": 1e-3, "rho": 0.9, "eps_root": 1e-7, "eps": 0.0, **RMS},
    ("keras", "adam"): {**ADAM, "lr": 1e-3, "weight_decay": 0.0, "eps": 1e-7, "hat": True},
    ("keras", "adamw"): {**ADAM, "lr": 1e-3, "weight_decay": 4e-3, "eps": 1e-7, "hat": True},
    ("keras", "adamax"): {"lr": 1e-3, "eps_inside": 0.0, "eps": 1e-7, "weight_decay": 0.0},
    ("keras", "adadelta"): {"lr": 1e-3, "rho": 0.95, "eps": 1e-7, "weight_decay": 0.0},
    ("keras", "nadam"): {"lr": 1e-3, "eps": 1e-7, "momentum_decay": 1.0, "weight_decay": 0.0},
    ("keras", "lion"): {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.0},
    ("keras", "muon"): {
        "lr": 1e-3,
        "weight_decay": 4e-3,
        "eps": 1e-7,
        "scale": "match_rms_adamw",
        **NS,
    },
    ("torch", "adafactor"): {
        "lr": 1e-2,
        "beta2_decay": 0.8,
        "eps": 2.0**-23,
        "eps_scale": 1e-3,
        "clip": 1.0,
        "weight_decay": 0.0,
        "floor": "least",
        "relative_step": True,
    },
    ("keras", "adafactor"): {
        "lr": 1e-3,
        "beta2_decay": 0.8,
        "eps": 1e-30,
        "eps_scale": 1e-3,
        "clip": 1.0,
        "weight_decay": 0.0,
        "relative_step": True,
    },
    ("optax", "adafactor"): {
        "beta2_decay": 0.8,
        "eps": 1e-30,
        "clip": 1.0,
        "scale_parameter": True,
        "min_dim": 128,
        "relative_step": False,
    },
    ("optax", "prodigy"): {
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "d0": 1e-6,
        "coef": 1.0,
        "weight_decay": 0.0,
        "safeguard": False,
        "bias_correction": True,
    },
    ("optax", "dadaptadam"): {
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "d0": 1e-6,
        "weight_decay": 0.0,
        "bias_correction": True,
    },
}


@pytest.mark.parametrize(("library", "name"), DEFAULTS, ids=map("-".join, DEFAULTS))
def test_defaults_are_the_librarys(library: str, name: str) -> None:
    given = {"lr": 0.5} if library == "optax" else {}
    rule = fo.RULES[name].like(library, **given)
    want = given | DEFAULTS[library, name]
    assert {field: getattr(rule, field) for field in want} == want


def test_every_convention_is_recorded_and_its_defaults_stated() -> None:
    conventions = {(lib, name) for name, rule in fo.RULES.items() for lib in rule.conventions}
    assert conventions == {(entry["library"], entry["rule"]) for entry in ENTRIES} == set(DEFAULTS)


LACKING = [
    ("torch", "lion"),
    ("optax", "nadam"),
    ("optax", "rprop"),
    ("torch", "sophia"),
    ("keras", "sophia"),
]


@pytest.mark.parametrize(("library", "name"), LACKING, ids=map("-".join, LACKING))
def test_a_library_without_the_rule_is_refused(library: str, name: str) -> None:
    with pytest.raises(ValueError, match=library):
        fo.RULES[name].like(library, lr=0.1)


def test_an_unknown_library_is_refused_and_the_known_are_named() -> None:
    with pytest.raises(ValueError, match=r"(?s)jaxopt.*torch.*optax.*keras"):
        fo.Adam.like("jaxopt", lr=0.1)


OPTIONAL = ("schedulefree", "prodigy", "dadapt")
ASKED = [n for lib, n in DEFAULTS if lib == "optax" and not n.startswith(OPTIONAL)]


@pytest.mark.parametrize("name", ASKED)
def test_optax_asks_for_the_learning_rate(name: str) -> None:
    with pytest.raises(ValueError, match="lr"):
        fo.RULES[name].like("optax")


@pytest.mark.parametrize(
    ("name", "library", "argument", "value"),
    [
        ("momentum", "keras", "dampening", 0.1),
        ("momentum", "optax", "dampening", 0.1),
        ("nesterov", "torch", "dampening", 0.1),
        ("adagrad", "optax", "lr_decay", 0.1),
        ("adagrad", "keras", "lr_decay", 0.1),
        ("rmsprop", "torch", "nesterov", True),
        ("rmsprop", "keras", "nesterov", True),
        ("rmsprop", "keras", "bias_correction", True),
        ("adam", "torch", "nesterov", True),
        ("adam", "torch", "momentum", 0.9),
        ("lion", "keras", "momentum", 0.9),
        ("muon", "torch", "betas", (0.9, 0.999)),
        ("adam", "torch", "amsgrad", "corrected"),
        ("adam", "optax", "amsgrad", "raw"),
        ("muon", "torch", "scale", "spectral"),
        ("radam", "torch", "threshold", 4.0),
        ("nadam", "torch", "decay", "independent"),
        ("nadam", "keras", "momentum_decay", 0.5),
        ("adamax", "torch", "eps", 1e-8),
        ("rprop", "torch", "weight_decay", 0.1),
    ],
)
def test_what_does_not_apply_is_refused(
    name: str, library: str, argument: str, value: object
) -> None:
    with pytest.raises(ValueError, match=argument):
        fo.RULES[name].like(library, **{"lr": 0.1, argument: value})


def test_amsgrad_is_each_librarys_own() -> None:
    assert fo.Adam.like("torch", amsgrad=True).amsgrad == "raw"
    assert fo.Adam.like("optax", lr=0.1, amsgrad=True).amsgrad == "corrected"
    assert fo.Adam.like("keras", amsgrad=True).amsgrad == "raw"
