"""The time of a gate pattern in merged form, from a latency table: exact on hard gates, differentiable through them.

In merged form a layer is one convolution from all live values of its input to all live values of its output: the plain
net's graph with other widths. The walk over that graph finds which groups of gates decide each operator's widths; what
an operator costs is the latency table's business.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .gate import Gates
from .net import InterroGateNet
from .placement import Inside, insides
from .plain import PlainNet

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..compiler.executed import Step
    from ..compiler.latency import LatencyTable

#: One bool [T, C] array per group of tied gates, in the order of `Pricing.gates`.
Pattern = Sequence[np.ndarray]


@dataclass(frozen=True)
class Width:
    """Channels of a value: a fixed number and the live values of these groups of gates."""

    fixed: int = 0
    groups: tuple[int, ...] = ()

    def at(self, sizes: Sequence[int]) -> int:
        """Channels when group g has sizes[g] live values."""
        return self.fixed + sum(sizes[group] for group in self.groups)


@dataclass(frozen=True)
class Term:
    """An operator that runs, the plain net's widths replaced by what decides them."""

    step: Step
    cin: Width
    cout: Width
    label: str


@dataclass(frozen=True)
class Skip:
    """An add or a depthwise convolution: it reads a site's values one by one, and makes values of its own site.

    Where it needs a mix, or one value in two places, a 1x1 convolution makes its operand.
    """

    reads: int
    makes: int
    out_hw: tuple[int, int]


@dataclass(frozen=True)
class Price:
    """Predicted milliseconds of a gate pattern and of the plain shared net; by_layer: operator -> ms."""

    ms: float
    plain_ms: float
    by_layer: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Time against the plain shared net's."""
        return self.ms / self.plain_ms


def live_values(mask: np.ndarray) -> int:
    """Physical width of a site, mask bool [T, C]: per channel one value a task that opened it, and the shared one
    unless all did.

    >>> live_values(np.array([[0, 1, 1], [0, 0, 1]], bool))
    5
    """
    opened = mask.sum(0)
    return int((opened + (opened < len(mask))).sum())


def shares(mask: np.ndarray) -> np.ndarray:
    """Live values that each gate answers for, float [T, C]: what closing an open one saves, what opening a closed one
    costs.

    The last opening of a channel costs nothing, as the shared value goes then. Closing the first of T saves nothing by
    itself: it is given its part of what all T save together, else no gate of an open channel would ever move.

    >>> shares(np.array([[0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 1, 1]], bool))[0].round(2).tolist()
    [1.0, 1.0, 0.0, 0.67]
    """
    tasks, opened = len(mask), mask.sum(0)
    of_open = np.where(opened == tasks, (tasks - 1) / tasks, 1.0)
    of_closed = np.where(opened == tasks - 1, 0.0, 1.0)
    return np.where(mask, of_open, of_closed)


def needs_conv(reads: np.ndarray, makes: np.ndarray) -> bool:
    """Whether a step from channels with gates `reads` to channels with gates `makes` needs a value that is not there.

    A mix: the shared stream goes on in a channel that some task had opened. A repeat: several values are made of the
    one shared value.
    """
    goes_on = ~makes.all(0)
    mixed = goes_on & reads.any(0)
    repeated = (makes & ~reads).sum(0) + (goes_on & ~reads.any(0)) > 1
    return bool((mixed | repeated).any())


