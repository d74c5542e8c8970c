"""Structure for INT8: which tensors share one scale, which are never negative, and which carry INT8 at all.

Works on any static float ONNX graph; an operator it does not know stays in float between a dequantised input and,
where a convolution reads its result, a quantised output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..errors import GraphError

Range = tuple[float, float]

#: Operators that only move values (or pick the larger one): their inputs and outputs share one scale.
MOVES = frozenset(
    {"Concat", "Slice", "Gather", "MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity"}
    | {"Where", "Pad", "Split", "DepthToSpace", "SpaceToDepth", "Expand"}
)
AVERAGES = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean", "Resize"})
NONNEGATIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp", "Sqrt"})
#: Metadata of convolutions that the compiler adds: their results are sums of versions of one value.
SUM = "igate.sum"
#: A concatenation joins scales up to this ratio of ranges; beyond it an input that others read too keeps its own.
RATIO = 16.0


def typed(model: ir.Model) -> ir.Model:
    """A private copy of `model` with dtypes and shapes; raises GraphError where nodes contradict each other."""
    import onnx

    try:
        return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True))
    except onnx.shape_inference.InferenceError as error:
        raise GraphError(
            "the graph contradicts itself", " ".join(str(error).split())[:300], "export it again"
        ) from error


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer or of a Constant node, else None."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        return node.attributes["value"].as_tensor().numpy()
    return None


def is_activation(value: ir.Value | None) -> bool:
    """True for a float tensor that depends on the network's input."""
    return value is not None and value.dtype == ir.DataType.FLOAT and constant(value) is None


def name_of(value: ir.Value) -> str:
    assert value.name is not None  # every value of a model read from a file has a name
    return value.name


def activations(values: Iterable[ir.Value | None]) -> list[ir.Value]:
    return [value for value in values if value is not None and is_activation(value)]


def moves(node: ir.Node) -> bool:
    """True when the node's float outputs hold only values of its float inputs."""
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "Resize":
        return _mode(node) == "nearest"
    if node.op_type == "MaxPool":
        return len(node.outputs) == 1
    if node.op_type == "Pad" and len(node.inputs) > 2 and node.inputs[2] is not None:
        fill = constant(node.inputs[2])
        return fill is not None and not np.any(fill)
    return node.op_type in MOVES


def _mode(node: ir.Node) -> str:
    return node.attributes["mode"].as_string() if "mode" in node.attributes else "nearest"


def averages(node: ir.Node) -> bool:
    """True for operators whose output lies between the smallest and the largest input."""
    if node.op_type == "Resize":
        return _mode(node) == "linear"
    return node.domain in ("", "ai.onnx") and node.op_type in AVERAGES


def is_sum(node: ir.Node) -> bool:
    """True for the compiler's own convolutions that make sums of versions of one value."""
    return node.op_type == "Conv" and (SUM in node.metadata_props or (node.name or "").endswith(".mix"))


def weighted(node: ir.Node) -> bool:
    """True for Conv and plain Gemm with constant float weights and an input that depends on the image."""
    if node.op_type not in ("Conv", "Gemm") or not is_activation(node.inputs[0]):
        return False
    weight = constant(node.inputs[1])
    if weight is None or weight.dtype != np.float32:
        return False
    if len(node.inputs) > 2 and node.inputs[2] is not None and constant(node.inputs[2]) is None:
        return False
    if node.op_type == "Conv":
        return True
    plain = all(key not in node.attributes or node.attributes[key].as_float() == 1.0 for key in ("alpha", "beta"))
    return plain and not ("transA" in node.attributes and node.attributes["transA"].as_int())


