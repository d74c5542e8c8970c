"""What to train and for how long: one JSON-able value that decides a run completely, and the objects it stands for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn

from ..contract import OutputSpec, Preprocess
from ..errors import InputError
from .step import Optim
from .tasks import Task, from_spec

#: Modality of a data folder -> kind of task.
KIND_OF = {
    "semseg": "semseg",
    "depth": "depth",
    "normals": "normals",
    "edges": "edges",
    "label": "classification",
    "labels": "multilabel",
}


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The same config and data give the same network, on the same machine and threads.

    `tasks`: modalities to learn, () = all that the data has. `size`: (height, width) in pixels. `budget`: share of
    channels each task may own (hard, 0..1), one number or one a task. `granule`: channels that share one gate; 0 = an
    eighth of the layer's width, at least 4. `tie`: "stage" or "none". `balance`: "fixed", "gradnorm", "uncertainty" or
    "measure" (short runs decide); `weights`: the tasks' own loss weights. `recipe`: "forked" or "paper" (single-task
    nets, soft hinge, SGD on gates). Steps are optimiser steps of each stage; `fork_steps` are per task.
    `label_stride` 2 trains on every second label pixel of each axis, from a corner that changes each step.
    """

    tasks: tuple[str, ...] = ()
    backbone: str = "resnet18"
    width: float = 32
    size: tuple[int, int] = (96, 128)
    batch: int = 16
    lr: float = 2e-3
    fork_lr: float = 1e-3
    search_lr: float = 3e-4
    weight_decay: float = 1e-2
    plain_steps: int = 1500
    fork_steps: int = 300
    search_steps: int = 300
    final_steps: int = 1500
    balance_steps: int = 300
    budget: float | dict[str, float] = 0.25
    granule: int = 0
    tie: str = "stage"
    balance: str = "gradnorm"
    weights: dict[str, float] = field(default_factory=dict)
    class_weights: bool = False
    recipe: str = "forked"
    seed: int = 0
    head_width: int = 32
    log_every: int = 20
    checkpoint_every: int = 200
    label_stride: int = 1

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise InputError(f"unknown {name} {getattr(self, name)!r}", f"known: {', '.join(known)}", "use one")
        budgets = self.budget.values() if isinstance(self.budget, Mapping) else [self.budget]
        if any(not 0 <= value <= 1 for value in budgets):
            raise InputError("a budget is a share of channels", f"{self.budget}", "choose 0 to 1")
        if min(self.size) < 32 or self.batch < 1:
            raise InputError(
                "size or batch is too small", f"{self.size}, {self.batch}", "use 32 pixels, 1 frame or more"
            )

    def as_json(self) -> dict[str, Any]:
        """Plain types, ready for json.dumps; `from_json` is the way back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainConfig:
        """Raises InputError for an unknown field or value."""
        known = {f.name for f in fields(cls)}
        wrong = sorted(set(data) - known)
        if wrong:
            raise InputError(f"unknown setting {', '.join(wrong)}", f"known: {', '.join(sorted(known))}", "remove it")
        lists = {key: tuple(data[key]) for key in ("tasks", "size") if key in data}
        return cls(**{**data, **lists})

    def optim(self, lr: float) -> Optim:
        """Rates of one stage, whose weights learn at `lr`."""
        gates = Optim(lr, self.weight_decay)
        return gates if self.recipe == "forked" else Optim(lr, self.weight_decay, gate_lr=0.1, gate_optimizer="sgd")

    def preprocess(self) -> Preprocess:
        """Fixed mean and spread: about those of indoor frames."""
        return Preprocess(*self.size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


_CHOICES = {
    "recipe": ("forked", "paper"),
    "tie": ("stage", "none"),
    "balance": ("fixed", "gradnorm", "uncertainty", "measure"),
    "backbone": (
        "resnet18",
        "resnet34",
        "resnet50",
        "mobilenet_v2",
        "efficientnet_lite0",
        "densenet_tiny",
        "pyramid_net",
    ),
}


def digest(*parts: Any) -> str:
    """A short name for JSON-able values: equal values, equal names."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_tasks(config: TrainConfig, available: Mapping[str, tuple[str, ...]]) -> list[Task]:
    """The tasks of a config over data that has these modalities (name -> class names). Raises InputError."""
    names = config.tasks or tuple(name for name in available if name in KIND_OF)
    missing = [name for name in names if name not in available or name not in KIND_OF]
    if missing or not names:
        raise InputError(
            f"the data has no task {', '.join(missing) or 'at all'}",
            f"it has {', '.join(available)}",
            "choose among these",
        )
    tasks = []
    for name in names:
        classes = tuple(available[name])
        channels = {"depth": 1, "normals": 3, "edges": 1}.get(name, len(classes))
        spec = OutputSpec(name, KIND_OF[name], channels, classes, target=name)
        width = {"head_width": config.head_width} if spec.dense else {}
        tasks.append(from_spec(spec, weight=config.weights.get(name, 1.0), **width))
    return tasks


def make_backbone(config: TrainConfig) -> nn.Module:
    """A fresh backbone; only the ResNet layouts and MobileNetV2 take a width. Raises InputError."""
    from .. import backbones

    make: Any = backbones.BACKBONES[config.backbone]
    if config.backbone.startswith("resnet"):
        return make(width=int(config.width))
    options: dict[str, dict[str, Any]] = {
        "mobilenet_v2": {"width": config.width},
        "efficientnet_lite0": {"size": config.size},
    }
    return make(**options.get(config.backbone, {}))
