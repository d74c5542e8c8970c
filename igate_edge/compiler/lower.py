"""Writing convolutions, matrices, mixes and flattens over the channels that are left."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from .emit import Constant, Emitter, Record, Tensor, attributes, group_attributes
from .groups import SUM
from .lanes import Fact, attribute, dims, name_of, pixels
from .numbers import ONE, Ids

BLOCKS = "igate.blocks"  # metadata of a convolution of several versions: see _blocks


@dataclass(frozen=True)
class Part:
    """The rows `used` of one version of a layer; `spread`: what its columns read."""

    fact: Fact
    used: Ids
    spread: Spread


@dataclass(frozen=True)
class Spread:
    """A list of numbers as terms: `at[i]` reads the atom `atoms[i]` once; `mixed[i]` reads the form `forms[i]`.

    fixed [n]: what each number adds as a constant.
    """

    at: Ids
    atoms: Ids
    mixed: Ids
    forms: tuple[dict[int, float], ...]
    fixed: np.ndarray

    @property
    def wanted(self) -> Ids:
        """All atoms, once each, in ascending order."""
        return np.unique([*self.atoms.tolist(), *(atom for form in self.forms for atom in form)]).astype(np.int64)


def spread(out: Emitter, ids: Ids, fold: bool) -> Spread:
    """The terms of `ids`; without `fold` a mix is an atom like any other."""
    known = out.numbers.is_constant(ids)
    fixed = np.zeros(len(ids))
    fixed[known] = out.numbers.values(ids[known])
    held = {int(n): dict(out.numbers.forms[n]) for n in ids[~known].tolist() if n in out.numbers.forms} if fold else {}
    mixed = np.array([i for i in np.flatnonzero(~known) if int(ids[i]) in held], np.int64)
    for place in mixed.tolist():
        fixed[place] = held[int(ids[place])].get(ONE, 0.0)
    forms = tuple({a: w for a, w in held[int(ids[place])].items() if a != ONE} for place in mixed.tolist())
    at = np.setdiff1d(np.flatnonzero(~known), mixed)
    return Spread(at, ids[at], mixed, forms, fixed)


def emit_rows(
    out: Emitter, versions: list[tuple[Fact, Ids]], *, fold: bool = False, whole: bool = False, pad: int = 1
) -> tuple[Record, Tensor]:
    """One dense convolution or matrix: the live rows of all `versions`, one below the other, over the columns of one
    input tensor. fold: mixes become columns; whole: see `Emitter.columns`; pad: rows are filled up to a multiple.
    """
    parts = [Part(fact, used, spread(out, fact.operands[0], fold)) for fact, used in versions]
    fact = parts[0].fact
    node, weight, source, first = fact.node, fact.weight, fact.node.inputs[1], fact.node.inputs[0]
    assert weight is not None and source is not None and first is not None
    convolution = node.op_type.startswith("Conv")
    padded = node.op_type == "ConvTranspose" or any(attribute(node, "pads", ())) or "auto_pad" in node.attributes
    fixed = any(part.spread.fixed.any() for part in parts)
    apart = fixed and convolution and padded
    wanted = np.unique(np.concatenate([part.spread.wanted for part in parts]))
    if apart or len(wanted) == 0:
        # A constant differs from its zero padding: one channel of ones carries all constants of this convolution.
        wanted = np.append(wanted, ONE)
    held = out.columns(wanted, name_of(first), first, whole=whole)
    numbers = np.concatenate([part.fact.ids[part.used] for part in parts])
    numbers = np.append(numbers, np.full(-len(numbers) % pad, -1, np.int64))
    made = out.tensor(node.outputs[0], numbers, free=True)

    def matrix() -> np.ndarray:
        picked = _stack(parts, held, made, apart)
        if node.op_type == "ConvTranspose":
            picked = picked.swapaxes(0, 1)
        return picked.T if node.op_type == "MatMul" else picked

    inputs: list[Tensor | Constant | None] = [
        held,
        Constant(out.name(name_of(source)), matrix, source.const_value, weight),
    ]
    if any(part.fact.bias is not None for part in parts) or (fixed and not apart):
        given = node.inputs[2] if len(node.inputs) > 2 else None
        base = name_of(given) if given is not None else f"{name_of(source)}.bias"
        inputs.append(Constant(out.name(base), lambda: _bias(parts, made, apart)))
    name = node.name or made.name
    if convolution:
        record = out.node(node.op_type, inputs, made, name, group_attributes(node, 1))
    elif len(inputs) == 2 and node.op_type == "MatMul":
        record = out.node("MatMul", inputs, made, name)
    else:
        record = out.node("Gemm", inputs, made, name, [ir.AttrInt64("transB", 1)])
    if SUM in node.metadata_props:
        record.notes[SUM] = lambda: node.metadata_props[SUM]
    if len(parts) > 1:
        record.notes[BLOCKS] = lambda: _blocks(parts, held, made)
    return record, made


def _rows(part: Part, made: Tensor) -> tuple[Ids, Ids]:
    """Which channels of `made` a version makes, and the rows that make them."""
    row_of = dict(zip(part.fact.ids[part.used].tolist(), part.used.tolist(), strict=True))
    at = np.array([index for index, number in enumerate(made.numbers.tolist()) if number in row_of], np.int64)
    return at, np.array([row_of[number] for number in made.numbers[at].tolist()], np.int64)


def _stack(parts: list[Part], held: Tensor, made: Tensor, apart: bool) -> np.ndarray:
    total: np.ndarray | None = None
    for part in parts:
        weight = part.fact.weight
        assert weight is not None
        at, rows = _rows(part, made)
        picked = weight if _same(rows, len(weight)) else weight[rows]
        picked = _columns(picked, part.fact.operands[0], held.numbers, part.spread, apart)
        if len(at) == len(made.numbers):
            return picked
        if total is None:
            total = np.zeros((len(made.numbers), *picked.shape[1:]), picked.dtype)
        total[at] = picked
    assert total is not None
    return total


def _bias(parts: list[Part], made: Tensor, apart: bool) -> np.ndarray:
    total = np.zeros(len(made.numbers))
    for part in parts:
        weight, bias, fixed = part.fact.weight, part.fact.bias, part.spread.fixed
        assert weight is not None
        at, rows = _rows(part, made)
        if fixed.any() and not apart:
            total[at] = weight[rows].astype(np.float64).reshape(len(rows), len(fixed), -1).sum(axis=2) @ fixed
        if bias is not None:
            total[at] += bias[rows]
    assert parts[0].fact.weight is not None
    return total.astype(parts[0].fact.weight.dtype)


def _blocks(parts: list[Part], held: Tensor, made: Tensor) -> str:
    """JSON: which runs of rows read which runs of columns; everything else in the weight is zero."""
    place = _places(held.numbers)
    found = []
    for part in parts:
        at, _ = _rows(part, made)
        columns = np.array(sorted(place[int(atom)] for atom in part.spread.wanted), np.int64)
        found += [{"rows": rows, "columns": _runs(columns)} for rows in _runs(at)]
    return json.dumps(sorted(found, key=lambda block: block["rows"]))


def _runs(places: Ids) -> list[list[int]]:
    """[start, stop] of every stretch of neighbours.

    >>> _runs(np.array([0, 1, 2, 5]))
    [[0, 3], [5, 6]]
    """
    cuts = np.flatnonzero(np.diff(places) != 1) + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(places, cuts) if len(run)]


def _places(numbers: Ids) -> dict[int, int]:
    """Number -> the first channel that holds it."""
    return {number: index for index, number in reversed(list(enumerate(numbers.tolist())))}


def _same(order: Ids, count: int) -> bool:
    return len(order) == count and bool((order == np.arange(count)).all())


def _columns(weight: np.ndarray, ids: Ids, held: Ids, terms: Spread, apart: bool) -> np.ndarray:
    """Columns of `weight` (one per number of `ids`) moved to where `held` has those numbers, zeros elsewhere."""
    if len(terms.at) == len(ids) and np.array_equal(ids, held):
        return weight
    place = _places(held)
    moved = np.zeros((len(weight), len(held), *weight.shape[2:]), weight.dtype)
    at = np.array([place[number] for number in terms.atoms.tolist()], np.int64)
    _, first = np.unique(at, return_index=True)
    moved[:, at[first]] = weight[:, terms.at[first]]
    twice = np.setdiff1d(np.arange(len(at)), first)  # one map read again: its columns add up
    rest = np.concatenate([terms.at[twice], terms.mixed])
    if len(rest):
        share = np.zeros((len(rest), len(held)))
        share[np.arange(len(twice)), at[twice]] = 1.0
        for row, form in enumerate(terms.forms, len(twice)):
            for atom, factor in form.items():
                share[row, place[atom]] = factor
        moved += np.moveaxis(np.tensordot(weight[:, rest].astype(np.float64), share, axes=([1], [0])), -1, 1).astype(
            weight.dtype
        )
    if apart:
        moved[:, place[ONE]] = np.tensordot(weight.astype(np.float64), terms.fixed, axes=([1], [0]))
    return moved


def emit_sum(out: Emitter, numbers: Ids, like: ir.Value, name: str) -> Tensor:
    """A 1x1 convolution that makes exactly `numbers`, mixes and repeated ones too; -1 makes a channel of zeros."""
    asked = np.flatnonzero(numbers >= 0)
    terms = spread(out, numbers[asked], True)
    held = out.columns(terms.wanted, name_of(like), like, whole=True)
    made = out.copy(like, numbers, name)
    place, count = _places(held.numbers), len(held.numbers)

    def matrix() -> np.ndarray:
        weight = np.zeros((len(numbers), count), np.float32)
        weight[asked[terms.at], [place[atom] for atom in terms.atoms.tolist()]] = 1.0
        for row, form in zip(asked[terms.mixed].tolist(), terms.forms, strict=True):
            for atom, factor in form.items():
                weight[row, place[atom]] = factor
        return weight.reshape(*weight.shape, 1, 1)

    inputs: list[Tensor | Constant | None] = [held, Constant(out.name(f"{name}.weight"), matrix)]
    if terms.fixed.any():
        bias = np.zeros(len(numbers), np.float32)
        bias[asked] = terms.fixed
        inputs.append(out.constant(f"{name}.bias", bias))
    record = out.node("Conv", inputs, made, name, [ir.AttrInt64s("kernel_shape", [1, 1])])
    record.notes[SUM] = lambda: name
    return made


def emit_groups(out: Emitter, fact: Fact, used: Ids) -> list[str]:
    """A grouped convolution: whole groups, one row count for all. Returns its name if dead rows had to stay."""
    weight, groups = fact.weight, int(fact.space)
    assert weight is not None
    out_each, in_each = len(weight) // groups, len(fact.operands)
    live: dict[int, list[int]] = {}
    for position in used.tolist():
        live.setdefault(position // out_each, []).append(position)
    if len(live) == 1 and in_each > 1:  # a single group left is an ordinary convolution
        emit_rows(out, [(replace(fact, kind="rows", operands=fact.operands[:, used[0]][None]), used)])
        return []
    count = max(len(rows) for rows in live.values())
    padded = any(len(rows) < count for rows in live.values())
    for group, rows in live.items():
        spare = [row for row in range(group * out_each, (group + 1) * out_each) if row not in rows]
        rows += spare[: count - len(rows)]
    lead = fact.operands[0]
    order = np.array(list(live), np.int64)
    starts = lead[order * out_each]
    order = order[np.lexsort((out.place[starts], out.home[starts]))]
    # One channel in, one set of rows out: a tensor's channels need not be gathered with those of another tensor.
    homes = out.home[lead[order * out_each]]
    parts = [order[homes == home] for home in dict.fromkeys(homes.tolist())] if in_each == 1 else [order]
    for part in parts:
        _emit_group_part(out, fact, [live[int(group)] for group in part], set(used.tolist()))
    return [fact.node.name or name_of(fact.node.outputs[0])] if padded else []


def _emit_group_part(out: Emitter, fact: Fact, parts: list[list[int]], used: set[int]) -> None:
    node, weight, source, first = fact.node, fact.weight, fact.node.inputs[1], fact.node.inputs[0]
    assert weight is not None and source is not None and first is not None
    rows = np.array([row for part in parts for row in part], np.int64)
    reads = np.concatenate([fact.operands[:, part[0]] for part in parts])
    held = out.read(reads, name_of(first), first)
    made = out.tensor(
        node.outputs[0], np.array([fact.ids[row] if row in used else -1 for row in rows.tolist()], np.int64)
    )
    picked = weight if _same(rows, len(weight)) else weight[rows]
    inputs: list[Tensor | Constant | None] = [
        held,
        Constant(out.name(name_of(source)), lambda: picked, source.const_value, weight),
    ]
    if fact.bias is not None and node.inputs[2] is not None:
        inputs.append(out.constant(name_of(node.inputs[2]), fact.bias[rows]))
    out.node("Conv", inputs, made, node.name or made.name, group_attributes(node, len(parts)))


def emit_mix(out: Emitter, fact: Fact, used: Ids) -> list[str]:
    """Linear forms as one small 1x1 convolution (its name is returned); plain products by a constant stay a Mul."""
    node, like = fact.node, fact.node.outputs[0]
    forms = {int(number): dict(out.numbers.forms[int(number)]) for number in fact.ids[used]}
    if all(len(form) == 1 for form in forms.values()):
        _emit_scale(out, fact, used, forms)
        return []
    atoms = np.unique([atom for form in forms.values() for atom in form if atom != ONE])
    held = out.columns(atoms, f"{name_of(like)}.terms", like)
    made = out.tensor(like, fact.ids[used], free=True)
    place = {number: index for index, number in reversed(list(enumerate(held.numbers.tolist())))}

    def matrix() -> np.ndarray:
        weight = np.zeros((len(made.numbers), len(held.numbers), 1, 1), np.float32)
        for row, number in enumerate(made.numbers.tolist()):
            for atom, factor in forms[number].items():
                if atom != ONE:
                    weight[row, place[atom], 0, 0] = factor
        return weight

    name = node.name or name_of(like)
    name = name if name.endswith(".mix") else f"{name}.mix"
    inputs: list[Tensor | Constant | None] = [held, Constant(out.name(f"{name}.weight"), matrix)]
    if any(ONE in form for form in forms.values()):
        inputs.append(
            Constant(
                out.name(f"{name}.bias"),
                lambda: np.array([forms[number].get(ONE, 0.0) for number in made.numbers.tolist()], np.float32),
            )
        )
    out.node("Conv", inputs, made, name, [ir.AttrInt64s("kernel_shape", [1, 1])])
    return [name]


def _emit_scale(out: Emitter, fact: Fact, used: Ids, forms: dict[int, dict[int, float]]) -> None:
    node, like = fact.node, fact.node.outputs[0]
    numbers = fact.ids[used]
    atoms = np.array([next(iter(forms[int(number)])) for number in numbers], np.int64)
    order = out.arrange(atoms)
    numbers, atoms = numbers[order], atoms[order]
    factors = np.array([forms[int(n)][int(a)] for n, a in zip(numbers, atoms, strict=True)], np.float32)
    held = out.read(atoms, f"{name_of(like)}.terms", like)
    made = out.tensor(like, numbers)
    factor = out.constant(f"{made.name}.factor", factors.reshape(1, -1, 1, 1))
    out.node("Mul", [held, factor], made, node.name or made.name)


def emit_flat(out: Emitter, fact: Fact, used: Ids) -> None:
    """[N,C,H,W] -> [N,C*H*W] over the channels that are left."""
    node, first = fact.node, fact.node.inputs[0]
    assert first is not None
    count = pixels(first)
    parents = fact.operands[0]
    of_channel = {int(parents[c * count]): fact.ids[c * count : (c + 1) * count] for c in range(len(parents) // count)}
    held = out.columns(np.unique(parents[used]), name_of(first), first)
    dead = np.full(count, -1, np.int64)
    numbers = np.concatenate([of_channel.get(int(number), dead) for number in held.numbers])
    shape = dims(node.outputs[0])
    made = out.tensor(node.outputs[0], numbers)
    inputs: list[Tensor | Constant | None] = [held]
    if node.op_type == "Reshape":
        inputs.append(out.constant(f"{made.name}.shape", np.array([shape[0], len(numbers)], np.int64)))
    out.node(node.op_type, inputs, made, node.name or made.name, attributes(node))
