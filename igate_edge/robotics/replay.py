"""Replay: the frames of a flight recording run again, and the answers compared with those that were recorded."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..contract import OutputSpec
from ..errors import DataError, IgateError, InputError
from ..golden import MEASURES, distance
from ..runtime.drift import WINDOW, Drift
from ..runtime.engine import Engine
from ..runtime.frame import Frame
from ..runtime.pipeline_stages import Job, Look, post_stage, preprocess_stage
from .messages import Diagnostics, ImageMessage, Message, ScoresMessage, TextMessage, to_array, to_frame
from .recorder import RECORDING, TIMINGS
from .storage import Storage
from .typestore import IMAGE, deserialise


@dataclass
class Recorded:
    """One frame of a recording: what was answered then, or why it was not."""

    frame: Frame
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    error: str = ""


@dataclass
class TaskReplay:
    """How far a task's answers are from the recorded ones, in the terms of `measure`; the worst frame counts."""

    task: str
    measure: str
    limit: float
    frames: int = 0
    identical: int = 0
    worst: float = 0.0
    worst_stamp_ns: int = 0

    @property
    def passed(self) -> bool:
        """False also when a distance is NaN."""
        return bool(self.worst <= self.limit)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


@dataclass
class Replay:
    """What a replay found. kept: frames with recorded answers; errors: frames that failed when they were recorded or
    fail now: (stamp, then, now)."""

    about: dict[str, Any]
    frames: int = 0
    kept: int = 0
    tasks: list[TaskReplay] = field(default_factory=list)
    errors: list[tuple[int, str, str]] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def compared(self) -> bool:
        """False where no frame has an answer to compare with, and none fails now."""
        return bool(self.tasks) or any(now for _, _, now in self.errors)

    @property
    def passed(self) -> bool:
        """True when all answers are within the limits and no frame fails now that did not when it was recorded.

        False where nothing was compared.
        """
        worse = any(now and not then for _, then, now in self.errors)
        return self.compared and not worse and all(task.passed for task in self.tasks)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "tasks": [task.as_json() for task in self.tasks], "passed": self.passed}


@dataclass
class Unlike:
    """How unlike the calibration frames a recording's are. score: 1 is the limit, None unknown; features: its parts.

    tensors: tensor -> share (0..1) of values outside the range that calibration saw, largest first. frames: that were
    looked at. note: why something is unknown, in words.
    """

    frames: int = 0
    score: float | None = None
    features: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, float] = field(default_factory=dict)
    note: str = ""


