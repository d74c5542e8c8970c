"""A stand-in for the `tensorrt` module of 8, 10 and 11: records what it is told, computes a toy, breaks on order.

It knows the names that `engines.tensorrt_api` uses; `tests/conformity` checks that the real bindings have each of them.
A plan is JSON. Its toy network gives, for each output and row, the row's sum plus the output's number.
"""

from __future__ import annotations

import enum
import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from fake_cuda import FakeCuda

_ONNX_TYPES = {1: "FLOAT", 10: "HALF", 3: "INT8", 2: "UINT8", 7: "INT64"}
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "UINT8": np.uint8, "INT64": np.int64}


def enumeration(name: str, *members: str) -> Any:
    return enum.IntEnum(name, {member: number for number, member in enumerate(members)})


@dataclass
class Behaviour:
    """What goes wrong, and what was seen. `builds`: what the first builds log instead of building, one a build."""

    version: str = "10.3.0"
    builds: list[str] = field(default_factory=list)
    ms: Callable[[int, int], float] = lambda streams, level: 4.0
    enqueue_ms: float = 0.2
    mapped_ms: float = 0.0
    phases: tuple[tuple[str, str, int], ...] = (("Building", "", 2), ("Tactics", "Building", 2))
    timing: str = "taken"  # or "none", "refused", "raises", "absent"
    enqueue: Callable[[], bool] = lambda: True
    unwritten: dict[str, slice] = field(default_factory=dict)
    load_says: str = ""
    plugins: dict[str, list[str]] = field(default_factory=dict)
    needs: str = ""
    no_context: bool = False
    seen: list[tuple[str, Any]] = field(default_factory=list)
    creators: list[str] = field(default_factory=list)
    overlaps: int = 0
    while_building: Callable[[], None] = lambda: None
    #: What the inspector lists for a model's file, each row with its "ms" (taken out again); None: names alone.
    layers: Callable[[bytes], list[dict[str, Any]]] | None = None


def make(cuda: FakeCuda, behaviour: Behaviour) -> types.ModuleType:
    """The module, to be put into sys.modules as "tensorrt"."""
    module = types.ModuleType("tensorrt")
    major = int(behaviour.version.split(".")[0]) if behaviour.version[0].isdecimal() else 8
    module.__dict__.update(_enums(major), **_plain(), __version__=behaviour.version)
    world = World(module, cuda, behaviour)
    module.__dict__.update({name: type(name, (base,), {"_world": world}) for name, base in _CLASSES.items()})
    registry = _registry(behaviour)
    module.__dict__["get_plugin_registry"] = lambda: registry
    return module


def _enums(major: int) -> dict[str, Any]:
    flags = {8: ("EXPLICIT_BATCH",), 10: ("EXPLICIT_BATCH", "STRONGLY_TYPED")}.get(major, ("STRONGLY_TYPED",))
    precision = ("FP16", "INT8") if major < 11 else ()
    return {
        "NetworkDefinitionCreationFlag": enumeration("NetworkDefinitionCreationFlag", *flags),
        "BuilderFlag": enumeration("BuilderFlag", "DEBUG", "TF32", *precision),
        "MemoryPoolType": enumeration("MemoryPoolType", "WORKSPACE"),
        "ProfilingVerbosity": enumeration("ProfilingVerbosity", "LAYER_NAMES_ONLY", "DETAILED", "NONE"),
        "TensorIOMode": enumeration("TensorIOMode", "NONE", "INPUT", "OUTPUT"),
        "DataType": enumeration("DataType", *_NUMPY, "BF16"),
        "LayerInformationFormat": enumeration("LayerInformationFormat", "ONELINE", "JSON"),
    }


class Dims:
    """As in the bindings of 11: a length and items, no iterator."""

    def __init__(self, shape: Any) -> None:
        self._shape = tuple(shape)

    def __len__(self) -> int:
        return len(self._shape)

    def __getitem__(self, index: int) -> int:
        return self._shape[index]

    __iter__ = None


