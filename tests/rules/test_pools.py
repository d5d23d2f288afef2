"""Rules whose sums are of a group or of the whole optimizer, maxima, and numbers that are kept."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest

import fusedopt as fo
from fusedopt.programs.elements import magnitude

pytest.importorskip("numba")

BACKENDS = ["native", "numba", "reference"]


class Own(fo.CustomRule):
    """Steps by a mean product of all, and by the largest gradient that was ever seen."""

    over: ClassVar[Any] = "group"
    maxima = 1
    kept = ("most", "calls")

    def initial(self, state: str) -> float:
        return 0.5 if state == "most" else 0.0

    def scalars(self, t: int, lr: float, most: float, calls: float) -> tuple[float, ...]:
        return lr * most, calls

    @staticmethod
    def measure(p: float, g: float, m: float, rate: float, calls: float) -> tuple[float, ...]:
        return p * g, 1.0, magnitude(g)

    def measured(
        self, t: int, lr: float, sums: tuple[float, ...], most: float, calls: float
    ) -> tuple[float, ...]:
        product, count, largest = sums
        return product / count if count else 0.0, max(most, largest), calls + 1.0

    @staticmethod
    def element(
        p: float, g: float, m: float, rate: float, calls: float, mean: float
    ) -> tuple[float, float]:
        return rate * g * mean, m + calls * g


class OverAll(Own):
    over: ClassVar[Any] = "optimizer"


class Largest(fo.CustomRule):
    """Sign descent in steps of the smallest element, which may be negative."""

    maxima = 2

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        return ()

    @staticmethod
    def measure(p: float, g: float) -> tuple[float, float]:
        return g, -g

    def measured(self, t: int, lr: float, sums: tuple[float, ...]) -> tuple[float, ...]:
        return sums

    @staticmethod
    def element(p: float, g: float, largest: float, smallest: float) -> float:
        return largest + smallest


SIZES = {"a": (300, 301), "b": (7,), "c": (70_000,), "e": (0,), "s": ()}


def start(dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SIZES.items()}


def stepped(rule: Any, steps: int = 3, dtype: Any = np.float32, **options: Any) -> fo.Optimizer:
    """An optimizer after some steps, in which one leaf has no gradient once."""
    opt = fo.Optimizer(start(dtype), rule, **options)
    rng = np.random.default_rng(1)
    for t in range(steps):
        grads: dict[str, Any] = {
            name: (p + 0.1 * rng.standard_normal(p.shape)).astype(dtype)
            for name, p in opt.params.items()
        }
        if t == 1:
            grads["b"] = None
        opt.step(grads)
    return opt


RULES: dict[str, Any] = {
    "own": Own(lr=0.1, weight_decay=0.125),
    "two groups": {"c": Own(lr=0.2), "*": Own(lr=0.1)},
    "over all": {"c": OverAll(lr=0.2), "*": OverAll(lr=0.1)},
    "largest": Largest(),
    "prodigy": {"c": fo.Prodigy(d0=0.01), "*": fo.Prodigy(d0=0.01, lr=0.5, weight_decay=0.1)},
    "dadaptadam": fo.DAdaptAdam(d0=0.01),
    "dadaptsgd": fo.DAdaptSGD(d0=0.01),
}


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_same_bits_everywhere(rule: Any, dtype: Any) -> None:
    wanted = stepped(rule, dtype=dtype, backend="native", threads=1)
    assert wanted.state["a"].get("d", 1.0) > 0.01, "or the estimate has not grown"
    for options in ({"threads": 2}, {"backend": "numba"}, {"verify": True}):
        opt = stepped(rule, dtype=dtype, **options)
        assert opt.fingerprint() == wanted.fingerprint(), options
    reference = stepped(rule, dtype=dtype, backend="reference")
    for name, p in reference.params.items():
        np.testing.assert_allclose(p, wanted.params[name], rtol=2e-4, atol=1e-6)
        for state, values in reference.state[name].items():
            own = wanted.state[name][state]
            np.testing.assert_allclose(values, own, rtol=2e-3, atol=1e-4, err_msg=state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_taken_together(backend: str) -> None:
    params = {"x": np.array([1.0, 2.0]), "y": np.array([3.0]), "z": np.array([-1.0])}
    grads = {"x": np.array([1.0, -4.0]), "y": np.array([2.0]), "z": np.array([8.0])}
    groups = {"z": Own(lr=1.0), "*": Own(lr=1.0)}
    alone = {name: p.copy() for name, p in params.items()}
    opt = fo.Optimizer(alone, groups, backend=backend)
    opt.step(grads)
    # (1 - 8 + 6) / 3 and -8, times the rate 0.5 that the largest begins as.
    assert alone["x"].tolist() == pytest.approx([1 + 0.5 / 3, 2 - 2.0 / 3])
    assert alone["z"] == pytest.approx(-1 + 0.5 * 8 * 8)
    assert [float(opt.state[k]["most"]) for k in ("x", "y", "z")] == [4.0, 4.0, 8.0]
    every = {name: p.copy() for name, p in params.items()}
    opt = fo.Optimizer(every, dict.fromkeys(groups, OverAll(lr=1.0)), backend=backend)
    opt.step(grads)
    assert every["y"] == pytest.approx(3 + 0.5 * 2 * 9 / 4)
    assert {float(state["most"]) for state in opt.state.values()} == {8.0}
    # A leaf without a gradient is no part of the sums, and shares what is kept.
    opt.step({"x": np.array([100.0, 0.0]), "y": None, "z": None})
    assert {float(state["most"]) for state in opt.state.values()} == {100.0}
    assert {float(state["calls"]) for state in opt.state.values()} == {2.0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_maxima_are_of_all_elements_and_keep_nan(backend: str) -> None:
    for at in (0, 16_383, 16_384, 69_999):
        p, g = np.zeros(70_000), np.full(70_000, -2.0)
        g[at] = -1.0
        fo.Optimizer(p, Largest(), backend=backend).step(g)
        assert (p == -1.0).all()  # -1 + 2
        g[at] = np.nan
        fo.Optimizer(p, Largest(), backend=backend).step(g)
        assert np.isnan(p).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [Own(lr=0.1), fo.Prodigy(d0=0.1)], ids=["own", "prodigy"])
def test_all_or_nothing(rule: fo.Rule, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = stepped(rule, backend=backend)
    before = opt.fingerprint()
    grads = {name: np.ones_like(p) for name, p in opt.params.items()}
    if backend != "reference":  # which has the textbook alone
        own = type(rule).measured

        def failing(self: Any, t: int, lr: float, sums: Any, *kept: float) -> Any:
            raise OverflowError("too large")

        monkeypatch.setattr(type(rule), "measured", failing)
        with pytest.raises(OverflowError, match="too large"):
            opt.step(grads)
        monkeypatch.setattr(type(rule), "measured", own)
    with pytest.raises(ValueError, match=r"grads.*b"):
        opt.step({**grads, "b": np.ones(8, np.float32)})
    assert opt.fingerprint() == before
    opt.step(grads)
    assert opt.step_count == 4


@pytest.mark.parametrize("backend", ["native", "numba"])
def test_all_options_at_once_fit_the_rule_of_most_states(backend: str) -> None:
    p: dict[str, Any] = {name: x.astype(np.float16) for name, x in start().items()}
    plain = {name: x.copy() for name, x in p.items()}
    copies = {name: x.copy() for name, x in p.items()}
    rule = fo.Prodigy(d0=0.01)
    options: Any = {"master": "float32", "clip_value": 1.0}
    besides: Any = {"copy_out": copies, "ema": 0.9, "stats": True, "threads": 2}
    slow = fo.Lookahead(k=7)
    opt = fo.Optimizer(p, rule, backend=backend, slow_weights=slow, **options, **besides)
    other = fo.Optimizer(plain, rule, **options)
    for _ in range(3):
        grads = {name: x.copy() for name, x in plain.items()}
        opt.step(grads)
        other.step(grads)
    for name, x in plain.items():
        assert x.tobytes() == p[name].tobytes() == copies[name].tobytes()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_checkpoint_has_what_is_kept(rule: Any, tmp_path: Any) -> None:
    whole, first = stepped(rule), stepped(rule)
    first.save(tmp_path / "saved")
    second = fo.Optimizer(start(), rule)
    second.load(tmp_path / "saved")
    grads = {name: 0.1 * p for name, p in whole.params.items()}
    whole.step(grads)
    second.step(grads)
    assert second.fingerprint() == whole.fingerprint()


def test_other_numbers_go_on_with_what_is_kept() -> None:
    opt = stepped(fo.Prodigy(d0=0.01))
    kept = float(opt.state["a"]["d"])
    opt.lr = 0.25
    grads = {name: np.zeros_like(p) for name, p in opt.params.items()}
    opt.step(grads)
    assert float(opt.state["a"]["d"]) == pytest.approx(kept, rel=1e-6)
    with pytest.raises(ValueError, match="group '\\*': Prodigy takes its sums over all groups"):
        fo.Optimizer(start(), {"a": fo.Prodigy(coef=2.0), "*": fo.Prodigy()})


def test_leaves_of_two_types_have_it_in_both() -> None:
    p: dict[str, Any] = {"b": np.ones(4, np.float32), "a": np.ones(3)}
    opt = fo.Optimizer(p, fo.Prodigy(d0=0.1), verify=True)
    for _ in range(4):
        opt.step({name: 2 * x for name, x in p.items()})
    b, a = (opt.state[name]["d"] for name in p)
    assert np.float32(a) == b > 0.1
    assert (a.dtype, b.dtype) == (np.float64, np.float32)


def test_refusals() -> None:
    opt = fo.Optimizer(start(), fo.Prodigy())
    with pytest.raises(ValueError, match="step_part: Prodigy takes sums over all gradients"):
        opt.step_part(["b"], [np.ones(7, np.float32)])
    with pytest.raises(ValueError, match="Prodigy measures parameters as a whole"):
        opt.step({**dict.fromkeys(SIZES), "a": fo.Rows(np.array([1]), np.ones((1, 301)))})


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"over": "all"},
            "over: expected 'row', 'column', 'parameter', 'group' or 'optimizer', got 'all'",
        ),
        ({"over": "parameter"}, "kept: numbers are kept over a group"),
        ({"maxima": 4}, "maxima: expected at most the 3 values of `measure`, got 4"),
        ({"kept": ("most", "average")}, "kept: a number cannot be called 'average'"),
        ({"measure": None}, "`over`, `maxima` and `kept` are for rules that `measure`"),
    ],
)
def test_what_does_not_fit_is_explained(members: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fo.Optimizer(np.ones(3), type("Wrong", (Own,), members)(lr=0.1))


# ---------------------------------------------------------------- Prodigy and D-Adaptation


def problem(t: int, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gradients of a quadratic bowl, with noise that no step can follow."""
    rng = np.random.default_rng(t)
    return {
        name: np.linspace(0.5, 2.0, p.size).reshape(p.shape) * p
        + 0.01 * rng.standard_normal(p.shape)
        for name, p in params.items()
    }


