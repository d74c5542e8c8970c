"""Writing channelwise operations (activations, sums, poolings, depthwise convolutions) over the channels that are left.

Two ways. Split: a node for every group of operand tensors, over slices where that must be. Merged: a node for all
versions, over whole tensors; an operand that is not one (a mix, a channel that two versions read) is made by one 1x1
convolution, the node's name with ".skip".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from .emit import Constant, Emitter, Tensor, attributes, group_attributes
from .lanes import Fact, Slot, dims_or_none, name_of
from .lower import emit_sum
from .numbers import Ids

Source = tuple[Fact, int]  # a version of the node, and a channel of its own parameters


@dataclass
class _Results:
    """All live results of one channelwise operation, over all nodes that compute it."""

    reads: list[np.ndarray] = field(default_factory=list)  # [k, n]
    results: list[Ids] = field(default_factory=list)
    places: list[Ids] = field(default_factory=list)  # channel in the node's own parameters

    def gather(self) -> tuple[np.ndarray, Ids, Ids]:
        if len(self.results) > 1:
            self.reads, self.results = [np.concatenate(self.reads, axis=1)], [np.concatenate(self.results)]
            self.places = [np.concatenate(self.places)]
        return self.reads[0], self.results[0], self.places[0]


def foldable(fact: Fact) -> bool:
    """Whether the merged way can make any operand of this node with a 1x1 convolution."""
    like = fact.node.inputs[0]
    if like is None or like.dtype != ir.DataType.FLOAT or fact.node.outputs[0].dtype != ir.DataType.FLOAT:
        return False
    if fact.kind == "groups":
        return len(fact.operands) == 1 and fact.weight is not None and len(fact.weight) == fact.space
    if fact.kind != "lanes" or any(slot.kind == "one" for slot in fact.slots):
        return False
    maps = [v for v, s in zip(fact.node.inputs, fact.slots, strict=True) if s.kind == "map" and v is not None]
    return all(len(dims_or_none(value)) == 4 and value.dtype == ir.DataType.FLOAT for value in maps)


class Channelwise:
    """The channelwise nodes of one graph. `skips`: names of the 1x1 convolutions that operands needed."""

    def __init__(self, out: Emitter) -> None:
        self.out = out
        self.skips: list[str] = []
        self._results: dict[Any, _Results] = {}
        self._sums: dict[Any, Tensor] = {}

    def index(self, fact: Fact, used: Ids) -> None:
        """Make a node's live results known before anything is written: later nodes may be written with earlier ones."""
        if len(used):
            group = self._results.setdefault(fact.space, _Results())
            group.reads.append(fact.operands[:, used])
            group.results.append(fact.ids[used])
            group.places.append(used)

    # --- split ---

    def split(self, fact: Fact, used: Ids) -> None:
        """Write a channelwise node, once for every group of operand tensors where that needs no slicing, else once
        over a gathered operand. Results of later nodes over the same tensors are made here too: shared channels
        are computed once.
        """
        home = self.out.home
        pending = used[home[fact.ids[used]] < 0]
        if len(pending) == 0:
            return
        reads, results, places = self._results[fact.space].gather()
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
                self._gathered(fact, rows, made, at)
        else:
            self._gathered(fact, fact.operands[:, pending], fact.ids[pending], pending)

    def _clean(self, key: tuple[int, ...], reads: np.ndarray) -> bool:
        """Whether every operand is one whole tensor."""
        return all(
            home >= 0 and len(row) == len(self.out.tensors[home].numbers) == len(np.unique(row))
            for home, row in zip(key, reads, strict=True)
        )

    def _gathered(self, fact: Fact, reads: np.ndarray, results: Ids, places: Ids) -> None:
        """One channelwise node. An operand that cannot be re-ordered for nothing gives the order; the others follow."""
        lead = next((row for row, ids in enumerate(reads) if not self._pliable(ids)), 0)
        order = self.out.arrange(reads[lead])
        reads, results, places = reads[:, order], results[order], places[order]
        operands: list[Tensor] = []
        for slot, value in _operands(fact):
            wanted = reads[slot.operand] if slot.kind == "map" else reads[slot.operand][:1]
            held = self.out.tensors[self.out.home[wanted[0]]] if self.out.home[wanted[0]] >= 0 else None
            if held is not None:
                self.out.reorder(held, wanted)
            operands.append(self.out.read(wanted, name_of(value), value))
        self._node(fact, operands, results, [(fact, int(place)) for place in places])

    def _pliable(self, ids: Ids) -> bool:
        home = int(self.out.home[ids[0]])
        if home < 0:
            return bool(self.out.numbers.is_constant(ids).all())
        held = self.out.tensors[home]
        return held.free and np.array_equal(np.sort(held.numbers), np.sort(ids))

    # --- merged ---

    def merged(self, versions: list[tuple[Fact, Ids]]) -> None:
        """Write all versions of a channelwise node as one, whatever its operands are."""
        by_space: dict[Any, list[tuple[Fact, Ids]]] = {}
        for fact, used in versions:
            pending = used[self.out.home[fact.ids[used]] < 0]
            if len(pending):
                by_space.setdefault(fact.space[0] if fact.kind == "lanes" else fact.kind, []).append((fact, pending))
        for members in by_space.values():
            fact = members[0][0]
            reads = np.concatenate([item.operands[:, at] for item, at in members], axis=1)
            results = np.concatenate([item.ids[at] for item, at in members])
            source = [(item, int(place)) for item, at in members for place in at]
            if len(reads) > 1:
                self._in_step(fact, reads, results, source)
            else:
                self._one_operand(fact, reads[0], results, source)

    def _one_operand(self, fact: Fact, reads: Ids, results: Ids, source: list[Source]) -> None:
        home = self.out.home
        _, value = _operands(fact)[0]
        if (home[reads] < 0).any() or len(np.unique(reads)) < len(reads):
            held = self._sum(reads, value, fact)
            self._node(fact, [held], results, source)
            return
        for index in dict.fromkeys(home[reads].tolist()):
            held = self.out.tensors[index]
            held.free = False
            here = np.flatnonzero(home[reads] == index)
            made = np.full(len(held.numbers), -1, np.int64)
            made[self.out.place[reads[here]]] = results[here]
            if not any(slot.kind == "each" for slot in fact.slots) and fact.kind == "lanes":
                # Nodes of other families that do the same to other channels of this tensor need not do it again.
                others, theirs, _ = self._results[fact.space].gather()
                also = np.flatnonzero((home[others[0]] == index) & (home[theirs] < 0))
                made[self.out.place[others[0][also]]] = theirs[also]
            by_channel: list[Source | None] = [None] * len(made)
            for item in here.tolist():
                by_channel[int(self.out.place[reads[item]])] = source[item]
            self._node(fact, [held], made, by_channel)

    def _in_step(self, fact: Fact, reads: np.ndarray, results: Ids, source: list[Source]) -> None:
        """Several operands: one that is a whole tensor and fixed leads, the others follow or are made to."""
        tensors = [self._tensor(row) for row in reads]
        free = [held is not None and self._exactly(held, row) for held, row in zip(tensors, reads, strict=True)]
        leads = [row for row, held in enumerate(tensors) if held is not None and not free[row] and _near(held, results)]
        leads += [row for row, movable in enumerate(free) if movable]
        at = np.arange(len(results))
        count = len(results)
        if leads:
            lead = tensors[leads[0]]
            assert lead is not None
            at, count = self.out.place[reads[leads[0]]], len(lead.numbers)
        made = np.full(count, -1, np.int64)
        made[at] = results
        by_channel: list[Source | None] = [None] * count
        for item, channel in enumerate(at.tolist()):
            by_channel[channel] = source[item]
        operands = []
        for slot, value in _operands(fact):
            wanted = np.full(count, -1, np.int64)
            wanted[at] = reads[slot.operand]
            held = tensors[slot.operand]
            # A fixed tensor may hold others where nothing is wanted: the result there is read by nobody.
            fits = held is not None and len(held.numbers) == count and bool((held.numbers[at] == wanted[at]).all())
            if held is None or not (fits or (free[slot.operand] and self.out.reorder(held, wanted))):
                held = self._sum(wanted, value, fact)
            held.free = False
            operands.append(held)
        self._node(fact, operands, made, by_channel)

    def _tensor(self, reads: Ids) -> Tensor | None:
        """The one tensor in which all of these live, each once; None if there is none."""
        homes = self.out.home[reads]
        single = homes[0] >= 0 and (homes == homes[0]).all() and len(np.unique(reads)) == len(reads)
        return self.out.tensors[int(homes[0])] if single else None

    def _exactly(self, held: Tensor, reads: Ids) -> bool:
        return held.free and int((held.numbers >= 0).sum()) == len(reads)

    def _sum(self, numbers: Ids, value: ir.Value, fact: Fact) -> Tensor:
        key = (numbers.tobytes(), dims_or_none(value)[2:])
        if key not in self._sums:
            base = fact.node.name or name_of(fact.node.outputs[0])
            name = f"{base}.skip"
            while name in self.skips:
                name = f"{name.removesuffix('.skip')}.{len(self.skips)}.skip"
            self._sums[key] = emit_sum(self.out, numbers, value, name)
            self.skips.append(name)
        return self._sums[key]

    # --- both ---

    def _node(self, fact: Fact, operands: list[Tensor], results: Ids, source: Sequence[Source | None]) -> None:
        """The node over operands that are in step; source: whose parameters every channel takes."""
        node, inputs = fact.node, list[Tensor | Constant | None]()
        if fact.kind == "groups":
            self._depthwise(fact, operands[0], results, source)
            return
        given = iter(operands)
        for index, (slot, value) in enumerate(zip(fact.slots, node.inputs, strict=True)):
            if slot.kind == "none" or value is None:
                inputs.append(None)
            elif slot.kind in ("map", "one"):
                inputs.append(next(given))
            elif slot.kind == "shared":
                assert slot.array is not None
                inputs.append(self.out.shared(name_of(value), slot.array))
            elif slot.kind == "each":
                inputs.append(self.out.constant(name_of(value), _each(fact, index, slot.axis, source)))
            else:
                assert slot.array is not None
                sizes = slot.array.astype(np.int64).copy()
                sizes[slot.axis] = len(results)
                inputs.append(self.out.constant(name_of(value), sizes))
        made = self.out.tensor(node.outputs[0], results)
        self.out.node(node.op_type, inputs, made, node.name or made.name, attributes(node))

    def _depthwise(self, fact: Fact, held: Tensor, results: Ids, source: Sequence[Source | None]) -> None:
        node, weight, given = fact.node, fact.weight, fact.node.inputs[1]
        assert weight is not None and given is not None
        picked = np.zeros((len(results), *weight.shape[1:]), weight.dtype)
        bias = np.zeros(len(results), weight.dtype)
        biased = False
        for channel, item in enumerate(source):
            if item is not None:
                version, row = item
                assert version.weight is not None
                picked[channel] = version.weight[row]
                if version.bias is not None:
                    bias[channel], biased = version.bias[row], True
        made = self.out.tensor(node.outputs[0], results)
        inputs: list[Tensor | Constant | None] = [held, self.out.constant(name_of(given), picked)]
        if biased:
            extra = node.inputs[2] if len(node.inputs) > 2 else None
            base = f"{name_of(given)}.bias" if extra is None else name_of(extra)
            inputs.append(self.out.constant(base, bias))
        self.out.node("Conv", inputs, made, node.name or made.name, group_attributes(node, len(results)))


def _near(held: Tensor, results: Ids) -> bool:
    """Whether a tensor is worth keeping for these results: at most a quarter more, or nothing else but zeros."""
    return len(held.numbers) <= len(results) + len(results) // 4 or int((held.numbers >= 0).sum()) == len(results)


def _operands(fact: Fact) -> list[tuple[Slot, ir.Value]]:
    """The inputs that are maps: their slot and the original value."""
    if fact.kind == "groups":
        first = fact.node.inputs[0]
        assert first is not None
        return [(Slot("map", 0), first)]
    pairs = zip(fact.slots, fact.node.inputs, strict=True)
    return [(slot, value) for slot, value in pairs if slot.operand >= 0 and value is not None]


def _each(fact: Fact, index: int, axis: int, source: Sequence[Source | None]) -> np.ndarray:
    """A parameter of one entry a channel; channels that nobody reads take any."""
    spare = next(item for item in source if item is not None)
    pieces = []
    for version, place in (item or spare for item in source):
        array = version.slots[index].array
        assert array is not None
        pieces.append(np.take(array, [place], axis=axis))
    return np.concatenate(pieces, axis=axis)
