"""Every call to TensorRT's Python API, and nothing else: the one file that imports `tensorrt`, inside its functions.

Only what is the same in 10.3 to 11.x is used: `pytest tests/conformity` type-checks this file against the real
bindings of three versions and looks every name up in them. What these functions make must be kept by the caller
as long as what they make of it: logger, runtime, engine, context, in this order.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsInt, cast

from ..errors import CheckFailed, UnavailableError

if TYPE_CHECKING:
    import tensorrt as trt

#: The oldest version with this API; JetPack 6 has it.
OLDEST = (10, 3)
#: What a logger is told: severity ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE") and text.
Listener = Callable[[str, str], None]
#: numpy's name of a TensorRT type, where it has one.
_NUMPY: dict[str, str] = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}
#: What the bindings raise for a timing cache, by version; AttributeError where there is none (TensorRT-RTX).
_NO_CACHE = (RuntimeError, TypeError, ValueError, AttributeError)
#: Plugin libraries that this process loaded, with what each added: TensorRT refuses to register a plugin twice.
_LOADED: dict[str, list[str]] = {}
_LOADING = threading.Lock()


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine. dtype: numpy's name. shape: -1 where a profile says (least, usual, most)."""

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]
    profile: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Settings:
    """What a builder is told; see tensorrt.PlanOptions."""

    workspace_mb: int
    aux_streams: int
    level: int
    batch: tuple[int, int, int] | None


def version() -> str:
    """The installed TensorRT's version, as "10.3.0"; raises UnavailableError when there is none, or an older one."""
    try:
        import tensorrt as trt
    except (ImportError, OSError) as error:  # OSError: a library of it is missing
        fix = "on a Jetson: sudo apt install python3-libnvinfer, and make the environment with --system-site-packages"
        raise UnavailableError("TensorRT is missing", " ".join(str(error).split())[:200], fix) from error
    found = str(getattr(trt, "__version__", "unknown"))
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdecimal())
    if numbers < OLDEST:
        fix = "use JetPack 6.1 or newer, or install TensorRT 10.3 or newer"
        raise UnavailableError("TensorRT is too old", f"version {found}; 10.3 and newer are supported", fix)
    return found


def logger(listener: Listener) -> trt.ILogger:
    """A logger that hands every message to `listener`; keep it alive as long as anything made with it."""
    import tensorrt as trt

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            listener(severity.name, msg)

    return Logger()


def load_plugin(path: Path) -> list[str]:
    """Load a plugin library, once in this process; the creators that it adds, as "name version".

    A library that is changed while it is loaded takes effect in the next process. Raises UnavailableError.
    """
    import tensorrt as trt

    registry: trt.IPluginRegistry = trt.get_plugin_registry()
    place = os.path.realpath(path)
    with _LOADING:
        before = set(creators())
        added = _LOADED.get(place, [])
        if added and before.issuperset(added):
            return added
        try:
            handle = registry.load_library(str(path))
        except Exception as error:  # pybind11 raises RuntimeError or ValueError, by version
            raise _no_plugin(path, str(error)) from error
        if handle is None:
            raise _no_plugin(path, "TensorRT does not load it, or another library has registered its plugins")
        _LOADED[place] = sorted(set(creators()) - before)
        return _LOADED[place]


def _no_plugin(path: Path, why: str) -> UnavailableError:
    fix = "build it on this device: python -m igate_edge.kernels.build_plugin"
    return UnavailableError("a plugin library cannot be loaded", f"{path.name}: {' '.join(why.split())[:200]}", fix)


def creators() -> list[str]:
    """Every plugin that TensorRT knows now, as "name version"."""
    import tensorrt as trt

    registry: trt.IPluginRegistry = trt.get_plugin_registry()
    found = cast(list[Any], registry.all_creators)
    # Kinds of creators that the bindings do not know have neither.
    return sorted(f"{getattr(one, 'name', '?')} {getattr(one, 'plugin_version', '?')}" for one in found)


@dataclass(frozen=True)
class Parsed:
    """A network, its builder, and the parser that holds its weights; `errors` are sentences, none for a good file."""

    builder: trt.Builder
    network: trt.INetworkDefinition
    parser: trt.OnnxParser
    errors: tuple[str, ...]


def parse(log: trt.ILogger, model: bytes) -> Parsed:
    """An ONNX file's bytes as a strongly typed network. Raises UnavailableError where no builder can be made."""
    import tensorrt as trt

    try:
        builder = trt.Builder(log)
    except (TypeError, RuntimeError) as error:  # its libraries answer with a null pointer without a driver
        raise UnavailableError("TensorRT cannot start here", str(error), "run `igate doctor`") from error
    typed = trt.NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if parser.parse(model):
        return Parsed(builder, network, parser, ())
    found = cast("list[trt.ParserError]", [parser.get_error(index) for index in range(parser.num_errors)])
    said = [f"{one.node_operator() or 'node'} {one.node_name()!r}: {one.desc()} ({one.code()})" for one in found]
    return Parsed(builder, network, parser, tuple(said) or ("the parser gave no reason",))


