"""Flight recorder: the last seconds of frames, answers and timings in memory, on disk when something goes wrong."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..engines.session import Closing
from ..errors import IgateError, InputError
from ..files import as_path, make_folder, os_errors
from ..runtime.frame import Frame, Result
from . import messages as neutral
from .bag import BagWriter, info_topic, remove_left_overs
from .typestore import TYPES, require_bag, serialise

RECORDING, TIMINGS = "/igate/recording", "/igate/timings"
#: Bytes that a recording may need beyond its arrays: index and message definitions, and headers a frame.
_OVERHEAD, _PER_FRAME = 64_000, 6_000
_TOPIC = re.compile(r"(/[A-Za-z_][A-Za-z0-9_]*)+")
_MB = 1_000_000


@dataclass(frozen=True)
class Entry:
    """What is remembered of one frame; `left_out`: its answers had to go, for memory."""

    time: float
    frame: Frame
    outputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    ms: Mapping[str, float] = field(default_factory=dict)
    sequence: int | None = None
    error: str = ""
    left_out: bool = False

    @property
    def size(self) -> int:
        return sum(array.nbytes for array in (self.frame.data, *self.outputs.values()))


class Recorder(Closing):
    """Keeps the last `seconds` (at most `ring_mb` in memory); `trigger` writes them to FOLDER/flight_*.mcap.

    Where the memory does not suffice, the oldest answers go first, then the oldest frames: 5 s of a VGA camera at 30 Hz
    are 140 MB of frames, and a replay makes the answers again.
    The folder's recordings hold at most `max_mb` together: the oldest go first. Recorders may share a folder: a file's
    name ends with its recorder's own mark. Thread-safe; `add` and `trigger` never wait for the disk and never raise for
    it: what failed is a sentence in `problems`. about: facts that go into each file (bundle, version, ...), JSON; "fit"
    and "at" of a pipeline that has others than the usual, so that a replay looks at the frames in the same way. clock:
    seconds, monotonic. Raises UnavailableError (extra `bag`, no such folder can be made) and InputError (a limit that
    is not above 0).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        seconds: float = 5.0,
        max_mb: float = 256.0,
        *,
        ring_mb: float = 200.0,
        about: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("seconds", seconds), ("max_mb", max_mb), ("ring_mb", ring_mb)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise InputError(f"not a limit of a recorder: {name}", f"{value!r:.40}", "give a number above 0")
        require_bag()
        self.folder = as_path(folder)
        make_folder(self.folder)
        remove_left_overs(self.folder, "flight_")  # else a board that loses power in mid-write fills its disk
        self._about, self._clock, self._seconds = dict(about or {}), clock, seconds
        self._ring_bytes, self._disk_bytes = ring_mb * _MB, max_mb * _MB
        self._ring: deque[Entry] = deque()
        self._held, self._last = 0, -float("inf")
        self._slim = 0  # so many of the oldest entries have given up their answers
        self._problems: deque[str] = deque(maxlen=20)
        self._named: set[Path] = set()
        # Of this recorder alone: two in one folder may have the same stamp and reason, in containers the same pid too.
        self._mark = secrets.token_hex(3)
        self._state = threading.Condition()
        self._pending = 0
        self._jobs: queue.SimpleQueue[tuple[Path, list[Entry], str] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be recorded, newest last; at most 20 sentences are kept."""
        with self._state:
            return tuple(self._problems)

    def add(self, frame: Frame, result: Result | None, error: str = "") -> None:
        """Remember a frame with its answer; None: it was dropped, too old by then, or failed, and `error` says why.

        A pipeline hands in what it took; frames that it refused, or that were too late on arrival, are only counted.
        The arrays are kept as they are, so nobody may change them later; those of a borrowed result are copied.
        """
        entry = _entry(self._clock(), frame, result, error)
        with self._state:
            if self._closed:
                return
            self._ring.append(entry)
            self._held += entry.size
            while self._ring and self._ring[-1].time - self._ring[0].time > self._seconds:
                self._forget()
            while self._slim < len(self._ring) - 1 and self._held > self._ring_bytes:
                fat = self._ring[self._slim]
                self._ring[self._slim] = replace(fat, outputs={}, left_out=bool(fat.outputs))
                self._held -= fat.size - self._ring[self._slim].size
                self._slim += 1
            while self._ring and self._held > self._ring_bytes:
                self._forget()

    def _forget(self) -> None:
        self._held -= self._ring.popleft().size
        self._slim = max(self._slim - 1, 0)

    def trigger(self, reason: str) -> Path | None:
        """Write what is remembered; gives the path that the recording will have.

        None when there is nothing new, less than `seconds` after the last one (a lasting alarm fills no disk), and
        while that one is still being written: so memory holds two recordings at most.
        """
        if not isinstance(reason, str):
            raise InputError("not a reason", f"{reason!r:.40}", "say in words why the recording is made")
        now = self._clock()
        with self._state:
            if self._closed or self._pending or not self._ring or now - self._last < self._seconds:
                return None
            entries, self._held, self._slim, self._last = list(self._ring), 0, 0, now
            self._ring.clear()
            path = self._free_name(entries[-1].frame.stamp_ns, reason)
            self._pending += 1
            self._jobs.put((path, entries, reason))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="igate-recorder", daemon=True)
                self._thread.start()
        return path

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all triggered recordings are on disk; False after `timeout` seconds."""
        with self._state:
            return self._state.wait_for(lambda: self._pending == 0, timeout)

    def close(self) -> None:
        """Finish what was triggered, forget the rest."""
        with self._state:
            self._closed, thread = True, self._thread
            self._ring.clear()
        if thread is not None and thread is not threading.current_thread():
            self._jobs.put(None)
            thread.join()
            self._thread = None

    def _free_name(self, stamp_ns: int, reason: str) -> Path:
        slug = re.sub("[^a-z0-9]+", "-", reason.lower()).strip("-")[:40] or "trigger"
        base, number = f"flight_{max(stamp_ns, 0):019d}_{slug}_{self._mark}", 1
        while (
            path := self.folder / f"{base}{f'_{number}' if number > 1 else ''}.mcap"
        ) in self._named or path.exists():
            number += 1
        self._named.add(path)
        return path

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._write(*job)
            except Exception as error:  # the pipeline goes on whatever the disk does
                text = error.cause if isinstance(error, IgateError) else type(error).__name__
                self._note(f"recording {job[0].name} was not written: {text}: {getattr(error, 'evidence', error)}")
            with self._state:
                self._named.discard(job[0])
                self._pending -= 1
                self._state.notify_all()

    def _note(self, sentence: str) -> None:
        with self._state:
            self._problems.append(sentence)

    def _write(self, path: Path, entries: list[Entry], reason: str) -> None:
        kept, room = list[Entry](), self._disk_bytes - _OVERHEAD
        for entry in reversed(entries):
            room -= entry.size + _PER_FRAME
            if room < 0:
                break
            kept.insert(0, entry)
        if len(kept) < len(entries):
            self._note(f"{path.name}: the oldest {len(entries) - len(kept)} frame(s) left out, the disk limit is full")
        if not kept:
            return
        self._make_room(self._disk_bytes - room)
        about = {**self._about, "reason": reason, "left_out": len(entries) - len(kept)}
        for loss in write_recording(path, kept, about):
            self._note(f"{path.name}: {loss}")

    def _make_room(self, need: float) -> None:
        """Delete the oldest recordings until `need` more bytes stay within the limit."""
        there = []
        for file in self.folder.glob("flight_*.mcap"):
            with contextlib.suppress(OSError):  # another process may have deleted it
                there.append((file.stat().st_mtime_ns, file.stat().st_size, file))
        total = sum(size for _, size, _ in there)
        for _, size, file in sorted(there):
            if total + need <= self._disk_bytes:
                return
            with os_errors(file, "delete"):
                file.unlink(missing_ok=True)
            total -= size


def _entry(now: float, frame: Frame, result: Result | None, error: str) -> Entry:
    if result is None:
        return Entry(now, frame, error=error)
    outputs = dict(result.outputs)
    if result.borrowed:
        outputs = {name: array.copy() for name, array in outputs.items()}
        frame = replace(frame, data=frame.data.copy())
    return Entry(now, frame, outputs, dict(result.ms), result.sequence, error)


def write_recording(path: Path, entries: Sequence[Entry], about: Mapping[str, Any]) -> list[str]:
    """Write frames and what became of them to an mcap file; see `read_recording` for the way back.

    Gives a sentence for each frame that ROS's messages cannot hold: it is left out, the others are written.
    """
    inputs = {entry.frame.source: _input_topic(entry.frame.source) for entry in entries}
    topics = _output_topics(entries, inputs)
    facts = {
        **about,
        "inputs": {topic: source for source, topic in inputs.items()},
        "outputs": {topic: [inputs[source], name] for (source, name), topic in topics.items()},
    }
    losses = []
    with BagWriter(path) as bag:
        bag.write(RECORDING, neutral.TextMessage(json.dumps(facts, sort_keys=True)), _log_ns(entries[0].frame))
        for entry in entries:
            log_ns = _log_ns(entry.frame)
            try:
                packed = [
                    (topic, TYPES[type(message)], serialise(message))
                    for topic, message in _messages(entry, inputs[entry.frame.source], topics)
                ]
            except InputError as error:
                losses.append(f"the frame with stamp {entry.frame.stamp_ns} is left out: {error.cause}")
                continue
            for topic, kind, data in packed:
                bag.write_raw(topic, kind, log_ns, data)
    return losses


def _messages(entry: Entry, topic: str, topics: Mapping[tuple[str, str], str]) -> Iterator[tuple[str, neutral.Message]]:
    frame = entry.frame
    header = frame.stamp_ns, frame.frame_id
    yield topic, neutral.image_message(frame.data, frame.encoding, *header)
    if frame.camera is not None:
        yield info_topic(topic), neutral.CameraInfoMessage(frame.camera, *header)
    for name, array in entry.outputs.items():
        yield topics[frame.source, name], _as_message(array, header)
    values = {stage: f"{ms:.3f}" for stage, ms in entry.ms.items()}
    values |= {"sequence": str(entry.sequence)} if entry.sequence is not None else {}
    values |= {"answers": "left out: the memory did not suffice"} if entry.left_out else {}
    status = neutral.Status(2 if entry.error else 0, topic, entry.error, values)
    yield TIMINGS, neutral.Diagnostics((status,), *header)


def _output_topics(entries: Sequence[Entry], inputs: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """(source, task) -> topic; tasks whose names differ only in what ROS cannot write still get two."""
    topics: dict[tuple[str, str], str] = {}
    for source, name in dict.fromkeys((entry.frame.source, name) for entry in entries for name in entry.outputs):
        topic = f"{inputs[source]}/igate/output/{neutral.token(name)}"
        while topic in topics.values():
            topic += "_"
        topics[source, name] = topic
    return topics


def _input_topic(source: str) -> str:
    if _TOPIC.fullmatch(source):
        return source
    return f"/igate/input/{neutral.token(source)}" if source else "/igate/input"


def _log_ns(frame: Frame) -> int:
    return frame.stamp_ns if 0 < frame.stamp_ns < 2**63 else max(frame.received_ns, 0)


def _as_message(array: np.ndarray, header: tuple[int, str]) -> neutral.Message:
    """Any decoded output, lossless, in the type that shows it best."""
    if array.ndim == 1:
        return neutral.ScoresMessage(tuple(map(str, range(len(array)))), tuple(map(float, array)), *header)
    channels = array.shape[2] if array.ndim == 3 else 1
    encoding = f"{8 * array.itemsize}{ {'u': 'U', 'i': 'S', 'f': 'F'}.get(array.dtype.kind, '?') }C{channels}"
    if array.dtype == np.uint8 and channels == 1:
        encoding = "mono8"
    return neutral.image_message(array, encoding, *header)
