"""One gated layer: selection and mix of T task maps and the shared map."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from igate_edge.kernels.gated_select import gated_select

from .gate import Gates


class GateSite(nn.Module):
    """Gate of one layer (or of one residual stream after its add): `gates` may be shared with other, tied sites.

    `beta` [T, C] are the mix logits, zero at first, learned by the task losses only (method.md section 1, equation 3).
    """

    def __init__(self, name: str, channels: int, gates: Gates) -> None:
        super().__init__()
        self.name, self.channels, self.gates = name, channels, gates
        self.beta = nn.Parameter(torch.zeros(len(gates.tasks), channels))

    def mix_weights(self) -> Tensor:
        """Weights of the mix, float [T, C]; each channel's sum is 1."""
        return torch.softmax(self.beta, dim=0)

    def forward(
        self, psi: Tensor, phis: Sequence[Tensor], *, mix: bool = True, active: Collection[str] | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """(selected map per task, next shared map). psi, phis [N, C, H, W]; mix=False: nobody reads the shared map.

        Tasks outside `active` get no gate gradient.
        """
        gate = self.gates.mask() if self.gates.is_frozen else self.gates.expanded(active)
        return gated_select(psi, phis, gate, self.beta if mix else None)

    def extra_repr(self) -> str:
        return f"{self.name}, channels={self.channels}, granule={self.gates.granule}"