def configure(parsed: Parsed, settings: Settings) -> trt.IBuilderConfig:
    """A configuration without precision flags, in which the inspector is told everything."""
    import tensorrt as trt

    config = parsed.builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mb * 2**20)
    config.builder_optimization_level = settings.level
    config.max_aux_streams = settings.aux_streams
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings.batch is not None:
        profile = parsed.builder.create_optimization_profile()
        for index in range(parsed.network.num_inputs):
            tensor = parsed.network.get_input(index)
            least, usual, most = (trt.Dims([count, *_sizes(tensor.shape)[1:]]) for count in settings.batch)
            profile.set_shape(tensor.name, least, usual, most)
        config.add_optimization_profile(profile)
    return config


def _sizes(dims: trt.Dims) -> tuple[int, ...]:
    """Its class has no iterator in newer versions."""
    return tuple(dims[index] for index in range(len(dims)))


def use_timing_cache(config: trt.IBuilderConfig, data: bytes) -> tuple[bool, trt.ITimingCache | None]:
    """Give a timing cache to a build, an empty one where TensorRT does not take `data`.

    Says whether it was taken, and gives the cache, to be kept as long as the build takes.
    """
    for content in (data, b"") if data else (b"",):
        try:
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, False):
                return bool(content), cache
        except _NO_CACHE:
            continue
    return False, None


def timing_cache(config: trt.IBuilderConfig) -> bytes:
    """What a build added to its timing cache; empty where there is none."""
    try:
        cache = config.get_timing_cache()
        return b"" if cache is None else _bytes(cache.serialize())
    except _NO_CACHE:
        return b""


def watch(
    config: trt.IBuilderConfig,
    start: Callable[[str, str, int], None],
    stepped: Callable[[str, int], bool],
    finish: Callable[[str], None],
) -> trt.IProgressMonitor:
    """Report a build: start(phase, its parent or "", steps), stepped(phase, index) -> go on?, finish(phase).

    They are called from the builder's threads and must not raise: an exception would end the process. Keep what
    is returned as long as the build takes.
    """
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt) -> None:
            start(phase_name, parent_phase or "", int(num_steps))

        def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
            return stepped(phase_name, int(step))

        def phase_finish(self, phase_name: str) -> None:
            finish(phase_name)

    config.progress_monitor = monitor = Monitor()
    return monitor


def build(parsed: Parsed, config: trt.IBuilderConfig) -> bytes | None:
    """The plan, or None; the logger was told why."""
    plan = parsed.builder.build_serialized_network(parsed.network, config)
    return None if plan is None else _bytes(plan)


def _bytes(memory: trt.IHostMemory) -> bytes:
    """A copy of what TensorRT holds; its class has Python's buffer interface, which its stubs do not say."""
    return bytes(memoryview(cast(Any, memory)))


@dataclass(frozen=True)
class Loaded:
    """An engine with what must outlive it."""

    engine: trt.ICudaEngine
    runtime: trt.Runtime
    log: trt.ILogger


def load(log: trt.ILogger, plan: bytes) -> Loaded | None:
    """The engine of a plan, or None; the logger was told why. Raises UnavailableError where no runtime can be made."""
    import tensorrt as trt

    try:
        runtime = trt.Runtime(log)
    except (TypeError, RuntimeError) as error:
        raise UnavailableError("TensorRT cannot start here", str(error), "run `igate doctor`") from error
    engine = runtime.deserialize_cuda_engine(plan)
    return None if engine is None else Loaded(engine, runtime, log)


def tensors(loaded: Loaded) -> list[Tensor]:
    """Inputs and outputs, in the engine's order. Raises CheckFailed for a type that numpy does not have."""
    import tensorrt as trt

    engine, found = loaded.engine, []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        kind = engine.get_tensor_dtype(name).name
        if kind not in _NUMPY:
            raise CheckFailed("an engine's tensor has a type of its own", f"{name}: {kind}", "export it as float32")
        shape = _sizes(engine.get_tensor_shape(name))
        profile = engine.get_tensor_profile_shape(name, 0) if is_input and -1 in shape else ()
        found.append(Tensor(name, is_input, _NUMPY[kind], shape, tuple(map(_sizes, profile))))
    return found


def layers(loaded: Loaded) -> str:
    """The engine inspector's JSON."""
    import tensorrt as trt

    return loaded.engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)


def facts(loaded: Loaded) -> dict[str, int]:
    """{"layers", "aux_streams", "device_memory": bytes of one context}."""
    engine = loaded.engine
    memory = cast(int, engine.device_memory_size_v2)
    return {"layers": engine.num_layers, "aux_streams": engine.num_aux_streams, "device_memory": memory}


def context(loaded: Loaded) -> trt.IExecutionContext | None:
    """A context of an engine, for one call at a time; None where memory is short: the logger was told."""
    return loaded.engine.create_execution_context()


def bind(running: trt.IExecutionContext, name: str, address: int) -> bool:
    """Say where a tensor lies on the device."""
    return running.set_tensor_address(name, address)


def set_shape(running: trt.IExecutionContext, name: str, shape: tuple[int, ...]) -> bool:
    """Choose the shape of an input within its profile."""
    return running.set_input_shape(name, shape)


def enqueue(running: trt.IExecutionContext, stream: int) -> bool:
    """Start a call on a CUDA stream's handle; False where TensorRT refused."""
    return running.execute_async_v3(stream)


def profile(running: trt.IExecutionContext, record: Callable[[str, float], None]) -> Any:
    """Report each layer's milliseconds of every later call; keep what is returned as long as the context."""
    import tensorrt as trt

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: SupportsFloat) -> None:
            record(layer_name, float(ms))

    running.profiler = profiler = Profiler()
    return profiler
