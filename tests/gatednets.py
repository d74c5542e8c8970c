"""Gated nets written as ONNX by hand, each with its plain twin of the same shared weights; what the compiler tests
prune.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from igate_edge.compiler import graph

TOLERANCE = 1e-5  # of an output's largest magnitude
TASKS = ("a", "b", "c")
SIZE = 8


class Net:
    """Nodes and initializers under construction. Weights depend on their name alone, so that twins get equal ones."""

    def __init__(self, tasks: Sequence[str] = TASKS, channels: int = 3, size: int = SIZE) -> None:
        self.tasks, self.size = tuple(tasks), size
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.sites: list[dict] = []
        self.channels = channels

    def const(self, name: str, array: np.ndarray) -> str:
        self.weights[name] = np.asarray(array)
        return name

    def noise(self, name: str, *shape: int) -> str:
        rng = np.random.default_rng(list(name.encode()))
        fan = max(int(np.prod(shape[1:])), 1)
        return self.const(name, (rng.standard_normal(shape) / np.sqrt(fan)).astype(np.float32))

    def op(self, kind: str, name: str, *inputs: str, outputs: int = 1, **attributes: object) -> str:
        names = [name] if outputs == 1 else [f"{name}.{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name, **attributes))
        return name

    def conv(self, name: str, x: str, cin: int, cout: int, kernel: int = 3, **attributes: object) -> str:
        weight = self.noise(f"{name}.weight", cout, cin // int(attributes.get("group", 1)), kernel, kernel)
        bias = self.noise(f"{name}.bias", cout)
        return self.op("Conv", name, x, weight, bias, kernel_shape=[kernel] * 2, pads=[kernel // 2] * 4, **attributes)

    def site(self, name: str, psi: str, phis: Mapping[str, str], mask: np.ndarray) -> tuple[str, dict[str, str]]:
        """Where per task, then the mix: (next shared map, map per task). mask: bool [T, C]."""
        mask = np.asarray(mask, bool)
        rng = np.random.default_rng(list(name.encode()))
        share = np.exp(rng.standard_normal(mask.shape))
        share = (share / share.sum(0)).astype(np.float32)
        outs, total = {}, ""
        for index, task in enumerate(self.tasks):
            gate = self.const(f"sites.{name}.mask_{task}", mask[index].reshape(1, -1, 1, 1))
            outs[task] = self.op("Where", f"{name}.{task}.where", gate, phis[task], psi)
            weight = self.const(f"sites.{name}.mix_{task}", share[index].reshape(1, -1, 1, 1))
            part = self.op("Mul", f"{name}.{task}.mul", outs[task], weight)
            total = self.op("Add", f"{name}.{task}.add", total, part) if total else part
        opened = {task: "".join("01"[int(bit)] for bit in row) for task, row in zip(self.tasks, mask, strict=True)}
        self.sites.append({"name": name, "channels": mask.shape[1], "granule": 1, "tie": None, "open": opened})
        return total, outs

    def proto(self, outputs: Mapping[str, str], form: str = "gated") -> onnx.ModelProto:
        """`outputs`: task -> value name; an Identity gives it the task's name."""
        for task, value in outputs.items():
            for node in self.nodes:
                node.output[:] = [task if name == value else name for name in node.output]
                node.input[:] = [task if name == value else name for name in node.input]
        shape = [1, self.channels, self.size, self.size]
        made = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(task, TensorProto.FLOAT, None) for task in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        shapes = [[d.dim_value for d in value.type.tensor_type.shape.dim] for value in model.graph.output]
        kinds = ["semseg" if len(shape) == 4 else "multilabel" for shape in shapes]
        tasks = [
            {"name": task, "kind": kind, "channels": shape[1]}
            for task, kind, shape in zip(outputs, kinds, shapes, strict=True)
        ]
        sites = [{**s, "open": {t: bits for t, bits in s["open"].items() if t in outputs}} for s in self.sites]
        about = {
            "schema": 1,
            "form": form,
            "tasks": tasks,
            "preprocess": {"height": self.size, "width": self.size, "mean": [0, 0, 0], "std": [1, 1, 1]},
            "sites": sites,
        }
        entry = model.metadata_props.add()
        entry.key, entry.value = "igate", json.dumps(about)
        return model

    def load(self, outputs: Mapping[str, str], form: str = "gated") -> ir.Model:
        return graph.load(self.proto(outputs, form).SerializeToString())


def run(model: ir.Model, seed: int = 0) -> dict[str, np.ndarray]:
    """All outputs of a model on noise, in float and without graph optimisation."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(graph.dump(model), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(seed)
    feeds = {v.name: rng.standard_normal(v.shape).astype(np.float32) for v in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def difference(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """Largest difference relative to the output's maximum; names and shapes must be the same."""
    assert list(one) == list(other)
    worst = 0.0
    for name, array in one.items():
        assert array.shape == other[name].shape
        scale = float(np.abs(array).max()) or 1.0
        worst = max(worst, float(np.abs(array - other[name]).max()) / scale)
    return worst


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def layout(model: ir.Model) -> list[tuple]:
    """Everything but the numbers: operators, names, shapes."""
    return [
        (node.op_type, node.name, [(v.name, tuple(v.shape)) if v is not None else None for v in node.inputs])
        for node in model.graph
    ]


def convs(model: ir.Model) -> list[tuple[int, ...]]:
    """Weight shapes of all convolutions and matrices, sorted."""
    found = [node for node in model.graph if node.op_type in ("Conv", "Gemm", "MatMul")]
    return sorted(tuple(node.inputs[1].shape) for node in found)


