"""An INT8 graph in the `trt` dialect as steps for the deploy kernels: which convolutions, with what folded into them.

A convolution or matrix of stored bytes becomes one `ConvLayer` together with the Relu or Clip, the residual Add and
the quantisation that follow. Quantising commutes with operators that only move values, so it is done before them.
Everything else stays a host step in float.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from igate_edge.kernels.grouped_conv import ConvLayer

from ..compiler import groups
from ..compiler.groups import constant, name_of


@dataclass(frozen=True)
class ConvStep:
    """One launch: y = layer(x [, skip]), all by the names of float values whose stored bytes are meant.

    name: the convolution's. nodes: the names of all nodes that it stands for.
    """

    name: str
    layer: ConvLayer
    x: str
    y: str
    skip: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class StoreStep:
    """Quantise the float value `value`: to be stored under its own name."""

    value: str


@dataclass(frozen=True)
class LoadStep:
    """`value` is the float form of the stored bytes of `source`."""

    source: str
    value: str


@dataclass(frozen=True)
class HostStep:
    """A node that runs on the host: on stored bytes where `stored`, else on floats."""

    node: ir.Node
    stored: bool


Step = ConvStep | StoreStep | LoadStep | HostStep


@dataclass(frozen=True)
class Program:
    """Steps in order. scales: of every value that is stored, by the value's name; model: the graph they refer to."""

    model: ir.Model
    steps: tuple[Step, ...]
    scales: Mapping[str, np.float32]


def program(model: ir.Model) -> Program:
    """The steps of a model that `quantize(..., dialect="trt")` made."""
    return _Reader(groups.typed(model)).read()


class _Reader:
    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.nodes = list(model.graph)
        self.scales: dict[str, np.float32] = {}  # of what is stored: by the float value's name
        self.loaded: dict[str, str] = {}  # float value that a DequantizeLinear makes -> the stored value's name
        self._find_stored()

    def read(self) -> Program:
        steps: list[Step] = []
        fused: dict[ir.Node, ConvStep] = {}  # by the last node that a convolution takes in
        inside: set[ir.Node] = set()
        for node in self.nodes:
            made = self._conv(node)
            if made is not None:
                step, chain = made
                fused[chain[-1]] = step
                inside.update(chain)
        for node in self.nodes:
            if node in fused:
                steps.append(fused[node])
            elif node in inside or self._of_constants(node):
                continue
            elif node.op_type == "QuantizeLinear":
                steps.append(StoreStep(_name(node.inputs[0])))
            elif node.op_type == "DequantizeLinear":
                steps.append(LoadStep(self.loaded[name_of(node.outputs[0])], name_of(node.outputs[0])))
            else:
                steps.append(HostStep(node, groups.moves(node) and name_of(node.outputs[0]) in self.scales))
        return Program(self.model, tuple(steps), self.scales)

    def _find_stored(self) -> None:
        """Values whose every reader quantises them with one scale, directly or behind moves: stored when made."""
        stored_as: dict[str, str] = {}
        for node in self.nodes:
            if node.op_type == "QuantizeLinear":
                array = constant(node.inputs[1])
                assert array is not None
                self.scales[_name(node.inputs[0])] = np.float32(array)
                stored_as[name_of(node.outputs[0])] = _name(node.inputs[0])
            elif node.op_type == "DequantizeLinear" and _name(node.inputs[0]) in stored_as:
                self.loaded[name_of(node.outputs[0])] = stored_as[_name(node.inputs[0])]
        for node in reversed(self.nodes):
            for value in groups.activations(node.outputs):
                wanted = {self._wants(use.node) for use in value.uses()}
                if len(wanted) == 1 and not value.is_graph_output() and (scale := wanted.pop()) is not None:
                    self.scales[name_of(value)] = scale

    def _wants(self, node: ir.Node) -> np.float32 | None:
        """The scale in which a node wants its input, if it takes stored bytes."""
        if node.op_type == "QuantizeLinear":
            return self.scales[_name(node.inputs[0])]
        return self.scales.get(name_of(node.outputs[0])) if groups.moves(node) else None

    def _of_constants(self, node: ir.Node) -> bool:
        return node.op_type == "Constant" or (
            node.op_type == "DequantizeLinear" and constant(node.inputs[0]) is not None
        )

    def _conv(self, node: ir.Node) -> tuple[ConvStep, list[ir.Node]] | None:
        """A convolution of stored bytes with all that folds into it, or None."""
        weights = _weights(node)
        x = self.loaded.get(_name(node.inputs[0])) if weights is not None else None
        if weights is None or x is None:
            return None
        weight, w_scales = weights
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        chain, skip = self._chain(node)
        y = name_of(chain[-1].outputs[0])
        step = float(self.scales[y]) if y in self.scales else 1.0
        low, high = -128, 127
        limits = groups.bounds(chain[-1])
        if y in self.scales and limits is not None:
            low, high = 0, int(min(127.0, np.rint(limits[1] / step)))
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        assert shape is not None
        size = (1, *(int(side) for side in shape.numpy()[2:])) if node.op_type == "Conv" else (1, 1, 1)
        scale = w_scales.astype(np.float64) * float(self.scales[x]) / step
        layer = ConvLayer(
            weight,
            scale.astype(np.float32),
            (np.zeros(len(weight)) if bias is None else bias / step).astype(np.float32),
            (size[0], size[1], size[2]),
            *_geometry(node),
            low=low,
            high=high,
            skip_scale=float(np.float32(float(self.scales[skip]) / step)) if skip else None,
            floats=y not in self.scales,
        )
        return ConvStep(node.name or y, layer, x, y, skip, tuple(part.name or "" for part in chain)), chain

    def _chain(self, node: ir.Node) -> tuple[list[ir.Node], str]:
        """The nodes that end in a stored value [Conv, Add, Relu], and the skip's stored value, if there is one."""
        for chain, skip in self._candidates(node):
            alone = all(len(list(part.outputs[0].uses())) == 1 for part in chain[:-1])
            if alone and name_of(chain[-1].outputs[0]) in self.scales:
                return chain, skip
        return [node], ""

    def _candidates(self, node: ir.Node) -> list[tuple[list[ir.Node], str]]:
        found: list[tuple[list[ir.Node], str]] = []
        users = [use.node for use in node.outputs[0].uses()]
        if len(users) == 1 and users[0].op_type == "Add":
            others = [value for value in users[0].inputs if value is not node.outputs[0]]
            skip = self.loaded.get(_name(others[0])) if len(others) == 1 else None
            same = others and others[0] is not None and others[0].shape == node.outputs[0].shape
            if skip is not None and same:
                act = groups.folded(users[0])
                found = [([node, users[0], *([act] if act else [])], skip)]
        act = groups.folded(node)
        return [*found, ([node, *([act] if act else [])], "")]


