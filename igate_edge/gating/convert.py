"""interrogate: a torch.fx-traceable backbone becomes T task branches and a shared one, with gates between them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..errors import InputError
from .gate import Gates
from .net import InterroGateNet
from .placement import place_sites
from .plain import PlainNet, as_example, check_tasks
from .streams import trace

if TYPE_CHECKING:
    from ..training.tasks import Task

__all__ = ["InterroGateNet", "PlainNet", "interrogate"]


def interrogate(
    backbone: nn.Module,
    tasks: Sequence[Task],
    *,
    granule: int | Callable[[int], int] = 1,
    tie: str = "none",
    example: Tensor | None = None,
    gate_init: float = 0.5,
) -> InterroGateNet:
    """Gate a backbone for several tasks (InterroGate, arXiv 2402.16848, as method.md reconstructs it).

    backbone: [N,3,H,W] -> one feature map, or a list, tuple or dict of them, fine to coarse; it is copied, T + 1 times.
    granule: this many neighbouring channels share one gate; a number, or a function from a layer's channels to one.
    tie: "none", or "stage" so that layers joined by identity residual adds share their gates (one channel order).
    example: float [1,3,H,W], gives the shapes and costs (default 64x64). gate_init: first value of all logits; at 0 or
    more all gates are open, so step 0 computes the task branches. Raises InputError and ConvertError.

    >>> from igate_edge.training.tasks import Depth, Edges
    >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
    >>> net = interrogate(backbone, [Depth("depth"), Edges("edges")], granule=4)
    >>> net.hard_fractions()
    {'depth': 1.0, 'edges': 1.0}
    """
    check_tasks(tasks)
    if tie not in ("none", "stage"):
        raise InputError(f"unknown tie {tie!r}", "known: none, stage", "use one of these")
    backbone = copy.deepcopy(backbone)
    plan = trace(backbone, as_example(example))
    places = place_sites(plan, backbone, tie=tie)
    names = [task.name for task in tasks]
    gates: dict[int, Gates] = {}
    for place in places:
        if place.group not in gates:
            width = granule(place.channels) if callable(granule) else granule
            gates[place.group] = Gates(names, place.channels, width, gate_init)
    return InterroGateNet(backbone, tasks, plan, places, gates)
