"""ONNX Runtime on the CPU, the default engine: open, run, close; and what its optimiser really made of an INT8 graph.

`onnxruntime` is imported on first use. Measured on an AVX2 CPU without VNNI, 1 thread, ONNX Runtime 1.32: a ResNet-18
layout at 128x128 runs 1.7x (width 32) to 2.0x (width 64) faster in the `ort` dialect than in float; the `trt` dialect
runs in float there, at 0.8x to 0.9x.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import CheckFailed, GraphError, InputError, UnavailableError
from .session import Closing, check_image, closed

#: More threads than this, on a machine with fewer cores, only wait for each other.
MAX_THREADS = 64
PROVIDERS = ["CPUExecutionProvider"]
INT8_CONVS = frozenset({"QLinearConv", "ConvInteger", "NhwcQLinearConv"})
#: Making a session touches global state in ONNX Runtime (cases R4); running one does not.
_START = threading.Lock()


def _load() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UnavailableError("ONNX Runtime is missing", str(error), "pip install onnxruntime") from error
    return onnxruntime


def probe() -> dict[str, Any]:
    """{"version", "provider"} of the installed ONNX Runtime; raises UnavailableError when there is none."""
    runtime = _load()
    return {"version": str(runtime.__version__), "provider": PROVIDERS[0]}


def check_threads(threads: int) -> None:
    """Raise InputError unless an engine can be asked for that many threads."""
    most = max(MAX_THREADS, os.cpu_count() or 1)
    if type(threads) is not int or not 1 <= threads <= most:
        raise InputError(f"threads must be a number from 1 to {most}", f"got {threads!r:.60}", "pass threads=1")


def open(model: bytes, threads: int = 1, optimise: bool = True) -> Session:
    """A ready session of an ONNX file's bytes on `threads` CPU threads.

    `optimise=False` runs the graph as written, without fusions: the reference for golden outputs. Raises GraphError
    (not a model that ONNX Runtime takes, or a dynamic input shape), InputError (threads < 1), UnavailableError.
    """
    return Session(_session(model, threads, optimise))


def _session(model: bytes, threads: int, optimise: bool, save: Path | None = None, trace: Path | None = None) -> Any:
    runtime = _load()
    check_threads(threads)
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # what goes wrong is raised; the library need not print it too
    if not optimise:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save is not None:
        options.optimized_model_filepath = str(save)
    if trace is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(trace)
    try:
        with _START:
            return runtime.InferenceSession(model, options, providers=PROVIDERS)
    except Exception as error:  # ONNX Runtime raises a dozen unrelated classes here
        text = " ".join(str(error).split())[:300]
        raise GraphError(
            "ONNX Runtime does not take this model", text, "export it again, or open it in a viewer"
        ) from error


class Session(Closing):
    """One opened model. `run` may be called from several threads at once: every call has its own buffers.

    `close` waits for nobody: a call that has begun ends normally, a later one raises InputError.
    The caller owns the results.
    """

    def __init__(self, session: Any) -> None:
        source = session.get_inputs()
        if len(source) != 1 or not all(isinstance(size, int) and size > 0 for size in source[0].shape):
            shapes = ", ".join(f"{item.name} {item.shape}" for item in source)
            raise GraphError("the model needs one input of static shape", shapes, "export with a static batch of 1")
        self.input = str(source[0].name)
        self.shape: tuple[int, ...] = tuple(source[0].shape)
        self.dtype = np.dtype(np.float16 if source[0].type == "tensor(float16)" else np.float32)
        self.outputs = [str(item.name) for item in session.get_outputs()]
        self._session = session

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Raw outputs by name for a preprocessed image, float32 of the input's shape; else raises InputError."""
        session = self._session
        if session is None:
            raise closed()
        check_image(image, self.shape, self.dtype)
        try:
            values = session.run(self.outputs, {self.input: image})
        except Exception as error:  # as for opening: classes without a common base
            text = " ".join(str(error).split())[:300]
            raise GraphError(
                "ONNX Runtime cannot run this model", text, "free memory, or export the model again"
            ) from error
        return dict(zip(self.outputs, values, strict=True))

    def close(self) -> None:
        """Free the session; closing twice is fine."""
        self._session = None


