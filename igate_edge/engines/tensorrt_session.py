"""A TensorRT plan that answers frames: buffers bound once, two calls in flight, every status checked.

A slot is what one call needs: a context, a stream, an event, buffers. No two calls meet in one slot; results are read
after its event and handed out as the caller's own arrays.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import CheckFailed, IgateError, InputError
from . import tensorrt_api as api
from .cuda_memory import Cuda
from .onnxruntime import ab_time
from .session import Closing, check_image, closed
from .tensorrt_log import Log
from .tensorrt_slot import Slot, input_of, rows_of

#: Calls in flight: the next frame is copied while this one is computed.
SLOTS = 2
#: Rounds for each choice that is made by measuring.
ROUNDS = 50
_ENQUEUES = 20


class Ticket:
    """A call in flight. `result()` waits for it and gives its outputs, from any thread, as often as asked."""

    def __init__(self, slot: Slot, current: Callable[[], Any]) -> None:
        self._slot, self._current = slot, current
        self._values: dict[str, np.ndarray] = {}
        self._error: IgateError | None = None

    def settle(self) -> None:
        """Take the outputs from the slot, whose lock is held; afterwards it is free for another call."""
        if self._slot.ticket is not self:
            return
        try:
            with self._current():
                self._values = self._slot.read()
        except IgateError as error:
            self._error = error
        finally:
            self._slot.ticket = None

    def result(self) -> dict[str, np.ndarray]:
        """Raw outputs by name, arrays of the caller's own. Raises CheckFailed where the call failed."""
        with self._slot.lock:
            self.settle()
        if self._error is not None:
            raise self._error
        return self._values


