"""The optimizers of fusedopt.thinc against thinc's own, and a spaCy pipeline trained with them.

They are the extra `thinc`.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

thinc = pytest.importorskip("thinc.api")

import fusedopt.thinc as ft  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of spaCy and its dependencies

SHAPES = ((7, 5), (3,), (300,), (2, 3, 4))
STEPS = 25
CASES: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {"L2": 0.1, "grad_clip": 0.0}),
    ("Adam", {"L2": 0.1, "L2_is_weight_decay": False}),
    ("Adam", {"beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "use_averages": False}),
    ("RAdam", {"L2": 0.1}),
    ("RAdam", {"beta2": 0.9, "eps": 1e-4}),
    ("SGD", {"L2": 0.1, "grad_clip": 0.5}),
]
IDS = [f"{name}-{'-'.join(arguments)}" for name, arguments in CASES]


def parameters(dtype: type = np.float32) -> list[np.ndarray]:
    source = np.random.default_rng(5)
    return [source.standard_normal(shape).astype(dtype) for shape in SHAPES]


def run(
    opt: Any, params: list[np.ndarray], gradients: Any = None, dtype: type = np.float32
) -> list[np.ndarray]:
    """The parameters after so many steps, with a scale on some rates."""
    source = np.random.default_rng(6)
    for _ in range(STEPS):
        for k, p in enumerate(params):
            g = (source.standard_normal(p.shape) * 10 ** source.uniform(-3, 1)).astype(np.float32)
            params[k], zero = opt((k, "W"), p, g.astype(dtype), lr_scale=0.5 if k == 1 else 1.0)
            assert not zero.any()
        opt.step_schedules()
    return params


def exact(name: str, arguments: dict[str, Any], rates: list[float]) -> Any:
    """Run thinc's formulas in float64: the parameters, and the averages."""
    decays = arguments.get("L2_is_weight_decay", True)
    values = {"L2": 0.0, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "grad_clip": 1.0, **arguments}
    params, source = parameters(np.float64), np.random.default_rng(6)
    b1, b2 = values["beta1"], values["beta2"]
    m, v, averages = ([np.zeros(s) for s in SHAPES] for _ in range(3))
    for t, rate in enumerate(rates, 1):
        for k, p in enumerate(params):
            g = (source.standard_normal(p.shape) * 10 ** source.uniform(-3, 1)).astype(np.float32)
            g, lr = g.astype(np.float64), rate * (0.5 if k == 1 else 1.0)
            g = g if decays else g + values["L2"] * p
            norm = np.linalg.norm(g)
            if values["grad_clip"] and norm >= values["grad_clip"]:
                g = g * (values["grad_clip"] / norm)
            m[k] = b1 * m[k] + (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g * g
            if name == "SGD":
                p = p - lr * g
            elif name == "Adam":
                root = (1 - b2**t) ** 0.5
                p = p - lr * root / (1 - b1**t) * m[k] / (np.sqrt(v[k]) + values["eps"])
            else:
                s = t + 1
                last = 2 / (1 - b2) - 1
                n = last - 2 * s * b2**s / (1 - b2**s)
                step = rate / (1 - b1**s)
                if n >= 5:
                    r = (n - 4) / (last - 4) * (n - 2) / n * last / (last - 2)
                    p = p - step * ((1 - b2**s) * r) ** 0.5 * m[k] / (np.sqrt(v[k]) + values["eps"])
                else:
                    p = p - step * m[k]
            params[k] = p * (1 - lr * values["L2"]) if decays else p
            averages[k] -= (1 - min((1 + t) / (10 + t), 0.9999)) * (averages[k] - params[k])
    return params, averages


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=IDS)
def test_a_run_is_that_of_thinc(name: str, arguments: dict[str, Any]) -> None:
    rates = [0.1, 0.05, 0.02]
    ours, theirs = (
        getattr(module, name)(list(rates), **copy.deepcopy(arguments)) for module in (ft, thinc)
    )
    a, b = run(ours, parameters()), run(theirs, parameters())
    c, averages = exact(name, arguments, (rates + [rates[-1]] * STEPS)[:STEPS])
    pairs = list(zip(a, b, c, strict=True))
    if ours.averages is not None:
        found = (opt.averages[k, "W"] for k in range(len(a)) for opt in (ours, theirs))
        pairs += list(zip(*[found] * 2, averages, strict=True))
    for p, q, r in pairs:
        # Two runs in float32 part by their roundings, which thinc's own shows.
        bound = 4 * np.abs(q - r).max() + 16 * np.finfo(np.float32).eps * np.abs(r)
        assert (np.abs(p - r) <= bound).all()


