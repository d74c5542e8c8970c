"""Each lint code on the smallest graph that shows it; our files are clean, ONNX Runtime's quantiser's are not."""

from __future__ import annotations

import int8_nets
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from igate_edge.compiler import calibrate, lint, quantize
from igate_edge.errors import InputError

ZERO = np.int8(0)


def _model(nodes, initializers=None, shape=(1, 16, 4, 4), opset=18, domains=(), functions=()) -> ir.Model:
    inits = [numpy_helper.from_array(np.asarray(array), name) for name, array in (initializers or {}).items()]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)
    out = [onnx.ValueInfoProto(name=nodes[-1].output[0])]
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)]
    graph = helper.make_graph(nodes, "g", [image], out, inits)
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions))


def _pair(x="image", scale=0.1, zero=ZERO, tag="a", **attributes):
    """Nodes and initializers of one Q/DQ pair; the result is `<tag>_dq`."""
    inits = {f"{tag}_s": np.asarray(scale, np.float32), f"{tag}_z": np.asarray(zero)}
    quantise = helper.make_node(
        "QuantizeLinear", [x, f"{tag}_s", f"{tag}_z"], [f"{tag}_q"], name=f"{tag}_Q", **attributes
    )
    back = helper.make_node(
        "DequantizeLinear", [f"{tag}_q", f"{tag}_s", f"{tag}_z"], [f"{tag}_dq"], name=f"{tag}_DQ", **attributes
    )
    return [quantise, back], inits


def _conv(data="a_dq", channels=16, tag="c", weight=None, scale=None):
    """A convolution 16 -> channels with stored INT8 weights, result `<tag>`."""
    steps = np.full((channels, 16, 1, 1), 127, np.int8) if weight is None else weight
    inits = {
        f"{tag}_w": steps,
        f"{tag}_ws": np.full(channels, 0.01, np.float32) if scale is None else np.asarray(scale, np.float32),
        f"{tag}_wz": np.zeros(channels, steps.dtype),
    }
    back = helper.make_node(
        "DequantizeLinear", [f"{tag}_w", f"{tag}_ws", f"{tag}_wz"], [f"{tag}_wd"], name=f"{tag}_W", axis=0
    )
    return [back, helper.make_node("Conv", [data, f"{tag}_wd"], [tag], name=f"{tag}_conv")], inits


def _codes(model: ir.Model, dialect: str = "trt") -> dict[str, str]:
    return {finding.code: finding.severity for finding in lint.lint(model, dialect)}


def _join(*parts):
    nodes, inits = [], {}
    for part_nodes, part_inits in parts:
        nodes += part_nodes
        inits |= part_inits
    return nodes, inits


def test_a_good_graph_is_clean() -> None:
    assert lint.lint(_model(*_join(_pair(), _conv()))) == []


@pytest.mark.parametrize(
    ("pair", "code"),
    [
        ({"zero": np.int8(3)}, "IG101"),
        ({"zero": np.uint8(0)}, "IG102"),
        ({"zero": np.uint8(128)}, "IG101"),
        ({"scale": 0.0}, "IG103"),
        ({"scale": -0.1}, "IG103"),
        ({"scale": np.nan}, "IG103"),
        ({"scale": np.inf}, "IG103"),
        ({"scale": np.full(16, 0.1), "zero": np.zeros(16, np.int8), "axis": 1}, "IG104"),
    ],
)
def test_grid_of_an_activation(pair: dict, code: str) -> None:
    findings = lint.lint(_model(*_join(_pair(**pair), _conv())))
    assert code in {finding.code for finding in findings}
    first = next(finding for finding in findings if finding.code == code)
    assert (first.severity, first.node) == ("error", "a_Q")
    assert first.message
    assert first.fix
    assert lint.CODES[code] in str(first)


def test_a_quantise_without_zero_point_is_uint8() -> None:
    nodes, inits = _join(_pair(), _conv())
    del nodes[0].input[2]
    assert "IG102" in _codes(_model(nodes, inits))


def test_a_scale_made_at_run_time() -> None:
    nodes, inits = _join(_pair(), _conv())
    nodes.insert(0, helper.make_node("ReduceMax", ["image"], ["a_s2"], keepdims=0))
    nodes[1].input[1] = "a_s2"
    assert _codes(_model(nodes, inits))["IG117"] == "error"


