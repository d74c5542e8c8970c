"""Scales -> explicit Q/DQ, in the dialect of TensorRT or of ONNX Runtime's CPU kernels; one set of ranges serves both.

Both dialects: symmetric, activations per tensor on a grid of 127 steps, weights per output channel in [-127, 127],
float bias (ONNX Runtime forms QLinearConv with it all the same).
`trt`: INT8 with zero point 0 everywhere; Conv -> Relu -> Q unbroken; of an Add the skip operand alone carries Q/DQ; one
Q after a Concat. Evaluate it without fusions: ONNX Runtime's INT8 x INT8 convolution saturates on AVX2.
`ort`: UINT8, since ONNX Runtime 1.32 runs Conv -> Relu -> Q(int8) in float. Values are those of `trt`:
  - never negative: zero point 0, then Clip(0, 127) on UINT8; Relu and Clip(0, 6) become those two bounds. The Clip
    costs 3 % of a ResNet-18. Bytes up to 255 are no alternative: on AVX2 without VNNI pairs of products u8 * s8
    saturate in INT16 (measured: 63 steps off; up to 127 exact).
  - signed: zero point 128, and UINT8 weights of zero point 128 in the Conv that reads it: exact, 1.4x the time of INT8
    weights, 1.3x faster than float. INT8 weights are 246 steps off there, except in a depthwise Conv, which is exact.
  - Concat, Slice, Gather, MaxPool, Reshape, Where, Pad, nearest Resize work on the stored bytes, without Q/DQ.
  - Add becomes QLinearAdd, GlobalAveragePool and AveragePool their QLinear forms.
  - a last Conv (only outputs follow) is a ConvInteger scaled to float: at 1x1 as fast as QLinearConv, at 3x3 as fast as
    float, and the answer is not put on an 8-bit grid.
In float in both: linear Resize, ReduceMean, activations other than Relu and Clip(0, ..), products; a last Gemm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import DataError, GraphError, InputError
from . import groups
from .groups import Range, activations, constant, name_of, site

#: |bias| / (input scale * weight scale) stays below this, so that an INT32 bias cannot overflow (cases Q5).
BIAS_LIMIT = float(2**28)


def quantize(model: ir.Model, ranges: Mapping[str, Range], dialect: str = "ort") -> ir.Model:
    """The INT8 form of a static float model, as a new model; inputs, outputs, metadata and opset stay.

    `ranges`: calibrated (low, high) of every float tensor, from `calibrate`. `dialect`: "ort" or "trt". The stored
    tensor of activation `v` is named `v_q`, its float value `v_dq`. Raises GraphError (a tensor without a range, opset
    outside 17-19), DataError (a range that is not finite or reversed) and InputError (unknown dialect).
    """
    if dialect not in ("ort", "trt"):
        raise InputError(f"unknown dialect {dialect!r}", "known: ort, trt", "use one of these")
    opset = model.graph.opset_imports.get("", 0)
    if not 17 <= opset <= 19:
        raise GraphError("opset out of range", f"the model uses opset {opset}", "export with opset 17, 18 or 19")
    source = groups.typed(model)
    lowering = _Lowering(source, ranges, dialect)
    for node in source.graph:
        lowering.lower(node)
    return lowering.finish(model)


def activation_scale(limits: Range) -> np.float32:
    """Symmetric scale of a range; 1/127 for a tensor that was always zero.

    >>> float(activation_scale((-1.0, 127.0)))
    1.0
    """
    peak = groups.peak(limits)
    if not np.isfinite(peak) or limits[0] > limits[1]:
        raise DataError("a calibrated range is unusable", f"range {limits}", "calibrate again on finite frames")
    return np.float32(max(peak, 1e-20) / 127.0) if peak > 1e-12 else np.float32(1.0 / 127.0)


def weight_scales(weight: np.ndarray, axis: int, bias: np.ndarray | None, input_scale: float) -> np.ndarray:
    """Scale of every output channel, float32 [channels], positive and finite also for all-zero channels.

    Raised where the channel is dead (to the smallest live scale of the layer) or so small that its bias would exceed
    `BIAS_LIMIT` steps.
    """
    peaks = np.abs(weight.astype(np.float64)).max(axis=tuple(i for i in range(weight.ndim) if i != axis))
    scales = peaks / 127.0
    live = scales[scales > 1e-20]
    scales = np.maximum(np.where(scales > 1e-20, scales, live.min() if live.size else 1.0 / 127.0), 1e-20)
    if bias is not None:
        scales = np.maximum(scales, np.abs(bias.astype(np.float64)) / (input_scale * BIAS_LIMIT) * 1.001)
    return scales.astype(np.float32)


def _zero(dialect: str, unsigned: bool) -> np.ndarray:
    if dialect == "trt":
        return np.array(0, np.int8)
    return np.array(0 if unsigned else 128, np.uint8)


class _Lowering:
    """Builds the graph node by node: `raw` float results, `ints` stored bytes, `floats` their dequantised values."""

    def __init__(self, source: ir.Model, ranges: Mapping[str, Range], dialect: str) -> None:
        self.source, self.dialect = source, dialect
        self.plan = groups.plan(source, dialect)
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.inputs: list[ir.Value] = []
        self.raw: dict[str, ir.Value] = {}
        self.ints: dict[str, ir.Value] = {}
        self.floats: dict[str, ir.Value] = {}
        self.folded: set[ir.Node] = set()
        self.outputs = {name_of(value) for value in source.graph.outputs}
        self.scales, self.zeros = self._grids(ranges)
        for value in source.graph.inputs:
            new = ir.Value(name=value.name, type=value.type, shape=value.shape)
            self.inputs.append(new)
            self._store(name_of(value), new)

    def _grids(self, ranges: Mapping[str, Range]) -> tuple[dict[str, np.float32], dict[str, np.ndarray]]:
        missing = sorted(self.plan.quantised - ranges.keys())
        if missing:
            raise GraphError(
                "a tensor was not calibrated", f"no range for {', '.join(missing[:3])}", "calibrate this same model"
            )
        shared = groups.share(self.source, {**ranges, **_sum_ranges(self.source, ranges)})
        joined, positive = groups.join(self.source, shared), groups.nonnegative(self.source)
        signed = {joined[name] for name in self.plan.quantised if name not in positive}
        scales = {name: activation_scale(shared[name]) for name in self.plan.quantised}
        return scales, {name: _zero(self.dialect, joined[name] not in signed) for name in self.plan.quantised}

    # Values

    def const(self, name: str, array: np.ndarray) -> ir.Value:
        if name not in self.initializers:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
            self.initializers[name] = value
        return self.initializers[name]

    def emit(
        self, op: str, inputs: Sequence[ir.Value | None], out: str, attributes: Any = None, name: str = ""
    ) -> ir.Value:
        value = ir.Value(name=out)
        self.nodes.append(ir.node(op, inputs, attributes, outputs=[value], name=name or f"{out}.{op}"))
        return value

    def _grid(self, name: str) -> tuple[ir.Value, ir.Value]:
        zero = self.zeros[name]
        scale = self.const(f"{name}_scale", np.asarray(self.scales[name], np.float32))
        return scale, self.const(f"igate.zero_{zero.dtype}_{zero}", zero)

    def _store(self, name: str, value: ir.Value, limits: tuple[float, float] | None = None) -> None:
        """Register the float result of `name`; if planned, quantise it, with an activation's bounds as byte bounds."""
        if name not in self.plan.quantised:
            self.raw[name] = value
            return
        scale, zero = self._grid(name)
        step = float(self.scales[name])
        if self.dialect == "trt":
            self.ints[name] = self.emit("QuantizeLinear", [value, scale, zero], f"{name}_q")
            return
        base, low, high = int(self.zeros[name]), -128, 127
        if limits is not None:
            low, high = 0, int(min(127.0, np.rint(limits[1] / step)))
        elif base == 0:
            low = 0
        if (low + base, high + base) == (0, 255):
            self.ints[name] = self.emit("QuantizeLinear", [value, scale, zero], f"{name}_q")
            return
        stored = self.emit("QuantizeLinear", [value, scale, zero], f"{name}_q0")
        ends = [self.const(f"igate.u8_{end + base}", np.array(end + base, np.uint8)) for end in (low, high)]
        self.ints[name] = self.emit("Clip", [stored, *ends], f"{name}_q")

    def as_float(self, value: ir.Value | None) -> ir.Value | None:
        """The float form of a source value: dequantised if it is stored as bytes."""
        if value is None:
            return None
        name = name_of(value) if value.name else ""
        array = constant(value)
        if array is not None:
            return self.const(name, array)
        if name not in self.ints:
            return self.raw[name]
        if name not in self.floats:
            out = name if name in self.outputs else f"{name}_dq"
            self.floats[name] = self.emit("DequantizeLinear", [self.ints[name], *self._grid(name)], out)
        return self.floats[name]

    def as_int(self, value: ir.Value | None, like: str) -> ir.Value | None:
        """The stored bytes of a source value; a float constant is put on the grid of activation `like`."""
        array = constant(value)
        if value is None or array is None:
            return value if value is None else self.ints[name_of(value)]
        if value.dtype != ir.DataType.FLOAT:
            return self.const(name_of(value), array)
        zero = self.zeros[like]
        top = 127 + int(zero)
        steps = np.clip(np.rint(array / self.scales[like]) + int(zero), 0 if zero.dtype == np.uint8 else -128, top)
        return self.const(f"{value.name}.{like}_q", steps.astype(zero.dtype))

    # Nodes

    def lower(self, node: ir.Node) -> None:
        if node in self.folded or node.op_type == "Constant":
            return
        act = groups.folded(node)
        out = name_of(site(node))
        if groups.weighted(node):
            self._weighted(node, act, out)
        elif act is not None:
            self._with_activation(node, act, out)
        elif groups.moves(node) and activations(node.inputs):
            self._move(node)
        else:
            self._copy(node)

    def _result(self, name: str) -> str:
        return f"{name}_raw" if name in self.outputs and name in self.plan.quantised else name

    def _weighted(self, node: ir.Node, act: ir.Node | None, out: str) -> None:
        if self.dialect == "ort" and out in self.plan.float_out and node.op_type == "Conv":
            self._integer_conv(node, act, out)
        else:
            self._with_activation(node, act, out)

    def _with_activation(self, node: ir.Node, act: ir.Node | None, out: str) -> None:
        """A Conv, Gemm or Add and its activation, which the `ort` dialect expresses as byte bounds where it can."""
        first = name_of(node.outputs[0])
        limits = groups.bounds(act) if act else None
        bytes_only = self.dialect == "ort" and out in self.plan.quantised
        inputs = self._weighted_inputs(node) if groups.weighted(node) else [self.as_float(v) for v in node.inputs]
        result = self._result(first) if act is None else first
        value = self.emit(node.op_type, inputs, result, _attributes(node), node.name or "")
        if act is None:
            self._store(out, value)
            return
        self.folded.add(act)
        if not bytes_only:
            value = self._activate(act, value, out)
        self._store(out, value, limits if bytes_only else None)

    def _activate(self, act: ir.Node, value: ir.Value, out: str) -> ir.Value:
        limits = groups.bounds(act)
        # A bound at or above the last step does what saturation does; a plain Relu is what TensorRT fuses.
        saturates = out in self.scales and limits is not None and 127.0 * float(self.scales[out]) <= limits[1]
        op = "Relu" if saturates else act.op_type
        ends = [] if op == "Relu" else [self.as_float(v) for v in act.inputs[1:]]
        return self.emit(op, [value, *ends], self._result(out), None, act.name or "")

    def _weighted_inputs(self, node: ir.Node) -> list[ir.Value | None]:
        stored, scales, zero, axis = self._weights(node)
        label = name_of(node.outputs[0])
        if name_of(site(node)) in self.plan.float_out:
            # ONNX Runtime runs a last Gemm in float and would dequantise its weights in every frame.
            shape = [-1 if i == axis else 1 for i in range(stored.ndim)]
            weight = self.const(f"{label}.w", (stored.astype(np.float32) - np.float32(zero)) * scales.reshape(shape))
        else:
            grid = [self.const(f"{label}.w_scale", scales), self.const(f"{label}.w_zero", np.full(scales.shape, zero))]
            bytes_ = self.const(f"{label}.w_q", stored)
            weight = self.emit("DequantizeLinear", [bytes_, *grid], f"{label}.w", {"axis": axis})
        return [self.as_float(node.inputs[0]), weight, *(self.as_float(value) for value in node.inputs[2:])]

    def _weights(self, node: ir.Node) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Weight bytes, their scales [channels], their zero point and the channel axis."""
        data, weight = name_of(activations(node.inputs)[0]), constant(node.inputs[1])
        assert weight is not None
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        by_row = node.op_type == "Conv" or ("transB" in node.attributes and node.attributes["transB"].as_int() == 1)
        axis = 0 if by_row else 1
        scales = weight_scales(weight, axis, bias, float(self.scales[data]))
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        steps = np.clip(np.rint(weight / scales.reshape(shape)), -127, 127)
        depthwise = groups.is_depthwise(node, weight)
        integer_output = self.dialect == "ort" and name_of(site(node)) in self.plan.float_out
        shifted = (int(self.zeros[data]) == 128 and not depthwise) or (integer_output and node.op_type == "Conv")
        zero = np.array(128, np.uint8) if shifted else np.array(0, np.int8)
        stored = (steps.astype(np.int16) + int(zero)).astype(zero.dtype)
        return stored, scales, zero, axis

    def _integer_conv(self, node: ir.Node, act: ir.Node | None, out: str) -> None:
        """Conv with a float result: INT32 sums * input scale * weight scale + bias; INT8 weights are 4x slower here."""
        first, data = name_of(node.outputs[0]), name_of(activations(node.inputs)[0])
        stored, scales, zero, _ = self._weights(node)
        zeros = [self._grid(data)[1], self.const(f"igate.zero_{zero.dtype}_{zero}", zero)]
        inputs = [self.as_int(node.inputs[0], data), self.const(f"{first}.w_q", stored), *zeros]
        sums = self.emit("ConvInteger", inputs, f"{first}_i32", _attributes(node), node.name or "")
        value = self.emit("Cast", [sums], f"{first}_f32", {"to": ir.DataType.FLOAT})
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        shape = (1, -1, *([1] * (node.inputs[1].shape.rank() - 2)))  # type: ignore[union-attr]
        factor = self.const(f"{first}.factor", (scales * self.scales[data]).reshape(shape))
        value = self.emit("Mul", [value, factor], first if bias is None else f"{first}_scaled")
        if bias is not None:
            value = self.emit("Add", [value, self.const(f"{first}.bias", bias.reshape(shape))], first)
        if act is not None:
            self.folded.add(act)
            value = self._activate(act, value, out)
        self._store(out, value)

    def _move(self, node: ir.Node) -> None:
        """A node that moves values: on bytes in `ort` if all grids agree, else on floats; no-ops vanish."""
        data, out = activations(node.inputs), name_of(node.outputs[0])
        grids = {
            (float(self.scales[n]), int(self.zeros[n]))
            for n in map(name_of, (*data, *node.outputs))
            if n in self.scales
        }
        stored = all(name in self.ints for name in map(name_of, data))
        one = len(grids) == 1 and stored
        if node.op_type == "Identity" or (node.op_type == "Concat" and len(node.inputs) == 1):
            if one and out in self.plan.quantised:
                self.ints[out] = self.ints[name_of(data[0])]
            else:
                value = self.as_float(data[0])
                assert value is not None
                self._store(out, value)
        elif self.dialect == "ort" and one and all(name_of(v) in self.plan.quantised for v in node.outputs):
            inputs = [
                self.as_int(value, out) if node.op_type in ("Concat", "Where") or not index else self.as_float(value)
                for index, value in enumerate(node.inputs)
            ]
            if node.op_type == "Pad":
                inputs = [
                    *inputs[:2],
                    self.const(f"igate.zero_{self.zeros[out].dtype}_{self.zeros[out]}", self.zeros[out]),
                ]
            outputs = [ir.Value(name=f"{value.name}_q") for value in node.outputs]
            self.nodes.append(ir.node(node.op_type, inputs, _attributes(node), outputs=outputs, name=node.name))
            self.ints.update((name_of(value), new) for value, new in zip(node.outputs, outputs, strict=True))
        else:
            self._copy(node)

    def _copy(self, node: ir.Node) -> None:
        outputs = [ir.Value(name=self._result(value.name) if value.name else "") for value in node.outputs]
        inputs = [self.as_float(value) for value in node.inputs]
        clone = ir.node(
            node.op_type, inputs, _attributes(node), domain=node.domain, outputs=outputs, name=node.name or None
        )
        self.nodes.append(clone)
        for value, new in zip(node.outputs, outputs, strict=True):
            if value.name:
                self._store(value.name, new)

    def finish(self, model: ir.Model) -> ir.Model:
        outputs = []
        for value in self.source.graph.outputs:
            new = self.as_float(value)
            assert new is not None
            if new.name != value.name or new.is_graph_output() or new in self.inputs:
                new = self.emit("Identity", [new], name_of(value))
            new.type, new.shape = value.type, value.shape
            outputs.append(new)
        graph = ir.Graph(
            self.inputs,
            outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports=dict(model.graph.opset_imports),
            name=model.graph.name,
        )
        properties = dict(model.metadata_props)
        return ir.Model(
            graph, ir_version=model.ir_version, producer_name=model.producer_name, metadata_props=properties
        )


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {key: attribute.value for key, attribute in node.attributes.items()}


def _sum_ranges(model: ir.Model, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Narrower ranges for convolution results that only an Add with Relu reads, where no result can differ.

    Let the sum reach R and the never negative skip S: below -max(R, S) the result is 0 anyway, above R it is R.
    """
    positive = groups.nonnegative(model)
    narrow: dict[str, Range] = {}
    for node in model.graph:
        data = activations(node.inputs)
        act = groups.folded(node)
        if (
            node.op_type != "Add"
            or len(data) != 2
            or act is None
            or not all(v.name in ranges for v in (*data, site(node)))
        ):
            continue
        for value, other in (data, data[::-1]):
            if value in groups.raw_operands(node) and other.name in positive:
                top = max(groups.peak(ranges[name_of(site(node))]), groups.peak(ranges[name_of(other)]))
                low, high = ranges[name_of(value)]
                narrow[name_of(value)] = (max(low, -top), min(high, top))
    return narrow
