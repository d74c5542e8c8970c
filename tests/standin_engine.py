"""What stands in for TensorRT: plans are ONNX files, ONNX Runtime runs them as written, and one thing can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from igate_edge.engines import onnxruntime as ort
from igate_edge.engines.session import Closing
from igate_edge.engines.tensorrt import Plan, PlanOptions
from igate_edge.engines.tensorrt_batch import dynamic_batch
from igate_edge.errors import CheckFailed, GraphError

HERE = {"version": "10.3.0", "compute": "8.7", "device": "Orin (nvgpu)", "driver": "12.6", "memory_mb": 7620}
WIDE = "Thirty-two wide channel vectorized row major Int8 format"
Alter = Callable[["Session", np.ndarray, dict[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass
class Clock:
    """A clock that only moves when it is told to."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Session(Closing):
    """A plan opened by ONNX Runtime. cost_ms: how far a call moves the clock, given the ms since the last one."""

    def __init__(
        self,
        plans: StandIn,
        model: bytes,
        precision: str,
        rows: int,
        altered: bool,
        layers: dict[str, bool] | None = None,
    ) -> None:
        self.plans, self.precision, self.altered, self.calls = plans, precision, altered, 0
        self.layers = layers or {}
        self.plugged = tuple(name for name, plugin in self.layers.items() if plugin)
        self.session = ort._session(model, 1, False)
        source = self.session.get_inputs()[0]
        self.input, self.outputs = source.name, [item.name for item in self.session.get_outputs()]
        self.shape = (rows, *source.shape[1:])
        self.last: dict[str, np.ndarray] = {}
        self.ended, self.closed = plans.clock.now, False

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        assert not self.closed
        self.calls += 1
        answer = dict(zip(self.outputs, self.session.run(self.outputs, {self.input: image}), strict=True))
        idle = (self.plans.clock.now - self.ended) * 1e3
        saved = self.plans.saved_ms(self.plugged) if self.plugged else 0.0
        self.plans.clock.now += (self.plans.cost_ms(self.precision, idle) - saved) / 1e3
        self.ended = self.plans.clock.now
        if self.plans.alter is not None and self.altered:
            return self.plans.alter(self, image, answer)
        return answer

    def layer_times(self, runs: int = 50) -> list[tuple[str, float]]:
        assert not self.closed
        self.plans.profiled.append(self.plugged)
        part = {False: "{0}/{0} + {0}/relu", True: "{0}"}
        return [(part[on].format(name), self.plans.layer_ms(name, on)) for name, on in self.layers.items()]

    def close(self) -> None:
        self.closed = True