def read_recording(path: str | os.PathLike[str], losses: list[str]) -> tuple[dict[str, Any], Iterator[Recorded]]:
    """(facts of the recording, its frames in their order). Raises DataError for a bag that is no recording.

    Damage is named in `losses` once the frames were read; what came before it is there.
    """
    storage = Storage(path)
    if RECORDING not in storage.topics:
        there = ", ".join(sorted(storage.topics)) or "; ".join(storage.losses) or "no topic"
        evidence = f"{storage.path} has {there}"
        raise DataError("not a flight recording", evidence, "pass a flight_*.mcap; for other bags: igate run --bag")
    about: dict[str, Any] = {}
    for record in storage.read({RECORDING}, []):
        message = deserialise(record.data, record.kind)
        try:
            about = json.loads(message.text if isinstance(message, TextMessage) else "")
            outputs = {topic: (str(source), str(name)) for topic, (source, name) in about["outputs"].items()}
            inputs = {str(topic): str(source) for topic, source in about["inputs"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError("the recording's facts are damaged", f"{path}: {error}", "take another one") from error
        return about, _recorded(storage, inputs, outputs, losses)
    raise DataError("the recording's facts are missing", str(path), "take another one")


def _recorded(
    storage: Storage, inputs: Mapping[str, str], outputs: Mapping[str, tuple[str, str]], losses: list[str]
) -> Iterator[Recorded]:
    """Frames with what follows each in the file, as the recorder wrote it."""
    last: Recorded | None = None
    for record in storage.read({*inputs, *outputs, TIMINGS}, losses):
        if record.topic in inputs and record.kind == IMAGE:
            if last is not None:
                yield last
            last = None
        try:
            message = deserialise(record.data, record.kind)
            if record.topic in inputs and isinstance(message, ImageMessage):
                last = Recorded(to_frame(message, inputs[record.topic]))
            elif last is not None and record.topic in outputs:
                last.outputs[outputs[record.topic][1]] = _values(message)
            elif last is not None and isinstance(message, Diagnostics):
                last.error = "; ".join(status.message for status in message.statuses if status.level)
        except InputError as error:
            losses.append(f"a message of {record.topic} is left out: {error.cause} ({error.evidence})")
    if last is not None:
        yield last


def _values(message: Message) -> np.ndarray:
    if isinstance(message, ScoresMessage):
        return np.array(message.scores, np.float32)
    if isinstance(message, ImageMessage):
        return to_array(message)
    raise DataError("no answer of a task", f"a {type(message).__name__}", "take another recording")


def replay(engine: Engine, bundle: Bundle, path: str | os.PathLike[str]) -> Replay:
    """Run a recording's frames through `engine`, which was opened from `bundle`, and compare.

    The same machine, bundle and precision give the same bits; others must stay within the bundle's own tolerances.
    Raises DataError for no recording, or one of other tasks.
    """
    losses: list[str] = []
    about, frames = read_recording(path, losses)
    found = Replay(about)
    tables = {spec.name: _row(spec, bundle) for spec in engine.tasks}
    seen: set[str] = set()
    look = _look(engine, about)
    for recorded in frames:
        found.frames += 1
        found.kept += bool(recorded.outputs)
        seen |= set(recorded.outputs)
        try:
            outputs, now = _answer(engine, look, recorded.frame).outputs, ""
        except IgateError as error:
            outputs, now = {}, str(error)
        if now or recorded.error:
            found.errors.append((recorded.frame.stamp_ns, recorded.error, now))
        for spec in engine.tasks:
            if spec.name in outputs and spec.name in recorded.outputs:
                pair = outputs[spec.name], recorded.outputs[spec.name]
                _compare(tables[spec.name], spec, *pair, recorded.frame.stamp_ns)
    if not found.frames:
        evidence = "; ".join(losses) or f"{path}: its first message is there, and no image behind it"
        raise DataError("the recording holds no frame", evidence, "take another one: nothing was compared")
    found.losses = losses
    found.tasks = [row for row in tables.values() if row.frames]
    if seen and not found.tasks:
        evidence = f"recorded: {', '.join(sorted(seen))}; the bundle has {', '.join(tables)}"
        raise DataError("the recording is of other tasks", evidence, "pass the bundle that was running")
    unknown = sorted(seen - set(tables))
    found.notes += [f"not in this bundle: {', '.join(unknown)}"] if unknown else []
    return found


def unlike(engine: Engine, bundle: Bundle, path: str | os.PathLike[str], count: int) -> Unlike:
    """Hold a recording of `count` frames against its bundle's statistics and INT8 ranges; at most WINDOW frames of it.

    Runs the float network with every tensor as an output: much slower than the engine.
    """
    from ..runtime.drift_tensors import saturation_of_inputs

    about, frames = read_recording(path, [])
    look, drift = _look(engine, about), Drift(bundle.manifest.get("reference"))
    inputs: list[np.ndarray] = []
    for recorded in itertools.islice(frames, 0, None, max(-(-count // WINDOW), 1)):
        with contextlib.suppress(IgateError):  # `replay` names frames that cannot be answered
            job = _answer(engine, look, recorded.frame)
            assert job.image is not None and job.input is not None
            drift.add(drift.measure(job.image, job.outputs))
            inputs.append(job.input)
    found, score = Unlike(len(inputs)), drift.score()
    if drift.reference is None:
        found.note = "the bundle holds no reference statistics, so a drift score is unknown"
    elif score.status == "unknown":
        found.note = f"{len(inputs)} frame(s) are too few for a drift score"
    else:
        found.score, found.features = score.value, score.parts
    if inputs:
        found.tensors = saturation_of_inputs(bundle, inputs)
    return found


def _look(engine: Engine, about: Mapping[str, Any]) -> Look:
    return Look(engine.preprocess, str(about.get("fit", "stretch")), str(about.get("at", "frame")), None, False, False)


def _answer(engine: Engine, look: Look, frame: Frame) -> Job:
    """As the pipeline answered it, without its threads."""
    job = Job(frame, 0)
    preprocess_stage(job, look)
    assert job.input is not None
    job.raw = engine.infer(job.input)
    post_stage(job, look, engine.tasks)
    return job


def _row(spec: OutputSpec, bundle: Bundle) -> TaskReplay:
    measure, _, ceiling = MEASURES[spec.kind]
    return TaskReplay(spec.name, measure, min(float(bundle.manifest["tolerances"][spec.name]["limit"]), ceiling))


def _compare(row: TaskReplay, spec: OutputSpec, ours: np.ndarray, then: np.ndarray, stamp_ns: int) -> None:
    same_shape = ours.shape == then.shape
    if same_shape and spec.kind == "depth":  # a pipeline's depth range leaves NaN, which says nothing of the engine
        valid = np.isfinite(then)
        ours, then = ours[valid], then[valid]
        if not then.size:
            return
    alike = same_shape and np.array_equal(ours, then)
    value = 0.0 if alike else distance(spec.kind, ours, then) if same_shape else np.inf
    row.frames += 1
    row.identical += int(alike)
    if not value <= row.worst:  # also NaN, which no later frame may take back
        row.worst, row.worst_stamp_ns = (value if np.isfinite(value) else np.inf), stamp_ns
