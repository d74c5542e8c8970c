"""Layers that a kernel of ours could run, as ONNX local functions: one file for every runtime, with or without it.

with_functions   each INT8 convolution with what follows it becomes a call of a function whose body is the same Q/DQ
                 graph; ONNX Runtime and TensorRT inline it, and nothing changes
drop_functions   calls become nodes of the TensorRT plugin igate::Kernel (kernels/plugin.py); the rest stays as it was
inlined          calls become their bodies again

A call reads and makes INT8 tensors, since a plugin stands between a QuantizeLinear and a DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from igate_edge.kernels import plugin
from igate_edge.kernels.grouped_conv import ConvLayer, GroupedConvPlan

from ..engines.emulate_graph import ConvStep, Program, program
from ..errors import InputError
from . import groups
from .groups import constant, name_of
from .half import check_model

DOMAIN = plugin.NAMESPACE
#: Functions are a part of ONNX since this version of its format.
IR_VERSION = 8


def with_functions(model: ir.Model) -> ir.Model:
    """`model`, the `trt` form of `compiler.quantize` (or of `half` after it), with each candidate layer as a call.

    A call's name is its convolution's; inputs are the stored tensors (x, then the skip if there is one), then
    constants. Where the layer's result is quantised only behind operators that move values, it is quantised at once, by
    the same scale: the numbers stay, bit for bit. Raises GraphError where the graph contradicts itself.
    """
    check_model(model)
    named = groups.typed(model)
    taken: set[str] = set()
    for index, node in enumerate(named.graph):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}.{index}.igate"
        taken.add(node.name)
    found = program(named)
    work, version = found.model, max(model.ir_version, IR_VERSION)
    calls = [call for step in found.steps if isinstance(step, ConvStep) and (call := _call(step, found)) is not None]
    for index, (step, nodes) in enumerate(calls):
        _replace(work, f"GroupedConv_{index}", step, nodes)
    work.ir_version = version
    if calls:
        work.graph.opset_imports[DOMAIN] = 1
    passes.RemoveUnusedNodesPass()(work)
    return work


def inlined(model: ir.Model) -> ir.Model:
    """`model` with every call replaced by its function's body, as a new model without functions."""
    import onnx.inliner

    check_model(model)
    proto = onnx.inliner.inline_local_functions(ir.to_proto(model))
    flat = ir.from_proto(proto)
    if not any(node.domain == DOMAIN for node in flat.graph):
        flat.graph.opset_imports.pop(DOMAIN, None)
    return flat


def layers(model: ir.Model) -> dict[str, ConvLayer]:
    """The layer that each call stands for, by the call's name, in graph order."""
    flat = inlined(model)
    made = {step.y: step.layer for step in program(flat).steps if isinstance(step, ConvStep)}
    floats = {
        name_of(node.outputs[0]): node.inputs[0].name or ""
        for node in flat.graph
        if node.op_type == "QuantizeLinear" and node.inputs[0] is not None
    }
    return {node.name or "": made[floats[name_of(node.outputs[0])]] for node in _calls(model)}


def drop_functions(model: ir.Model, image: plugin.Image, only: Collection[str] | None = None) -> ir.Model:
    """`model` with its calls (those named in `only`, default all) as nodes of igate::Kernel, as a new model.

    The node keeps the call's name, its stored tensors and its output; the layer is packed into the attributes, together
    with `image`. Lint and `half` come before. Raises InputError for a name that no call has, or an image that lacks the
    kernel.
    """
    check_model(model)
    if not isinstance(image, plugin.Image):
        raise InputError("not a kernel image", f"{type(image).__name__} given", "pass kernels.plugin.Image.built()")
    if isinstance(only, str):
        raise InputError("`only` is a list of layers", f"{only!r:.60} given", "pass ['name']")
    copy, known = ir.from_proto(ir.to_proto(model)), layers(model)
    unknown = sorted(set(only or ()) - known.keys())
    if unknown:
        evidence = f"{', '.join(unknown[:3])}; there are {len(known)} calls"
        raise InputError("there is no such layer to drop", evidence, "use the names that `layers` gives")
    for node in _calls(copy):
        if only is not None and node.name not in only:
            continue
        fields = plugin.from_plan(GroupedConvPlan.from_layer(known[node.name or ""], group=plugin.GROUP), image)
        about = {"plugin_version": plugin.VERSION, "plugin_namespace": plugin.NAMESPACE, **fields.attributes()}
        data = [value for value in node.inputs if constant(value) is None]
        data *= len(fields.inputs) // len(data)  # a layer that adds its own input reads it twice
        made = ir.Value(name=node.outputs[0].name, type=node.outputs[0].type, shape=node.outputs[0].shape)
        dropped = ir.node(plugin.NAME, data, about, domain=DOMAIN, outputs=[made], name=node.name)
        ir.convenience.replace_nodes_and_values(copy.graph, node, [node], [dropped], node.outputs, [made])
    used = {(node.domain, node.op_type, node.overload) for node in copy.graph}
    for key in [key for key in copy.functions if key not in used]:
        del copy.functions[key]
    passes.RemoveUnusedNodesPass()(copy)
    return copy