def test_int32_bias_and_other_types() -> None:
    nodes, inits = _join(_pair(), _conv())
    inits |= {"b": np.ones(16, np.int32), "bs": np.full(16, 0.1, np.float32)}
    nodes.insert(2, helper.make_node("DequantizeLinear", ["b", "bs"], ["bd"], axis=0))
    nodes[-1].input.append("bd")
    assert _codes(_model(nodes, inits)) == {"IG106": "error"}
    nodes, inits = _join(_pair(), _conv())
    inits["c_w"], inits["c_wz"] = inits["c_w"].astype(np.int16), np.zeros(16, np.int16)
    assert _codes(_model(nodes, inits)) == {"IG115": "error"}


@pytest.mark.parametrize(
    ("op", "domain", "code"),
    [
        ("ConvInteger", "", "IG105"),
        ("QLinearConv", "", "IG105"),
        ("DynamicQuantizeLinear", "", "IG105"),
        ("Unique", "", "IG107"),
    ]
    + [("Swish", "made.up", "IG107"), ("NoSuchOp", "", "IG107")],
)
def test_operators(op: str, domain: str, code: str) -> None:
    node = helper.make_node(op, ["image"], ["y"], domain=domain)
    assert _codes(_model([node], domains=[domain] if domain else [])) == {code: "error"}


def test_a_local_function_is_known() -> None:
    body = [helper.make_node("Relu", ["x"], ["y"])]
    function = helper.make_function("igate", "Block", ["x"], ["y"], body, [helper.make_opsetid("", 18)])
    node = helper.make_node("Block", ["image"], ["y"], domain="igate")
    assert _codes(_model([node], domains=["igate"], functions=[function])) == {}
    assert "IG107" in _codes(_model([node], domains=["igate"]))


def test_gather_and_ragged_channels_are_slow() -> None:
    gather = [helper.make_node("Gather", ["image", "i"], ["g"], axis=1)], {"i": np.arange(16)[::-1].copy()}
    assert _codes(_model(*_join(gather, _pair("g"), _conv()))) == {"IG108": "warning"}
    tail = [helper.make_node("Relu", ["c"], ["r"])], {}
    assert _codes(_model(*_join(_pair(), _conv(channels=17), tail))) == {"IG109": "warning"}
    assert _codes(_model(*_join(_pair(), _conv(channels=17)))) == {}  # the answer's width is the task's


def test_concat_scales() -> None:
    def graph(scale: float) -> ir.Model:
        concat = [helper.make_node("Concat", ["a_dq", "b_dq"], ["y"], axis=1)], {}
        return _model(*_join(_pair(), _pair(tag="b", scale=scale, x="r"), concat))

    def with_relu(model: ir.Model) -> ir.Model:
        proto = ir.to_proto(model)
        proto.graph.node.insert(0, helper.make_node("Relu", ["image"], ["r"]))
        return ir.from_proto(proto)

    assert _codes(with_relu(graph(0.2))) == {"IG110": "warning"}
    assert _codes(with_relu(graph(0.1))) == {}


@pytest.mark.parametrize(
    ("skip", "expected"), [("a_dq", {}), ("d", {"IG111": "warning"}), ("image", {"IG111": "warning"})]
)
def test_adds(skip: str, expected: dict) -> None:
    add = [helper.make_node("Add", ["c", skip], ["s"])], {}
    nodes, inits = _join(_pair(), _conv(), _conv(tag="d"), add, _pair("s", tag="e"))
    assert _codes(_model(nodes, inits)) == expected


def test_shapes_opsets_and_external_data(tmp_path) -> None:
    good = _join(_pair(), _conv())
    assert _codes(_model(*good, shape=("n", 16, 4, 4))) == {"IG112": "error"}
    for opset, expected in ((16, {"IG113": "error"}), (17, {}), (19, {}), (20, {"IG113": "error"})):
        assert _codes(_model(*good, opset=opset)) == expected
    proto = ir.to_proto(_model(*good))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert set(_codes(ir.load(tmp_path / "m.onnx"))) == {"IG118"}


def test_weight_scales_that_do_not_fit_their_channel() -> None:
    weight = np.full((16, 16, 1, 1), 127, np.int8)
    weight[3] = 0
    scale = np.full(16, 0.01)
    scale[3] = 1.0  # what ONNX Runtime's quantiser writes for an all-zero channel
    findings = lint.lint(_model(*_join(_pair(), _conv(weight=weight, scale=scale))))
    assert [(finding.code, finding.severity) for finding in findings] == [("IG114", "warning")]
    assert "channel 3 uses 0 of 127 steps at scale 1" in findings[0].message
    scale[3] = 0.01
    assert _codes(_model(*_join(_pair(), _conv(weight=weight, scale=scale)))) == {}
    weight[5] = 2
    assert _codes(_model(*_join(_pair(), _conv(weight=weight, scale=scale)))) == {"IG114": "warning"}


