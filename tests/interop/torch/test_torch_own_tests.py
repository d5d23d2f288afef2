"""What torch's own tests of optimizers ask, of the inputs that torch.testing brings.

Its file of tests (test/test_optim.py) is in no package; each test here names that one's test which
asks the same. Left out are:

- of a GPU: test_forloop_goes_right_direction_multigpu, test_state_dict_with_cuda_params,
  test_cpu_load_state_dict, test_fused_cpu_matches_cuda, test_defaults_changed_to_foreach,
  test_peak_memory_foreach, test_foreach_large_tensor;
- of 64 GB of memory: test_fused_large_tensor;
- of torch's inputs and not of an optimizer: test_optim_infos_do_not_specify_global_cliquey_kwargs;
- of classes that are not here: test_second_order_optims_return_consistent_types (LBFGS), and what
  the other tests ask of ASGD, LBFGS and SparseAdam, of which the last is Adam here;
- of `differentiable`, which is refused: TestDifferentiableOptimizer (test/optim/test_optim.py);
- of schedulers and averages alone: TestLRScheduler, TestSWAUtils.
"""

from __future__ import annotations

import copy
import inspect
import pickle
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
    assert set(NAMED) - set(INFOS) == {"ASGD", "LBFGS", "SparseAdam"}
    assert len(CASES) > 40


def made(name: str, params: Any, kwargs: dict[str, Any]) -> Any:
    """An optimizer of ours with one of torch's inputs."""
    return getattr(ft, name)(params, **copy.deepcopy(kwargs))


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
    """test_forloop_goes_right_direction."""
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
    """test_state_dict_deterministic."""
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
    """test_errors: errors are of torch's own kinds; the messages are fusedopt's."""
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
    """test_step_is_noop_when_params_have_no_grad."""
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
    """test_complex and test_complex_2d, real parameters among complex ones included."""
    if name in ("Muon", "Adafactor"):
        with pytest.raises(ValueError, match="complex"):
            made(name, [torch.nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))], {})._bound()
        return
    source = torch.Generator().manual_seed(3)
    both = torch.nn.Parameter(torch.randn(5, 4, generator=source, dtype=torch.complex64))
    parts = [torch.nn.Parameter(part.detach().clone()) for part in (both.real, both.imag)]
    reals = [torch.nn.Parameter(torch.ones(7)) for _ in range(2)]
    a, b = (made(name, p, kwargs) for p in ([both, reals[0]], [*parts, reals[1]]))
    for _ in range(5):
        a.zero_grad()
        b.zero_grad()
        ((both * both.conj()).real.sum() + (reals[0] ** 2).sum()).backward()
        ((parts[0] ** 2 + parts[1] ** 2).sum() + (reals[1] ** 2).sum()).backward()
        a.step()
        b.step()
        assert torch.equal(both.real, parts[0])
        assert torch.equal(both.imag, parts[1])
        assert torch.equal(*reals)


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


@EACH
def test_gradients_are_left_alone(name: str, kwargs: dict[str, Any]) -> None:
    """test_grads_are_never_inplaced_into; and the states' numbers of steps."""
    params, x = problem(name, torch.float32, True)
    opt = made(name, params, kwargs)
    for step in range(1, 4):
        opt.zero_grad()
        loss(params, x).backward()
        before = [(p.grad, p.grad._version, p.grad.clone()) for p in params]
        opt.step()
        for p, (grad, version, elements) in zip(params, before, strict=True):
            assert p.grad is grad
            assert grad._version == version
            assert torch.equal(grad, elements)
            assert opt.state[p].get("step", step) == step


FLAGGED = [
    pytest.param(name, kwargs, flag, id=f"{id_}-{flag}")
    for name, id_, kwargs in CASES
    for flag in ("foreach", "fused")
    if flag in inspect.signature(getattr(ft, name)).parameters
]


