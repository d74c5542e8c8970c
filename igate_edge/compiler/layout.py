"""The lowerings of a pruned graph: what each layer's live channels are written as.

merged: all versions of a layer are one dense convolution from one tensor [shared | own of task 1 | ... | own of task T]
to the next, with zero blocks; mixes are folded into its columns. split: one convolution a live version over slices,
branches that read the very same input stacked. Chosen per layer; a consumer sees a tensor and where in it each of its
numbers lies, so any two choices meet in the weights. Grouped convolutions other than depthwise ones are always split.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import InputError
from .channels import Channels, analyse
from .channelwise import Channelwise, foldable
from .emit import Constant, Emitter, Record, Tensor, attributes
from .families import Families, Versions, families
from .graph import meta
from .lanes import Fact, attribute, constant, name_of
from .lower import emit_flat, emit_groups, emit_mix, emit_rows
from .numbers import Ids

LOWERINGS = ("merged", "split")
MAX_PAD = 256


@dataclass(frozen=True)
class Laid:
    """A static model of the same outputs, and how it was laid out.

    report (JSON-able): `convs` {name: {op, rows, live}}, `dropped` branches, `barriers`, `gathers`, `mixes`, `whole`
    (grouped convolutions that kept dead rows), `sites` {name: {channels, open per task}}, `layers` {family: lowering},
    `skips` (1x1 convolutions that a skip or another channelwise operand needed), `padded` {convolution: zero rows}.
    origin: name of every tensor -> family of values of the plain net that it holds versions of; one INT8 scale each.
    """

    model: ir.Model
    report: dict[str, Any]
    origin: dict[str, str]


@dataclass(frozen=True)
class Layer:
    """A layer whose lowering can be chosen. name: its family; label: the first version's weight.

    versions: live ones; inputs, outputs: physical widths when merged. mergeable: False where versions depend on each
    other, and where there is one version only.
    """

    name: str
    label: str
    kind: str
    versions: int
    mergeable: bool
    inputs: int
    outputs: int


def lay_out(model: ir.Model, choice: str | Mapping[str, str] = "merged", pad: int = 1) -> Laid:
    """Prune and lay out any model of `graph.load`; equal to it up to float rounding (1e-5 of the outputs' maximum).

    choice: "merged", "split" or "merged:N" (output channels filled up with zeros to a multiple of N) for all layers,
    or one of these by family name (see `layers`), "merged" for those not named. pad: N where no other is asked for.
    Raises InputError for an unknown lowering or family.
    """
    return Layout(model, choice, pad).run()


def check_choice(choice: object) -> None:
    """Raise InputError for what is no choice for any model."""
    if not isinstance(choice, str | Mapping):
        raise InputError("a choice is a lowering or a table of them", f"got {choice!r:.60}", "pass {family: lowering}")
    if isinstance(choice, Mapping) and not all(isinstance(name, str) for name in choice):
        raise InputError("a choice names its layers", f"got {list(choice)!r:.60}", "pass {family: lowering}")
    for lowering in choice.values() if isinstance(choice, Mapping) else (choice,):
        _parse(lowering, 1)


def layers(model: ir.Model) -> list[Layer]:
    """The layers of a model whose lowering `lay_out` lets one choose, in order of execution."""
    return Layout(model, "merged", 1).layers()


class Layout:
    """One pass over a model. stack: whether split layers join branches that read the very same input."""

    def __init__(self, model: ir.Model, choice: str | Mapping[str, str], pad: int, *, stack: bool = True) -> None:
        check_choice(choice)
        if not isinstance(pad, int) or not 1 <= pad <= MAX_PAD:
            raise InputError("channels cannot be filled up to this", f"a multiple of {pad!r:.9}", f"use 1 to {MAX_PAD}")
        self.model, self.stack = model, stack
        self.families = families(model)
        self.home = {node: index for index, layer in enumerate(self.families.layers) for node in layer.nodes}
        self.modes, pads = _modes(self.families, choice, pad)
        # Versions in graph order, the shared one last: of its averages of mixes the parts are then known.
        place = {node: index for index, node in enumerate(model.graph)}
        nodes = [node for layer in self.families.layers for node in sorted(layer.nodes, key=place.__getitem__)]
        self.channels: Channels = analyse(model, nodes, self._folds)
        self.facts = {fact.node: fact for fact in self.channels.facts}
        exact = _exact(self.families, self.facts)
        self.pads = [1 if layer.name in exact else pads[i] for i, layer in enumerate(self.families.layers)]
        outputs = [name_of(value) for value in model.graph.outputs]
        self.out = Emitter(self.channels.numbers, outputs, self.families.of)
        self.channelwise = Channelwise(self.out)
        self.convs: dict[str, dict[str, Any]] = {}
        self.mixes: list[str] = []
        self.whole: list[str] = []
        self.written: list[tuple[Record, Tensor]] = []

    def run(self) -> Laid:
        inputs = []
        for value in self.model.graph.inputs:
            made = self.out.tensor(value, self.channels.ids[name_of(value)])
            made.name = name_of(value)
            inputs.append(made)
        for fact in self.channels.facts:
            if fact.kind == "lanes":
                self.channelwise.index(fact, self._used(fact))
        for index, layer in enumerate(self.families.layers):
            self._emit(index, layer)
        outputs: list[Tensor] = []
        for value in self.model.graph.outputs:
            outputs.append(self.out.output(self.channels.ids[name_of(value)], value, inputs, outputs))
        laid = self.out.build(inputs, outputs, self.model)
        about = meta(self.model)
        if about:
            laid.metadata_props["igate"] = json.dumps({**about, "pruned": True}, sort_keys=True)
        tensors = [*inputs, *(tensor for record in self.out.records for tensor in record.outputs)]
        return Laid(laid, self._report(about), {tensor.name: tensor.family for tensor in tensors})

    def layers(self) -> list[Layer]:
        """See the function of this name."""
        found = []
        for layer in self.families.layers:
            live = [(fact, used) for fact in map(self.facts.__getitem__, layer.nodes) if len(used := self._used(fact))]
            rows = [(fact, used) for fact, used in live if fact.kind == "rows"]
            if not rows:
                continue
            node = rows[0][0].node
            read = self._read([fact for fact, _ in rows])
            label = name_of(node.inputs[1]).removesuffix(".weight") if node.inputs[1] is not None else ""
            count = sum(len(used) for _, used in rows)
            mergeable = len(rows) > 1 and not layer.alone
            found.append(Layer(layer.name, label, node.op_type, len(rows), mergeable, read, count))
        return found

    def _read(self, facts: list[Fact]) -> int:
        numbers = self.channels.numbers
        terms = {atom for fact in facts for number in fact.operands[0].tolist() for atom in numbers.terms(number)}
        return len(terms - set(numbers.constants))

    def _report(self, about: dict[str, Any]) -> dict[str, Any]:
        sites = {
            site["name"]: {
                "channels": site["channels"],
                "open": {t: bits.count("1") for t, bits in site["open"].items()},
            }
            for site in about.get("sites", [])
        }
        padded = {record.name: int((made.numbers < 0).sum()) for record, made in self.written}
        return {
            "convs": self.convs,
            "dropped": [name for name, row in self.convs.items() if row["live"] == 0],
            "barriers": [list(pair) for pair in self.channels.barriers],
            "gathers": list(self.out.gathers),
            "mixes": self.mixes,
            "whole": self.whole,
            "sites": sites,
            "layers": {layer.name: self.modes[i] for i, layer in enumerate(self.families.layers) if _weighted(layer)},
            "skips": list(self.channelwise.skips),
            "padded": {name: count for name, count in padded.items() if count},
        }

    def _folds(self, fact: Fact) -> bool:
        """Whether a node takes a mix's terms: merged nodes do, and split ones that read a merged tensor."""
        index = self.home[fact.node]
        if fact.kind == "rows":
            return self.modes[index] == "merged" or self._reads_merged(index)
        return self.modes[index] == "merged" and foldable(fact)

    def _reads_merged(self, index: int) -> bool:
        nodes = self.families.layers[index].nodes
        makers = {value.producer() for node in nodes for value in node.inputs if value is not None}
        found = [self.modes[self.home[node]] for node in makers if node in self.home]
        return bool(found) and all(mode == "merged" for mode in found)

    def _used(self, fact: Fact) -> Ids:
        """Output positions that this node must make: born here and live."""
        return fact.fresh[self.channels.live[fact.ids[fact.fresh]]]

    def _emit(self, index: int, layer: Versions) -> None:
        facts = [self.facts[node] for node in layer.nodes]
        live = [(fact, self._used(fact)) for fact in facts]
        for fact, used in live:
            if fact.kind in ("rows", "groups"):
                key = fact.node.name or name_of(fact.node.outputs[0])
                self.convs[key] = {"op": fact.node.op_type, "rows": len(fact.ids), "live": len(used)}
            elif fact.kind == "barrier":
                self._barrier(fact)
        live = [(fact, used) for fact, used in live if len(used)]
        rows = [(fact, used) for fact, used in live if fact.kind == "rows"]
        if self.modes[index] == "merged":
            together = [(fact, used) for fact, used in live if foldable(fact)]
            self.channelwise.merged(together)
            if rows:
                self.written.append(emit_rows(self.out, rows, fold=True, whole=True, pad=self.pads[index]))
            live = [(fact, used) for fact, used in live if fact.kind != "rows" and not foldable(fact)]
        else:
            for versions in self._stacks(layer, rows):
                self.written.append(emit_rows(self.out, versions, fold=self._reads_merged(index)))
            live = [(fact, used) for fact, used in live if fact.kind != "rows"]
        for fact, used in live:
            self._alone(fact, self._in_order(fact, used))

    def _in_order(self, fact: Fact, used: Ids) -> Ids:
        order = self.channels.order.get(name_of(fact.node.outputs[0]))
        return used if order is None else used[np.argsort(order[used], kind="stable")]

    def _stacks(self, layer: Versions, rows: list[tuple[Fact, Ids]]) -> list[list[tuple[Fact, Ids]]]:
        """Versions that are written as one convolution: those that read the same numbers, unless a sum follows, whose
        operands must be tensors of their own."""
        found: dict[Any, list[tuple[Fact, Ids]]] = {}
        followers = [self.facts[use.node] for node in layer.nodes for use in node.outputs[0].uses()]
        apart = not self.stack or any(fact.kind == "lanes" and len(fact.operands) > 1 for fact in followers)
        for number, (fact, used) in enumerate(rows):
            key = number if apart else fact.operands.tobytes()
            found.setdefault(key, []).append((fact, self._in_order(fact, used)))
        return list(found.values())

    def _alone(self, fact: Fact, used: Ids) -> None:
        if fact.kind == "lanes":
            self.channelwise.split(fact, used)
        elif fact.kind == "groups":
            self.whole += emit_groups(self.out, fact, used)
        elif fact.kind == "mix":
            self.mixes += emit_mix(self.out, fact, used)
        elif fact.kind == "flat":
            emit_flat(self.out, fact, used)

    def _barrier(self, fact: Fact) -> None:
        node, ids = fact.node, self.channels.ids
        if not any(self.channels.live[ids[name_of(value)]].any() for value in node.outputs):
            return
        inputs: list[Tensor | Constant | None] = []
        for value in node.inputs:
            array = constant(value)
            if value is None:
                inputs.append(None)
            elif array is not None:
                inputs.append(self.out.shared(name_of(value), array))
            else:
                inputs.append(self.out.read(ids[name_of(value)], name_of(value), value))
        made = [self.out.tensor(value, ids[name_of(value)]) for value in node.outputs]
        name = self.out.name(f"node:{node.name or made[0].name}")[5:]
        self.out.records.append(Record(node.op_type, name, inputs, made, attributes(node), node.domain))


def _weighted(layer: Versions) -> bool:
    """Whether every output of the layer reads all its inputs; a grouped convolution follows what it reads."""
    node = layer.nodes[0]
    return node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and attribute(node, "group", 1) == 1


def _modes(found: Families, choice: str | Mapping[str, str], pad: int) -> tuple[list[str], list[int]]:
    """Lowering and padding of every layer. One without a choice of its own follows the convolutions that it reads, else
    whatever it reads; where that is the image alone, the layers' common lowering.
    """
    known = {layer.name for layer in found.layers if _weighted(layer)}
    asked = {name: _parse(choice, pad) for name in known} if isinstance(choice, str) else _by_name(choice, known, pad)
    common = "merged" if any(mode == "merged" for mode, _ in asked.values()) else "split"
    home = {name_of(v): i for i, layer in enumerate(found.layers) for node in layer.nodes for v in node.outputs}
    modes: list[str] = []
    pads = [1] * len(found.layers)
    for index, layer in enumerate(found.layers):
        if layer.alone:
            modes.append("split")
        elif _weighted(layer):
            mode, pads[index] = asked[layer.name]
            modes.append(mode)
        else:
            read = {home[v.name] for node in layer.nodes for v in node.inputs if v is not None and v.name in home}
            read.discard(index)
            convs = {i for i in read if _weighted(found.layers[i])}
            seen = {modes[i] for i in convs or read}
            modes.append(common if not seen else "merged" if seen == {"merged"} else "split")
    return modes, pads


def _parse(text: object, pad: int) -> tuple[str, int]:
    lowering, _, count = str(text).partition(":")
    step = int(count) if count.isdecimal() and len(count) <= len(str(MAX_PAD)) else 0
    if lowering not in LOWERINGS or (":" in str(text) and (lowering != "merged" or not 1 <= step <= MAX_PAD)):
        raise InputError(f"unknown lowering {text!r:.60}", "known: merged, merged:N, split", "use one of these")
    return lowering, step or (pad if lowering == "merged" else 1)


def _by_name(choice: Mapping[str, str], known: set[str], pad: int) -> dict[str, tuple[str, int]]:
    strange = sorted(set(choice) - known)
    if strange:
        evidence = f"{', '.join(strange[:3])}; known: {', '.join(sorted(known)[:5])}"
        raise InputError("no layer of this name", evidence, "take the names from compiler.layout.layers")
    return {name: _parse(choice.get(name, "merged"), pad) for name in known}


def _exact(found: Families, facts: Mapping[ir.Node, Fact]) -> set[str]:
    """Families whose tensors somebody reads as they are, so that no channel of zeros may be among theirs."""
    exact: set[str] = set()
    for layer in reversed(found.layers):
        for node in layer.nodes:
            fact = facts[node]
            if any(value.is_graph_output() for value in node.outputs):
                exact.add(layer.name)
            strict = fact.kind == "barrier" or (fact.kind == "groups" and not foldable(fact))
            if strict or (fact.kind in ("lanes", "view", "mix") and layer.name in exact):
                exact.update(found.of[v.name] for v in node.inputs if v is not None and v.name in found.of)
    return exact