@dataclass(frozen=True)
class Coverage:
    """The optimised graph: share of convolution MACs in INT8, each convolution's arithmetic and MACs, node counts."""

    int8_conv_macs_share: float
    convs: dict[str, str]
    macs: dict[str, int]
    op_counts: dict[str, int]

    def require(self, share: float) -> None:
        """Raise CheckFailed, naming the largest float convolutions, unless at least `share` of the MACs run as INT8."""
        if self.int8_conv_macs_share < share:
            floats = sorted((name for name, kind in self.convs.items() if kind == "float"), key=lambda n: -self.macs[n])
            raise CheckFailed(
                "too few convolutions run as INT8",
                f"{self.int8_conv_macs_share:.1%} of the MACs, {share:.1%} asked; in float: {', '.join(floats[:5])}",
                "use precision='float' or 'auto' for this network",
            )


def inspect(model: bytes) -> Coverage:
    """Read the graph that ONNX Runtime optimised `model` to, and tell which convolutions it runs as INT8.

    A convolution is found again by the name of its stored weights. A model without convolutions has the share 1.0.
    Raises GraphError like `open`.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "optimised.onnx"
        _session(model, 1, True, save=saved)
        optimised = onnx.load(str(saved))
    integer = {
        node.input[3 if "QLinear" in node.op_type else 1] for node in optimised.graph.node if node.op_type in INT8_CONVS
    }
    macs, weights = conv_macs(onnx.shape_inference.infer_shapes(onnx.load_from_string(model)))
    kinds = {name: "int8" if weights[name] in integer else "float" for name in macs}
    done = sum(macs[name] for name, kind in kinds.items() if kind == "int8")
    total = sum(macs.values())
    counts = dict(sorted(Counter(node.op_type for node in optimised.graph.node).items()))
    return Coverage(done / total if total else 1.0, kinds, macs, counts)


def conv_macs(model: Any) -> tuple[dict[str, int], dict[str, str]]:
    """MACs and the name of the stored weight of every convolution, by node name (by output name where it has none)."""
    graph = model.graph
    known = {value.name: value for value in (*graph.value_info, *graph.output)}
    shapes = {item.name: tuple(item.dims) for item in graph.initializer}
    stored = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    macs: dict[str, int] = {}
    weights: dict[str, str] = {}
    for node in graph.node:
        if node.op_type not in ("Conv", "ConvInteger", "QLinearConv"):
            continue
        weight = node.input[3 if node.op_type == "QLinearConv" else 1]
        weight = stored.get(weight, weight)
        name = node.name or node.output[0]
        if weight not in shapes or node.output[0] not in known:
            fix = "export with static shapes and stored weights"
            raise GraphError("a convolution's size is unknown", f"node {name!r}", fix)
        out = [axis.dim_value for axis in known[node.output[0]].type.tensor_type.shape.dim]
        macs[name] = int(np.prod(out)) * int(np.prod(shapes[weight][1:]))
        weights[name] = weight
    return macs, weights


@dataclass(frozen=True)
class NodeTime:
    """A node of the optimised graph: operator, elements that it reads and makes, ms of every run, float64 [runs]."""

    op: str
    read: int
    made: int
    ms: np.ndarray


def node_times(model: bytes, runs: int, threads: int = 1, warmup: int = 3) -> list[NodeTime]:
    """Time every node of a model on noise, in the order in which nodes run, by ONNX Runtime's own profiler.

    Its clock ticks in microseconds: average many runs. Raises GraphError like `open`.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = _session(model, threads, True, trace=Path(folder) / "trace")
        source = session.get_inputs()[0]
        image = np.random.default_rng(0).standard_normal(source.shape, np.float32)
        for _ in range(warmup + runs):
            session.run(None, {source.name: image})
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes.setdefault(event["args"]["node_index"], []).append(event)
    found = []
    for calls in sorted(nodes.values(), key=lambda calls: calls[-1]["ts"]):
        about = calls[-1]["args"]
        read, made = (_elements(about[key]) for key in ("input_type_shape", "output_type_shape"))
        ms = np.array([call["dur"] for call in calls[warmup:]]) / 1e3
        found.append(NodeTime(str(about["op_name"]), read, made, ms))
    return found


