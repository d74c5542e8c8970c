"""Gated selection and mix of T task maps and one shared map: the layer operation of InterroGate (method.md section 1).

With g_t = [alpha_t >= 0] per channel and w = softmax over tasks of beta per channel:

    phi'_t = phi_t where g_t else psi            (a true select: never g * phi + (1 - g) * psi)
    psi'   = sum_t w_t * phi'_t                  (exactly psi where no task's gate is open)

Backward, with total_t = d(phi'_t) + w_t * d(psi'): d(phi_t) = total_t where g_t else 0; d(psi) = sum of the other
total_t; d(alpha_t) = sigmoid'(alpha_t) * sum over positions of total_t * (phi_t - psi), the straight-through estimate;
dw_t = sum of d(psi') * phi'_t and d(beta) = w * (dw - sum_t w_t dw_t).

NaN rule: what is not selected does not exist. It reaches neither the outputs nor the gradients of psi, phi and beta.
The gradient of alpha compares both maps by nature; positions where their difference is not finite count as 0 there.

INT8 training: with `step` each map is put on the grid step * (-128..127) of its site, ties to even, as the engine does:
phi'_t = grid(selected), psi' = grid(mix of those). Backward is straight through where the selected value lies on the
grid's range, and 0 where it was clipped; a mix of values within the range cannot leave it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igate_edge.errors import InputError, UnavailableError
from igate_edge.gating.gate import is_open

from . import gated_select_op as op

Selected = tuple[tuple[Tensor, ...], "Tensor | None"]

_TRITON = importlib.util.find_spec("triton") is not None


def gated_select(
    psi: Tensor,
    phis: Sequence[Tensor],
    alpha: Tensor,
    beta: Tensor | None,
    *,
    step: Tensor | None = None,
    mode: str = "auto",
) -> Selected:
    """Select per channel between each task's map and the shared map, then mix the selected maps for the shared stream.

    psi and each of the T phis: float [N, C, ...], same shape, dtype and device. alpha: logits [T, C], or bool [T, C]
    for fixed gates. beta: mix logits [T, C], or None when nobody reads the mix. step: None, or float32 [1], the step of
    the maps' INT8 grid. mode: "torch", "triton" (float32/16, bfloat16, T <= 8, NCHW or channels_last, CUDA) or "auto":
    Triton on a CUDA device where it can, torch elsewhere. Returns (T maps, next shared map or None).
    Raises InputError and, for mode "triton" without Triton or a GPU, UnavailableError.

    >>> psi, phi = torch.zeros(1, 2, 1, 1), torch.ones(1, 2, 1, 1)
    >>> outs, _ = gated_select(psi, [phi], torch.tensor([[0.5, -0.5]]), None)
    >>> outs[0].flatten().tolist()
    [1.0, 0.0]
    """
    if mode not in ("auto", "torch", "triton"):
        known = "known: auto, torch, triton"
        raise InputError(f"unknown mode {mode!r} of gated_select", known, "use one of these")
    _check(psi, phis, alpha, beta, step)
    if mode == "triton":
        _require_triton(psi, phis, alpha, beta)
    elif mode == "torch" or not psi.is_cuda or not _TRITON or op.unfit(psi, phis, alpha, beta):
        return gated_select_reference(psi, phis, alpha, beta, step)
    maps = op.select(psi, list(phis), alpha, beta, step)
    return (tuple(maps), None) if beta is None else (tuple(maps[:-1]), maps[-1])


def gated_select_reference(
    psi: Tensor, phis: Sequence[Tensor], alpha: Tensor, beta: Tensor | None, step: Tensor | None = None
) -> Selected:
    """The definition of gated_select in plain torch, on any device; same arguments, unchecked."""
    weights = None if beta is None else torch.softmax(beta, dim=0)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (psi, alpha, weights, *phis)):
        *outs, psi_next = _Select.apply(psi, alpha, weights, step, *phis)
        return tuple(outs), psi_next
    return forward(psi, phis, alpha, weights, step)


def _check(psi: Tensor, phis: Sequence[Tensor], alpha: Tensor, beta: Tensor | None, step: Tensor | None) -> None:
    shape, dtype, device = psi.shape, psi.dtype, psi.device
    want = (len(phis), shape[1]) if len(shape) >= 2 else None
    if want is None or not phis or any(phi.shape != shape for phi in phis):
        shapes = ", ".join(str(list(x.shape)) for x in (psi, *phis))
        raise InputError("maps of gated_select differ in shape", shapes, "pass one [N, C, ...] map per stream")
    if not dtype.is_floating_point or any(phi.dtype != dtype for phi in phis):
        types = ", ".join(str(x.dtype) for x in (psi, *phis))
        raise InputError("maps of gated_select are not of one floating type", types, "convert them to one")
    for name, rows in (("alpha", alpha), ("beta", beta)):
        if rows is None:
            continue
        if rows.shape != want:
            raise InputError(f"{name} of gated_select has the wrong shape", f"{list(rows.shape)}", f"pass {list(want)}")
        if not (rows.dtype.is_floating_point or (rows.dtype == torch.bool and name == "alpha")):
            raise InputError(f"{name} of gated_select has the wrong dtype", f"{rows.dtype}", "pass float logits")
    if step is not None and (step.shape != (1,) or step.dtype != torch.float32):
        found = f"{step.dtype} {list(step.shape)}"
        raise InputError("step of gated_select has the wrong form", found, "pass a float32 tensor of shape [1]")
    for x in (*phis, alpha, beta, step):
        if x is not None and x.device != device:
            places = f"{device} and {x.device}"
            raise InputError("arguments of gated_select lie on different devices", places, "move them to one")


def _require_triton(psi: Tensor, phis: Sequence[Tensor], alpha: Tensor, beta: Tensor | None) -> None:
    what = "gated_select cannot run in Triton"
    if not _TRITON:
        raise UnavailableError(what, "no module named triton", "pip install 'igate-edge[triton]', or use mode='torch'")
    if not op.runs_triton(psi):
        fix = "move the maps to a CUDA device, use mode='torch', or set TRITON_INTERPRET=1 before the first import"
        raise UnavailableError(what, f"the maps are on {psi.device}", fix)
    problem = op.unfit(psi, phis, alpha, beta)
    if problem is not None:
        raise InputError(what, *problem)


def _per_channel(rows: Tensor, like: Tensor) -> Tensor:
    """[..., C] rows as views that broadcast against the map `like`: [..., 1, C, 1, ...]."""
    return rows.view(*rows.shape[:-1], 1, -1, *([1] * (like.ndim - 2)))


def _mask(alpha: Tensor) -> Tensor:
    return alpha if alpha.dtype == torch.bool else is_open(alpha)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def mix(maps: Sequence[Tensor], weights: Tensor) -> Tensor:
    """sum_t weights[t] * maps[t] per channel, in task order; half types are summed in float32 and rounded once."""
    return _mix(maps, weights).to(maps[0].dtype)


def _mix(maps: Sequence[Tensor], weights: Tensor) -> Tensor:
    wide = _wide(maps[0])
    total = None
    for row, x in zip(_per_channel(weights.to(wide), maps[0]), maps, strict=True):
        term = row * x.to(wide)
        total = term if total is None else total + term
    assert total is not None
    return total


def on_grid(x: Tensor, step: Tensor) -> Tensor:
    """Fake quantisation: x rounded to step * (-128..127), ties to even; same shape and dtype, NaN stays NaN.

    >>> on_grid(torch.tensor([0.25, 0.75, 99.0]), torch.tensor([0.5])).tolist()
    [0.0, 1.0, 63.5]
    """
    return ((x.to(_wide(x)) / step).clamp(-128.0, 127.0).round() * step).to(x.dtype)


def forward(
    psi: Tensor, phis: Sequence[Tensor], alpha: Tensor, weights: Tensor | None, step: Tensor | None = None
) -> Selected:
    """The forward formulas; weights: softmax of beta."""
    mask = _mask(alpha)
    outs = tuple(torch.where(row, phi, psi) for row, phi in zip(_per_channel(mask, psi), phis, strict=True))
    if step is not None:
        outs = tuple(on_grid(out, step) for out in outs)
    if weights is None:
        return outs, None
    if step is None:
        return outs, torch.where(_per_channel(mask.any(0), psi), mix(outs, weights), psi)
    mixed = torch.where(_per_channel(mask.any(0), psi), _mix(outs, weights), psi)
    return outs, on_grid(mixed, step).to(psi.dtype)


def _sum_per_channel(x: Tensor) -> Tensor:
    return x.sum(dim=[d for d in range(x.ndim) if d != 1], dtype=_wide(x))


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, psi: Tensor, alpha: Tensor, weights: Tensor | None, step: Tensor | None, *phis: Tensor
    ) -> Any:
        outs, psi_next = forward(psi, phis, alpha, weights, step)
        ctx.tasks, ctx.mixed, ctx.step = len(phis), weights is not None, step
        ctx.save_for_backward(psi, alpha, *phis, *((weights, *outs) if weights is not None else ()))
        ctx.set_materialize_grads(False)  # an output that no loss reads costs nothing
        return (*outs, psi_next)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        psi, alpha, *rest = ctx.saved_tensors
        phis = rest[: ctx.tasks]
        weights, outs = (rest[ctx.tasks], rest[ctx.tasks + 1 :]) if ctx.mixed else (None, None)
        psi_, alpha_, weights_, _, *phis_ = ctx.needs_input_grad
        wanted = [psi_, alpha_, weights_, *phis_]
        d_psi, d_alpha, d_weights, *d_phis = backward(grads, psi, phis, alpha, weights, ctx.step, wanted, outs)
        return d_psi, d_alpha, d_weights, None, *d_phis


def backward(
    grads: Sequence[Tensor | None],
    psi: Tensor,
    phis: Sequence[Tensor],
    alpha: Tensor,
    weights: Tensor | None,
    step: Tensor | None,
    wanted: Sequence[bool],
    outs: Sequence[Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """The backward formulas: gradients of (psi, alpha, weights, *phis), None where not `wanted` or not reached.

    grads: of the T maps, then of the mix where weights are given. outs: the forward's maps, if they were kept.
    """
    mask, tasks = _mask(alpha), len(phis)
    grad_next = grads[tasks] if len(grads) > tasks else None
    d_psi: Tensor | None = None
    d_alpha = torch.zeros_like(alpha, dtype=torch.float32 if mask is alpha else alpha.dtype)
    d_phis: list[Tensor | None] = [None] * tasks
    shares = [None] * tasks
    if grad_next is not None and weights is not None:
        shares = list(_per_channel(weights.to(grad_next.dtype), psi))
    for t, (phi, opened) in enumerate(zip(phis, _per_channel(mask, psi), strict=True)):
        total = _total(grads[t], grad_next, shares[t])
        if total is None:
            continue
        if step is not None:
            steps = torch.where(opened, phi, psi) / step
            total = torch.where((steps >= -128) & (steps <= 127), total, 0)
        if wanted[3 + t]:
            d_phis[t] = torch.where(opened, total, 0)
        if wanted[0]:
            shared = torch.where(opened, 0, total)
            d_psi = shared if d_psi is None else d_psi + shared
        if wanted[1]:
            apart = (phi - psi).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            soft = torch.sigmoid(alpha[t])
            d_alpha[t] = _sum_per_channel(total * apart) * soft * (1 - soft)
    d_weights = None
    if grad_next is not None and weights is not None and wanted[2]:
        outs = forward(psi, phis, alpha, None, step)[0] if outs is None else outs
        d_weights = torch.stack([_sum_per_channel(grad_next * out) for out in outs]).to(weights.dtype)
        d_weights = torch.where(mask.any(0), d_weights, 0)  # there the mix is psi itself, whatever the weights
    return d_psi, d_alpha if wanted[1] else None, d_weights, *d_phis


def _total(grad: Tensor | None, grad_next: Tensor | None, share: Tensor | None) -> Tensor | None:
    if grad_next is None or share is None:
        return grad
    return share * grad_next if grad is None else grad + share * grad_next
