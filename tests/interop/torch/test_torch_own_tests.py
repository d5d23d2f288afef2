"""What torch's own tests of optimizers ask, of the inputs that torch.testing brings.

Its file of tests (test/test_optim.py) is in no package; each test here names that one's test which
asks the same. Those that are left out concern what is not here: agreement of `foreach`, `fused`,
`capturable` and compiled forms with the plain one, several devices, CUDA's memory and graphs,
autograd through a step (`differentiable`), and the classes Adafactor, ASGD, LBFGS and SparseAdam,
of which the last is Adam here.
"""

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
    assert set(NAMED) - set(INFOS) == {"Adafactor", "ASGD", "LBFGS", "SparseAdam"}
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
    """Errors are of torch's own kinds; the messages are fusedopt's."""
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


def stepped(opt: Any, params: list[Any], x: Any, steps: int = 5) -> float:
    """Take steps on the linear model; the loss of the last."""
    for _ in range(steps):
        opt.zero_grad()
        found = loss(params, x)
        found.backward()
        opt.step()
    return float(found.detach())


SCHEDULED = [(name, k) for name, info in INFOS.items() for k in range(len(info.scheduler_inputs))]


@pytest.mark.parametrize(("name", "k"), SCHEDULED)
def test_groups_with_schedulers_are_those_of_torch(name: str, k: int) -> None:
    """test_param_group_with_lrscheduler_goes_right_direction, and param_groups_lr."""
    made = []
    for module in (ft, torch.optim):
        params, x = problem(name, torch.float64, True)
        opt = getattr(module, name)([{"params": params[:1]}, {"params": params[1:], "lr": 0.01}])
        schedulers = [make(opt) for make in INFOS[name].scheduler_inputs[k]]
        rates = []
        for _ in range(20):
            last = stepped(opt, params, x, 1)
            for each in schedulers:
                plateau = isinstance(each, torch.optim.lr_scheduler.ReduceLROnPlateau)
                each.step(*([1.0] if plateau else []))
            rates += [float(group["lr"]) for group in opt.param_groups]
        made.append((params, rates, last))
    assert made[0][1] == made[1][1]
    if name != "Muon":  # whose products torch takes in bfloat16
        for p, q in zip(made[0][0], made[1][0], strict=True):
            assert torch.allclose(p, q, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", INFOS)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_rate_in_a_tensor(name: str, shape: tuple[int, ...]) -> None:
    """test_tensor_lr."""
    made = []
    for lr in (0.01, torch.full(shape, 0.01, dtype=torch.float64)):
        params, x = problem(name, torch.float32, True)
        stepped(getattr(ft, name)(params, lr=lr), params, x)
        made.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*made, strict=True))


@EACH
def test_a_complex_number_is_two_real_ones(name: str, kwargs: dict[str, Any]) -> None:
    """test_complex and test_complex_2d."""
    if name == "Muon":
        with pytest.raises(ValueError, match="complex"):
            ft.Muon([torch.nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))])._bound()
        return
    source = torch.Generator().manual_seed(3)
    both = torch.nn.Parameter(torch.randn(5, 4, generator=source, dtype=torch.complex64))
    parts = [torch.nn.Parameter(part.detach().clone()) for part in (both.real, both.imag)]
    a, b = (getattr(ft, name)(p, **copy.deepcopy(kwargs)) for p in ([both], parts))
    for _ in range(5):
        a.zero_grad()
        b.zero_grad()
        (both * both.conj()).real.sum().backward()
        (parts[0] ** 2 + parts[1] ** 2).sum().backward()
        a.step()
        b.step()
        assert torch.equal(both.real, parts[0])
        assert torch.equal(both.imag, parts[1])


@EACH
def test_older_checkpoints(name: str, kwargs: dict[str, Any]) -> None:
    """test_can_load_older_state_dict, and test_load_nontensor_step."""
    params, x = problem(name, torch.float32, True)
    opt = getattr(ft, name)(params, **copy.deepcopy(kwargs))
    stepped(opt, params, x)
    saved = copy.deepcopy(opt.state_dict())
    for entry in saved["state"].values():
        entry.update({n: entry[n].item() for n in ("step", "mu_product") if n in entry})
    flags = ("maximize", "foreach", "fused", "capturable", "differentiable")
    for group in saved["param_groups"]:
        for flag in flags:
            group.pop(flag, None)
    other = [torch.nn.Parameter(p.detach().clone()) for p in params]
    opt.param_groups[0]["maximize"] = False
    loaded = getattr(ft, name)(other)
    loaded.load_state_dict(saved)
    stepped(opt, params, x)
    stepped(loaded, other, x)
    assert all(torch.equal(p, q) for p, q in zip(params, other, strict=True))


