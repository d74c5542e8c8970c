"""Small networks whose nodes are the operators that a latency table needs, with noise as weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

Hw = tuple[int, int]


class Net:
    """A float ONNX graph in the making; every method adds nodes and returns the name of the value they make."""

    def __init__(self, hw: Hw, channels: int = 3) -> None:
        from onnx import TensorProto, helper

        self._helper, self._float = helper, TensorProto.FLOAT
        self._nodes: list[Any] = []
        self._stored: list[Any] = []
        self._rng = np.random.default_rng(0)
        self.channels: dict[str, int] = {"image": channels}
        self._shape = [1, channels, *hw]
        self._outputs: list[str] = []

    def node(self, op: str, inputs: Sequence[str], channels: int, **attributes: Any) -> str:
        name = f"{op}{len(self._nodes)}"
        self._nodes.append(self._helper.make_node(op, list(inputs), [name], name=f"node.{name}", **attributes))
        self.channels[name] = channels
        return name

    def store(self, array: np.ndarray) -> str:
        from onnx import numpy_helper

        name = f"stored{len(self._stored)}"
        self._stored.append(numpy_helper.from_array(array, name))
        return name

    def conv(
        self, source: str, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: str | None = "Relu"
    ) -> str:
        """A convolution with bias, "same" padding and an activation (None: its result may be negative)."""
        shape = (cout, self.channels[source] // groups, kernel, kernel)
        weight = self._rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))
        inputs = [source, self.store(weight), self.store(np.zeros(cout, np.float32))]
        geometry = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4, "group": groups}
        made = self.node("Conv", inputs, cout, **geometry)
        return self.node(act, [made], cout) if act else made

    def add(self, first: str, second: str, act: bool = True) -> str:
        made = self.node("Add", [first, second], self.channels[first])
        return self.node("Relu", [made], self.channels[first]) if act else made

    def pool(self, source: str) -> str:
        geometry = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}
        return self.node("MaxPool", [source], self.channels[source], **geometry)

    def grow(self, source: str, mode: str = "nearest") -> str:
        scales = self.store(np.array([1, 1, 2, 2], np.float32))
        how = {"mode": mode, "coordinate_transformation_mode": "asymmetric"}
        extra = {"nearest_mode": "floor"} if mode == "nearest" else {}
        return self.node("Resize", [source, "", scales], self.channels[source], **how, **extra)

    def cut(self, source: str, start: int, end: int) -> str:
        ends = [self.store(np.array([value], np.int64)) for value in (start, end, 1)]
        return self.node("Slice", [source, *ends], end - start)

    def join(self, sources: Sequence[str]) -> str:
        return self.node("Concat", sources, sum(self.channels[name] for name in sources), axis=1)

    def output(self, source: str) -> None:
        self._outputs.append(source)

    def model(self) -> ir.Model:
        """The graph with shapes, ready for the quantiser."""
        import onnx

        value = self._helper.make_tensor_value_info
        graph = self._helper.make_graph(
            self._nodes,
            "operators",
            [value("image", self._float, self._shape)],
            [value(name, self._float, None) for name in self._outputs],
            self._stored,
        )
        opsets = [self._helper.make_opsetid("", 18)]
        proto = self._helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def pairs(counts: Sequence[int]) -> list[int]:
    """A sequence in which every ordered pair of `counts` stands side by side exactly once (de Bruijn, order 2).

    >>> pairs([4, 8])
    [4, 4, 8, 8, 4]
    """
    found: list[int] = []
    for index, first in enumerate(counts):
        found.append(first)
        for second in counts[index + 1 :]:
            found += [first, second]
    return [*found, counts[0]]


def chain(hw: Hw, counts: Sequence[int], kernel: int, act: str | None = "Relu") -> ir.Model:
    """Convolutions from counts[0] to counts[1] to ... channels, one after the other, all of one size."""
    return _line(hw, counts[0], act, lambda net, value: _walk(net, value, counts[1:], kernel, act))


def detours(hw: Hw, ends: Sequence[tuple[int, int]], kernel: int, act: str | None = "Relu") -> ir.Model:
    """For every (cin, cout) a convolution, and between them 1x1 convolutions that bring the next cin."""

    def body(net: Net, value: str) -> str:
        for index, (_, cout) in enumerate(ends):
            value = net.conv(value, cout, kernel, act=act)
            value = net.conv(value, ends[(index + 1) % len(ends)][0], 1, act=act)
        return value

    return _line(hw, ends[0][0], act, body)


def depthwise(hw: Hw, counts: Sequence[int], kernel: int, stride: int = 1) -> ir.Model:
    """For every count a depthwise convolution after a 1x1 convolution; at stride 2 its result grows back."""

    def body(net: Net, value: str) -> str:
        for count in counts:
            value = net.conv(value, count, 1)
            value = net.conv(value, count, kernel, stride, groups=count)
            value = net.grow(value) if stride == 2 else value
        return net.conv(value, counts[0], 1)

    return _line(hw, counts[0], "Relu", body)


def strided(hw: Hw, counts: Sequence[int], kernel: int) -> ir.Model:
    """Convolutions of stride 2 through `counts`, each result grown back to `hw`."""

    def body(net: Net, value: str) -> str:
        for count in counts[1:]:
            value = net.grow(net.conv(value, count, kernel, 2))
        return value

    return _line(hw, counts[0], "Relu", body)


def _line(hw: Hw, first: int, act: str | None, body: Callable[[Net, str], str]) -> ir.Model:
    net = Net(hw)
    net.output(net.conv(body(net, net.conv("image", first, 1, act=act)), 1, 1, act=None))
    return net.model()


def _walk(net: Net, value: str, counts: Sequence[int], kernel: int, act: str | None) -> str:
    for count in counts:
        value = net.conv(value, count, kernel, act=act)
    return value


def heads(hw: Hw, cin: int, couts: Sequence[int], kernel: int = 1) -> ir.Model:
    """Last convolutions with float results, each on a tensor of its own."""
    net = Net(hw)
    value = net.conv("image", cin, 1)
    for cout in couts:
        net.output(net.conv(net.conv(value, cin, 1), cout, kernel, act=None))
    return net.model()


def operators(hw: Hw, channels: int) -> ir.Model:
    """Everything but convolutions: sums, pools, copies, float activations; `hw` must be even."""
    net = Net(hw)
    first = net.conv("image", channels, 1)
    value = net.add(net.conv(first, channels, 1, act=None), first)
    value = net.add(net.conv(value, channels, 1, act=None), net.conv(first, channels, 1, act=None), act=False)
    half = channels // 2
    joined = net.join([net.cut(value, half, channels), net.cut(value, 0, half)])  # these two run as a Split
    value = net.conv(joined, channels, 1)
    value = net.conv(net.join([net.cut(value, 0, half), net.cut(value, half // 2, half + half // 2)]), channels, 1)
    mixed = net.store(np.random.default_rng(0).permutation(channels))
    value = net.conv(net.node("Gather", [value, mixed], channels, axis=1), channels, 1)
    value = net.conv(net.grow(net.pool(value)), channels, 1)
    for act in ("Sigmoid", "HardSwish"):
        value = net.conv(net.node(act, [net.conv(value, channels, 1, act=None)], channels), channels, 1)
    other = net.node("Sigmoid", [net.conv(value, channels, 1, act=None)], channels)
    value = net.conv(net.node("Mul", [value, other], channels), channels, 1)
    value = net.conv(net.grow(net.conv(value, channels, 3, 2), "linear"), channels, 1)
    mean = net.node("GlobalAveragePool", [value], channels)
    net.output(net.conv(net.conv(mean, channels, 1), 8, 1, act=None))
    average = net.node("AveragePool", [value], channels, kernel_shape=[2, 2], strides=[2, 2])
    net.output(net.conv(net.conv(average, channels, 1), 8, 1, act=None))
    net.output(net.conv(value, 4, 1, act=None))
    return net.model()


def residual(hw: Hw, width: int, tasks: int = 3, classes: int = 8) -> ir.Model:
    """A residual network of four stages with top-down heads, in the shape of the product's own: a whole to anchor."""
    net = Net(hw)
    value = net.pool(net.conv("image", width, 3, 2))
    levels = []
    for stage, factor in enumerate((1, 2, 4, 8)):
        for block in range(2):
            stride, count = (2 if stage and not block else 1), width * factor
            inner = net.conv(net.conv(value, count, 3, stride), count, 3, act=None)
            skip = net.conv(value, count, 1, stride, act=None) if stage and not block else value
            value = net.add(inner, skip)
        levels.append(value)
    for _ in range(tasks):
        _head(net, levels, width, classes)
    return net.model()


