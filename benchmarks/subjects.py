"""The networks that benchmarks time: gated ResNets with any gates, and plain ones of any width; weights are noise.

Time does not depend on weights. Every network goes the product's own way: export, layout, calibration, INT8.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from igate_edge.backbones import resnet18
from igate_edge.backbones.resnet import BasicBlock
from igate_edge.compiler import calibrate, cost, graph, quantize
from igate_edge.compiler.layout import lay_out
from igate_edge.compiler.masks import keep_outputs, set_masks
from igate_edge.contract import Preprocess
from igate_edge.engines import onnxruntime as ort
from igate_edge.gating.convert import InterroGateNet, PlainNet, interrogate
from igate_edge.gating.export import to_onnx
from igate_edge.training.tasks import Classification, Depth, Normals, SemanticSegmentation, Task

Masks = dict[str, np.ndarray]
#: Widths of the four stages of a ResNet-18.
BASE = (64, 128, 256, 512)


def tasks() -> list[Task]:
    """Three dense tasks, as the example has them."""
    return [SemanticSegmentation("semseg", classes=12), Depth("depth"), Normals("normals")]


TASKS = len(tasks())


def image(size: tuple[int, int], count: int = 1) -> np.ndarray:
    """A preprocessed frame of noise, float32 [count,3,height,width]."""
    return np.random.default_rng(0).random((count, 3, *size), np.float32)


def gated_net(width: int, size: tuple[int, int]) -> InterroGateNet:
    """A ResNet-18 layout with a gate for every channel; no branch's weights and no mix equals another's."""
    torch.manual_seed(0)
    net = interrogate(resnet18(width), tasks(), tie="stage", example=torch.zeros(1, 3, *size))
    with torch.no_grad():
        for weight in net.branches.parameters():
            weight.add_(0.1 * weight.std(correction=0).clamp_min(1e-3) * torch.randn_like(weight))
        for site in net.gate_sites():
            site.beta.normal_()
    return net


@lru_cache(maxsize=2)
def gated(width: int, size: tuple[int, int]) -> ir.Model:
    """The gated network as the compiler reads it."""
    return graph.load(to_onnx(gated_net(width, size), Preprocess(*size)))


def plain_net(width: int, size: tuple[int, int]) -> PlainNet:
    """The plain shared network of a width."""
    torch.manual_seed(0)
    return PlainNet(resnet18(width), tasks(), example=torch.zeros(1, 3, *size))


@lru_cache(maxsize=16)
def plain(width: int, size: tuple[int, int]) -> ir.Model:
    """The plain shared network as the compiler reads it."""
    return graph.load(to_onnx(plain_net(width, size), Preprocess(*size)))


def singles(model: ir.Model) -> list[ir.Model]:
    """One network a task, of the width of a plain shared one."""
    return [keep_outputs(model, [spec.name]) for spec in graph.specs(model)]


@dataclass(frozen=True)
class Built:
    """A network ready to time: INT8 file, float file, MACs of a frame (useful: zero blocks not counted)."""

    int8: bytes
    floats: bytes
    macs: int
    useful: int
    model: ir.Model
    session: ort.Session

    def run(self, frame: np.ndarray) -> object:
        return self.session.run(frame)


def build(model: ir.Model, choice: str | Mapping[str, str] | None = None, useful: int | None = None) -> Built:
    """Lay out (with a choice), calibrate on noise, quantise, open on one thread; checks that it runs in INT8."""
    laid = model if choice is None else lay_out(model, choice).model
    frame = image(tuple(graph.preprocess(model).as_json()[name] for name in ("height", "width")))
    int8 = graph.dump(quantize.quantize(laid, calibrate.calibrate(laid, [frame]), dialect="ort"))
    ort.inspect(int8).require(0.95)
    macs = int(cost.count(laid).macs)
    return Built(int8, graph.dump(laid), macs, macs if useful is None else useful, laid, ort.open(int8))


def together(parts: Sequence[Built]) -> Any:
    """Run several networks one after the other as one."""

    def run(frame: np.ndarray) -> None:
        for part in parts:
            part.run(frame)

    return run


def useful_macs(model: ir.Model) -> int:
    """MACs of a gated model without what nobody needs: those of its split form."""
    return int(cost.count(lay_out(model, "split").model).macs)


def groups(model: ir.Model) -> dict[str, list[dict[str, Any]]]:
    """Sites that share one order of channels, by the name of the first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for site in graph.meta(model)["sites"]:
        found.setdefault(site["tie"] or site["name"], []).append(site)
    return found


