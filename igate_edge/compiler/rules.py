"""What each ONNX operator does to channels: the table that `channels.analyse` walks over a graph with.

A rule returns a Fact, or None for "not understood in this use": the node becomes a barrier, which is always correct.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ..errors import GraphError
from .lanes import (
    ELEMENTWISE,
    SPATIAL,
    Fact,
    Scope,
    attribute,
    barrier,
    constant,
    dims,
    dims_or_none,
    lanes,
    name_of,
    pixels,
    signature,
)
from .numbers import ONE, Ids


def apply(scope: Scope, node: ir.Node) -> Fact:
    """The node's Fact; numbers of all its outputs are entered into the scope."""
    fact = None
    if node.domain in ("", "ai.onnx") and len(dims_or_none(node.outputs[0])) >= 2:
        rule = RULES.get(node.op_type)
        if rule is not None:
            fact = rule(scope, node)
        elif node.op_type in ELEMENTWISE or node.op_type in SPATIAL:
            fact = lanes(scope, node)
    if fact is None:
        return barrier(scope, node)
    scope.ids[name_of(node.outputs[0])] = fact.ids
    return fact


# --- convolutions and matrices ------------------------------------------------------------------------------


def _conv(scope: Scope, node: ir.Node) -> Fact | None:
    weight = constant(node.inputs[1])
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    absent = len(node.inputs) < 3 or node.inputs[2] is None
    first = node.inputs[0]
    if (
        weight is None
        or weight.ndim < 3
        or (bias is None and not absent)
        or first is None
        or constant(first) is not None
    ):
        return None
    ids, groups = scope.ids[name_of(first)], int(attribute(node, "group", 1))
    if node.op_type == "ConvTranspose":
        weight = weight.swapaxes(0, 1)
        if groups != 1:
            return None
    if weight.shape[1] * groups != len(ids) or weight.shape[0] % groups:
        return None
    space = (signature(node), weight.shape[1:])
    if groups > 1:
        return _grouped(scope, node, ids, weight, bias, groups)
    padded = node.op_type != "Conv" or any(attribute(node, "pads", ())) or "auto_pad" in node.attributes
    return _dense(scope, node, ids, weight, bias, space, padded)


def _dense(
    scope: Scope, node: ir.Node, ids: Ids, weight: np.ndarray, bias: np.ndarray | None, space: object, padded: bool
) -> Fact:
    """Rows over one input; a row over nothing but constants is a constant where no zero padding can enter it."""
    table, flat = scope.numbers, weight.reshape(len(weight), -1)
    if bias is not None:
        flat = np.concatenate([flat, bias.reshape(-1, 1)], axis=1)
    known = table.is_constant(ids)
    if known.all() and weight.dtype == np.float32:
        values = table.values(ids)
        if not padded or not values.any():
            sums = weight.astype(np.float64).reshape(*weight.shape[:2], -1).sum(axis=2) @ values.astype(np.float64)
            sums = sums if bias is None else sums + bias
            return Fact(node, "view", np.array([table.constant(float(value)) for value in sums], np.int64))
    made, fresh = table.rows((space, bias is None, ids.tobytes()), flat)
    return Fact(node, "rows", made, fresh, ids[None], weight=weight, bias=bias)


def _grouped(scope: Scope, node: ir.Node, ids: Ids, weight: np.ndarray, bias: np.ndarray | None, groups: int) -> Fact:
    """Every group reads its own inputs; `operands` [inputs of a group, O]: the numbers each output channel reads."""
    out_each, in_each = len(weight) // groups, len(ids) // groups
    reads = np.repeat(ids.reshape(groups, in_each), out_each, axis=0)
    flat = np.ascontiguousarray(weight.reshape(len(weight), -1))
    biases = [b""] * len(weight) if bias is None else [value.tobytes() for value in bias]
    # The number of groups is not part of what a row computes.
    plain = (node.op_type, *(item for item in signature(node)[2:] if item[0] != "group"), weight.shape[1:])
    keys = zip((r.tobytes() for r in reads), (f.tobytes() for f in flat), biases, strict=True)
    made, fresh = scope.numbers.intern(("grouped", plain), keys)
    dead = scope.numbers.is_constant(reads).all(axis=1)
    if dead.any() and weight.dtype == np.float32:
        for position in np.flatnonzero(dead):
            if not scope.numbers.values(reads[position]).any():
                made[position] = scope.numbers.constant(0.0 if bias is None else float(bias[position]))
                fresh = fresh[fresh != position]
    return Fact(node, "groups", made, fresh, reads.T, space=groups, weight=weight, bias=bias)


def _gemm(scope: Scope, node: ir.Node) -> Fact | None:
    first, weight = node.inputs[0], constant(node.inputs[1])
    assert first is not None
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    absent = len(node.inputs) < 3 or node.inputs[2] is None
    if weight is None or weight.ndim != 2 or constant(first) is not None or (bias is None and not absent):
        return None
    if attribute(node, "transA", 0) or len(dims(first)) != 2:
        return None
    weight = weight if attribute(node, "transB", 0) else weight.T
    weight = weight * np.asarray(attribute(node, "alpha", 1.0), weight.dtype)
    if bias is not None:
        if bias.size not in (1, len(weight)) or (bias.ndim == 2 and bias.shape[0] != 1):
            return None
        bias = np.broadcast_to(bias.reshape(-1), (len(weight),)) * np.asarray(
            attribute(node, "beta", 1.0), weight.dtype
        )
    return _dense(scope, node, scope.ids[name_of(first)], weight, bias, ("Gemm", weight.shape[1]), False)


