"""What to train and for how long: one JSON-able value that decides a run completely, and the objects it stands for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn

from ..contract import OutputSpec, Preprocess
from ..errors import InputError
from ..gating.budget import TABLE
from .layout import KIND_OF
from .step import Optim
from .tasks import Task, from_spec

#: Gates of each recipe: kind of budget, its weight, the logits' optimiser and rate. SGD needs a high rate: the push on
#: one logit is weight * sigmoid' / (tasks * sites * granules), about 1e-4 (method.md section 2).
GATES: dict[str, tuple[str, float, str, float]] = {
    "forked": ("hard", 1.0, "adam", 0.02),
    "paper": ("hinge", 1.0, "sgd", 50.0),
}
#: Backbones that take a width: what it counts, least, most. The others have one size.
WIDTHS: dict[str, tuple[str, float, float]] = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "pyramid_net"), ("channels of the first stage", 1, 1024)),
    "mobilenet_v2": ("a multiplier of all channels", 0.05, 4),
}


#: Settings that are left out of the JSON at their defaults, so that runs from before they existed stay valid.
NEWER = ("final", "table")


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The same config and data give the same network, on the same machine and threads.

    None means the backbone's or the recipe's own value, and is left out of the JSON.
    `tasks`: modalities to learn, () = all that the data has. `width`: channels of the first stage (ResNet, pyramid) or
    a multiplier (MobileNet). `size`: (height, width) in pixels. `budget`: share of channels each task may own (0..1),
    one number or one a task; instead of it `ratio`, the engine's time as a multiple of the plain shared net's, or `ms`,
    as a latency `table` (a shipped one's name, or a file) and a measurement say. `budget_kind`: "hard" (open gates,
    fixed to 2 points), "hinge" (sigmoids, the paper's) or "l1" (no target: `sparsity_weight`, the paper's lambda_s,
    decides); `gate_lr`: rate of the gates' optimiser.
    `granule`: channels that share one gate; 0 = an eighth of the layer's width, at least 4, and under a budget of time
    no more than fill a machine's `step` (None = the table's) when all tasks open them. `tie`: "stage" or "none".
    `balance`: "fixed", "gradnorm", "uncertainty" or "measure" (short runs decide); `weights`: the tasks' own loss
    weights; `class_weights`: rare classes of semseg weigh more (1 / sqrt of their frequency). `recipe`: "forked" or
    "paper" (single-task nets, soft hinge, SGD on gates). Steps are optimiser steps of each stage; `fork_steps` are per
    task; `single_steps`: of single-task nets to compare with, None = not trained. `final`: what the last cycle trains:
    "masked" (the merged net, a plain CNN whose zero blocks stay zero), "fill" (they train too) or "gated" (branches).
    `label_stride` 2 trains on every second label pixel of each axis, from a corner that changes each step.
    """

    tasks: tuple[str, ...] = ()
    backbone: str = "resnet18"
    width: float | None = None
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
    budget_kind: str | None = None
    sparsity_weight: float | None = None
    gate_lr: float | None = None
    single_steps: int | None = None
    final: str = "masked"
    ratio: float | None = None
    ms: float | None = None
    table: str = TABLE
    step: int | None = None

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known and not (name == "budget_kind" and self.budget_kind is None):
                raise InputError(f"unknown {name} {getattr(self, name)!r}", f"known: {', '.join(known)}", "use one")
        budgets = self.budget.values() if isinstance(self.budget, Mapping) else [self.budget]
        if any(not 0 <= value <= 1 for value in budgets):
            raise InputError("a budget is a share of channels", f"{self.budget}", "choose 0 to 1")
        if len(self.size) != 2 or min(self.size) < 32 or self.batch < 1:
            raise InputError(
                "size or batch is too small", f"{self.size}, {self.batch}", "use 32 pixels, 1 frame or more"
            )
        _check_numbers(self)
        if self.kind == "time" and (None not in (self.ratio, self.ms) or self.budget_kind or self.recipe != "forked"):
            evidence = f"ratio {self.ratio}, ms {self.ms}, budget_kind {self.budget_kind}, recipe {self.recipe}"
            raise InputError("one kind of budget at a time", evidence, "give ratio or ms, with the recipe forked")
        if self.width is not None:
            _check_width(self.backbone, self.width)

    def as_json(self) -> dict[str, Any]:
        """Plain types, ready for json.dumps; `from_json` is the way back."""
        plain = {f.name: f.default for f in fields(self) if f.name in NEWER}
        own = {key: value for key, value in asdict(self).items() if value is not None and plain.get(key) != value}
        return json.loads(json.dumps(own))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainConfig:
        """Raises InputError for an unknown field or value."""
        known = {f.name for f in fields(cls)}
        wrong = sorted(set(data) - known)
        if wrong:
            raise InputError(f"unknown setting {', '.join(wrong)}", f"known: {', '.join(sorted(known))}", "remove it")
        for f in fields(cls):
            kinds = _TYPES[str(f.type)]
            if f.name in data and (
                not isinstance(data[f.name], kinds) or isinstance(data[f.name], bool) != (kinds is bool)
            ):
                raise InputError(f"setting {f.name} has a wrong type", repr(data[f.name]), f"it is {f.type}")
            items = data.get(f.name)
            inner = items.values() if isinstance(items, dict) else items if isinstance(items, list | tuple) else ()
            if any(isinstance(item, bool) or not isinstance(item, _ITEMS[f.name]) for item in inner):
                raise InputError(f"setting {f.name} holds a wrong type", repr(items), f"it is {f.type}")
        lists = {key: tuple(data[key]) for key in ("tasks", "size") if key in data}
        return cls(**{**data, **lists})

    @property
    def kind(self) -> str:
        """Kind of budget: "time", or of a share of channels "hard", "hinge" or "l1"."""
        return "time" if self.ratio is not None or self.ms is not None else self.budget_kind or GATES[self.recipe][0]

    @property
    def strength(self) -> float:
        """Weight of the budget against the task losses, the paper's lambda_s."""
        return GATES[self.recipe][1] if self.sparsity_weight is None else self.sparsity_weight

    def optim(self, lr: float) -> Optim:
        """Rates of one stage, whose weights learn at `lr`."""
        _, _, optimizer, own = GATES[self.recipe]
        gate_lr = own if self.gate_lr is None else self.gate_lr
        return Optim(lr, self.weight_decay, gate_lr=gate_lr, gate_optimizer=optimizer)

    def preprocess(self) -> Preprocess:
        """Fixed mean and spread: about those of indoor frames."""
        return Preprocess(*self.size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


_TYPES: dict[str, Any] = {
    "str": str,
    "int": int,
    "bool": bool,
    "float": (int, float),
    "tuple[str, ...]": (list, tuple),
    "tuple[int, int]": (list, tuple),
    "dict[str, float]": dict,
    "float | dict[str, float]": (int, float, dict),
    "str | None": (str, type(None)),
    "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
}
_CHOICES = {
    "recipe": ("forked", "paper"),
    "tie": ("stage", "none"),
    "final": ("masked", "fill", "gated"),
    "balance": ("fixed", "gradnorm", "uncertainty", "measure"),
    "budget_kind": ("hard", "hinge", "l1"),
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


#: Types of what lists and dicts hold.
_ITEMS: dict[str, Any] = {"tasks": str, "size": int, "budget": (int, float), "weights": (int, float)}
_POSITIVE = (
    *("lr", "fork_lr", "search_lr", "gate_lr", "sparsity_weight", "head_width", "log_every", "checkpoint_every"),
    *("plain_steps", "fork_steps", "search_steps", "final_steps", "balance_steps", "single_steps", "label_stride"),
    *("ratio", "ms", "step"),
)


def _check_numbers(config: TrainConfig) -> None:
    for name in _POSITIVE:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError("a setting must be positive", f"{name} {value}", "change it")
    weights = {f"the weight of {name}": value for name, value in config.weights.items()}
    for name, value in {"granule": config.granule, "weight_decay": config.weight_decay, **weights}.items():
        if not 0 <= value < math.inf:
            raise InputError("a setting must be 0 or more", f"{name} {value}", "change it")
    if not -(2**63) <= config.seed < 2**63:
        raise InputError("the seed is out of range", str(config.seed)[:40], "give a number of at most 63 bits")


def _check_width(backbone: str, width: float) -> None:
    if backbone not in WIDTHS:
        raise InputError(f"{backbone} takes no width", f"width {width}", f"drop it, or use one of {', '.join(WIDTHS)}")
    what, least, most = WIDTHS[backbone]
    if not least <= width <= most or (least == 1 and width != int(width)):
        number = "a whole number" if least == 1 else "a number"
        raise InputError(f"the width of {backbone} is {what}", f"got {width}", f"give {number}, {least} to {most}")


def digest(*parts: Any) -> str:
    """A short name for JSON-able values: equal values, equal names."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_tasks(
    config: TrainConfig,
    available: Mapping[str, tuple[str, ...]],
    class_weights: Mapping[str, tuple[float, ...]] | None = None,
) -> list[Task]:
    """The tasks of a config over data that has these modalities (name -> class names). Raises InputError.

    `class_weights`: of the training labels, by name; taken where the config wants them.
    """
    names = config.tasks or tuple(name for name in available if name in KIND_OF)
    missing = [name for name in names if name not in available or name not in KIND_OF]
    if missing or not names:
        raise InputError(
            f"the data has no task {', '.join(missing) or 'at all'}",
            f"it has {', '.join(available)}",
            "choose among these",
        )
    unknown = sorted(set(config.weights) - set(names))
    if unknown:
        raise InputError(
            f"a weight for no task: {', '.join(unknown)}", f"tasks: {', '.join(names)}", "correct the name"
        )
    tasks = []
    for name in names:
        classes = tuple(available[name])
        channels = {"depth": 1, "normals": 3, "edges": 1}.get(name, len(classes))
        spec = OutputSpec(name, KIND_OF[name], channels, classes, target=name)
        options: dict[str, Any] = {"head_width": config.head_width} if spec.dense else {}
        if config.class_weights and class_weights and name in class_weights:
            options["class_weights"] = class_weights[name]
        tasks.append(from_spec(spec, weight=config.weights.get(name, 1.0), **options))
    return tasks


def make_backbone(config: TrainConfig) -> nn.Module:
    """A fresh backbone of the config's width, or of its own default."""
    from .. import backbones

    options: dict[str, Any] = {"size": config.size} if config.backbone == "efficientnet_lite0" else {}
    if config.width is not None:
        options["width"] = config.width if config.backbone == "mobilenet_v2" else int(config.width)
    make: Any = backbones.BACKBONES[config.backbone]
    return make(**options)
