"""Multiply-accumulates and parameters of a graph: one table, operator -> function of shapes; what is not in it is
listed.

A MAC is one multiplication with its addition; bias additions, activations, pooling, resizing and copies count as 0.
MACs are a column of a report, never a speed: see the measured times beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from .lanes import ELEMENTWISE, SPATIAL, constant, dims_or_none, name_of

Shape = tuple[int, ...]

#: Operators that hold learned parameters, and the first input that may be one.
WEIGHTED = {
    "Conv": 1, "ConvTranspose": 1, "Gemm": 0, "MatMul": 0, "BatchNormalization": 1, "InstanceNormalization": 1,
    "GroupNormalization": 1, "LayerNormalization": 1, "PRelu": 1, "DequantizeLinear": 0,
}  # fmt: skip
#: Operators without multiply-accumulates in the sense above.
FREE = (ELEMENTWISE | SPATIAL) | frozenset([
    "ArgMax", "ArgMin", "Concat", "Constant", "ConstantOfShape", "DepthToSpace", "Dropout", "Flatten", "Gather",
    "GatherElements", "GatherND", "GroupNormalization", "Identity", "LayerNormalization", "LogSoftmax",
    "LpNormalization", "ReduceL1", "ReduceProd", "Reshape", "Shape", "Slice", "Softmax", "SpaceToDepth", "Split",
    "Squeeze", "Tile", "TopK", "Transpose", "Unsqueeze",
])  # fmt: skip


def _conv(inputs: list[Shape], output: Shape) -> int:
    """Every output element sums over the kernel and the inputs of its group: weight [O, I / groups, k, k]."""
    return math.prod(output) * math.prod(inputs[1][1:])


def _conv_transpose(inputs: list[Shape], output: Shape) -> int:
    """Every input element is spread over the kernel and the outputs of its group: weight [I, O / groups, k, k]."""
    return math.prod(inputs[0]) * math.prod(inputs[1][1:])


def _gemm(inputs: list[Shape], output: Shape) -> int:
    """[N, K] x [K, M]: the size of the first input times M, however either is stored."""
    return math.prod(inputs[0]) * output[-1]


def _matmul(inputs: list[Shape], output: Shape) -> int:
    return math.prod(output) * inputs[0][-1]


MACS: dict[str, Callable[[list[Shape], Shape], int]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
}


@dataclass(frozen=True)
class NodeCost:
    """Cost of one node; `head`: it belongs to a task's head (its weights are called "heads...."), not the encoder."""

    name: str
    op: str
    macs: int
    params: int
    out_shape: Shape
    head: bool = False


@dataclass(frozen=True)
class Cost:
    """Sum over a graph. `unknown`: operators that the table lacks, counted as 0 and listed for that reason."""

    macs: int
    params: int
    nodes: list[NodeCost]
    unknown: list[str]

    @property
    def head_macs(self) -> int:
        """MACs of the tasks' heads; the encoder has the rest."""
        return sum(node.macs for node in self.nodes if node.head)

    def as_json(self) -> dict[str, Any]:
        return {"macs": self.macs, "params": self.params, "head_macs": self.head_macs, "unknown": list(self.unknown)}


def count(model: ir.Model) -> Cost:
    """MACs and parameters of a model whose values have static shapes; a weight that two nodes read counts once.

    A 3x3 convolution from 16 to 32 channels at 14x14 has 3*3*16*32*14*14 MACs and 3*3*16*32 + 32 parameters with its
    bias.
    """
    nodes, unknown, seen = [], [], set[str]()
    for node in model.graph:
        shapes = [dims_or_none(value) if value is not None else () for value in node.inputs]
        output = dims_or_none(node.outputs[0])
        known = node.domain in ("", "ai.onnx") and (node.op_type in MACS or node.op_type in FREE)
        if not known:
            unknown.append(f"{node.domain}::{node.op_type}" if node.domain else node.op_type)
        macs = MACS[node.op_type](shapes, output) if known and node.op_type in MACS else 0
        params, head = 0, False
        for value in node.inputs[WEIGHTED.get(node.op_type, len(node.inputs)) :]:
            if value is None or constant(value) is None:
                continue
            name = name_of(value)
            head = head or name.startswith("heads.")
            if name not in seen and not (node.op_type == "DequantizeLinear" and value is not node.inputs[0]):
                params += math.prod(dims_or_none(value))
            seen.add(name)
        nodes.append(NodeCost(node.name or "", node.op_type, macs, params, output, head))
    return Cost(sum(node.macs for node in nodes), sum(node.params for node in nodes), nodes, sorted(set(unknown)))


def useful(model: ir.Model) -> int:
    """MACs without those of zero blocks: pairs of an output and an input channel whose whole kernel is 0.

    What a merged net's convolutions compute for nothing; of a net without such blocks it is all of them.
    """
    total = 0.0
    for node, item in zip(model.graph, count(model).nodes, strict=True):
        weight = constant(node.inputs[1]) if node.op_type in MACS and len(node.inputs) > 1 and node.inputs[1] else None
        kept = 1.0
        if weight is not None and weight.ndim >= 2 and item.macs:
            kept = float(weight.reshape(*weight.shape[:2], -1).any(axis=2).mean())
        total += kept * item.macs
    return round(total)
