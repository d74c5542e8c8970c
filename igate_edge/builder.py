"""Bundle -> engine of this machine: found in the cache or built, checked either way, the last good one kept."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, builder_onnxruntime, emulated
from .builder_parts import MIN_COVERAGE as MIN_COVERAGE
from .builder_parts import Backend, Session, barriers, costs_of, networks, ranges_for
from .builder_parts import Work as _Work
from .buildreport import BuildReport
from .bundle import Bundle
from .compiler import layout
from .engines import onnxruntime as ort
from .engines.tensorrt import BuildCancelled, Progress
from .errors import CheckFailed, IgateError, InputError, UnavailableError
from .files import as_path, os_errors, read_file
from .runtime import cache, cache_lock

__all__ = ["Options", "barriers", "build", "costs_of", "networks", "open_engine", "ranges_for"]

PRECISIONS = ("auto", "int8", "float")
#: emulate: the device's own kernels on this CPU, for looking at what they compute; never cached, never timed.
#: auto: TensorRT where it is usable, else ONNX Runtime; a backend that was named is never replaced by another.
BACKENDS = ("onnxruntime", "tensorrt", "auto", "emulate")
#: Rows of a call at most: a robot has so many cameras.
MAX_BATCH = 64


@dataclass(frozen=True)
class Options:
    """How to build: threads a frame, precision ("auto" measures), tasks (None = all), calibration (own frames).

    choice: the lowering of the layers, see `compiler.layout.lay_out`; tune: find the fastest instead, see `tune`. For
    TensorRT: precision "float" is FP16; batch: the most rows of a call; max_ms: the longest frame time allowed (None =
    the bundle's budget); seconds: how long settings may be tried beyond the first; workspace_mb: None = from the free
    memory; plugins: libraries that the engine needs.
    """

    backend: str = "onnxruntime"
    threads: int = 1
    precision: str = "auto"
    cache_dir: str | os.PathLike[str] | None = None
    calibration: Sequence[np.ndarray] | None = None
    tasks: Sequence[str] | None = None
    choice: str | Mapping[str, str] = "merged"
    tune: bool = False
    batch: int = 1
    max_ms: float | None = None
    seconds: float = 300.0
    workspace_mb: int | None = None
    plugins: Sequence[str | os.PathLike[str]] = ()

    def __post_init__(self) -> None:
        for name, value, known in (("backend", self.backend, BACKENDS), ("precision", self.precision, PRECISIONS)):
            if value not in known:
                raise InputError(f"unknown {name} {value!r}", f"known: {', '.join(known)}", "use one of these")
        ort.check_threads(self.threads)
        layout.check_choice(self.choice)
        if self.tune and (self.precision == "float" or self.backend != "onnxruntime"):
            evidence = f"precision {self.precision!r}, backend {self.backend!r}"
            raise InputError("only INT8 engines of ONNX Runtime are tuned", evidence, "leave out tune")
        if isinstance(self.tasks, str) or not isinstance(self.tasks, Sequence | None):
            raise InputError("tasks must be a list of names", f"got {self.tasks!r:.60}", "pass tasks=['NAME']")
        if not isinstance(self.calibration, Sequence | np.ndarray | None) or isinstance(self.calibration, str):
            evidence = f"got {type(self.calibration).__name__}"
            raise InputError("calibration must be a list of frames", evidence, "pass uint8 RGB frames [H,W,3]")
        self._check_device_options()

    def _check_device_options(self) -> None:
        if type(self.batch) is not int or not 1 <= self.batch <= MAX_BATCH:
            raise InputError(f"batch must be a number from 1 to {MAX_BATCH}", f"got {self.batch!r:.60}", "pass batch=1")
        for name, value in (("max_ms", self.max_ms), ("workspace_mb", self.workspace_mb)):
            if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise InputError(f"{name} must be a number above 0", f"got {value!r:.60}", f"leave out {name}")
        if not (isinstance(self.seconds, int | float) and 0 <= self.seconds < math.inf):
            raise InputError("seconds must be a number from 0", f"got {self.seconds!r:.60}", "pass seconds=0")
        asked = {"batch": self.batch != 1, "max_ms": self.max_ms, "workspace_mb": self.workspace_mb}
        strange = [name for name, value in {**asked, "plugins": self.plugins}.items() if value]
        if strange and self.backend in ("onnxruntime", "emulate"):
            evidence = f"backend {self.backend!r}"
            raise InputError(f"only engines of TensorRT have {', '.join(strange)}", evidence, f"leave out {strange[0]}")


def build(
    path: str | os.PathLike[str],
    backend: str = "onnxruntime",
    *,
    threads: int = 1,
    precision: str = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
    calibration: Sequence[np.ndarray] | None = None,
    choice: str | Mapping[str, str] = "merged",
    tune: bool = False,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    **more: Any,
) -> BuildReport:
    """Build the engine of the bundle at `path` for this machine, or find it in the cache; check it either way.

    backend: "onnxruntime", "tensorrt", "auto" (TensorRT where it is usable) or "emulate". precision "auto" keeps INT8
    only where it is faster than float in a measured A/B and passes its golden check. calibration: uint8 RGB frames that
    replace the bundle's INT8 ranges. choice: the lowering of the layers, see `compiler.layout.lay_out`; tune: spend up
    to a minute to find the fastest one for INT8. progress: is told the phases of a TensorRT build; cancelled: asked
    whether to stop it. more: batch, max_ms, seconds, workspace_mb, plugins, see `Options`. Raises BundleError,
    InputError, DataError, UnavailableError, or CheckFailed when the engine does not compute what was packaged or
    misses its budget; what was built before stays. Where the kernels and their plugin were built, TensorRT's INT8
    engine has the layers on it that are faster there, see `BuildReport.plugin`.
    """
    options = Options(backend, threads, precision, cache_dir, calibration, choice=choice, tune=tune, **more)
    _, session, report = open_engine(path, options, progress=progress, cancelled=cancelled)
    session.close()
    return report


def open_engine(
    path: str | os.PathLike[str],
    options: Options,
    *,
    rollback: bool = False,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    backend: Backend | None = None,
) -> tuple[Bundle, Session, BuildReport]:
    """Bundle, checked session and report: from the cache when an intact entry passes its checks, else built.

    rollback: where a new engine fails its checks, open the one that was built before for the same network; without it
    the CheckFailed names that engine. backend: stands in for the one that `options` name.
    """
    if options.backend == "auto":
        try:
            asked = dataclasses.replace(options, backend="tensorrt")
            watch: dict[str, Any] = {"progress": progress, "cancelled": cancelled}
            return open_engine(path, asked, rollback=rollback, backend=backend, **watch)
        except UnavailableError as error:
            asked = dataclasses.replace(options, backend="onnxruntime")
            bundle, session, report = open_engine(path, asked, rollback=rollback)
            note = f"ONNX Runtime runs this bundle, TensorRT does not: {error}"
            return bundle, session, dataclasses.replace(report, warnings=[note, *report.warnings])
    work = _Work()
    with work.stage("read"):
        bundle = Bundle.read(path)
    names = _tasks(bundle, options.tasks)
    if options.backend == "emulate":
        key = cache.cache_key(_content(bundle, options, names))
        return bundle, *_emulated(_Job(Path(path).name, bundle, options, names, work, key=key))
    job = _job(Path(path).name, bundle, options, names, work, backend or _backend(options, progress, cancelled))
    return bundle, *_open(job, rollback, progress)


@dataclass(frozen=True)
class _Job:
    """One engine to be found or built. slot: digest of what it computes, whatever runs it; made_for: what runs it."""

    name: str
    bundle: Bundle
    options: Options
    tasks: list[str]
    work: _Work
    key: str
    slot: str = ""
    made_for: dict[str, str] = dataclasses.field(default_factory=dict)
    folder: Path = Path()
    backend: Any = None

    @property
    def path(self) -> str:
        return str(self.folder / f"{self.key}.engine")

    def report(self, facts: dict[str, Any], version: str, path: str) -> BuildReport:
        return BuildReport(
            bundle=self.name,
            seal=self.bundle.seal,
            form=str(self.bundle.manifest.get("form", "")),
            backend=self.options.backend,
            version=version,
            threads=self.options.threads,
            tasks=self.tasks,
            cached=False,
            key=self.key,
            path=path,
            seconds=self.work.seconds,
            warnings=self.work.warnings,
            device=cache.fingerprint(),
            batch=self.options.batch,
            **facts,
        )


def _job(name: str, bundle: Bundle, options: Options, names: list[str], work: _Work, backend: Backend) -> _Job:
    content = _content(bundle, options, names)
    made_for = {part: str(value) for part, value in backend.probe().items()}
    around = {"compiler": __version__, "backend": made_for, "device": backend.surroundings(options)}
    limits = {"budget": backend.limit(bundle, options), "seconds": options.seconds, "workspace": options.workspace_mb}
    folder = as_path(options.cache_dir) if options.cache_dir is not None else cache.default_dir()
    key, slot = cache.cache_key({**content, **around, "limits": limits}), cache.cache_key(content)
    return _Job(name, bundle, options, names, work, key, slot, made_for, folder, backend)


def _backend(options: Options, progress: Progress | None, cancelled: Callable[[], bool] | None) -> Backend:
    if options.backend == "onnxruntime":
        return builder_onnxruntime
    from .builder_tensorrt import TensorRT

    return TensorRT(progress=progress, cancelled=cancelled)


def _emulated(job: _Job) -> tuple[Session, BuildReport]:
    with job.work.stage("total"):
        _, session, facts = emulated.compile_(job.bundle, job.options, job.tasks, job.work)
    return session, job.report(facts, str(emulated.probe()["version"]), "")


def _open(job: _Job, rollback: bool, progress: Progress | None) -> tuple[Session, BuildReport]:
    """Session and report of a job, from the cache or built under the lock of its key."""
    found, reason = _from_cache(job, job.key)
    if found is not None:
        return found

    def waiting() -> None:
        if progress is not None:
            progress.phase("waiting for another process that builds this engine", 0, 0)

    with cache_lock.building(job.folder, job.key, waiting):
        found, reason = _from_cache(job, job.key)  # whoever held the lock may have built it
        if found is not None:
            return found
        if reason:
            job.work.warnings.append(f"{reason}: built again")
        try:
            with job.work.stage("total"):
                engine, session, facts = job.backend.compile_(job.bundle, job.options, job.tasks, job.work)
        except BuildCancelled:
            raise
        except CheckFailed as error:
            return _previous(job, error, rollback)
        report = job.report(facts, job.made_for["version"], job.path)
        about = {"report": report.as_json(), "made_for": job.made_for, "slot": job.slot}
        problem = cache.store(job.folder, job.key, engine, about)
    if problem:
        report = dataclasses.replace(report, path="", warnings=[*report.warnings, problem])
    return session, report


def _previous(job: _Job, error: CheckFailed, rollback: bool) -> tuple[Session, BuildReport]:
    """The engine built before for the same network, which a new one that failed does not replace; else `error`."""
    for key in cache.alike(job.folder, job.slot, job.key):
        found, _ = _from_cache(job, key)
        if found is None:
            continue
        session, report = found
        if rollback:
            note = f"rolled back to the engine built before ({report.reason}): {error}"
            return session, dataclasses.replace(report, rolled_back=str(error), warnings=[note, *report.warnings])
        session.close()
        evidence = f"{error.evidence}; the engine built before stays: {report.path}"
        raise CheckFailed(error.cause, evidence, error.fix) from error
    raise error


def _from_cache(job: _Job, key: str) -> tuple[tuple[Session, BuildReport] | None, str]:
    """Session and report of a cached engine, or the reason why it cannot be used ("" when there is none)."""
    entry, reason = cache.load(job.folder, key, job.made_for)
    if entry is None:
        return None, reason
    try:
        report = BuildReport(**entry.meta["report"])
        session = job.backend.open(entry.payload, job.options)
    except Exception as error:  # whatever is wrong with an old entry, the bundle can replace it
        return None, _does_not_open(error)
    try:
        results, problems = job.backend.check(job.bundle, session, report.precision, job.tasks)
    except Exception as error:
        session.close()
        return None, _does_not_open(error)
    if problems:
        session.close()
        return None, f"the cached engine fails its golden check ({'; '.join(problems)})"
    # The same content under another name finds this entry, so what depends on the place is filled in here.
    where, shown = str(job.folder / f"{key}.engine"), [result.as_json() for result in results]
    return (session, dataclasses.replace(report, cached=True, golden=shown, bundle=job.name, path=where)), ""


def _does_not_open(error: Exception) -> str:
    text = str(error) if isinstance(error, IgateError) else f"{type(error).__name__}: {error}"
    return f"the cached engine does not open ({text[:200]})"


def _tasks(bundle: Bundle, wanted: Sequence[str] | None) -> list[str]:
    known = [spec.name for spec in bundle.tasks]
    unknown = [name for name in wanted or () if name not in known]
    if unknown or (wanted is not None and not wanted):
        evidence = f"{unknown or 'none'} asked for, the bundle has {', '.join(known)}"
        raise InputError("unknown task" if unknown else "no task asked for", evidence, "ask for tasks of the bundle")
    return [name for name in known if wanted is None or name in wanted]


def _content(bundle: Bundle, options: Options, names: list[str]) -> dict[str, Any]:
    """What an engine computes: digests of graph, weights and scales, and the options that change it."""
    members = bundle.manifest["members"]
    frames = None
    if options.calibration is not None:
        frames = hashlib.sha256()
        for frame in options.calibration:
            frames.update(repr((np.shape(frame), str(np.asarray(frame).dtype))).encode() + np.asarray(frame).tobytes())
    return {
        "model": members["model.onnx"]["sha256"],
        # Of the manifest, what a build reads: the same network under other names is not the same engine.
        "tasks": bundle.manifest["tasks"],
        "preprocess": bundle.manifest["preprocess"],
        "plain": members["plain.onnx"]["sha256"],
        "scales": members["ranges.safetensors"]["sha256"] if frames is None else frames.hexdigest(),
        "plugins": [_digest(as_path(path)) for path in options.plugins],
        "options": {
            "backend": options.backend,
            "threads": options.threads,
            "precision": options.precision,
            "tasks": names,
            "choice": options.choice if isinstance(options.choice, str) else dict(sorted(options.choice.items())),
            "tune": options.tune,
            "batch": options.batch,
        },
    }


def _digest(path: Path) -> str:
    with os_errors(path, "read"):
        return hashlib.sha256(read_file(path)).hexdigest()
