"""The few CUDA calls that a session needs, behind one protocol: memory, copies, streams, events, graphs.

cuda-bindings is the default adapter, pycuda the second one; both use the device's primary context, which they push and
pop around every use: a call from any thread finds it, and a framework beside us keeps its own. Importing this touches
no driver. Handles are integers or what the adapter's library has; addresses are integers.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import CheckFailed, InputError, UnavailableError
from .session import Closing

_KINDS = {"cuda-bindings": "cuda_memory_bindings", "pycuda": "cuda_memory_pycuda"}


@dataclass(frozen=True)
class Device:
    """compute: "8.7". driver: the CUDA version it supports, "12.6". integrated: shares the host's memory."""

    name: str
    compute: str
    driver: str
    integrated: bool


@dataclass(frozen=True)
class Host:
    """Page-locked host memory: `array` is uint8 over it; `device` is its address on the device, 0 unless mapped."""

    array: np.ndarray
    device: int
    handle: Any


class Cuda(Protocol):
    """An open device. Everything but `current` is called with its context current, inside `with cuda.current()`.

    Every failed call raises CheckFailed and says what was being done.
    """

    name: str
    device: Device

    def current(self) -> AbstractContextManager[None]:
        """The primary context is current in this thread inside, and what was current before is again after."""

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of device memory."""

    def allocate(self, size: int) -> int:
        """The address of `size` new bytes on the device."""

    def free(self, address: int) -> None:
        """Give device memory back."""

    def host(self, size: int, mapped: bool) -> Host:
        """`size` new page-locked bytes; mapped: the device may read and write them."""

    def free_host(self, block: Host) -> None:
        """Give page-locked memory back; its array must not be used any more."""

    def stream(self) -> Any:
        """A new stream that does not wait for the default stream."""

    def stream_handle(self, stream: Any) -> int:
        """The stream as the integer that TensorRT takes."""

    def free_stream(self, stream: Any) -> None:
        """Destroy a stream."""

    def upload(self, address: int, source: np.ndarray, stream: Any) -> None:
        """Start to copy page-locked bytes to the device."""

    def download(self, target: np.ndarray, address: int, stream: Any) -> None:
        """Start to copy from the device into page-locked bytes."""

    def event(self) -> Any:
        """A new event, with a time."""

    def record(self, event: Any, stream: Any) -> None:
        """Let an event happen when a stream has done what it was given so far."""

    def wait(self, event: Any) -> None:
        """Block until an event has happened; other threads of Python go on."""

    def elapsed(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that have happened."""

    def free_event(self, event: Any) -> None:
        """Destroy an event."""

    def begin_capture(self, stream: Any) -> None:
        """From here on calls on this stream are noted down, not run. Raises UnavailableError where it cannot."""

    def end_capture(self, stream: Any) -> Any:
        """Stop noting down; a graph that can be launched. After an error the stream is as before."""

    def launch(self, graph: Any, stream: Any) -> None:
        """Start everything that was noted down."""

    def free_graph(self, graph: Any) -> None:
        """Destroy a graph."""

    def close(self) -> None:
        """Let the primary context go; closing twice is fine."""


class Adapter(Closing):
    """What both adapters say about errors."""

    name = ""

    def failed(self, doing: str, why: object) -> CheckFailed:
        """Every failed call says what was being done; on an exhausted memory also what to do."""
        text = " ".join(str(why).split())[:200]
        if "memory" in text.lower():
            return CheckFailed(f"there is no memory to {doing}", text, "close what else uses the GPU")
        return CheckFailed(f"CUDA failed to {doing}", text, "open the engine again; `dmesg` names a faulty device")

    def no_driver(self, why: object) -> UnavailableError:
        """Nothing to talk to."""
        text = " ".join(f"{type(why).__name__}: {why}".split())[:200] if isinstance(why, Exception) else str(why)
        fix = "run on a machine with an NVIDIA GPU and its driver; in a container, start it with --runtime nvidia"
        return UnavailableError("there is no CUDA device here", f"{self.name}: {text}", fix)


def open_cuda(kind: str = "auto", ordinal: int = 0) -> Cuda:
    """Device `ordinal` through "cuda-bindings" or "pycuda"; "auto": through the first that is installed.

    Raises InputError (another name), UnavailableError (no adapter, no driver, no device).
    """
    if not isinstance(kind, str) or kind not in ("auto", *_KINDS):
        raise InputError(f"unknown CUDA adapter {kind!r:.40}", f"known: {', '.join(_KINDS)}", "use auto")
    if not isinstance(ordinal, int) or isinstance(ordinal, bool) or not 0 <= ordinal < 256:
        raise InputError("not a device's number", f"{ordinal!r:.40} given", "use 0 for the first device")
    missing: list[UnavailableError] = []
    for name in _KINDS if kind == "auto" else (kind,):
        try:
            opened: Cuda = importlib.import_module(f".{_KINDS[name]}", __package__).open(ordinal)
            return opened
        except UnavailableError as error:
            missing.append(error)
    evidence = "; ".join(f"{error.cause}: {error.evidence}" for error in missing)
    raise UnavailableError("CUDA cannot be used here", evidence, missing[0].fix)


def available_memory(cuda: Cuda, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that a build may count on; where host and device share memory, that is what Linux can free as well."""
    free = cuda.memory()[0]
    if cuda.device.integrated:
        try:
            lines = meminfo.read_text().splitlines()
        except OSError:
            return free
        kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
        return max(free, int(kilobytes[0]) * 1024) if kilobytes else free
    return free
