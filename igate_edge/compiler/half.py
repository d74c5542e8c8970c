"""FP16 for what is not INT8, written into the file as Casts: a strongly typed TensorRT network takes types as they are.

What TensorRT fuses into INT8 kernels keeps its FP32 values, scales and biases, since no such value is stored: a
convolution between its DequantizeLinear and QuantizeLinear, and what only moves or adds such values on the way. The
rest computes in FP16: linear Resize, activations other than Relu, products, and a whole model without Q/DQ. Network
inputs and outputs stay FP32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..errors import InputError
from . import groups
from .groups import constant

#: Inputs that ONNX has as FP32 whatever the data's type is, by operator.
_FIXED = {"Resize": (1, 2), "Upsample": (1,)}
#: The largest number that FP16 holds.
LARGEST = float(np.finfo(np.float16).max)


def half(model: ir.Model) -> ir.Model:
    """`model` with everything that is not INT8 in FP16, as a new model; inputs, outputs, metadata and opset stay.

    Takes the float form or the `trt` form of `compiler.quantize`. A node with a constant beyond FP16's range stays
    in FP32. Raises InputError (no model), GraphError where the graph contradicts itself.
    """
    check_model(model)
    copy = groups.typed(model)
    kept = _kept(copy)
    work = _Halving(copy)
    for node in list(copy.graph):
        if node not in kept:
            work.lower(node)
    for node in list(copy.graph):
        work.feed(node, node in kept)
    work.give_outputs()
    return copy


def check_model(model: object) -> None:
    """Raise InputError for whatever is no onnx_ir.Model."""
    if not isinstance(model, ir.Model):
        raise InputError("not a model", f"{type(model).__name__} given", "pass an onnx_ir.Model")


def _kept(model: ir.Model) -> set[ir.Node]:
    """Nodes that stay: Q/DQ, what fuses with them, what makes no float value or holds one beyond FP16."""
    kept: set[ir.Node] = set()
    for node in reversed(list(model.graph)):
        if not _computes(node) or _goes_to_int8(node, kept):
            kept.add(node)
    # Forwards: a layer is INT8 only if what it reads is.
    for node in model.graph:
        if node not in kept:
            follows = _maker(node.inputs[0]) in kept and groups.bounds(node) is not None
            if _dequantised_layer(node) or (follows and _sole(node) and _dequantised_layer(_maker(node.inputs[0]))):
                kept.add(node)
        elif _computes(node) and not _dequantised_layer(node) and not _reads_int8(node, kept):
            kept.discard(node)
    return kept


def _computes(node: ir.Node) -> bool:
    """True for a node that makes FP32 values which could as well be FP16."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Cast") or node.outputs[0].dtype != ir.DataType.FLOAT:
        return False
    arrays = [constant(value) for value in node.inputs]
    return all(
        array is None or array.dtype != np.float32 or np.abs(array).max(initial=0) <= LARGEST for array in arrays
    )


def _goes_to_int8(node: ir.Node, kept: set[ir.Node]) -> bool:
    """True when every reader is a QuantizeLinear or a fusing node that is itself read so, and the node fuses."""
    fuses = groups.moves(node) or groups.bounds(node) is not None or node.op_type == "Add" or _dequantised_layer(node)
    uses = list(node.outputs[0].uses())
    if not fuses or not uses or node.outputs[0].is_graph_output():
        return False
    return all(use.node.op_type == "QuantizeLinear" or (use.node in kept and _computes(use.node)) for use in uses)


def _dequantised_layer(node: ir.Node | None) -> bool:
    if node is None or node.op_type not in ("Conv", "Gemm", "MatMul", "ConvTranspose"):
        return False
    return all(_is_dequantise(_maker(value)) for value in node.inputs[:2])


def _reads_int8(node: ir.Node, kept: set[ir.Node]) -> bool:
    makers = [_maker(value) for value in groups.activations(node.inputs)]
    return bool(makers) and all(maker is not None and (_is_dequantise(maker) or maker in kept) for maker in makers)


def _is_dequantise(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "DequantizeLinear"


def _maker(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _sole(node: ir.Node) -> bool:
    return node.inputs[0] is not None and len(list(node.inputs[0].uses())) == 1


class _Halving:
    """Rewrites a graph in place: which values are FP16 by now, and the Casts made so far."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.halves: set[ir.Value] = set()
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        named = [*self.graph.inputs, *self.graph.initializers.values()]
        self.taken = {value.name for value in (*named, *(v for node in self.graph for v in node.outputs))}

    def lower(self, node: ir.Node) -> None:
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT:
                value.dtype = ir.DataType.FLOAT16
                self.halves.add(value)

    def feed(self, node: ir.Node, keep: bool) -> None:
        """Give a node its inputs in the type that it computes in."""
        fixed = () if keep else _FIXED.get(node.op_type, ())
        for index, value in enumerate(node.inputs):
            if value is None or index in fixed:
                continue
            if keep and value in self.halves:
                node.replace_input_with(index, self._cast(value, ir.DataType.FLOAT))
            elif not keep and value.dtype == ir.DataType.FLOAT:
                node.replace_input_with(index, self._cast(value, ir.DataType.FLOAT16))

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        if (value, to) not in self.casts:
            array = constant(value)
            name = self._free(f"{value.name}_{'half' if to == ir.DataType.FLOAT16 else 'float'}")
            self.casts[value, to] = self._convert(value, to, name) if array is None else self._constant(array, name)
        return self.casts[value, to]

    def _free(self, name: str) -> str:
        """`name`, or the next one that the graph does not have: two values of one name would become one."""
        number, found = 2, name
        while found in self.taken:
            number, found = number + 1, f"{name}{number}"
        self.taken.add(found)
        return found

    def _constant(self, array: np.ndarray, name: str) -> ir.Value:
        tensor = ir.tensor(array.astype(np.float16), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.initializers[name] = value
        return value

    def _convert(self, value: ir.Value, to: ir.DataType, name: str) -> ir.Value:
        made = ir.Value(name=name, type=ir.TensorType(to), shape=value.shape)
        cast = ir.node("Cast", [value], {"to": to}, outputs=[made], name=f"{name}.Cast")
        maker = value.producer()
        if maker is None:
            self.graph.insert_before(self.graph[0], cast)
        else:
            self.graph.insert_after(maker, cast)
        return made

    def give_outputs(self) -> None:
        """Outputs keep their names and FP32: the FP16 value before the Cast takes another name."""
        for index, value in enumerate(list(self.graph.outputs)):
            if value not in self.halves:
                continue
            name = value.name
            cast = self.casts.get((value, ir.DataType.FLOAT))
            value.name = self._free(f"{name}_half")
            made = cast if cast is not None else self._convert(value, ir.DataType.FLOAT, self._free(f"{name}_float"))
            made.name = name
            self.graph.outputs[index] = made