def joint(model: ir.Model, share: float | Sequence[float], granule: int = 1, step: int = 1) -> Masks:
    """The same first channels for all tasks and all sites of a residual stream.

    share: of a layer's channels, or one share a stage of four (by width). granule: channels come in so many; less than
    half of one, or just half, is none. step: a site's width in all, C + (T - 1) k, becomes a multiple of it.
    """
    masks = {}
    for sites in groups(model).values():
        channels = int(sites[0]["channels"])
        part = share if isinstance(share, int | float) else share[_stage(model, channels)]
        count = granule * math.ceil(part * channels / granule - 0.5)
        if step > 1:
            wide = step * max(1, round((channels + (TASKS - 1) * count) / step))
            count = min(channels, max(0, (wide - channels) // (TASKS - 1)))
        masks |= {site["name"]: np.tile(np.arange(channels) < count, (TASKS, 1)) for site in sites}
    return masks


def scattered(model: ir.Model, share: float, seed: int, tied: bool) -> Masks:
    """Gates a channel and task at random: one draw a site, or one for all sites of a residual stream."""
    rng, masks = np.random.default_rng(seed), {}
    for sites in groups(model).values():
        drawn = rng.random((TASKS, int(sites[0]["channels"]))) < share
        for site in sites:
            masks[site["name"]] = drawn if tied else rng.random(drawn.shape) < share
    return masks


def gates(model: ir.Model, masks: Masks) -> ir.Model:
    """The gated model with these gates."""
    return set_masks(model, masks)


def _stage(model: ir.Model, channels: int) -> int:
    widths = sorted({int(site["channels"]) for site in graph.meta(model)["sites"]})
    return widths.index(channels)


class Stages(nn.Module):
    """A ResNet-18 layout whose four stages have any widths: [N,3,H,W] -> maps at strides 4, 8, 16 and 32."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, 2, 1, bias=False)
        self.norm, self.relu, self.pool = nn.BatchNorm2d(widths[0]), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        ends = [widths[0], *widths]
        self.stages = nn.ModuleList(
            nn.Sequential(BasicBlock(ends[i], ends[i + 1], 2 if i else 1), BasicBlock(ends[i + 1], ends[i + 1], 1))
            for i in range(len(widths))
        )

    def forward(self, frame: torch.Tensor) -> list[torch.Tensor]:
        maps = [self.pool(self.relu(self.norm(self.stem(frame))))]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]


def dense(macs: int, size: tuple[int, int], step: int = 16) -> ir.Model:
    """The plain net of evenly scaled stages, all widths multiples of `step`, whose MACs are nearest to `macs`."""
    wanted = macs - int(cost.count(plain(BASE[0], size)).macs) + backbone_macs(BASE, size)
    scales = np.geomspace(0.25, 4, 500)
    scale = min(scales, key=lambda tried: abs(backbone_macs([tried * wide for wide in BASE], size) - wanted))
    ends = [(step * max(1, int(scale * wide / step)), step * (int(scale * wide / step) + 1)) for wide in BASE]
    return staged(min(itertools.product(*ends), key=lambda chosen: abs(backbone_macs(chosen, size) - wanted)), size)


def staged(widths: Sequence[int], size: tuple[int, int]) -> ir.Model:
    """The plain net whose stages have these widths."""
    torch.manual_seed(0)
    net = PlainNet(Stages(widths), tasks(), example=torch.zeros(1, 3, *size))
    return graph.load(to_onnx(net, Preprocess(*size)))


def backbone_macs(widths: Sequence[float], size: tuple[int, int]) -> float:
    """MACs of `Stages`, without heads.

    >>> backbone_macs([1, 1, 1, 1], (32, 32)) == 27 * 256 + 4 * 9 * (64 + 16 + 4 + 1) + (16 + 4 + 1)
    True
    """
    pixels = size[0] // 2 * (size[1] // 2)
    total, before = 27 * widths[0] * pixels, widths[0]
    for index, wide in enumerate(widths):
        pixels //= 4
        shortcut = before * wide if index else 0
        total += pixels * (9 * before * wide + 3 * 9 * wide * wide + shortcut)
        before = wide
    return total


class Large(nn.Module):
    """Two 3x3 convolutions of 256 channels at 32x32 behind a small stem: nearly all its time is in them."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 256, 256, 256)
        strides = (2, 2, 1, 1)
        self.layers = nn.Sequential(
            *(
                part
                for i, stride in enumerate(strides)
                for part in (nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1), nn.ReLU())
            )
        )

    def forward(self, frame: torch.Tensor) -> torch.Tensor:
        return self.layers(frame)


def peak(size: tuple[int, int]) -> ir.Model:
    """A network that runs at what this machine's INT8 convolutions reach at most."""
    torch.manual_seed(0)
    net = PlainNet(Large(), [Classification("label", classes=2)], example=torch.zeros(1, 3, *size))
    return graph.load(to_onnx(net, Preprocess(*size)))


def conv_macs(model: ir.Model) -> dict[str, int]:
    """MACs of every convolution of a laid-out float model, by node."""
    return {node.name: node.macs for node in cost.count(model).nodes if node.op == "Conv"}


def layers(model: ir.Model, int8: Mapping[str, float], floats: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """{convolution: (INT8, float)} from the nodes' times of both engines; one that either lacks is left out.

    With a convolution goes what belongs to it: activation, its byte bounds, the scaling of a last one, and a residual
    sum, which the float engine has within the convolution.
    """
    named = [{_bare(name): us for name, us in times.items()} for times in (int8, floats)]
    found = {}
    for node in (node for node in model.graph if node.op_type == "Conv"):
        chain, value = [node], node.outputs[0]
        while len(value.uses()) == 1 and value.uses()[0].node.op_type in ("Relu", "Clip", "Add"):
            after = value.uses()[0].node
            # Of the convolutions that a sum reads, the last one computed takes it along.
            if after.op_type == "Add" and _reads_later(model, after, node):
                break
            chain, value = [*chain, after], after.outputs[0]
        names = [name for part in chain for name in (part.name, part.outputs[0].name) if name]
        times = [sum(times.get(name, 0.0) for name in dict.fromkeys(names)) for times in named]
        tails = ("_q.Clip", "_f32.Cast", "_scaled.Mul", ".Add", ".Relu")
        times[0] += sum(named[0].get(f"{name}{tail}", 0.0) for name in dict.fromkeys(names) for tail in tails)
        if min(times) > 0:
            found[str(node.name)] = (times[0], times[1])
    return found


def _bare(name: str) -> str:
    """A node's name without what ONNX Runtime's optimiser adds."""
    return re.sub(r"(_nchwc|_nhwc|_token_\d+)+$", "", name)


def _reads_later(model: ir.Model, total: ir.Node, conv: ir.Node) -> bool:
    order = {node: index for index, node in enumerate(model.graph)}
    makers = [value.producer() for value in total.inputs if value is not None]
    return any(maker is not None and maker.op_type == "Conv" and order[maker] > order[conv] for maker in makers)


def rebatch(model: bytes, count: int) -> bytes:
    """The same network for `count` frames at once."""
    import onnx
    from onnx.numpy_helper import from_array, to_array

    proto = onnx.load_from_string(model)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = count
    del proto.graph.value_info[:]
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        name = {"Reshape": node.input[1:2], "Resize": node.input[3:4]}.get(node.op_type, [])
        for sizes in (stored[item] for item in name if item in stored):
            array = to_array(sizes).copy()
            array[0] = count
            sizes.CopyFrom(from_array(array, sizes.name))
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(proto))
    return proto.SerializeToString()
