"""`igate serve`: a camera through one network until it is told to stop, watched, recorded and supervised."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_console import Answer, say
from .errors import InputError, UnavailableError
from .files import as_path, atomic_writer, check_writable, make_folder, os_errors

if TYPE_CHECKING:
    from .robotics.recorder import Recorder
    from .runtime.exporters import JsonLines
    from .runtime.frame import Frame, Result
    from .runtime.monitor import Monitor
    from .runtime.pipeline import Counts, Pipeline
    from .runtime.supervise import Supervised

#: Seconds between two lines of what the monitor says, on stderr and in the file of --jsonl.
SAY_S = 10.0
#: A stage that is busy for this long with one frame hangs: systemd should start the service again.
STUCK_S = 4.0
#: Seconds that the end waits for the camera: longer than `Pipeline.run` waits for its last results.
LEAVE_S = 8.0


@dataclass(frozen=True)
class ServeArgs:
    """What the command line said; None: the default. See `igate serve --help`."""

    bundle: Path
    source: str
    backend: str = "auto"
    threads: int = 1
    cache: Path | None = None
    budget_ms: float | None = None
    port: int = 9464
    record: Path | None = None
    latest: Path | None = None
    seconds: float | None = None
    jsonl: Path | None = None


def serve(args: ServeArgs) -> Answer:
    """Answer frames until a signal, the end of the source or `seconds`; exit code 1 when no frame was answered."""
    from .bundle import Bundle
    from .runtime import exporters
    from .runtime.device_state import read_state
    from .runtime.engine import Engine
    from .runtime.monitor import Monitor, budget_ms
    from .runtime.pipeline import Pipeline
    from .runtime.supervise import Supervised

    if args.seconds is not None and not args.seconds <= threading.TIMEOUT_MAX:
        raise InputError("not a time in seconds", f"--seconds {args.seconds:g}", "give fewer, or leave it out: no end")
    bundle = Bundle.read(args.bundle)
    sink = _sink(args.latest)
    budget = args.budget_ms if args.budget_ms is not None else budget_ms(bundle.manifest)
    monitor = Monitor(budget, reference=bundle.manifest.get("reference"), state=read_state)
    place: dict[str, Any] = {"backend": args.backend, "threads": args.threads, "cache_dir": args.cache}
    open_engine = functools.partial(Engine.open, args.bundle, **place)
    with contextlib.ExitStack() as stack:
        frames, mode = open_source(args.source)
        stack.callback(getattr(frames, "close", lambda: None))
        if (lines := _lines(args.jsonl)) is not None:
            stack.enter_context(lines)
        recorder = stack.enter_context(_recorder(args.record, bundle.seal)) if args.record is not None else None
        if recorder is not None:
            monitor.on_alarm = recorder.trigger
        if args.port:  # before an engine is built: a port that is taken is said at once
            stack.enter_context(exporters.serve(monitor, args.port))
            say(f"health: http://127.0.0.1:{args.port}/metrics")
        say(f"opening {args.bundle.name}")
        engine = stack.enter_context(Supervised(open_engine, on_change=lambda status: say(f"engine: {status}")))
        pipeline = Pipeline(engine, sink, mode=mode, monitor=monitor, recorder=recorder)
        stack.enter_context(_said_every(SAY_S, monitor, lines))
        return _loop(args, engine, stack.enter_context(pipeline), frames, monitor, recorder, stack)


def _loop(
    args: ServeArgs,
    engine: Supervised,
    pipeline: Pipeline,
    frames: Iterable[Frame],
    monitor: Monitor,
    recorder: Recorder | None,
    stack: contextlib.ExitStack,
) -> Answer:
    from .runtime.supervise import quiet_collector, stop_on_signals
    from .runtime.watchdog import Watchdog

    ended = threading.Event()

    def stop() -> None:
        ended.set()
        pipeline.stop()

    if args.seconds is not None:
        timer = threading.Timer(args.seconds, stop)
        timer.daemon = True
        timer.start()
        stack.callback(timer.cancel)
    stack.enter_context(stop_on_signals(stop))
    stack.enter_context(quiet_collector())
    alive = functools.partial(_alive, engine, pipeline)
    stack.enter_context(Watchdog(alive, lambda: monitor.verdict().sentence))
    counts = run_until(ended, pipeline, frames)
    return _answer(monitor, pipeline, counts, recorder)


def run_until(ended: threading.Event, pipeline: Pipeline, frames: Iterable[Frame]) -> Counts:
    """`pipeline.run(frames)` on a thread of its own, left behind LEAVE_S after `ended` when the camera hangs.

    A driver that never returns would keep the main thread from hearing a signal. Raises what `run` raises.
    """
    failed: list[BaseException] = []

    def read() -> None:
        try:
            pipeline.run(frames)
        except BaseException as error:  # raised below, in the thread that can answer for it
            failed.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=read, name="igate camera", daemon=True)
    thread.start()
    ended.wait()
    thread.join(LEAVE_S)
    if failed:
        raise failed[0]
    if thread.is_alive():
        say("the camera hangs: it is left behind")
    return pipeline.counts


def _sink(latest: Path | None) -> Callable[[Result], None]:
    return Latest(latest).put if latest is not None else lambda result: None


def _lines(path: Path | None) -> JsonLines | None:
    from .runtime.exporters import JsonLines

    if path is None:
        return None
    make_folder(path.parent)
    return JsonLines(path)


def _alive(engine: Supervised, pipeline: Pipeline) -> bool:
    return engine.alive and pipeline.stuck_s < STUCK_S


def open_source(text: str) -> tuple[Iterable[Frame], str]:
    """The source that a text names, and the pipeline's mode for it: "latest" for what is live, "every" for files.

    synthetic, v4l2:///dev/video0, csi://0, rtsp://..., a video, or a folder of images. Raises InputError for a text
    that names none, UnavailableError where the camera or what reads it is missing.
    """
    from .runtime import sources, sources_gstreamer

    kind, _, rest = text.partition("://")
    if text == "synthetic":
        return sources.Synthetic(), "latest"
    if kind == "csi" and re.fullmatch(r"\d{1,2}", rest):
        return sources.Capture(sources_gstreamer.csi(int(rest))), "latest"
    if kind == "v4l2" and rest:
        return sources.Video(**sources_gstreamer.v4l2(rest)), "latest"
    if kind == "rtsp" and rest:
        return sources.Capture(sources_gstreamer.rtsp(text)), "latest"
    path = as_path(text)
    if text and path.is_dir():
        return sources.Folder(path), "every"
    if path.is_file():
        return sources.Video(path), "every"
    known = "synthetic, v4l2:///dev/video0, csi://0, rtsp://..., a video file or a folder of images"
    raise InputError("not a source of frames", f"{text!r:.80}", f"use {known}")


def _recorder(folder: Path, seal: str) -> Recorder:
    from .robotics.recorder import Recorder

    return Recorder(folder, about={"bundle": seal})


class Latest:
    """Keeps the newest answers in one .npz that other programs read: replaced in one step, never half written.

    Raises UnavailableError at once where nothing can be written, InputError for a device, a pipe or a folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        make_folder(path.parent)
        with os_errors(path, "write"):
            if path.exists() and not path.is_file():
                raise InputError("not a place for the answers", f"{path} is no file", "give a name NAME.npz")
        check_writable(path)  # what cannot be written is said now and not frame by frame

    def put(self, result: Result) -> None:
        """Write stamp_ns, frame_id and every task's array. Raises UnavailableError when it cannot be written."""
        import numpy as np

        arrays: dict[str, Any] = {f"task/{name}": array for name, array in result.outputs.items()}
        arrays |= {"stamp_ns": np.int64(result.stamp_ns), "frame_id": np.str_(result.frame_id)}
        with os_errors(self._path, "write"), atomic_writer(self._path, sync=False) as file:
            np.savez(file, **arrays)


