"""TensorRT 10.3 to 11.x (JetPack 6 and 7, and any card): ONNX in, a plan out, and a plan opened as a session.

Strongly typed networks with explicit Q/DQ only: what the file says is what runs, so one code path serves all versions.
`tensorrt` and the CUDA library are imported on first use. Type-checked against the bindings of 10.3.0, 10.16.0.72 and
11.4.0.106, its logic tested on stand-ins; not run on a device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import CheckFailed, InputError
from ..files import as_path
from . import tensorrt_api as api
from .cuda_memory import Cuda, open_cuda
from .tensorrt_log import Log
from .tensorrt_session import Session

#: How a session's buffers are shared with the host; see open_plan.
MEMORY = ("auto", "mapped", "copy")
#: Optimisation levels of the builder.
LEVELS = range(6)
#: Making runtimes and engines touches global state (R4); calling them does not.
_START = threading.Lock()


class Progress(Protocol):
    """Whoever shows how a build goes; called from the builder's threads."""

    def phase(self, name: str, done: int, total: int) -> None:
        """`done` of `total` thousandths of the work are done; `name` is what is being done."""


class BuildCancelled(CheckFailed):
    """The build was stopped because `cancelled` said so; nothing is left behind."""


@dataclass(frozen=True)
class PlanOptions:
    """How to build a plan.

    precision: "int8" or "half", a name only: the file's types decide. workspace_mb: most scratch memory of a layer,
    MiB (None: from the free memory). batch: (least, usual, most) images a call, None: as in the file. aux_streams and
    levels: numbers of extra streams and optimisation levels to try, in every combination, the first of each first.
    seconds: start no further candidate that would likely end later than this. timing_cache: of an earlier Plan on
    this device; another one is ignored. plugins: libraries to load first.
    """

    precision: str = "int8"
    workspace_mb: int | None = None
    batch: tuple[int, int, int] | None = None
    aux_streams: tuple[int, ...] = (0,)
    levels: tuple[int, ...] = (3,)
    seconds: float = 600.0
    timing_cache: bytes = b""
    plugins: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        batch = (1, 1, 1) if self.batch is None else self.batch
        rules = {
            f"precision is int8 or half, not {self.precision!r:.40}": self.precision in ("int8", "half"),
            f"workspace_mb is a positive number, not {self.workspace_mb!r:.40}": self.workspace_mb is None
            or _wholes((self.workspace_mb,), 1),
            f"batch is 1 <= least <= usual <= most, not {self.batch!r:.60}": _wholes(batch, 1)
            and len(batch) == 3
            and list(batch) == sorted(batch),
            f"aux_streams are numbers from 0, not {self.aux_streams!r:.60}": _wholes(self.aux_streams, 0),
            f"levels are from 0 to 5, not {self.levels!r:.60}": _wholes(self.levels, 0)
            and set(self.levels) <= set(LEVELS),
            f"seconds is a positive number, not {self.seconds!r:.40}": isinstance(self.seconds, (int, float))
            and self.seconds > 0,
            f"timing_cache is bytes, not {type(self.timing_cache).__name__}": isinstance(self.timing_cache, bytes),
            f"plugins is a tuple of paths, not {self.plugins!r:.60}": isinstance(self.plugins, (tuple, list)),
        }
        for rule, held in rules.items():
            if not held:
                raise InputError("TensorRT cannot build that", rule, "see engines.tensorrt.PlanOptions")
        for path in self.plugins:
            as_path(path)


def _wholes(numbers: object, least: int) -> bool:
    """True for a tuple or list of whole numbers from `least` on, one at least."""
    return (
        isinstance(numbers, (tuple, list))
        and bool(numbers)
        and all(isinstance(one, int) and not isinstance(one, bool) and one >= least for one in numbers)
    )


def _check_bytes(data: object, what: str, fix: str) -> None:
    if not isinstance(data, bytes) or not data:
        found = "no bytes at all" if isinstance(data, bytes) else type(data).__name__
        raise InputError(f"this is no {what}", f"{found} given", fix)