@pytest.mark.parametrize(("name", "kwargs", "flag"), FLAGGED)
def test_how_torch_computes_is_without_effect(name: str, kwargs: dict[str, Any], flag: str) -> None:
    """test_foreach_matches_forloop, test_fused_matches_forloop and test_mixed_device_dtype: with
    frozen layers, steps without gradients, single elements, and dtypes that go together."""
    runs = []
    for value in (False, True):
        dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        params = [p for dtype in dtypes for p in problem(name, dtype, True)[0]]
        params += [torch.nn.Parameter(torch.ones((), dtype=dtype)) for dtype in dtypes]
        opt = made(name, params, {**kwargs, flag: value})
        source = torch.Generator().manual_seed(7)
        for step in range(7):
            for k, p in enumerate(params):
                p.requires_grad_(not (k % 3 == 0 and 3 <= step < 5))
                drawn = torch.randn(p.shape, generator=source).to(p.dtype)
                p.grad = drawn if step != 2 and p.requires_grad else None
            opt.step()
        assert {v.dtype for p in params for n, v in opt.state[p].items() if n == "step"} <= {
            torch.float32
        }
        runs.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


@EACH
def test_groups_are_optimizers_of_their_own(name: str, kwargs: dict[str, Any]) -> None:
    """test_param_groups_weight_decay and test_param_groups_lr: to the bit, and the loss moves."""
    together, x = problem(name, torch.float32, True)
    alone = problem(name, torch.float32, True)[0]
    first = {"lr": 1e-3, **copy.deepcopy(kwargs)}
    own = [first, {**copy.deepcopy(kwargs), **without_decay(name), "lr": 1e-3}]
    opt = getattr(ft, name)(
        [{"params": [p], **k} for p, k in zip(together, copy.deepcopy(own), strict=True)], lr=1e-28
    )
    others = [made(name, [p], k) for p, k in zip(alone, own, strict=True)]
    losses = []
    for _ in range(20):
        opt.zero_grad()
        found = loss(together, x)
        found.backward()
        for p, q in zip(together, alone, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        losses.append(float(found.detach()))
        for each in (opt, *others):
            each.step()
    assert all(torch.equal(p, q) for p, q in zip(together, alone, strict=True))
    if "lr" not in kwargs or float(kwargs["lr"]) != 0:
        rising = kwargs.get("maximize", False)
        assert losses[-1] > losses[0] if rising else losses[-1] < losses[0]


@pytest.mark.parametrize("name", INFOS)
@pytest.mark.parametrize("named", [(True, False), (False, True), (True, True)], ids=str)
def test_named_parameters(name: str, named: tuple[bool, bool]) -> None:
    """test_state_dict_deterministic and test_can_load_from_to_named_state_dict."""
    runs = []
    for has_names in named:
        params, x = problem(name, torch.float32, True)
        given = [(f"layer.{k}", p) for k, p in enumerate(params)] if has_names else params
        runs.append((params, getattr(ft, name)(given)))
    (params, opt), (others, loaded) = runs
    stepped(opt, params, x)
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert loaded.state_dict()["param_groups"][0]["param_names"] == ["layer.0", "layer.1"]
    stepped(opt, params, x)
    stepped(loaded, others, x)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    saved, other = opt.state_dict(), loaded.state_dict()
    for key, entry in saved["state"].items():
        assert all(torch.equal(entry[n], other["state"][key][n]) for n in entry)
    loaded.param_groups.extend(loaded.param_groups)  # the same parameters have the same numbers
    repeated = loaded.state_dict()["param_groups"]
    assert [group["params"] for group in repeated] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("name", INFOS)
def test_hooks_of_saving_and_loading(name: str) -> None:
    """test_state_dict_pre_hook, _post_hook and _pre_post_hook, and those of load_state_dict, of
    which hooks may write keys into the state that are no parameters."""
    params, x = problem(name, torch.float32, True)
    opt = getattr(ft, name)(params)
    stepped(opt, params, x, 2)
    opt.register_state_dict_pre_hook(lambda o: o.state.update({"note": 1}))
    assert opt.state_dict()["state"]["note"] == 1

    def without(o: Any, saved: dict[str, Any]) -> dict[str, Any]:
        return {**saved, "noted": saved["state"].pop("note", None)}

    opt.register_state_dict_post_hook(without)
    saved = opt.state_dict()
    assert saved.pop("noted") == 1
    assert "note" not in saved["state"]

    def rate(value: float) -> Any:
        def hook(o: Any, given: dict[str, Any]) -> dict[str, Any]:
            given = copy.deepcopy(given)
            given["param_groups"][0]["lr"] = value
            return given

        return hook

    opt.register_load_state_dict_pre_hook(rate(0.002))
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.002
    opt.register_load_state_dict_pre_hook(rate(0.003), prepend=True)  # the other has the last word
    opt.register_load_state_dict_post_hook(
        lambda o: o.state.update({"loaded with": o.param_groups[0]["lr"]})
    )
    opt.load_state_dict(saved)
    assert opt.state["loaded with"] == 0.002
    stepped(opt, params, x, 2)  # and steps with what the hooks have left there
    assert all(opt.state[p].get("step", 4) == 4 for p in params)


@EACH
def test_states_have_something_in_them(name: str, kwargs: dict[str, Any]) -> None:
    """test_non_empty_state."""
    params, x = problem(name, torch.float32, True)
    opt = made(name, params, kwargs)
    stepped(opt, params, x, 1)
    assert all(opt.state.values())


@pytest.mark.parametrize("name", INFOS)
def test_parameters_without_memory_are_refused(name: str) -> None:
    """test_fused_error_on_params_on_meta."""
    with torch.device("meta"):
        model = torch.nn.Linear(4, 3, bias=name != "Muon")
    opt = getattr(ft, name)(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="to_empty"):
        opt.step()
    model.to_empty(device="cpu")  # which makes parameters anew
    opt = getattr(ft, name)(model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
            p.grad = torch.ones_like(p)
    opt.step()
    assert all((p != 1.0).all() for p in model.parameters())


@pytest.mark.parametrize("name", INFOS)
@pytest.mark.parametrize("scale", [None, 1.0])
def test_no_step_where_a_gradient_was_infinite(name: str, scale: float | None) -> None:
    """test_fused_does_not_step_if_foundinf."""
    params, x = problem(name, torch.float32, True)
    opt = getattr(ft, name)(params)
    before = [p.detach().clone() for p in params]
    opt.grad_scale = None if scale is None else torch.tensor(scale)
    opt.found_inf = torch.ones(())
    stepped(opt, params, x, 1)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert not any(opt.state[p].get("step", 0) for p in params)


def test_adamw_stays_decoupled() -> None:
    """test_adamw_serialization: also with a checkpoint of Adam, or one that does not say."""
    params, x = problem("AdamW", torch.float32, True)
    adam = ft.Adam(params)
    stepped(adam, params, x, 2)
    saved = adam.state_dict()
    for _ in range(2):
        opt = ft.AdamW(params)
        opt.load_state_dict(copy.deepcopy(saved))
        assert opt.param_groups[0]["decoupled_weight_decay"] is True
        assert pickle.loads(pickle.dumps(opt)).param_groups[0]["decoupled_weight_decay"] is True
        saved["param_groups"][0].pop("decoupled_weight_decay", None)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    "name", [n for n, i in INFOS.items() if i.supports_sparse and i.metadata_for_sparse[1]]
)
def test_sparse_gradients_with_schedulers(name: str) -> None:
    """test_rosenbrock_sparse with_lrsched: as with dense gradients, and towards the solution."""
    arguments, makers = INFOS[name].metadata_for_sparse
    start = torch.tensor([1.5, 1.5], dtype=torch.float64)
    p, q = (torch.nn.Parameter(start.clone()) for _ in range(2))
    opts = [getattr(ft, name)([each], **arguments) for each in (p, q)]
    schedulers = [[make(opt) for make in makers] for opt in opts]
    for step in range(1800):  # as many as the solution takes to come nearer
        x, y = p.detach()
        w = 1 - step % 2
        slope = (-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2))[w]
        p.grad = torch.sparse_coo_tensor(torch.tensor([[w]]), slope[None], (2,))
        q.grad = p.grad.to_dense()
        for opt, each in zip(opts, schedulers, strict=True):
            opt.step()
            for scheduler in each:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([(1 - x) ** 2 + 100 * (y - x**2) ** 2] if plateau else []))
    assert torch.allclose(p, q, rtol=1e-9)
    assert p.detach().dist(torch.ones_like(p)) <= start.dist(torch.ones_like(start))


def test_hooks_of_all_optimizers() -> None:
    """test_step_all_hooks, test_step_pre_hook and test_step_post_hook."""
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
