"""cuda_memory on NVIDIA's cuda-bindings (extra `cuda`): the driver's own calls, of CUDA 12.6 and newer."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import InputError, UnavailableError
from .cuda_memory import Adapter, Device, Host


class BindingsCuda(Adapter):
    """An open device; see cuda_memory.Cuda."""

    name = "cuda-bindings"

    def __init__(self, ordinal: int = 0) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            fix = "pip install 'cuda-bindings>=12.6,<13' for JetPack 6, 'cuda-bindings>=13' for JetPack 7"
            raise UnavailableError("cuda-bindings is missing", str(error), fix) from error
        self._driver: Any = driver
        self._lock, self._context = threading.Lock(), None
        try:
            self._take("start", driver.cuInit(0))
            self._ordinal = self._take(f"find device {ordinal}", driver.cuDeviceGet(ordinal))
            self.device = self._describe()
            self._context = self._take("enter the device", driver.cuDevicePrimaryCtxRetain(self._ordinal))
        except Exception as error:  # its own loader raises a class without a public name
            raise self.no_driver(error) from error

    def _describe(self) -> Device:
        driver, attribute = self._driver, self._driver.CUdevice_attribute
        name = self._take("read the device's name", driver.cuDeviceGetName(128, self._ordinal))
        version = self._take("read the driver's version", driver.cuDriverGetVersion())
        values = [
            self._take("read the device's attributes", driver.cuDeviceGetAttribute(which, self._ordinal))
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED,
            )
        ]
        text = name.split(b"\0", 1)[0].decode(errors="replace")
        driver_text = f"{version // 1000}.{version % 1000 // 10}"
        return Device(text, f"{values[0]}.{values[1]}", driver_text, bool(values[2]))

    def _take(self, doing: str, result: Any) -> Any:
        """The value of a driver call, which gives (error, value)."""
        if int(result[0]) != 0:
            raise self.failed(doing, getattr(result[0], "name", result[0]))
        return result[1] if len(result) > 1 else None

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """See cuda_memory.Cuda."""
        if self._context is None:
            raise InputError("the CUDA device is closed", "a call came after close", "open it again")
        self._take("enter the device", self._driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self._take("leave the device", self._driver.cuCtxPopCurrent())

    def memory(self) -> tuple[int, int]:
        """See cuda_memory.Cuda."""
        result = self._driver.cuMemGetInfo()
        self._take("read the free memory", result[:1])
        return int(result[1]), int(result[2])

    def allocate(self, size: int) -> int:
        """See cuda_memory.Cuda."""
        return int(self._take(f"allocate {size} bytes on the device", self._driver.cuMemAlloc(size)))

    def free(self, address: int) -> None:
        """See cuda_memory.Cuda."""
        self._take("free device memory", self._driver.cuMemFree(address))

    def host(self, size: int, mapped: bool) -> Host:
        """See cuda_memory.Cuda."""
        flags = self._driver.CU_MEMHOSTALLOC_DEVICEMAP if mapped else 0
        address = int(self._take(f"lock {size} bytes of the host", self._driver.cuMemHostAlloc(size, flags)))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        if not mapped:
            return Host(array, 0, address)
        try:
            device = self._take("map host memory", self._driver.cuMemHostGetDevicePointer(address, 0))
        except Exception:
            self._driver.cuMemFreeHost(address)
            raise
        return Host(array, int(device), address)

    def free_host(self, block: Host) -> None:
        """See cuda_memory.Cuda."""
        self._take("free host memory", self._driver.cuMemFreeHost(block.handle))

    def stream(self) -> Any:
        """See cuda_memory.Cuda."""
        kind = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        return self._take("make a stream", self._driver.cuStreamCreate(int(kind.value)))

    def stream_handle(self, stream: Any) -> int:
        """See cuda_memory.Cuda."""
        return int(stream)

    def free_stream(self, stream: Any) -> None:
        """See cuda_memory.Cuda."""
        self._take("free a stream", self._driver.cuStreamDestroy(stream))

    def upload(self, address: int, source: np.ndarray, stream: Any) -> None:
        """See cuda_memory.Cuda."""
        done = self._driver.cuMemcpyHtoDAsync(address, source.ctypes.data, source.nbytes, stream)
        self._take("copy to the device", done)

    def download(self, target: np.ndarray, address: int, stream: Any) -> None:
        """See cuda_memory.Cuda."""
        done = self._driver.cuMemcpyDtoHAsync(target.ctypes.data, address, target.nbytes, stream)
        self._take("copy from the device", done)

    def event(self) -> Any:
        """See cuda_memory.Cuda."""
        return self._take("make an event", self._driver.cuEventCreate(0))

    def record(self, event: Any, stream: Any) -> None:
        """See cuda_memory.Cuda."""
        self._take("record an event", self._driver.cuEventRecord(event, stream))

    def wait(self, event: Any) -> None:
        """See cuda_memory.Cuda."""
        self._take("finish the engine's work", self._driver.cuEventSynchronize(event))

    def elapsed(self, start: Any, end: Any) -> float:
        """See cuda_memory.Cuda."""
        return float(self._take("read a time", self._driver.cuEventElapsedTime(start, end)))

    def free_event(self, event: Any) -> None:
        """See cuda_memory.Cuda."""
        self._take("free an event", self._driver.cuEventDestroy(event))

    def begin_capture(self, stream: Any) -> None:
        """See cuda_memory.Cuda."""
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._take("begin a graph", self._driver.cuStreamBeginCapture(stream, mode))

    def end_capture(self, stream: Any) -> Any:
        """See cuda_memory.Cuda."""
        noted = self._take("end a graph", self._driver.cuStreamEndCapture(stream))
        try:
            return self._take("make a graph ready", self._driver.cuGraphInstantiate(noted, 0))
        finally:
            self._driver.cuGraphDestroy(noted)

    def launch(self, graph: Any, stream: Any) -> None:
        """See cuda_memory.Cuda."""
        self._take("launch a graph", self._driver.cuGraphLaunch(graph, stream))

    def free_graph(self, graph: Any) -> None:
        """See cuda_memory.Cuda."""
        self._take("free a graph", self._driver.cuGraphExecDestroy(graph))

    def close(self) -> None:
        """See cuda_memory.Cuda."""
        with self._lock:
            context, self._context = self._context, None
        if context is not None:
            self._take("leave the device", self._driver.cuDevicePrimaryCtxRelease(self._ordinal))


def open(ordinal: int = 0) -> BindingsCuda:
    """Device `ordinal`; see cuda_memory.open_cuda."""
    return BindingsCuda(ordinal)
