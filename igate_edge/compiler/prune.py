"""Gated graph -> static graph: dead filters, empty branches, selects and needless mixes are gone; the outputs are the
same.

Every number (see `channels`) that is live gets one physical channel, in the node that first makes it. Nodes are
written in their original order, so the pass is deterministic; the model given is not altered.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from .channels import Channels, analyse
from .emit import Constant, Emitter, Record, Tensor, attributes
from .graph import meta
from .lanes import Fact, constant, name_of
from .lower import emit_flat, emit_groups, emit_mix, emit_rows
from .masks import close_all, keep_outputs, set_masks
from .numbers import Ids

__all__ = ["Pruned", "close_all", "keep_outputs", "prune", "set_masks"]


@dataclass(frozen=True)
class Pruned:
    """The static model, and what was done (JSON-able): `convs` {name: {op, rows, live}}, `dropped` branches,
    `barriers`, `gathers`, `mixes`, `whole` (grouped convolutions that kept dead rows), `sites` {name: {channels,
    open per task}}.
    """

    model: ir.Model
    report: dict[str, Any]


def prune(model: ir.Model) -> Pruned:
    """Remove what no output depends on, channel by channel; equal to `model` up to float rounding (1e-5 of the
    outputs' maximum).

    Takes any model of `graph.load`, gated or not; a second pass changes nothing.
    """
    work = _Pruning(model, analyse(model))
    return work.run()


@dataclass
class _Lanes:
    """All live results of one channelwise operation, over all nodes that compute it."""

    reads: list[np.ndarray] = field(default_factory=list)  # [k, n]
    results: list[Ids] = field(default_factory=list)
    places: list[Ids] = field(default_factory=list)  # channel in the node's own parameters

    def gather(self) -> tuple[np.ndarray, Ids, Ids]:
        if len(self.results) > 1:
            self.reads, self.results = [np.concatenate(self.reads, axis=1)], [np.concatenate(self.results)]
            self.places = [np.concatenate(self.places)]
        return self.reads[0], self.results[0], self.places[0]


class _Pruning:
    def __init__(self, model: ir.Model, channels: Channels) -> None:
        self.model, self.channels = model, channels
        self.out = Emitter(channels.numbers, [name_of(value) for value in model.graph.outputs])
        self.lanes: dict[Any, _Lanes] = {}
        self.convs: dict[str, dict[str, Any]] = {}
        self.mixes: list[str] = []
        self.whole: list[str] = []

    def run(self) -> Pruned:
        inputs = []
        for value in self.model.graph.inputs:
            made = self.out.tensor(value, self.channels.ids[name_of(value)])
            made.name = name_of(value)
            inputs.append(made)
        for fact in self.channels.facts:
            if fact.kind == "lanes":
                self._index(fact)
        for fact in self.channels.facts:
            self._emit(fact)
        outputs: list[Tensor] = []
        for value in self.model.graph.outputs:
            outputs.append(self.out.output(self.channels.ids[name_of(value)], value, inputs, outputs))
        pruned = self.out.build(inputs, outputs, self.model)
        about = meta(self.model)
        if about:
            pruned.metadata_props["igate"] = json.dumps({**about, "pruned": True}, sort_keys=True)
        return Pruned(pruned, self._report(about))

    def _report(self, about: dict[str, Any]) -> dict[str, Any]:
        sites = {
            site["name"]: {
                "channels": site["channels"],
                "open": {t: bits.count("1") for t, bits in site["open"].items()},
            }
            for site in about.get("sites", [])
        }
        return {
            "convs": self.convs,
            "dropped": [name for name, row in self.convs.items() if row["live"] == 0],
            "barriers": [list(pair) for pair in self.channels.barriers],
            "gathers": list(self.out.gathers),
            "mixes": self.mixes,
            "whole": self.whole,
            "sites": sites,
        }

    def _used(self, fact: Fact) -> Ids:
        """Output positions that this node must make: born here and live."""
        return fact.fresh[self.channels.live[fact.ids[fact.fresh]]]

    def _index(self, fact: Fact) -> None:
        used = self._used(fact)
        if len(used):
            group = self.lanes.setdefault(fact.space, _Lanes())
            group.reads.append(fact.operands[:, used])
            group.results.append(fact.ids[used])
            group.places.append(used)

    def _emit(self, fact: Fact) -> None:
        used = self._used(fact)
        order = self.channels.order.get(name_of(fact.node.outputs[0]))
        if order is not None and len(used):
            used = used[np.argsort(order[used], kind="stable")]
        if fact.kind in ("rows", "groups"):
            key = fact.node.name or name_of(fact.node.outputs[0])
            self.convs[key] = {"op": fact.node.op_type, "rows": len(fact.ids), "live": len(used)}
        if fact.kind == "barrier":
            self._barrier(fact)
        elif len(used) == 0:
            return
        elif fact.kind == "lanes":
            self._lanes(fact, used)
        elif fact.kind == "rows":
            emit_rows(self.out, fact, used)
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

    # --- channelwise nodes ---

    def _lanes(self, fact: Fact, used: Ids) -> None:
        """Write a channelwise node, once for every group of operand tensors where that needs no slicing, else once
        over a gathered operand. Results of later nodes over the same tensors are made here too: shared channels
        are computed once.
        """
        home = self.out.home
        pending = used[home[fact.ids[used]] < 0]
        if len(pending) == 0:
            return
        reads, results, places = self.lanes[fact.space].gather()
        open_ = home[results] < 0
        groups = []
        for key in dict.fromkeys(map(tuple, home[fact.operands[:, pending]].T.tolist())):
            same = np.array(key)[:, None]
            if min(key) >= 0:
                members = np.flatnonzero(open_ & (home[reads] == same).all(axis=0))
                groups.append((key, reads[:, members], results[members], places[members]))
            else:  # constants have no home, and neither have maps that are still to come
                own = pending[(home[fact.operands[:, pending]] == same).all(axis=0)]
                groups.append((key, fact.operands[:, own], fact.ids[own], own))
        if len(fact.operands) == 1 or all(self._clean(key, rows) for key, rows, _, _ in groups):
            for _, rows, made, at in groups:
                self._lane(fact, rows, made, at)
        else:
            self._lane(fact, fact.operands[:, pending], fact.ids[pending], pending)

    def _clean(self, key: tuple[int, ...], reads: np.ndarray) -> bool:
        """Whether every operand is one whole tensor."""
        return all(
            home >= 0 and len(row) == len(self.out.tensors[home].numbers) == len(np.unique(row))
            for home, row in zip(key, reads, strict=True)
        )

    def _lane(self, fact: Fact, reads: np.ndarray, results: Ids, places: Ids) -> None:
        """One channelwise node. An operand that cannot be re-ordered for nothing gives the order; the others follow."""
        lead = next((row for row, ids in enumerate(reads) if not self._pliable(ids)), 0)
        order = self.out.arrange(reads[lead])
        reads, results, places = reads[:, order], results[order], places[order]
        inputs: list[Tensor | Constant | None] = []
        for slot, value in zip(fact.slots, fact.node.inputs, strict=True):
            if slot.kind == "none" or value is None:
                inputs.append(None)
                continue
            array, name = slot.array, name_of(value)
            if slot.kind in ("map", "one"):
                wanted = reads[slot.operand] if slot.kind == "map" else reads[slot.operand][:1]
                held = self.out.tensors[self.out.home[wanted[0]]] if self.out.home[wanted[0]] >= 0 else None
                if held is not None:
                    self.out.reorder(held, wanted)
                inputs.append(self.out.read(wanted, name, value))
                continue
            assert array is not None
            if slot.kind == "shared":
                inputs.append(self.out.shared(name, array))
            elif slot.kind == "each":
                inputs.append(self.out.constant(name, np.take(array, places, axis=slot.axis)))
            else:
                sizes = array.astype(np.int64).copy()
                sizes[slot.axis] = len(results)
                inputs.append(self.out.constant(name, sizes))
        made = self.out.tensor(fact.node.outputs[0], results)
        self.out.node(fact.node.op_type, inputs, made, fact.node.name or made.name, attributes(fact.node))

    def _pliable(self, ids: Ids) -> bool:
        home = int(self.out.home[ids[0]])
        if home < 0:
            return bool(self.channels.numbers.is_constant(ids).all())
        held = self.out.tensors[home]
        return held.free and np.array_equal(np.sort(held.numbers), np.sort(ids))
