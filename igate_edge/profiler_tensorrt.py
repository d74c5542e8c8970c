"""How a profile reaches a board: networks built and run through TensorRT, layers timed by its own profiler.

An engine's layers are told apart by the ONNX nodes that they name (see engines.inspector). What `compiler.executed`
says of a float session is what TensorRT runs too: a convolution with the sum and the activation that follow it.
Its logic is tested on stand-ins for TensorRT; not run on a device.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from .compiler import executed, graph, groups, quantize
from .compiler.executed import Step
from .compiler.half import half
from .compiler.latency import LEAST_MS
from .engines import inspector
from .engines import tensorrt as trt
from .engines.cuda_memory import Cuda, open_cuda
from .engines.onnxruntime import NodeTime
from .errors import CheckFailed
from .profiler_clock import Means, Pulse, beat, in_turn

#: Calls whose mean is one sample of a layer's time.
CALLS = 4
#: Plans that are kept: as many as there are whole networks, since building one takes seconds to minutes.
KEPT = 8
#: How TensorRT names a copy that it puts in by itself.
_COPY = "Reformatting CopyNode"


def engine_file(model: ir.Model, precision: str) -> bytes:
    """What TensorRT is given for a float network: INT8 with FP16 around it ("int8"), or FP16 alone ("float").

    One range serves all tensors: time does not depend on it.
    """
    if precision == "int8":
        values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
        model = quantize.quantize(model, {value.name: (-1.0, 1.0) for value in values if value.name}, "trt")
    return graph.dump(half(model))


def on_this_board(
    reference: bytes,
    precision: str,
    *,
    cuda: Cuda | None = None,
    clock: Callable[[], float] = time.perf_counter,
    pause: Callable[[float], object] = time.sleep,
) -> Means:
    """Means that time through TensorRT, of float networks as ONNX files; builds each in `precision`.

    cuda: an open adapter, closed by the means (None: open one). Raises UnavailableError where TensorRT or a device is
    missing. Whether other programs use the GPU nobody tells: the share of a pulse is 1, their work shows in its ms.
    """
    board = _Board(precision, open_cuda() if cuda is None else cuda, clock)
    try:
        session = board.open(reference)
    except BaseException:
        board.cuda.close()
        raise

    def close() -> None:
        session.close()
        board.cuda.close()

    return Means(lambda: Pulse(beat(session, clock), 1.0), board.nodes, board.whole, pause, close)


class _Board:
    """A device in use, the plans of late, and what TensorRT knows by now of how fast its kernels are."""

    def __init__(self, precision: str, cuda: Cuda, clock: Callable[[], float]) -> None:
        self.cuda = cuda
        self._precision, self._clock = precision, clock
        self._plans: dict[str, trt.Plan] = {}
        self._timing = b""

    def plan(self, data: bytes) -> trt.Plan:
        key = hashlib.sha256(data).hexdigest()
        if key not in self._plans:
            options = trt.PlanOptions("int8" if self._precision == "int8" else "half", timing_cache=self._timing)
            model = engine_file(_read(data), self._precision)
            plan = trt.compile_plan(model, options, cuda=self.cuda, clock=self._clock)
            self._timing = plan.timing_cache
            while len(self._plans) >= KEPT:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = plan
        return self._plans[key]

    def open(self, data: bytes) -> trt.Session:
        """As a product's engine is opened."""
        return trt.open_plan(self.plan(data).plan, cuda=self.cuda, clock=self._clock)

    def nodes(self, data: bytes, runs: int) -> list[NodeTime]:
        """See Means; one step of `executed` each, in the order of the graph's nodes."""
        steps = executed.steps(_read(data), "float")
        plan = self.plan(data)
        layers = inspector.parse(plan.layers).layers
        with trt.open_plan(plan.plan, memory="copy", graph=False, cuda=self.cuda, clock=self._clock) as session:
            samples = [by_step(session.layer_times(CALLS), layers, steps) for _ in range(runs)]
        columns = np.array(samples).T
        return [
            NodeTime(step.op, step.elements_in, step.elements_out, ms) for step, ms in zip(steps, columns, strict=True)
        ]

    def whole(self, models: list[bytes], runs: int) -> list[float]:
        with contextlib.ExitStack() as stack:
            return in_turn([stack.enter_context(self.open(data)) for data in models], runs, self._clock)


def by_step(
    times: Sequence[tuple[str, float]], layers: Sequence[inspector.Layer], steps: Sequence[Step]
) -> list[float]:
    """Milliseconds of every step, from those of an engine's layers by name, in the engine's order.

    A layer's time is that of the convolution that it names, else of the last step. One that names none, such as a
    reformat, counts with the layer before it. A step that no layer is about takes next to nothing. Raises CheckFailed
    where a convolution has no layer of its own: its time cannot be told.

    >>> layers = [inspector.Layer(name, "", (name,), (), ()) for name in ("copy", "add", "more")]
    >>> by_step([("copy", 0.5), ("add", 2.0), ("more", 0.25)], layers, [Step("add", "Add", 4, 4)])
    [2.75]
    """
    named = {layer.name: layer for layer in layers}
    place = {step.name: index for index, step in enumerate(steps)}
    spent, timed, last, before = [0.0] * len(steps), set[int](), -1, 0.0
    for name, ms in times:
        found = _owner(named[name], place, steps) if name in named else -1
        if found >= 0:
            ms, before, last = ms + before, 0.0, found
            timed.add(found)
        if last >= 0:
            spent[last] += ms
        else:
            before += ms  # nothing ran yet: it counts with the first step
    for index, step in enumerate(steps):
        if step.conv is not None and index not in timed:
            evidence = f"no layer of the engine is about {step.name}; layers: {', '.join(named)[:200]}"
            raise CheckFailed("the times of a convolution cannot be told", evidence, _REPORT)
    return [max(ms, LEAST_MS) for ms in spent]


_REPORT = "report it with the engine's layers: a latency table needs one layer a convolution"


def _owner(layer: inspector.Layer, place: dict[str, int], steps: Sequence[Step]) -> int:
    """Index of the step that a layer is about; -1 for none."""
    if layer.name.startswith(_COPY):
        return -1
    own = sorted(place[node] for node in layer.nodes if node in place)
    convs = [index for index in own if steps[index].conv is not None]
    if len(convs) > 1:
        evidence = f"{layer.name:.100} runs {', '.join(steps[index].name for index in convs)[:200]}"
        raise CheckFailed("TensorRT runs several convolutions as one layer", evidence, _REPORT)
    return convs[0] if convs else own[-1] if own else -1


def _read(data: bytes) -> ir.Model:
    import onnx

    return groups.typed(ir.from_proto(onnx.load_from_string(data)))