def test_parameters_are_updated_in_place() -> None:
    opt, w = ft.Adam(0.1), np.ones(5, np.float32)
    found, _ = opt((0, "W"), w, np.ones(5, np.float32))
    assert np.shares_memory(found, w)
    assert w[0] < 1


def test_what_is_no_numpy_array_is_refused() -> None:
    opt = ft.Adam(0.1)
    other: Any = [1.0, 1.0, 1.0]
    with pytest.raises(TypeError, match="NumPy array"):
        opt((0, "W"), other, np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"fusedopt.Adam.v1"):
        ft.AdamW(L2_is_weight_decay=False)
    assert not opt.nr_update


CONFIG = """
[nlp]
lang = "en"
pipeline = ["textcat"]

[components]
[components.textcat]
factory = "textcat"

[components.textcat.model]
@architectures = "spacy.TextCatBOW.v3"
exclusive_classes = true
ngram_size = 1
no_output_layer = false
length = 1024

[training]
[training.optimizer]
@optimizers = "OPTIMIZER"
beta1 = 0.9
beta2 = 0.999
L2_is_weight_decay = true
L2 = 0.01
grad_clip = 1.0
use_averages = true
eps = 0.00000001

[training.optimizer.learn_rate]
@schedules = "warmup_linear.v1"
warmup_steps = 5
total_steps = 50
initial_rate = 0.01
"""


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RAdam"])
def test_a_spacy_configuration_trains_with_one_line_changed(name: str) -> None:
    spacy = pytest.importorskip("spacy")
    training = pytest.importorskip("spacy.training")
    texts = [("good nice fine", "a"), ("bad ugly", "b"), ("very good", "a"), ("very bad", "b")]

    def trained(optimizer: str) -> tuple[list[np.ndarray], list[float]]:
        thinc.fix_random_seed(0)
        config = thinc.Config().from_str(CONFIG.replace("OPTIMIZER", optimizer))
        nlp = spacy.util.load_model_from_config(config, auto_fill=True)
        examples = [
            training.Example.from_dict(
                nlp.make_doc(text), {"cats": {"a": label == "a", "b": label == "b"}}
            )
            for text, label in texts
        ]
        registered = spacy.util.registry.resolve(
            config["training"], schema=spacy.schemas.ConfigSchemaTraining, validate=False
        )
        opt = nlp.initialize(lambda: examples, sgd=registered["optimizer"])
        losses = []
        for _ in range(12):
            found: dict[str, float] = {}
            nlp.update(examples, sgd=opt, losses=found)
            opt.step_schedules()
            losses.append(found["textcat"])
        assert opt.averages
        with nlp.use_params(opt.averages):
            losses.append(nlp("good").cats["a"])
        model = nlp.get_pipe("textcat").model
        arrays = [n.get_param(p).copy() for n in model.walk() for p in n.param_names]
        return arrays, losses

    ours, losses = trained(f"fusedopt.{name}.v1")
    theirs, expected = trained(f"{'RAdam' if name == 'RAdam' else 'Adam'}.v1")
    assert losses[11] < losses[0]
    assert np.allclose(losses, expected, rtol=1e-4)
    for p, q in zip(ours, theirs, strict=True):
        assert np.allclose(p, q, rtol=1e-4, atol=1e-5)
