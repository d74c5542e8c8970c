"""Small float ONNX nets for the INT8 tests, made of numbers from a seed; no torch."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper


class Net:
    """Collects nodes; every method returns the name of the tensor it makes."""

    def __init__(self, channels: int = 3, size: int = 16, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.channels = {"image": channels}
        self.shape = [1, channels, size, size]

    def const(self, array, name: str = "") -> str:
        name = name or f"const{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def add_node(self, op: str, inputs, channels: int, name: str = "", **attributes) -> str:
        out = name or f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [out], name=out, **attributes))
        self.channels[out] = channels
        return out

    def conv(self, x, out, k=3, stride=1, group=1, act="Relu", name="", weight=None, bias=None, pads=None) -> str:
        fan = self.channels[x] // group
        if weight is None:
            weight = self.rng.normal(size=(out, fan, k, k)) * np.sqrt(2.0 / (fan * k * k))
        bias = self.rng.normal(size=out) * 0.1 if bias is None else bias
        inputs = [x, self.const(np.asarray(weight, np.float32)), self.const(np.asarray(bias, np.float32))]
        pads = pads or [k // 2] * 4
        attributes = {"kernel_shape": [k, k], "strides": [stride] * 2, "pads": pads, "group": group}
        y = self.add_node("Conv", inputs, out, name="" if act else name, **attributes)
        return self.act(y, act, name) if act else y

    def act(self, x, op="Relu", name="") -> str:
        if op == "Relu6":
            ends = [self.const(np.float32(0)), self.const(np.float32(6))]
            return self.add_node("Clip", [x, *ends], self.channels[x], name)
        return self.add_node(op, [x], self.channels[x], name)

    def add(self, a, b, act="Relu") -> str:
        y = self.add_node("Add", [a, b], self.channels[a])
        return self.act(y, act) if act else y

    def concat(self, *xs) -> str:
        return self.add_node("Concat", list(xs), sum(self.channels[x] for x in xs), axis=1)

    def slice(self, x, start, stop) -> str:
        ends = [self.const(np.array([value], np.int64)) for value in (start, stop, 1)]
        return self.add_node("Slice", [x, *ends], stop - start)

    def resize(self, x, scale=2.0, mode="linear") -> str:
        scales = self.const(np.array([1, 1, scale, scale], np.float32))
        how = "half_pixel" if mode == "linear" else "asymmetric"
        attributes = {"mode": mode, "coordinate_transformation_mode": how, "nearest_mode": "floor"}
        return self.add_node("Resize", [x, "", scales], self.channels[x], **attributes)

    def pool(self, x, op="MaxPool", k=3, stride=2) -> str:
        attributes = {"kernel_shape": [k, k], "strides": [stride] * 2, "pads": [k // 2] * 4}
        return self.add_node(op, [x], self.channels[x], **attributes)

    def classify(self, x, classes, name="label") -> str:
        y = self.add_node("Flatten", [self.add_node("GlobalAveragePool", [x], self.channels[x])], self.channels[x])
        weight = self.const(self.rng.normal(size=(classes, self.channels[x])).astype(np.float32) * 0.3)
        bias = self.const(self.rng.normal(size=classes).astype(np.float32) * 0.1)
        return self.add_node("Gemm", [y, weight, bias], classes, name, transB=1)

    def block(self, x, out, stride=1) -> str:
        """A basic residual block."""
        y = self.conv(self.conv(x, out, stride=stride), out, act=None)
        same = stride == 1 and self.channels[x] == out
        return self.add(y, x if same else self.conv(x, out, k=1, stride=stride, act=None))

    def model(self, *outputs: str, opset: int = 18, preprocess=None) -> ir.Model:
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, self.shape)
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", [image], values, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
        if preprocess is not None:
            helper.set_model_props(model, {"igate": json.dumps({"preprocess": preprocess})})
        model = onnx.shape_inference.infer_shapes(model)
        onnx.checker.check_model(model)
        return ir.from_proto(model)

    def frames(self, count: int = 8, seed: int = 1) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [rng.normal(size=self.shape).astype(np.float32) for _ in range(count)]


def resnet(width: int = 8, size: int = 32, blocks: int = 2) -> tuple[ir.Model, Net]:
    """A ResNet-18 layout with two dense heads and a classifier."""
    net = Net(size=size)
    x = net.pool(net.conv("image", width, stride=2))
    features = []
    for stage in range(4):
        for index in range(blocks):
            x = net.block(x, width << stage, stride=2 if stage and not index else 1)
        features.append(x)
    top = net.conv(features[3], width, k=1)
    merged = net.conv(net.concat(net.resize(top, 8.0), net.conv(features[0], width, k=1)), width)
    dense = [net.conv(merged, 5, k=1, act=None, name="semseg"), net.conv(merged, 1, act=None, name="depth")]
    return net.model(*dense, net.classify(features[3], 4)), net


def gated(width: int = 8, size: int = 16) -> tuple[ir.Model, Net]:
    """Two gated layers of three tasks, not pruned: Where with constant masks, a mix of products and sums."""
    net = Net(size=size)
    psi, phis = net.conv("image", width, stride=2), []
    phis = [psi] * 3
    for _ in range(2):
        wide = [net.conv(x, width) for x in (psi, *phis)]
        masks = net.rng.random((3, 1, width, 1, 1)) < 0.5
        outs = [
            net.add_node("Where", [net.const(mask), phi, wide[0]], width)
            for mask, phi in zip(masks, wide[1:], strict=True)
        ]
        weights = net.rng.dirichlet(np.ones(3), width).T.reshape(3, 1, width, 1, 1).astype(np.float32)
        parts = [net.add_node("Mul", [out, net.const(w)], width) for out, w in zip(outs, weights, strict=True)]
        mix = net.add(net.add(parts[0], parts[1], act=None), parts[2], act=None)
        psi = net.add_node("Where", [net.const(masks.any(0)), mix, wide[0]], width)
        phis = outs
    heads = [net.conv(phi, 2, k=1, act=None, name=f"task{index}") for index, phi in enumerate(phis)]
    return net.model(*heads), net


def run(model: ir.Model, image: np.ndarray, optimise: bool = True, names=None) -> dict[str, np.ndarray]:
    """Run a model in ONNX Runtime; `names` adds intermediate tensors as outputs."""
    import onnxruntime

    proto = ir.to_proto(model)
    known = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names or () if name not in known)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = [value.name for value in session.get_outputs()]
    return dict(zip(outputs, session.run(None, {"image": image}), strict=True))


def stored(model: ir.Model, image: np.ndarray, optimise: bool = True) -> dict[str, np.ndarray]:
    """Signed steps (int64, zero point taken off) of every stored tensor `v_q`, by `v`."""
    zeros = {}
    for node in model.graph:
        if node.op_type in ("DequantizeLinear", "ConvInteger") and node.inputs[0].const_value is None:
            zero = node.inputs[2].const_value.numpy()
            zeros[node.inputs[0].name] = int(zero)
    values = run(model, image, optimise, names=list(zeros))
    return {name.removesuffix("_q"): values[name].astype(np.int64) - zero for name, zero in zeros.items()}


def layer_steps(trt: ir.Model, steps: dict[str, np.ndarray], image: np.ndarray) -> dict[str, np.ndarray]:
    """Each stored tensor of the trt form, computed in float from `steps` alone, so that errors do not add up."""
    found = {}
    for node in trt.graph:
        if node.op_type != "QuantizeLinear":
            continue
        name = node.outputs[0].name.removesuffix("_q")
        proto, feeds = _between(trt, node.outputs[0], steps, image)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found[name] = session.run(None, feeds)[0].astype(np.int64)
    return found


def _between(model: ir.Model, out: ir.Value, steps, image):
    """The part of `model` from the stored tensors before `out` to `out`, and their values."""
    nodes, feeds, todo, seen = [], {}, [out], set()
    while todo:
        value = todo.pop()
        if value is None or value.name in seen or value.is_initializer():
            continue
        seen.add(value.name)
        known = value.name.removesuffix("_q")
        if value is not out and value.name.endswith("_q") and known in steps:
            feeds[value.name] = steps[known].clip(-128, 127).astype(np.int8)
        elif value.producer() is None:
            feeds[value.name] = image
        else:
            nodes.append(value.producer())
            todo.extend(value.producer().inputs)
    order = {node: index for index, node in enumerate(model.graph)}
    protos = [ir.to_proto(node) for node in sorted(nodes, key=order.__getitem__)]
    used = {name for node in protos for name in node.input}
    inits = [
        numpy_helper.from_array(value.const_value.numpy(), name)
        for name, value in model.graph.initializers.items()
        if name in used
    ]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    graph = helper.make_graph(protos, "part", inputs, [onnx.ValueInfoProto(name=out.name)], inits)
    opsets = [helper.make_opsetid(key, version) for key, version in model.graph.opset_imports.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9), feeds


def mobile(width: int = 8, size: int = 16) -> tuple[ir.Model, Net]:
    """Inverted residuals: ReLU6, depthwise convolutions, linear bottlenecks (signed tensors)."""
    net = Net(size=size)
    x = net.conv("image", width, stride=2, act="Relu6")
    x = net.conv(net.conv(x, width, group=width, act="Relu6"), width, k=1, act=None)
    for _ in range(2):
        wide = net.conv(x, 4 * width, k=1, act="Relu6")
        deep = net.conv(wide, 4 * width, group=4 * width, act="Relu6")
        x = net.add(x, net.conv(deep, width, k=1, act=None), act=None)
    return net.model(net.conv(x, 3, k=1, act=None, name="semseg"), net.classify(net.conv(x, 16, k=1), 5)), net


def assorted(size: int = 16) -> tuple[ir.Model, Net]:
    """One of everything: slices, a channel Gather, a mix, poolings, both Resizes, Sigmoid, uneven pads, groups."""
    net = Net(size=size)
    x = net.conv("image", 16, pads=[0, 0, 1, 1], stride=2)
    low, high = net.slice(x, 0, 6), net.slice(x, 6, 16)
    mix = net.conv(net.concat(low, low), 6, k=1, act=None, name="site.mix", bias=np.zeros(6))
    picked = net.add_node("Gather", [high, net.const(np.array([3, 0, 9, 1], np.int64))], 4, axis=1)
    y = net.conv(net.concat(mix, picked, high), 20, group=4)
    gate = net.add_node("Sigmoid", [net.conv(y, 20, k=1, act=None)], 20)
    y = net.add_node("Mul", [y, gate], 20)
    y = net.conv(net.pool(y, "AveragePool"), 12)
    up = net.concat(net.resize(y, mode="nearest"), net.resize(net.pool(y, k=1, stride=1)))
    return net.model(net.conv(net.conv(up, 8), 2, act=None, name="edges"), net.classify(y, 3)), net


NETS = {"resnet": resnet, "gated": gated, "mobile": mobile, "assorted": assorted}
