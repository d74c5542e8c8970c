"""Layers as local functions: the numbers stay, every runtime takes the file, and a call can become a plugin node."""

from __future__ import annotations

from pathlib import Path

import int8_nets
import numpy as np
import onnx
import onnx_ir as ir
import plugin_kit
import pytest
from igate_edge.kernels import plugin
from igate_edge.kernels.grouped_conv import reference
from igate_edge.kernels.pack import BlockLayout
from kernel_cases import needs_compiler

from igate_edge.compiler import calibrate, functions, lint, quantize
from igate_edge.compiler.half import half
from igate_edge.engines import emulate, tensorrt_rtx
from igate_edge.engines.emulate_graph import ConvStep, program
from igate_edge.errors import InputError, UnavailableError

each_net = pytest.mark.parametrize("name", sorted(int8_nets.NETS))


def _int8(name: str) -> tuple[ir.Model, np.ndarray]:
    model, net = int8_nets.NETS[name]()
    return quantize.quantize(model, calibrate.calibrate(model, net.frames(4)), "trt"), net.frames(1, seed=5)[0]


def _bytes(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def _same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(array.tobytes() == other[key].tobytes() for key, array in one.items())


@each_net
def test_the_numbers_stay_with_and_without_inlining(name: str) -> None:
    source, image = _int8(name)
    before = _bytes(source)
    made = functions.with_functions(source)
    assert _bytes(source) == before, "the model given is left as it was"
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    flat = functions.inlined(made)
    assert made.functions
    assert not flat.functions
    assert "igate" not in flat.graph.opset_imports
    whole, called, opened = (int8_nets.run(model, image, optimise=False) for model in (source, made, flat))
    assert _same(whole, called)
    assert _same(called, opened)
    assert _same(int8_nets.run(made, image), int8_nets.run(flat, image)), "optimised, the two forms are the same file"
    assert [v.name for v in made.graph.outputs] == [v.name for v in source.graph.outputs]
    assert made.metadata_props == source.metadata_props


@each_net
def test_every_layer_that_the_kernels_take_is_a_call(name: str) -> None:
    source, _ = _int8(name)
    made = functions.with_functions(source)
    steps = [step for step in program(source).steps if isinstance(step, ConvStep)]
    convolutions = {node.name for node in source.graph if node.op_type == "Conv"}
    wanted = {step.name: step for step in steps if not step.layer.floats and step.name in convolutions}
    found = functions.layers(made)
    assert found.keys() == wanted.keys()
    for call, layer in found.items():
        for field in ("weight", "scale", "bias"):
            assert np.array_equal(getattr(layer, field), getattr(wanted[call].layer, field)), (call, field)
        rest = ("size", "stride", "pads", "dilation", "low", "high", "skip_scale", "floats")
        assert [getattr(layer, key) for key in rest] == [getattr(wanted[call].layer, key) for key in rest]
    for node in made.graph:
        if node.domain == functions.DOMAIN:
            kinds = [value.dtype for value in (*node.inputs, *node.outputs) if value.const_value is None]
            assert set(kinds) == {ir.DataType.INT8}


@each_net
def test_names_are_unique_over_all_functions(name: str) -> None:
    """TensorRT knows functions without their domain, and refuses a layer's name that another function has."""
    made = functions.with_functions(_int8(name)[0])
    inner = [node.name for function in made.functions.values() for node in function]
    names = [*inner, *(node.name for node in made.graph), *(function.name for function in made.functions.values())]
    assert len(set(names)) == len(names)
    assert not any(onnx.defs.has(function.name) for function in made.functions.values())
    assert plugin.NAME not in names


@each_net
def test_half_and_lint_take_calls(name: str) -> None:
    made = functions.with_functions(_int8(name)[0])
    halved = half(made)
    onnx.checker.check_model(ir.to_proto(halved), full_check=True)
    assert halved.functions.keys() == made.functions.keys()
    assert [one for one in lint.lint(halved) if one.severity == "error"] == []
    other = functions.with_functions(half(_int8(name)[0]))
    onnx.checker.check_model(ir.to_proto(other), full_check=True)
    assert other.functions


def test_a_value_that_is_read_in_float_too_stays_out() -> None:
    source, _ = _int8("resnet")
    quantised = {node.inputs[0].name: node.inputs[0] for node in source.graph if node.op_type == "QuantizeLinear"}
    steps = [step for step in program(source).steps if isinstance(step, ConvStep) and step.y in quantised]
    name, value = steps[0].name, quantised[steps[0].y]
    assert name in functions.layers(functions.with_functions(source))
    extra = ir.Value(name="extra", type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
    source.graph.append(ir.node("Sigmoid", [value], outputs=[extra], name="extra"))
    source.graph.outputs.append(extra)
    assert name not in functions.layers(functions.with_functions(source))


def test_calls_twice_are_calls_once() -> None:
    made = functions.with_functions(_int8("mobile")[0])
    again = functions.with_functions(functions.inlined(made))
    assert len(again.functions) == len(made.functions)


def _attributes(node: ir.Node) -> dict[str, object]:
    values = {}
    for name, item in node.attributes.items():
        values[name] = item.as_string() if item.type == ir.AttributeType.STRING else list(item.as_ints())
    return values


@each_net
def test_a_dropped_call_is_a_plugin_node(name: str) -> None:
    made = functions.with_functions(_int8(name)[0])
    before, known = _bytes(made), functions.layers(made)
    dropped = functions.drop_functions(made, plugin_kit.image())
    assert _bytes(made) == before
    assert not dropped.functions
    nodes = [node for node in dropped.graph if node.op_type == "Kernel"]
    assert [node.name for node in nodes] == list(known)
    for node in nodes:
        fields = _attributes(node)
        assert (fields.pop("plugin_version"), fields.pop("plugin_namespace")) == ("1", "igate")
        assert node.domain == "igate"
        layer = known[node.name]
        assert fields["output"][:8] == [0, 0, 0, 1, -1, len(layer.weight), 0, 1]
        shapes = [int(side) for value in node.inputs for side in (4, *value.shape)]
        assert fields["inputs"] == shapes
        assert len(node.inputs) == (1 if layer.skip_scale is None else 2)
    used = {value.name for node in dropped.graph for value in node.inputs if value is not None}
    assert set(dropped.graph.initializers) <= used, "weights of dropped layers are in their tables alone"
    assert {one.code for one in lint.lint(dropped) if one.severity == "error"} == {"IG107"}


def test_a_layer_that_adds_its_own_input_reads_it_twice() -> None:
    net = int8_nets.Net()
    x = net.conv("image", 16)
    model = net.model(net.conv(net.add(net.conv(x, 16, act=None), x), 4, name="depth", act=None))
    source = quantize.quantize(model, calibrate.calibrate(model, net.frames(4)), "trt")
    made = functions.with_functions(source)
    adds = [name for name, layer in functions.layers(made).items() if layer.skip_scale is not None]
    assert len(adds) == 1
    (node,) = [n for n in functions.drop_functions(made, plugin_kit.image(), only=adds).graph if n.op_type == "Kernel"]
    assert len(node.inputs) == 2
    assert node.inputs[0] is node.inputs[1]
    image = net.frames(1, seed=5)[0]
    assert _same(int8_nets.run(source, image, optimise=False), int8_nets.run(made, image, optimise=False))


def test_layers_are_dropped_by_name() -> None:
    made = functions.with_functions(_int8("resnet")[0])
    chosen = list(functions.layers(made))[1:3]
    dropped = functions.drop_functions(made, plugin_kit.image(), only=chosen)
    assert [node.name for node in dropped.graph if node.op_type == "Kernel"] == chosen
    assert len(dropped.functions) == len(made.functions) - 2
    assert list(functions.layers(functions.drop_functions(made, plugin_kit.image(), only=[]))) == list(
        functions.layers(made)
    )
    flat = functions.inlined(dropped)
    assert [node.name for node in flat.graph if node.op_type == "Kernel"] == chosen
    assert flat.graph.opset_imports["igate"] == 1
    with pytest.raises(InputError, match="no such layer to drop: nope; there are"):
        functions.drop_functions(made, plugin_kit.image(), only=["nope"])
    with pytest.raises(InputError, match="the image lacks a kernel"):
        functions.drop_functions(made, plugin.Image(b"", {}))


@needs_compiler
@pytest.mark.parametrize("name", ["gated", "mobile"])
def test_the_plugin_gives_what_the_graph_gives(name: str, tmp_path: Path) -> None:
    """Layers of a net, launched by the plugin from their nodes' attributes on the stored values of the graph."""
    source, image = _int8(name)
    made = functions.with_functions(source)
    dropped, known = functions.drop_functions(made, plugin_kit.image()), functions.layers(made)
    flat = functions.inlined(made)
    stored = emulate.Session(flat, kernels=False).trace(image)[1]
    names = {node.outputs[0].name: node.inputs[0].name for node in flat.graph if node.op_type == "QuantizeLinear"}
    nodes = [node for node in dropped.graph if node.op_type == "Kernel"]
    for node in (*nodes[:3], nodes[-1]):
        attributes = {key: value for key, value in _attributes(node).items() if not key.startswith("plugin_")}
        fields, files = plugin_kit.write_fields(tmp_path / "fields", attributes), []  # type: ignore[arg-type]
        arrays = [stored[names[value.name]] for value in (*node.outputs, *node.inputs)]
        layouts = [BlockLayout(*array.shape, group=plugin.GROUP) for array in arrays]
        for index, (layout, array) in enumerate(zip(layouts, arrays, strict=True)):
            files.append(tmp_path / str(index))
            files[-1].write_bytes(layout.pack(array if index else np.zeros_like(array)).tobytes())
        said = plugin_kit.run("", (), fields, "enqueue", *files, cuda=plugin_kit.driver_for())
        assert said[-1] == "enqueue 0 waited 0", said
        got = layouts[0].unpack(np.frombuffer(files[0].read_bytes(), np.int8))
        assert got.tobytes() == arrays[0].tobytes() == reference(known[node.name], *arrays[1:]).tobytes()


@pytest.mark.parametrize("name", ["gated", "resnet"])
@pytest.mark.parametrize("precision", ["int8", "half"])
def test_tensorrt_rtx_accepts_the_calls(name: str, precision: str) -> None:
    """Accepted and built, which says nothing of TensorRT on a Jetson."""
    try:
        tensorrt_rtx.probe()
    except UnavailableError as error:
        pytest.skip(f"NOT TESTED: TensorRT-RTX's acceptance of local functions, {error}")
    made = functions.with_functions(_int8(name)[0])
    said = tensorrt_rtx.check(_bytes(half(made) if precision == "half" else made))
    assert said.accepted, str(said)
    again = tensorrt_rtx.check(_bytes(functions.inlined(half(made) if precision == "half" else made)))
    assert again.layers == said.layers, "the parser inlines the calls to the same network"


@pytest.mark.parametrize("wrong", [None, b"model", 5])
def test_what_is_no_model_is_refused(wrong: object) -> None:
    for call in (functions.with_functions, functions.inlined, functions.layers):
        with pytest.raises(InputError, match="not a model"):
            call(wrong)  # type: ignore[arg-type]
    image = plugin.Image(b"", {})
    with pytest.raises(InputError, match="not a model"):
        functions.drop_functions(wrong, image)  # type: ignore[arg-type]


def test_what_is_no_image_or_no_list_is_refused() -> None:
    model = ir.from_proto(onnx.ModelProto())
    with pytest.raises(InputError, match="not a kernel image"):
        functions.drop_functions(model, b"cubin")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a list of layers"):
        functions.drop_functions(model, plugin.Image(b"", {}), "conv1")