@contextlib.contextmanager
def _said_every(seconds: float, monitor: Monitor, lines: JsonLines | None = None) -> Iterator[None]:
    """Say the verdict whenever its level changes, and every `seconds`; a line every `seconds` and at the end."""
    ended = threading.Event()
    health = Health(monitor, lines)

    def speak() -> None:
        level, due, next_line = "", time.monotonic() + seconds, time.monotonic() + seconds
        while not ended.wait(min(0.5, seconds)):
            verdict, now = monitor.verdict(), time.monotonic()
            if verdict.level != level or now >= due:
                level, due = verdict.level, now + seconds
                say(f"{verdict.level}: {verdict.sentence}{''.join(f'; {hint}' for hint in verdict.hints)}")
            if now >= next_line:
                next_line = now + seconds
                health.write()

    thread = threading.Thread(target=speak, name="igate verdict", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        health.write()


class Health:
    """Writes what the monitor knows, a line a call; a disk that is full is said once, and costs lines only."""

    def __init__(self, monitor: Monitor, lines: JsonLines | None) -> None:
        self._monitor, self._lines, self._failing = monitor, lines, False

    def write(self) -> None:
        """One line; nothing without a file. Never raises for the disk."""
        if self._lines is None:
            return
        try:
            self._lines.write(self._monitor.snapshot())
        except UnavailableError as error:
            if not self._failing:
                say(f"no health line: {error}")
            self._failing = True
        else:
            if self._failing:
                say("health lines are written again")
            self._failing = False


def _answer(monitor: Monitor, pipeline: Pipeline, counts: Any, recorder: Recorder | None) -> Answer:
    from .plaindata import plain_json

    if recorder is not None:
        recorder.flush(5.0)
    document = {
        "counts": plain_json(counts),
        "complaints": dict(pipeline.complaints),
        "health": monitor.snapshot(),
        "recordings": [str(path) for path in sorted(recorder.folder.glob("flight_*.mcap"))] if recorder else [],
    }
    verdict = monitor.verdict()
    shown = [
        f"{counts.answered} of {counts.received} frames answered, {counts.dropped} dropped, {counts.stale} stale",
        f"{verdict.level}: {verdict.sentence}",
        *(f"note: {key}: {sentence}" for key, sentence in pipeline.complaints.items()),
        *(f"recording: {path}" for path in document["recordings"]),
    ]
    return Answer(document, shown, 0 if counts.answered else 1)
