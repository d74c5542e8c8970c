"""ROS messages as plain dataclasses, made from results and turned into frames; adapters give them rclpy's or a bag's
types. Conventions: REP 118 (depth), vision_msgs (labels), optical frame x right, y down, z forward."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from ..contract import OutputSpec
from ..errors import InputError
from ..runtime.encodings import ENCODINGS, MAX_PIXELS
from ..runtime.frame import Camera, Frame, Result

#: Topic of a task that is the only one of its kind.
TOPICS = {"semseg": "segmentation", "depth": "depth", "normals": "normals", "edges": "edges"}
_CV = re.compile("(8U|8S|16U|16S|32S|32F|64F)C([1-4])")
_CV_TYPES = {"8U": "u1", "8S": "i1", "16U": "u2", "16S": "i2", "32S": "i4", "32F": "f4", "64F": "f8"}


@dataclass(frozen=True)
class ImageMessage:
    """sensor_msgs/Image. data: height * step bytes (flat uint8 array, bytes or memoryview); stamp_ns: the header's."""

    height: int
    width: int
    encoding: str
    step: int
    data: Any
    is_bigendian: bool = False
    stamp_ns: int = 0
    frame_id: str = ""


@dataclass(frozen=True)
class CompressedImageMessage:
    """sensor_msgs/CompressedImage. format: as the camera wrote it ("jpeg", "bgr8; png compressed bgr8", ...)."""

    format: str
    data: Any
    stamp_ns: int = 0
    frame_id: str = ""


@dataclass(frozen=True)
class CameraInfoMessage:
    """sensor_msgs/CameraInfo."""

    camera: Camera
    stamp_ns: int = 0
    frame_id: str = ""


@dataclass(frozen=True)
class LabelInfoMessage:
    """vision_msgs/LabelInfo: names of the numbers in a label image; published once, latched (transient local)."""

    classes: tuple[str, ...]
    threshold: float = 0.0
    stamp_ns: int = 0
    frame_id: str = ""

    def as_json(self) -> dict[str, Any]:
        """The same for a std_msgs/String where vision_msgs is not installed."""
        class_map = [{"class_id": index, "class_name": name} for index, name in enumerate(self.classes)]
        return {"class_map": class_map, "threshold": self.threshold}


@dataclass(frozen=True)
class ScoresMessage:
    """vision_msgs/Classification: one probability per label of a task that judges the whole frame."""

    labels: tuple[str, ...]
    scores: tuple[float, ...]
    stamp_ns: int = 0
    frame_id: str = ""

    def as_json(self) -> dict[str, Any]:
        """The same for a std_msgs/String where vision_msgs is not installed."""
        scores = dict(zip(self.labels, self.scores, strict=True))
        return {"stamp_ns": self.stamp_ns, "frame_id": self.frame_id, "scores": scores}


@dataclass(frozen=True)
class TextMessage:
    """std_msgs/String."""

    text: str


@dataclass(frozen=True)
class Status:
    """diagnostic_msgs/DiagnosticStatus. level: 0 OK, 1 WARN, 2 ERROR, 3 STALE."""

    level: int
    name: str
    message: str = ""
    values: dict[str, str] = field(default_factory=dict)
    hardware_id: str = "igate_edge"


@dataclass(frozen=True)
class Diagnostics:
    """diagnostic_msgs/DiagnosticArray."""

    statuses: tuple[Status, ...]
    stamp_ns: int = 0
    frame_id: str = ""


Message: TypeAlias = (
    ImageMessage
    | CompressedImageMessage
    | CameraInfoMessage
    | LabelInfoMessage
    | ScoresMessage
    | TextMessage
    | Diagnostics
)


def topics_of(specs: Sequence[OutputSpec]) -> dict[str, str]:
    """Task name -> topic below the node's own name, valid in ROS and never twice.

    >>> topics_of([OutputSpec("rooms", "semseg", 2), OutputSpec("z", "depth", 1)])
    {'rooms': 'segmentation', 'z': 'depth'}
    >>> topics_of([OutputSpec("rooms", "semseg", 2), OutputSpec("lane 1", "semseg", 2)])
    {'rooms': 'segmentation/rooms', 'lane 1': 'segmentation/lane_1'}
    """
    kinds = [spec.kind for spec in specs]
    topics: dict[str, str] = {}
    for spec in specs:
        base = TOPICS.get(spec.kind, spec.kind)
        topic = base if kinds.count(spec.kind) == 1 else f"{base}/{token(spec.name)}"
        while topic in topics.values():
            topic += "_"
        topics[spec.name] = topic
    return topics


