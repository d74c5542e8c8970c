"""Layers of the physical width, made of the layers of all branches; zero blocks that stay zero."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .merge_layout import Layout, Reading, Row, rows_of
from .merge_plan import LINEAR
from .placement import operation
from .streams import Step


class MaskedConv2d(nn.Conv2d):
    """A convolution whose weight counts only where `mask` (0.0 or 1.0, [out, in, 1, 1]) is 1.

    The mask multiplies the weight in the forward pass: masked entries get no gradient, so they stay exactly zero under
    any optimiser that moves a parameter by its gradient or scales it (weight decay, momentum).
    """

    mask: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight * self.mask, self.bias)

    def dense(self) -> nn.Conv2d:
        """The same function as an nn.Conv2d, which shares nothing with this module."""
        made = _conv_like(self, self.in_channels, self.out_channels, self.groups)
        made.weight.data.copy_(self.weight * self.mask)
        if self.bias is not None:
            made.bias.data.copy_(self.bias)
        return made


class MaskedConvTranspose2d(nn.ConvTranspose2d):
    """As MaskedConv2d; `mask` [in, out, 1, 1]."""

    mask: Tensor

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        padding: Any = self.padding
        weight = self.weight * self.mask
        return nn.functional.conv_transpose2d(
            input, weight, self.bias, self.stride, padding, self.output_padding, self.groups, self.dilation
        )

    def dense(self) -> nn.ConvTranspose2d:
        """The same function as an nn.ConvTranspose2d, which shares nothing with this module."""
        made = _conv_like(self, self.in_channels, self.out_channels, self.groups)
        made.weight.data.copy_(self.weight * self.mask)
        if self.bias is not None:
            made.bias.data.copy_(self.bias)
        return made


def _conv_like(conv: Any, inputs: int, outputs: int, groups: int, mask: Tensor | None = None) -> Any:
    """A new convolution of other widths; masked when there is a mask that masks anything."""
    transposed = isinstance(conv, nn.ConvTranspose2d)
    masked = mask is not None and not bool(mask.all())
    kinds = (nn.ConvTranspose2d, MaskedConvTranspose2d) if transposed else (nn.Conv2d, MaskedConv2d)
    options: dict[str, Any] = {"output_padding": conv.output_padding} if transposed else {}
    made: Any = kinds[masked](
        inputs,
        outputs,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        dilation=conv.dilation,
        groups=groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        dtype=conv.weight.dtype,
        **options,
    )
    if mask is not None and masked:
        made.register_buffer("mask", mask.to(conv.weight.dtype)[:, :, None, None], persistent=False)
    return made.train(conv.training)


def dense_conv(convs: Sequence[Any], rows: Sequence[Row], layout: Layout, fill: bool) -> nn.Module:
    """One convolution that makes `rows` of the streams' `convs` from a tensor of this layout; blocks and mixes folded.

    A grouped convolution becomes a dense one whose zero blocks are also those between groups.
    """
    first = convs[0]
    transposed = isinstance(first, nn.ConvTranspose2d)
    weight = torch.zeros(len(rows), layout.width, *first.kernel_size, dtype=torch.float64)
    mask = torch.zeros(len(rows), layout.width, dtype=torch.bool)
    for stream, reading in layout.streams.items():
        places, channels = rows_of(rows, stream)
        source = convs[stream].weight.detach().cpu().double()
        source = source.transpose(0, 1) if transposed else source
        size, outputs = source.shape[1], source.shape[0] // first.groups
        for group in range(first.groups):
            own = [k for k, channel in enumerate(channels) if channel // outputs == group]
            inputs = reading.rows(range(group * size, (group + 1) * size))
            here = [places[k] for k in own]
            weight[here] = inputs.fold(source[[channels[k] for k in own]], layout.width)
            mask[here] = inputs.used(layout.width)
    if transposed:
        weight, mask = weight.transpose(0, 1), mask.T
    made = _conv_like(first, layout.width, len(rows), 1, None if fill else mask)
    made.weight.data.copy_(weight)
    if first.bias is not None:
        made.bias.data.copy_(_rows_of([conv.bias for conv in convs], rows))
    return made


def depthwise_conv(convs: Sequence[Any], rows: Sequence[Row]) -> nn.Module:
    """One depthwise convolution of these rows."""
    made = _conv_like(convs[0], len(rows), len(rows), len(rows))
    made.weight.data.copy_(_rows_of([conv.weight for conv in convs], rows))
    if convs[0].bias is not None:
        made.bias.data.copy_(_rows_of([conv.bias for conv in convs], rows))
    return made


def wide_norm(norms: Sequence[Any], rows: Sequence[Row]) -> nn.Module:
    """One batch norm of these rows, running statistics included; rows of nobody normalise to what they are."""
    made = copy.deepcopy(norms[0])
    made.num_features = len(rows)
    for name, empty in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
        tensor = getattr(made, name)
        if tensor is not None:
            values = _rows_of([getattr(norm, name) for norm in norms], rows, empty).to(tensor.dtype)
            setattr(made, name, nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values)
    return made


def front(reading: Reading, width: int, fill: bool, dtype: torch.dtype) -> nn.Module:
    """The 1x1 convolution without bias that makes a reading's channels of `width` physical ones."""
    like, matrix = nn.Conv2d(1, 1, 1, bias=False, dtype=dtype), reading.matrix(width)
    made = _conv_like(like, matrix.shape[1], matrix.shape[0], 1, None if fill else matrix != 0)
    made.weight.data.copy_(matrix[:, :, None, None])
    return made


