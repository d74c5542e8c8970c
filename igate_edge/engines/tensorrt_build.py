"""How `tensorrt.compile_plan` builds: every candidate within the time limit, less workspace where memory is short."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import CheckFailed, GraphError, IgateError
from ..files import as_path
from . import tensorrt_api as api
from .cuda_memory import Cuda, available_memory
from .tensorrt import BuildCancelled, Plan, PlanOptions, Progress, load
from .tensorrt_batch import dynamic_batch
from .tensorrt_log import Log
from .tensorrt_progress import Phases
from .tensorrt_session import Session

#: How often a build that ran out of memory is tried again, with half the workspace each time (T7).
RETRIES = 2
#: Calls by which candidates are compared.
_CALLS = 30
#: Seconds between two looks at the free memory.
_LOOK = 0.1
#: Bounds of a workspace taken from the free memory, MiB.
_WORKSPACE = (64, 4096)
_SEAL = b"igate-timing-1\n"


@dataclass(frozen=True)
class Watch:
    """Who follows a build: its progress, whether it was cancelled, and the time."""

    progress: Progress | None
    cancelled: Callable[[], bool] | None
    clock: Callable[[], float]

    def check(self) -> None:
        """Raise BuildCancelled once it was."""
        if self.cancelled is not None and self.cancelled():
            raise BuildCancelled("the build was cancelled", "nothing was kept", "start it again")


@dataclass
class _Best:
    """The fastest plan so far, and what was tried."""

    plan: bytes = b""
    chosen: dict[str, Any] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)
    timing_cache: bytes = b""
    log: list[str] = field(default_factory=list)
    memory: str = ""
    failed: str = ""


def compile_(model: bytes, options: PlanOptions, watch: Watch, cuda: Cuda) -> Plan:
    """See tensorrt.compile_plan."""
    begin = watch.clock()
    batch = options.batch if options.batch != (1, 1, 1) else None
    source = dynamic_batch(model) if batch is not None else model
    candidates = list(itertools.product(options.aux_streams, options.levels))
    best = _Best()
    device = f"{api.version()} {cuda.device}"
    best.timing_cache, note = unseal(options.timing_cache, device)
    best.log += [note] if note else []
    with cuda.current(), _peak(cuda) as peak:
        for path in options.plugins:
            api.load_plugin(as_path(path))
        workspace = options.workspace_mb or workspace_for(available_memory(cuda))
        longest = 0.0
        for index, (streams, level) in enumerate(candidates):
            watch.check()
            start = watch.clock()
            if index and start - begin + longest > options.seconds:
                best.log.append(f"{len(candidates) - index} of {len(candidates)} candidates not tried: time was over")
                break
            settings = api.Settings(workspace, streams, level, batch)
            _candidate(source, settings, best, _Step(watch, index, len(candidates)), cuda)
            longest = max(longest, watch.clock() - start)
        if not best.plan:
            _raise(best)
        layers = api.layers(load(best.plan)[0])
    sealed, spent = seal(best.timing_cache, device), watch.clock() - begin
    return Plan(best.plan, layers, sealed, best.chosen, best.tried, peak(), spent, tuple(best.log))


def _raise(best: _Best) -> None:
    if best.memory:
        fix = "close other programs, add swap, stop the desktop (sudo init 3), or pass a smaller workspace_mb"
        raise CheckFailed("there is not enough memory to build the engine", best.memory, fix)
    raise CheckFailed(
        "TensorRT could not build the engine", best.failed, "`igate build --check tensorrt-rtx` may say more"
    )


def _candidate(model: bytes, settings: api.Settings, best: _Best, step: _Step, cuda: Cuda) -> None:
    """Build and time one candidate; a failed one is noted down, with its reason."""
    start = step.watch.clock()
    about: dict[str, Any] = {"aux_streams": settings.aux_streams, "level": settings.level}
    plan: bytes | None = None
    for _ in range(RETRIES + 1):
        log = Log()
        plan, best.timing_cache = _build(model, settings, best.timing_cache, step, log)
        best.log += [line for line in log.lines if line not in best.log]
        about["workspace_mb"] = settings.workspace_mb
        if plan is not None or not log.memory or settings.workspace_mb <= _WORKSPACE[0]:
            break
        smaller = max(settings.workspace_mb // 2, _WORKSPACE[0])
        settings = api.Settings(smaller, settings.aux_streams, settings.level, settings.batch)
    if plan is None:
        best.memory, best.failed = log.memory or best.memory, log.last
        about["error"] = f"not enough memory: {log.memory}" if log.memory else log.last
    else:
        try:
            about["ms"] = _time(plan, cuda, step.watch.clock)
        except CheckFailed as error:
            best.failed = about["error"] = str(error)
    about["seconds"] = step.watch.clock() - start
    best.tried.append(about)
    if plan is not None and "ms" in about and about["ms"] < best.chosen.get("ms", float("inf")):
        best.plan = plan
        best.chosen = {name: about[name] for name in ("aux_streams", "level", "workspace_mb", "ms")}


def _build(model: bytes, settings: api.Settings, timing: bytes, step: _Step, log: Log) -> tuple[bytes | None, bytes]:
    """(plan or None, timing cache). Raises GraphError for a graph that is not taken, BuildCancelled."""
    logger = api.logger(log)
    parsed = api.parse(logger, model)
    if parsed.errors:
        evidence = "; ".join(parsed.errors[:5])
        raise GraphError("TensorRT does not take the graph", evidence, "change the network where it is named")
    config = api.configure(parsed, settings)
    taken, cache = api.use_timing_cache(config, timing)
    if timing and not taken:
        log("WARNING", "the timing cache was not taken: every tactic is timed again")
    monitor = api.watch(config, step.phases.start, step.stepped, step.phases.finish)
    plan = api.build(parsed, config)
    del cache, monitor  # TensorRT held no references of its own to them
    step.settle()
    return plan, api.timing_cache(config) or timing


class _Step:
    """One candidate's progress. The builder's threads must see no exception: it is kept, and raised afterwards."""

    def __init__(self, watch: Watch, index: int, count: int) -> None:
        self.watch, self.phases = watch, Phases()
        self._index, self._count = index, count
        self._error: BaseException | None = None

    def stepped(self, name: str, index: int) -> bool:
        self.phases.step(name, index)
        try:
            self.watch.check()
            if self.watch.progress is not None:
                words = f"plan {self._index + 1} of {self._count}: {name}" if self._count > 1 else name
                share = (self._index + self.phases.fraction) / self._count
                self.watch.progress.phase(words, round(1000 * share), 1000)
        except BaseException as error:  # also Ctrl-C, which lands in any bytecode
            self._error = error
        return self._error is None

    def settle(self) -> None:
        if self._error is not None:
            raise self._error
        self.watch.check()


def _time(plan: bytes, cuda: Cuda, clock: Callable[[], float]) -> float:
    """Median milliseconds of a call, copies and waiting included."""
    loaded, log = load(plan)
    with Session(cuda, loaded, log, ("copy", True, False), clock) as session:
        del loaded
        image = np.zeros(session.shape, session.dtype)
        times = []
        for _ in range(_CALLS):
            start = clock()
            session.run(image)
            times.append((clock() - start) * 1e3)
    return float(np.median(times))


def workspace_for(available: int) -> int:
    """MiB of workspace where `available` bytes are free: half of them, within bounds.

    >>> workspace_for(1000 * 2**20), workspace_for(2**20), workspace_for(2**40)
    (500, 64, 4096)
    """
    return min(max(available // 2**21, _WORKSPACE[0]), _WORKSPACE[1])


@contextmanager
def _peak(cuda: Cuda) -> Iterator[Callable[[], float | None]]:
    """How far free memory fell inside, MiB, by looking now and then; None where it could not be read."""
    least: list[int] = []
    before = _free_bytes(cuda)
    over = threading.Event()

    def look() -> bool:
        found = _free_bytes(cuda)
        least[:] = [] if found is None else [min([found, *least])]
        return found is not None

    def watch() -> None:
        while look() and not over.wait(_LOOK):
            pass

    thread = threading.Thread(target=watch, name="igate-memory", daemon=True)
    thread.start()
    try:
        yield lambda: None if before is None or not least else max(before - least[0], 0) / 2**20
    finally:
        over.set()
        thread.join()
        look()


def _free_bytes(cuda: Cuda) -> int | None:
    try:
        with cuda.current():
            return cuda.memory()[0]
    except IgateError:
        return None


def seal(cache: bytes, device: str) -> bytes:
    """A timing cache with a digest of it and of the device; nothing for an empty one.

    >>> unseal(seal(b"cache", "Orin"), "Orin")[0], unseal(seal(b"cache", "Orin"), "Thor")[0]
    (b'cache', b'')
    """
    return _SEAL + hashlib.sha256(device.encode() + b"\0" + cache).digest() + cache if cache else b""


def unseal(data: bytes, device: str) -> tuple[bytes, str]:
    """(the cache, "") or (b"", why it is not used): a build without one is only slower."""
    if not data:
        return b"", ""
    body = len(_SEAL) + 32
    if data.startswith(_SEAL) and len(data) > body:
        digest, cache = data[len(_SEAL) : body], data[body:]
        if hashlib.sha256(device.encode() + b"\0" + cache).digest() == digest:
            return cache, ""
    return b"", "WARNING: the timing cache is damaged, or of another device or version: not used"
