"""A machine and a board for profiles whose every operator costs by a law, and a plan of few small networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import onnx
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import Behaviour, install

from igate_edge import profiler, profiler_jobs, profiler_nets, profiler_tensorrt
from igate_edge.engines import onnxruntime as ort
from igate_edge.engines import tensorrt
from igate_edge.profiler_clock import Means, Pulse

LAUNCH, READ, MADE, NODE = 0.002, 1e-6, 3e-6, 0.02


def law(read: int, made: int) -> float:
    """Milliseconds of any operator that reads and makes so many elements."""
    return LAUNCH + READ * read + MADE * made


@lru_cache(maxsize=256)
def structure(model: bytes) -> list[ort.NodeTime]:
    return ort.node_times(model, 1, warmup=0)


class Machine:
    """slow: how much slower than its law the machine is just now; calls: how many networks it has run by node."""

    def __init__(self) -> None:
        self.slow, self.calls, self.share = 1.0, 0, 1.0
        self.paused: list[float] = []
        self.stop_after: int | None = None

    def bring(self, reference: bytes, threads: int) -> Means:
        return Means(lambda: Pulse(0.5 * self.slow, self.share), self.nodes, self.whole, self.paused.append)

    def nodes(self, model: bytes, runs: int) -> list[ort.NodeTime]:
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        timed = [(node, self.slow * law(node.read, node.made)) for node in structure(model)]
        return [ort.NodeTime(node.op, node.read, node.made, np.full(runs, ms)) for node, ms in timed]

    def whole(self, models: list[bytes], runs: int) -> list[float]:
        return [self.slow * sum(law(n.read, n.made) + NODE for n in structure(model)) for model in models]


COPY = 0.001


def engine_layers(data: bytes) -> list[dict[str, Any]]:
    """Layers of an engine as TensorRT's inspector words them, each with its "ms" by the law.

    A convolution takes the sum that reads it last and the activation after it; the input's quantisation is a reformat.
    """
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(data)).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    sizes = {value.name: int(np.prod([d.dim_value for d in value.type.tensor_type.shape.dim])) for value in values}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    stored = {tensor.name for tensor in graph.initializer}
    rows: list[dict[str, Any]] = []
    inside: dict[str, int] = {}  # value -> the layer that makes it, while it can take more with it
    for node in graph.node:
        data_in = [name for name in node.input if name and name not in stored]
        makers = [inside[name] for name in data_in if name in inside and len(readers[name]) == 1]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Cast"):
            if node.op_type == "QuantizeLinear" and data_in == [graph.input[0].name]:
                rows.append(_row(f"Reformatting CopyNode for Input Tensor 0 to {node.name}", "Reformat", COPY))
            stored.update(node.output if not data_in else ())  # of weights
            continue
        if makers and node.op_type in ("Add", "Relu", "Clip", "Sigmoid"):
            rows[max(makers)]["Name"] += f" + {node.name}"
            inside[node.output[0]] = max(makers)
            continue
        ms = law(sum(sizes[name] for name in data_in if name in sizes), sizes[node.output[0]])
        rows.append(_row(node.name, "CaskConvolution" if node.op_type == "Conv" else "NoOp", ms))
        if node.op_type == "Conv":
            inside[node.output[0]] = len(rows) - 1
    return rows


def _row(name: str, kind: str, ms: float) -> dict[str, Any]:
    return {"Name": name, "LayerType": kind, "Inputs": [], "Outputs": [], "ms": ms}


@dataclass
class Board:
    """A stand-in for a GPU with TensorRT, whose layers cost by the law. used: the devices that profiles opened."""

    behaviour: Behaviour
    used: list[FakeCuda] = field(default_factory=list)

    def bring(self, reference: bytes, threads: int, precision: str = "int8") -> Means:
        import tensorrt as module

        cuda = FakeCuda(copy_ms=0.0, graph_ms=0.0)
        module.Builder._world.cuda = cuda
        self.used.append(cuda)
        return profiler_tensorrt.on_this_board(reference, precision, cuda=cuda, clock=cuda.clock, pause=lambda _: None)

    def count(self, what: str) -> int:
        """How often TensorRT was told so."""
        return [name for name, _ in self.behaviour.seen].count(what)


def installed(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Board:
    """A board in this process."""
    monkeypatch.setattr(tensorrt, "open_cuda", FakeCuda)
    return Board(install(monkeypatch, FakeCuda(), layers=engine_layers, enqueue_ms=0.0, **changes))


def plan(precision: str, quick: bool = False) -> list[profiler_jobs.Job]:
    """The 3x3 convolutions of a plan without signed ones, and all operators."""
    small = {"grid 1x1", "tail 1x1", "stride 1x1", "grid 5x5", "heads 3x3", "grid 3x3 signed", "tail 3x3 signed"}
    return [job for job in profiler_jobs.jobs(precision, quick) if not job.name.startswith(tuple(small))]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Plans of a dozen tiny networks; gives the number of networks of a plan."""
    small = {"SIZES": ((2, 2), (6, 8)), "COUNTS": (4, 16, 32), "DEPTHWISE": (16, 32)}
    small |= {"TAIL_HW": (2, 2), "TAIL_CIN": (8,), "TAIL_STEPS": (1,), "STRIDED": ((4, 4),), "STRIDED_COUNTS": (16, 32)}
    for name, value in small.items():
        monkeypatch.setattr(profiler_jobs, name, value)
    monkeypatch.setattr(profiler, "jobs", plan)
    shapes = {"merged": ((6, 8), [16] * 3), "split": ((2, 2), [16] * 9)}
    nets = [(name, partial(profiler_nets.chain, *shape, 3)) for name, shape in shapes.items()]
    monkeypatch.setattr(profiler_nets, "anchors", lambda quick: nets)
    return lambda: len(plan("int8"))
