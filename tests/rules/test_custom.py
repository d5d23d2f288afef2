"""Rules of the user's own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from math import exp, sqrt
from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from exactness import assert_same_bits, case, stepped
from formatted import WAYS, assert_same, held, on_each_isa, run
from fusedopt.jit import operations
from fusedopt.programs.elements import clamp, quotient
from fusedopt.rules.adam import adam
from fusedopt.rules.hyperparameters import Betas

pytest.importorskip("numba")

DECOUPLED: dict[str, Any] = {"weight_decay": 0.1, "decay": "decoupled"}


class OwnAdamW(fo.CustomRule):
    """AdamW, whose bits are known."""

    betas: Betas = (0.9, 0.999)
    eps: float = 1e-8
    nonnegative = frozenset(("v",))

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        return fo.AdamW(betas=self.betas, eps=self.eps).scalars(t, lr)

    @staticmethod
    def element(
        p: float, g: float, m: float, v: float, b1: float, one_b1: float, b2: float,
        one_b2: float, step: float, eps_root: float, eps: float,
    ) -> tuple[float, float, float]:  # fmt: skip
        m = b1 * m + one_b1 * g
        v = b2 * v + one_b2 * (g * g)
        return quotient(step * m, sqrt(v + eps_root) + eps), m, v


class Clipped(fo.CustomRule):
    """No state, a helper, and a branch."""

    limit: float = 0.5

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        return lr, self.limit

    @staticmethod
    def element(p: float, g: float, lr: float, limit: float) -> float:
        return lr * clamp(g, limit)


OWN, BUILT_IN = OwnAdamW(lr=0.01, **DECOUPLED), fo.AdamW(lr=0.01, weight_decay=0.1)
BACKENDS = ["native", "numba"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("decay", ["l2", "decoupled", "decoupled_first", "cautious", "independent"])
def test_it_has_the_bits_of_the_same_built_in_rule(decay: Any, dtype: Any, backend: str) -> None:
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "decay": decay}
    cases = [case(BUILT_IN, n, dtype, seed=n, awkward=("g", "m")) for n in (0, 1, 257, 100_003)]
    got = stepped(OwnAdamW(**settings), cases, backend=backend)
    for mine, theirs in zip(got, stepped(fo.AdamW(**settings), cases), strict=True):
        assert_same_bits(mine, theirs, decay)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
def test_every_format(way: str, backend: str) -> None:
    leaves = {"a": 5003, "b": 4096, "c": 3}
    got = run(OWN, WAYS[way], leaves, backend=backend)
    assert_same(got, run(BUILT_IN, WAYS[way], leaves), way)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", ["clip_norm", "clip_value"])
def test_all_that_a_step_does_besides(clip: str, backend: str) -> None:
    p, g = np.ones(5000, np.float32), np.linspace(-1, 1, 5000, dtype=np.float32)
    found = []
    for rule, where in ((OWN, backend), (BUILT_IN, "native")):
        options: dict[str, Any] = {clip: 0.1, "ema": 0.9, "stats": True, "backend": where}
        optimizer = fo.Optimizer(p.copy(), rule, **options)
        found.append(([optimizer.step(g) for _ in range(3)], held(optimizer)))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])


def test_every_instruction_set_and_threads() -> None:
    c = case(OWN, 100_003, np.float32)
    want = stepped(BUILT_IN, [c])[0]
    for isa in on_each_isa():
        assert_same_bits(stepped(OWN, [c], threads=2)[0], want, isa)
        assert_same_bits(stepped(BUILT_IN, [c], threads=1)[0], want, isa)


def test_beside_other_rules_in_one_step() -> None:
    params: dict[str, Any] = {"a": np.ones(9), "b": np.ones(7), "c": np.ones((4, 4), np.float32)}
    rules = {"a": OWN, "b": Clipped(lr=1.0), "c": fo.Muon(lr=0.1)}
    optimizer = fo.Optimizer(params, rules)
    info = optimizer.step({k: np.full_like(p, 3.0) for k, p in params.items()})
    assert info.lr == {"a": 0.01, "b": 1.0, "c": 0.1}
    assert (params["b"] == 0.5).all()
    assert OWN.states == ("m", "v")
    assert not optimizer.state["b"]


def test_one_tensor_at_a_time() -> None:
    p, g = np.ones(100, np.float32), np.full(100, 0.1, np.float32)
    q = np.ones(100, np.float32)
    for rule, array in ((OWN, p), (BUILT_IN, q)):
        states = rule.init(array)
        for t in (1, 2):
            fo.update(rule, t, array, g, *states)
    np.testing.assert_array_equal(p, q)


def test_hyperparameters_checkpoints_and_copies() -> None:
    p, g = np.ones(5000, np.float32), np.linspace(-1, 1, 5000, dtype=np.float32)
    optimizer = fo.Optimizer(p, OWN, state_dtype="dynamic8")
    optimizer.step(g)
    twins = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for one in (optimizer, *twins):
        one.lr = 0.02
        one.replace(eps=1e-6)
        one.step(g)
    assert len({one.fingerprint() for one in (optimizer, *twins)}) == 1
    assert optimizer.rule == OwnAdamW(lr=0.02, eps=1e-6, **DECOUPLED)
    assert OwnAdamW.name == "ownadamw"
    assert "OwnAdamW(lr=0.02" in optimizer.describe()
    with pytest.raises(TypeError, match=r"OwnAdamW\(eps\): expected a number"):
        optimizer.replace(eps="small")


def test_verification_holds_it_to_its_textbook() -> None:
    rng = np.random.default_rng(0)
    p, g = (rng.standard_normal(700).astype(np.float32) for _ in range(2))
    optimizer = fo.Optimizer(p, OWN, verify=True)
    optimizer.step(g)  # the textbook form is `element` on whole arrays
    fo.Optimizer(p, Clipped(), backend="reference").step(g)

    class Wrong(OwnAdamW):
        def textbook(self, p: Any, g: Any, states: Any, *, t: int, lr: float) -> Any:
            delta, states = super().textbook(p, g, states, t=t, lr=lr)
            return 1.001 * delta, states

    before = p.copy()
    with pytest.raises(fo.VerificationError):
        fo.Optimizer(p, Wrong(), verify=True).step(g)
    assert (p == before).all()

    class Branching(Clipped):
        @staticmethod
        def element(p: float, g: float, lr: float, limit: float) -> float:
            return lr * (limit if g > limit else g)

    fo.Optimizer(p, Branching()).step(g)
    with pytest.raises(TypeError, match=r"Branching.textbook: .* define `textbook`"):
        fo.Optimizer(p, Branching(), backend="reference").step(g)


# ---------------------------------------------------------------- what is wrong is explained


def make(element: Callable[..., Any], scalars: Any = lambda self, t, lr: (lr,)) -> fo.Rule:
    cls = type("Mine", (fo.CustomRule,), {"element": element, "scalars": scalars})
    rule: fo.Rule = cls()
    return rule


BAD: dict[str, tuple[Callable[..., Any], str]] = {
    "a constant": (lambda p, g, lr: 0.5 * lr * g, "the delta is float64 .*from `scalars`"),
    "a constant state": (lambda p, g, m, lr: (lr * g, 0.5 * m), "m is float64 .*from `scalars`"),
    "a state too few": (lambda p, g, m, lr: lr * g, r"return 2 values \(.*1 new states.*got 1"),
    "a value too many": (lambda p, g, lr: (lr * g, g), r"return 1 values \(the delta alone.*got 2"),
    "no number": (lambda p, g, lr: "much", "the delta is .* where all else is float32"),
    "an unknown name": (lambda p, g, lr: lr * unknown, "unknown"),  # type: ignore[name-defined] # noqa: F821
    "an object": (lambda p, g, lr: lr * OWN.eps * g, "Numba cannot compile it for float32"),
    "a scalar too many": (lambda p, g: g, "takes 0 parameters behind p and g, but .* 1 values"),
    "other names": (lambda w, d, lr: d, r"expected parameters \(p, g, ...\)"),
    "stars": (lambda p, g, *rest: g, r"expected parameters \(p, g, ...\)"),
    "a reserved name": (lambda p, g, master, lr: (g, g), "cannot be called 'master'"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BAD)
def test_mistakes(name: str, backend: str) -> None:
    element, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=message):
        fo.Optimizer(np.ones(3, np.float32), make(element), backend=backend)


def test_mistakes_in_scalars() -> None:
    for scalars in (lambda self, t, lr: lr, lambda self, t, lr: ("a",)):
        with pytest.raises(TypeError, match=r"Mine.scalars: expected a tuple of floats"):
            fo.Optimizer(np.ones(3), make(lambda p, g, lr: g, scalars))


def test_what_is_beyond_the_contract_is_said() -> None:
    def described(element: Any) -> str:
        return fo.Optimizer(np.ones(3), make(element)).describe()

    assert "exp may give other bits" in described(lambda p, g, lr: lr * exp(g))
    assert "tanh may give other bits" in described(lambda p, g, lr: lr * np.tanh(g))
    assert "** may give other bits" in described(lambda p, g, lr: lr * g**2)
    assert "other bits" not in described(lambda p, g, lr: lr * clamp(sqrt(abs(g)), p))
    assert "Mine: its element function, compiled by Numba" in described(lambda p, g, lr: g)


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "unavailable", lambda: "it is not there")
    with pytest.raises(RuntimeError, match="compiled by Numba: it is not there"):
        fo.Optimizer(np.ones(3), make(lambda p, g, lr: g))
    fo.Optimizer(np.ones(3), Clipped(), backend="reference").step(np.ones(3))


def test_a_changed_function_is_compiled_anew() -> None:
    results = []
    for sign in (1.0, -1.0):
        factor: Any = np.float32(sign)

        def with_factor(p: Any, g: Any, lr: Any) -> Any:
            return lr * g * factor  # noqa: B023  # each function has its own

        p = np.zeros(3, np.float32)
        fo.Optimizer(p, make(with_factor)).step(np.ones(3, np.float32))
        results.append(float(p[0]))
    assert results[0] == -results[1] != 0


def test_the_elements_of_the_registry_are_plain_functions() -> None:
    # On NumPy's scalars they need no compiler.
    numbers: Any = np.array([1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 2, 0, 1], np.float32)
    element: Any = adam
    delta, m, v = element(*numbers)
    assert (delta, m, v) == (1.0, 1.0, 1.0)
