"""Bag in, bag out: every image of every camera answered by the engine, without ROS and without real time."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ..errors import CheckFailed, DataError, InputError
from ..runtime.encodings import to_rgb
from ..runtime.engine import Engine
from ..runtime.frame import Result
from .bag import BagSource, BagWriter, result_prefixes
from .messages import Diagnostics, Status, from_result, label_infos


@dataclass
class BagRun:
    """What became of a bag: frames answered by image topic, milliseconds of each, and those that were not, by reason.

    losses: what the bag's damage cost. refused: unusable images. failed: images for which the engine had no answer.
    """

    frames: Counter[str] = field(default_factory=Counter)
    ms: list[float] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    topics: dict[str, str] = field(default_factory=dict)

    def reasons(self) -> str:
        """Why frames have no answer; empty when all have one."""
        return "; ".join([*self.losses, *(f"{n} of {reason}" for reason, n in (self.refused + self.failed).items())])

    def as_json(self) -> dict[str, Any]:
        ordered = sorted(self.ms)
        return {
            "frames": sum(self.frames.values()),
            "frames_by_topic": dict(self.frames),
            "ms_per_frame": sum(ordered) / len(ordered) if ordered else None,
            "ms_p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))] if ordered else None,
            "losses": self.losses,
            "refused": dict(self.refused),
            "failed": dict(self.failed),
            "notes": self.notes,
            "results": self.topics,
        }


def answer_bag(
    engine: Engine,
    source: BagSource,
    writer: BagWriter,
    *,
    limit: int | None = None,
    depth_encoding: str = "32FC1",
) -> BagRun:
    """Write each frame's answers beside its camera's topic, with the frame's stamp, frame id and time of recording.

    Label names come once a camera, latched; the last message on /diagnostics says what was lost. A frame that cannot
    be used is counted by its reason and left out. Raises DataError when not one frame could be answered.
    """
    if limit is not None and limit < 1:
        raise InputError("not a number of frames", f"limit {limit!r:.40}", "give a whole number from 1, or None")
    run = BagRun(topics=result_prefixes(source.topics))
    wrong_camera: Counter[str] = Counter()
    log_ns = 0
    for log_ns, frame in islice(source.timed(), limit if limit is None else min(limit, sys.maxsize)):
        prefix, header = run.topics[frame.source], (frame.stamp_ns, frame.frame_id)
        start = time.perf_counter()
        try:
            image = to_rgb(frame)
            outputs = engine(image)
        except InputError as error:  # of an encoding, or a shape, that nobody can answer
            run.refused[f"{frame.source}: {error.cause}"] += 1
            continue
        except CheckFailed as error:
            run.failed[f"{frame.source}: {error.cause}"] += 1
            continue
        run.ms.append(1000 * (time.perf_counter() - start))
        camera = frame.camera
        if camera is not None and (camera.height, camera.width) != image.shape[:2]:
            wrong_camera[frame.source] += 1
            camera = None
        if not run.frames[frame.source]:
            for suffix, message in label_infos(engine.tasks, *header):
                writer.write(f"{prefix}/{suffix}", message, log_ns)
        sequence = sum(run.frames.values())
        result = Result(*header, frame.source, sequence, image, outputs, camera, {"infer": run.ms[-1]})
        for suffix, message in from_result(result, engine.tasks, depth_encoding):
            writer.write(f"{prefix}/{suffix}", message, log_ns)
        run.frames[frame.source] += 1
    run.losses, run.notes = list(source.losses), list(source.notes)
    run.refused.update(source.refused)
    run.notes += [f"{n} camera_info of {topic} left out: of another size" for topic, n in wrong_camera.items()]
    if not run.ms:
        raise DataError("no frame of the bag could be used", run.reasons() or str(source.path), "choose --topic")
    writer.write("/diagnostics", _diagnostics(run, engine, log_ns), log_ns)
    return run


def _diagnostics(run: BagRun, engine: Engine, stamp_ns: int) -> Diagnostics:
    facts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in run.as_json().items()}
    facts |= {"precision": engine.report.precision, "backend": engine.report.backend}
    bad = run.reasons()
    return Diagnostics((Status(int(bool(bad)), "igate: bag", bad or "every frame was answered", facts),), stamp_ns)