def _matmul(scope: Scope, node: ir.Node) -> Fact | None:
    left, right = (constant(value) for value in node.inputs)
    rank = len(dims(node.outputs[0]))
    if rank >= 4 and (left is None) != (right is None):
        # A matrix applied to the last two axes: every channel alone.
        matrix = right if left is None else left
        return lanes(scope, node) if matrix is not None and matrix.ndim == 2 else None
    first = node.inputs[0]
    if rank != 2 or left is not None or right is None or right.ndim != 2 or first is None:
        return None
    return _dense(scope, node, scope.ids[name_of(first)], right.T, None, ("Gemm", right.shape[0]), False)


# --- selects and mixes --------------------------------------------------------------------------------------


def _where(scope: Scope, node: ir.Node) -> Fact | None:
    """A constant channel mask picks a number per channel: no operation is left."""
    mask, shape = channel_mask(node), dims(node.outputs[0])
    if mask is None:
        return lanes(scope, node)
    picked = []
    for value in node.inputs[1:]:
        assert value is not None
        ids = scope.of(value, shape[1])
        if ids is None or (constant(value) is None and dims(value) != shape):
            return lanes(scope, node)
        picked.append(ids)
    return Fact(node, "view", np.where(mask, picked[0], picked[1]))


def channel_mask(node: ir.Node) -> np.ndarray | None:
    """bool [C] of a Where whose condition is a constant of one value per channel, else None."""
    mask, shape = constant(node.inputs[0]), dims_or_none(node.outputs[0])
    if node.op_type != "Where" or mask is None or len(shape) < 2 or mask.ndim > len(shape):
        return None
    mask = mask.reshape((1,) * (len(shape) - mask.ndim) + mask.shape)
    if mask.size != mask.shape[1] or mask.shape[1] not in (1, shape[1]):
        return None
    return np.broadcast_to(mask.reshape(-1).astype(bool), (shape[1],))


def _mul(scope: Scope, node: ir.Node) -> Fact | None:
    """Times one constant per channel: the term of a mix."""
    pair = [constant(value) for value in node.inputs]
    if (pair[0] is None) == (pair[1] is None):
        return lanes(scope, node)
    value, factor = (node.inputs[0], pair[1]) if pair[0] is None else (node.inputs[1], pair[0])
    assert value is not None and factor is not None
    shape, axis = dims(node.outputs[0]), factor.ndim - len(dims(node.outputs[0])) + 1
    channels = factor.shape[axis] if axis >= 0 else 1
    if len(shape) != 4 or dims(value) != shape or factor.dtype != np.float32 or factor.size != channels:
        return lanes(scope, node)
    weights = np.broadcast_to(factor.reshape(-1), (shape[1],)).tolist()
    terms = [scope.numbers.terms(number) for number in scope.ids[name_of(value)].tolist()]
    scaled = [{atom: part * weight for atom, part in term.items()} for term, weight in zip(terms, weights, strict=True)]
    return _mix(scope, node, scaled)


def _add(scope: Scope, node: ir.Node) -> Fact | None:
    """A sum of products by constants stays a linear form; x + 0 is x; any other sum is a value of its own."""
    shape = dims(node.outputs[0])
    if any(value is None or constant(value) is not None or dims(value) != shape for value in node.inputs):
        return lanes(scope, node)
    names = [name_of(value) for value in node.inputs if value is not None]
    left, right = (scope.ids[name] for name in names)
    if all(name in scope.scaled for name in names):
        sums = []
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            total = scope.numbers.terms(a)
            for atom, weight in scope.numbers.terms(b).items():
                total[atom] = total.get(atom, 0.0) + weight
            sums.append(total)
        return _mix(scope, node, sums)
    fact = lanes(scope, node)
    zero = scope.numbers.constant(0.0)
    if fact is None or node.outputs[0].dtype != ir.DataType.FLOAT or not ((left == zero) | (right == zero)).any():
        return fact
    ids = np.where(left == zero, right, np.where(right == zero, left, fact.ids))
    fresh = fact.fresh[(left != zero)[fact.fresh] & (right != zero)[fact.fresh]]
    return Fact(node, "lanes", ids, fresh, fact.operands, fact.slots, fact.space)


def _mix(scope: Scope, node: ir.Node, terms: list[dict[int, float]]) -> Fact:
    before = scope.numbers.count
    ids = scope.numbers.combine(terms)
    born, first = np.unique(ids, return_index=True)
    fresh = np.sort(first[(born >= before) & ~scope.numbers.is_constant(born)])
    scope.scaled.add(name_of(node.outputs[0]))
    atoms = sorted({atom for c in fresh for atom in scope.numbers.terms(int(ids[c])) if atom != ONE})
    return Fact(node, "mix", ids, fresh, np.array(atoms, np.int64)[None])


