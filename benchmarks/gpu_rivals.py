"""What the kernels are compared with on a GPU: the same in eager torch, compiled by torch, and as separate layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from igate_edge.kernels.gated_select import gated_select
from igate_edge.kernels.grouped_conv import ConvLayer
from torch import Tensor

Calls = dict[str, Callable[[], Any]]
Select = Callable[..., tuple[tuple[Tensor, ...], "Tensor | None"]]
#: Of a site's gates, that many are open, as after training.
OPEN = 0.3


def written_out(
    psi: Tensor, phis: Sequence[Tensor], alpha: Tensor, beta: Tensor
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """gated_select as one writes it in a framework; its gradients are the framework's own."""
    soft = torch.sigmoid(alpha)
    gate = ((alpha >= 0).to(soft.dtype) + soft - soft.detach()).to(psi.dtype)[:, None, :, None, None]
    weights = torch.softmax(beta, 0).to(psi.dtype)[:, None, :, None, None]
    outs = tuple(row * phi + (1 - row) * psi for row, phi in zip(gate, phis, strict=True))
    return outs, torch.stack([row * out for row, out in zip(weights, outs, strict=True)]).sum(0)


def select_calls(
    tasks: int,
    shape: tuple[int, int, int, int],
    backward: bool,
    device: str = "cuda",
    dtype: torch.dtype = torch.float16,
) -> tuple[Calls, np.ndarray]:
    """Calls by name that compute one site, with gradients where `backward`, and its gates, bool [T, C].

    igate: gated_select as a net calls it. reference: its definition in torch. eager, compiled: `written_out`.
    """
    torch.manual_seed(0)
    psi, *phis = (torch.randn(shape, device=device, dtype=dtype, requires_grad=backward) for _ in range(tasks + 1))
    alpha = (torch.rand(tasks, shape[1], device=device) - 1 + OPEN).requires_grad_(backward)
    beta = torch.randn(tasks, shape[1], device=device, requires_grad=backward)
    grads = [torch.randn_like(psi) for _ in range(tasks + 1)]
    ways: dict[str, Select] = {
        "igate": gated_select,
        "reference": lambda *inputs: gated_select(*inputs, mode="torch"),
        "eager": written_out,
        "compiled": torch.compile(written_out),
    }

    def call(way: Select) -> tuple[Tensor, ...]:
        outs, mixed = way(psi, phis, alpha, beta)
        assert mixed is not None
        if not backward:
            return *outs, mixed
        return torch.autograd.grad([*outs, mixed], [psi, alpha, beta, *phis], grads)

    gates = (alpha >= 0).cpu().numpy()
    return {name: partial(call, way) for name, way in ways.items()}, gates


def torch_branches(
    layer: ConvLayer, rows: Sequence[slice], x: np.ndarray, device: str = "cuda", dtype: torch.dtype = torch.float16
) -> Callable[[], list[Tensor]]:
    """A call that convolves each branch by torch (on a GPU: cuDNN) in floats, channels_last, with the inputs it reads.

    The scale and what follows are left out, in its favour; torch has no INT8 convolution on a GPU.
    """
    top, left, *_ = layer.pads
    parts = []
    for each in rows:
        weight = layer.weight[each]
        read = np.flatnonzero(weight.any(axis=(0, 2, 3)))
        parts.append([_last(array, device, dtype) for array in (x[:, read], weight[:, read])])

    def call() -> list[Tensor]:
        with torch.no_grad():
            return [
                torch.nn.functional.conv2d(inputs, weight, None, layer.stride, (top, left), layer.dilation)
                for inputs, weight in parts
            ]

    return call


def _last(array: np.ndarray, device: str, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(array).to(device, dtype, memory_format=torch.channels_last)
