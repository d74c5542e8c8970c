"""The deploy kernels on the CPU as an engine: what a device would compute, byte for byte, without one.

A pruned INT8 graph in the `trt` dialect is run layer by layer through the real, packed CUDA kernels, which g++ built
(kernels/emulator). Operators that have no kernel run in float on the host; `Session.layers` tells which is which. Two
to three orders of magnitude slower than the robot: for small inputs, for tests, and to look at numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from igate_edge.kernels import grouped_conv
from igate_edge.kernels.emulator import Emulator
from igate_edge.kernels.exact import to_int8
from igate_edge.kernels.fold import fold, fold_input, foldable
from igate_edge.kernels.grouped_conv import ConvLayer, GroupedConvPlan
from igate_edge.kernels.memory import address, aligned, device_array

from ..compiler.groups import constant, is_activation, name_of
from ..errors import GraphError
from .emulate_graph import ConvStep, HostStep, LoadStep, StoreStep, program
from .session import Closing, check_image, closed


def probe() -> dict[str, Any]:
    """{"version", "provider"}: the compiler that builds the emulator; raises UnavailableError without g++."""
    from igate_edge.kernels.emulator import compiler

    return {"version": compiler(), "provider": "emulator"}


@dataclass(frozen=True)
class LayerReport:
    """One step. kernel: the CUDA kernel, or "host". macs: those with weights that are not zero; padded: as tiled."""

    name: str
    kernel: str
    tiles: int = 0
    branches: int = 0
    macs: int = 0
    padded_macs: int = 0


class Session(Closing):
    """One opened model, `run` like every engine's. kernels=False computes the same from the integer references."""

    def __init__(self, model: ir.Model, kernels: bool = True) -> None:
        self._program = program(model)
        graph = self._program.model.graph
        if len(graph.inputs) != 1:
            raise GraphError("the model needs one input", f"{len(graph.inputs)} inputs", "export one image")
        shape = graph.inputs[0].shape
        assert shape is not None
        self.input, self.shape = name_of(graph.inputs[0]), tuple(int(side) for side in shape.numpy())
        self.outputs = [name_of(value) for value in graph.outputs]
        self._emulator = Emulator.load() if kernels else None
        steps = self._program.steps
        self._plans = {step.y: plan_of(step.layer) for step in steps if isinstance(step, ConvStep)}
        self._host = {step.node: _Host(step.node, self._program.model) for step in steps if isinstance(step, HostStep)}
        self.layers = [self._report(step) for step in steps if isinstance(step, ConvStep | HostStep)]
        self._open = True

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Raw outputs by name for a preprocessed image, float32 of the input's shape."""
        return self.trace(image)[0]

    def trace(self, image: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(outputs, the stored INT8 tensors of all layers by name), both [1, C, ...]."""
        if not self._open:
            raise closed()
        check_image(image, self.shape)
        floats, stored, scales = {self.input: image}, dict[str, np.ndarray](), self._program.scales
        for step in self._program.steps:
            if isinstance(step, ConvStep):
                given = stored[step.x], stored[step.skip] if step.skip else None
                (floats if step.layer.floats else stored)[step.y] = self._conv(step, *given)
            elif isinstance(step, StoreStep):
                if step.value not in stored:
                    stored[step.value] = _quantised(floats[step.value], scales[step.value])
            elif isinstance(step, LoadStep):
                floats[step.value] = stored[step.source].astype(np.float32) * scales[step.source]
            elif step.stored:
                scale = scales[name_of(step.node.outputs[0])]
                taken = {name: self._bytes(name, scale, floats, stored) for name in self._host[step.node].names}
                made = self._host[step.node].run({name: array.astype(np.float32) for name, array in taken.items()})
                stored.update((name, array.astype(np.int8)) for name, array in made.items())
            else:
                floats.update(self._host[step.node].run(floats))
        return {name: np.asarray(floats[name], np.float32) for name in self.outputs}, stored

    def _bytes(self, name: str, scale: np.float32, floats: dict[str, Any], stored: dict[str, Any]) -> np.ndarray:
        """A value on the grid of `scale`, whichever form of it there is."""
        if name in stored and self._program.scales[name] == scale:
            return stored[name]
        return _quantised(floats[name], scale)

    def _conv(self, step: ConvStep, x: np.ndarray, skip: np.ndarray | None) -> np.ndarray:
        shape = (1, len(step.layer.weight), *step.layer.out_size) if x.ndim == 4 else (1, len(step.layer.weight))
        x = x.reshape(1, x.shape[1], *step.layer.size[1:])
        if self._emulator is None:
            return grouped_conv.reference(step.layer, x, skip).reshape(shape)
        plan = self._plans[step.y]
        source = device_array(plan.source.pack(fold_input(x) if plan.layer is not step.layer else x))
        target = aligned(plan.target.bytes, np.float32 if step.layer.floats else np.int8)
        buffers, place = [source, target, *plan.tables.each()], 0
        if skip is not None:
            buffers.append(device_array(plan.target.pack(skip)))
            place = address(buffers[-1])
        launch = plan.launch(address(source), address(target), address(plan.tables.data), place)
        self._emulator.run(launch, buffers)
        return plan.target.unpack(target).reshape(shape)

    def _report(self, step: ConvStep | HostStep) -> LayerReport:
        if isinstance(step, HostStep):
            return LayerReport(step.node.name or step.node.op_type, "host")
        plan = self._plans[step.y]
        kernel = plan.tile.kernel if self._emulator is not None else "reference"
        return LayerReport(step.name, kernel, plan.tiles, len(plan.branches), plan.macs, plan.padded_macs)

    def close(self) -> None:
        """Free the session; closing twice is fine."""
        self._open = False


def plan_of(layer: ConvLayer) -> GroupedConvPlan:
    """The packed form of a layer; a stem reads squares of 2x2 pixels, as preprocess_s8 can write them."""
    return GroupedConvPlan.from_layer(fold(layer) if foldable(layer) else layer)


def open(model: bytes, kernels: bool = True) -> Session:
    """A ready session of an ONNX file's bytes, a graph in the `trt` dialect."""
    return Session(ir.from_proto(_parsed(model)), kernels)


def _parsed(model: bytes) -> Any:
    import onnx

    try:
        return onnx.load_from_string(model)
    except Exception as error:  # protobuf's own error types differ between its versions
        raise GraphError("not an ONNX model", str(error)[:300], "pass what the compiler wrote") from error


def _quantised(values: np.ndarray, scale: np.float32) -> np.ndarray:
    return to_int8(values / scale)


class _Host:
    """One node in ONNX Runtime, alone, as it is written."""

    def __init__(self, node: ir.Node, model: ir.Model) -> None:
        import onnx
        import onnxruntime

        proto = ir.to_proto(node)
        inputs = [value for value in node.inputs if value is not None]
        held = {name_of(value): array for value in inputs if (array := constant(value)) is not None}
        self.names = sorted({name_of(value) for value in inputs if is_activation(value)})
        self.made = [name_of(value) for value in node.outputs if value.name]
        kinds = onnx.TensorProto.FLOAT
        known = {name_of(value): value.shape for value in inputs}
        ends = [
            onnx.helper.make_tensor_value_info(name, kinds, list(known[name].numpy()))  # type: ignore[union-attr]
            for name in self.names
        ]
        constants = [onnx.numpy_helper.from_array(array, name) for name, array in held.items()]
        outputs = [onnx.ValueInfoProto(name=name) for name in self.made]
        graph = onnx.helper.make_graph([proto], "one", ends, outputs, constants)
        opsets = [onnx.helper.make_opsetid(key, version) for key, version in model.graph.opset_imports.items()]
        whole = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads, options.inter_op_num_threads = 4, 1, 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        data = whole.SerializeToString()
        self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(self, floats: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The node's outputs by name."""
        values = self._session.run(self.made, {name: floats[name] for name in self.names})
        return dict(zip(self.made, values, strict=True))