class Pricing:
    """Prices of one gated net's patterns on one device. plain: the graph of the plain shared net, which costs least."""

    def __init__(self, net: InterroGateNet, table: LatencyTable) -> None:
        self.table, self.tasks = table, len(net.tasks)
        sites = net.gate_sites()
        self.gates: list[Gates] = list(dict.fromkeys(site.gates for site in sites))
        self.names = [next(site.name for site in sites if site.gates is gates) for gates in self.gates]
        self.channels = [gates.channels for gates in self.gates]
        self.granules = [gates.granule for gates in self.gates]
        self.plain = model = plain_graph(net)
        prediction = table.predict(model)
        self.plain_ms = float(prediction.ms)
        self.heads, self.backbone_ms, self.costliest = _parts(model, prediction, net.task_names)
        group = {place.step: self.gates.index(site.gates) for place, site in zip(net.places, sites, strict=True)}
        inside = insides(net.plan, net.branches["shared"], {place.step: place.name for place in net.places})
        rows = {f"backbone.{path}": group[step] for step, one in inside.items() for path in one.convs}
        self.terms = walk(model, rows, table.runs_as)
        self.skips = _skips(net, inside, group)
        self._known: dict[Any, float] = {}
        self._fixed_ms = self.plain_ms - sum(self._times(self.channels))
        self.most_ms = self.ms([np.ones((self.tasks, count), bool) for count in self.channels])

    def pattern(self) -> list[np.ndarray]:
        """The net's decisions of today."""
        return [gates.mask().cpu().numpy() for gates in self.gates]

    def sizes(self, pattern: Pattern) -> list[int]:
        """Live values of each group."""
        return [live_values(mask) for mask in pattern]

    def ms(self, pattern: Pattern) -> float:
        """Predicted milliseconds of a pattern."""
        return self.joint_ms(pattern) + sum(self._skip_ms(skip, pattern) for skip in self._needed(pattern))

    def joint_ms(self, pattern: Pattern) -> float:
        """As `ms`, of a pattern with as many live values whose openings are joint where others need a convolution."""
        return self._fixed_ms + sum(self._times(self.sizes(pattern)))

    def price(self, pattern: Pattern) -> Price:
        """Predicted time of a pattern, whole and by operator; operators of the same layer are added up."""
        layers: dict[str, float] = {}
        for term, ms in zip(self.terms, self._times(self.sizes(pattern)), strict=True):
            layers[term.label] = layers.get(term.label, 0.0) + ms
        for skip in self._needed(pattern):
            label = f"{self.names[skip.makes]}.skip"
            layers[label] = layers.get(label, 0.0) + self._skip_ms(skip, pattern)
        return Price(self._fixed_ms + sum(layers.values()), self.plain_ms, layers)

    def added(self) -> Tensor:
        """Milliseconds over the plain net that each task's gates answer for, [T], by `joint_ms`.

        A search finds how many channels to open, rounding then makes them joint. The sum is exact for the hard gates,
        the gradient straight-through.
        """
        pattern, parts = self.pattern(), []
        for gates, slope in zip(self.gates, self.slopes(pattern), strict=True):
            opened = gates.hard()
            parts.append((torch.as_tensor(slope).to(opened) * opened).sum(1))
        total = torch.stack(parts).sum(0)
        answered = float(total.detach().sum())
        return total * ((self.joint_ms(pattern) - self.plain_ms) / answered) if answered > 0 else total

    def slopes(self, pattern: Pattern) -> list[np.ndarray]:
        """Milliseconds that each gate answers for, float [T, C] a group: secants of the staircase over one step."""
        sizes, step, found = self.sizes(pattern), self.table.step, []
        for group, mask in enumerate(pattern):
            low = max(sizes[group] - step, self.channels[group])
            high = min(sizes[group] + step, self.tasks * self.channels[group])
            found.append(shares(mask) * self._slope(sizes, group, low, high))
        return found

    def _slope(self, sizes: list[int], group: int, low: int, high: int) -> float:
        if high == low:
            return 0.0
        ends = []
        for size in (low, high):
            moved = [*sizes[:group], size, *sizes[group + 1 :]]
            ends.append(sum(self._time(term, moved) for term in self.terms if group in _groups(term)))
        return max(ends[1] - ends[0], 0.0) / (high - low)

    def _times(self, sizes: Sequence[int]) -> list[float]:
        return [self._time(term, sizes) for term in self.terms]

    def _time(self, term: Term, sizes: Sequence[int]) -> float:
        cin, cout = term.cin.at(sizes), term.cout.at(sizes)
        key = (term, cin, cout)
        if key not in self._known:
            self._known[key] = (self._measured(term, cin, cout) + self.table.overhead_ms) * self._anchor
        return self._known[key]

    @property
    def _anchor(self) -> float:
        return self.table.anchors["merged"]

    def _measured(self, term: Term, cin: int, cout: int) -> float:
        step, conv = term.step, term.step.conv
        if conv is not None:
            groups = cin if _depthwise(conv) else conv.groups
            return self.table.conv_ms(conv.kernel, conv.stride, conv.out_hw, cin, cout, groups, conv.path)
        wider = cin / max(term.cin.at(self.channels), 1), cout / max(term.cout.at(self.channels), 1)
        return self.table.op_ms(step.op, round(step.elements_in * wider[0]), round(step.elements_out * wider[1]))

    def _skip_ms(self, skip: Skip, pattern: Pattern) -> float:
        cin, cout = live_values(pattern[skip.reads]), live_values(pattern[skip.makes])
        return (self.table.conv_ms((1, 1), 1, skip.out_hw, cin, cout) + self.table.overhead_ms) * self._anchor

    def _needed(self, pattern: Pattern) -> list[Skip]:
        return [skip for skip in self.skips if needs_conv(pattern[skip.reads], pattern[skip.makes])]


def _groups(term: Term) -> tuple[int, ...]:
    return (*term.cin.groups, *term.cout.groups)


def _depthwise(conv: Any) -> bool:
    return conv.groups == conv.cin == conv.cout > 1


