"""Facts about nodes, and the operators that treat every channel alone (elementwise, pooling, resizing, norms)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from .numbers import Ids, Numbers

NONE = np.zeros(0, np.int64)

#: Operators that act on every element alone (so on every channel alone), with any number of broadcast operands.
ELEMENTWISE = frozenset([
    "Abs", "Add", "And", "Cast", "Ceil", "Celu", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu",
    "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean",
    "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid",
    "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Tanh", "ThresholdedRelu", "Where", "Xor",
])  # fmt: skip
#: Operators that treat every channel alone but look at its neighbourhood; further inputs are constants shared by all.
SPATIAL = frozenset([
    "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool", "MaxPool", "Pad", "Resize",
    "Upsample", "InstanceNormalization", "BatchNormalization", "QuantizeLinear", "DequantizeLinear", "ReduceMean",
    "ReduceMax", "ReduceMin", "ReduceSum", "ReduceL2", "Expand",
])  # fmt: skip
#: Of these, averages: the average of a mix is the mix of the averages.
LINEAR = frozenset(["AveragePool", "GlobalAveragePool", "ReduceMean"])
COMMUTATIVE = frozenset({"Add", "Mul", "Max", "Min"})


@dataclass(frozen=True)
class Slot:
    """One input of a channelwise node. kind: map (a number a channel), one (a single channel broadcast to all), each
    (constant sliced along `axis`), shared (constant), literal (sizes; entry `axis` is the channel count), none.
    """

    kind: str
    operand: int = -1
    array: np.ndarray | None = None
    axis: int = 0
    name: str = ""

    def key(self) -> tuple[Any, ...]:
        if self.kind != "shared" or self.array is None:
            return (self.kind, self.operand)
        return (self.kind, str(self.array.dtype), self.array.shape, self.array.tobytes())


@dataclass(frozen=True)
class Fact:
    """What a node does. kind: view (makes no new map), lanes (channel by channel), rows (every output channel reads
    all input channels), groups (grouped convolution), mix (linear forms), flat ([N,C,H,W] -> [N,C*H*W]), barrier
    (not understood).

    `ids`: numbers of the first output; `fresh`: positions whose number is born here; `operands` [k, n]: numbers read,
    for lanes and flat those of every output channel, else all that are read.
    """

    node: ir.Node
    kind: str
    ids: Ids
    fresh: Ids = field(default_factory=lambda: NONE)
    operands: Ids = field(default_factory=lambda: NONE[None])
    slots: tuple[Slot, ...] = ()
    space: Any = None
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None


@dataclass
class Scope:
    """State of one walk: the numbers of all values so far, and which values are products by constants (mix terms)."""

    numbers: Numbers
    opset: int
    ids: dict[str, Ids] = field(default_factory=dict)
    scaled: set[str] = field(default_factory=set)

    def of(self, value: ir.Value, count: int) -> Ids | None:
        """Numbers of a value with `count` channels; constants get theirs here. None if it has another count."""
        array = constant(value)
        if array is None:
            found = self.ids[name_of(value)]
            return found if len(found) == count else None
        if array.ndim < 2:
            array = array.reshape(1, 1) if array.size == 1 else array
        if array.ndim < 2 or array.shape[1] not in (1, count):
            return None
        wide = np.broadcast_to(array, (array.shape[0], count, *array.shape[2:]))
        return np.array([self._literal(name_of(value), c, wide[:, c]) for c in range(count)], np.int64)

    def _literal(self, name: str, channel: int, array: np.ndarray) -> int:
        if array.dtype == np.float32 and array.size and (array == array.flat[0]).all():
            return self.numbers.constant(float(array.flat[0]))
        ids, fresh = self.numbers.intern("literal", [(name, channel)])
        if len(fresh):
            self.numbers.literals[int(ids[0])] = array
        return int(ids[0])


def name_of(value: ir.Value) -> str:
    assert value.name is not None  # graph.load names every value
    return value.name


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer or a Constant node, else None."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor.numpy() if tensor is not None else None


def is_constant(value: ir.Value | None) -> bool:
    """Whether `constant` would give an array; much cheaper."""
    return value is not None and ir.convenience.get_const_tensor(value) is not None


def dims(value: ir.Value) -> tuple[int, ...]:
    """Static shape of a value."""
    assert value.shape is not None  # graph.load infers every shape
    return tuple(int(dim) for dim in value.shape)  # type: ignore[arg-type]


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def signature(node: ir.Node) -> tuple[Any, ...]:
    """Operator and attributes: nodes with one signature compute the same function."""
    return (node.domain, node.op_type, *sorted((key, _frozen(item)) for key, item in node.attributes.items()))


def _frozen(item: ir.Attr) -> Any:
    plain = (str, int, float)
    if isinstance(item.value, plain):
        return repr(item.value)
    if isinstance(item.value, (tuple, list)) and all(isinstance(part, plain) for part in item.value):
        return repr(tuple(item.value))
    return repr(ir.to_proto(item).SerializeToString())


def dims_or_none(value: ir.Value) -> tuple[int, ...]:
    return dims(value) if value.shape is not None else ()


def barrier(scope: Scope, node: ir.Node) -> Fact:
    """All channels of all inputs are read; the outputs equal nothing else."""
    reads = [scope.ids[name_of(v)] for v in node.inputs if v is not None and constant(v) is None]
    ids = NONE
    for index, output in enumerate(node.outputs):
        shape = dims_or_none(output)
        made = scope.numbers.new(shape[1] if len(shape) >= 2 else 1)
        scope.ids[name_of(output)] = made
        ids = made if index == 0 else ids
    operands = np.concatenate(reads) if reads else NONE
    return Fact(node, "barrier", ids, np.arange(len(ids)), operands[None])


def view(scope: Scope, node: ir.Node) -> Fact | None:
    ids = scope.of(node.inputs[0], dims(node.outputs[0])[1])  # type: ignore[arg-type]
    return Fact(node, "view", ids) if ids is not None else None


# --- channelwise operators ----------------------------------------------------------------------------------


def lanes(scope: Scope, node: ir.Node, literal: np.ndarray | None = None) -> Fact | None:
    """Each output channel is the same function of that channel of the inputs. `literal`: sizes instead of input 1."""
    if any(name_of(extra) and (list(extra.uses()) or extra.is_graph_output()) for extra in node.outputs[1:]):
        return None
    shape = dims(node.outputs[0])
    operands: list[Ids] = []
    slots: list[Slot] = []
    for index, value in enumerate(node.inputs):
        slot = _slot(scope, node, index, value, shape, operands)
        if slot is None:
            return None
        slots.append(slot)
    if literal is not None:
        slots[1:] = [Slot("literal", array=literal, axis=1)]
    if not operands or not _keeps_channels(node, shape):
        return None
    return _number_lanes(scope, node, np.stack(operands), tuple(slots))


def _number_lanes(scope: Scope, node: ir.Node, reads: Ids, slots: tuple[Slot, ...]) -> Fact:
    keyed = np.sort(reads, axis=0) if node.op_type in COMMUTATIVE and _even(node, slots) else reads
    each = [slot for slot in slots if slot.kind == "each"]
    columns: list[Any] = [row.tolist() for row in keyed]
    for slot in each:
        assert slot.array is not None
        moved = np.moveaxis(slot.array, slot.axis, 0)
        columns.append([piece.tobytes() for piece in moved])
    tail = dims(node.outputs[0])[2:]
    space = (signature(node), tail, tuple(slot.key() for slot in slots))
    mixed = _averages(scope, node, reads, space)
    keys = list(zip(*columns, strict=True))  # a 1-tuple and a bare int would not mix well, so always tuples
    rest = np.array([place for place in range(len(keys)) if place not in mixed], np.int64)
    ids, fresh = np.empty(len(keys), np.int64), NONE
    ids[rest], born = scope.numbers.intern(space, (keys[place] for place in rest.tolist()))
    fresh = rest[born]
    if mixed:
        ids[list(mixed)], born = scope.numbers.compose(list(mixed.values()))
        fresh = np.sort(np.concatenate([fresh, np.array(list(mixed), np.int64)[born]]))
    folded = _fold(scope, node, reads, slots)
    if folded is not None:
        at, made = folded
        ids[at] = made
        fresh = fresh[~np.isin(fresh, at)]
    names = tuple(slot.name for slot in each)
    return Fact(node, "lanes", ids, fresh, reads, slots, (space, names))


def _averages(scope: Scope, node: ir.Node, reads: Ids, space: Any) -> dict[int, dict[int, float]]:
    """Positions that average a mix whose maps are averaged elsewhere, with the mix of those averages."""
    found: dict[int, dict[int, float]] = {}
    if node.op_type not in LINEAR or len(reads) != 1:
        return found
    for place, number in enumerate(reads[0].tolist()):
        form = scope.numbers.forms.get(number, ())
        parts = {scope.numbers.known(space, (atom,)): weight for atom, weight in form}
        if form and None not in parts:
            found[place] = {int(atom): weight for atom, weight in parts.items() if atom is not None}
    return found


def _even(node: ir.Node, slots: tuple[Slot, ...]) -> bool:
    shapes = {dims(value) for value in node.inputs if value is not None}
    return len(shapes) == 1 and all(slot.kind == "map" for slot in slots)


def _slot(
    scope: Scope, node: ir.Node, index: int, value: ir.Value | None, shape: tuple[int, ...], operands: list[Ids]
) -> Slot | None:
    if value is None:
        return Slot("none")
    array = constant(value)
    if array is not None:
        return _constant_slot(node, index, name_of(value), array, shape)
    have = dims(value)
    joined = node.op_type in ELEMENTWISE or node.op_type == "Concat"
    if len(have) < 2 or (joined and len(have) != len(shape)) or have[0] != shape[0]:
        return None
    ids = scope.ids[name_of(value)]
    if have[1] == shape[1]:
        operands.append(ids)
        return Slot("map", len(operands) - 1)
    if have[1] == 1 and joined:
        operands.append(np.repeat(ids, shape[1]))
        return Slot("one", len(operands) - 1)
    return None


def _constant_slot(node: ir.Node, index: int, name: str, array: np.ndarray, shape: tuple[int, ...]) -> Slot | None:
    channels, axis = shape[1], array.ndim - len(shape) + 1
    if node.op_type in ("BatchNormalization", "InstanceNormalization"):
        return Slot("each", array=array, axis=0, name=name)
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        if array.ndim == 0 or array.size == 1:
            return Slot("shared", array=array)
        good = attribute(node, "axis", 1) in (1, 1 - len(shape)) and array.shape == (channels,)
        return Slot("each", array=array, axis=0, name=name) if good else None
    if node.op_type in ("Resize", "Expand") and index == (3 if node.op_type == "Resize" else 1):
        if len(array) == len(shape):
            return Slot("literal", array=np.array(shape), axis=1)
        return Slot("shared", array=array) if node.op_type == "Resize" else None
    if node.op_type not in ELEMENTWISE or node.op_type == "Clip":
        return Slot("shared", array=array)
    if array.ndim > len(shape):
        return None
    if axis >= 0 and array.shape[axis] == channels and channels > 1:
        return Slot("each", array=array, axis=axis, name=name)
    return Slot("shared", array=array) if axis < 0 or array.shape[axis] == 1 else None


def _keeps_channels(node: ir.Node, shape: tuple[int, ...]) -> bool:
    """Whether a SPATIAL operator leaves axes 0 and 1 alone in this use."""
    first = next(value for value in node.inputs if value is not None and constant(value) is None)
    have, op = dims_or_none(first), node.op_type
    if op in ELEMENTWISE:
        return True
    if have[:2] != shape[:2] or (op == "BatchNormalization" and attribute(node, "training_mode", 0)):
        return False
    if op.startswith("Reduce"):
        axes = attribute(node, "axes") if "axes" in node.attributes else _array(node, 1)
        return axes is not None and len(axes) > 0 and all(int(axis) % len(have) >= 2 for axis in axes)
    if op == "Pad":
        pads, axes = _array(node, 1), _array(node, 3)
        if pads is None:
            return False
        order = list(range(len(have))) if axes is None else [int(axis) % len(have) for axis in axes]
        before, after = pads[: len(order)], pads[len(order) :]
        return all(axis >= 2 or (a == 0 and b == 0) for axis, a, b in zip(order, before, after, strict=True))
    if op == "Resize":
        return attribute(node, "coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
    return True


def _array(node: ir.Node, index: int) -> np.ndarray | None:
    return constant(node.inputs[index]) if len(node.inputs) > index else None


def _fold(scope: Scope, node: ir.Node, reads: Ids, slots: tuple[Slot, ...]) -> tuple[Ids, Ids] | None:
    """Positions whose operands are all constants, and the results' numbers; only where borders cannot matter."""
    table, rank = scope.numbers, len(dims(node.outputs[0]))
    if node.op_type not in ELEMENTWISE and node.op_type not in ("BatchNormalization", "GlobalAveragePool", "MaxPool"):
        return None
    at = np.flatnonzero(table.is_constant(reads).all(axis=0))
    flat = all(s.array is None or s.array.size == (s.array.shape[s.axis] if s.kind == "each" else 1) for s in slots)
    if len(at) == 0 or not flat or node.outputs[0].dtype != ir.DataType.FLOAT:
        return None
    if node.op_type in ("GlobalAveragePool", "MaxPool"):
        return at, reads[0][at]
    inputs: list[np.ndarray | None] = []
    for slot in slots:
        if slot.operand >= 0:
            inputs.append(table.values(reads[slot.operand][at]).reshape(1, -1, *[1] * (rank - 2)))
        elif slot.kind == "each" and slot.array is not None:
            inputs.append(np.take(slot.array, at, axis=slot.axis))
        else:
            inputs.append(slot.array)
    result = evaluate(node, inputs, scope.opset)
    return at, np.array([table.constant(value) for value in result.reshape(-1)], np.int64)


def evaluate(node: ir.Node, inputs: list[np.ndarray | None], opset: int) -> np.ndarray:
    """Run one node on arrays with ONNX's reference implementation."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    names = [f"i{index}" if array is not None else "" for index, array in enumerate(inputs)]
    proto = onnx.helper.make_node(node.op_type, names, ["o"])
    for item in node.attributes.values():
        proto.attribute.append(ir.to_proto(item))
    feeds = {name: array for name, array in zip(names, inputs, strict=True) if array is not None}
    infos = [onnx.ValueInfoProto(name=name) for name in feeds]
    graph = onnx.helper.make_graph([proto], "one", infos, [onnx.ValueInfoProto(name="o")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    results: Any = ReferenceEvaluator(model).run(None, feeds)
    return np.asarray(results[0])


def pixels(value: ir.Value) -> int:
    """Elements of one channel."""
    return math.prod(dims(value)[2:])
