"""What one call to a TensorRT plan needs: a context, a stream, an event and buffers, bound once."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CheckFailed, GraphError, IgateError
from . import tensorrt_api as api
from .cuda_memory import Cuda, Host
from .tensorrt_log import Log

if TYPE_CHECKING:
    from .tensorrt_session import Ticket


class _Buffer:
    """One tensor: page-locked host memory, and the address that TensorRT gets."""

    def __init__(self, cuda: Cuda, tensor: api.Tensor, shape: tuple[int, ...], mapped: bool) -> None:
        self.tensor, self.shape = tensor, shape
        dtype = np.dtype(tensor.dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        self._row, self.copied = size // shape[0], not mapped
        self._follows = tensor.shape[0] == -1
        self.host: Host = cuda.host(size, mapped)
        try:
            self.address = self.host.device if mapped else cuda.allocate(size)
        except IgateError:
            cuda.free_host(self.host)
            raise
        self.array = self.host.array.view(dtype).reshape(shape)

    def rows(self, count: int) -> np.ndarray:
        """The bytes of a batch of `count`; all of them where the shape has no batch in it."""
        return self.host.array[: count * self._row] if self._follows else self.host.array

    def values(self, count: int) -> np.ndarray:
        """A copy of what `rows` holds, with type and shape."""
        return (self.array[:count] if self._follows else self.array).copy()

    def free(self, cuda: Cuda) -> None:
        del self.array
        if self.copied:
            with contextlib.suppress(CheckFailed):
                cuda.free(self.address)
        with contextlib.suppress(CheckFailed):
            cuda.free_host(self.host)


class Slot:
    """Buffers and a context for one call at a time; `lock` is held around everything but making and freeing it."""

    def __init__(self, cuda: Cuda, loaded: api.Loaded, log: Log, tensors: list[api.Tensor], mapped: bool) -> None:
        self.lock = threading.Lock()
        self.ticket: Ticket | None = None
        self._cuda, self._log, self._graph = cuda, log, None
        self._graph_rows = self._settled = 0  # images a graph is wanted for; images of the last plain call
        running = api.context(loaded)
        if running is None:
            fix = "close what else uses the GPU, or build with a smaller workspace"
            raise CheckFailed("TensorRT makes no execution context", log.memory or log.last, fix)
        self.running = running
        self._stream, self._done = cuda.stream(), cuda.event()
        self.handle = cuda.stream_handle(self._stream)
        self.inputs, self.outputs = list[_Buffer](), list[_Buffer]()
        try:
            most = rows_of(tensors)[2]
            for tensor in tensors:
                rows = most if tensor.shape[0] == -1 else tensor.shape[0]
                buffer = _Buffer(cuda, tensor, (rows, *tensor.shape[1:]), mapped)
                (self.inputs if tensor.is_input else self.outputs).append(buffer)
                self._check(api.bind(running, tensor.name, buffer.address), f"bind {tensor.name}")
        except IgateError:
            self.free()
            raise
        self._rows = 0 if self.inputs[0].tensor.shape[0] == -1 else self.inputs[0].shape[0]

    def _check(self, status: bool, doing: str) -> None:
        if not status:
            raise CheckFailed(f"TensorRT refused to {doing}", self._log.last, "build the engine again")

    def write(self, image: np.ndarray) -> None:
        """Put a batch into the input's buffer; the last call in this slot has ended."""
        count = image.shape[0]
        np.copyto(self.inputs[0].array[:count], image)
        if count != self._rows:
            # The replay of a graph whose context was changed is undefined: it goes first.
            self._free_graph()
            self._settled = 0
            shape = (count, *self.inputs[0].shape[1:])
            self._check(api.set_shape(self.running, self.inputs[0].tensor.name, shape), f"take a batch of {count}")
            self._rows = count

    def launch(self, plain: bool = False) -> None:
        """Start what was written; returns as soon as it is queued.

        A graph that was lost to a call of another batch is captured again at the second call of its own.
        """
        if self._graph is None and not plain and self._graph_rows == self._rows == self._settled:
            self.capture()
        if self._graph is not None and not plain:
            self._cuda.launch(self._graph, self._stream)
        else:
            self._queue()
            self._settled = self._rows
        self._cuda.record(self._done, self._stream)

    def _queue(self) -> None:
        for buffer in self.inputs:
            if buffer.copied:
                self._cuda.upload(buffer.address, buffer.rows(self._rows), self._stream)
        self._check(api.enqueue(self.running, self.handle), "start a call")
        for buffer in self.outputs:
            if buffer.copied:
                self._cuda.download(buffer.rows(self._rows), buffer.address, self._stream)

    def read(self) -> dict[str, np.ndarray]:
        """Wait for the call, then copy its outputs."""
        self._cuda.wait(self._done)
        return {buffer.tensor.name: buffer.values(self._rows) for buffer in self.outputs}

    def run(self, image: np.ndarray, plain: bool = False) -> dict[str, np.ndarray]:
        self.write(image)
        self.launch(plain)
        return self.read()

    def capture(self) -> str:
        """Note a call of the batch written last down as a CUDA graph; "" or the reason why there is none."""
        self._graph_rows = 0
        try:
            self._cuda.begin_capture(self._stream)
        except IgateError as error:
            return str(error)
        refused = ""
        try:
            self._queue()
        except IgateError as error:
            refused = str(error)
        try:
            graph = self._cuda.end_capture(self._stream)
        except IgateError as error:
            return refused or str(error)
        if refused:
            self._cuda.free_graph(graph)
            return refused
        self._graph, self._graph_rows = graph, self._rows
        return ""

    def drop_graph(self) -> None:
        """Launch without a graph from here on."""
        self._graph_rows = 0
        self._free_graph()

    def _free_graph(self) -> None:
        if self._graph is not None:
            graph, self._graph = self._graph, None
            self._cuda.free_graph(graph)

    def poison(self, value: int) -> None:
        """Fill every output, on the device too, so that what a call does not write can be seen."""
        for buffer in self.outputs:
            buffer.host.array[:] = value
            if buffer.copied:
                self._cuda.upload(buffer.address, buffer.host.array, self._stream)
        self._cuda.record(self._done, self._stream)
        self._cuda.wait(self._done)

    def gpu_ms(self) -> float:
        """Milliseconds that the device takes for what was written last."""
        began, ended = self._cuda.event(), self._cuda.event()
        try:
            self._cuda.record(began, self._stream)
            self.launch()
            self._cuda.record(ended, self._stream)
            self._cuda.wait(ended)
            return self._cuda.elapsed(began, ended)
        finally:
            self._cuda.free_event(began)
            self._cuda.free_event(ended)

    def free(self) -> None:
        """Give everything back; after a device's failure nothing can be freed, and nothing else can be said."""
        with contextlib.suppress(CheckFailed):
            self.drop_graph()
        del self.running
        for buffer in (*self.inputs, *self.outputs):
            buffer.free(self._cuda)
        self.inputs, self.outputs = [], []
        with contextlib.suppress(CheckFailed):
            self._cuda.free_event(self._done)
            self._cuda.free_stream(self._stream)


def rows_of(tensors: list[api.Tensor]) -> tuple[int, int, int]:
    """(least, usual, most) images a call."""
    source = next(tensor for tensor in tensors if tensor.is_input)
    if source.shape[0] != -1:
        return source.shape[0], source.shape[0], source.shape[0]
    least, usual, most = (shape[0] for shape in source.profile)
    return least, usual, most


def input_of(tensors: list[api.Tensor]) -> api.Tensor:
    """The one input. Raises GraphError unless all shapes are static, but for a batch profile."""
    inputs = [tensor for tensor in tensors if tensor.is_input]
    loose = [tensor for tensor in tensors if not tensor.shape or -1 in tensor.shape[1:]]
    if len(inputs) != 1 or loose or (inputs[0].shape[0] != -1 and any(tensor.shape[0] == -1 for tensor in tensors)):
        shapes = ", ".join(f"{tensor.name} {list(tensor.shape)}" for tensor in (loose or inputs))
        raise GraphError("the engine needs one input, and sizes that do not depend on data", shapes, "export it again")
    return inputs[0]
