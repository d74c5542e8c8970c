"""Which values of a gated graph are versions of one value of the plain net, found from the graph alone.

Congruence closure (Nelson and Oppen, 1980), run backwards: a select or a mix says that its operands are versions of one
value, so the nodes that make them are versions of one node where they agree, and so are those nodes' inputs.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .lanes import constant, dims_or_none, is_constant, name_of, signature
from .rules import channel_mask

#: Operators whose constants are weights: versions have others of the same shape.
WEIGHTED = frozenset(
    ["Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "PRelu", "InstanceNormalization"]
)
SMALL = 16  # elements: constants up to this size are options (sizes, bounds), which versions share


@dataclass(frozen=True)
class Versions:
    """The versions of one node, in the order [shared, task 1, ..., task T]. `name`: the family of its first output.

    `joins`: selects and mixes inside a family. `alone`: its versions depend on each other, so it is one version only.
    """

    name: str
    nodes: tuple[ir.Node, ...]
    joins: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Families:
    """`of`: value name -> family name, for all that depends on the image; `layers`: in an order of execution."""

    of: dict[str, str]
    layers: tuple[Versions, ...]


def families(model: ir.Model) -> Families:
    """Families and layers of a model of `graph.load`; in a plain net every value and every node is its own.

    A family bears the name of its shared version's first value, else of the first value in graph order.
    """
    nodes = [node for node in model.graph if node.op_type != "Constant"]
    union = _Union(nodes)
    union.join_sites()
    union.close()
    rank = _ranks(nodes, union)
    names = _names(model, nodes, union, rank)
    of = {name: names[union.find(name)] for name in union.values}
    return Families(of, tuple(_ordered(nodes, union, names, rank)))


def _inputs(node: ir.Node) -> list[str]:
    return [name_of(value) for value in node.inputs if value is not None and not is_constant(value)]


class _Union:
    """Union-find over values that knows which nodes make the values of every class."""

    def __init__(self, nodes: Sequence[ir.Node]) -> None:
        self.values: dict[str, None] = {}
        self.parent: dict[str, str] = {}
        self.makers: dict[str, dict[object, ir.Node]] = {}  # root -> node key -> one node with that key
        self.joins: set[ir.Node] = set()
        self.keys = {node: _key(node) for node in nodes}
        self.todo: list[tuple[str, str]] = []
        self.nodes = nodes
        for node in nodes:
            for name in (*_inputs(node), *(name_of(value) for value in node.outputs)):
                self.values[name] = None

    def find(self, name: str) -> str:
        root = name
        while self.parent.setdefault(root, root) != root:
            root = self.parent[root]
        while self.parent[name] != root:
            self.parent[name], name = root, self.parent[name]
        return root

    def join_sites(self) -> None:
        """Selects and mixes: their operands and their result are versions of one value."""
        scaled: set[str] = set()
        for node in self.nodes:
            out, names = name_of(node.outputs[0]), _inputs(node)
            summed = node.op_type == "Add" and len(names) == 2 and scaled.issuperset(names)
            if summed or (node.op_type == "Mul" and _is_share(node)):
                scaled.add(out)
            elif channel_mask(node) is None:
                continue
            shapes = {dims_or_none(value) for value in node.inputs if value is not None and not is_constant(value)}
            if shapes != {dims_or_none(node.outputs[0])}:
                continue
            self.joins.add(node)
            self.todo += [(out, name) for name in names]

    def close(self) -> None:
        """Backwards to a fixed point: nodes of one key that make one family have their inputs joined."""
        for node in self.nodes:
            if node not in self.joins:
                self._enter(self.find(name_of(node.outputs[0])), self.keys[node], node)
        while self.todo:
            left, right = (self.find(name) for name in self.todo.pop())
            if left == right:
                continue
            self.parent[right] = left
            for key, node in self.makers.pop(right, {}).items():
                self._enter(left, key, node)

    def _enter(self, root: str, key: object, node: ir.Node) -> None:
        known = self.makers.setdefault(root, {}).setdefault(key, node)
        if known is not node:
            self.todo += zip(_inputs(known), _inputs(node), strict=True)
            if len(known.outputs) > 1:
                self.todo += zip(*([name_of(v) for v in n.outputs] for n in (known, node)), strict=True)


def _is_share(node: ir.Node) -> bool:
    """Mul by one constant in [0, 1] a channel: the term of a mix."""
    factors = [array for array in map(constant, node.inputs) if array is not None]
    shape = dims_or_none(node.outputs[0])
    if len(factors) != 1 or len(node.inputs) != 2 or len(shape) != 4 or factors[0].dtype != np.float32:
        return False
    (factor,) = factors
    per_channel = factor.size == 1 or (factor.ndim >= 3 and factor.shape[-3] == factor.size == shape[1])
    return bool(per_channel and (factor >= 0).all() and (factor <= 1).all())


def _key(node: ir.Node) -> object:
    """What versions of one node have in common: operator, attributes, shapes of weights, values of options."""
    parts: list[object] = []
    for value in node.inputs:
        tensor = ir.convenience.get_const_tensor(value) if value is not None else None
        if tensor is None:
            parts.append(value is None)
        elif node.op_type in WEIGHTED or tensor.size > SMALL:
            parts.append(tuple(tensor.shape))
        else:
            parts.append((tuple(tensor.shape), tensor.numpy().tobytes()))
    shapes = tuple(dims_or_none(value) for value in node.outputs)
    return (signature(node), tuple(parts), shapes)


def _ranks(nodes: Sequence[ir.Node], union: _Union) -> dict[str, int]:
    """0 for values of the shared stream, 1 for those of tasks; by the selects that follow. Others are not in it."""
    rank: dict[str, int] = {}
    for node in reversed(nodes):
        if node in union.joins:
            if node.op_type == "Where":
                for value, place in zip(node.inputs[1:], (1, 0), strict=True):
                    if value is not None and not is_constant(value):
                        rank[name_of(value)] = min(place, rank.get(name_of(value), place))
            continue
        found = [rank[name] for name in map(name_of, node.outputs) if name in rank]
        if found:
            for name in _inputs(node):
                rank[name] = min(*found, rank.get(name, 1))
    return rank


def _names(model: ir.Model, nodes: Sequence[ir.Node], union: _Union, rank: dict[str, int]) -> dict[str, str]:
    """Root -> family name: the shared version that a layer makes, else the first value that one makes."""
    best: dict[str, tuple[int, int, str]] = {}
    made = [(value, node in union.joins) for node in nodes for value in node.outputs]
    listed = [(name_of(value), False) for value in model.graph.inputs] + [(name_of(v), join) for v, join in made]
    for index, (name, join) in enumerate(listed):
        root = union.find(name)
        candidate = (2 if join else rank.get(name, 1), index, name)
        best[root] = min(best.get(root, candidate), candidate)
    return {root: name for root, (_, _, name) in best.items()}


def _ordered(nodes: Sequence[ir.Node], union: _Union, names: dict[str, str], rank: dict[str, int]) -> list[Versions]:
    """Layers in topological order; those whose versions depend on each other fall apart into single nodes."""
    groups: dict[tuple[str, object], list[ir.Node]] = {}
    for node in nodes:
        root = union.find(name_of(node.outputs[0]))
        groups.setdefault((root, None if node in union.joins else union.keys[node]), []).append(node)
    layers = [
        Versions(names[root], tuple(members if key is None else _versions(members, rank)), joins=key is None)
        for (root, key), members in groups.items()
    ]
    place = {node: index for index, node in enumerate(nodes)}
    while True:
        order, stuck = _sort(layers, place)
        if not stuck:
            return order
        apart = [Versions(layer.name, (node,), layer.joins, alone=True) for layer in stuck for node in layer.nodes]
        layers = [layer for layer in layers if layer not in stuck] + apart


def _versions(members: list[ir.Node], rank: dict[str, int]) -> list[ir.Node]:
    return sorted(members, key=lambda node: rank.get(name_of(node.outputs[0]), 1))


def _sort(layers: list[Versions], place: dict[ir.Node, int]) -> tuple[list[Versions], list[Versions]]:
    """Layers in an order of execution, smallest place first; or those that lie on a cycle."""
    home = {name_of(v): index for index, layer in enumerate(layers) for node in layer.nodes for v in node.outputs}
    before = [
        {home[name] for node in layer.nodes for name in _inputs(node) if name in home} - ({i} if layer.joins else set())
        for i, layer in enumerate(layers)
    ]
    after: list[list[int]] = [[] for _ in layers]
    for index, needed in enumerate(before):
        for other in needed:
            after[other].append(index)
    first = [min(place[node] for node in layer.nodes) for layer in layers]
    ready = [(first[i], i) for i, needed in enumerate(before) if not needed]
    heapq.heapify(ready)
    order, waiting = [], [len(needed) for needed in before]
    while ready:
        _, index = heapq.heappop(ready)
        order.append(index)
        for other in after[index]:
            waiting[other] -= 1
            if waiting[other] == 0:
                heapq.heappush(ready, (first[other], other))
    left = set(range(len(layers))) - set(order)
    while True:  # what only waits for a cycle is not on one
        ends = {index for index in left if not left.intersection(after[index])}
        if not ends:
            return [layers[index] for index in order], [layers[index] for index in sorted(left)]
        left -= ends
