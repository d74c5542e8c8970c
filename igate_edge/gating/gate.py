"""Gate logits and the one function that turns a logit into a decision."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import is_number
from ..errors import InputError


def is_open(logits: Tensor) -> Tensor:
    """The decision: a gate is open when its logit is >= 0; a tie at exactly 0 is open, NaN is closed. Bool, any shape.

    Training, evaluation, budget, export and the kernels all call this. sigmoid(x) >= 0.5 is not the same test: in
    float32 sigmoid(-1e-8) rounds to 0.5 (cases.md M8).
    """
    return logits >= 0


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return is_open(logits).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        soft = torch.sigmoid(logits)
        return grads[0] * soft * (1 - soft)


def hard(logits: Tensor) -> Tensor:
    """Gates as 0.0 or 1.0, any shape; backward is straight-through: threshold = identity, sigmoid'(logits) stays.

    >>> hard(torch.tensor([-1e-7, 0.0, 1e-7])).tolist()
    [0.0, 1.0, 1.0]
    """
    return _StraightThrough.apply(logits)


class Gates(nn.Module):
    """Gate logits of one layer or of a group of tied layers: one logit per task and granule of neighbouring channels.

    `alpha` holds one [ceil(channels / granule)] parameter per task, so that an optimiser can skip a task that is absent
    from a batch (cases.md M3). The last granule may be short. `freeze()` fixes the decisions in a buffer, for good.
    """

    frozen: Tensor
    frozen_mask: Tensor

    def __init__(self, tasks: Sequence[str], channels: int, granule: int = 1, init: float = 0.5) -> None:
        super().__init__()
        if type(granule) is not int or granule < 1:
            evidence = f"granule={granule!r:.60}"
            raise InputError("granule is less than one channel, or no whole number", evidence, "pass 1 or more")
        if not is_number(init):
            raise InputError("the gates' first logit is no number", f"{init!r:.60}", "pass a finite number")
        self.tasks, self.channels, self.granule = tuple(tasks), channels, min(granule, channels)
        count = -(-channels // self.granule)
        self.alpha = nn.ParameterDict({task: nn.Parameter(torch.full((count,), float(init))) for task in tasks})
        self.register_buffer("frozen_mask", torch.ones(len(self.tasks), count, dtype=torch.bool))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        self.is_frozen = False  # mirror of `frozen`: reading a tensor would stall a GPU at every step
        self.version = 0  # counts changes of fixed decisions, so that what was derived from them can be renewed

    def logits(self, active: Collection[str] | None = None) -> Tensor:
        """Logits [T, granules]; rows of tasks outside `active` (default: all are in) carry no gradient."""
        rows = [self.alpha[t] if active is None or t in active else self.alpha[t].detach() for t in self.tasks]
        return torch.stack(rows)

    def expanded(self, active: Collection[str] | None = None) -> Tensor:
        """Logits of every channel [T, C]."""
        return self._expand(self.logits(active))

    def mask(self) -> Tensor:
        """Decisions of every channel, bool [T, C]: the fixed ones once frozen."""
        return self._expand(self.frozen_mask if self.is_frozen else is_open(self.logits().detach()))

    def hard(self) -> Tensor:
        """Decisions as 0.0/1.0 [T, C] with the straight-through gradient; no gradient once frozen."""
        if self.is_frozen:
            return self.mask().to(self.logits().dtype)
        return self._expand(hard(self.logits()))

    def freeze(self) -> None:
        """Fix today's decisions: they survive train(), deepcopy and state_dict; the logits stop learning."""
        if not self.is_frozen:
            self.frozen_mask.copy_(is_open(self.logits().detach()))
            self.frozen.fill_(True)
            self._sync()

    def check(self, mask: Tensor) -> None:
        """Raise InputError unless a mask is [T, C] and constant within each granule."""
        if tuple(mask.shape) != (len(self.tasks), self.channels):
            want = f"[{len(self.tasks)}, {self.channels}]"
            raise InputError("gate mask has the wrong shape", f"{list(mask.shape)}, not {want}", "pass bool [T, C]")
        if not torch.equal(self._expand(mask[:, :: self.granule]), mask):
            raise InputError(
                "gate mask splits a granule",
                f"{self.granule} neighbouring channels share one gate",
                "give all channels of a granule the same value",
            )

    def assign(self, mask: Tensor, logit: float = 0.5) -> None:
        """Set the decisions from a bool [T, C] (see `check`); logits become +logit or -logit."""
        mask = torch.as_tensor(mask, dtype=torch.bool, device=self.frozen_mask.device)
        self.check(mask)
        coarse = mask[:, :: self.granule]
        with torch.no_grad():
            for row, task in zip(coarse, self.tasks, strict=True):
                self.alpha[task].copy_(torch.where(row, logit, -logit))
            if self.is_frozen:
                self.frozen_mask.copy_(coarse)
        self.version += 1

    def _expand(self, rows: Tensor) -> Tensor:
        if self.granule == 1:
            return rows
        return rows.repeat_interleave(self.granule, dim=1)[:, : self.channels]

    def _sync(self) -> None:
        self.is_frozen = bool(self.frozen.item())
        self.version += 1
        for alpha in self.alpha.values():
            alpha.requires_grad_(not self.is_frozen)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._sync()
