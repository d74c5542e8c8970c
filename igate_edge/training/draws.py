"""Gates that are drawn, not learned: controls of what a search is worth."""

from __future__ import annotations

from typing import Any

import torch

from ..gating.convert import InterroGateNet
from .stages import Done


def shuffled(net: InterroGateNet, frozen: Done, seed: int) -> dict[str, torch.Tensor]:
    """The frozen masks with the granules of each group of tied sites permuted, by one permutation for all tasks."""
    generator = torch.Generator().manual_seed(seed)
    orders: dict[int, torch.Tensor] = {}
    masks = {}
    for name, rows in frozen.result["gates"].items():
        gates: Any = net.sites[name].gates
        mask = torch.tensor([[bit == "1" for bit in rows[task]] for task in net.task_names])
        whole = mask.shape[1] // gates.granule
        order = orders.setdefault(id(gates), torch.randperm(whole, generator=generator))
        cut = whole * gates.granule
        moved = mask[:, :cut].view(len(mask), whole, gates.granule)[:, order].reshape(len(mask), cut)
        masks[name] = torch.cat([moved, mask[:, cut:]], dim=1)
    return masks


def joint(net: InterroGateNet, share: float, seed: int) -> dict[str, torch.Tensor]:
    """Masks with this share of each layer's channels, drawn by whole granules, open for all tasks; ties are kept."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, torch.Tensor] = {}
    for site in net.gate_sites():
        gates: Any = site.gates
        if id(gates) not in drawn:
            count = -(-gates.channels // gates.granule)
            picked = torch.randperm(count, generator=generator)[: round(share * gates.channels / gates.granule)]
            row = torch.zeros(count, dtype=torch.bool).index_fill(0, picked, True)
            drawn[id(gates)] = row.repeat_interleave(gates.granule)[: gates.channels].expand(len(net.tasks), -1)
    return {site.name: drawn[id(site.gates)] for site in net.gate_sites()}