def _rows_of(tensors: Sequence[Tensor], rows: Sequence[Row], empty: float = 0.0) -> Tensor:
    made = tensors[0].new_full((len(rows), *tensors[0].shape[1:]), empty, device="cpu").detach()
    for stream, tensor in enumerate(tensors):
        places, channels = rows_of(rows, stream)
        made[places] = tensor.detach().cpu()[channels]
    return made


class FrontedHead(nn.Module):
    """A head behind 1x1 convolutions that build the maps it was made for (`fronts`, one a map; identity where none)."""

    def __init__(self, fronts: Iterable[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.fronts, self.head = nn.ModuleList(fronts), head

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.head([front(x) for front, x in zip(self.fronts, features, strict=True)])


def wide_head(head: nn.Module, maps: Sequence[tuple[int, Reading]], fill: bool) -> nn.Module:
    """A copy of a task's head that reads merged maps, each given by its width and what the task sees of it.

    Convolutions that read a map directly, or through pools that pass a mix, are widened; a head that reads maps in any
    other way, or that torch.fx cannot trace, keeps its layers and gets fronts.
    """
    made = copy.deepcopy(head)
    plain = [reading.is_identity(width) for width, reading in maps]
    if all(plain):
        return made
    readers = _first_convs(made, plain)
    if readers is None:
        dtype = next((p.dtype for p in head.parameters()), torch.float32)
        fronts = [
            nn.Identity() if same else front(reading, width, fill, dtype)
            for same, (width, reading) in zip(plain, maps, strict=True)
        ]
        return FrontedHead(fronts, made).train(head.training)
    for path, number in readers.items():
        conv: Any = made.get_submodule(path)
        width, reading = maps[number]
        rows = [(0, channel) for channel in range(conv.out_channels)]
        replace(made, path, dense_conv([conv], rows, Layout(width, {0: reading}), fill))
    return made


def _first_convs(head: nn.Module, plain: Sequence[bool]) -> dict[str, int] | None:
    """Path -> number of the map it reads, of the convolutions that read maps; None unless only such do."""
    argument = next(iter(inspect.signature(head.forward).parameters))
    try:
        graph = fx.Tracer().trace(head, concrete_args={argument: [fx.PH] * len(plain)})
    except Exception:  # the trace runs the head's own code; fronts serve any head
        return None
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    found: dict[str, int] = {}
    maps = [node for node in graph.nodes if node.op == "placeholder"][: len(plain)]
    for number, node in enumerate(maps):
        todo = [] if plain[number] else list(node.users)
        while todo:
            user = todo.pop()
            module = head.get_submodule(str(user.target)) if user.op == "call_module" else None
            if type(module) is nn.Conv2d and module.groups == 1 and called.count(str(user.target)) == 1:
                found[str(user.target)] = number
            elif operation(_as_step(user), module) in LINEAR and len(user.all_input_nodes) == 1:
                todo.extend(user.users)
            elif not (user.op == "call_function" and user.target is getattr and user.args[1] == "shape"):
                return None
    return found


def _as_step(node: fx.Node) -> Step:
    return Step(0, node.op.removeprefix("call_"), node.target)


def replace(module: nn.Module, path: str, part: nn.Module) -> None:
    """Put `part` at a dotted path."""
    parent, _, name = path.rpartition(".")
    module.get_submodule(parent)._modules[name] = part


def without_masks(module: nn.Module) -> nn.Module:
    """Replace every masked convolution by a dense one of the same function; returns the module."""
    for path, part in list(module.named_modules()):
        if isinstance(part, MaskedConv2d | MaskedConvTranspose2d):
            replace(module, path, part.dense())
    return module