def _name(value: ir.Value | None) -> str:
    return value.name or "" if value is not None else ""


def _weights(node: ir.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """int8 [O, I, kh, kw] and its scales [O] of a 2D convolution or matrix with stored weights, else None."""
    if node.op_type not in ("Conv", "Gemm") or node.inputs[1] is None:
        return None
    maker = node.inputs[1].producer()
    if maker is None or maker.op_type != "DequantizeLinear":
        return None
    stored, scale = constant(maker.inputs[0]), constant(maker.inputs[1])
    if stored is None or scale is None or stored.dtype != np.int8 or (len(node.inputs) > 2 and not _fixed(node)):
        return None
    scale = np.broadcast_to(scale.astype(np.float32), stored.shape[maker.attributes["axis"].as_int()])
    if node.op_type == "Gemm":
        by_row = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
        return np.ascontiguousarray(stored if by_row else stored.T)[:, :, None, None], scale
    if stored.ndim != 4 or ("auto_pad" in node.attributes and node.attributes["auto_pad"].as_string() != "NOTSET"):
        return None
    return _dense(stored, node.attributes["group"].as_int() if "group" in node.attributes else 1), scale


def _fixed(node: ir.Node) -> bool:
    return node.inputs[2] is None or constant(node.inputs[2]) is not None


def _dense(weight: np.ndarray, count: int) -> np.ndarray:
    """The weights of a grouped convolution with its zero blocks written out; the packer leaves them out again."""
    if count == 1:
        return weight
    rows, columns = len(weight) // count, weight.shape[1]
    wide = np.zeros((len(weight), columns * count, *weight.shape[2:]), np.int8)
    for index in range(count):
        at = slice(index * rows, (index + 1) * rows)
        wide[at, index * columns : (index + 1) * columns] = weight[at]
    return wide


def _geometry(node: ir.Node) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int]]:
    def ints(name: str, default: list[int]) -> list[int]:
        return [int(v) for v in node.attributes[name].as_ints()] if name in node.attributes else default

    stride, pads, dilation = ints("strides", [1, 1]), ints("pads", [0] * 4), ints("dilations", [1, 1])
    return (stride[0], stride[1]), (pads[0], pads[1], pads[2], pads[3]), (dilation[0], dilation[1])
