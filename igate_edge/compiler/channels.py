"""Where every channel comes from (provenance) and who needs it (liveness).

Provenance is value numbering at channel granularity: a select with a constant mask picks numbers, equal operations on
equal numbers get equal numbers, and a mix of one and the same map is that map. Liveness runs backwards from the
outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from .lanes import Fact, Scope, dims_or_none, is_constant, name_of
from .numbers import ONE, Ids, Numbers
from .rules import apply, channel_mask


@dataclass(frozen=True)
class Channels:
    """Result of `analyse`. `ids`: numbers of every value's channels; `facts`: one a node, in the order of the walk;
    `live`: bool per number; `order`: physical rank of every channel of a value, so that channels selected together lie
    together.
    """

    numbers: Numbers
    ids: dict[str, Ids]
    facts: list[Fact]
    live: np.ndarray
    order: dict[str, Ids]

    @property
    def barriers(self) -> list[tuple[str, str]]:
        """(operator, node name) of every node that the analysis does not understand."""
        return [
            (
                f"{fact.node.domain}::{fact.node.op_type}" if fact.node.domain else fact.node.op_type,
                fact.node.name or "",
            )
            for fact in self.facts
            if fact.kind == "barrier"
        ]


def analyse(
    model: ir.Model, nodes: Sequence[ir.Node] | None = None, folds: Callable[[Fact], bool] = lambda fact: False
) -> Channels:
    """Provenance, liveness and physical order of all channels of a model of `graph.load`, which is not altered.

    nodes: the graph's nodes in another order of execution. folds: whether a node takes a mix's terms instead of the
    mix, so that the mix itself need not be made for it.
    """
    graph, numbers = model.graph, Numbers()
    scope = Scope(numbers, graph.opset_imports.get("", 18))
    for value in graph.inputs:
        shape = dims_or_none(value)
        scope.ids[name_of(value)] = numbers.new(shape[1] if len(shape) >= 2 else 1)
    walk = graph if nodes is None else nodes
    facts = [apply(scope, node) for node in walk if node.op_type != "Constant"]
    live = _live(model, scope, facts, folds)
    return Channels(numbers, scope.ids, facts, live, _Orders(model, scope, facts).ranks())


def _live(model: ir.Model, scope: Scope, facts: list[Fact], folds: Callable[[Fact], bool]) -> np.ndarray:
    """Numbers that some output depends on. Operands are older than results, so one backward pass is enough."""
    live = np.zeros(scope.numbers.count, bool)
    for output in model.graph.outputs:
        if not is_constant(output):
            _need(live, scope.numbers, scope.ids[name_of(output)])
    for fact in reversed(facts):
        if fact.kind == "barrier":
            made = [scope.ids[name_of(value)] for value in fact.node.outputs]
            if any(live[ids].any() for ids in made):
                _need(live, scope.numbers, fact.operands)
            continue
        used = fact.fresh[live[fact.ids[fact.fresh]]]
        if len(used) == 0:
            continue
        if fact.kind == "mix":
            _need(live, scope.numbers, fact.ids[used])
        elif fact.kind == "rows":
            _need(live, scope.numbers, fact.operands, folds(fact))
        else:
            _need(live, scope.numbers, fact.operands[:, used], folds(fact))
    live[ONE] = False
    return live


def _need(live: np.ndarray, numbers: Numbers, ids: Ids, folded: bool = False) -> None:
    """Mark numbers live; a linear form also needs its atoms, or, folded, these alone."""
    for number in np.unique(ids).tolist():
        form = numbers.forms.get(number, ())
        if not folded or not form:
            live[number] = True
        if folded or number not in numbers.composed:
            for atom, _ in form:
                live[atom] = True


@dataclass
class _Orders:
    """Groups values whose channels meet one to one (a residual stage); sorts a group's channels by its selects."""

    model: ir.Model
    scope: Scope
    facts: list[Fact]
    parent: dict[str, str] = field(default_factory=dict)
    masks: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def _find(self, name: str) -> str:
        while self.parent.setdefault(name, name) != name:
            self.parent[name] = self.parent[self.parent[name]]
            name = self.parent[name]
        return name

    def _join(self, node: ir.Node) -> None:
        out = name_of(node.outputs[0])
        for value in node.inputs:
            if value is None or is_constant(value):
                continue
            if len(self.scope.ids[name_of(value)]) == len(self.scope.ids[out]):
                self.parent[self._find(name_of(value))] = self._find(out)

    def ranks(self) -> dict[str, Ids]:
        pinned = [name_of(value) for value in self.model.graph.outputs]
        found: list[tuple[str, np.ndarray]] = []
        for fact in self.facts:
            node = fact.node
            if fact.kind == "barrier":
                pinned += [name_of(value) for value in node.inputs if value is not None]
            elif fact.kind in ("lanes", "mix") or (
                fact.kind == "view" and node.op_type in ("Where", "Mul", "Add", "Identity")
            ):
                self._join(node)
                mask = channel_mask(node)
                if mask is not None:
                    found.append((name_of(node.outputs[0]), mask))
            elif fact.kind == "groups" and fact.weight is not None and fact.space == len(fact.weight):
                self._join(node)
        for name, mask in found:
            self.masks.setdefault(self._find(name), []).append(mask)
        fixed = {self._find(name) for name in pinned}
        table: dict[str, Ids] = {}
        for root, masks in self.masks.items():
            if root not in fixed:
                table[root] = _rank(np.unique(np.stack(masks), axis=0, return_index=True)[1], np.stack(masks))
        return {name: table[root] for name in self.scope.ids if (root := self._find(name)) in table}


def _rank(first: np.ndarray, masks: np.ndarray) -> Ids:
    """Rank of each channel when sorted, stably, by its gates in Gray order: neighbours differ in few gates."""
    bits = masks[np.sort(first)].astype(np.int64)
    keys = np.cumsum(bits, axis=0) % 2
    order = np.lexsort(keys[::-1])
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return ranks