def label_infos(specs: Sequence[OutputSpec], stamp_ns: int = 0, frame_id: str = "") -> list[tuple[str, Message]]:
    """(topic, LabelInfoMessage) of every task whose image holds class numbers; unnamed classes get their number.

    >>> label_infos([OutputSpec("s", "semseg", 2, ("floor", "wall"))])[0][1].as_json()["class_map"][1]
    {'class_id': 1, 'class_name': 'wall'}
    """
    tasks = [spec for spec in specs if spec.kind == "semseg"]
    topics = {
        spec.name: "label_info" if len(tasks) == 1 else topic.replace("segmentation", "label_info", 1)
        for spec, topic in zip(tasks, topics_of(tasks).values(), strict=True)
    }
    return [(topics[spec.name], LabelInfoMessage(_names(spec), 0.0, stamp_ns, frame_id)) for spec in tasks]


def from_result(
    result: Result, specs: Sequence[OutputSpec], depth_encoding: str = "32FC1"
) -> list[tuple[str, Message]]:
    """(topic below the node's name, message) of every task in `result`, with the frame's own stamp and frame id.

    semseg mono8 (mono16 where the array is uint16); depth 32FC1 metres with NaN = invalid, or 16UC1 millimetres with
    0 = invalid; normals 32FC3 unit vectors; edges 32FC1 probability; others ScoresMessage; `camera_info` where the
    result has one. Images may share memory with the result. Raises InputError for another depth encoding.
    """
    if depth_encoding not in ("32FC1", "16UC1"):
        evidence = f"got {depth_encoding!r:.40}"
        raise InputError("depth has no such encoding", evidence, "use 32FC1 (metres) or 16UC1 (millimetres)")
    header = (result.stamp_ns, result.frame_id)
    messages: list[tuple[str, Message]] = []
    for name, topic in topics_of(specs).items():
        if name in result.outputs:
            spec = next(spec for spec in specs if spec.name == name)
            messages.append((topic, _answer(spec, result.outputs[name], depth_encoding, header)))
    if result.camera is not None:
        messages.append(("camera_info", CameraInfoMessage(result.camera, *header)))
    return messages


def _answer(spec: OutputSpec, values: np.ndarray, depth_encoding: str, header: tuple[int, str]) -> Message:
    if not spec.dense:
        return ScoresMessage(_names(spec), tuple(map(float, values)), *header)
    if spec.kind == "semseg":
        return image_message(values, "mono8" if values.dtype == np.uint8 else "mono16", *header)
    if spec.kind == "depth":
        return image_message(encode_depth(values, depth_encoding), depth_encoding, *header)
    return image_message(values.astype(np.float32, copy=False), "32FC3" if values.ndim == 3 else "32FC1", *header)


def encode_depth(metres: np.ndarray, encoding: str) -> np.ndarray:
    """float [H,W] metres -> float32 with NaN, or uint16 millimetres with 0, where depth is invalid (REP 118).

    Invalid: not finite, not above 0, or in millimetres beyond 65.535 m.

    >>> encode_depth(np.array([[0.0, 1.2345, 70.0]]), "16UC1").tolist()
    [[0, 1234, 0]]
    """
    valid = np.isfinite(metres) & (metres > 0)
    if encoding == "32FC1":
        return np.where(valid, metres, np.nan).astype(np.float32, copy=False)
    millimetres = np.rint(np.where(valid, metres, 0) * 1000.0)
    return np.where(millimetres <= 65535, millimetres, 0).astype(np.uint16)


def image_message(array: np.ndarray, encoding: str, stamp_ns: int = 0, frame_id: str = "") -> ImageMessage:
    """An array [H,W] or [H,W,C] as a message without row padding, in this machine's byte order; shares its memory.

    >>> image_message(np.zeros((2, 3), np.float32), "32FC1").step
    12
    """
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    height, width = array.shape[:2]
    if _planar(encoding):
        height = height * 2 // 3
    data = array.reshape(-1).view(np.uint8)
    step = array.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
    return ImageMessage(height, width, encoding, step, data, sys.byteorder == "big", stamp_ns, frame_id)


