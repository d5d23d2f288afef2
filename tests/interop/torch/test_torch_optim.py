"""The optimizers of fusedopt.torch against those of torch.optim, on the same gradients."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import fusedopt as fo  # noqa: E402
import fusedopt.torch as ft  # noqa: E402
from fusedopt.arrays.foreign import host_array  # noqa: E402
from tensors import (  # noqa: E402
    MATRICES,
    SHAPES,
    STEPS,
    assert_near,
    give,
    in_groups,
    orthogonalized,
    parameters,
    run,
    same_bits,
)

CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True}),
    ("Adam", {"weight_decay": 0.1}),
    ("Adam", {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    ("Adam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("AdamW", {"betas": (0.8, 0.9), "eps": 1e-6}),
    ("AdamW", {"amsgrad": True}),
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.1, "weight_decay": 0.1}),
    ("RMSprop", {"weight_decay": 0.1}),
    ("RMSprop", {"weight_decay": 0.1, "centered": True, "momentum": 0.9}),
    ("Adamax", {"weight_decay": 0.1, "maximize": True}),
    ("Adadelta", {"weight_decay": 0.1, "rho": 0.8}),
    ("NAdam", {"weight_decay": 0.1, "momentum_decay": 0.1}),
    ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RAdam", {"weight_decay": 0.1}),
    ("RAdam", {"weight_decay": 0.1, "betas": (0.8, 0.9), "decoupled_weight_decay": True}),
    ("Rprop", {"etas": (0.4, 1.3), "step_sizes": (1e-3, 0.1)}),
    ("Adafactor", {"weight_decay": 0.1, "eps": (1e-6, 1e-2), "d": 1.5}),
    ("Adafactor", {"beta2_decay": -0.5, "maximize": True}),
]
IDS = [f"{name}-{'-'.join(arguments)}" for name, arguments in CASES]
ELEMENTWISE = (
    *("SGD", "Adam", "Adagrad", "RMSprop"),
    *("Adamax", "Adadelta", "NAdam", "RAdam", "Rprop"),
)
OWN = ("Lion", "Sophia", "NorMuon", "AdaMuon", "SOAP")


def shapes_for(name: str) -> Any:
    return MATRICES if name in ("Muon", "NorMuon", "AdaMuon", "SOAP") else SHAPES


def as_double(params: list[Any]) -> list[Any]:
    return [torch.nn.Parameter(p.detach().double()) for p in params]


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=IDS)
def test_a_run_is_that_of_torch(name: str, arguments: dict[str, Any]) -> None:
    ours, theirs, exact = parameters(), parameters(), as_double(parameters())
    a = getattr(ft, name)(in_groups(ours), **arguments)
    b, c = (getattr(torch.optim, name)(in_groups(p), **arguments) for p in (theirs, exact))
    for step in range(STEPS):
        give(ours, step)
        for p, q, r in zip(ours, theirs, exact, strict=True):
            assert p.grad is not None
            q.grad, r.grad = p.grad.clone(), p.grad.double()
        for opt in (a, b, c):
            opt.step()
    assert_near(ours, theirs, exact)
    for p, q, r in zip(ours, theirs, exact, strict=True):
        names = {key for key, value in b.state[q].items() if value is not None}
        assert set(a.state[p]) == names
        shared = [k for k in names if k != "step"]
        entries = (a.state[p], b.state[q], c.state[r])
        assert_near(*([entry[key] for key in shared] for entry in entries))
        assert "step" not in names or a.state[p]["step"] == b.state[q]["step"]


def test_muon_is_that_of_torch_with_wide_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", orthogonalized)
    ours, theirs = parameters(MATRICES), parameters(MATRICES)
    a, b = (m.Muon(in_groups(p), momentum=0.9) for m, p in ((ft, ours), (torch.optim, theirs)))
    run(a, ours)
    run(b, theirs)
    for p, q in zip(ours, theirs, strict=True):  # rates up to 0.02
        assert ((p - q).abs() <= 1e-3 * STEPS * 0.02).all()


@pytest.mark.parametrize("name", [*ELEMENTWISE, "AdamW", *OWN, "Muon", "Adafactor"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_run_has_the_bits_of_the_direct_call(name: str, dtype: str) -> None:
    ours = parameters(shapes_for(name), getattr(torch, dtype))
    direct = parameters(shapes_for(name), getattr(torch, dtype))
    a = getattr(ft, name)(ours, **({} if name == "Rprop" else {"weight_decay": 0.1}))
    rule = a._rule(a.param_groups[0])
    b = fo.Optimizer([p.detach() for p in direct], rule)
    for step in range(STEPS):
        give(ours, step)
        a.step()
        b.step([p.grad for p in ours])
    assert same_bits(ours, direct)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_complex_parameters_are_pairs_of_reals(name: str) -> None:
    arguments = {"SGD": {"momentum": 0.9}}.get(name, {})
    ours, theirs = parameters(dtype=torch.complex64), parameters(dtype=torch.complex64)
    exact = [torch.nn.Parameter(p.detach().to(torch.complex128)) for p in ours]
    a = getattr(ft, name)(ours, **arguments)
    b, c = (getattr(torch.optim, name)(p, **arguments) for p in (theirs, exact))
    for step in range(STEPS):
        give(ours, step)
        for p, q, r in zip(ours, theirs, exact, strict=True):
            assert p.grad is not None
            q.grad, r.grad = p.grad.clone(), p.grad.to(torch.complex128)
        for opt in (a, b, c):
            opt.step()
    assert_near(*([torch.view_as_real(p) for p in params] for params in (ours, theirs, exact)))
    state = a.state[ours[0]]
    assert all(v.dtype == torch.complex64 for v in state.values() if v.shape == ours[0].shape)


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "Adamax", "RAdam"])
def test_one_cycle_moves_momentum_too(name: str) -> None:
    arguments = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    ours, theirs, exact = parameters(), parameters(), as_double(parameters())
    opts = []
    for module, params in ((ft, ours), (torch.optim, theirs), (torch.optim, exact)):
        opt = getattr(module, name)(in_groups(params), weight_decay=0.1, **arguments)
        cycle = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=2 * STEPS)
        opts.append((opt, cycle))
    for step in range(STEPS):
        give(ours, step)
        for p, q, r in zip(ours, theirs, exact, strict=True):
            assert p.grad is not None
            q.grad, r.grad = p.grad.clone(), p.grad.double()
        for opt, cycle in opts:
            opt.step()
            cycle.step()
    assert_near(ours, theirs, exact)
    engine = opts[0][0]._engine
    assert engine is not None
    assert engine.opt.step_count == STEPS  # no new engine for new hyperparameters


def test_hyperparameters_of_a_group_are_live() -> None:
    changes: dict[int, dict[str, Any]] = {
        3: {"lr": 0.5}, 5: {"weight_decay": 0.0}, 7: {"betas": (0.5, 0.6)}, 9: {"eps": 1e-3},
        11: {"maximize": True}, 13: {"weight_decay": 0.2, "lr": torch.tensor(0.1)},
    }  # fmt: skip
    ours, theirs, exact = parameters(), parameters(), as_double(parameters())
    for module, params in ((ft, ours), (torch.optim, theirs), (torch.optim, exact)):
        opt = module.AdamW(params)
        for step in range(STEPS):
            opt.param_groups[0].update(changes.get(step, {}))
            give(ours, step)
            for p, q in zip(ours, params, strict=True):
                q.grad = p.grad.to(q.dtype)
            opt.step()
    assert_near(ours, theirs, exact)


def test_a_learning_rate_in_a_tensor_is_read_in_each_step() -> None:
    ours, other = parameters(), parameters()
    lr = torch.tensor(0.1)
    a, b = ft.AdamW(ours, lr=lr), ft.AdamW(other, lr=float(lr))
    run(a, ours, 3)
    run(b, other, 3)
    lr.fill_(0.01)
    b.param_groups[0]["lr"] = float(lr)
    run(a, ours, 3, 3)
    run(b, other, 3, 3)
    assert same_bits(ours, other)


def test_other_hyperparameters_in_tensors_are_read_in_each_step_too() -> None:
    ours, other = parameters(), parameters()
    decay = torch.tensor(0.5)
    a, b = ft.AdamW(ours, weight_decay=decay), ft.AdamW(other, weight_decay=0.5)
    for step in range(6):
        if step == 3:
            decay.fill_(0.25)
            b.param_groups[0]["weight_decay"] = 0.25
        run(a, ours, 1, step)
        run(b, other, 1, step)
    assert same_bits(ours, other)


def test_frozen_late_and_added_parameters() -> None:
    ours, theirs, exact = parameters(), parameters(), as_double(parameters())
    for module, params in ((ft, ours), (torch.optim, theirs), (torch.optim, exact)):
        opt = module.Adam(params[:3], weight_decay=0.1)
        params[0].requires_grad_(False)
        for step in range(STEPS):
            if step == 5:
                params[0].requires_grad_(True)
            if step == 9:
                opt.add_param_group({"params": params[3:], "lr": 0.3})
            give(ours, step)
            for k, (p, q) in enumerate(zip(ours, params, strict=True)):
                frozen = not params[0].requires_grad and k == 0
                q.grad = None if frozen else p.grad.to(q.dtype)
            opt.step()
        assert [opt.state[p]["step"] for p in (params[0], params[1], params[4])] == [20, 25, 16]
    assert_near(ours, theirs, exact)


def test_a_frozen_parameter_has_no_state() -> None:
    params = parameters()
    opt = ft.AdamW(params)
    give(params, 0)
    params[1].grad = None
    opt.step()
    assert params[1] not in opt.state
    assert len(opt.state_dict()["state"]) == len(params) - 1


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    w = torch.nn.Parameter(torch.ones(3))
    opt = ft.SGD([w], lr=0.1)

    def closure() -> Any:
        opt.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert opt.step(closure).item() == 3.0
    assert torch.allclose(w, torch.full((3,), 0.8))


def test_hooks_are_called() -> None:
    params = parameters()
    seen: list[Any] = []
    opt = ft.SGD(params)
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    opt.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    opt.register_load_state_dict_pre_hook(lambda o, s: seen.append(type(s["state"])))
    run(opt, params, 1)
    opt.load_state_dict(opt.state_dict())
    assert seen == ["before", "after", "saved", dict]


def test_a_profiler_sees_the_steps() -> None:
    params = parameters()
    opt = ft.SGD(params)
    run(opt, params, 1)
    with torch.autograd.profiler.profile() as seen:
        run(opt, params, 2)
    run(opt, params, 1)
    steps = [e for e in seen.function_events if e.name == "Optimizer.step#SGD.step"]
    assert len(steps) == 2


def test_grad_scaler_unscales_and_skips() -> None:
    ours, theirs, exact = parameters(), parameters(), as_double(parameters())
    for module, params in ((ft, ours), (torch.optim, theirs), (torch.optim, exact)):
        opt = module.AdamW(params, lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        for step in range(STEPS):
            give(ours, step)
            for p, q in zip(ours, params, strict=True):
                q.grad = p.grad.to(q.dtype) * scaler.get_scale()
            if step == 4:
                params[2].grad.fill_(float("inf"))
            if step == 6:
                scaler.unscale_(opt)
            scaler.scale(torch.ones(1))
            scaler.step(opt)
            scaler.update()
        assert opt.state[params[0]]["step"] == STEPS - 1
    assert_near(ours, theirs, exact)


def test_sparse_gradients_touch_their_rows() -> None:
    table, other = (torch.nn.Embedding(50, 6, sparse=True) for _ in range(2))
    other.load_state_dict(table.state_dict())
    a, b = ft.Adam(table.parameters()), torch.optim.SparseAdam(other.parameters())
    indices = torch.tensor([3, 7, 3, 49])
    for step in range(STEPS):
        for embedding, opt in ((table, a), (other, b)):
            opt.zero_grad()
            (embedding(indices + (step % 1)) ** 2).sum().backward()
            opt.step()
    close = (table.weight - other.weight).abs() <= 1e-5 * other.weight.abs() + 1e-6
    assert close.all()
    untouched = torch.ones(50, dtype=torch.bool)
    untouched[indices] = False
    assert torch.equal(table.weight[untouched], other.weight[untouched])


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "gaps", "permuted"])
def test_layouts_of_memory(layout: str) -> None:
    def laid(p: Any) -> Any:
        if layout == "channels_last":
            return torch.nn.Parameter(p.to(memory_format=torch.channels_last))
        if layout == "transposed":
            return torch.nn.Parameter(p.transpose(0, 3).contiguous().transpose(0, 3))
        if layout == "permuted":
            return torch.nn.Parameter(p.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2))
        wide = torch.zeros(*p.shape[:-1], 2 * p.shape[-1])
        wide[..., ::2] = p
        return torch.nn.Parameter(wide[..., ::2])

    start = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(1))
    ours, plain = [laid(start)], [torch.nn.Parameter(start.clone())]
    assert ours[0].stride() != plain[0].stride()
    a, b = ft.AdamW(ours), ft.AdamW(plain)
    for step in range(STEPS):
        give(plain, step)
        assert plain[0].grad is not None
        ours[0].grad = torch.empty_like(ours[0]).copy_(plain[0].grad)
        a.step()
        b.step()
    assert same_bits(ours, plain)
    for key, value in b.state[plain[0]].items():
        assert torch.equal(a.state[ours[0]][key], value)
        assert a.state[ours[0]][key].shape == value.shape


@pytest.mark.parametrize("master", [None, "float32"])
def test_replaced_storage_is_followed(master: str | None) -> None:
    dtype = torch.bfloat16 if master else torch.float32
    ours, other = parameters(dtype=dtype), parameters(dtype=dtype)
    a, b = ft.AdamW(ours, master=master), ft.AdamW(other, master=master)
    for step in range(STEPS):
        if step % 5 == 3:
            for p in ours:
                p.data = p.detach().clone()
        run(a, ours, 1, step)
        run(b, other, 1, step)
    assert same_bits(ours, other)


def test_a_parameter_written_by_the_user_renews_its_master() -> None:
    ours = parameters(dtype=torch.bfloat16)
    opt = ft.SGD(ours, lr=0.0, master="float32")
    run(opt, ours, 2)
    with torch.no_grad():
        ours[0].fill_(3.0)
    run(opt, ours, 1)
    assert (ours[0] == 3.0).all()
    assert same_bits(ours[1:], parameters(dtype=torch.bfloat16)[1:])


def test_autograd_notices_the_step() -> None:
    w = torch.nn.Parameter(torch.ones(3))
    opt = ft.SGD([w], lr=0.1)
    loss = (w**2).sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_zero_grad_and_zero_grads() -> None:
    params = parameters()
    opt = ft.AdamW(params, zero_grads=True)
    run(opt, params, 2)
    assert all(not p.grad.any() for p in params)
    opt.zero_grad()
    assert all(p.grad is None for p in params)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"state_dtype": "bfloat16", "rounding": "stochastic", "seed": 3},
    {"state_dtype": {"exp_avg": "dynamic8", "exp_avg_sq": "float8"}},
    {"master": "float32", "clip_norm": 1.0, "ema": 0.9},
    {"master": "split16"},
    {"rounding": "kahan"},
    {"clip_value": 0.5, "skip_nonfinite": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_are_those_of_the_direct_call(options: dict[str, Any]) -> None:
    shapes = ((70, 70), (3,))
    ours, direct = (parameters(shapes, torch.bfloat16) for _ in range(2))
    a = ft.AdamW(ours, **options)
    names = {"exp_avg": "m", "exp_avg_sq": "v"}
    chosen = options.get("state_dtype")
    if isinstance(chosen, dict):
        options = {**options, "state_dtype": {names[k]: v for k, v in chosen.items()}}
    tree = {"0": [p.detach() for p in direct]}
    b = fo.Optimizer(tree, {"0.*": fo.AdamW.like("torch")}, **options)
    for step in range(STEPS):
        give(ours, step)
        a.step()
        b.step({"0": [p.grad for p in ours]})
    assert same_bits(ours, direct)


def test_groups_hold_what_cannot_be_compared() -> None:
    """Arrays of a user's own, put there anew before each step, are equal or not by element."""
    ours, other = parameters(), parameters()
    opt, plain = ft.AdamW(ours), ft.AdamW(other)
    for step in range(4):
        opt.param_groups[0]["seen"] = [torch.arange(3), torch.arange(3).numpy()][step % 2]
        for each in (opt, plain):
            each.param_groups[0]["weight_decay"] = 0.1 * (step // 2)
        run(opt, ours, 1, step)
        run(plain, other, 1, step)
    assert same_bits(ours, other)


def test_verify_checks_each_step() -> None:
    ours, other = parameters(), parameters()
    run(ft.AdamW(ours, verify=True), ours, 3)
    run(ft.AdamW(other), other, 3)
    assert same_bits(ours, other)


def test_averages_take_the_place_of_parameters() -> None:
    params = parameters()
    opt = ft.SGD(params, ema=0.5, lr=0.1)
    before = [p.detach().clone() for p in params]
    run(opt, params, 1)
    after = [p.detach().clone() for p in params]
    with opt.averaged():
        for p, a, b in zip(params, before, after, strict=True):
            assert torch.allclose(p, (a + b) / 2)
    assert same_bits(params, after)


SCHEDULE_FREE = (
    fo.ScheduleFreeSGD(lr=0.5, warmup_steps=20, weight_decay=0.01),
    fo.ScheduleFreeAdamW(lr=0.02, warmup_steps=20, weight_decay=0.01),
)


@pytest.mark.parametrize("rule", SCHEDULE_FREE, ids=lambda rule: rule.name)
def test_schedule_free_is_trained_evaluated_and_resumed(rule: fo.Rule) -> None:
    """A regression, whose loss at the averages falls; resumed, it has the bits of the whole run."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(64, 5, generator=source)
    y = x @ torch.randn(5, 3, generator=source) + 0.1 * torch.randn(64, 3, generator=source)

    def made() -> tuple[Any, Any]:
        torch.manual_seed(1)
        model = torch.nn.Linear(5, 3)
        return model, ft.Optimizer(model.parameters(), rule)

    def loss(model: Any) -> Any:
        return torch.nn.functional.mse_loss(model(x), y)

    def train(model: Any, opt: Any, steps: int) -> None:
        for _ in range(steps):
            opt.zero_grad()
            loss(model).backward()
            opt.step()

    whole, opt = made()
    began = loss(whole).item()
    train(whole, opt, 150)
    params, trained = list(whole.parameters()), copy.deepcopy(list(whole.parameters()))
    with opt.averaged():
        for p, before in zip(params, trained, strict=True):  # y = (1 - beta) z + beta x, d = z - y
            d = opt.state[p]["d"]
            assert torch.allclose(p, before - d * (1 / 0.9 - 1), rtol=1e-5, atol=1e-6)
        assert not same_bits(params, trained)
        evaluated = loss(whole).item()
    assert same_bits(params, trained)
    assert evaluated < 0.05 * began

    half, opt = made()
    train(half, opt, 70)
    with opt.averaged():  # which leaves nothing behind
        pass
    file = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "model": half.state_dict()}, file)
    parts = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed, opt = made()
    resumed.load_state_dict(parts["model"])
    opt.load_state_dict(parts["opt"])
    train(resumed, opt, 80)
    assert same_bits(list(resumed.parameters()), params)
    with opt.averaged():
        assert loss(resumed).item() == evaluated


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("way", ["state_dict", "torch.save", "pickle", "deepcopy"])
def test_a_resumed_run_has_the_same_bits(way: str, options: dict[str, Any]) -> None:
    shapes = ((70, 70), (3,))
    whole = parameters(shapes, torch.bfloat16)
    model = torch.nn.ParameterList(parameters(shapes, torch.bfloat16))
    half = list(model)
    run(ft.AdamW(in_groups(whole), **options), whole)
    opt: Any = ft.AdamW(in_groups(half), **options)
    run(opt, half, 10)
    if way == "state_dict":
        parts = copy.deepcopy((opt.state_dict(), model.state_dict()))
        model = torch.nn.ParameterList(parameters(shapes, torch.bfloat16))
        opt = ft.AdamW(in_groups(list(model)), **options)
        opt.load_state_dict(parts[0])
        model.load_state_dict(parts[1])
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save({"opt": opt.state_dict(), "model": model.state_dict()}, file)
        parts = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        model = torch.nn.ParameterList(parameters(shapes, torch.bfloat16))
        opt = ft.AdamW(in_groups(list(model)), **options)
        model.load_state_dict(parts["model"])
        opt.load_state_dict(parts["opt"])
    elif way == "pickle":
        model, opt = pickle.loads(pickle.dumps((model, opt)))
    else:
        model, opt = copy.deepcopy((model, opt))
    run(opt, list(model), STEPS - 10, 10)
    assert same_bits(list(model), whole)


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=IDS)
@pytest.mark.parametrize("way", ["to torch", "from torch"])
def test_checkpoints_go_both_ways(name: str, arguments: dict[str, Any], way: str) -> None:
    first, second = (ft, torch.optim) if way == "to torch" else (torch.optim, ft)
    ours, theirs, exact = parameters(), parameters(), as_double(parameters())
    a = getattr(first, name)(in_groups(ours), **arguments)
    run(a, ours, 10)
    saved = copy.deepcopy(a.state_dict())
    a = getattr(second, name)(in_groups(ours))
    a.load_state_dict(saved)
    run(a, ours, STEPS - 10, 10)
    b, c = (getattr(torch.optim, name)(in_groups(p), **arguments) for p in (theirs, exact))
    for step in range(STEPS):
        give(theirs, step)
        for q, r in zip(theirs, exact, strict=True):
            assert q.grad is not None
            r.grad = q.grad.double()
        b.step()
        c.step()
    assert_near(ours, theirs, exact)


def test_a_product_of_momenta_that_does_not_follow_is_refused() -> None:
    params = parameters()
    theirs = torch.optim.NAdam(params, momentum_decay=0.2)
    run(theirs, params, 3)
    saved = theirs.state_dict()
    saved["param_groups"][0]["momentum_decay"] = 0.1
    opt = ft.NAdam(params)
    opt.load_state_dict(saved)
    with pytest.raises(ValueError, match="mu_product"):
        opt.step()


def test_an_epsilon_that_is_none_is_that_of_the_dtype() -> None:
    wide, narrow = parameters(dtype=torch.float64), parameters()
    groups = [{"params": p} for p in (wide, narrow, [*parameters(dtype=torch.float64), *narrow])]
    for group, eps in zip(groups, (2.0**-52, 2.0**-23, 2.0**-23), strict=True):
        opt = ft.Adafactor([group])
        assert opt.param_groups[0]["eps"] == (None, 1e-3)
        assert opt._rule(opt.param_groups[0]) == fo.Adafactor.like("torch", eps=eps)
    # Gradients below one epsilon and above the other.
    ours, theirs, exact = (parameters(dtype=torch.float64) for _ in range(3))
    a, b, c = ft.Adafactor(ours), torch.optim.Adafactor(theirs), torch.optim.Adafactor(exact)
    for opt, params in ((a, ours), (b, theirs), (c, exact)):
        for p in params:
            p.grad = torch.full_like(p, 1e-9)
        opt.step()
    assert_near(ours, theirs, exact)
    fused = fo.Optimizer([p.detach().numpy() for p in theirs], fo.Adafactor.like("torch"))
    with pytest.raises(ValueError, match=r"eps 1\.19.* here, 2\.22.* there"):
        fo.interop.from_torch(fused, b.state_dict())
    fused.replace(eps=2.0**-52)
    fo.interop.from_torch(fused, b.state_dict())


def test_the_first_step_of_rprop_has_the_rate_of_its_time() -> None:
    ours, theirs, exact = parameters(), parameters(), as_double(parameters())
    for module, params in ((ft, ours), (torch.optim, theirs), (torch.optim, exact)):
        opt = module.Rprop(params, lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 / (1 + step))
        for step in range(STEPS):
            give(ours, step)
            for k, (p, q) in enumerate(zip(ours, params, strict=True)):
                late = step < 5 and k == 1
                q.grad = None if late else p.grad.to(q.dtype)
            opt.step()
            schedule.step()
    assert_near(ours, theirs, exact)


def test_a_schedule_is_called_with_the_number_of_the_step() -> None:
    ours, direct = parameters(), parameters()
    rule = fo.AdamW(lr=fo.schedules.Linear(1e-3, steps=10))
    a, b = ft.Optimizer(ours, rule), fo.Optimizer([p.detach() for p in direct], rule)
    for step in range(STEPS):
        give(ours, step)
        a.step()
        b.step([p.grad for p in ours])
    assert same_bits(ours, direct)


@pytest.mark.parametrize("flag", ["differentiable", "capturable"])
def test_what_torch_alone_has_is_refused_by_name(flag: str) -> None:
    make: Any = ft.AdamW
    with pytest.raises(ValueError, match=flag):
        make(parameters(), **{flag: True})
    opt = ft.AdamW(parameters())
    with pytest.raises(ValueError, match=flag):
        opt.add_param_group({"params": [torch.zeros(2, requires_grad=True)], flag: True})
    assert len(opt.param_groups) == 1


def test_refusals() -> None:
    make: Any = ft.AdamW
    with pytest.raises(TypeError, match="no argument foo"):
        make(parameters(), foo=1)
    with pytest.raises(ValueError, match="two dimensions"):
        ft.Muon([torch.zeros(3, requires_grad=True)])
    with pytest.raises(ValueError, match="Nesterov"):
        ft.SGD(parameters(), nesterov=True)
    with pytest.raises(ValueError, match="lr"):
        ft.AdamW(parameters(), lr=-1.0)
    opt = ft.AdamW(parameters())
    opt.param_groups[0]["lr"] = -1.0
    give(opt.param_groups[0]["params"], 0)
    with pytest.raises(ValueError, match="lr"):
        opt.step()


def test_any_rule_and_groups_with_rules_of_their_own() -> None:
    ours, direct = parameters(MATRICES[:1] + SHAPES[1:2]), parameters(MATRICES[:1] + SHAPES[1:2])
    groups = [{"params": ours[:1], "rule": fo.Muon()}, {"params": ours[1:], "lr": 0.5}]
    a = ft.Optimizer(groups, fo.AdamW(lr=0.01))
    rules = {"0": fo.Muon(), "1": fo.AdamW(lr=0.5)}
    b = fo.Optimizer([p.detach() for p in direct], rules)
    for step in range(STEPS):
        give(ours, step)
        a.step()
        b.step([p.grad for p in ours])
    assert same_bits(ours, direct)
    again = pickle.loads(pickle.dumps(a))
    assert again.param_groups[0]["rule"] == "muon"


def test_sophia_takes_estimates() -> None:
    ours, direct = parameters(), parameters()
    a, b = ft.Sophia(ours, bs=10), fo.Optimizer([p.detach() for p in direct], fo.Sophia(bs=10))
    for step in range(STEPS):
        give(ours, step)
        grads = [p.grad for p in ours]
        a.step(hessian=grads)
        b.step(grads, hessian=grads)
    assert same_bits(ours, direct)


def test_gradients_of_single_elements_may_be_lazily_negated() -> None:
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.tensor([1.0 + 2.0j]).conj().imag
    assert p.grad.is_neg()
    ft.SGD([p], lr=1.0).step()
    assert p.item() == 3.0


def test_state_is_shared_memory() -> None:
    params = parameters()
    opt = ft.SGD(params, lr=0.1, momentum=0.5)
    run(opt, params, 2)
    for p in params:
        opt.state[p]["momentum_buffer"].zero_()
    before = [p.detach().clone() for p in params]
    run(opt, params, 1, 2)
    for p, q in zip(params, before, strict=True):
        assert p.grad is not None
        assert torch.allclose(p, q - 0.1 * p.grad)


@pytest.mark.parametrize("name", [*ELEMENTWISE, *OWN, "AdamW", "Muon", "Adafactor", "Optimizer"])
def test_classes_can_be_subclassed(name: str) -> None:
    cls = getattr(ft, name)
    arguments = [fo.AdamW()] if name == "Optimizer" else []
    ours, other = parameters(shapes_for(name)), parameters(shapes_for(name))
    run(type("Mine", (cls,), {})(ours, *arguments), ours, 2)
    run(cls(other, *arguments), other, 2)
    assert same_bits(ours, other)


def test_importing_fusedopt_imports_no_torch() -> None:
    import subprocess
    import sys

    script = "import sys, fusedopt; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_no_warning_of_schedulers() -> None:
    params = parameters()
    opt = ft.AdamW(params)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(opt, params, 2, after=lambda step: schedule.step())


def test_tensors_are_taken_where_arrays_are() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
        arrays = [host_array(p) for p in theirs]
        a, b = fo.Optimizer(ours, fo.AdamW()), fo.Optimizer(arrays, fo.AdamW())
        for step in range(5):
            give(ours, step)
            grads = [p.grad for p in ours]
            same = [host_array(g) for g in grads]
            assert fo.global_norm(grads) == fo.global_norm(same)
            assert a.step(grads).step == b.step(same).step
        assert a.fingerprint() == b.fingerprint()


def test_a_tensor_with_other_memory_is_refused_until_rebind() -> None:
    params = parameters()
    opt = fo.Optimizer(params, fo.AdamW())
    give(params, 0)
    grads = [p.grad for p in params]
    opt.step(grads)
    params[0].data = params[0].detach().clone()
    with pytest.raises(ValueError, match="rebind"):
        opt.step(grads)
    opt.rebind(params)
    assert opt.step(grads).step == 2