def _skips(net: InterroGateNet, inside: Mapping[int, Inside], group: Mapping[int, int]) -> list[Skip]:
    found = []
    for step, one in inside.items():
        for source, value in one.apart:
            height, width = net.plan.shapes[value][2:]
            found.append(Skip(group[source], group[step], (height, width)))
    return found


def walk(model: ir.Model, rows: Mapping[str, int], precision: str) -> list[Term]:
    """Operators that run for the plain net's graph and whose widths gates decide.

    rows: path of a convolution of the backbone -> the group of gates that decides its output channels.
    """
    from ..compiler.executed import steps

    widths: dict[str, Width] = {}
    ends: dict[str, tuple[Width, Width, int, str]] = {}
    for node in model.graph:
        out = node.outputs[0]
        widths[str(out.name)] = cout = _width(node, widths, rows)
        first = node.inputs[0] if node.inputs else None
        cin = widths.get(str(first.name), Width(_channels(first))) if first is not None else cout
        weight = node.inputs[1] if node.op_type == "Conv" else None
        label = node.op_type if weight is None else str(weight.name).removesuffix(".weight")
        ends[str(node.name or out.name)] = (cin, cout, math.prod(_dims(out)), label)
    found = []
    for step in steps(model, precision):
        if step.name not in ends:
            continue
        cin, cout, size, label = ends[step.name]
        if step.conv is None and step.elements_in == step.elements_out == size:
            cin = cout  # bounds, casts and the like work on what the node makes
        if cin.groups or cout.groups:
            found.append(Term(step, cin, cout, label))
    return found


def _width(node: ir.Node, widths: Mapping[str, Width], rows: Mapping[str, int]) -> Width:
    """Width of what a node makes: a convolution's rows, a concatenation's sum, else of what comes in."""
    out = node.outputs[0]
    fixed = Width(_channels(out))
    if node.op_type in ("Conv", "ConvTranspose"):
        group = rows.get(str(node.inputs[1].name).removesuffix(".weight")) if node.inputs[1] is not None else None
        return fixed if group is None else Width(0, (group,))
    known = [(widths[str(value.name)], value) for value in node.inputs if value and str(value.name) in widths]
    if len(_dims(out)) != 4 or not known:
        return fixed
    if node.op_type == "Concat":
        return Width(sum(width.fixed for width, _ in known), tuple(g for width, _ in known for g in width.groups))
    same = [(width, value.producer()) for width, value in known if _channels(value) == fixed.fixed]
    made = [width for width, producer in same if producer is not None and producer.op_type == "Conv"]
    return (made or [width for width, _ in same] or [fixed])[0]


def _dims(value: ir.Value) -> tuple[int, ...]:
    from ..compiler.lanes import dims_or_none

    return tuple(dims_or_none(value) or ())


def _channels(value: ir.Value) -> int:
    dims = _dims(value)
    return dims[1] if len(dims) > 1 else 1


def _parts(model: ir.Model, prediction: Any, tasks: Sequence[str]) -> tuple[dict[str, float], float, str]:
    """Of the plain net: milliseconds of each task's head and of the rest, and its most costly layer as text."""
    owner: dict[str, str] = {}
    labels: dict[str, str] = {}
    for node in model.graph:
        names = [str(value.name) for value in node.inputs if value is not None]
        heads = [name.split(".")[1] for name in names if name.startswith("heads.")]
        task = next((name for name in (*heads, *(owner.get(name, "") for name in names)) if name in tasks), "")
        owner |= {str(value.name): task for value in node.outputs}
        owner[str(node.name)] = task
        labels[str(node.name)] = names[1].removesuffix(".weight") if node.op_type == "Conv" else str(node.name)
    times = dict.fromkeys(tasks, 0.0)
    layers: dict[str, float] = {}
    for layer in prediction.layers:
        if owner.get(layer.name):
            times[owner[layer.name]] += layer.ms
        layers[layer.name] = layers.get(layer.name, 0.0) + layer.ms
    name = max(layers, key=lambda key: layers[key])
    return times, prediction.ms - sum(times.values()), f"{labels.get(name, name)}, {layers[name]:.3g} ms"


def plain_graph(net: InterroGateNet) -> ir.Model:
    """The plain shared net of a gated one as the compiler's graph."""
    from ..compiler import graph
    from ..contract import Preprocess
    from .export import to_onnx

    height, width = net.plan.shapes[0][2:]
    backbone = copy.deepcopy(net.branches["shared"]).cpu()
    plain = PlainNet(backbone, net.tasks, torch.zeros(1, 3, height, width))
    return graph.load(to_onnx(plain, Preprocess(height, width)))
