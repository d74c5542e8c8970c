"""Single-task nets side by side as one network: a rival of a shared encoder that is one file and one engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from .plain import PlainNet, TaskNet, check_tasks
from .view import PlainView


class SeparateNets(TaskNet):
    """PlainNets that share nothing but the image, with the interface of one PlainNet.

    Parameters are named nets.<number>.<path in the PlainNet>. Raises InputError when two nets have the same task.
    """

    def __init__(self, nets: Sequence[PlainNet]) -> None:
        super().__init__()
        self.tasks = tuple(task for net in nets for task in net.tasks)
        check_tasks(self.tasks)
        self.nets = nn.ModuleList(nets)

    def forward(self, image: Tensor, tasks: Collection[str] | None = None) -> dict[str, Tensor]:
        """Raw outputs by task name (all, or those in `tasks`); image float32 [N,3,H,W]."""
        return {name: raw for net in self.nets for name, raw in net(image, tasks).items()}

    @torch.no_grad()
    def export_view(self) -> SeparateView:
        """A copy in evaluation mode with norms folded; its forward(image) returns the raw outputs in task order."""
        return SeparateView([net.export_view() for net in self.nets if isinstance(net, PlainNet)]).eval()


class SeparateView(nn.Module):
    """Export form of SeparateNets: forward(image [1,3,H,W]) -> raw outputs, a tuple in task order."""

    def __init__(self, views: Sequence[PlainView]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(views)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(raw for view in self.nets for raw in view(image))