@dataclass
class StandIn:
    """`builder_tensorrt.Plans`, with every build and every session that was asked for.

    alter: what a session of a plan built here does to its answers; altered: in which precisions, "plugin" for a plan
    with layers on it. spoil: what is done to the inspector's rows. model: what is done to the ONNX file before it is
    built. layer_ms: of a call, on the plugin or not; saved_ms: of a frame by the layers on it. profiled: whose layers
    were timed, in order. Layers on the plugin compute what their functions did in the last file that had them.
    """

    here: dict[str, Any] = field(default_factory=lambda: dict(HERE))
    alter: Alter | None = None
    altered: tuple[str, ...] = ("int8", "half")
    spoil: Callable[[list[dict[str, Any]]], None] | None = None
    model: Callable[[bytes], bytes] = bytes
    cost_ms: Callable[[str, float], float] = lambda precision, idle: 1.0 if precision == "int8" else 2.0
    layer_ms: Callable[[str, bool], float] = lambda call, plugin: 1.0
    saved_ms: Callable[[tuple[str, ...]], float] = lambda calls: 0.0
    build_s: float = 0.0
    refuses: Callable[[bytes], bool] = lambda model: False
    profiled: list[tuple[str, ...]] = field(default_factory=list)
    loaded: list[tuple[Path, ...]] = field(default_factory=list)
    called: bytes = b""
    clock: Clock = field(default_factory=Clock)
    builds: list[PlanOptions] = field(default_factory=list)
    opened: list[Session] = field(default_factory=list)

    def probe(self) -> dict[str, Any]:
        return self.here

    def compile_plan(self, model: bytes, options: PlanOptions, progress: Any = None, cancelled: Any = None) -> Plan:
        self.builds.append(options)
        self.clock.now += self.build_s
        layers = dict.fromkeys(plugged(model), True)
        if self.refuses(model) or (layers and not options.plugins):
            raise GraphError("TensorRT does not take the graph", "a node", "")
        layers |= dict.fromkeys(called(model), False)
        self.called = model if layers and not any(layers.values()) else self.called
        source = restored(model, self.called) if any(layers.values()) else model
        built = self.model(source if options.batch is None else dynamic_batch(source))
        rows = inspector_rows(model)
        if self.spoil is not None:
            self.spoil(rows)
        about = {"precision": options.precision, "rows": options.batch[1] if options.batch else 1}
        altered = bool(self.alter) and ("plugin" if any(layers.values()) else options.precision) in self.altered
        head = json.dumps({**about, "altered": altered, "layers": layers}).encode()
        chosen = {"aux_streams": 0, "level": 3, "workspace_mb": 64, "ms": 1.0, "seconds": self.build_s}
        text = inspector_json(rows, self.here["version"])
        return Plan(head + b"\n" + built, text, b"timings", chosen, [chosen], 12.5, 0.1)

    def open_plan(self, plan: bytes, plugins: tuple[Path, ...] = ()) -> Session:
        head, model = plan.split(b"\n", 1)
        about = json.loads(head)
        self.loaded.append(plugins)
        if any(about["layers"].values()) and not plugins:
            raise CheckFailed("the engine needs a plugin that is not loaded", "Kernel version 1", "")
        self.opened.append(Session(self, model, **about))
        return self.opened[-1]


def inspector_json(rows: list[dict[str, Any]], version: str, names: tuple[str, ...] = ("image", "seg")) -> str:
    """The inspector's document in the grammar of a version."""
    if int(version.split(".")[0]) < 11:
        return json.dumps({"Layers": rows, "Bindings": list(names)})
    for tensor in (tensor for row in rows for tensor in (*row["Inputs"], *row["Outputs"])):
        if "Format/Datatype" in tensor:
            tensor["DataType"] = tensor.pop("Format/Datatype")
            tensor["Format"] = "kLINEAR"
    tensors = [{"Name": name, "IOMode": "Input", "DataType": "Float", "Dimensions": [1]} for name in names]
    return json.dumps({"Layers": rows, "I/O Tensors": tensors})


def row(name: str, nodes: list[str], reads: str, makes: str, kind: str = "CaskConvolution", **more: Any) -> dict:
    """One layer, as TensorRT 10 lists it."""
    tensors = [[{"Name": f"{name}.{end}", "Dimensions": [1], "Format/Datatype": dtype}] for end, dtype in
               (("in", reads), ("out", makes))]  # fmt: skip
    metadata = "\x1f".join(f"[ONNX Layer: {node}]" for node in nodes)
    return {"Name": name, "LayerType": kind, "Inputs": tensors[0], "Outputs": tensors[1], "Metadata": metadata, **more}


def inspector_rows(model: bytes) -> list[dict[str, Any]]:
    """What an engine would look like that fuses every convolution with its activation and keeps every type."""
    proto = onnx.load_from_string(model)
    graph, functions = proto.graph, {function.name: function for function in proto.functions}
    rows = [row("Reformatting CopyNode for Input Tensor 0 to x", [], "Float", "Int8", "Reformat")]
    rows[0]["Inputs"][0]["Name"] = graph.input[0].name
    for node in graph.node:
        if node.op_type in functions:
            rows += _rows(functions[node.op_type].node, f" | {node.name} ({node.op_type})")
        elif (node.domain, node.op_type) == ("igate", "Kernel"):
            rows.append(row(node.name, [node.name], WIDE, WIDE, "PluginV3"))
    return rows + _rows(graph.node)


