"""What ONNX Runtime's optimised graph of a quantised network runs, told from the float graph without quantising it.

Read off ONNX Runtime 1.32 for the `ort` dialect: convolutions and what stands between them work on bytes, channels
last; a Clip follows wherever a stored tensor is never negative; a last convolution is a Transpose, ConvInteger, Cast,
Mul and Add; whatever has no integer kernel stands between a DequantizeLinear and a QuantizeLinear.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from . import groups
from .groups import activations, constant, name_of, site
from .lanes import dims_or_none

#: Operators that touch only what they make.
CUTS = frozenset({"Slice", "Split", "Gather"})


@dataclass(frozen=True)
class Conv:
    """Geometry of a convolution. path: "unsigned", "signed" (its input may be negative), "output" (INT32 result)."""

    kernel: tuple[int, int]
    stride: int
    out_hw: tuple[int, int]
    cin: int
    cout: int
    groups: int
    path: str


@dataclass(frozen=True)
class Step:
    """One operator that runs: `name` of the source node, operator, elements read and made, geometry of a Conv."""

    name: str
    op: str
    elements_in: int
    elements_out: int
    conv: Conv | None = None


def steps(model: ir.Model, precision: str = "int8") -> list[Step]:
    """The operators that run for a static float graph, in the order of its nodes; precision "int8" or "float".

    TensorRT runs either precision as "float" (by its documented fusions; not run on a device).
    """
    source = model if _is_typed(model) else groups.typed(model)
    return (_Int8(source) if precision == "int8" else _Float(source)).run()


def _is_typed(model: ir.Model) -> bool:
    """Whether every value has its dtype and static shape, as after `graph.load`: inference over weights takes long."""
    made = [value for node in model.graph for value in node.outputs if value.name]
    return all(value.dtype is not None and value.shape is not None and value.shape.is_static() for value in made)


class _Float:
    """A float session: a convolution takes a sum that alone reads it, and an activation, with it."""

    def __init__(self, source: ir.Model) -> None:
        self.source = source
        self.splits = _splits(source)
        self.found: list[Step] = []

    def run(self) -> list[Step]:
        for node in self.source.graph:
            if node in self.splits:
                size = self.splits[node]
                if size:
                    self.add(node, "Split", size, size)
            elif node.op_type not in ("Constant", "Identity") and not self.within(node):
                self.node(node)
        return self.found

    def within(self, node: ir.Node) -> bool:
        """Whether a node runs within the convolution, or the sum of one, that it reads."""
        makers = [value.producer() for value in node.inputs if value is not None and len(list(value.uses())) == 1]
        if node.op_type in ("Relu", "Clip", "Sigmoid"):
            return any(maker is not None and _takes_activation(maker) for maker in makers)
        return node.op_type == "Add" and any(maker is not None and maker.op_type == "Conv" for maker in makers)

    def node(self, node: ir.Node) -> None:
        self.add(node, node.op_type, conv=_float_conv(node))

    def add(
        self, node: ir.Node, op: str, read: int | None = None, made: int | None = None, conv: Conv | None = None
    ) -> None:
        made = sum(map(_size, node.outputs)) if made is None else made
        if read is None:
            read = made if op in CUTS else sum(map(_size, activations(node.inputs)))
        self.found.append(Step(node.name or name_of(node.outputs[0]), op, read, made, conv))


class _Int8(_Float):
    """An INT8 session of the quantiser's `ort` dialect: the same decisions as `quantize`, without ranges."""

    def __init__(self, source: ir.Model) -> None:
        super().__init__(source)
        self.plan = groups.plan(source, "ort")
        self.group = groups.join(source)
        positive = groups.nonnegative(source)
        self.signed = {self.group[name] for name in self.plan.quantised if name not in positive}
        self.folded: set[ir.Node] = set()
        self.floats: set[str] = set()

    def run(self) -> list[Step]:
        for value in self.source.graph.inputs:
            if value.name in self.plan.quantised:
                size = _size(value)
                self.found += [Step(name_of(value), op, size, size) for op in ("QuantizeLinear", "Transpose")]
        super().run()
        for value in self.source.graph.outputs:
            if self.stored(value) and (maker := value.producer()) is not None:
                self.dequantise(maker, value)
        return self.found

    def within(self, node: ir.Node) -> bool:
        """The activation of a convolution: it is the convolution's own in either precision."""
        maker = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        return maker is not None and maker.op_type == "Conv" and groups.folded(maker) is node

    def stored(self, value: ir.Value) -> bool:
        return value.name in self.plan.quantised

    def is_signed(self, value: ir.Value) -> bool:
        return self.group.get(name_of(value), "") in self.signed

    def node(self, node: ir.Node) -> None:
        out = site(node)
        if node in self.folded:
            return
        if groups.weighted(node) and name_of(out) in self.plan.float_out and node.op_type == "Conv":
            self.last_conv(node)
        elif groups.weighted(node) and all(map(self.stored, (*activations(node.inputs), out))):
            self.weighted(node)
        elif self.on_bytes(node):
            self.bytes(node)
        else:
            self.in_float(node)

    def weighted(self, node: ir.Node) -> None:
        path = "signed" if self.is_signed(activations(node.inputs)[0]) else "unsigned"
        if node.op_type == "Conv":
            self.add(node, "QLinearConv", conv=_geometry(node, path))
        else:
            self.add(node, "QGemm", conv=_gemm(node, path))
        self.clip(node)

    def clip(self, node: ir.Node) -> None:
        """The activation becomes the bounds of the stored bytes; a signed tensor uses all 256."""
        act, out = groups.folded(node), site(node)
        if act is not None:
            self.folded.add(act)
        if act is not None or not self.is_signed(out):
            self.add(node, "Clip", _size(out), _size(out))

    def last_conv(self, node: ir.Node) -> None:
        size, act = _size(node.outputs[0]), groups.folded(node)
        self.add(node, "Transpose", made=_size(node.inputs[0]))
        self.add(node, "ConvInteger", conv=_geometry(node, "output"))
        for op in ("Cast", "Mul", "Add"):
            self.add(node, op, size, size)
        if act is not None:
            self.folded.add(act)
            self.add(act, act.op_type)

    def on_bytes(self, node: ir.Node) -> bool:
        data = activations(node.inputs)
        if not data or not all(map(self.stored, (*data, site(node)))):
            return False
        if groups.moves(node):
            return len({self.group[name_of(value)] for value in (*data, *node.outputs)}) == 1
        return node.op_type in ("GlobalAveragePool", "AveragePool") or name_of(node.outputs[0]) in self.plan.sums

    def bytes(self, node: ir.Node) -> None:
        if groups.moves(node):
            # Single channels are taken with channels first: there and back again.
            around = ["Transpose"] if node.op_type == "Gather" and len(_dims(node.outputs[0])) == 4 else []
            for op in around:
                self.add(node, op, made=_size(node.inputs[0]))
            self.add(node, node.op_type)
            for op in around:
                self.add(node, op, made=_size(node.outputs[0]))
            return
        self.add(node, f"QLinear{node.op_type}")
        self.clip(node)

    def in_float(self, node: ir.Node) -> None:
        for value in activations(node.inputs):
            if self.stored(value) and name_of(value) not in self.floats:
                self.floats.add(name_of(value))
                self.dequantise(node, value)
        self.add(node, node.op_type, conv=_float_conv(node))
        for value in node.outputs:
            if self.stored(value):
                self.add(node, "QuantizeLinear", _size(value), _size(value))
                if not self.is_signed(value):
                    self.add(node, "Clip", _size(value), _size(value))

    def dequantise(self, node: ir.Node, value: ir.Value) -> None:
        self.add(node, "DequantizeLinear", _size(value), _size(value))