@dataclass(frozen=True)
class Plan:
    """A built engine and how it came about.

    plan: what `open_plan` takes. layers: the engine inspector's JSON. timing_cache: for the next build's PlanOptions.
    chosen: {"aux_streams", "level", "workspace_mb", "ms"}, ms the median of a call with copies and waiting. tried: the
    same of every candidate, in the order tried, with "seconds" of its build; "error" and no "ms" where it failed.
    peak_mb: how far the device's free memory fell during the build, MiB; None where it could not be read.
    log: the builder's warnings and errors.
    """

    plan: bytes = field(repr=False)
    layers: str = field(repr=False)
    timing_cache: bytes = field(repr=False)
    chosen: dict[str, Any]
    tried: list[dict[str, Any]]
    peak_mb: float | None
    seconds: float
    log: tuple[str, ...] = ()


def probe() -> dict[str, Any]:
    """What is here: {"version", "compute", "device", "driver", "cuda", "integrated", "memory_mb"}.

    version: of TensorRT; compute: "8.7"; driver: the CUDA version that it supports, "12.6"; cuda: the library that
    talks to it. Raises UnavailableError with the reason and the fix when TensorRT, the driver or a device is missing.
    """
    version = api.version()
    cuda = open_cuda()
    try:
        with cuda.current():
            total = cuda.memory()[1]
        device = cuda.device
        return {
            "version": version,
            "compute": device.compute,
            "device": device.name,
            "driver": device.driver,
            "cuda": cuda.name,
            "integrated": device.integrated,
            "memory_mb": total // 2**20,
        }
    finally:
        cuda.close()


def compile_plan(
    model: bytes,
    options: PlanOptions | None = None,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    *,
    cuda: Cuda | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Plan:
    """Build an ONNX file's bytes (the `trt` dialect, or FP16) and keep the fastest of the candidates.

    progress: also asked from the builder's threads; see tensorrt_progress.Eta. cuda: an open adapter (None: open one
    for the build). Raises InputError (no bytes), GraphError (TensorRT does not take the graph), CheckFailed (no
    candidate could be built; says so where memory was the cause), BuildCancelled, UnavailableError.
    """
    from . import tensorrt_build as building

    api.version()
    options = PlanOptions() if options is None else options
    _check_bytes(model, "ONNX model", "pass the bytes of a model.onnx")
    owned = cuda is None
    cuda = open_cuda() if cuda is None else cuda
    try:
        return building.compile_(model, options, building.Watch(progress, cancelled, clock), cuda)
    finally:
        if owned:
            cuda.close()


def open_plan(
    plan: bytes,
    plugins: Sequence[Path] = (),
    memory: str = "auto",
    graph: bool = True,
    *,
    cuda: Cuda | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Session:
    """A ready session of a plan; two calls may be in flight. See tensorrt_session.Session.

    memory: "copy" (pinned host buffers and device buffers), "mapped" (the device reads and writes pinned host memory
    itself), or "auto": both are timed and the faster is kept. graph: launch a CUDA graph where it can be captured and
    is faster. Raises InputError, UnavailableError, CheckFailed (the plan is of another version or device, a plugin is
    missing, or its outputs are not written). Opening holds the interpreter for as long as TensorRT takes: do it before
    other threads have deadlines.
    """
    if memory not in MEMORY:  # a tuple: nothing has to be hashable
        raise InputError(f"unknown memory policy {memory!r:.40}", f"known: {', '.join(MEMORY)}", "use auto")
    api.version()
    _check_bytes(plan, "plan", "pass what compile_plan built")
    if not isinstance(plugins, (tuple, list)):
        raise InputError("plugins is a list of paths", f"{type(plugins).__name__} given", "pass [] for none")
    libraries = [as_path(path) for path in plugins]
    owned = cuda is None
    cuda = open_cuda() if cuda is None else cuda
    try:
        with cuda.current(), _START:
            for library in libraries:
                api.load_plugin(library)
            loaded, log = load(plan)
        return Session(cuda, loaded, log, (memory, graph, owned), clock)
    except BaseException:
        if owned:
            cuda.close()
        raise


def load(plan: bytes) -> tuple[api.Loaded, Log]:
    """The engine of a plan, with its context current. Raises CheckFailed: a plugin is missing, or not for here."""
    log = Log()
    loaded = api.load(api.logger(log), plan)
    if loaded is not None:
        return loaded, log
    if log.plugin:
        known = ", ".join(api.creators()) or "none"
        evidence = f"{log.plugin}; TensorRT knows: {known:.200}"
        raise CheckFailed("the engine needs a plugin that is not loaded", evidence, "pass its library in `plugins`")
    cause = "the engine was built elsewhere" if log.foreign else "TensorRT does not load the engine"
    raise CheckFailed(cause, log.foreign or log.memory or log.last, "build it again on this device")
