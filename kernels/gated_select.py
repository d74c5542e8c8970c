"""Gated selection and mix of T task maps and one shared map: the layer operation of InterroGate (method.md section 1).

With g_t = [alpha_t >= 0] per channel and w = softmax over tasks of beta per channel:

    phi'_t = phi_t where g_t else psi            (a true select: never g * phi + (1 - g) * psi)
    psi'   = sum_t w_t * phi'_t                  (exactly psi where no task's gate is open)

Backward, with total_t = d(phi'_t) + w_t * d(psi'): d(phi_t) = total_t where g_t else 0; d(psi) = sum of the other
total_t; d(alpha_t) = sigmoid'(alpha_t) * sum over positions of total_t * (phi_t - psi), the straight-through estimate;
dw_t = sum of d(psi') * phi'_t and d(beta) = w * (dw - sum_t w_t dw_t).

NaN rule: what is not selected does not exist. It reaches neither the outputs nor the gradients of psi, phi and beta.
The gradient of alpha compares both maps by nature; positions where their difference is not finite count as 0 there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igate_edge.errors import InputError
from igate_edge.gating.gate import is_open

Selected = tuple[tuple[Tensor, ...], "Tensor | None"]


def gated_select(
    psi: Tensor, phis: Sequence[Tensor], alpha: Tensor, beta: Tensor | None, *, mode: str = "auto"
) -> Selected:
    """Select per channel between each task's map and the shared map, then mix the selected maps for the shared stream.

    psi and each of the T phis: float [N, C, ...], same shape. alpha: logits [T, C], or bool [T, C] for fixed gates.
    beta: mix logits [T, C], or None when nobody reads the mix. mode: which implementation; "torch" is the one
    that exists and "auto" means it, on every device. Returns (T maps, next shared map or None). Raises InputError.

    >>> psi, phi = torch.zeros(1, 2, 1, 1), torch.ones(1, 2, 1, 1)
    >>> outs, _ = gated_select(psi, [phi], torch.tensor([[0.5, -0.5]]), None)
    >>> outs[0].flatten().tolist()
    [1.0, 0.0]
    """
    if mode not in ("auto", "torch"):
        raise InputError(f"unknown mode {mode!r} of gated_select", "known: auto, torch", "use one of these")
    _check(psi, phis, alpha, beta)
    return gated_select_reference(psi, phis, alpha, beta)


def gated_select_reference(psi: Tensor, phis: Sequence[Tensor], alpha: Tensor, beta: Tensor | None) -> Selected:
    """The definition of gated_select in plain torch, on any device; same arguments, unchecked."""
    weights = None if beta is None else torch.softmax(beta, dim=0)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (psi, alpha, weights, *phis)):
        *outs, psi_next = _Select.apply(psi, alpha, weights, *phis)
        return tuple(outs), psi_next
    return _forward(psi, phis, alpha, weights)


def _check(psi: Tensor, phis: Sequence[Tensor], alpha: Tensor, beta: Tensor | None) -> None:
    want = (len(phis), psi.shape[1]) if psi.ndim >= 2 else None
    if want is None or not phis or any(phi.shape != psi.shape for phi in phis):
        shapes = ", ".join(str(list(x.shape)) for x in (psi, *phis))
        raise InputError("maps of gated_select differ in shape", shapes, "pass one [N, C, ...] map per stream")
    for name, rows in (("alpha", alpha), ("beta", beta)):
        if rows is not None and tuple(rows.shape) != want:
            raise InputError(f"{name} of gated_select has the wrong shape", f"{list(rows.shape)}", f"pass {list(want)}")


def _per_channel(row: Tensor, like: Tensor) -> Tensor:
    return row.view(1, -1, *([1] * (like.ndim - 2)))


def _mask(alpha: Tensor) -> Tensor:
    return alpha if alpha.dtype == torch.bool else is_open(alpha)


def mix(maps: Sequence[Tensor], weights: Tensor) -> Tensor:
    """sum_t weights[t] * maps[t] per channel, in task order; half types are summed in float32 and rounded once."""
    wide = torch.float32 if maps[0].dtype in (torch.float16, torch.bfloat16) else maps[0].dtype
    total = None
    for row, x in zip(weights.to(wide), maps, strict=True):
        term = _per_channel(row, x) * x.to(wide)
        total = term if total is None else total + term
    assert total is not None
    return total.to(maps[0].dtype)


def _forward(psi: Tensor, phis: Sequence[Tensor], alpha: Tensor, weights: Tensor | None) -> Selected:
    mask = _mask(alpha)
    outs = tuple(torch.where(_per_channel(row, psi), phi, psi) for row, phi in zip(mask, phis, strict=True))
    if weights is None:
        return outs, None
    return outs, torch.where(_per_channel(mask.any(0), psi), mix(outs, weights), psi)


def _sum_per_channel(x: Tensor) -> Tensor:
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    return x.sum(dim=[d for d in range(x.ndim) if d != 1], dtype=wide)


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, psi: Tensor, alpha: Tensor, weights: Tensor | None, *phis: Tensor) -> Any:
        outs, psi_next = _forward(psi, phis, alpha, weights)
        ctx.tasks, ctx.mixed = len(phis), weights is not None
        ctx.save_for_backward(psi, alpha, *phis, *((weights, *outs) if weights is not None else ()))
        ctx.set_materialize_grads(False)  # an output that no loss reads costs nothing
        return (*outs, psi_next)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        psi, alpha, *rest = ctx.saved_tensors
        phis, grad_next = rest[: ctx.tasks], grads[-1]
        weights, outs = (rest[ctx.tasks], rest[ctx.tasks + 1 :]) if ctx.mixed else (None, [])
        mask = _mask(alpha)
        d_psi: Tensor | None = None
        d_alpha = torch.zeros_like(alpha, dtype=torch.float32 if mask is alpha else alpha.dtype)
        d_phis: list[Tensor | None] = [None] * ctx.tasks
        for t, phi in enumerate(phis):
            total = _total(grads[t], grad_next, None if weights is None else weights[t])
            if total is None:
                continue
            opened = _per_channel(mask[t], psi)
            if ctx.needs_input_grad[3 + t]:
                d_phis[t] = torch.where(opened, total, 0)
            if ctx.needs_input_grad[0]:
                shared = torch.where(opened, 0, total)
                d_psi = shared if d_psi is None else d_psi + shared
            if ctx.needs_input_grad[1]:
                apart = (phi - psi).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
                soft = torch.sigmoid(alpha[t])
                d_alpha[t] = _sum_per_channel(total * apart) * soft * (1 - soft)
        d_weights = None
        if grad_next is not None and weights is not None and ctx.needs_input_grad[2]:
            d_weights = torch.stack([_sum_per_channel(grad_next * out) for out in outs]).to(weights.dtype)
            d_weights = torch.where(mask.any(0), d_weights, 0)  # there the mix is psi itself, whatever the weights
        return d_psi, d_alpha if ctx.needs_input_grad[1] else None, d_weights, *d_phis


def _total(grad: Tensor | None, grad_next: Tensor | None, weights: Tensor | None) -> Tensor | None:
    if grad_next is None or weights is None:
        return grad
    through_mix = _per_channel(weights.to(grad_next.dtype), grad_next) * grad_next
    return through_mix if grad is None else grad + through_mix
