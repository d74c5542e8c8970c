"""The plain multi-task net: one shared backbone, the same heads. With one task it is a single-task net."""

from __future__ import annotations

import copy
import keyword
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..contract import OutputSpec
from ..errors import DataError, InputError
from .streams import Plan, feature_maps, trace
from .view import PlainView, fold_head, fold_norms

if TYPE_CHECKING:
    from ..training.heads import FeatureInfo
    from ..training.tasks import Task


class TaskNet(nn.Module):
    """What every net of several tasks has: their losses, and the parameters that learn from them."""

    tasks: tuple[Task, ...]

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, in order."""
        return [task.name for task in self.tasks]

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Loss per task that has a label in the batch, unweighted; the heads of the others do not run."""
        return losses_of(self, self.tasks, batch)

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Weighted sum of the losses, scalar."""
        return weighted_sum(self.tasks, self.losses(batch))

    def weight_parameters(self) -> list[nn.Parameter]:
        """All parameters: there are no gates and no mixes."""
        return list(self.parameters())


class PlainNet(TaskNet):
    """Plain shared multi-task net with the interface of an InterroGateNet, and the rival of every gated net.

    backbone: [N,3,H,W] -> feature maps, fine to coarse; it is copied. example: [1,3,H,W], gives the shapes (default
    64x64). Parameters are named backbone.<path> and heads.<task>.<path>. Raises InputError and ConvertError.
    """

    def __init__(self, backbone: nn.Module, tasks: Sequence[Task], example: Tensor | None = None) -> None:
        super().__init__()
        check_tasks(tasks)
        self.tasks = tuple(tasks)
        self.plan = trace(backbone, as_example(example))
        self.backbone = copy.deepcopy(backbone)
        self.heads = make_heads(tasks, self.plan)

    def forward(self, image: Tensor, tasks: Collection[str] | None = None) -> dict[str, Tensor]:
        """Raw outputs by task name (all, or those in `tasks`); image float32 [N,3,H,W]."""
        features = feature_maps(self.backbone(image))
        return {t.name: self.heads[t.name](features) for t in self.tasks if tasks is None or t.name in tasks}

    @torch.no_grad()
    def export_view(self) -> PlainView:
        """A copy in evaluation mode with norms folded; its forward(image) returns the raw outputs in task order."""
        backbone, heads = copy.deepcopy(self.backbone).eval(), copy.deepcopy(self.heads).eval()
        fold_norms(self.plan, backbone)
        for head in heads.values():
            fold_head(head, len(self.plan.outputs))
        return PlainView(backbone, heads).eval()


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raise InputError unless there is a task and all names are different, valid identifiers."""
    if not isinstance(tasks, Sequence) or not all(isinstance(getattr(t, "spec", None), OutputSpec) for t in tasks):
        evidence = f"got {tasks!r:.80}"
        raise InputError("tasks must be a list of tasks", evidence, "pass for example [Depth('depth')]")
    names = [task.name for task in tasks]
    if not names:
        raise InputError("no task is given", "tasks is empty", "pass at least one task")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two tasks are called {name!r}", ", ".join(names), "give every task its own name")
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise InputError(f"{name!r} cannot name a task", "it is no identifier", "use letters, digits and _")
        if name == "shared" or hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
            raise InputError(f"{name!r} cannot name a task", "the name is taken by the network", "use another name")


def as_example(example: Tensor | None) -> Tensor:
    """The image that gives the shapes, float [1,3,H,W]; default zeros of 64x64."""
    example = torch.zeros(1, 3, 64, 64) if example is None else example
    if not isinstance(example, Tensor):
        raise InputError("the example is not an image", f"got {type(example).__name__}", "pass float [1,3,H,W]")
    if example.ndim != 4 or not example.is_floating_point() or not example.numel():
        raise InputError(
            "the example is not an image", f"{example.dtype} {list(example.shape)}", "pass float [1,3,H,W]"
        )
    return example


def make_heads(tasks: Sequence[Task], plan: Plan) -> nn.ModuleDict:
    """One head per task for the plan's feature maps."""
    features = feature_infos(plan)
    return nn.ModuleDict({task.name: task.make_head(features) for task in tasks})


def feature_infos(plan: Plan) -> list[FeatureInfo]:
    """Channels and stride of each feature map."""
    from ..training.heads import FeatureInfo

    height = plan.shapes[0][2]
    return [
        FeatureInfo(shape[1], max(1, round(height / shape[2]))) for shape in map(plan.shapes.get, plan.outputs) if shape
    ]


def losses_of(net: nn.Module, tasks: Sequence[Task], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Losses by name of the tasks that have a label in the batch. Raises DataError when none has."""
    active = [task for task in tasks if task.target in batch]
    if not active:
        wanted = ", ".join(task.target for task in tasks)
        raise DataError("the batch has no label of any task", f"keys {sorted(batch)}, wanted {wanted}", "add a label")
    raw = net(batch["image"], tasks=[task.name for task in active])
    return {task.name: task.loss(raw[task.name], batch[task.target]) for task in active}


def weighted_sum(tasks: Sequence[Task], losses: Mapping[str, Tensor]) -> Tensor:
    """Sum of weight * loss over the tasks that have a loss."""
    terms = [task.weight * losses[task.name] for task in tasks if task.name in losses]
    return torch.stack(terms).sum()


def load_into(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """load_state_dict with an error that says which names do not fit."""
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise InputError(
            f"the weights do not fit {what}", lines[0][:300], "load weights of the same backbone and heads"
        ) from error


def split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A PlainNet's state, or a bare backbone's, as (backbone state, head states by task)."""
    if not any(key.startswith("backbone.") for key in state):
        return dict(state), {}
    heads: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith("heads."):
            _, task, rest = key.split(".", 2)
            heads.setdefault(task, {})[rest] = value
    return {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}, heads