def _rows(nodes: Any, call: str = "") -> list[dict[str, Any]]:
    """call: what the parser adds to the metadata of a node from a local function, as TensorRT-RTX 1.7 does it."""
    made, rows = {node.output[0]: node for node in nodes}, []
    for node in nodes:
        makers = [made.get(name) for name in node.input[:2]]
        int8 = all(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)
        if node.op_type in ("Conv", "Gemm"):
            weights = {"Type": "Int8" if int8 else "Half", "Count": 1}
            name, reads = f"{node.name}.weight + {node.name}", WIDE if int8 else "Half"
            rows.append(row(name, [f"{node.name}{call}"], reads, "Half", Weights=weights))
        elif node.op_type == "QuantizeLinear":
            rows.append(row(node.name, [f"{node.name}{call}"], "Half", WIDE, "Reformat", Origin="QDQ"))
    return rows


def called(model: bytes) -> list[str]:
    """Names of the calls of local functions in a file."""
    proto = onnx.load_from_string(model)
    functions = {function.name for function in proto.functions}
    return [node.name for node in proto.graph.node if node.op_type in functions]


def plugged(model: bytes) -> list[str]:
    """Names of the layers on the plugin."""
    nodes = onnx.load_from_string(model).graph.node
    return [node.name for node in nodes if (node.domain, node.op_type) == ("igate", "Kernel")]


def restored(model: bytes, source: bytes) -> bytes:
    """A file with its layers on the plugin as the calls that they were in `source`."""
    proto, before = onnx.load_from_string(model), onnx.load_from_string(source)
    calls = {node.name: node for node in before.graph.node}
    for node in proto.graph.node:
        if (node.domain, node.op_type) == ("igate", "Kernel"):
            node.CopyFrom(calls[node.name])
    del proto.functions[:], proto.graph.initializer[:]
    proto.functions.extend(before.functions)
    proto.graph.initializer.extend(before.graph.initializer)
    return proto.SerializeToString()


def _other(answer: np.ndarray) -> np.ndarray:
    """Raw outputs of another class, further away."""
    return np.roll(answer, 1, axis=1) + np.float32(0.5)


def one_task(name: str) -> Alter:
    """Everything right but one task."""

    def alter(session: Session, image: np.ndarray, answer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**answer, name: _other(answer[name])}

    return alter


def one_row(index: int) -> Alter:
    """Everything right but one row of a batch."""

    def alter(session: Session, image: np.ndarray, answer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if len(image) > index:
            for array in answer.values():
                array[index : index + 1] = _other(array[index : index + 1])
        return answer

    return alter


def previous_answer(session: Session, image: np.ndarray, answer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The answer to the frame before: an output read too early."""
    old, session.last = session.last or answer, answer
    return old


def one_buffer(session: Session, image: np.ndarray, answer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The right answer in arrays that the next frame overwrites."""
    for name, array in answer.items():
        session.last.setdefault(name, np.empty_like(array))[...] = array
    return dict(session.last)


def first_answer(session: Session, image: np.ndarray, answer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the first frame got, for ever: a launch whose failure nobody saw."""
    session.last = session.last or answer
    return {name: array.copy() for name, array in session.last.items()}


def scaled(part: str, factor: float) -> Callable[[bytes], bytes]:
    """A builder that gets one scale wrong: that of the first tensor with `part` in its name."""

    def change(model: bytes) -> bytes:
        proto = onnx.load_from_string(model)
        found = [item for item in proto.graph.initializer if part in item.name and item.name.endswith("_scale")]
        for tensor in found[:1]:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
        return proto.SerializeToString()

    return change
