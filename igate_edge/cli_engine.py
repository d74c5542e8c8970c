"""`igate build`, `verify`, `bench` and `run`: a bundle becomes an engine, is checked, timed and used."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_console import Answer, progress, say
from .errors import InputError
from .reports.grids import bench_grid, cost_grid, golden_grid, separate_sentence
from .reports.tables import number, percent, times

if TYPE_CHECKING:
    import numpy as np

    from .bench import BenchReport
    from .builder import BuildReport
    from .verify import VerifyReport

#: More frames than this add nothing to activation ranges.
MOST_CALIBRATION = 512
#: Seconds after which a Ctrl-C during a build is heard at the latest.
LISTEN_S = 0.5


def build_bundle(
    path: Path,
    backend: str,
    threads: int,
    precision: str,
    cache: Path | None,
    calibration: Path | None,
    tune: bool = False,
    device: dict[str, Any] | None = None,
) -> Answer:
    """Build or load the engine of a bundle. device: options that only TensorRT has, see `builder.Options`."""
    from .builder import build
    from .engines.tensorrt_progress import Eta

    frames = _calibration(calibration) if calibration is not None else None
    say(f"building {path.name} for this machine")
    options: dict[str, Any] = {"threads": threads, "precision": precision, "cache_dir": cache, "tune": tune}
    options |= {name: value for name, value in (device or {}).items() if value not in (None, [])}
    stop = threading.Event()
    options |= {"progress": Eta(PhaseLines()), "cancelled": stop.is_set, "calibration": frames}
    report = _interruptible(lambda: build(path, backend, **options), stop)
    return Answer(report.as_json(), build_shown(report))


def _interruptible(work: Callable[[], BuildReport], stop: threading.Event) -> BuildReport:
    """Run `work` beside the main thread, which alone hears Ctrl-C and sets `stop`: TensorRT never looks at signals."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work)
        try:
            while not wait([running], LISTEN_S).done:  # a signal that another thread was given wakes nobody here
                pass
            return running.result()
        except KeyboardInterrupt:
            stop.set()
            raise


class PhaseLines:
    """One line on stderr for each phase of a long build, and one every EVERY_S seconds within it."""

    EVERY_S = 5.0

    def __init__(self) -> None:
        self._lock, self._last, self._due = threading.Lock(), "", 0.0

    def __call__(self, name: str, elapsed: float, left: float | None) -> None:
        with self._lock:
            if name == self._last and elapsed < self._due:
                return
            self._last, self._due = name, elapsed + self.EVERY_S
        say(f"{name}, {elapsed:.0f} s" + ("" if left is None else f", about {left:.0f} s left"))


def _calibration(source: Path) -> list[np.ndarray]:
    from .cli_frames import open_frames

    opened = open_frames(source)
    return [frame for _, frame in progress(islice(opened.items, MOST_CALIBRATION), "reading frames", opened.count)]


def build_shown(report: BuildReport) -> list[Any]:
    """A build for people: what was built, why, what it costs, what fell back."""
    total = report.seconds.get("total", sum(report.seconds.values()))
    origin = "from the cache" if report.cached else f"built in {total:.1f} s"
    where = f"engine: {report.path}" if report.path else "engine: not cached"
    shown: list[Any] = [f"{report.bundle}: {report.precision} engine for {report.backend} {report.version}, {origin}"]
    shown += [f"precision: {report.precision} ({report.reason})"]
    share = report.coverage.get("int8_conv_macs_share")
    if report.precision == "int8" and share is not None:
        shown.append(f"convolution MACs in INT8: {percent(share, 1)}")
    if report.backend == "emulate":
        host, steps = report.coverage["host"], report.coverage["layers"]
        shown.append(
            f"kernels: {len(steps) - len(host)} launches, {len(host)} other steps on the host; "
            f"{percent(report.coverage['padding'])} of what the kernels multiply is padding"
        )
    shown += [f"ROLLED BACK to the engine built before: {report.rolled_back}"] if report.rolled_back else []
    shown += latency_shown(report.latency)
    if report.plugin:
        on = f"{', '.join(report.plugin['layers'])}; " if report.plugin["layers"] else ""
        shown.append(f"plugin: {on}{report.plugin['note']}")
    shown += [where, "", cost_grid(report.cost, len(report.tasks)), "", golden_grid(report.golden)]
    shown += [f"note: {warning}" for warning in report.warnings if report.reason not in warning]
    shown += [
        f"lint {item['severity']}: {item['code']} {item['message']}"
        for item in engine_lint(report.lint, report.backend)
    ]
    return shown