class Session(Closing):
    """An opened plan; the interface of `engines.onnxruntime.Session`, and two calls in flight.

    `shape` is the input's, with the usual number of images; `batch` is (least, usual, most) where a profile allows
    others, else None. `facts`: {"memory": "mapped" | "copy", "memory_ms": {"mapped", "copy"} where both were timed,
    "memory_reason", "graph": bool, "graph_reason", "graph_ms": {"graph", "plain"} where both were timed, "enqueue_ms",
    "gpu_ms", "layers", "aux_streams", "device_memory": bytes a context, "cuda"}. Threads may share a session. Make one
    with `tensorrt.open_plan`.
    """

    def __init__(
        self,
        cuda: Cuda,
        loaded: api.Loaded,
        log: Log,
        options: tuple[str, bool, bool],
        clock: Callable[[], float],
    ) -> None:
        memory, graph, self._owns = options
        self._cuda, self._loaded, self._log, self._clock = cuda, loaded, log, clock
        self._tensors = api.tensors(loaded)
        source = input_of(self._tensors)
        rows = rows_of(self._tensors)
        self.input, self.dtype = source.name, np.dtype(source.dtype)
        self.shape: tuple[int, ...] = (rows[1], *source.shape[1:])
        self.batch = rows if source.shape[0] == -1 else None
        self.outputs = [tensor.name for tensor in self._tensors if not tensor.is_input]
        self.facts: dict[str, Any] = {**api.facts(loaded), "cuda": cuda.name}
        self._turn, self._next, self._slots = threading.Lock(), 0, list[Slot]()
        self._closed = False
        image = np.random.default_rng(0).standard_normal(self.shape, np.float32).astype(self.dtype)
        with cuda.current():
            try:
                self._choose_memory(memory, image)
                self._choose_graph(graph, image)
                self._fill(image)
                self._measure()
            except BaseException:
                self._free()
                raise

    def _make(self, mapped: bool) -> Slot:
        return Slot(self._cuda, self._loaded, self._log, self._tensors, mapped)

    def _choose_memory(self, memory: str, image: np.ndarray) -> None:
        """One slot, of the policy asked for or the faster one."""
        self.facts.update(memory_ms={}, memory_reason="asked for")
        if memory == "auto":
            try:
                self._slots.append(self._make(mapped=True))
            except CheckFailed as error:
                self.facts["memory_reason"] = f"the device cannot use host memory: {error}"
        elif memory == "mapped":
            self._slots.append(self._make(mapped=True))
        if memory != "mapped":
            self._slots.append(self._make(mapped=False))
        for slot in self._slots:
            slot.run(image)  # a first call settles what TensorRT does lazily, before clocks and captures
        if len(self._slots) == 2:
            timing = ab_time(self._slots[0], self._slots[1], image, ROUNDS, clock=self._clock)
            self.facts["memory_ms"] = {"mapped": timing.a_ms, "copy": timing.b_ms}
            self.facts["memory_reason"] = f"faster: mapped {timing.a_ms:.3f} ms, copy {timing.b_ms:.3f} ms"
            self._slots.pop(1 if timing.ratio <= 1 else 0).free()
        self.facts["memory"] = "copy" if self._slots[0].inputs[0].copied else "mapped"

    def _choose_graph(self, graph: bool, image: np.ndarray) -> None:
        slot = self._slots[0]
        self.facts.update(graph=False, graph_ms={})
        if not graph:
            self.facts["graph_reason"] = "not asked for"
            return
        reason = slot.capture()
        if reason:
            slot.run(image)  # the slot answers as before; else this raises
            self.facts["graph_reason"] = f"not captured: {reason}"
            return
        timing = ab_time(slot, _Plain(slot), image, ROUNDS, clock=self._clock)
        self.facts["graph_ms"] = {"graph": timing.a_ms, "plain": timing.b_ms}
        words = f"graph {timing.a_ms:.3f} ms, plain {timing.b_ms:.3f} ms"
        self.facts["graph"] = timing.ratio < 1
        self.facts["graph_reason"] = f"{'faster' if timing.ratio < 1 else 'not faster'}: {words}"
        if not self.facts["graph"]:
            slot.drop_graph()

    def _fill(self, image: np.ndarray) -> None:
        """The other slots, like the first one; and each must write all of its outputs as it will be used."""
        while len(self._slots) < SLOTS:
            self._slots.append(self._make(self.facts["memory"] == "mapped"))
            self._slots[-1].run(image)
            reason = self._slots[-1].capture() if self.facts["graph"] else ""
            if reason:
                self.facts.update(graph=False, graph_reason=f"captured once and not again: {reason}")
                for slot in self._slots:
                    slot.drop_graph()
        for slot in self._slots:
            self._self_test(slot, image)

    def _self_test(self, slot: Slot, image: np.ndarray) -> None:
        """An element that keeps two different poisons was not written (R5)."""
        kept: list[dict[str, np.ndarray]] = []
        for value in (0xFF, 0x00):
            slot.poison(value)
            found = slot.run(image)
            kept.append({name: (_bytes(array) == value).all(-1) for name, array in found.items()})
        for name in self.outputs:
            missing = kept[0][name] & kept[1][name]
            if missing.any():
                evidence = f"{name}: {missing.sum()} of {missing.size} values"
                raise CheckFailed("the engine does not write all of its outputs", evidence, "build the engine again")

    def _measure(self) -> None:
        slot, enqueue, gpu = self._slots[0], list[float](), list[float]()
        for _ in range(_ENQUEUES):
            start = self._clock()
            slot.launch()
            enqueue.append((self._clock() - start) * 1e3)
            slot.read()
            gpu.append(slot.gpu_ms())
        self.facts.update(enqueue_ms=float(np.median(enqueue)), gpu_ms=float(np.median(gpu)))

    def _check_image(self, image: Any) -> None:
        if self.batch is None or not isinstance(image, np.ndarray) or image.ndim != len(self.shape):
            check_image(image, self.shape, self.dtype)
            return
        count, (least, _, most) = image.shape[0], self.batch
        if not least <= count <= most:
            raise InputError("the batch does not fit the engine", f"{count} images", f"pass {least} to {most}")
        check_image(image, (count, *self.shape[1:]), self.dtype)

    def submit(self, image: np.ndarray) -> Ticket:
        """Start a call for a preprocessed image of the input's shape and type; it is copied before this returns.

        With two calls in flight, a third waits for the older one, whose ticket keeps its result. Raises InputError,
        or CheckFailed where TensorRT or CUDA refuses.
        """
        self._check_image(image)
        with self._turn:
            if self._closed:
                raise closed()
            slot = self._slots[self._next]
            self._next = (self._next + 1) % len(self._slots)
            with slot.lock:
                if slot.ticket is not None:
                    slot.ticket.settle()
                with self._cuda.current():
                    slot.write(image)
                    slot.launch()
                slot.ticket = Ticket(slot, self._cuda.current)
                return slot.ticket

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Raw outputs by name for a preprocessed image of the input's shape and type; see `submit`."""
        return self.submit(image).result()

    def layer_times(self, runs: int = 50) -> list[tuple[str, float]]:
        """(layer, mean milliseconds of a call) in the engine's order, by TensorRT's own profiler; other calls wait.

        With it layers run one after the other: the sum is more than a call takes.
        """
        if not isinstance(runs, int) or isinstance(runs, bool) or runs < 1:
            raise InputError("runs must be a whole number from 1", f"{runs!r:.40} given", "use 50")
        spent: dict[str, float] = {}

        def record(name: str, ms: float) -> None:
            spent[name] = spent.get(name, 0.0) + ms

        with self._turn, self._cuda.current():
            if self._closed:
                raise closed()
            slot = self._make(mapped=False)
            try:
                slot.run(np.zeros(self.shape, self.dtype))
                profiler = api.profile(slot.running, record)
                for _ in range(runs):
                    slot.run(np.zeros(self.shape, self.dtype), plain=True)
            finally:
                slot.free()
            del profiler
        return [(name, ms / runs) for name, ms in spent.items()]

    def close(self) -> None:
        """Wait for what is in flight, then free everything; tickets keep their results. Closing twice is fine."""
        with self._turn:
            if self._closed:
                return
            self._closed = True
            for slot in self._slots:
                with slot.lock:
                    if slot.ticket is not None:
                        slot.ticket.settle()
            # Of a device that was lost nothing can be freed; the next engine must be free to open.
            with contextlib.suppress(CheckFailed), self._cuda.current():
                self._free()
            if self._owns:
                self._cuda.close()

    def _free(self) -> None:
        """Contexts before the engine, the engine before its runtime, all of them before the device is left."""
        for slot in self._slots:
            slot.free()
        self._slots = []
        del self._loaded


class _Plain:
    """A slot as a Runner that does not use its graph."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        return self._slot.run(image, plain=True)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8).reshape(*array.shape, array.itemsize)