def _takes_activation(maker: ir.Node) -> bool:
    """A convolution, or a sum that runs within one."""
    if maker.op_type != "Add":
        return maker.op_type == "Conv"
    makers = [value.producer() for value in maker.inputs if value is not None and len(list(value.uses())) == 1]
    return any(node is not None and node.op_type == "Conv" for node in makers)


def _splits(model: ir.Model) -> dict[ir.Node, int]:
    """Slices of one tensor that together are all of it run as one Split: the first with the tensor's size, others 0."""
    cuts: dict[ir.Value, list[tuple[int, int, ir.Node]]] = {}
    for node in model.graph:
        if node.op_type == "Slice" and node.inputs[0] is not None and (ends := _cut(node)) is not None:
            cuts.setdefault(node.inputs[0], []).append((*ends, node))
    found: dict[ir.Node, int] = {}
    for value, parts in cuts.items():
        parts.sort(key=lambda part: part[:2])
        bounds = [part[:2] for part in parts]
        whole = bounds[0][0] == 0 and bounds[-1][1] == _dims(value)[1]
        if len(parts) > 1 and whole and all(a[1] == b[0] for a, b in zip(bounds, bounds[1:], strict=False)):
            found |= {node: 0 for _, _, node in parts} | {parts[0][2]: _size(value)}
    return found


def _cut(node: ir.Node) -> tuple[int, int] | None:
    """First and last + 1 channel of a Slice over channels alone."""
    arrays = [constant(value) for value in node.inputs[1:]]
    if len(arrays) < 3 or any(array is None or array.size != 1 for array in arrays):
        return None
    start, end, axis, *step = (int(array.ravel()[0]) for array in arrays if array is not None)
    count = _dims(node.inputs[0])[1] if len(_dims(node.inputs[0])) > 1 else 0
    return (start, min(end, count)) if axis == 1 and step in ([], [1]) and start >= 0 and end > 0 else None


def _dims(value: ir.Value | None) -> tuple[int, ...]:
    return dims_or_none(value) if value is not None else ()


def _size(value: ir.Value | None) -> int:
    return math.prod(_dims(value)) if value is not None else 0


def _geometry(node: ir.Node, path: str) -> Conv:
    """A convolution's geometry; one over one axis counts as one over two."""
    weight, out = _dims(node.inputs[1]), _dims(node.outputs[0])
    count = node.attributes["group"].as_int() if "group" in node.attributes else 1
    strides = node.attributes["strides"].as_ints() if "strides" in node.attributes else [1]
    kernel, hw = (*weight[2:], 1)[:2], (*out[2:], 1)[:2]
    return Conv((kernel[0], kernel[1]), max(strides), (hw[0], hw[1]), weight[1] * count, weight[0], count, path)


def _gemm(node: ir.Node, path: str) -> Conv:
    reads, made = _dims(node.inputs[0]), _dims(node.outputs[0])
    return Conv((1, 1), 1, (math.prod(made[:-1]), 1), reads[-1], made[-1], 1, path)


def _float_conv(node: ir.Node) -> Conv | None:
    return _geometry(node, "float") if node.op_type == "Conv" else None