def latency_shown(latency: dict[str, Any]) -> list[str]:
    """Predicted beside measured ms, the lowering, and what tuning tried; nothing for an engine that was not timed."""
    if not latency:
        return []
    measured = f"a frame takes {number(latency['measured_ms'])} ms (measured)"
    if latency["predicted_ms"] is None:
        shown = [f"{measured}; not predicted: {latency['note']}"]
    else:
        error = f"{percent(abs(latency['error']), 1)} off, the table claims {percent(latency['error_bar'], 1)}"
        shown = [f"{measured}, {number(latency['predicted_ms'])} ms predicted by {latency['table']}: {error}"]
        shown += [f"note: {latency['note']}"] if latency["note"] else []
        shown.append(f"most of it: {', '.join(latency['dearest'])}")
    if "paced" in latency:
        paced, limit = latency["paced"], latency["budget"]
        allowed = limit["note"] if limit["ms"] is None else f"{number(limit['ms'])} ms allowed"
        p99 = number(paced["paced"]["p99"])
        shown.append(f"at a camera's pace: p99 {p99} ms of {paced['frames']} frames; {allowed or 'no budget'}")
    tuned = latency["tuned"]
    if tuned is None:
        return [*shown, f"lowering of the layers: {latency['lowering']}"]
    shown.append(f"lowering of the layers: {tuned['name']}, tuned in {tuned['seconds']:.0f} s")
    timed = [row for row in tuned["tried"] if "ms" in row]
    return shown + [f"  {row['name']}: {number(row['ms'])} ms, {times(row['ratio'])} merged" for row in timed]


def engine_lint(findings: list[dict[str, Any]], backend: str = "onnxruntime") -> list[dict[str, Any]]:
    """Findings about the engine itself; what another backend would say is in the JSON and in the report."""
    own = "trt" if backend == "tensorrt" else "ort"
    return [item for item in findings if item.get("dialect", "ort") == own]


def verify_bundle(path: Path, backend: str = "onnxruntime", cache: Path | None = None) -> Answer:
    """Check a bundle; the answer's code is 1 when it does not compute what was packaged."""
    from .verify import verify

    report = verify(path, backend=backend, cache_dir=cache)
    return Answer(report.as_json(), verify_shown(report), 0 if report.passed else 1)


def verify_shown(report: VerifyReport) -> list[Any]:
    """A verification for people."""
    size = sum(int(member["size"]) for member in report.members.values())
    word = "PASSED" if report.passed else "FAILED"
    shown: list[Any] = [f"{report.bundle}: {size:,} bytes in {len(report.members)} members, every SHA-256 matches", ""]
    shown += [golden_grid(report.golden), ""]
    shown += [f"note: {warning}" for warning in report.warnings]
    shown += [f"problem: {problem}" for problem in report.problems]
    return [*shown, f"{word}: the network {'computes' if report.passed else 'does NOT compute'} what was packaged"]


def bench_bundle(path: Path, rounds: int, threads: int, max_ratio: float | None, max_ms: float | None) -> Answer:
    """Time a bundle against its rivals; the answer's code is 1 when it misses the budget that was given."""
    from .bench import bench

    for name, limit in (("--max-ratio", max_ratio), ("--max-ms", max_ms)):
        if limit is not None and not 0 < limit < math.inf:  # nothing exceeds NaN: it would always pass
            raise InputError("not a limit", f"{name} is {limit}", "give a number above 0")
    say(f"timing {path.name}: {rounds} interleaved rounds, {threads} thread(s)")
    report = bench(path, rounds, threads=threads)
    missed = missed_budget(report, max_ratio, max_ms)
    document = {**report.as_json(), "budget": {"max_ratio": max_ratio, "max_ms": max_ms, "missed": missed}}
    shown = bench_shown(report)
    if max_ratio is not None or max_ms is not None:
        shown += ["", *(f"FAILED: {sentence}" for sentence in missed)] if missed else ["", "PASSED: within the budget"]
    return Answer(document, shown, 1 if missed else 0)