def _head(net: Net, levels: Sequence[str], width: int, classes: int) -> None:
    top = net.conv(levels[-1], width, 1, act=None)
    for level in reversed(levels[:-1]):
        top = net.add(net.grow(top), net.conv(level, width, 1, act=None), act=False)
    net.output(net.conv(net.conv(top, width, 3), classes, 1, act=None))


def mobile(hw: Hw, width: int, classes: int = 8) -> ir.Model:
    """Inverted residuals with depthwise convolutions, and a head."""
    net = Net(hw)
    value, levels = net.conv("image", width, 3, 2), []
    for factor in (1, 2, 4, 8):
        for block in range(2):
            count, inner = width * factor, net.conv(value, net.channels[value] * 4, 1, act="Relu")
            inner = net.conv(inner, net.channels[inner], 3, 1 if block else 2, net.channels[inner])
            inner = net.conv(inner, count, 1, act=None)
            value = net.add(inner, value, act=False) if block else inner
        levels.append(value)
    _head(net, levels, 2 * width, classes)
    return net.model()


def branched(hw: Hw, width: int, own: int, tasks: int = 3, classes: int = 8) -> ir.Model:
    """As `residual`, split: every layer a convolution for the shared values and one for each task's `own` share of
    them, which reads slices; branches are joined again.
    """
    net = Net(hw)
    value = net.pool(net.conv("image", width, 3, 2))
    levels = []
    for stage, factor in enumerate((1, 2, 4, 8)):
        for block in range(2):
            stride, count = (2 if stage and not block else 1), width * factor
            inner = _split(net, value, count, count // own, 3, stride, "Relu", tasks)
            inner = _split(net, inner, count, count // own, 3, 1, None, tasks)
            skip = net.conv(value, net.channels[inner], 1, stride, act=None) if stage and not block else value
            skip = skip if net.channels[skip] == net.channels[inner] else net.conv(skip, net.channels[inner], 1)
            value = net.add(inner, skip)
        levels.append(value)
    for _ in range(tasks):
        _head(net, levels, width, classes)
    return net.model()


def _split(net: Net, value: str, count: int, own: int, kernel: int, stride: int, act: str | None, tasks: int) -> str:
    """Branches over [shared | own of task 1 | ...]: the shared one reads the first `count`, a task's also its own."""
    read, parts = net.channels[value], []
    shared = net.cut(value, 0, count) if read > count else value
    parts.append(net.conv(shared, count, kernel, stride, act=act))
    for task in range(tasks):
        start = max(read - (tasks - task) * own, 0)
        seen = net.join([shared, net.cut(value, start, start + own)]) if read > count else value
        parts.append(net.conv(seen, own, kernel, stride, act=act))
    return net.join(parts)


def anchors(quick: bool = False) -> list[tuple[str, Callable[[], ir.Model]]]:
    """(lowering, network) of the whole networks that a table is tied to."""
    found: list[tuple[str, Callable[[], ir.Model]]] = [
        ("merged", partial(residual, (96, 128), 32)),
        ("split", partial(branched, (96, 128), 32, 4)),
    ]
    if quick:
        return found
    wide = [partial(residual, (96, 128), 44), partial(residual, (128, 128), 24), partial(mobile, (96, 128), 16)]
    return [*found, *(("merged", build) for build in wide), ("split", partial(branched, (96, 128), 24, 8))]
