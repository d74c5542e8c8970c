"""The recipe's training step as a LightningModule, for users of a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import lightning
from torch import Tensor, nn

from ..errors import InputError
from ..metrics import Metric
from .balance import Balance
from .loop import Labels
from .step import Batch, Optim, Penalty, add_batch, make_optimizers, set_lr, train_step
from .tasks import Task


class IgateModule(lightning.LightningModule):
    """A gated or plain net in Lightning: the same step, groups and schedule as the recipe, for users of a Trainer.

    `steps` is the length of the cosine. Optimisation is manual, because the paper's recipe moves gates by an SGD of
    their own. Validation batches give metrics `<task>/<metric>`. One device: raises InputError under a strategy of
    several processes, DataError when a task has no label in a whole epoch.
    """

    def __init__(
        self,
        net: nn.Module,
        balance: Balance,
        *,
        steps: int,
        optim: Optim | None = None,
        penalty: Penalty | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net, self.balance, self.steps = net, balance, steps
        self.optim, self.penalty = optim or Optim(), penalty
        self._tasks = cast("Sequence[Task]", net.tasks)
        self._metrics: dict[str, Metric] = {}
        self._labels = Labels(self._tasks, 0)

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:
            evidence = f"world_size {self.trainer.world_size}"
            raise InputError("IgateModule trains on one device", evidence, "pass devices=1 to the Trainer")

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return self.net(image)

    def configure_optimizers(self) -> Any:
        return make_optimizers(self.net, self.balance, self.optim)

    def training_step(self, batch: Batch, index: int) -> None:
        wrapped = self.optimizers()
        optimizers: list[Any] = wrapped if isinstance(wrapped, list) else [wrapped]
        step = self.global_step // len(optimizers)
        set_lr(optimizers, step, self.steps, self.optim.warmup)
        self._labels.see(batch)
        seen = train_step(self.net, batch, optimizers, self.balance, self.penalty, step, self.manual_backward)
        self.log_dict({f"train/{name}": value for name, value in seen.items()}, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        self._labels.check()

    def on_validation_epoch_start(self) -> None:
        self._metrics = {}

    def validation_step(self, batch: Batch, index: int) -> None:
        add_batch(self.net, self._tasks, batch, self._metrics)

    def on_validation_epoch_end(self) -> None:
        for name, metric in self._metrics.items():
            self.log_dict({f"{name}/{key}": value for key, value in metric.compute().items()})
