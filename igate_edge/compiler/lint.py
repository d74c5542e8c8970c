"""What TensorRT refuses, misreads or runs slowly in a Q/DQ graph; and what ONNX Runtime's CPU kernels get wrong.

Needs no TensorRT. The rules were seen in NVIDIA's parser (TensorRT-RTX 1.7, no GPU) or documented; CODES lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..errors import GraphError, InputError
from . import groups
from .groups import constant

#: code -> what it is about. 1xx: both or `trt`; 13x: `ort` only.
CODES = {
    "IG101": "zero point is not 0",
    "IG102": "UINT8 tensor in the TensorRT dialect",
    "IG103": "scale is not positive and finite",
    "IG104": "per-channel scale on an activation",
    "IG105": "integer operator instead of Q/DQ",
    "IG106": "INT32 bias behind DequantizeLinear",
    "IG107": "unknown operator or domain",
    "IG108": "gather over channels",
    "IG109": "ragged channel count",
    "IG110": "Concat inputs with different scales",
    "IG111": "Add with only one quantised operand",
    "IG112": "dynamic shape",
    "IG113": "opset out of range",
    "IG114": "weight scale does not fit its channel",
    "IG115": "DequantizeLinear of a type other than INT8",
    "IG116": "convolution without DequantizeLinear on an input",
    "IG117": "scale or zero point is not a constant",
    "IG118": "external data",
    "IG119": "mixed float types",
    "IG120": "Q/DQ pair between a convolution and its activation",
    "IG121": "several QuantizeLinear on one tensor",
    "IG130": "INT8 activation in the ONNX Runtime dialect",
    "IG131": "products that may saturate",
}
#: Warnings that a builder need not see: TensorRT would take the graph, and run it slower than it has to be.
_NEVER_BUILT = frozenset({"IG108"})
GRANULE = 16  # TensorRT's INT8 layouts are vectors of 32 channels, at least 16 to be worth it


@dataclass(frozen=True)
class Finding:
    """One finding: `severity` is "error" (refused, or wrong numbers) or "warning" (slow, or less exact)."""

    code: str
    severity: str
    node: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.code} {self.severity} at {self.node}: {CODES[self.code]}: {self.message}. Fix: {self.fix}."


def lint(model: ir.Model, dialect: str = "trt") -> list[Finding]:
    """Findings in graph order; an empty list is clean. Raises InputError for an unknown dialect."""
    if dialect not in _CHECKS:
        raise InputError(f"unknown dialect {dialect!r}", "known: ort, trt", "use one of these")
    found = list(_model(model, dialect))
    if any(finding.code == "IG118" for finding in found):
        return found  # the arrays are not in this file: nothing else can be judged
    try:
        source = groups.typed(model)
    except GraphError:
        source = model  # a node is malformed; what its type tells is found all the same
    functions = frozenset((key[0], key[1]) for key in source.functions)
    context = _Context(frozenset(_reach_quantise(source)), functions)
    for node in source.graph:
        for check in _CHECKS[dialect]:
            found.extend(check(node, context))
    return found


def refusals(model: ir.Model) -> list[Finding]:
    """Findings for which a graph is not handed to TensorRT at all: every error, and a gather over channels."""
    return [one for one in lint(model, "trt") if one.severity == "error" or one.code in _NEVER_BUILT]


def _model(model: ir.Model, dialect: str) -> Iterator[Finding]:
    opset = model.graph.opset_imports.get("", 0)
    if not 17 <= opset <= 19:
        yield Finding("IG113", "error", "model", f"opset {opset}", "export with opset 17, 18 or 19")
    for value in model.graph.inputs:
        if value.shape is None or not value.shape.is_static():
            text = "no shape" if value.shape is None else str(value.shape)
            yield Finding("IG112", "error", str(value.name), f"input has {text}", "export with a static batch")
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield Finding("IG118", "error", name, "weights lie in another file", "store all weights in the ONNX file")


@dataclass(frozen=True)
class _Context:
    """Of the whole graph: names of values that feed a QuantizeLinear, and (domain, name) of local functions."""

    quantised: frozenset[str]
    functions: frozenset[tuple[str, str]]


Check = Callable[[ir.Node, _Context], Iterator[Finding]]


def _name(node: ir.Node) -> str:
    return node.name or f"{node.op_type}({node.outputs[0].name})"


def _grid(node: ir.Node) -> tuple[np.ndarray | None, np.ndarray | None]:
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    return constant(node.inputs[1]), constant(zero)


def _is_weight(node: ir.Node) -> bool:
    return constant(node.inputs[0]) is not None


def _scales(node: ir.Node, _: _Context) -> Iterator[Finding]:
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return
    scale, _zero = _grid(node)
    zero_value = node.inputs[2] if len(node.inputs) > 2 else None
    if scale is None or (zero_value is not None and _zero is None):
        yield Finding("IG117", "error", _name(node), "computed at run time", "make scale and zero point initializers")
        return
    scale = scale.astype(np.float64)
    if not np.isfinite(scale).all() or (scale <= 0).any():
        worst = scale[~(scale > 0)].ravel()[:1] if (~(scale > 0)).any() else scale[~np.isfinite(scale)].ravel()[:1]
        fix = "prune dead channels and use igate_edge.compiler.quantize, which bounds scales"
        yield Finding("IG103", "error", _name(node), f"scale {float(worst[0]):g}", fix)
    if scale.size > 1 and not _is_weight(node):
        yield Finding("IG104", "error", _name(node), f"{scale.size} scales", "use one scale for the whole activation")


def _types(node: ir.Node, _: _Context) -> Iterator[Finding]:
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return
    scale, zero = _grid(node)
    value = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    kind = zero.dtype.name if zero is not None else _kind(value)
    if node.op_type == "QuantizeLinear" and zero is None and len(node.inputs) < 3:
        kind = "uint8"  # ONNX's default
    if kind == "uint8":
        yield Finding("IG102", "error", _name(node), "TensorRT reads it as INT8: another range", "quantise to INT8")
    elif kind == "int32":
        yield Finding("IG106", "error", _name(node), "the parser refuses INT32", "keep the bias in float")
    elif kind != "int8":
        yield Finding("IG115", "error", _name(node), f"type {kind}", "quantise to INT8")
    if zero is not None and np.any(zero):
        first = int(zero.ravel()[np.flatnonzero(zero)[0]])
        yield Finding("IG101", "error", _name(node), f"zero point {first}", "quantise symmetrically")


def _kind(value: ir.Value | None) -> str:
    array = constant(value)
    if array is not None:
        return array.dtype.name
    return value.dtype.name.lower() if value is not None and value.dtype is not None else "unknown"


def _weight_scale(node: ir.Node, _: _Context) -> Iterator[Finding]:
    """ONNX Runtime gives an all-zero channel the scale 1.0, a nearly dead one what its bias asks for (Q4, Q5)."""
    if node.op_type != "DequantizeLinear" or not _is_weight(node):
        return
    steps, (scale, zero) = constant(node.inputs[0]), _grid(node)
    if scale is None or scale.size < 2 or steps is None or steps.ndim < 2:
        return
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    signed = steps.astype(np.int64) - (int(zero.ravel()[0]) if zero is not None else 0)
    peaks = np.abs(signed).max(axis=tuple(i for i in range(steps.ndim) if i != axis % steps.ndim))
    live = peaks > 0
    reference = float(scale[live].max()) if live.any() else float("inf")
    bad = np.flatnonzero((~live & (scale > 4.0 * reference)) | (live & (peaks < 32)))
    if bad.size:
        text = f"channel {bad[0]} uses {int(peaks[bad[0]])} of 127 steps at scale {float(scale[bad[0]]):.3g}"
        yield Finding("IG114", "warning", _name(node), f"{text}; {bad.size} such channels", "prune dead channels first")


def _operator(node: ir.Node, context: _Context) -> Iterator[Finding]:
    import onnx

    if node.op_type.startswith("QLinear") or node.op_type in ("ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"):
        fix = "write QuantizeLinear and DequantizeLinear around the float operator"
        yield Finding("IG105", "error", _name(node), node.op_type, fix)
    elif node.domain not in ("", "ai.onnx"):
        if (node.domain, node.op_type) not in context.functions:
            text = f"{node.domain}.{node.op_type}"
            yield Finding("IG107", "error", _name(node), text, "use standard operators or a local function")
    elif node.op_type in ("Unique", "NonZero", "Compress") or not onnx.defs.has(node.op_type):
        fix = "rewrite with convolutions, slices and elementwise operators"
        yield Finding("IG107", "error", _name(node), node.op_type, fix)


_ONE_TYPE = frozenset({"Add", "Sub", "Mul", "Div", "Concat", "Where", "Conv", "Gemm", "MatMul", "Max", "Min"})


def _float_types(node: ir.Node, _: _Context) -> Iterator[Finding]:
    floats = {v.dtype for v in node.inputs if v is not None and v.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)}
    if len(floats) > 1 and node.op_type in _ONE_TYPE:
        yield Finding(
            "IG119", "error", _name(node), "FP16 and FP32 inputs", "insert a Cast: the network is strongly typed"
        )


def _channels(node: ir.Node, _: _Context) -> Iterator[Finding]:
    if node.op_type == "Gather" and constant(node.inputs[0]) is None:
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        if axis in (1, -3):
            fix = "permute the next layer's weights instead"
            yield Finding("IG108", "warning", _name(node), "TensorRT fuses no Gather", fix)
    weight = _source(node.inputs[1]) if node.op_type == "Conv" and _dequantised(node.inputs[0]) else None
    if weight is not None and weight.shape[0] % GRANULE and not _ends(node):
        text = f"{weight.shape[0]} output channels"
        yield Finding("IG109", "warning", _name(node), text, f"round gates to a granule of {GRANULE} or 32 channels")


def _ends(node: ir.Node) -> bool:
    """True when the result goes to a network output without another convolution."""
    return node.outputs[0].is_graph_output() or not list(node.outputs[0].uses())


def _source(value: ir.Value | None) -> np.ndarray | None:
    """A weight array, looked up through its DequantizeLinear."""
    maker = value.producer() if value is not None else None
    return constant(maker.inputs[0]) if maker is not None and maker.op_type == "DequantizeLinear" else constant(value)


def _dequantised(value: ir.Value | None) -> bool:
    maker = value.producer() if value is not None else None
    return maker is not None and maker.op_type == "DequantizeLinear"


def _convolution(node: ir.Node, _: _Context) -> Iterator[Finding]:
    if node.op_type not in ("Conv", "Gemm", "ConvTranspose"):
        return
    missing = [label for label, value in zip(("data", "weight"), node.inputs, strict=False) if not _dequantised(value)]
    if missing:
        fix = "quantise both inputs, or accept that it runs in float"
        yield Finding("IG116", "warning", _name(node), f"no DequantizeLinear on {' and '.join(missing)}", fix)


def _joins(node: ir.Node, context: _Context) -> Iterator[Finding]:
    data = groups.activations(node.inputs)
    if node.op_type == "Concat":
        makers = [value.producer() for value in data if _dequantised(value)]
        arrays = [constant(maker.inputs[1]) for maker in makers if maker is not None]
        scales = {float(np.ravel(array)[0]) for array in arrays if array is not None}
        if len(scales) > 1:
            text = f"scales from {min(scales):.3g} to {max(scales):.3g}"
            yield Finding("IG110", "warning", _name(node), text, "calibrate the inputs of a Concat as one group")
    if node.op_type == "Add" and len(data) == 2 and node.outputs[0].name in context.quantised:
        kinds = sorted("dq" if _dequantised(value) else _maker(value) for value in data)
        if kinds not in (["dq", "dq"], ["Conv", "dq"], ["Gemm", "dq"], ["other", "other"]):
            yield Finding(
                "IG111", "warning", _name(node), f"operands: {', '.join(kinds)}", "put Q/DQ on the skip operand"
            )


def _maker(value: ir.Value) -> str:
    maker = value.producer()
    return maker.op_type if maker is not None and maker.op_type in ("Conv", "Gemm") else "other"


def _pairs(node: ir.Node, _: _Context) -> Iterator[Finding]:
    if groups.bounds(node) is not None and _dequantised(node.inputs[0]):
        pair = _maker_of(node.inputs[0])
        quantise = _maker_of(pair.inputs[0]) if pair is not None else None
        maker = _maker_of(quantise.inputs[0]) if quantise is not None else None
        if maker is not None and maker.op_type == "Conv" and len(list(maker.outputs[0].uses())) == 1:
            fix = "quantise after the activation"
            yield Finding("IG120", "warning", _name(node), "it keeps Conv and activation apart", fix)
    if node.op_type == "QuantizeLinear" and node.inputs[0] is not None:
        twins = [use.node for use in node.inputs[0].uses() if use.node.op_type == "QuantizeLinear"]
        if len(twins) > 1 and twins[0] is node:
            text = f"{len(twins)} of them: sibling branches cannot be merged"
            yield Finding("IG121", "warning", _name(node), text, "share one Q/DQ pair")


def _ort(node: ir.Node, _: _Context) -> Iterator[Finding]:
    if node.op_type == "QuantizeLinear":
        zero = _grid(node)[1]
        if zero is not None and zero.dtype == np.int8:
            yield Finding("IG130", "warning", _name(node), "Conv -> Relu -> INT8 runs in float", "quantise to UINT8")
    if node.op_type not in ("Conv", "Gemm") or not (_dequantised(node.inputs[0]) and _dequantised(node.inputs[1])):
        return
    data, steps = _maker_of(node.inputs[0]), _source(node.inputs[1])
    if data is None or steps is None or steps.dtype != np.int8 or groups.is_depthwise(node, steps):
        return
    zero = _grid(data)[1]
    if zero is not None and zero.dtype == np.int8:
        return  # IG130 names it at its QuantizeLinear
    top = _top(data.inputs[0])
    if top > 128:
        text = f"bytes up to {top} times INT8 weights overflow INT16 sums on CPUs without VNNI"
        yield Finding("IG131", "error", _name(node), text, "keep bytes within 0..127, or use UINT8 weights")


def _maker_of(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _top(value: ir.Value | None) -> int:
    """Largest byte a stored tensor can hold, from the Clip that made it, followed back through moves."""
    maker = _maker_of(value)
    if maker is None:
        array = constant(value)
        return 255 if array is None else int(array.max(initial=0))
    if maker.op_type == "Clip" and len(maker.inputs) > 2 and (bound := constant(maker.inputs[2])) is not None:
        return int(bound)
    if groups.moves(maker):
        data = [item for item in maker.inputs if item is not None and item.dtype == ir.DataType.UINT8]
        return max((_top(item) for item in data), default=255)
    return 255


def _reach_quantise(model: ir.Model) -> set[str]:
    """Names of values that some QuantizeLinear depends on."""
    found: set[str] = set()
    for node in reversed(list(model.graph)):
        if node.op_type == "QuantizeLinear" or any(value.name in found for value in node.outputs):
            inputs = node.inputs[:1] if node.op_type in ("QuantizeLinear", "DequantizeLinear") else node.inputs
            found.update(str(value.name) for value in inputs if value is not None)
    return found


_CHECKS: dict[str, tuple[Check, ...]] = {
    "trt": (_operator, _scales, _types, _weight_scale, _float_types, _channels, _convolution, _joins, _pairs),
    "ort": (_scales, _weight_scale, _ort),
}
