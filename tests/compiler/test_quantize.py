"""Q/DQ in both dialects: exact against integers, equal to each other, bounded scales, TensorRT placement."""

from __future__ import annotations

import int8_nets
import numpy as np
import onnx_ir as ir
import pytest

from igate_edge.compiler import calibrate, groups, quantize
from igate_edge.errors import DataError, GraphError, InputError


def _both(model: ir.Model, frames: list[np.ndarray]) -> tuple[ir.Model, ir.Model]:
    ranges = calibrate.calibrate(model, frames)
    return quantize.quantize(model, ranges, "ort"), quantize.quantize(model, ranges, "trt")


def _ops(model: ir.Model, op: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op]


def _conv_reference(x: np.ndarray, w: np.ndarray, group: int) -> np.ndarray:
    """Integer convolution, stride 1, same size; x int64 [C,H,W], w int64 [M,C/group,k,k]."""
    k, height, width = w.shape[2], *x.shape[1:]
    padded = np.pad(x, ((0, 0), (k // 2,) * 2, (k // 2,) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), (1, 2)).reshape(group, -1, height, width, k, k)
    return np.einsum("gchwij,gmcij->gmhw", windows, w.reshape(group, -1, *w.shape[1:])).reshape(-1, height, width)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("pattern", ["all 127", "all -127", "random"])
@pytest.mark.parametrize(
    ("channels", "out", "k", "group"),
    [(16, 8, 3, 1), (33, 17, 1, 1), (16, 16, 3, 16), (16, 8, 3, 4), (1, 8, 3, 1), (3, 5, 3, 1)],
)
def test_ort_form_is_exact_at_extreme_weights(signed, pattern, channels, out, k, group) -> None:
    """Largest inputs times largest weights: what saturates in INT16 without VNNI must not (cases Q11)."""
    net = int8_nets.Net(channels=channels, size=6)
    rng = np.random.default_rng(5)
    weight = {"all 127": np.full, "all -127": lambda shape, top: np.full(shape, -top), "random": None}[pattern]
    shape = (out, channels // group, k, k)
    steps = weight(shape, 127) if weight else rng.choice([-127, 127], shape)
    unit = np.eye(channels)[..., None, None]
    first = net.conv("image", channels, k=1, act=None if signed else "Relu", weight=unit, bias=np.zeros(channels))
    second = net.conv(first, out, k=k, group=group, act=None, weight=steps, bias=np.zeros(out))
    model = net.model(net.conv(second, 2, k=1, act=None))
    image = np.full(net.shape, 127.0, np.float32)
    image[..., ::2] = rng.choice([-127.0, 127.0], image[..., ::2].shape)
    quantised = quantize.quantize(model, calibrate.calibrate(model, [image]), "ort")
    x = image[0].astype(np.int64)
    exact = _conv_reference(x if signed else x.clip(0), steps.astype(np.int64), group)
    expected = np.rint(exact / (np.abs(exact).max() / 127.0))
    for optimise in (True, False):
        found = int8_nets.stored(quantised, image, optimise)
        assert np.array_equal(found[first][0], x if signed else x.clip(0))
        assert np.abs(found[second][0] - expected).max() <= 1
        assert (found[second][0] != expected).mean() < 0.02  # a tie of the rounding, never a saturated sum


@pytest.mark.parametrize("name", sorted(int8_nets.NETS))
@pytest.mark.parametrize("optimise", [True, False])
def test_both_dialects_agree_layer_by_layer_within_one_step(name: str, optimise: bool) -> None:
    model, net = int8_nets.NETS[name]()
    ort, trt = _both(model, net.frames(8))
    image = net.frames(1, seed=9)[0]
    steps = int8_nets.stored(ort, image, optimise)
    found = int8_nets.layer_steps(trt, steps, image)
    assert len(found) >= 5
    unfused = _operands_of_sums(model)
    for tensor, values in found.items():
        difference = np.abs(values - steps[tensor])
        saturated = np.zeros(difference.shape, bool)
        for operand in unfused.get(tensor, ()):
            clipped = np.abs(steps[operand]) >= 127
            saturated |= clipped if clipped.shape == saturated.shape else clipped.any()
        assert difference[~saturated].max(initial=0) <= 1, tensor
        if tensor not in unfused:
            # Ties of the rounding. ONNX Runtime 1.22 and 1.23 resize bytes instead of floats, and truncate.
            resized = optimise and any(node.op_type == "Resize" for node in _makers(trt, tensor))
            assert difference.mean() < (0.2 if resized else 0.01), tensor


def _makers(trt: ir.Model, tensor: str) -> set[ir.Node]:
    """The nodes between the stored tensors before `tensor` and itself."""
    todo = [node for node in trt.graph if node.outputs[0].name == f"{tensor}_q"]
    seen: set[ir.Node] = set()
    while todo:
        node = todo.pop()
        seen.add(node)
        makers = [value.producer() for value in node.inputs if value is not None]
        todo.extend(maker for maker in makers if maker is not None and maker.op_type != "QuantizeLinear")
    return seen


def _operands_of_sums(model: ir.Model) -> dict[str, list[str]]:
    """INT8 sums, with the operands that `ort` stores and `trt` does not: they are rounded once more."""
    source = groups.typed(model)
    found = {}
    ort, trt = groups.plan(source, "ort"), groups.plan(source, "trt")
    behind: dict[str, list[str]] = {}
    for node in source.graph:
        data = groups.activations(node.inputs)
        extra = [name for value in data for name in behind.get(value.name, ())]
        if node.op_type in ("Add", "Sigmoid", "Mul"):
            extra += [value.name for value in data if value.name in ort.quantised - trt.quantised]
        if extra and not groups.weighted(node):
            for value in (*node.outputs, groups.site(node)):
                found[value.name] = extra
                if value.name not in trt.quantised:
                    behind[value.name] = extra
    return found


@pytest.mark.parametrize("name", sorted(int8_nets.NETS))
@pytest.mark.parametrize("dialect", ["ort", "trt"])
def test_int8_answers_stay_near_float(name: str, dialect: str) -> None:
    model, net = int8_nets.NETS[name]()
    quantised = quantize.quantize(model, calibrate.calibrate(model, net.frames(16)), dialect)
    for image in net.frames(2, seed=3):
        exact, found = int8_nets.run(model, image), int8_nets.run(quantised, image, optimise=dialect == "ort")
        assert list(found) == list(exact)
        for output, values in exact.items():
            error = np.sqrt(((found[output] - values) ** 2).mean()) / values.std()
            assert error < 0.15, (output, error)  # random weights and noise frames: no trained net is this sensitive


def test_one_layer_error_is_rounding() -> None:
    """A single 1x1 convolution, all ranges exact: error at most half a step of the input times the weights."""
    net = int8_nets.Net(channels=1, size=8)
    model = net.model(net.conv("image", 1, k=1, act=None, weight=[[[[3.0]]]], bias=[0.5]))
    image = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 1, 8, 8)
    for quantised in _both(model, [image]):
        (found,) = int8_nets.run(quantised, image).values()
        assert np.abs(found - (3 * image + 0.5)).max() <= 3 * 0.5 / 127 + 1e-5


def test_scales_of_dead_and_nearly_dead_channels() -> None:
    weight = np.zeros((3, 2, 1, 1), np.float32)
    weight[0] = 0.5
    weight[2] = 1e-7
    scales = quantize.weight_scales(weight, 0, np.array([0.0, 0.0, 50.0]), 0.01)
    assert scales.dtype == np.float32
    assert scales[0] == np.float32(0.5 / 127)
    assert scales[1] == scales.min() or scales[1] == np.float32(1e-7 / 127)
    assert 50.0 / (0.01 * float(scales[2])) < 2**28
    assert np.isfinite(quantize.weight_scales(np.zeros((2, 1, 1, 1)), 0, None, 1.0)).all()
    assert (quantize.weight_scales(np.zeros((2, 1, 1, 1)), 0, None, 1.0) > 0).all()


@pytest.mark.parametrize("dialect", ["ort", "trt"])
def test_zero_weights_and_dead_relus_give_no_nan(dialect: str) -> None:
    net = int8_nets.Net(channels=2, size=4)
    weight = np.zeros((4, 2, 3, 3))
    weight[0] = 0.3
    weight[2] = 1e-7
    x = net.conv("image", 4, weight=weight, bias=[0.1, 0.0, 50.0, -1.0])
    dead = net.conv("image", 4, weight=weight * 0, bias=[-1.0] * 4)
    model = net.model(net.conv(net.conv(x, 3), 2, act=None), net.conv(dead, 2, act=None))
    quantised = quantize.quantize(model, calibrate.calibrate(model, net.frames(4)), dialect)
    for node in (*_ops(quantised, "QuantizeLinear"), *_ops(quantised, "DequantizeLinear")):
        scale = node.inputs[1].const_value.numpy()
        assert np.isfinite(scale).all()
        assert (scale > 0).all()
    image = net.frames(1, seed=7)[0]
    exact, found = int8_nets.run(model, image), int8_nets.run(quantised, image)
    for output, values in exact.items():
        assert np.isfinite(found[output]).all()
        assert np.abs(found[output] - values).max() < 0.05 * np.abs(values).max()


def test_trt_form_is_symmetric_int8_with_float_bias() -> None:
    model, net = int8_nets.resnet()
    _, trt = _both(model, net.frames(4))
    assert trt.graph.opset_imports[""] == 18
    for node in (*_ops(trt, "QuantizeLinear"), *_ops(trt, "DequantizeLinear")):
        zero = node.inputs[2].const_value.numpy()
        assert zero.dtype == np.int8
        assert not zero.any()
    for conv in _ops(trt, "Conv"):
        weight = conv.inputs[1].producer()
        stored = weight.inputs[0].const_value.numpy()
        assert (stored.dtype, weight.attributes["axis"].as_int()) == (np.int8, 0)
        assert np.abs(stored.astype(int)).max() == 127
        assert weight.inputs[1].const_value.numpy().shape == (stored.shape[0],)
        assert conv.inputs[2].const_value.numpy().dtype == np.float32
        assert conv.inputs[0].producer().op_type == "DequantizeLinear"
        for use in conv.outputs[0].uses():
            assert use.node.op_type in ("Relu", "Add", "QuantizeLinear")


def test_residual_sums_have_one_pair_on_the_skip_and_one_quantise_behind() -> None:
    net = int8_nets.Net(channels=4, size=8)
    x = net.conv("image", 8)
    x = net.block(net.block(x, 8), 16, stride=2)
    model = net.model(net.conv(x, 2, act=None))
    ort, trt = _both(model, net.frames(4))
    sums = _ops(trt, "Add")
    assert len(sums) == 2
    for node in sums:
        assert sorted(value.producer().op_type for value in node.inputs) == ["Conv", "DequantizeLinear"]
        (relu,) = (use.node for use in node.outputs[0].uses())
        assert relu.op_type == "Relu"
        assert [use.node.op_type for use in relu.outputs[0].uses()] == ["QuantizeLinear"]
    for node in [item for item in _ops(ort, "Add") if not item.inputs[1].is_initializer()]:
        assert [value.producer().op_type for value in node.inputs] == ["DequantizeLinear"] * 2


@pytest.mark.parametrize("dialect", ["ort", "trt"])
def test_branches_of_one_tensor_share_one_pair(dialect: str) -> None:
    net = int8_nets.Net(channels=3, size=8)
    x = net.conv("image", 8)
    heads = [net.conv(net.conv(x, 4), 1, act=None) for _ in range(4)]
    model = net.model(*heads)
    quantised = quantize.quantize(model, calibrate.calibrate(model, net.frames(4)), dialect)
    pairs = [node for node in _ops(quantised, "DequantizeLinear") if node.outputs[0].name == f"{x}_dq"]
    assert len(pairs) == 1
    assert len(list(pairs[0].outputs[0].uses())) == 4


@pytest.mark.parametrize("dialect", ["ort", "trt"])
def test_concat_has_one_scale_and_a_single_operand_concat_vanishes(dialect: str) -> None:
    net = int8_nets.Net(channels=3, size=8)
    parts = [net.conv("image", 4), net.conv("image", 8, weight=net.rng.normal(size=(8, 3, 3, 3)) * 2)]
    lone = net.add_node("Concat", [net.concat(*parts)], 12, axis=1)
    model = net.model(net.conv(lone, 2, act=None), net.conv(parts[0], 2, act=None))
    quantised = quantize.quantize(model, calibrate.calibrate(model, net.frames(4)), dialect)
    (concat,) = _ops(quantised, "Concat")
    scales = {
        float(node.inputs[1].const_value.numpy())
        for node in _ops(quantised, "QuantizeLinear")
        if node.inputs[0].name != "image"
    }
    assert len(scales) == 1
    if dialect == "ort":
        assert {value.producer().op_type for value in concat.inputs} == {"Clip"}
    else:
        assert [use.node.op_type for use in concat.outputs[0].uses()] == ["QuantizeLinear"]


def test_relu6_saturates_at_six_in_both_dialects() -> None:
    net = int8_nets.Net(channels=1, size=4)
    x = net.conv("image", 1, k=1, act="Relu6", weight=[[[[1.0]]]], bias=[0.0], name="clipped")
    model = net.model(net.conv(x, 1, k=1, act=None, weight=[[[[1.0]]]], bias=[0.0]))
    image = np.linspace(-3, 12, 16, dtype=np.float32).reshape(1, 1, 4, 4)
    ort, trt = _both(model, [image])
    assert [node.op_type for node in trt.graph if node.op_type in ("Clip", "Relu")] == ["Relu"]
    for quantised in (ort, trt):
        (found,) = int8_nets.run(quantised, image, optimise=False).values()
        assert found.max() == pytest.approx(6.0, abs=1e-5)
        assert found.min() == 0.0
    wide = quantize.quantize(model, {**calibrate.calibrate(model, [image]), "clipped": (0.0, 12.0)}, "trt")
    assert [node.op_type for node in wide.graph if node.op_type in ("Clip", "Relu")] == ["Clip"]


def test_an_output_that_is_read_again_keeps_its_name() -> None:
    net = int8_nets.Net(channels=3, size=8)
    x = net.conv("image", 4, name="features")
    model = net.model(x, net.conv(x, 2, act=None, name="task"))
    image = net.frames(1)[0]
    for quantised in _both(model, [image]):
        found, exact = int8_nets.run(quantised, image), int8_nets.run(model, image)
        assert list(found) == ["features", "task"]
        assert np.abs(found["features"] - exact["features"]).max() <= 0.05 * exact["features"].max()


def test_metadata_and_argument_stay_and_output_is_the_same_twice() -> None:
    net = int8_nets.Net(channels=3, size=8)
    model = net.model(
        net.conv("image", 2, act=None), preprocess={"height": 8, "width": 8, "mean": [0] * 3, "std": [9] * 3}
    )
    frames = [frame.clip(0, 0.1) for frame in net.frames(2)]
    before = ir.to_proto(model).SerializeToString()
    ranges = calibrate.calibrate(model, frames)
    for dialect in ("ort", "trt"):
        once, twice = (quantize.quantize(model, ranges, dialect) for _ in range(2))
        assert once.metadata_props["igate"] == model.metadata_props["igate"]
        assert ir.to_proto(once).SerializeToString(deterministic=True) == ir.to_proto(twice).SerializeToString(
            deterministic=True
        )
    assert ir.to_proto(model).SerializeToString() == before


def test_wrong_use_is_named() -> None:
    net = int8_nets.Net(channels=3, size=8)
    x = net.conv("image", 4, name="features")
    model = net.model(net.conv(x, 2, act=None))
    ranges = calibrate.calibrate(model, net.frames(1))
    with pytest.raises(InputError, match="known: ort, trt"):
        quantize.quantize(model, ranges, "openvino")
    with pytest.raises(GraphError, match="no range for features"):
        quantize.quantize(model, {"image": (0.0, 1.0)}, "trt")
    for bad in ((0.0, np.inf), (np.nan, 1.0), (1.0, -1.0)):
        with pytest.raises(DataError, match="range is unusable"):
            quantize.quantize(model, {**ranges, "features": bad}, "trt")
    with pytest.raises(GraphError, match="opset 16"):
        quantize.quantize(net.model(opset=16), ranges, "trt")


def test_a_negative_constant_makes_a_tensor_signed() -> None:
    net = int8_nets.Net(channels=3, size=8)
    x = net.conv("image", 4)
    down = net.add_node("Mul", [x, net.const(np.float32(-1.0))], 4)
    up = net.add_node("Mul", [x, net.const(np.float32(2.0))], 4)
    known = groups.nonnegative(groups.typed(net.model(net.conv(down, 2, act=None), net.conv(up, 2, act=None))))
    assert {x, up} <= known
    assert down not in known
    model = net.model(net.conv(down, 2, act=None))
    ort, _ = _both(model, net.frames(2))
    assert int8_nets.stored(ort, net.frames(1)[0])[down].min() < -100