def missed_budget(report: BenchReport, max_ratio: float | None, max_ms: float | None) -> list[str]:
    """What exceeds the budget, one sentence each; a ratio that means nothing is a miss, not a pass."""
    ours, missed = report.row("ours"), []
    if max_ratio is not None and not ours.meaningful:
        missed.append(f"the ratio to the plain net could not be measured: {ours.note}")
    elif max_ratio is not None and ours.ratio > max_ratio:
        missed.append(f"{times(ours.ratio)} the plain net's time, allowed {times(max_ratio)}")
    if max_ms is not None and ours.ms > max_ms:
        missed.append(f"median {number(ours.ms)} ms, allowed {number(max_ms)} ms")
    return missed


def bench_shown(report: BenchReport) -> list[Any]:
    """Times for people."""
    tasks = next(row.label.split()[0] for row in report.rows if row.name == "separate")
    notes = [f"note: {warning}" for warning in report.warnings]
    return [bench_grid(report), separate_sentence(report, int(tasks)), *notes]


def run_bundle(
    path: Path,
    source: Path,
    out: Path,
    limit: int | None,
    threads: int,
    precision: str,
    cache: Path | None,
    calibration: Path | None = None,
) -> Answer:
    """Run a bundle on frames and write pictures and arrays."""
    import time

    from .cli_frames import (
        FrameNames,
        depth_limits,
        open_frames,
        refuse_own_input,
        video_writer,
        write_frame,
    )
    from .files import make_folder
    from .frames import pillow
    from .runtime.engine import Engine

    pillow()
    ranges = _calibration(calibration) if calibration is not None else None
    frames = open_frames(source)
    refuse_own_input(source, out)
    make_folder(out)
    total = min(limit, frames.count or limit) if limit else frames.count
    written, spent, done = [], 0.0, 0
    film = out / f"{source.stem}.mp4"
    engine = Engine.open(path, threads=threads, precision=precision, cache_dir=cache, calibration=ranges)
    with engine, video_writer(film, frames.rate) as add:
        report, tasks, names = engine.report, engine.tasks, FrameNames(engine.tasks)
        limits: dict[str, tuple[float, float]] = {}
        for name, frame in progress(islice(frames.items, limit), f"running {path.name}", total):
            start = time.perf_counter()
            outputs = engine(frame)
            spent += time.perf_counter() - start
            limits = limits or depth_limits(tasks, {spec.name: [outputs[spec.name]] for spec in tasks})
            files, sheet = write_frame(out, names.free(name), frame, tasks, outputs, limits)
            add(sheet)
            written += files
            done += 1
    if frames.rate is not None:
        written.append(film)
    document = {
        "bundle": str(path),
        "input": str(source),
        "out": str(out),
        "frames": done,
        "precision": report.precision,
        "ms_per_frame": 1000 * spent / done,
        "depth_limits_m": limits,
        "files": [str(file) for file in written],
        "warnings": report.warnings,
    }
    return Answer(document, _run_shown(document, [spec.name for spec in tasks if spec.dense]))


def _run_shown(document: dict[str, Any], pictured: list[str]) -> list[Any]:
    out, films = document["out"], [file for file in document["files"] if file.endswith(".mp4")]
    speed = f"{document['ms_per_frame']:.1f} ms a frame with pre- and postprocessing ({document['precision']})"
    kinds = "".join(f", NAME_{task}.png" for task in pictured)
    shown = [f"{document['frames']} frame(s), {speed}", f"pictures: {out}/NAME.png side by side{kinds}"]
    shown += [f"arrays:   {out}/NAME.npz", *(f"video:    {film}" for film in films)]
    return [*shown, *(f"note: {warning}" for warning in document["warnings"])]