@EACH
def test_checkpoints_are_loaded_as_weights_only(
    name: str, kwargs: dict[str, Any], tmp_path: Any
) -> None:
    """test_save_load_equality_with_weights_only."""
    params, x = problem(name, torch.float32, True)
    opt = getattr(ft, name)(params, **copy.deepcopy(kwargs))
    stepped(opt, params, x)
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    found, own = torch.load(tmp_path / "opt.pt", weights_only=True), opt.state_dict()
    assert found["param_groups"] == own["param_groups"]
    for key, entry in own["state"].items():
        assert entry.keys() == found["state"][key].keys()
        assert all(torch.equal(entry[n], found["state"][key][n]) for n in entry)


@EACH
def test_zero_gradients_without_decay_change_nothing(name: str, kwargs: dict[str, Any]) -> None:
    """test_step_is_noop_for_zero_grads."""
    params, _ = problem(name, torch.float32, True)
    opt = getattr(ft, name)(params, **{**copy.deepcopy(kwargs), **without_decay(name)})
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def without_decay(name: str) -> dict[str, Any]:
    """Hyperparameters that ask for no weight decay."""
    return {} if name == "Rprop" else {"weight_decay": 0}


@EACH
def test_copies_have_all_public_attributes_and_a_printed_form(
    name: str, kwargs: dict[str, Any]
) -> None:
    """test_deepcopy_copies_all_public_attrs, and test_optimizer_can_be_printed."""
    params, _ = problem(name, torch.float32, True)
    opt = getattr(ft, name)(params, **copy.deepcopy(kwargs))
    public = {n for n in vars(opt) if not n.startswith("_")}
    assert public == {n for n in vars(copy.deepcopy(opt)) if not n.startswith("_")}
    assert name in repr(opt)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch's own Adagrad
@pytest.mark.parametrize("name", [n for n, i in INFOS.items() if i.supports_sparse])
def test_uncoalesced_sparse_gradients(name: str) -> None:
    """test_rosenbrock_sparse."""
    arguments, _ = INFOS[name].metadata_for_sparse
    p, q, r = (torch.nn.Parameter(torch.tensor([1.5, 1.5])) for _ in range(3))
    a, b = (getattr(ft, name)([each], **arguments) for each in (p, q))
    c = getattr(torch.optim, name)([r], **arguments)
    for step in range(100):
        x, y = p.detach()
        w = step % 2
        slope = float((-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2))[w])
        values = torch.tensor([0.25 * slope, 0.75 * slope])
        p.grad = torch.sparse_coo_tensor(
            torch.tensor([[w, w]]), values, (2,), check_invariants=True
        )
        q.grad, r.grad = p.grad.to_dense(), p.grad.clone()
        for opt in (a, b, c):
            opt.step()
        assert torch.equal(p, q)
    assert torch.allclose(p, r, rtol=1e-4)


def test_hooks_of_all_optimizers() -> None:
    """test_step_all_hooks."""
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    seen: list[str] = []
    params, x = problem("SGD", torch.float32, True)
    opt = ft.SGD(params)
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("all before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("all after")),
        opt.register_step_pre_hook(lambda *_: seen.append("before")),
        opt.register_step_post_hook(lambda *_: seen.append("after")),
    ]
    stepped(opt, params, x, 1)
    for handle in handles:
        handle.remove()
    stepped(opt, params, x, 1)
    assert seen == ["all before", "before", "after", "all after"]


def test_the_default_dtype_is_without_effect() -> None:
    """test_set_default_dtype_works_with_foreach."""
    params, x = problem("Adam", torch.float32, True)
    opt = ft.Adam(params)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        stepped(opt, params, x)
    finally:
        torch.set_default_dtype(before)
    assert {v.dtype for v in opt.state[params[0]].values()} == {torch.float32}


def test_tensors_without_elements() -> None:
    params = [torch.nn.Parameter(torch.zeros(n, 3)) for n in (0, 2)]
    for p in params:
        p.grad = torch.ones_like(p)
    for name in INFOS:
        if name != "Muon":
            getattr(ft, name)(params).step()
    assert params[1].detach().ne(0).all()