# --- channels moved around ----------------------------------------------------------------------------------


def _view(scope: Scope, node: ir.Node) -> Fact | None:
    first = node.inputs[0]
    assert first is not None
    if constant(first) is not None or (len(node.outputs) > 1 and list(node.outputs[1].uses())):
        return None
    if node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
        return None  # may be in training mode
    if dims(first) == dims(node.outputs[0]) and first.dtype == node.outputs[0].dtype:
        return Fact(node, "view", scope.ids[name_of(first)])
    return None


def _cast(scope: Scope, node: ir.Node) -> Fact | None:
    return _view(scope, node) or lanes(scope, node)


def _concat(scope: Scope, node: ir.Node) -> Fact | None:
    rank = len(dims(node.outputs[0]))
    axis = int(attribute(node, "axis", 1)) % rank
    if axis != 1:
        return lanes(scope, node) if axis > 1 and all(constant(value) is None for value in node.inputs) else None
    parts = [scope.of(value, dims(value)[1]) for value in node.inputs if value is not None]
    if any(part is None for part in parts):
        return None
    return Fact(node, "view", np.concatenate([part for part in parts if part is not None]))


def _split(scope: Scope, node: ir.Node) -> Fact | None:
    first = node.inputs[0]
    assert first is not None
    if constant(first) is not None or int(attribute(node, "axis", 0)) % len(dims(first)) != 1:
        return None
    ids, start = scope.ids[name_of(first)], 0
    for output in node.outputs:
        stop = start + dims(output)[1]
        scope.ids[name_of(output)] = ids[start:stop]
        start = stop
    return Fact(node, "view", scope.ids[name_of(node.outputs[0])])


def _slice(scope: Scope, node: ir.Node) -> Fact | None:
    first, arrays = node.inputs[0], [constant(value) for value in node.inputs[1:]]
    assert first is not None
    if (
        constant(first) is not None
        or len(arrays) < 2
        or any(array is None for array, value in zip(arrays, node.inputs[1:], strict=True) if value is not None)
    ):
        return None
    have, shape = dims(first), dims(node.outputs[0])
    starts, ends = arrays[0], arrays[1]
    assert starts is not None and ends is not None
    axes = arrays[2] if len(arrays) > 2 and arrays[2] is not None else np.arange(len(starts))
    steps = arrays[3] if len(arrays) > 3 and arrays[3] is not None else np.ones(len(starts), np.int64)
    places = [int(axis) % len(have) for axis in axes]
    if all(axis > 1 for axis in places):
        return lanes(scope, node)
    if places != [1] or have[:1] + have[2:] != shape[:1] + shape[2:]:
        return None
    ids = scope.ids[name_of(first)][slice(int(starts[0]), int(ends[0]), int(steps[0]))]
    return Fact(node, "view", ids) if len(ids) == shape[1] else None


def _gather(scope: Scope, node: ir.Node) -> Fact | None:
    first, picked = node.inputs[0], constant(node.inputs[1])
    assert first is not None
    if constant(first) is not None or picked is None or picked.ndim != 1:
        return None
    if int(attribute(node, "axis", 0)) % len(dims(first)) != 1:
        return None
    ids = scope.ids[name_of(first)]
    if ((picked < -len(ids)) | (picked >= len(ids))).any():
        evidence = (
            f"node {node.name or name_of(node.outputs[0])!r} asks for {picked.tolist()[:8]} of {len(ids)} channels"
        )
        raise GraphError("a Gather reads channels that do not exist", evidence, "export the network again")
    return Fact(node, "view", ids[picked])


def _reshape(scope: Scope, node: ir.Node) -> Fact | None:
    """[N,C,...] -> [N,C,...] keeps channels, [N,C,H,W] -> [N,C*H*W] expands them; anything else is not understood."""
    first = node.inputs[0]
    assert first is not None
    if constant(first) is not None:
        return None
    have, shape = dims(first), dims(node.outputs[0])
    if have == shape:
        return Fact(node, "view", scope.ids[name_of(first)])
    if len(have) >= 2 and have[:2] == shape[:2]:
        return lanes(scope, node, np.array(shape) if node.op_type == "Reshape" else None)
    if len(have) < 3 or len(shape) != 2 or have[0] != shape[0]:
        return None
    count = pixels(first)
    parents = np.repeat(scope.ids[name_of(first)], count)
    places = np.tile(np.arange(count), have[1])
    ids, fresh = scope.numbers.intern(("flat", have[2:]), zip(parents.tolist(), places.tolist(), strict=True))
    fixed = scope.numbers.is_constant(parents)
    ids, fresh = np.where(fixed, parents, ids), fresh[~fixed[fresh]]
    return Fact(node, "flat", ids, fresh, parents[None])


RULES: dict[str, Callable[[Scope, ir.Node], Fact | None]] = {
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Where": _where,
    "Mul": _mul,
    "Add": _add,
    "Identity": _view,
    "Dropout": _view,
    "Cast": _cast,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
}
