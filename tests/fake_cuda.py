"""A stand-in for a CUDA device: memory, streams and graphs in numpy, work that is done only when somebody waits for it.

It proves the order of our calls, never what a device computes or how fast. Time is simulated: `clock` ticks only by the
milliseconds that the fields name. Every call is noted in `calls`.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from igate_edge.engines.cuda_memory import Device, Host
from igate_edge.errors import CheckFailed, UnavailableError


@dataclass
class Stream:
    """Work that was queued and not yet done: (milliseconds on the device, what it does)."""

    number: int
    queue: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    noting: bool = False


@dataclass
class Event:
    """Happens with the work that was queued before it."""

    stream: Stream | None = None
    left: int = 0
    at: float = 0.0


@dataclass
class FakeCuda:
    """See engines.cuda_memory.Cuda. copy_ms: of one copy; launch_ms: a graph's on the host."""

    name: str = "stand-in"
    device: Device = field(default_factory=lambda: Device("Stand-in", "8.7", "12.6", False))
    free_bytes: int = 2**30
    copy_ms: float = 0.5
    graph_ms: float = 0.01
    refuse: dict[str, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    blocks: dict[int, np.ndarray] = field(default_factory=dict)
    mapped: set[int] = field(default_factory=set)
    live: list[Any] = field(default_factory=list)
    now: float = 0.0
    closed: bool = False
    lost: bool = False

    def __post_init__(self) -> None:
        self._lock, self._inside = threading.RLock(), threading.local()
        self._addresses, self._numbers = itertools.count(4096, 2**20), itertools.count(1)

    def clock(self) -> float:
        """Simulated seconds."""
        return self.now

    def _note(self, call: str) -> None:
        assert getattr(self._inside, "depth", 0) > 0, f"{call} without a current context"
        with self._lock:
            self.calls.append(call)
        if call in self.refuse:
            raise CheckFailed(f"the stand-in refuses {call}", self.refuse[call])

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        assert not self.closed, "a call after close"
        if self.lost:
            raise CheckFailed("the stand-in is lost")
        self._inside.depth = getattr(self._inside, "depth", 0) + 1
        try:
            yield
        finally:
            self._inside.depth -= 1

    @property
    def depth(self) -> int:
        """How often the context is current in this thread."""
        return getattr(self._inside, "depth", 0)

    def memory(self) -> tuple[int, int]:
        self._note("memory")
        return self.free_bytes, 2**33

    def at(self, address: int, size: int) -> np.ndarray:
        """The bytes at an address."""
        with self._lock:
            base = max(start for start in self.blocks if start <= address)
            found = self.blocks[base][address - base : address - base + size]
        assert found.size == size, "beyond an allocation"
        return found

    def _new(self, array: np.ndarray) -> int:
        with self._lock:
            address = next(self._addresses)
            self.blocks[address] = array
        return address

    def allocate(self, size: int) -> int:
        self._note("allocate")
        return self._new(np.full(size, 0xCD, np.uint8))

    def free(self, address: int) -> None:
        self._note("free")
        del self.blocks[address]

    def host(self, size: int, mapped: bool) -> Host:
        self._note("host mapped" if mapped else "host")
        array = np.full(size, 0xCD, np.uint8)
        address = self._new(array)
        if mapped:
            self.mapped.add(address)
        return Host(array, address if mapped else 0, address)

    def free_host(self, block: Host) -> None:
        self._note("free_host")
        del self.blocks[block.handle]

    def _made(self, thing: Any) -> Any:
        with self._lock:
            self.live.append(thing)
        return thing

    def _unmade(self, thing: Any) -> None:
        with self._lock:
            self.live[:] = [one for one in self.live if one is not thing]

    def stream(self) -> Stream:
        self._note("stream")
        return self._made(Stream(next(self._numbers)))

    def stream_handle(self, stream: Stream) -> int:
        return stream.number

    def find(self, handle: int) -> Stream:
        """The stream of a handle, as TensorRT gets it."""
        with self._lock:
            return next(one for one in self.live if isinstance(one, Stream) and one.number == handle)

    def free_stream(self, stream: Stream) -> None:
        self._note("free_stream")
        self._unmade(stream)

    def put(self, stream: Stream, ms: float, work: Callable[[], None]) -> None:
        """Queue work, or note it down while a graph is captured."""
        with self._lock:
            stream.queue.append((ms, work))

    def upload(self, address: int, source: np.ndarray, stream: Stream) -> None:
        self._note("upload")
        self.put(stream, self.copy_ms, lambda: np.copyto(self.at(address, source.size), source))

    def download(self, target: np.ndarray, address: int, stream: Stream) -> None:
        self._note("download")
        self.put(stream, self.copy_ms, lambda: np.copyto(target, self.at(address, target.size)))

    def event(self) -> Event:
        self._note("event")
        return self._made(Event())

    def record(self, event: Event, stream: Stream) -> None:
        self._note("record")
        with self._lock:
            event.stream, event.left = stream, len(stream.queue)

            def happen() -> None:
                event.at = self.now

            stream.queue.append((0.0, happen))

    def wait(self, event: Event) -> None:
        self._note("wait")
        with self._lock:
            stream = event.stream
            assert stream is not None and not stream.noting, "waiting for what was never queued"
            while stream.queue:
                ms, work = stream.queue.pop(0)
                self.now += ms / 1e3
                work()

    def elapsed(self, start: Event, end: Event) -> float:
        self._note("elapsed")
        return (end.at - start.at) * 1e3

    def free_event(self, event: Event) -> None:
        self._note("free_event")
        self._unmade(event)

    def begin_capture(self, stream: Stream) -> None:
        if "begin_capture" in self.refuse:
            self.calls.append("begin_capture")
            raise UnavailableError("the stand-in has no graphs", self.refuse["begin_capture"])
        self._note("begin_capture")
        assert not stream.queue and "enqueue" in self.calls, "a capture while work is queued, or before a first call"
        stream.noting = True

    def end_capture(self, stream: Stream) -> list[tuple[float, Callable[[], None]]]:
        noted, stream.queue, stream.noting = stream.queue, [], False
        self._note("end_capture")
        return self._made(noted)

    def launch(self, graph: list[tuple[float, Callable[[], None]]], stream: Stream) -> None:
        self._note("launch")
        with self._lock:
            self.now += self.graph_ms / 1e3
            stream.queue.extend(graph)

    def free_graph(self, graph: Any) -> None:
        self._note("free_graph")
        self._unmade(graph)

    def close(self) -> None:
        self.closed = True