def live(masks: np.ndarray) -> int:
    """Live rows of a gated layer (method.md section 3): sum_t sum_c G_t + C - sum_c prod_t G_t."""
    masks = np.asarray(masks, bool)
    return int(masks.sum() + masks.shape[1] - masks.all(axis=0).sum())


# --- nets: masks {site: bool [T, C]} -> (gated, plain twin) -------------------------------------------------


def _streams(net: Net, gated: bool) -> list[str]:
    return [*net.tasks, "shared"] if gated else ["shared"]


def _heads(net: Net, maps: Mapping[str, str], channels: int) -> dict[str, str]:
    return {task: net.conv(f"head.{task}", maps.get(task, maps["shared"]), channels, 1, 1) for task in net.tasks}


def _select(net: Net, name: str, maps: dict[str, str], masks: Mapping[str, np.ndarray] | None) -> dict[str, str]:
    if masks is None:
        return maps
    mixed, outs = net.site(name, maps["shared"], {task: maps[task] for task in net.tasks}, masks[name])
    return {**outs, "shared": mixed}


def _build(kind: str, masks: Mapping[str, np.ndarray] | None, width: int) -> ir.Model:
    net = Net()
    names = _streams(net, masks is not None)
    maps = dict.fromkeys(names, "image")

    def each(step) -> None:
        for stream in names:
            maps[stream] = step(stream, maps[stream])

    def unit(site: str, cin: int, cout: int, kernel: int = 3, **attributes: object) -> None:
        each(
            lambda s, x: net.op("Relu", f"{site}.{s}.relu", net.conv(f"{site}.{s}", x, cin, cout, kernel, **attributes))
        )
        maps.update(_select(net, site, maps, masks))

    unit("s0", 3, width)
    if kind == "chain":
        each(lambda s, x: net.op("MaxPool", f"pool.{s}", x, kernel_shape=[2, 2], strides=[2, 2]))
        unit("s1", width, width)
        unit("s2", width, width + 2)
        width += 2
    elif kind == "residual":
        for block in ("s1", "s2"):
            skip = dict(maps)
            unit(f"{block}m", width, width)
            each(lambda s, x, b=block: net.op("Add", f"{b}.{s}.sum", net.conv(f"{b}.{s}", x, width, width), skip[s]))  # noqa: B023
            each(lambda s, x, b=block: net.op("Relu", f"{b}.{s}.relu", x))
            maps.update(_select(net, block, maps, masks))
    elif kind == "inverted":  # 1x1 expand, depthwise, linear 1x1 project with a skip
        skip = dict(maps)
        unit("s1", width, 2 * width, 1)
        unit("s2", 2 * width, 2 * width, 3, group=2 * width)
        each(lambda s, x: net.op("Add", f"s3.{s}.sum", net.conv(f"s3.{s}", x, 2 * width, width, 1), skip[s]))
        maps.update(_select(net, "s3", maps, masks))
    elif kind == "grouped":
        unit("s1", width, width, 3, group=2)
        unit("s2", width, width, 3, group=2)
    elif kind == "dense":  # concatenation, as in DenseNet
        for site in ("s1", "s2"):
            before = dict(maps)
            unit(site, width, 4)
            each(lambda s, x, b=before, n=site: net.op("Concat", f"{n}.{s}.cat", b[s], x, axis=1))
            width += 4
    return net.load(_heads(net, maps, width), "plain" if masks is None else "gated")


KINDS = ("chain", "residual", "inverted", "grouped", "dense")


def sites_of(kind: str, width: int) -> dict[str, int]:
    """Channels of every gate site."""
    return {
        "chain": {"s0": width, "s1": width, "s2": width + 2},
        "residual": {"s0": width, "s1m": width, "s1": width, "s2m": width, "s2": width},
        "inverted": {"s0": width, "s1": 2 * width, "s2": 2 * width, "s3": width},
        "grouped": {"s0": width, "s1": width, "s2": width},
        "dense": {"s0": width, "s1": 4, "s2": 4},
    }[kind]


def gated(kind: str, masks: Mapping[str, np.ndarray], width: int = 6) -> ir.Model:
    return _build(kind, masks, width)


def plain(kind: str, width: int = 6) -> ir.Model:
    return _build(kind, None, width)


def constant_masks(kind: str, opened: bool, width: int = 6) -> dict[str, np.ndarray]:
    return {site: np.full((len(TASKS), count), opened) for site, count in sites_of(kind, width).items()}


def random_masks(kind: str, share: float, seed: int, width: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {site: rng.random((len(TASKS), count)) < share for site, count in sites_of(kind, width).items()}


def joint_masks(kind: str, share: float, seed: int, width: int = 6) -> dict[str, np.ndarray]:
    """The same channels for all tasks, the same in all sites of one width."""
    rng = np.random.default_rng(seed)
    stages: dict[int, np.ndarray] = {}
    found = {}
    for site, count in sites_of(kind, width).items():
        found[site] = stages.setdefault(count, np.tile(rng.random((1, count)) < share, (len(TASKS), 1)))
    return found


def cycle() -> ir.Model:
    """Hand-made: a select between a map and a function of itself."""
    net = Net(("a",))
    x = net.op("Relu", "x", net.conv("c0", "image", 3, 6))
    y = net.op("Relu", "y", net.conv("c1", x, 6, 6))
    z = net.op("Relu", "z", net.conv("c2", y, 6, 6))
    mask = net.const("mask", (np.arange(6) % 2 == 0).reshape(1, 6, 1, 1))
    picked = net.op("Where", "w", mask, z, x)
    return net.load({"a": net.conv("end", picked, 6, 1)})
