"""gated_select as an operator of torch, `igate::gated_select`: torch.compile and torch.export keep it as one node.

It runs the Triton kernel on CUDA tensors (and on CPU tensors where Triton interprets), the torch reference elsewhere:
a program exported on a workstation also runs on a CPU. Maps are dense and of one layout; the caller has checked that.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from igate_edge.errors import InputError

#: Tasks that the kernel is written for, and types of its maps and logits; the torch reference takes any.
TASKS = 8
TYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Elements of one map that a program owns, and warps that share them.
BLOCK = {"forward": 1024, "backward": 2048, "reduce": 1024}
WARPS = {"forward": 4, "backward": 8, "reduce": 4}


@dataclass(frozen=True)
class Geometry:
    """A dense map as rows x cols in memory order, and the block that a program owns: block_rows x (groups x lanes)."""

    rows: int
    cols: int
    channels: int
    channels_last: bool
    block_rows: int
    groups: int
    lanes: int

    @property
    def grid(self) -> tuple[int, int]:
        """Programs along rows and columns."""
        return -(-self.rows // self.block_rows), -(-self.cols // (self.groups * self.lanes))

    @property
    def parts(self) -> int:
        """Partial sums per channel that the backward leaves."""
        return self.grid[0] if self.channels_last else self.rows // self.channels * self.grid[1]

    @property
    def unit(self) -> int:
        """Largest power of two up to 16 that divides the columns: how rows are aligned."""
        return math.gcd(self.cols, 16)

    @property
    def arguments(self) -> dict[str, int]:
        """The kernels' arguments about it, by name."""
        sizes = {"rows": self.rows, "units": self.cols // self.unit, "channels": self.channels, "UNIT": self.unit}
        block = {"LAST": self.channels_last, "ROWS": self.block_rows, "GROUPS": self.groups, "LANES": self.lanes}
        return sizes | block


def memory_format(x: Tensor) -> torch.memory_format | None:
    """The dense layout of a map, NCHW where both fit; None where it has neither."""
    if x.is_contiguous():
        return torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return last if last is not None and x.is_contiguous(memory_format=last) else None


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout that a map has, or NCHW if it is not dense."""
    return memory_format(x) or torch.contiguous_format


def dense(x: Tensor, layout: torch.memory_format) -> Tensor:
    """The map in a layout: itself where it has it."""
    return x.contiguous(memory_format=layout)


def geometry(x: Tensor, elements: int) -> Geometry:
    """How programs of `elements` cut a map [N, C, ...] of a dense layout.

    >>> geometry(torch.zeros(2, 3, 4, 4), 64).grid
    (2, 1)
    """
    images, channels, space = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    last = space == 1 or memory_format(x) != torch.contiguous_format
    rows, cols = (images * space, channels) if last else (images * channels, space)
    if last:
        # A row of the block is a cache line of 128 bytes, a lane 4 bytes: a thread's channels are few, its pixels many.
        lanes = max(1, 4 // x.element_size())
        groups = max(1, min(_power(cols), 128 // x.element_size(), elements) // lanes)
    else:
        groups, lanes = 1, min(_power(cols), elements)
    block_rows = min(_power(rows), max(1, elements // (groups * lanes)))
    return Geometry(rows, cols, channels, last, block_rows, groups, lanes)


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether Triton was told to interpret (TRITON_INTERPRET=1 when the kernels were loaded): it serves CPU tensors."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import JITFunction

    from . import gated_select_triton as device

    return not isinstance(device.select_forward, JITFunction)


def runs_triton(x: Tensor) -> bool:
    """Whether the operator runs its kernel on a tensor, rather than the torch reference."""
    return x.is_cuda or interpreted()


def unfit(psi: Tensor, phis: Sequence[Tensor], alpha: Tensor, beta: Tensor | None) -> tuple[str, str] | None:
    """What the kernel cannot take, as evidence and fix; None if it can take everything."""
    if not 1 <= len(phis) <= TASKS:
        return f"{len(phis)} tasks, the kernel is written for 1 to {TASKS}", "use mode='torch'"
    for x in (psi, alpha, beta):
        if x is not None and x.dtype not in TYPES and (x is not alpha or x.dtype != torch.bool):
            return f"{x.dtype}", "use float32, float16 or bfloat16, or mode='torch'"
    layout = memory_format(psi)
    if layout is None or not all(phi.is_contiguous(memory_format=layout) for phi in phis):
        strides = ", ".join(str(x.stride()) for x in (psi, *phis))
        return f"strides {strides}", "make all maps contiguous, or all channels_last, or use mode='torch'"
    return None


@torch.library.custom_op("igate::gated_select", mutates_args=())
def select(
    psi: Tensor, phis: Sequence[Tensor], alpha: Tensor, beta: Tensor | None, step: Tensor | None
) -> list[Tensor]:
    """The T selected maps, then the mix where beta is given. Arguments as those of gated_select."""
    maps = _empty_maps(psi, phis, alpha, beta, step)
    if runs_triton(psi):
        # A program that was compiled or exported may bring other layouts than it was traced with.
        psi, *phis = (dense(x, layout_of(psi)) for x in (psi, *phis))
        problem = unfit(psi, phis, alpha, beta)
        if problem is not None:
            raise InputError("gated_select cannot run in Triton", *problem)
        if psi.numel():
            _launch_forward(psi, phis, alpha, beta, step, maps)
        return maps
    from .gated_select import forward

    outs, psi_next = forward(psi, phis, alpha, None if beta is None else beta.softmax(0), step)
    return [to.copy_(x) for to, x in zip(maps, (*outs, psi_next), strict=beta is not None) if x is not None]


@torch.library.custom_op("igate::gated_select_backward", mutates_args=())
def select_backward(
    grads: Sequence[Tensor | None],
    psi: Tensor,
    phis: Sequence[Tensor],
    alpha: Tensor,
    beta: Tensor | None,
    step: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (psi, alpha, beta, *phis) that are `wanted`; `grads`: of the T maps, then of the mix."""
    results = _empty_grads(grads, psi, phis, alpha, beta, step, wanted)
    if runs_triton(psi) and psi.numel():
        layout = layout_of(psi)
        psi, *phis = (dense(x, layout) for x in (psi, *phis))
        grads = [None if grad is None else dense(grad, layout) for grad in grads]
        _launch_backward(grads, psi, phis, alpha, beta, step, wanted, results)
        return results
    from .gated_select import backward

    weights = None if beta is None else beta.softmax(0)
    d_psi, d_alpha, d_beta, *d_phis = backward(grads, psi, phis, alpha, weights, step, wanted)
    if weights is not None and d_beta is not None:
        d_beta = weights * (d_beta - (weights * d_beta).sum(0))
    found = [d for d, want in zip((d_psi, d_alpha, d_beta, *d_phis), wanted, strict=True) if want]
    return [to.zero_() if d is None else to.copy_(d) for to, d in zip(results, found, strict=True)]


@select.register_fake
def _empty_maps(
    psi: Tensor, phis: Sequence[Tensor], alpha: Tensor, beta: Tensor | None, step: Tensor | None
) -> list[Tensor]:
    return [torch.empty_like(psi, memory_format=layout_of(psi)) for _ in range(len(phis) + (beta is not None))]


@select_backward.register_fake
def _empty_grads(
    grads: Sequence[Tensor | None],
    psi: Tensor,
    phis: Sequence[Tensor],
    alpha: Tensor,
    beta: Tensor | None,
    step: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    plain, layout = torch.contiguous_format, layout_of(psi)
    like = zip((psi, alpha, beta, *phis), (layout, plain, plain, *[layout] * len(phis)), wanted, strict=True)
    return [torch.empty_like(x, memory_format=order) for x, order, want in like if want and x is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    psi, phis, alpha, beta, step = inputs
    ctx.tasks = len(phis)
    ctx.save_for_backward(psi, alpha, beta, step, *phis)
    ctx.set_materialize_grads(False)  # an output that no loss reads costs nothing


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    psi, alpha, beta, step, *phis = ctx.saved_tensors
    need_psi, need_phis, need_alpha, need_beta, _ = ctx.needs_input_grad
    through_mix = len(grads) > ctx.tasks and grads[ctx.tasks] is not None
    read = [through_mix or grad is not None for grad in grads[: ctx.tasks]]
    wanted = [need_psi and any(read), need_alpha and any(read), need_beta and through_mix]
    wanted += [need and r for need, r in zip(need_phis, read, strict=True)]
    found = iter(select_backward(grads, psi, phis, alpha, beta, step, wanted) if any(wanted) else ())
    d_psi, d_alpha, d_beta, *d_phis = (next(found) if want else None for want in wanted)
    return d_psi, d_phis, d_alpha, d_beta, None


select.register_autograd(_differentiate, setup_context=_keep)


def _launch_forward(
    psi: Tensor, phis: Sequence[Tensor], alpha: Tensor, beta: Tensor | None, step: Tensor | None, maps: list[Tensor]
) -> None:
    from . import gated_select_triton as device

    shape, tasks = geometry(psi, BLOCK["forward"]), len(phis)
    with torch.cuda.device_of(psi):
        device.select_forward[shape.grid](
            psi, tuple(phis), tuple(maps[:tasks]), None if beta is None else maps[tasks], *_rows(alpha, beta), step,
            TASKS=tasks, MIXED=beta is not None, FIXED=alpha.dtype == torch.bool, QUANTISED=step is not None,
            **shape.arguments, **_options("forward"),
        )  # fmt: skip


def _launch_backward(
    grads: Sequence[Tensor | None],
    psi: Tensor,
    phis: Sequence[Tensor],
    alpha: Tensor,
    beta: Tensor | None,
    step: Tensor | None,
    wanted: Sequence[bool],
    results: list[Tensor],
) -> None:
    from . import gated_select_triton as device

    shape, tasks, fixed = geometry(psi, BLOCK["backward"]), len(phis), alpha.dtype == torch.bool
    next_grad = grads[tasks] if len(grads) > tasks else None
    found = iter(results)
    d_psi, d_alpha, d_beta, *d_phis = (next(found) if want else None for want in wanted)
    partial = None
    if d_alpha is not None or d_beta is not None:
        partial = torch.empty(2 * tasks, shape.parts, shape.channels, dtype=torch.float32, device=psi.device)
    rows = _rows(alpha, beta)
    wants = {"WANT_ALPHA": d_alpha is not None, "WANT_BETA": d_beta is not None}
    with torch.cuda.device_of(psi):
        device.select_backward[shape.grid](
            psi, tuple(phis), _filled(grads[:tasks], psi), next_grad, d_psi, _filled(d_phis, psi), partial, *rows, step,
            TASKS=tasks, GIVEN=_bits(grads[:tasks]), MIXED=next_grad is not None, WANT_PHIS=_bits(d_phis),
            WANT_PSI=d_psi is not None, **wants, FIXED=fixed, QUANTISED=step is not None,
            **shape.arguments, **_options("backward"),
        )  # fmt: skip
        if partial is not None:
            block = 32
            device.select_reduce[(-(-shape.channels // block),)](
                partial, *rows, d_alpha, d_beta, shape.parts, shape.channels, TASKS=tasks, **wants, FIXED=fixed,
                BLOCK=block, PARTS=max(1, min(_power(shape.parts), BLOCK["reduce"] // block)), **_options("reduce"),
            )  # fmt: skip


def _rows(alpha: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What decides, as dense rows: fixed gates as bytes."""
    rows = alpha.contiguous()
    return rows.view(torch.uint8) if rows.dtype == torch.bool else rows, None if beta is None else beta.contiguous()


def _filled(maps: Sequence[Tensor | None], stand_in: Tensor) -> tuple[Tensor, ...]:
    """A kernel's tuple has no holes: what is absent is never touched."""
    return tuple(stand_in if x is None else x for x in maps)


def _bits(maps: Sequence[Tensor | None]) -> int:
    return sum(1 << t for t, x in enumerate(maps) if x is not None)


def _options(kernel: str) -> dict[str, Any]:
    """Multiply and add round separately, as in the reference: the kernels wait for memory, not for arithmetic."""
    return {"num_warps": WARPS[kernel], "enable_fp_fusion": False}
