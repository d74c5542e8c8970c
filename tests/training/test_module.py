"""The LightningModule takes the same steps as the recipe's loop, and pools its validation metrics."""

from __future__ import annotations

from pathlib import Path

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from igate_edge.errors import DataError, InputError
from igate_edge.gating.budget import HardFraction
from igate_edge.gating.convert import PlainNet, interrogate
from igate_edge.training.balance import Balance
from igate_edge.training.module import IgateModule
from igate_edge.training.step import Optim, evaluate, make_optimizers, set_lr, train_step
from igate_edge.training.tasks import Depth, SemanticSegmentation

TASKS = [SemanticSegmentation("semseg", 3, head_width=4), Depth("depth", head_width=4)]


def backbone() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 4, 1, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU())


def batches(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    return [
        {
            "image": torch.randn(2, 3, 16, 16, generator=rng),
            "semseg": torch.randint(0, 3, (2, 16, 16), generator=rng).byte(),
            "depth": torch.rand(2, 16, 16, generator=rng) * (index + 1),
        }
        for index in range(count)
    ]


def loader(items: list[dict[str, torch.Tensor]]) -> DataLoader:
    return DataLoader(items, batch_size=None)  # type: ignore[arg-type]


def trainer(folder: Path, steps: int) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


@pytest.mark.parametrize("gate_optimizer", ["adam", "sgd"])
def test_same_steps_as_the_loop(tmp_path: Path, gate_optimizer: str) -> None:
    data, optim = batches(5, 1), Optim(lr=0.01, warmup=1, gate_optimizer=gate_optimizer)
    nets = [interrogate(backbone(), TASKS, granule=4) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    balance, penalty = Balance({"semseg": 1.0, "depth": 2.0}), HardFraction(0.2)
    optimizers = make_optimizers(nets[0], balance, optim)
    for step, batch in enumerate(data):
        set_lr(optimizers, step, 5, optim.warmup)
        train_step(nets[0].train(), batch, optimizers, balance, penalty, step)
    module = IgateModule(nets[1], balance, steps=5, optim=optim, penalty=penalty)
    trainer(tmp_path, 5 * len(optimizers)).fit(module, loader(data))
    for name, value in nets[0].state_dict().items():
        torch.testing.assert_close(nets[1].state_dict()[name], value, msg=name)


def test_backward_goes_through_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Precision plugins scale the loss there; a backward of our own would bypass them."""
    calls = []
    whole = IgateModule.manual_backward

    def counted(self: IgateModule, loss: torch.Tensor) -> None:
        calls.append(loss.ndim)
        whole(self, loss)

    monkeypatch.setattr(IgateModule, "manual_backward", counted)
    net = PlainNet(backbone(), TASKS, torch.zeros(1, 3, 16, 16))
    trainer(tmp_path, 2).fit(IgateModule(net, Balance({"semseg": 1.0, "depth": 1.0}), steps=2), loader(batches(2, 1)))
    assert calls == [0, 0]


def test_several_devices_are_refused(tmp_path: Path) -> None:
    class Two(lightning.Trainer):
        world_size = property(lambda self: 2)

    module = IgateModule(PlainNet(backbone(), TASKS, torch.zeros(1, 3, 16, 16)), Balance({"semseg": 1.0}), steps=1)
    module.trainer = Two(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    with pytest.raises(InputError, match="one device: world_size 2.*devices=1"):
        module.setup("fit")


def test_a_task_without_a_label_in_an_epoch_is_an_error(tmp_path: Path) -> None:
    data = [{**batch, "depth": torch.zeros_like(batch["depth"])} for batch in batches(2, 1)]
    net = PlainNet(backbone(), TASKS, torch.zeros(1, 3, 16, 16))
    with pytest.raises(DataError, match="no label of depth"):
        trainer(tmp_path, 4).fit(IgateModule(net, Balance({"semseg": 1.0, "depth": 1.0}), steps=4), loader(data))


def test_validation_pools_pixels_over_batches(tmp_path: Path) -> None:
    data, net = batches(3, 2), PlainNet(backbone(), TASKS, torch.zeros(1, 3, 16, 16))
    module = IgateModule(net, Balance({"semseg": 1.0, "depth": 1.0}), steps=1)
    (logged,) = trainer(tmp_path, 1).validate(module, loader(data), verbose=False)
    expected = evaluate(net, TASKS, data)
    assert logged["depth/rmse"] == pytest.approx(expected["depth"]["rmse"], rel=1e-6)
    assert logged["semseg/miou"] == pytest.approx(expected["semseg"]["miou"], rel=1e-6)