def prodigy(params: Any, rule: Any, steps: int) -> list[float]:
    """The authors' algorithm on a dict of arrays, in place; returns the estimates of d."""
    b1, b2 = rule.betas
    b3, d0, d, r, estimates = b2**0.5, rule.d0, rule.d0, 0.0, []
    p0 = {k: p.copy() for k, p in params.items()}
    m, v, s = ({k: np.zeros_like(p) for k, p in params.items()} for _ in range(3))
    for t in range(1, steps + 1):
        grads, size = problem(t, params), 0.0
        c = (1 - b2**t) ** 0.5 / (1 - b1**t) if rule.bias_correction else 1.0
        dlr = d * rule.lr * c
        r *= b3
        for k, g in grads.items():
            r += d / d0 * dlr * np.sum(g * (p0[k] - params[k]))
            m[k] = b1 * m[k] + d * (1 - b1) * g
            v[k] = b2 * v[k] + d * d * (1 - b2) * g * g
            s[k] = b3 * s[k] + d / d0 * (d if rule.safeguard else dlr) * g
            size += np.abs(s[k]).sum()
        d = max(d, rule.coef * r / size)
        for k, p in params.items():
            p -= rule.weight_decay * dlr * p
            p -= dlr * m[k] / (np.sqrt(v[k]) + d * rule.eps)
        estimates.append(d)
    return estimates


