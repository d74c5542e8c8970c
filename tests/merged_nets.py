"""Gated nets that are about to be merged, and how far two nets are from each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from export_nets import SMALL
from torch import Tensor, nn
from torch_nets import BACKBONES as TINY
from torch_nets import all_masks, random_masks, scatter, tasks

from igate_edge.backbones import BACKBONES
from igate_edge.gating.convert import InterroGateNet, interrogate
from igate_edge.training.tasks import Edges, Task

SIDE = 64  # so that norms see more than one position of the coarsest map


def joint(net: InterroGateNet, chance: float = 0.3) -> dict[str, Tensor]:
    """The same channels for all tasks."""
    return {name: mask[:1].expand_as(mask).clone() for name, mask in random_masks(net, chance).items()}


def build(
    backbone: str | nn.Module,
    count: int = 3,
    kind: str = "random",
    *,
    made: Sequence[Task] | None = None,
    seed: int = 0,
    **options: Any,
) -> InterroGateNet:
    """A gated net with weights of noise; kind of its gates: random, joint, open or closed."""
    torch.manual_seed(seed)
    if isinstance(backbone, str):
        backbone = TINY[backbone]() if backbone in TINY else BACKBONES[backbone](**SMALL[backbone])
    chosen = list(made or [*tasks(count), *([Edges("fifth", head_width=8)] if count > 4 else [])])
    net = interrogate(backbone, chosen, example=torch.zeros(1, 3, SIDE, SIDE), **options)
    scatter(net)
    kinds = {"random": random_masks, "joint": joint}
    net.set_gates(kinds[kind](net) if kind in kinds else all_masks(net, kind == "open"))
    return net


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, size: int = 2) -> float:
    """Largest difference of any output on noise, relative to the output's maximum."""
    image = torch.randn(size, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    image = image.to(next(one.parameters()).dtype)
    left, right = one(image), other(image)
    assert list(left) == list(right)
    return max(float((left[k] - right[k]).abs().max() / left[k].abs().max()) for k in left)
