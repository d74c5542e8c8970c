"""Loss balance: how much each task's loss counts. Measured to matter more than anything else (recipe.md section 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError

MODES = ("fixed", "gradnorm", "uncertainty")


class Balance(nn.Module):
    """Fixed weights, and the base of the others: a batch's losses -> one scalar; tasks without a label are absent.

    Its parameters train with the network and its buffers are part of a checkpoint.

    >>> float(Balance({"a": 1.0, "b": 2.0})({"a": torch.tensor(3.0), "b": torch.tensor(4.0)}))
    11.0
    """

    base: Tensor

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        if not weights or min(weights.values()) < 0:
            raise InputError("loss weights must be 0 or more", f"{dict(weights)}", "give one weight a task")
        self.names = sorted(weights)  # whatever order a file gave them in: a checkpoint goes by position
        self.register_buffer("base", torch.tensor([float(weights[name]) for name in self.names]))

    def observe(self, losses: Mapping[str, Tensor], net: nn.Module, step: int) -> None:
        """Learn from this step's losses before they are added up; nothing to learn here."""

    def factors(self) -> Tensor:
        """The weight of every task, in order of `names`."""
        return self.base

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        factors = self.factors()
        return torch.stack([factors[self.names.index(name)] * loss for name, loss in losses.items()]).sum()

    def weights(self) -> dict[str, float]:
        """The weights now: what `fixed` would take."""
        return dict(zip(self.names, self.factors().tolist(), strict=True))


class GradNorm(Balance):
    """Weights that give every task the same gradient norm on the shared encoder, averaged slowly; their mean stays 1.

    Norms are measured every `every` steps at the price of one encoder backward a task. After Chen et al., GradNorm,
    2018, without its extra loss: the norms are equalised outright. The tasks' own weights multiply on top.
    """

    log_norm: Tensor
    seen: Tensor

    def __init__(self, weights: Mapping[str, float], every: int = 50, keep: float = 0.7) -> None:
        super().__init__(weights)
        self.every, self.keep = every, keep
        self.register_buffer("log_norm", torch.zeros(len(weights)))
        self.register_buffer("seen", torch.zeros(len(weights)))

    def observe(self, losses: Mapping[str, Tensor], net: nn.Module, step: int) -> None:
        if step % self.every or len(losses) < 2:
            return
        shared = [p for name, p in net.named_parameters() if not name.startswith("heads.") and p.requires_grad]
        for name, loss in losses.items():
            index = self.names.index(name)
            norm = float(gradient_norm(loss, shared))
            if norm > 0:
                keep = self.keep if self.seen[index] else 0.0
                self.log_norm[index] = keep * self.log_norm[index] + (1 - keep) * float(torch.tensor(norm).log())
                self.seen[index] = 1

    def factors(self) -> Tensor:
        inverse = torch.where(self.seen > 0, (-self.log_norm).exp(), 0.0)
        mean = inverse.sum() / self.seen.sum().clamp(min=1)
        return self.base * torch.where(self.seen > 0, inverse / mean.clamp(min=1e-12), 1.0)


class Uncertainty(Balance):
    """Learned weights exp(-s), with s itself added so that they cannot shrink to 0 (Kendall et al., 2018)."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__(weights)
        self.log_variance = nn.Parameter(torch.zeros(len(weights)))

    def factors(self) -> Tensor:
        return self.base * (-self.log_variance).exp()

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        rows = [self.names.index(name) for name in losses]
        return super().forward(losses) + self.log_variance[rows].sum()

    def weights(self) -> dict[str, float]:
        return dict(zip(self.names, self.factors().detach().tolist(), strict=True))


def make_balance(mode: str, weights: Mapping[str, float]) -> Balance:
    """`fixed`, `gradnorm` or `uncertainty`; `weights` are the tasks' own. Raises InputError on another mode."""
    if mode not in MODES:
        raise InputError(f"unknown loss balance {mode!r}", f"known: {', '.join(MODES)}", "use one of these")
    return {"fixed": Balance, "gradnorm": GradNorm, "uncertainty": Uncertainty}[mode](weights)


def gradient_norm(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of d loss / d parameters; the graph stays for the step's own backward."""
    if not loss.requires_grad:
        return loss.new_zeros(())
    gradients = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
    squares = [g.pow(2).sum() for g in gradients if g is not None]
    return torch.stack(squares).sum().sqrt() if squares else loss.new_zeros(())
