"""Rules that read sums over their parameter, built in and of the user's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fusedopt as fo
from exactness import DTYPES, assert_same_bits, case, stepped
from fusedopt.programs.arithmetic import norm, summed, trust_ratio
from fusedopt.verification.running_error import Bounded
from own_rules import OwnLARS

pytest.importorskip("numba")


class Counting(fo.CustomRule):
    """Steps by the share of positive gradients: one sum counts, one is of all elements."""

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        return ()

    @staticmethod
    def measure(p: float, g: float) -> tuple[float, float]:
        return (1.0 if g > 0 else 0.0), 1.0

    def measured(self, t: int, lr: float, sums: tuple[float, ...]) -> tuple[float, ...]:
        positive, count = sums
        return (lr * positive / count,)

    @staticmethod
    def element(p: float, g: float, rate: float) -> float:
        return rate


DECAY: dict[str, Any] = {"weight_decay": 0.125}
SIZES = (5, 0, 100_003, 257, 70_000, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["native", "numba"])
@pytest.mark.parametrize("decay", ["l2", "decoupled", "decoupled_first", "cautious"])
def test_a_users_rule_has_the_bits_of_the_built_in_one(
    decay: Any, backend: str, dtype: type
) -> None:
    cases = [case(fo.LARS(), n, dtype, seed=n) for n in SIZES]
    own, built_in = (
        cls(lr=0.5, trust=0.1, maximize=True, decay=decay, **DECAY) for cls in (OwnLARS, fo.LARS)
    )
    wanted = stepped(built_in, cases)
    for k, got in enumerate(stepped(own, cases, backend=backend)):
        assert_same_bits(got, wanted[k], f"leaf {k} on {backend}")


@pytest.mark.parametrize("rule", [fo.LARS(lr=0.5), fo.LAMB(lr=0.5), OwnLARS(lr=0.5)], ids=repr)
def test_every_option_goes_with_it(rule: fo.Rule) -> None:
    rng = np.random.default_rng(0)
    start = {"w": rng.standard_normal((70, 90)), "b": rng.standard_normal(11)}
    grads = {name: rng.standard_normal(p.shape) for name, p in start.items()}
    plain = {name: p.copy() for name, p in start.items()}
    options: dict[str, Any] = {"ema": 0.5, "stats": True, "clip_norm": 1e9}
    every = {name: p.copy() for name, p in start.items()}
    fo.Optimizer(plain, rule).step(grads)
    opt = fo.Optimizer(every, rule, zero_grads=True, verify=True, **options)
    info = opt.step({name: g.copy() for name, g in grads.items()})
    assert all(np.array_equal(plain[name], every[name]) for name in start)
    assert info.stats is not None
    assert set(info.stats["w"]) == {"grad_norm", "update_ratio"}
    assert info.stats["b"]["grad_norm"] == pytest.approx(np.linalg.norm(grads["b"]))


def test_the_norm_is_of_the_clipped_gradient() -> None:
    p, clipped = np.array([3.0, 4.0]), np.array([3.0, 4.0])
    fo.Optimizer(p, OwnLARS(lr=1.0, trust=0.1)).step(np.array([1.0, -1.0]))
    fo.Optimizer(clipped, OwnLARS(lr=1.0, trust=0.1), clip_value=1.0).step(np.array([50.0, -8.0]))
    assert np.array_equal(p, clipped)


def test_counts_and_leaves_without_a_gradient() -> None:
    p: dict[str, Any] = {"a": np.zeros(4, np.float32), "b": np.zeros(2), "c": np.zeros(3)}
    opt = fo.Optimizer(p, Counting(lr=1.0))
    opt.step({"a": np.array([1, -1, 1, 1], np.float32), "b": None, "c": np.array([0.0, 0, 1])})
    opt.step({"a": None, "b": np.array([1.0, -1]), "c": None})
    assert p["a"].tolist() == [-0.75] * 4
    assert p["b"].tolist() == [-0.5] * 2
    assert p["c"] == pytest.approx(-1 / 3)


@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
def test_nothing_is_written_where_the_sums_of_one_leaf_are_refused(backend: str) -> None:
    class Refusing(OwnLARS):
        def measured(self, t: int, lr: float, sums: tuple[float, ...]) -> tuple[float, ...]:
            if sums[1] > 1000:
                raise OverflowError("too large")
            return super().measured(t, lr, sums)

    p = {"a": np.ones(300), "b": np.ones(3), "c": np.ones((2, 2))}
    rules = {"c": fo.SGD(), "*": Refusing(lr=0.1)}
    opt = fo.Optimizer(p, rules, backend=backend, zero_grads=True, stats=True)
    opt.step({name: np.ones_like(a) * 0.5 for name, a in p.items()})
    before = opt.fingerprint()
    grads = {name: np.ones_like(a) for name, a in p.items()}
    grads["b"][0] = 50.0
    with pytest.raises(OverflowError, match="too large"):
        opt.step(grads)
    assert opt.fingerprint() == before
    assert grads["a"].all()
    grads["b"][0] = 1.0
    opt.step(grads)
    assert opt.step_count == 2


def test_some_rows_are_refused() -> None:
    opt = fo.Optimizer(np.ones((4, 2)), fo.LARS())
    with pytest.raises(ValueError, match="LARS measures parameters as a whole"):
        opt.step(fo.Rows(np.array([1]), np.ones((1, 2))))


def wrong(**members: Any) -> fo.Rule:
    return type("Wrong", (OwnLARS,), members)(lr=0.1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"measure": lambda p, g, v, momentum: p * p}, r"measure: expected a tuple of floats"),
        ({"measured": lambda self, t, lr, sums: None}, r"measured: expected a tuple of floats"),
        ({"measure": lambda p, g, momentum: (p, g)}, r"expected the states of `element`, \('v',\)"),
        ({"measure": lambda g, p, v, momentum: (p, g)}, r"expected parameters \(p, g, ...\)"),
        ({"measured": lambda self, t, lr, sums: (1.0,) * 3}, r"`scalars` and `measured` return"),
    ],
)
def test_what_does_not_fit_is_explained(members: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fo.Optimizer(np.ones(3), wrong(**members))


def test_scaled_decay_is_for_rules_that_have_it() -> None:
    with pytest.raises(ValueError, match="'scaled' is not available for this rule"):
        fo.AdamW(decay="scaled")


def test_a_number_made_of_sums_has_their_rounding() -> None:
    x = np.ones(1 << 14)
    for dtype, least, most in ((np.float64, 300.0, 1000.0), (np.float32, 1.0, 1.001)):
        bounded = Bounded.exact(x, np.dtype(dtype))
        share = (summed(0.3, bounded) * bounded).error / (0.3 * bounded).error
        assert (share >= least).all()
        assert (share <= most).all()
    assert (summed(0.3, x) * x.astype(np.float32)).dtype == np.float32


def test_norms_of_the_references() -> None:
    x = np.array([3.0, 4.0])
    assert norm(x) == 5.0
    assert trust_ratio(norm(x), norm(2 * x)) == 0.5
    assert trust_ratio(norm(0 * x), norm(x)) == trust_ratio(norm(x), norm(0 * x)) == 1.0