def test_convolutions_in_float() -> None:
    findings = lint.lint(_model(*_join(_conv(data="image"))))
    assert [(finding.code, finding.message) for finding in findings] == [("IG116", "no DequantizeLinear on data")]
    nodes, inits = _join(
        _pair(), ([helper.make_node("Conv", ["a_dq", "w"], ["c"])], {"w": np.ones((16, 16, 1, 1), np.float32)})
    )
    assert [finding.message for finding in lint.lint(_model(nodes, inits))] == ["no DequantizeLinear on weight"]


def test_mixed_float_types() -> None:
    nodes = [
        helper.make_node("Cast", ["image"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Add", ["image", "h"], ["y"]),
    ]
    assert _codes(_model(nodes)) == {"IG119": "error"}


def test_pairs_in_the_wrong_place() -> None:
    relu = [helper.make_node("Relu", ["b_dq"], ["r"])], {}
    assert _codes(_model(*_join(_pair(), _conv(), _pair("c", tag="b"), relu))) == {"IG120": "warning"}
    twice = _join(_pair(), _pair(tag="b"), _conv(), _conv("b_dq", tag="d"))
    assert _codes(_model(*twice)) == {"IG121": "warning"}


def test_the_onnxruntime_dialect_has_its_own_traps() -> None:
    def graph(zero, weights=np.int8, clip: int | None = None) -> ir.Model:
        nodes, inits = _join(_pair(zero=zero), _conv(weight=np.full((16, 16, 1, 1), 127, weights)))
        if clip is not None:
            inits |= {"lo": np.uint8(0), "hi": np.uint8(clip)}
            nodes.insert(1, helper.make_node("Clip", ["a_q", "lo", "hi"], ["a_c"]))
            nodes[2].input[0] = "a_c"
        return _model(nodes, inits)

    assert _codes(graph(np.int8(0)), "ort") == {"IG130": "warning"}
    assert _codes(graph(np.uint8(0)), "ort") == {"IG131": "error"}
    assert _codes(graph(np.uint8(128)), "ort") == {"IG131": "error"}
    assert _codes(graph(np.uint8(0), clip=127), "ort") == {}
    assert _codes(graph(np.uint8(0), clip=200), "ort") == {"IG131": "error"}
    assert _codes(graph(np.uint8(128), weights=np.uint8), "ort") == {}


@pytest.mark.parametrize("name", sorted(int8_nets.NETS))
def test_our_own_files_have_no_errors(name: str) -> None:
    model, net = int8_nets.NETS[name]()
    ranges = calibrate.calibrate(model, net.frames(4))
    slow = {"IG108", "IG109"}  # these small nets gather and have ragged channels on purpose
    for dialect in ("ort", "trt"):
        assert set(_codes(quantize.quantize(model, ranges, dialect), dialect)) <= slow
    crossed = _codes(quantize.quantize(model, ranges, "ort"), "trt")
    assert {"IG101", "IG102"} <= set(crossed)


def test_the_default_quantiser_of_onnxruntime_is_refused(tmp_path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self, frames) -> None:
            self.frames = iter(frames)

        def get_next(self):
            frame = next(self.frames, None)
            return None if frame is None else {"image": frame}

    net = int8_nets.Net(size=8)
    weight = net.rng.normal(size=(16, 3, 3, 3))
    weight[1] = 0.0
    model = net.model(net.conv(net.conv("image", 16, weight=weight), 4, act=None))
    onnx.save(ir.to_proto(model), tmp_path / "float.onnx")
    source, target = str(tmp_path / "float.onnx"), str(tmp_path / "int8.onnx")
    quantize_static(source, target, Reader(net.frames(4)), quant_format=QuantFormat.QDQ, per_channel=True)
    found = _codes(ir.load(target))
    assert found["IG101"] == "error"  # asymmetric activations
    assert found["IG106"] == "error"  # INT32 bias behind DequantizeLinear
    assert "IG114" in found  # scale 1.0 for the zero channel
    assert any(finding.severity == "error" for finding in lint.lint(ir.load(target)))


def test_unknown_dialect() -> None:
    with pytest.raises(InputError, match="known: ort, trt"):
        lint.lint(_model(*_join(_pair(), _conv())), "openvino")