def _elements(described: list[dict[str, list[int]]]) -> int:
    """Elements of the tensors that have a shape; scales and zero points have none."""
    return sum(int(np.prod(shape)) for one in described for shape in one.values() if shape)


#: Seconds since some moment.
Clock = Callable[[], float]


class Runner(Protocol):
    """Anything with a `run`: a session of any backend, or a stub."""

    def run(self, image: np.ndarray) -> Any: ...


@dataclass(frozen=True)
class Timing:
    """Interleaved comparison: median milliseconds of a and b, median and quartiles of the paired ratios a / b."""

    a_ms: float
    b_ms: float
    ratio: float
    spread: tuple[float, float]
    rounds: int


def ab_time(
    a: Runner, b: Runner, image: np.ndarray, rounds: int = 30, warmup: int = 3, clock: Clock = time.perf_counter
) -> Timing:
    """Time two runners in turn, changing who is first: a drifting clock hits both alike. Milliseconds a call."""
    if rounds < 1:
        raise InputError("rounds must be at least 1", f"{rounds} given", "use 30 or more")
    for _ in range(warmup):
        a.run(image)
        b.run(image)
    times: list[tuple[float, float]] = []
    for index in range(rounds):
        first, second = (a, b) if index % 2 == 0 else (b, a)
        pair = (_milliseconds(first, image, clock), _milliseconds(second, image, clock))
        times.append(pair if index % 2 == 0 else pair[::-1])
    return compare(times)


def _milliseconds(runner: Runner, image: np.ndarray, clock: Clock) -> float:
    start = clock()
    runner.run(image)
    return (clock() - start) * 1e3


def ratio_quartiles(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Quartiles (lower, median, upper) of the ratios a / b taken within one round each.

    >>> ratio_quartiles(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]))
    (2.0, 2.0, 2.0)
    """
    low, middle, high = np.percentile(a / np.maximum(b, 1e-9), (25, 50, 75))
    return float(low), float(middle), float(high)


def compare(times: Sequence[tuple[float, float]]) -> Timing:
    """Medians of paired samples (a, b) in milliseconds.

    >>> compare([(2.0, 4.0), (3.0, 6.0), (2.0, 1.0)]).ratio
    0.5
    """
    pairs = np.asarray(times, np.float64)
    low, middle, high = ratio_quartiles(pairs[:, 0], pairs[:, 1])
    a_ms, b_ms = (float(value) for value in np.median(pairs, axis=0))
    return Timing(a_ms, b_ms, middle, (low, high), len(pairs))


def pick(
    int8: bytes | Runner,
    plain: bytes | Runner,
    image: np.ndarray,
    rounds: int = 30,
    clock: Clock = time.perf_counter,
) -> tuple[str, str, Timing]:
    """("int8" | "float", reason, times of INT8 as a, float as b): the faster on this machine, 1 thread (Q12)."""
    opened = [open(item) if isinstance(item, bytes) else item for item in (int8, plain)]
    timing = ab_time(opened[0], opened[1], image, rounds, clock=clock)
    words = (
        f"INT8 {timing.a_ms:.2f} ms, float {timing.b_ms:.2f} ms, ratio {timing.ratio:.2f} "
        f"({timing.spread[0]:.2f}-{timing.spread[1]:.2f}, {timing.rounds} pairs)"
    )
    if timing.ratio < 1.0:
        return "int8", f"INT8 is faster on this machine: {words}", timing
    return "float", f"INT8 is not faster on this machine: {words}", timing
