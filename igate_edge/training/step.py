"""One training step: parameter groups, schedule, step, evaluation; shared by the loop and the LightningModule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..metrics import Metric, make_metric
from .balance import Balance
from .tasks import Task

Batch = Mapping[str, Tensor]
Penalty = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Optim:
    """How parameters move. Gates and mixes have their own rates and no decay; `gate_optimizer` sgd is the paper's."""

    lr: float = 2e-3
    weight_decay: float = 1e-2
    warmup: int = 30
    gate_lr: float = 0.02
    gate_optimizer: str = "adam"
    mix_lr: float = 0.01


def make_optimizers(net: Any, balance: Balance, optim: Optim) -> list[torch.optim.Optimizer]:
    """AdamW for weights, mixes and loss weights; gates join it with decay 0, or get an SGD of their own."""
    gates = list(net.gate_parameters()) if hasattr(net, "gate_parameters") else []
    mixes = list(net.mix_parameters()) if hasattr(net, "mix_parameters") else []
    special = {id(p) for p in [*gates, *mixes]}
    weights = [p for p in net.parameters() if id(p) not in special and p.requires_grad]
    groups = [
        _group([p for p in weights if p.ndim > 1], optim.lr, optim.weight_decay, cosine=True),
        _group([p for p in weights if p.ndim <= 1], optim.lr, 0.0, cosine=True),
        _group([p for p in mixes if p.requires_grad], optim.mix_lr, 0.0, cosine=True),
        _group(list(balance.parameters()), optim.mix_lr, 0.0, cosine=False),
    ]
    gate_group = _group([p for p in gates if p.requires_grad], optim.gate_lr, 0.0, cosine=False)
    if optim.gate_optimizer == "adam":
        groups.append(gate_group)
    elif optim.gate_optimizer != "sgd":
        raise InputError(f"unknown gate optimiser {optim.gate_optimizer!r}", "known: adam, sgd", "use one of these")
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW([g for g in groups if g["params"]], fused=True)]
    if optim.gate_optimizer == "sgd" and gate_group["params"]:
        made.append(torch.optim.SGD([gate_group]))
    return made


def _group(params: list[nn.Parameter], lr: float, decay: float, *, cosine: bool) -> dict[str, Any]:
    return {"params": params, "lr": lr, "base_lr": lr, "weight_decay": decay, "betas": (0.9, 0.999), "cosine": cosine}


def set_lr(optimizers: Iterable[torch.optim.Optimizer], step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to 0 at `steps`; gates keep their rate. Returns the factor."""
    warmup = min(warmup, steps // 5)
    if step < warmup:
        factor = (step + 1) / (warmup + 1)
    else:
        factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * (factor if group["cosine"] else 1.0)
    return factor


def train_step(
    net: Any,
    batch: Batch,
    optimizers: Sequence[torch.optim.Optimizer],
    balance: Balance,
    penalty: Penalty | None = None,
    step: int = 0,
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> dict[str, Tensor]:
    """Forward, backward, update. Returns detached losses: one a task present, `total`, and `penalty` when there is one.

    `total` leaves the budget out, and may be negative (uncertainty weights): choose networks by metrics (cases M7). All
    tasks see the same frames, so a shared norm has one set of statistics (cases M6).
    A task without a label in the batch is skipped: its parameters keep gradient None, so no optimiser moves them.
    """
    losses: dict[str, Tensor] = net.losses(batch)
    if not losses:
        raise InputError("a batch holds no label of any task", f"keys {sorted(batch)}", "check the data folder")
    balance.observe(losses, net, step)
    total = balance(losses)
    seen = {name: loss.detach() for name, loss in losses.items()} | {"total": total.detach()}
    if penalty is not None:
        extra = penalty(net)
        seen["penalty"] = extra.detach()
        total = total + extra
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    backward(total)
    for optimizer in optimizers:
        optimizer.step()
    return seen


@torch.no_grad()
def add_batch(net: Any, tasks: Sequence[Task], batch: Batch, metrics: dict[str, Metric]) -> None:
    """Predict one batch and add it to `metrics`, tasks without a label left out. The net must be in eval mode."""
    raws = net(batch["image"])
    for task in tasks:
        if task.target in batch:
            label = batch[task.target]
            size = (int(label.shape[-2]), int(label.shape[-1])) if task.spec.dense else (1, 1)
            metric = metrics.setdefault(task.name, make_metric(task.spec))
            metric.update(task.decode(raws[task.name], size), label.cpu().numpy())


def evaluate(net: Any, tasks: Sequence[Task], batches: Iterable[Batch]) -> dict[str, dict[str, float]]:
    """Metrics of every task that has labels in `batches` (image preprocessed, labels at full size); pixels pooled."""
    metrics: dict[str, Metric] = {}
    training = net.training
    net.eval()
    for batch in batches:
        add_batch(net, tasks, batch, metrics)
    net.train(training)
    return {name: metric.compute() for name, metric in metrics.items()}


def memory_format(net: nn.Module) -> torch.memory_format:
    """Channels-last, which is faster, unless a strided 1x1 convolution has fewer than 8 inputs.

    oneDNN's backward of those writes out of bounds in channels-last (torch 2.13, CPU): tiny nets crash.
    """
    tight = any(
        isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels < 8
        for m in net.modules()
    )
    return torch.contiguous_format if tight else torch.channels_last


def to_device(batch: Batch, device: torch.device, form: torch.memory_format = torch.channels_last) -> Batch:
    """A batch on the device, its image in the net's memory format."""
    moved = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    moved["image"] = moved["image"].contiguous(memory_format=form)
    return moved