def _plain() -> dict[str, Any]:
    severity = enumeration("Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
    return {
        "ILogger": type("ILogger", (), {"Severity": severity}),
        "IProgressMonitor": type("IProgressMonitor", (), {}),
        "IProfiler": type("IProfiler", (), {}),
        "Dims": Dims,
    }


class Memory(bytearray):
    """IHostMemory: nothing but the buffer interface."""


def _registry(behaviour: Behaviour) -> Any:
    class Registry:
        @property
        def all_creators(self) -> list[Any]:
            return [types.SimpleNamespace(name=name, plugin_version="1") for name in behaviour.creators]

        def load_library(self, plugin_path: str) -> object | None:
            behaviour.seen.append(("load_library", plugin_path))
            found = behaviour.plugins.get(plugin_path.rsplit("/", 1)[-1])
            if found is None:
                raise RuntimeError("dlopen: no such file")
            if set(found) & set(behaviour.creators):
                return None  # as NvInferRuntimeCommon.h says: one of the plugins is already registered
            behaviour.creators += found
            return object()

    return Registry()


@dataclass
class World:
    """What the classes of one module share."""

    module: Any
    cuda: FakeCuda
    behaviour: Behaviour

    def see(self, what: str, value: Any) -> None:
        self.behaviour.seen.append((what, value))


class _Config:
    _world: World
    _profile = _cache = None
    profiling_verbosity = builder_optimization_level = max_aux_streams = progress_monitor = None

    def set_flag(self, flag: Any) -> None:
        self._world.see("set_flag", flag)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._world.see("workspace", pool_size // 2**20)

    def add_optimization_profile(self, profile: Any) -> int:
        self._profile = profile
        return 0

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        content, timing = bytes(serialized_timing_cache), self._world.behaviour.timing
        self._world.see("timing_cache", content)
        if timing == "absent":
            raise AttributeError("create_timing_cache")
        if timing == "raises" and content:
            raise RuntimeError("corrupt")
        if timing == "none":
            return None
        return types.SimpleNamespace(content=content, serialize=lambda: Memory(content + b"+"))

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if self._world.behaviour.timing == "refused" and cache.content:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache


class _Builder:
    _world: World

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> Any:
        self._world.see("create_network", flags)
        return types.SimpleNamespace(num_inputs=1, inputs=[], outputs=[])

    def create_builder_config(self) -> Any:
        return self._world.module.IBuilderConfig()

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, Any] = {}
        return types.SimpleNamespace(shapes=shapes, set_shape=lambda name, *sizes: shapes.update({name: sizes}))

    def build_serialized_network(self, network: Any, config: Any) -> Memory | None:
        behaviour, module = self._world.behaviour, self._world.module
        assert self._world.cuda.depth > 0, "a build without a current context"
        assert config.profiling_verbosity == module.ProfilingVerbosity.DETAILED
        self._world.see("build", (config.max_aux_streams, config.builder_optimization_level))
        behaviour.while_building()
        try:
            if not self._report(config.progress_monitor):
                return None
        except BaseException as error:
            raise RuntimeError("std::terminate: an exception in a thread of the builder") from error
        if behaviour.builds:
            self._logger.log(module.ILogger.Severity.ERROR, behaviour.builds.pop(0))
            return None
        rows = None
        if config._profile is not None:
            rows = [sizes[0] for sizes in next(iter(config._profile.shapes.values()))]
        ms = behaviour.ms(config.max_aux_streams, config.builder_optimization_level)
        plan = {"version": behaviour.version, "inputs": network.inputs, "outputs": network.outputs}
        plan.update(rows=rows, ms=ms, needs=behaviour.needs, streams=config.max_aux_streams)
        if behaviour.layers is not None:
            plan["layers"] = behaviour.layers(network.model)
            plan["ms"] = sum(row["ms"] for row in plan["layers"])
        return Memory(json.dumps(plan).encode())

    def _report(self, monitor: Any) -> bool:
        phases = self._world.behaviour.phases
        for name, parent, steps in phases:
            monitor.phase_start(name, parent or None, steps)
        for name, _, steps in reversed(phases):
            for index in range(steps):
                if not monitor.step_complete(name, index):
                    return False
            monitor.phase_finish(name)
        return True


class _Parser:
    _world: World
    num_errors = 0

    def __init__(self, network: Any, logger: Any) -> None:
        self._network = network

    def parse(self, model: bytes) -> bool:
        try:
            graph = onnx.load_from_string(model).graph
        except Exception:
            self.num_errors = 1
            return False
        network, self._network.model = self._network, model
        network.inputs, network.outputs = ([_described(item) for item in side] for side in (graph.input, graph.output))
        name, shape, _ = network.inputs[0]
        network.get_input = lambda index: types.SimpleNamespace(name=name, shape=Dims(shape))
        return True

    def get_error(self, index: int) -> Any:
        texts = {"code": "INVALID_GRAPH", "desc": "not a model", "node_name": "conv1", "node_operator": "Conv"}
        return types.SimpleNamespace(**{name: (lambda text=text: text) for name, text in texts.items()})


def _described(value: Any) -> tuple[str, list[int], str]:
    kind = value.type.tensor_type
    shape = [-1 if axis.dim_param else axis.dim_value for axis in kind.shape.dim]
    return value.name, shape, _ONNX_TYPES[kind.elem_type]


class _Runtime:
    _world: World

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        behaviour, module = self._world.behaviour, self._world.module
        assert self._world.cuda.depth > 0, "loading without a current context"
        text = behaviour.load_says
        try:
            plan = json.loads(serialized_engine)
        except ValueError:
            plan, text = {}, text or "Magic tag does not match"
        if plan.get("version", behaviour.version) != behaviour.version:
            text = f"Version tag does not match: serialised by {plan['version']}"
        if plan.get("needs") and plan["needs"] not in behaviour.creators:
            text = f"getPluginCreator could not find plugin: {plan['needs']} version: 1"
        if text:
            self._logger.log(module.ILogger.Severity.ERROR, text)
            return None
        return module.ICudaEngine(plan)


class _Engine:
    _world: World
    num_layers, device_memory_size_v2, num_aux_streams, num_io_tensors = 7, 2**20, 0, 0

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan, self.num_aux_streams = plan, plan["streams"]
        self._all = {name: (shape, kind) for name, shape, kind in (*plan["inputs"], *plan["outputs"])}
        self.num_io_tensors = len(self._all)

    def get_tensor_name(self, index: int) -> str:
        return list(self._all)[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._world.module.TensorIOMode
        return modes.INPUT if name in [item[0] for item in self._plan["inputs"]] else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self._world.module.DataType[self._all[name][1]]

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self._all[name][0])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        return [Dims([rows, *self._all[name][0][1:]]) for rows in self._plan["rows"]]

    def create_engine_inspector(self) -> Any:
        rows = [{key: row[key] for key in row if key != "ms"} for row in self._plan.get("layers", [])]
        text = json.dumps({"Layers": rows or [{"Name": "conv1"}], "Bindings": list(self._all)})
        return types.SimpleNamespace(get_engine_information=lambda format: text)

    def create_execution_context(self) -> Any:
        self._world.see("context", None)
        return None if self._world.behaviour.no_context else self._world.module.IExecutionContext(self)


class _Context:
    _world: World
    profiler: Any = None

    def __init__(self, engine: _Engine) -> None:
        self._engine, self._addresses, self._busy = engine, dict[str, int](), False
        self._source = engine._plan["inputs"][0]
        self._rows, self._changes = self._source[1][0], 0

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._world.see("bind", name)
        self._addresses[name] = memory
        return memory != 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine._plan["rows"]
        self._rows, self._changes = shape[0], self._changes + 1
        return least <= shape[0] <= most

    def execute_async_v3(self, stream_handle: int) -> bool:
        behaviour, cuda = self._world.behaviour, self._world.cuda
        stream = cuda.find(stream_handle)
        if not stream.noting:
            cuda.now += behaviour.enqueue_ms / 1e3
        if not behaviour.enqueue():
            return False
        behaviour.overlaps += self._busy
        self._busy = not stream.noting
        cuda.calls.append("enqueue")
        rows, mapped = self._rows, self._addresses[self._source[0]] in cuda.mapped
        ms = self._engine._plan["ms"] + (behaviour.mapped_ms if mapped else 0.0)
        changes = self._changes if stream.noting else None
        cuda.put(stream, ms, lambda: self._compute(rows, changes))
        if self.profiler is not None:
            listed = [(row["Name"], row["ms"]) for row in self._engine._plan.get("layers", [])]
            for name, spent in listed or (("conv1", 1.5), ("conv2", 0.5)):
                self.profiler.report_layer_time(name, spent)
        return True

    def _view(self, name: str, rows: int) -> np.ndarray:
        shape, kind = self._engine._all[name]
        full = (rows if shape[0] == -1 else shape[0], *shape[1:])
        size = int(np.prod(full)) * np.dtype(_NUMPY[kind]).itemsize
        return self._world.cuda.at(self._addresses[name], size).view(_NUMPY[kind]).reshape(full)

    def _compute(self, rows: int, changes: int | None) -> None:
        assert changes in (None, self._changes), "undefined: a graph outlived a change of its context"
        sums = self._view(self._source[0], rows).astype(np.float32).reshape(rows, -1).sum(1)
        for number, (name, _, kind) in enumerate(self._engine._plan["outputs"]):
            target = self._view(name, rows)
            values = (sums + number).astype(_NUMPY[kind]).reshape(rows, *[1] * (target.ndim - 1))
            made = np.broadcast_to(values, target.shape).copy()
            skipped = self._world.behaviour.unwritten.get(name)
            if skipped is not None:
                made.reshape(-1)[skipped] = target.reshape(-1)[skipped]
            target[...] = made
        self._busy = False


#: Name in the module, and what it is made of.
_CLASSES = {
    "Builder": _Builder,
    "IBuilderConfig": _Config,
    "OnnxParser": _Parser,
    "Runtime": _Runtime,
    "ICudaEngine": _Engine,
    "IExecutionContext": _Context,
}


def install(monkeypatch: Any, cuda: FakeCuda, **changes: Any) -> Behaviour:
    """Make `import tensorrt` find the stand-in; what it will do and what it saw."""
    behaviour = Behaviour(**changes)
    monkeypatch.setitem(sys.modules, "tensorrt", make(cuda, behaviour))
    return behaviour