def dadaptadam(params: Any, rule: Any, steps: int) -> list[float]:
    """Adam with D-Adaptation as the paper has it."""
    b1, b2 = rule.betas
    b3, d, r, estimates = b2**0.5, rule.d0, 0.0, []
    m, v, s = ({k: np.zeros_like(p) for k, p in params.items()} for _ in range(3))
    for t in range(1, steps + 1):
        grads, size, product = problem(t, params), 0.0, 0.0
        c = (1 - b2**t) ** 0.5 / (1 - b1**t) if rule.bias_correction else 1.0
        dlr = d * rule.lr * c
        for k, g in grads.items():
            product += dlr * np.sum(g * s[k] / (np.sqrt(v[k]) + rule.eps))
            m[k] = b1 * m[k] + dlr * (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g * g
            s[k] = b3 * s[k] + dlr * (1 - b3) * g
            size += np.abs(s[k]).sum()
        r = b3 * r + (1 - b3) * product
        d = max(d, r / ((1 - b3) * size))
        for k, p in params.items():
            p -= rule.weight_decay * dlr * p
            p -= m[k] / (np.sqrt(v[k]) + rule.eps)
        estimates.append(d)
    return estimates


def dadaptsgd(params: Any, rule: Any, steps: int) -> list[float]:
    """SGD with D-Adaptation as the authors have it: the mean of iterates x0 - s."""
    d, weighted, estimates, first = rule.d0, 0.0, [], None
    x0 = {k: p.copy() for k, p in params.items()}
    s = {k: np.zeros_like(p) for k, p in params.items()}
    for t in range(1, steps + 1):
        grads = problem(t, params)
        grads = {k: g + rule.weight_decay * params[k] for k, g in grads.items()}
        squares = sum(np.sum(g * g) for g in grads.values())
        first = first or np.sqrt(squares)
        dlr = d * rule.lr / first
        for k, g in grads.items():
            s[k] += dlr * g
        weighted += dlr * dlr * squares
        size = sum(np.sum(x * x) for x in s.values())
        d = max(d, (size - weighted) / np.sqrt(size))
        for k, p in params.items():
            p *= rule.momentum
            p += (1 - rule.momentum) * (x0[k] - s[k])
        estimates.append(d)
    return estimates


FOUND: list[tuple[fo.Rule, Any]] = [
    (fo.Prodigy(d0=1e-3), prodigy),
    (fo.Prodigy(bias_correction=True, coef=0.5, weight_decay=0.1), prodigy),
    (fo.Prodigy(lr=0.5, safeguard=True, betas=(0.8, 0.9)), prodigy),
    (fo.DAdaptAdam(d0=1e-3), dadaptadam),
    (fo.DAdaptAdam(bias_correction=True, lr=0.5, weight_decay=0.1), dadaptadam),
    (fo.DAdaptSGD(), dadaptsgd),
    (fo.DAdaptSGD(momentum=0.0, lr=0.5, weight_decay=0.1), dadaptsgd),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rule", "written"), FOUND, ids=[repr(rule) for rule, _ in FOUND])
def test_trajectories_of_the_papers(rule: Any, written: Any, backend: str) -> None:
    rng = np.random.default_rng(4)
    params = {"w": rng.standard_normal((5, 7)), "b": rng.standard_normal(3)}
    theirs = {name: p.copy() for name, p in params.items()}
    estimates = written(theirs, rule, 40)
    assert estimates[-1] > 5 * rule.d0  # or it would show little
    opt = fo.Optimizer(params, rule, backend=backend)
    for t, estimate in enumerate(estimates, 1):
        opt.step(problem(t, params))
        assert float(opt.state["b"]["d"]) == pytest.approx(estimate, rel=1e-6)
    for name, p in params.items():
        np.testing.assert_allclose(p, theirs[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["prodigy", "dadaptadam", "dadaptsgd"])
def test_narrow_states_find_the_same_size(name: str) -> None:
    found = {}
    for dtype in (None, "bfloat16", "float16"):
        p = np.random.default_rng(2).standard_normal(6000).astype(np.float32)
        opt = fo.Optimizer(p, fo.RULES[name](), state_dtype=dtype)
        for t in range(60):
            opt.step(problem(t, {"p": p})["p"].astype(np.float32))
        found[dtype] = float(opt.state["params"]["d"])
    assert found[None] > 1e-3
    for estimate in found.values():
        assert estimate == pytest.approx(found[None], rel=0.3)
