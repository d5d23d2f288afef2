"""What torch's own tests of optimizers ask, of the inputs that torch.testing brings."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest")  # which torch.testing imports

from torch.testing._internal.common_optimizers import optim_db  # noqa: E402

import fusedopt.torch as ft  # noqa: E402
from tensors import assert_near, orthogonalized  # noqa: E402

NOT_OURS = {"differentiable", "capturable"}
NAMED: dict[str, Any] = {getattr(i.optim_cls, "__name__", ""): i for i in optim_db}
INFOS = {name: info for name, info in NAMED.items() if hasattr(ft, name)}
TAKEN = {
    "lr as a Tensor is not supported": "goes with everything here",
    "as a Tensor is not supported for capturable=False and foreach=True": "likewise",
    "Muon only supports 2D parameters": "more dimensions are flattened to two",
}
"""What torch refuses and fusedopt takes, and why."""
CPU = torch.device("cpu")


def inputs(name: str) -> list[tuple[str, dict[str, Any]]]:
    """torch's inputs, without those that are refused by name."""
    found = INFOS[name].optim_inputs_func(device=CPU)
    return [
        (f"{name}-{k}-{given.desc}", given.kwargs)
        for k, given in enumerate(found)
        if not any(given.kwargs.get(flag) for flag in NOT_OURS)
    ]


CASES = [(name, id_, kwargs) for name in INFOS for id_, kwargs in inputs(name)]
EACH = pytest.mark.parametrize(
    ("name", "kwargs"), [(n, kw) for n, _, kw in CASES], ids=[i for _, i, _ in CASES]
)


def test_torch_has_inputs_for_each_class() -> None:
    assert set(INFOS) == {"SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Muon"}
    assert len(CASES) > 40


def problem(name: str, dtype: Any, contiguous: bool) -> tuple[list[Any], Any]:
    """Weight, bias and input of a linear model, as torch's test of the right direction has them."""
    source = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Any:
        if contiguous:
            return torch.randn(*shape, generator=source, dtype=dtype)
        return torch.randn(*shape, 2, generator=source, dtype=dtype)[..., 0]

    if name == "Muon":
        return [torch.nn.Parameter(draw(10, 5)), torch.nn.Parameter(draw(5, 10))], draw(5)
    return [torch.nn.Parameter(draw(10, 5)), torch.nn.Parameter(draw(10))], draw(5)


def loss(params: list[Any], x: Any) -> Any:
    hidden = params[0].mv(x)
    return (params[1].mv(hidden) if params[1].ndim == 2 else hidden + params[1]).pow(2).sum()


def runs(name: str, kwargs: dict[str, Any], dtype: Any, contiguous: bool = True) -> Any:
    """The parameters after 20 steps of ours, of torch's and of torch's in float64, and the losses.

    The gradients are those of ours, for all three.
    """
    ours, x = problem(name, dtype, contiguous)
    theirs = problem(name, dtype, contiguous)[0]
    exact = [torch.nn.Parameter(p.detach().double()) for p in theirs]
    kwargs = {k: v for k, v in kwargs.items() if k not in ("foreach", "fused")}
    opts = [getattr(m, name)(p, **copy.deepcopy(kwargs))
            for m, p in ((ft, ours), (torch.optim, theirs), (torch.optim, exact))]  # fmt: skip
    losses = []
    for _ in range(20):
        opts[0].zero_grad()
        found = loss(ours, x)
        found.backward()
        losses.append(float(found.detach()))
        for p, q, r in zip(ours, theirs, exact, strict=True):
            q.grad, r.grad = p.grad.clone(), p.grad.double()
        for opt in opts:
            opt.step()
    return ours, theirs, exact, losses


@EACH
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_right_direction_and_that_of_torch(
    name: str, kwargs: dict[str, Any], contiguous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", orthogonalized)
    ours, theirs, exact, losses = runs(name, kwargs, torch.float32, contiguous)
    if name == "Muon":  # whose iteration amplifies rounding, up to 485 times
        moved = 20 * float(kwargs.get("lr", 1e-3))
        for p, q in zip(ours, theirs, strict=True):
            assert ((p - q).abs() <= 1e-3 * moved).all()
    else:
        assert_near(ours, theirs, exact)
    rising = kwargs.get("maximize", False)
    assert losses[-1] > losses[0] if rising else losses[-1] < losses[0]


@EACH
def test_state_dict_goes_round_and_deepcopies(name: str, kwargs: dict[str, Any]) -> None:
    params, x = problem(name, torch.float32, True)
    opt: Any = getattr(ft, name)(params, **copy.deepcopy(kwargs))
    for _ in range(3):
        opt.zero_grad()
        loss(params, x).backward()
        opt.step()
    model = torch.nn.ParameterList(params)
    other, copied = copy.deepcopy((model, opt))
    third = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = getattr(ft, name)(third)
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert loaded.state_dict()["param_groups"] == opt.state_dict()["param_groups"]
    for _ in range(3):
        for each, own in ((opt, params), (copied, list(other)), (loaded, third)):
            each.zero_grad()
            loss(own, x).backward()
            each.step()
    for p, q, r in zip(params, other, third, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def attempt(cls: Any, given: Any, step: bool) -> None:
    """Make an optimizer of torch's input, and take a step with it if asked."""
    opt = cls(given.params, **given.kwargs)
    if step:
        for p in given.params:
            p.grad = torch.ones_like(p)
        opt.step()


@pytest.mark.parametrize("name", INFOS)
def test_wrong_arguments_raise(name: str) -> None:
    """Of torch's own kinds; the messages are fusedopt's."""
    errors = INFOS[name].optim_error_inputs_func(device=CPU, dtype=torch.float32)
    assert errors
    for error in errors:
        given = error.optimizer_error_input
        if any(text in error.error_regex for text in TAKEN):
            continue
        with pytest.raises((ValueError, TypeError, KeyError, UserWarning)):
            attempt(getattr(ft, name), given, error.error_on.name == "STEP_ERROR")


@EACH
def test_no_gradients_change_nothing(name: str, kwargs: dict[str, Any]) -> None:
    params, _ = problem(name, torch.float32, True)
    before = [p.detach().clone() for p in params]
    opt: Any = getattr(ft, name)(params, **copy.deepcopy(kwargs))
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert not opt.state_dict()["state"]
