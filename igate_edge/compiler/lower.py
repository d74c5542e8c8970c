"""Writing convolutions, matrices, mixes and flattens over the channels that are left."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from .emit import Constant, Emitter, Tensor, attributes, group_attributes
from .lanes import Fact, attribute, dims, name_of, pixels
from .numbers import ONE, Ids


def emit_rows(out: Emitter, fact: Fact, used: Ids) -> None:
    """A dense convolution or matrix: live rows, and the columns of what the input tensor holds."""
    node, ids, weight = fact.node, fact.operands[0], fact.weight
    source, first = node.inputs[1], node.inputs[0]
    assert weight is not None and source is not None and first is not None
    known = out.numbers.is_constant(ids)
    values = out.numbers.values(ids[known]).astype(np.float64)
    convolution = node.op_type.startswith("Conv")
    padded = node.op_type == "ConvTranspose" or any(attribute(node, "pads", ())) or "auto_pad" in node.attributes
    apart = bool(values.any()) and convolution and padded
    wanted = np.unique(ids[~known])
    if apart or len(wanted) == 0:
        # A constant differs from its zero padding: one channel of ones carries all constants of this convolution.
        wanted = np.append(wanted, ONE)
    held = out.columns(wanted, name_of(first), first)
    made = out.tensor(node.outputs[0], fact.ids[used], free=True)
    row_of = dict(zip(fact.ids[used].tolist(), used.tolist(), strict=True))

    def rows() -> Ids:
        return np.array([row_of[number] for number in made.numbers.tolist()], np.int64)

    def matrix() -> np.ndarray:
        picked = weight if _same(rows(), len(weight)) else weight[rows()]
        picked = _columns(picked, ids, held.numbers, known, values if apart else None)
        if node.op_type == "ConvTranspose":
            picked = picked.swapaxes(0, 1)
        return picked.T if node.op_type == "MatMul" else picked

    extra = np.zeros(len(weight))
    if values.any() and not apart:
        extra = weight[:, known].astype(np.float64).reshape(len(weight), len(values), -1).sum(axis=2) @ values
    inputs: list[Tensor | Constant | None] = [
        held,
        Constant(out.name(name_of(source)), matrix, source.const_value, weight),
    ]
    if fact.bias is not None or extra.any():
        bias = extra if fact.bias is None else fact.bias + extra
        given = node.inputs[2] if len(node.inputs) > 2 else None
        base = name_of(given) if given is not None else f"{name_of(source)}.bias"
        inputs.append(Constant(out.name(base), lambda: bias[rows()].astype(weight.dtype)))
    name = node.name or made.name
    if convolution:
        out.node(node.op_type, inputs, made, name, group_attributes(node, 1))
    elif len(inputs) == 2 and node.op_type == "MatMul":
        out.node("MatMul", inputs, made, name)
    else:
        out.node("Gemm", inputs, made, name, [ir.AttrInt64("transB", 1)])


def _same(order: Ids, count: int) -> bool:
    return len(order) == count and bool((order == np.arange(count)).all())


def _columns(weight: np.ndarray, ids: Ids, held: Ids, known: np.ndarray, constants: np.ndarray | None) -> np.ndarray:
    """Columns of `weight` (one per number of `ids`) moved to where `held` has those numbers, zeros elsewhere."""
    if not known.any() and np.array_equal(ids, held):
        return weight
    place = {number: index for index, number in reversed(list(enumerate(held.tolist())))}
    at = np.array([place[number] for number in ids[~known].tolist()], np.int64)
    moved = np.zeros((len(weight), len(held), *weight.shape[2:]), weight.dtype)
    if len(np.unique(at)) == len(at):
        moved[:, at] = weight[:, ~known]
    else:  # one map read twice: its columns add up
        np.add.at(moved.swapaxes(0, 1), at, weight[:, ~known].swapaxes(0, 1))
    if constants is not None:
        moved[:, place[ONE]] = np.tensordot(weight[:, known].astype(np.float64), constants, axes=([1], [0]))
    return moved


def emit_groups(out: Emitter, fact: Fact, used: Ids) -> list[str]:
    """A grouped convolution: whole groups, one row count for all. Returns its name if dead rows had to stay."""
    weight, groups = fact.weight, int(fact.space)
    assert weight is not None
    out_each, in_each = len(weight) // groups, len(fact.operands)
    live: dict[int, list[int]] = {}
    for position in used.tolist():
        live.setdefault(position // out_each, []).append(position)
    if len(live) == 1 and in_each > 1:  # a single group left is an ordinary convolution
        emit_rows(out, replace(fact, kind="rows", operands=fact.operands[:, used[0]][None]), used)
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
