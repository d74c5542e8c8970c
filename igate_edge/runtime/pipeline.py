"""Camera to answers: one frame in a stage, one frame waiting between two stages, and the newest frame wins.

The garbage collector: a frame makes no reference cycles, so its arrays are freed as soon as nobody holds them, and the
pipeline works with the collector off. It never touches the collector, which belongs to the whole process; a program
that wants no pauses wraps its loop in `supervise.quiet_collector()`. Between stages at most one frame waits, so after
the first frames memory does not grow, however slow the sink is; results that the sink keeps are its own.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from ..contract import OutputSpec, Preprocess, is_number
from ..engines.session import Closing
from ..errors import InputError
from . import encodings
from .frame import Frame, Result
from .mailbox import Closed
from .pipeline_counts import Counts, Tally, Watching, sentence
from .pipeline_stages import MODES, Job, Look, age_ms, post_stage, preprocess_stage
from .preprocess import FITS
from .relay import Relay, within

__all__ = ["Answering", "Counts", "Pipeline", "Recording", "Sink", "Watching"]

#: What gets the results, one at a time, on a thread of the pipeline.
Sink = Callable[[Result], None]
#: A stamp that is further behind than this means that the camera's clock was set back; less is a late frame.
JUMP_NS = 1_000_000_000
#: A source that fails so often in a row is at its end.
SOURCE_FAILURES = 3
#: Seconds that `run` waits for the last results once it was stopped.
STOP_S = 5.0
#: Cameras of which the newest stamp is known; beyond them the one heard of longest ago is forgotten.
MAX_SOURCES = 64


class Answering(Protocol):
    """What a pipeline needs of an engine: `runtime.engine.Engine`, or `runtime.supervise.Supervised` around one."""

    preprocess: Preprocess
    tasks: tuple[OutputSpec, ...]

    def infer(self, image: np.ndarray) -> dict[str, np.ndarray]: ...


class Recording(Protocol):
    """What a pipeline tells a flight recorder (`robotics.recorder.Recorder`)."""

    def add(self, frame: Frame, result: Result | None, error: str = "") -> object: ...


class Pipeline(Closing):
    """Frames in by `submit` or `run`, results out to `sink(result)`, in order, each with its frame's stamp.

    mode: "latest": a frame that waits is replaced by a newer one (live cameras); "every": `submit` waits, no frame is
    dropped or judged stale (bags, tests). at: "frame": answers of the frame's size; "network": of the network's.
    fit: "stretch" as in training; "letterbox" keeps the aspect ratio; "crop" looks at the middle of the frame only.
    Image, answers and camera of a result always are of the same pixels, without padding. tasks: names to answer, None =
    all of the engine's. depth_range: metres (least, most); beyond them depth is NaN. max_age_ms: in mode "latest" an
    older result is not published. borrowed: a result's arrays are written again once the sink has returned. One camera
    a pipeline where frames are live; pipelines may share an engine, which stays open. Raises InputError for an unknown
    mode, fit, place or task, and for an age, a sink or a range of depth that is none.

    >>> class Grey:
    ...     preprocess, tasks = Preprocess(1, 1), (OutputSpec("far", "depth", 1),)
    ...     def infer(self, image): return {"far": np.zeros((1, 1, 1, 1), np.float32)}
    >>> seen = []
    >>> with Pipeline(Grey(), seen.append, mode="every") as pipeline:
    ...     counts = pipeline.run([Frame(np.zeros((2, 3, 3), np.uint8), stamp_ns=7)])
    >>> counts.answered, seen[0].stamp_ns, seen[0].outputs["far"].tolist()
    (1, 7, [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    """

    def __init__(
        self,
        engine: Answering,
        sink: Sink,
        *,
        mode: str = "latest",
        monitor: Watching | None = None,
        recorder: Recording | None = None,
        tasks: Sequence[str] | None = None,
        borrowed: bool = False,
        at: str = "frame",
        fit: str = "stretch",
        depth_range: tuple[float, float] | None = None,
        max_age_ms: float | None = 1000.0,
    ) -> None:
        for name, value, known in (("mode", mode, MODES), ("fit", fit, FITS), ("size", at, ("frame", "network"))):
            if not isinstance(value, str) or value not in known:
                raise InputError(f"a pipeline has no such {name}", f"got {value!r:.40}", f"use {' or '.join(known)}")
        if max_age_ms is not None and not (is_number(max_age_ms) and max_age_ms > 0):
            raise InputError("not an age in milliseconds", f"{max_age_ms!r:.40}", "pass a number above 0, or None")
        if not callable(sink):
            raise InputError("not a sink", f"got {sink!r:.40}", "pass a function that takes a Result")
        if depth_range is not None and not _ordered(depth_range):
            raise InputError("not a range of depth", f"{depth_range!r:.40}", "pass (least, most) in metres, or None")
        self._engine, self._sink, self._monitor, self._recorder = engine, sink, monitor, recorder
        self._live = mode == "latest"
        self._max_age_ms = max_age_ms if self._live else None
        self._look = Look(engine.preprocess, fit, at, depth_range, borrowed, recorder is not None)
        self._all = tuple(engine.tasks)
        self._tasks = self._all
        self.select(tasks)
        self._tally = Tally(monitor)
        self._lock, self._turns = threading.Lock(), threading.Lock()
        self._newest: dict[str, int] = {}
        self._kinds: dict[str, tuple[str, tuple[int, int]]] = {}
        self._closed = self._stopped = False
        self._ended, self._closer = threading.Event(), 0
        self._source: Iterable[Frame] | None = None
        stages = {"preprocess": self._prepare, "infer": self._infer, "post": self._post, "sink": self._publish}
        self._relay: Relay[Job] = Relay(stages, wait=not self._live, lost=self._drop, failed=self._fail)

    @property
    def counts(self) -> Counts:
        """A snapshot; any thread."""
        return self._tally.counts()

    @property
    def complaints(self) -> dict[str, str]:
        """ "stale", or a key of `refused`, `errors` or `events` -> the sentence of the last time it happened."""
        return self._tally.complaints()

    @property
    def stuck_s(self) -> float:
        """Seconds for which the slowest stage has been busy with one frame; 0.0 when all wait. For a watchdog."""
        return self._relay.stuck_s

    def select(self, tasks: Collection[str] | None) -> None:
        """Answer only these tasks from the next frame on (None = all, empty = none); raises InputError as above."""
        known = {spec.name for spec in self._all}
        named = isinstance(tasks, list | tuple | set | frozenset) and all(isinstance(name, str) for name in tasks)
        if tasks is not None and not (named and known.issuperset(tasks)):
            evidence = f"asked: {tasks!r:.80}; the engine has {', '.join(sorted(known))}"
            raise InputError("unknown task", evidence, "name tasks of the engine")
        self._tasks = tuple(spec for spec in self._all if tasks is None or spec.name in tasks)

    def submit(self, frame: Frame, *, owned: bool = False) -> bool:
        """Hand in a frame; never raises for what is wrong with it: False = refused or stale, and counted.

        The pixels are copied unless `owned` (nobody else will write them). In mode "every" this waits for room, so a
        sink must not call it; it returns False once the pipeline is closed. Not from a recorder or a monitor.
        """
        arrived = time.monotonic_ns()
        if self._closed:
            return False
        self._tally.received()
        # Threads that submit live frames take turns, or an older frame could replace a newer one.
        with self._turns if self._live else contextlib.nullcontext():
            return self._accept(frame, owned, arrived)

    def _accept(self, frame: Frame, owned: bool, arrived: int) -> bool:
        try:
            size = encodings.check(frame)
            if not self._in_order(frame, size):
                return False
            # A time of arrival that lies ahead is one of another clock.
            received = frame.received_ns if 0 < frame.received_ns <= arrived else arrived
            pixels = frame.data if owned else np.array(frame.data, order="C")
            job = Job(replace(frame, data=pixels, received_ns=received), received)
        except encodings.Refused as error:
            self._tally.refused(error.reason, str(error))
            return False
        except Exception as error:  # no memory for the copy, or a frame that nobody thought of
            self._tally.error("submit", sentence(error))
            return False
        try:
            self._relay.put(job)
        except Closed:
            self._drop("preprocess", job)
            return False
        return True

    def run(self, source: Iterable[Frame]) -> Counts:
        """Submit all frames of a source until it ends or `stop` is called, wait for their results, close the source.

        Pixels are not copied where the source says `owned = True`. Raises what the source raised when it fails
        SOURCE_FAILURES times in a row; a single failure is an event "source".
        """
        if not isinstance(source, Iterable):
            raise InputError("not a source of frames", f"got {source!r:.60}", "pass an iterable of frames")
        self._source, failures = source, 0
        owned = bool(getattr(source, "owned", False))
        try:
            frames = iter(source)
            while not self._stopped and not self._closed:
                try:
                    frame = next(frames)
                except StopIteration:
                    break
                except Exception as error:
                    failures += 1
                    self._tally.event("source", sentence(error))
                    if failures >= SOURCE_FAILURES:
                        raise
                    continue
                failures = 0
                self.submit(frame, owned=owned)
        finally:
            self._source = None
            self._close_source(source)
        if not self._tally.wait(None, lambda: self._stopped):
            self._tally.wait(STOP_S)
        return self.counts

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is inside; False when that took longer than `timeout_s`."""
        return self._tally.wait(timeout_s)

    def stop(self) -> None:
        """End `run` after the frame in hand, for good; from any thread, or by `supervise.stop_on_signals`."""
        self._stopped = True
        self._close_source(self._source)
        self._tally.wake()

    def close(self, drain: bool = True, timeout_s: float = 5.0) -> None:
        """Take no more frames, answer those inside (`drain`) or drop them, end the threads; twice is fine.

        A stage that is still stuck after `timeout_s` is left behind, as an event "left" that names it. Not from a
        signal's handler, which may have interrupted this very pipeline: see `supervise.stop_on_signals`.
        """
        with self._lock:
            first, self._closed = not self._closed, True
            self._closer = self._closer or threading.get_ident()
        if not first:
            if not self._relay.inside and self._closer != threading.get_ident():
                self._ended.wait(within(timeout_s))  # who returns from here may free the engine
            return
        try:
            self.stop()
            for name in self._relay.close(drain, timeout_s):
                self._tally.event("left", f"the stage {name!r} did not end within {timeout_s:g} s")
        finally:
            self._ended.set()

    def _close_source(self, source: object) -> None:
        """Close it where it can be: a camera that fails even then must not keep the pipeline from ending."""
        try:
            getattr(source, "close", lambda: None)()
        except ValueError:
            pass  # a generator that is just running in another thread: it is looked at after its frame
        except Exception as error:
            self._tally.event("source", sentence(error))

    def _in_order(self, frame: Frame, size: tuple[int, int]) -> bool:
        """Whether a live frame is newer than all before it; also notes what else about the camera changed."""
        source, stamp, kind = frame.source, frame.stamp_ns, (frame.encoding, size)
        with self._lock:
            newest, before = self._newest.get(source, 0), self._kinds.get(source, kind)
            behind = newest - stamp if stamp and newest else -1
            late = self._live and 0 <= behind <= JUMP_NS
            if not late:
                self._kinds.pop(source, None)
                self._newest[source], self._kinds[source] = stamp or newest, kind
                if len(self._kinds) > MAX_SOURCES:
                    forgotten = next(iter(self._kinds))
                    del self._newest[forgotten], self._kinds[forgotten]
        if late:
            words = "the same stamp again" if not behind else f"{behind / 1e6:.1f} ms older than one before it"
            self._tally.stale(f"a frame of {source or 'the camera'} came too late: {words}")
            return False
        if behind > JUMP_NS:
            self._tally.event("clock", f"the stamps of {source or 'the camera'} jumped back by {behind / 1e9:.1f} s")
        if kind[0] != before[0]:
            self._tally.event("encoding", f"{source or 'the camera'} changed from {before[0]} to {kind[0]}")
        if size != before[1]:
            words = f"{before[1][1]}x{before[1][0]} to {size[1]}x{size[0]}"
            self._tally.event("size", f"{source or 'the camera'} changed from {words}")
        return True

    def _drop(self, stage: str, job: Job) -> None:
        why = "the pipeline was closed" if self._closed else "a newer frame took its place"
        try:
            self._record(job.frame, None, f"dropped before {stage}: {why}")
        finally:
            self._look.give_back(job)
            self._tally.dropped()

    def _fail(self, stage: str, job: Job, error: BaseException) -> None:
        try:
            self._record(job.frame, job.result, f"{stage}: {sentence(error)}")
        finally:
            self._look.give_back(job)
            self._tally.error(stage, sentence(error))

    def _too_old(self, job: Job) -> bool:
        if self._max_age_ms is None or (age := age_ms(job)) <= self._max_age_ms:
            return False
        self._look.give_back(job)
        self._record(job.frame, None, "stale: too old to be published")
        self._tally.stale(f"a frame was {age:.0f} ms old before it was answered, {self._max_age_ms:g} ms are allowed")
        return True

    def _prepare(self, job: Job) -> bool:
        complaint = preprocess_stage(job, self._look)
        if complaint:
            self._tally.event("camera_info", complaint)
        return True

    def _infer(self, job: Job) -> bool:
        if self._too_old(job):
            return False
        assert job.input is not None
        start = time.perf_counter()
        job.raw = self._engine.infer(job.input)
        job.ms["infer"] = (time.perf_counter() - start) * 1e3
        return True

    def _post(self, job: Job) -> bool:
        post_stage(job, self._look, self._tasks)
        return True

    def _publish(self, job: Job) -> bool:
        if self._too_old(job):
            return False
        assert job.image is not None
        start = time.perf_counter()
        frame, ms = job.frame, job.ms
        ms["end_to_end"] = (time.monotonic_ns() - job.arrived_ns) / 1e6
        header = frame.stamp_ns, frame.frame_id, frame.source, self._tally.counts().answered
        result = Result(*header, job.image, job.outputs, job.camera, ms, self._look.borrowed)
        job.result = result
        self._sink(result)
        # The sink's result keeps the times it had: nothing that was handed out changes.
        done = {**ms, "publish": (time.perf_counter() - start) * 1e3}
        done["end_to_end"] = (time.monotonic_ns() - job.arrived_ns) / 1e6
        final = replace(result, ms=done)
        self._record(frame, final)
        if self._monitor is not None:
            try:
                self._monitor.frame(final)
                self._monitor.inspect(final.image, final.outputs)
            except Exception as error:
                self._tally.event("monitor", sentence(error))
        self._look.give_back(job)
        self._tally.answered()
        return True

    def _record(self, frame: Frame, result: Result | None, error: str = "") -> None:
        if self._recorder is not None:
            try:
                self._recorder.add(frame, result, error)
            except Exception as failure:
                self._tally.event("recorder", sentence(failure))


def _ordered(pair: Any) -> bool:
    """Whether it is two numbers of which the first is smaller; the second may be infinite."""
    good = isinstance(pair, tuple | list) and len(pair) == 2 and is_number(pair[0])
    return good and (is_number(pair[1]) or pair[1] == float("inf")) and pair[0] < pair[1]