def bounds(node: ir.Node) -> tuple[float, float] | None:
    """(0, upper) of a Relu or of a Clip from 0, else None."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    if node.op_type != "Clip":
        return None
    low, high = ((*(constant(value) for value in node.inputs[1:]), None, None))[:2]
    if low is None or float(low) != 0.0 or (high is None and len(node.inputs) > 2 and node.inputs[2] is not None):
        return None
    return 0.0, float("inf") if high is None else float(high)


def folded(node: ir.Node) -> ir.Node | None:
    """The Relu or Clip(0, ..) that alone reads this Conv, Gemm or Add: its result is the first one to be stored."""
    if node.op_type not in ("Conv", "Gemm", "Add"):
        return None
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output():
        return None
    user = uses[0].node
    return user if bounds(user) is not None and user.inputs[0] is node.outputs[0] else None


def site(node: ir.Node) -> ir.Value:
    """The tensor a node hands on: its first output, or that of the activation folded into it."""
    act = folded(node)
    return (act or node).outputs[0]


def join(model: ir.Model, ranges: Mapping[str, Range] | None = None) -> dict[str, str]:
    """Activation name -> representative of the group it shares one scale with.

    Groups: inputs and outputs of operators that only move values (Concat, Slice, Gather, MaxPool, Reshape, Where,
    nearest Resize, zero Pad) and of the compiler's `.mix` and `.skip` convolutions (convex combinations of maps). With
    `ranges`, a Concat input that is read elsewhere too and is `RATIO` times smaller than the largest one keeps a scale
    of its own (cases Q8).
    """
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for node in model.graph:
        members = activations((*node.inputs, *node.outputs))
        if moves(node):
            if node.op_type == "Concat" and ranges is not None:
                members = _close(members, ranges)
        elif is_sum(node):
            members = [*activations(node.inputs), site(node)]
        else:
            members = []
        for value in members[1:]:
            parent[find(name_of(value))] = find(name_of(members[0]))
    names = [name_of(value) for node in model.graph for value in activations(node.outputs)]
    return {name: find(name) for name in [*(name_of(value) for value in model.graph.inputs), *names]}


def _close(members: list[ir.Value], ranges: Mapping[str, Range]) -> list[ir.Value]:
    largest = max((peak(ranges[name_of(value)]) for value in members if value.name in ranges), default=0.0)

    def keep(value: ir.Value) -> bool:
        alone = len(list(value.uses())) <= 1
        return alone or value.name not in ranges or peak(ranges[name_of(value)]) * RATIO >= largest

    return [value for value in members if keep(value)]


def peak(limits: Range) -> float:
    return max(abs(limits[0]), abs(limits[1]))


def share(model: ir.Model, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """`ranges` with every group of `join` widened to the range of the whole group; idempotent."""
    groups = join(model, ranges)
    wide: dict[str, Range] = {}
    for name, root in groups.items():
        if name in ranges:
            low, high = wide.get(root, ranges[name])
            wide[root] = (min(low, ranges[name][0]), max(high, ranges[name][1]))
    return {name: wide[groups[name]] if name in groups else limits for name, limits in ranges.items()}


def nonnegative(model: ir.Model) -> set[str]:
    """Names of activations that no input can make negative, from the operators alone."""
    known: set[str] = set()

    def is_known(value: ir.Value | None) -> bool:
        array = constant(value)
        return bool((array >= 0).all()) if array is not None else value is not None and value.name in known

    for node in model.graph:
        floats = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.FLOAT]
        limits = bounds(node)
        data = floats[:1] if node.op_type == "Resize" else floats
        if (
            node.op_type in NONNEGATIVE
            or limits is not None
            or (is_sum(node) and is_known(node.inputs[0]) and all(map(is_known, floats[1:])))
            or (data and (moves(node) or averages(node) or node.op_type in ("Add", "Mul")) and all(map(is_known, data)))
        ):
            known.update(name_of(value) for value in activations(node.outputs))
    return known


@dataclass(frozen=True)
class Plan:
    """What to quantise: names of tensors stored as INT8, of Adds in INT8, of convolutions with float results."""

    quantised: frozenset[str]
    sums: frozenset[str]
    float_out: frozenset[str]


def plan(model: ir.Model, dialect: str) -> Plan:
    """By liveness: a tensor is INT8 when a Conv or Gemm reads it, directly or through moves, averages, INT8 adds.

    `ort` also stores every convolution's own result (else ONNX Runtime runs it in float), except where only network
    outputs follow: there the convolution's INT32 result is scaled to float. `trt` stores no result that goes straight
    into an Add or through a move, so that TensorRT can fuse Conv + Add and quantise once after a Concat.
    """
    nodes = list(model.graph)
    sums = _int8_sums(nodes)
    need: set[str] = set()  # read as INT8 by something
    live: set[str] = set()  # some Conv or Gemm follows
    for node in reversed(nodes):
        data = activations(node.inputs)
        result = {name_of(value) for value in (*node.outputs, site(node))}
        if weighted(node):
            need.add(name_of(data[0]))
        elif need & result and (moves(node) or averages(node) or name_of(node.outputs[0]) in sums):
            need.update(name_of(value) for value in data)
        if weighted(node) or live & result:
            live.update(name_of(value) for value in data)
    convs = [node for node in nodes if weighted(node)]
    if dialect == "ort":
        tail = {name_of(site(n)) for n in convs if name_of(site(n)) not in need | live and _plain(n)}
        return Plan(frozenset(need | {name_of(site(n)) for n in convs} - tail), frozenset(sums), frozenset(tail))
    return Plan(frozenset(_trt_pairs(nodes, need, sums)), frozenset(sums), frozenset())


def _plain(node: ir.Node) -> bool:
    return node.op_type == "Gemm" or _group(node) == 1


def _group(node: ir.Node) -> int:
    return node.attributes["group"].as_int() if "group" in node.attributes else 1


def is_depthwise(node: ir.Node, weight: np.ndarray) -> bool:
    """True for a Conv with one input and one output channel a group and more than one group."""
    return node.op_type == "Conv" and _group(node) == weight.shape[0] > 1 and weight.shape[1] == 1


def _int8_sums(nodes: list[ir.Node]) -> set[str]:
    """Outputs of Adds of two activations at least one of which comes from an INT8 operator."""
    native: set[str] = set()
    sums: set[str] = set()
    for node in nodes:
        data = activations(node.inputs)
        if weighted(node) or ((moves(node) or averages(node)) and any(v.name in native for v in data)):
            native.update(name_of(value) for value in (*node.outputs, site(node)))
        elif node.op_type == "Add" and len(data) == 2 and any(value.name in native for value in data):
            sums.add(name_of(node.outputs[0]))
            native.update((name_of(node.outputs[0]), name_of(site(node))))
    return sums


def _trt_pairs(nodes: list[ir.Node], need: set[str], sums: set[str]) -> set[str]:
    pairs: set[str] = set()
    order = {name_of(node.outputs[0]): index for index, node in enumerate(nodes)}
    for node in nodes:
        data = activations(node.inputs)
        if weighted(node):
            pairs.add(name_of(data[0]))
        elif averages(node) and name_of(node.outputs[0]) in need:
            pairs.update(name_of(value) for value in data)
        elif name_of(node.outputs[0]) in sums and name_of(site(node)) in need:
            main = max(raw_operands(node), key=lambda value: order[name_of(value)], default=None)
            pairs.update(name_of(value) for value in data if value is not main)
    return pairs


def raw_operands(node: ir.Node) -> list[ir.Value]:
    """Operands of an Add that a Conv or Gemm makes for this Add alone; TensorRT fuses the last of them with the Add."""
    own = [value for value in activations(node.inputs) if len(list(value.uses())) == 1 and not value.is_graph_output()]
    return [value for value in own if (maker := value.producer()) is not None and weighted(maker)]
