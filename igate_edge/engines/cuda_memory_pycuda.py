"""cuda_memory on pycuda (extra `pycuda`), on the device's primary context: pycuda.autoinit is never imported.

pycuda has no stream capture, so its sessions launch without CUDA graphs and say so.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import InputError, UnavailableError
from .cuda_memory import Adapter, Device, Host

_NON_BLOCKING = 1


class PycudaCuda(Adapter):
    """An open device; see cuda_memory.Cuda."""

    name = "pycuda"

    def __init__(self, ordinal: int = 0) -> None:
        try:
            import pycuda.driver as driver
        except ModuleNotFoundError as error:
            raise UnavailableError("pycuda is missing", str(error), "pip install 'igate-edge[pycuda]'") from error
        except ImportError as error:  # it is there, the driver's library is not
            raise self.no_driver(error) from error
        self._driver: Any = driver
        self._lock, self._held = threading.Lock(), dict[int, Any]()
        try:
            driver.init()
            device = driver.Device(ordinal)
            self._context: Any = device.retain_primary_context()
        except driver.Error as error:
            raise self.no_driver(error) from error
        major, minor = device.compute_capability()
        version, integrated = driver.get_driver_version(), driver.device_attribute.INTEGRATED
        driver_text = f"{version // 1000}.{version % 1000 // 10}"
        self.device = Device(device.name(), f"{major}.{minor}", driver_text, bool(device.get_attribute(integrated)))

    @contextlib.contextmanager
    def _doing(self, doing: str) -> Iterator[None]:
        """pycuda's errors become ours."""
        try:
            yield
        except self._driver.Error as error:
            raise self.failed(doing, error) from error

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """See cuda_memory.Cuda."""
        if self._context is None:
            raise InputError("the CUDA device is closed", "a call came after close", "open it again")
        with self._doing("enter the device"):
            self._context.push()
        try:
            yield
        finally:
            self._driver.Context.pop()

    def memory(self) -> tuple[int, int]:
        """See cuda_memory.Cuda."""
        with self._doing("read the free memory"):
            free, total = self._driver.mem_get_info()
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        """See cuda_memory.Cuda."""
        with self._doing(f"allocate {size} bytes on the device"):
            place = self._driver.mem_alloc(size)
        self._held[int(place)] = place
        return int(place)

    def free(self, address: int) -> None:
        """See cuda_memory.Cuda."""
        with self._doing("free device memory"):
            self._held.pop(address).free()

    def host(self, size: int, mapped: bool) -> Host:
        """See cuda_memory.Cuda."""
        flags = self._driver.host_alloc_flags.DEVICEMAP if mapped else 0
        with self._doing(f"lock {size} bytes of the host"):
            array = self._driver.pagelocked_empty(size, np.uint8, mem_flags=flags)
            return Host(array, int(array.base.get_device_pointer()) if mapped else 0, array.base)

    def free_host(self, block: Host) -> None:
        """See cuda_memory.Cuda."""
        with self._doing("free host memory"):
            block.handle.free()

    def stream(self) -> Any:
        """See cuda_memory.Cuda."""
        with self._doing("make a stream"):
            return self._driver.Stream(_NON_BLOCKING)

    def stream_handle(self, stream: Any) -> int:
        """See cuda_memory.Cuda."""
        return int(stream.handle)

    def free_stream(self, stream: Any) -> None:
        """Nothing to do: pycuda destroys a stream with its last reference."""

    def upload(self, address: int, source: np.ndarray, stream: Any) -> None:
        """See cuda_memory.Cuda."""
        with self._doing("copy to the device"):
            self._driver.memcpy_htod_async(address, source, stream)

    def download(self, target: np.ndarray, address: int, stream: Any) -> None:
        """See cuda_memory.Cuda."""
        with self._doing("copy from the device"):
            self._driver.memcpy_dtoh_async(target, address, stream)

    def event(self) -> Any:
        """See cuda_memory.Cuda."""
        with self._doing("make an event"):
            return self._driver.Event()

    def record(self, event: Any, stream: Any) -> None:
        """See cuda_memory.Cuda."""
        with self._doing("record an event"):
            event.record(stream)

    def wait(self, event: Any) -> None:
        """See cuda_memory.Cuda."""
        with self._doing("finish the engine's work"):
            event.synchronize()

    def elapsed(self, start: Any, end: Any) -> float:
        """See cuda_memory.Cuda."""
        with self._doing("read a time"):
            return float(end.time_since(start))

    def free_event(self, event: Any) -> None:
        """Nothing to do: pycuda destroys an event with its last reference."""

    def begin_capture(self, stream: Any) -> None:
        """Always raises UnavailableError."""
        raise UnavailableError(
            "pycuda has no CUDA graphs", "no stream capture in its driver module", "use cuda-bindings"
        )

    def end_capture(self, stream: Any) -> Any:
        """Never reached: `begin_capture` raises."""
        return self.begin_capture(stream)

    def launch(self, graph: Any, stream: Any) -> None:
        """Never reached: there is no graph."""
        self.begin_capture(stream)

    def free_graph(self, graph: Any) -> None:
        """Never reached: there is no graph."""
        self.begin_capture(None)

    def close(self) -> None:
        """See cuda_memory.Cuda."""
        with self._lock:
            context, self._context = self._context, None
        if context is not None:
            context.push()
            self._held.clear()  # what is left is freed in its own context
            self._driver.Context.pop()
            context.detach()


def open(ordinal: int = 0) -> PycudaCuda:
    """Device `ordinal`; see cuda_memory.open_cuda."""
    return PycudaCuda(ordinal)