def _calls(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if (node.domain, node.op_type, node.overload) in model.functions]


def _call(step: ConvStep, found: Program) -> tuple[ConvStep, list[ir.Node]] | None:
    """The nodes of a layer from Conv to QuantizeLinear, or None where it is no candidate.

    The QuantizeLinear is put there if only moves stand before the one that the graph has.
    """
    nodes = {node.name: node for node in found.model.graph}
    chain = [nodes[name] for name in step.nodes]
    if step.layer.floats or chain[0].op_type != "Conv":
        return None
    made, quantise = chain[-1].outputs[0], list[ir.Node]()
    for use in made.uses():
        if use.node.op_type == "QuantizeLinear":
            quantise.append(use.node)
        elif not groups.moves(use.node) or found.scales.get(name_of(use.node.outputs[0])) != found.scales[step.y]:
            return None  # some reader wants the float values
    if len(quantise) > 1 or made.is_graph_output():
        return None
    _store(found.model, made, found.scales[step.y], quantise)
    return step, [*chain, *quantise]


def _store(model: ir.Model, made: ir.Value, scale: np.float32, quantise: list[ir.Node]) -> None:
    """Quantise `made` where it is made: all its readers get the stored values, in float."""
    others = [(use.node, use.idx) for use in made.uses() if use.node not in quantise]
    if not others:
        return
    name, maker = name_of(made), made.producer()
    assert maker is not None
    if not quantise:
        grid = [_constant(model, f"{name}_scale.igate", np.array(scale)), _constant(model, "zero.igate", np.int8(0))]
        stored = ir.Value(name=f"{name}_q.igate", type=ir.TensorType(ir.DataType.INT8), shape=made.shape)
        quantise.append(ir.node("QuantizeLinear", [made, *grid], outputs=[stored], name=f"{name}_q.igate"))
        model.graph.insert_after(maker, quantise[0])
    back = ir.Value(name=f"{name}_dq.igate", type=made.type, shape=made.shape)
    inputs = [quantise[0].outputs[0], *quantise[0].inputs[1:]]
    load = ir.node("DequantizeLinear", inputs, outputs=[back], name=f"{name}_dq.igate")
    model.graph.insert_after(quantise[0], load)
    for node, index in others:
        node.replace_input_with(index, back)


def _constant(model: ir.Model, name: str, array: np.ndarray | np.int8) -> ir.Value:
    if name not in model.graph.initializers:
        tensor = ir.tensor(np.asarray(array), name=name)
        kind = ir.TensorType(tensor.dtype)
        value = ir.Value(name=name, type=kind, shape=ir.Shape(np.shape(array)), const_value=tensor)
        model.graph.initializers[name] = value
    return model.graph.initializers[name]


def _replace(model: ir.Model, name: str, step: ConvStep, nodes: list[ir.Node]) -> None:
    """The nodes of a layer, and the DequantizeLinear before them, as one function and one call of it."""
    inside = {value for node in nodes for value in node.outputs}
    loads = [maker for node in nodes for value in node.inputs if (maker := _load(value, inside)) is not None]
    body = [*dict.fromkeys(loads), *nodes]
    inside |= {value for node in body for value in node.outputs}
    given = dict.fromkeys(value for node in body for value in node.inputs if value is not None and value not in inside)
    data = [value for value in given if constant(value) is None]
    inputs = [*data, *(value for value in given if constant(value) is not None)]
    last = nodes[-1].outputs[0]
    function = _function(name, step.name, inputs, body, last, model.graph.opset_imports.get("", 18))
    model.functions[function.identifier()] = function
    made = ir.Value(name=last.name, type=last.type, shape=last.shape)
    call = ir.node(name, inputs, domain=DOMAIN, outputs=[made], name=step.name)
    ir.convenience.replace_nodes_and_values(model.graph, nodes[-1], nodes, [call], [last], [made])


def _load(value: ir.Value | None, inside: set[ir.Value]) -> ir.Node | None:
    maker = value.producer() if value is not None and value not in inside else None
    return maker if maker is not None and maker.op_type == "DequantizeLinear" else None


def _function(
    name: str, call: str, inputs: Iterable[ir.Value], body: Iterable[ir.Node], last: ir.Value, opset: int
) -> ir.Function:
    """A function of copies of the nodes. TensorRT's parser wants unique names of functions and of what is in them."""
    copies = {value: ir.Value(name=f"{call}/in{index}") for index, value in enumerate(inputs)}
    ends, nodes = list(copies.values()), []
    for node in body:
        made = [ir.Value(name=f"{call}/{value.name}") for value in node.outputs]
        copies.update(zip(node.outputs, made, strict=True))
        given = [copies[value] if value is not None else None for value in node.inputs]
        nodes.append(ir.node(node.op_type, given, dict(node.attributes), outputs=made, name=f"{call}/{node.name}"))
    graph = ir.Graph(ends, [copies[last]], nodes=nodes, opset_imports={"": opset}, name=name)
    return ir.Function(DOMAIN, name, graph=graph, attributes=[])
