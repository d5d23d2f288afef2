"""Trainers that take a torch optimizer: the same runs as with torch's own, and resumed ones.

They are the extra `torch-clients`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import fusedopt.torch as ft  # noqa: E402
from tensors import same_bits  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the clients, about each other


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors; threads that wait for each other take most of the time otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def near(ours: Any, theirs: Any) -> bool:
    """Whether two runs of some steps of at most 0.01 differ in rounding alone."""
    return all(
        torch.allclose(p, q, rtol=1e-4, atol=1e-5) for p, q in zip(ours, theirs, strict=True)
    )


def test_trainer_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    # The keys' biases have no gradient but rounding, which a small eps would make steps of.
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    source = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 50, (8,), generator=source) for _ in range(32)]
    data = [{"input_ids": row, "labels": row} for row in rows]

    def trained(module: Any, folder: str, resume: bool = False) -> Any:
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=8, per_device_train_batch_size=4,
            gradient_accumulation_steps=2, save_steps=4, learning_rate=1e-2, weight_decay=0.1,
            lr_scheduler_type="cosine", report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            optimizer_cls_and_kwargs=(module.AdamW, {"lr": 1e-2, "eps": 1e-4}),
        )
        trainer.train(
            resume_from_checkpoint=str(tmp_path / folder / "checkpoint-4") if resume else None
        )
        return [p.detach() for p in model.parameters()]

    ours = trained(ft, "ours")
    assert near(ours, trained(torch.optim, "theirs"))
    assert same_bits(ours, trained(ft, "ours", resume=True))


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Net(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, module: Any) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(
                torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
            )
            self.optim = module

        def training_step(self, batch: Any, _: int) -> Any:
            x, y = batch
            return ((self.net(x) - y) ** 2).mean()

        def configure_optimizers(self) -> Any:
            opt = self.optim.AdamW(self.parameters(), lr=0.01)
            cycle = torch.optim.lr_scheduler.OneCycleLR(opt, 0.01, total_steps=32)
            return [opt], [{"scheduler": cycle, "interval": "step"}]

    source = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 5, generator=source), torch.randn(64, 1, generator=source)
    data = torch.utils.data.TensorDataset(x, y)

    def trained(module: Any, epochs: int, begin: Path | None = None) -> tuple[Any, Any]:
        net = Net(module)
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, gradient_clip_val=0.5,
            default_root_dir=str(tmp_path),
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(data, batch_size=8)
        trainer.fit(net, loader, ckpt_path=begin, weights_only=False)
        return trainer, [p.detach() for p in net.parameters()]

    _, ours = trained(ft, 4)
    assert near(ours, trained(torch.optim, 4)[1])
    trainer, _ = trained(ft, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert same_bits(ours, trained(ft, 4, tmp_path / "half.ckpt")[1])


def test_stable_baselines(tmp_path: Path) -> None:
    sb3 = pytest.importorskip("stable_baselines3")

    def learned(module: Any) -> tuple[Any, Any]:
        policy = {
            "optimizer_class": module.Adam,
            "optimizer_kwargs": {"eps": 1e-5},
            "net_arch": [16],
        }
        model = sb3.PPO(
            "MlpPolicy", "CartPole-v1", n_steps=64, batch_size=32, n_epochs=2, seed=0, device="cpu",
            policy_kwargs=policy,
        )  # fmt: skip
        model.learn(64)
        return model, [p.detach() for p in model.policy.parameters()]

    model, ours = learned(ft)
    assert near(ours, learned(torch.optim)[1])
    model.save(tmp_path / "model")
    state = copy.deepcopy(model.policy.optimizer.state_dict())
    loaded = sb3.PPO.load(tmp_path / "model", device="cpu")
    found = loaded.policy.optimizer.state_dict()
    assert type(loaded.policy.optimizer) is ft.Adam
    for key, entry in state["state"].items():
        assert all(torch.equal(entry[name], found["state"][key][name]) for name in entry)