def pixel_type(encoding: str) -> tuple[np.dtype, int] | None:
    """Type and number of the values of a pixel, None for an encoding that is not known here."""
    if not isinstance(encoding, str):
        return None
    if encoding in ENCODINGS:
        kind, channels = ENCODINGS[encoding]
        return kind, max(channels, 1)
    match = _CV.fullmatch(encoding)
    return (np.dtype(_CV_TYPES[match[1]]), int(match[2])) if match else None


def _planar(encoding: str) -> bool:
    """True where luma rows are followed by half as many of chroma."""
    return encoding in ENCODINGS and ENCODINGS[encoding][1] == 0


def to_array(message: ImageMessage) -> np.ndarray:
    """The pixels as an array of their own, [H,W] or [H,W,C] in this machine's byte order; row padding is left out.

    nv12, nv21: uint8 [3/2 H,W]; yuv422: uint8 [H,W,2]. Raises InputError when size, step and data do not agree.

    >>> padded = ImageMessage(2, 2, "mono8", 3, bytes([1, 2, 99, 3, 4, 99]))
    >>> to_array(padded).tolist()
    [[1, 2], [3, 4]]
    """
    height, width, step = message.height, message.width, message.step
    if not all(isinstance(value, int | np.integer) for value in (height, width, step)):
        raise _bad(message, f"{width!r:.20}x{height!r:.20}, step {step!r:.20}", "give whole numbers")
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise _bad(message, f"{width}x{height} pixels", f"send 1 to {MAX_PIXELS:,} pixels")
    found = pixel_type(message.encoding)
    if found is None:
        raise _bad(message, f"unknown encoding {message.encoding!r:.40}", "convert it to rgb8 or bgr8")
    kind, channels = found
    rows = height + height // 2 if _planar(message.encoding) else height
    try:
        used, data = width * channels * kind.itemsize, np.frombuffer(message.data, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise _bad(message, f"data: {error}", "pass bytes or a flat uint8 array") from error
    if step < used:
        raise _bad(message, f"step {step}, a row has {used} bytes", "set step to the bytes from row to row")
    if len(data) < rows * step:
        raise _bad(message, f"{len(data)} bytes, {rows} rows of step {step}", "the message was cut: look at its source")
    pixels = np.ascontiguousarray(data[: rows * step].reshape(rows, step)[:, :used])
    values = pixels.view(kind.newbyteorder(">" if message.is_bigendian else "<")).astype(kind, copy=False)
    values = values.reshape((rows, width, channels) if channels > 1 else (rows, width))
    return values.copy() if np.may_share_memory(values, data) else values


def to_frame(
    message: ImageMessage | CompressedImageMessage,
    source: str = "",
    camera: Camera | None = None,
    log_ns: int | None = None,
) -> Frame:
    """A frame that owns its pixels, with the message's stamp, frame id and encoding.

    A compressed image becomes rgb8 (or mono8 where it is grey). log_ns: when it was recorded, of the stamp's clock;
    gives the frame its age. Raises InputError for a message that is malformed (see to_array) or cannot be decoded.
    """
    if isinstance(message, CompressedImageMessage):
        from .compressed import decode_compressed

        pixels, encoding = decode_compressed(message)
    else:
        pixels, encoding = to_array(message), message.encoding
    age_ms = float("nan") if log_ns is None or not message.stamp_ns else (log_ns - message.stamp_ns) / 1e6
    header = message.stamp_ns, message.frame_id
    return Frame(pixels, encoding, *header, source, camera, time.monotonic_ns(), age_ms)


def _bad(message: ImageMessage, evidence: str, fix: str) -> InputError:
    return InputError(f"malformed image message (stamp {message.stamp_ns})", evidence, fix)


def _names(spec: OutputSpec) -> tuple[str, ...]:
    return spec.classes or tuple(str(index) for index in range(spec.channels))


def token(name: str) -> str:
    """A task's name as one part of a ROS topic: letters, digits and underscores, no digit first."""
    token = re.sub("[^A-Za-z0-9_]", "_", name)
    return f"_{token}" if token[0].isdigit() else token
