"""The neutral messages as types of the package rosbags: serialised for a bag and read back from one."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ..errors import DataError, IgateError, InputError, UnavailableError
from ..runtime.frame import Camera
from . import messages as neutral

FIX = "pip install 'igate-edge[bag]'"
#: Types that ROS's own distributions lack: they come with vision_msgs, here as it defines them.
VISION = {
    "vision_msgs/msg/VisionClass": "uint16 class_id\nstring class_name\n",
    "vision_msgs/msg/LabelInfo": ("std_msgs/Header header\nvision_msgs/VisionClass[] class_map\nfloat32 threshold\n"),
    "vision_msgs/msg/ObjectHypothesis": "string class_id\nfloat64 score\n",
    "vision_msgs/msg/Classification": "std_msgs/Header header\nvision_msgs/ObjectHypothesis[] results\n",
}
IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"
#: ROS type of each neutral message.
TYPES: dict[type, str] = {
    neutral.ImageMessage: IMAGE,
    neutral.CompressedImageMessage: COMPRESSED,
    neutral.CameraInfoMessage: CAMERA_INFO,
    neutral.LabelInfoMessage: "vision_msgs/msg/LabelInfo",
    neutral.ScoresMessage: "vision_msgs/msg/Classification",
    neutral.TextMessage: "std_msgs/msg/String",
    neutral.Diagnostics: "diagnostic_msgs/msg/DiagnosticArray",
}


def require_bag() -> None:
    """Raise UnavailableError with the command that helps, unless bags can be read and written here."""
    try:
        import mcap
        import rosbags
    except ImportError as error:
        raise UnavailableError("bags need the packages rosbags and mcap", str(error), FIX) from error
    del mcap, rosbags


@functools.cache
def typestore() -> Any:
    """rosbags' types of ROS 2 Humble, which later distributions read too, with those of vision_msgs."""
    require_bag()
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    store = get_typestore(Stores.ROS2_HUMBLE)
    for name, text in VISION.items():
        store.register(get_types_from_msg(text, name))
    return store


def serialise(message: neutral.Message) -> bytes:
    """The message in CDR, as it stands in a bag; raises InputError for what ROS cannot hold."""
    kind = TYPES.get(type(message))
    if kind is None:
        raise InputError("no message that a bag can hold", f"got {message!r:.60}", "pass one of robotics.messages")
    try:
        return bytes(typestore().serialize_cdr(_to_ros(message), kind))
    except IgateError:
        raise
    except Exception as error:  # a number too large for its field, text that is no Unicode, no buffer for data
        evidence = f"{type(error).__name__}: {error}"[:200]
        raise InputError(f"a {kind} that ROS cannot hold", evidence, "look at the fields of the message") from error


def deserialise(data: bytes, kind: str) -> neutral.Message:
    """A message of a bag: images, camera info, scores or text. Raises DataError for damaged data or another type."""
    try:
        return _from_ros(typestore().deserialize_cdr(data, kind), kind)
    except Exception as error:  # whatever a decoder meets in damaged bytes
        evidence = f"{len(data) if isinstance(data, bytes) else 'no'} bytes: {type(error).__name__} {error}"
        raise DataError(f"cannot decode a message of type {kind}", evidence, "record the topic again") from error


def _type(name: str) -> Any:
    return typestore().types[name]


def _header(stamp_ns: int, frame_id: str) -> Any:
    seconds, rest = divmod(int(stamp_ns), 10**9)
    if not -(2**31) <= seconds < 2**31:
        evidence = f"{stamp_ns} ns; ROS counts seconds in 32 bits"
        raise InputError("a stamp that ROS cannot hold", evidence, "use nanoseconds since 1970")
    time = _type("builtin_interfaces/msg/Time")(seconds, rest)
    return _type("std_msgs/msg/Header")(stamp=time, frame_id=frame_id)


def _to_ros(message: neutral.Message) -> Any:
    if isinstance(message, neutral.TextMessage):
        return _type("std_msgs/msg/String")(data=message.text)
    header, kind = _header(message.stamp_ns, message.frame_id), _type(TYPES[type(message)])
    if isinstance(message, neutral.ImageMessage):
        big, data = int(message.is_bigendian), np.frombuffer(message.data, np.uint8)
        return kind(header, message.height, message.width, message.encoding, big, message.step, data)
    if isinstance(message, neutral.CompressedImageMessage):
        return kind(header, message.format, np.frombuffer(message.data, np.uint8))
    if isinstance(message, neutral.CameraInfoMessage):
        return _camera_info(header, message.camera)
    if isinstance(message, neutral.LabelInfoMessage):
        entry = _type("vision_msgs/msg/VisionClass")
        return kind(header, [entry(index, name) for index, name in enumerate(message.classes)], message.threshold)
    if isinstance(message, neutral.ScoresMessage):
        entry = _type("vision_msgs/msg/ObjectHypothesis")
        return kind(header, [entry(*pair) for pair in zip(message.labels, message.scores, strict=True)])
    return kind(header, [_status(status) for status in message.statuses])


def _status(status: neutral.Status) -> Any:
    pair = _type("diagnostic_msgs/msg/KeyValue")
    values = [pair(key, value) for key, value in status.values.items()]
    kind = _type("diagnostic_msgs/msg/DiagnosticStatus")
    return kind(status.level, status.name, status.message, status.hardware_id, values)


def _camera_info(header: Any, camera: Camera) -> Any:
    k = camera.k or (0.0,) * 9
    numbers = {"d": np.array(camera.d, np.float64), "k": np.array(k, np.float64), "r": np.array(camera.r, np.float64)}
    fx, skew, cx, _, fy, cy = k[:6]
    p = np.array(camera.p or (fx, skew, cx, 0, 0, fy, cy, 0, 0, 0, 1, 0), np.float64)
    whole = _type("sensor_msgs/msg/RegionOfInterest")(0, 0, 0, 0, False)
    size = {"height": camera.height, "width": camera.width, "distortion_model": camera.model}
    return _type(CAMERA_INFO)(header=header, **size, **numbers, p=p, binning_x=0, binning_y=0, roi=whole)


def _from_ros(found: Any, kind: str) -> neutral.Message:
    if kind == TYPES[neutral.TextMessage]:
        return neutral.TextMessage(found.data)
    stamp = found.header.stamp
    if stamp.nanosec >= 10**9:
        raise ValueError(f"a stamp of {stamp.nanosec} nanoseconds beside its seconds")
    header = stamp.sec * 10**9 + stamp.nanosec, found.header.frame_id
    if kind == IMAGE:
        size = found.height, found.width, found.encoding, found.step
        return neutral.ImageMessage(*size, found.data, bool(found.is_bigendian), *header)
    if kind == COMPRESSED:
        return neutral.CompressedImageMessage(found.format, found.data, *header)
    if kind == CAMERA_INFO:
        d, k, r, p = (tuple(map(float, values)) for values in (found.d, found.k, found.r, found.p))
        return neutral.CameraInfoMessage(Camera(found.width, found.height, k, d, found.distortion_model, r, p), *header)
    if kind == TYPES[neutral.ScoresMessage]:
        labels, scores = (tuple(getattr(one, name) for one in found.results) for name in ("class_id", "score"))
        return neutral.ScoresMessage(labels, scores, *header)
    if kind == TYPES[neutral.LabelInfoMessage]:
        return neutral.LabelInfoMessage(tuple(one.class_name for one in found.class_map), found.threshold, *header)
    if kind == TYPES[neutral.Diagnostics]:
        statuses = tuple(
            neutral.Status(int(one.level), one.name, one.message, {v.key: v.value for v in one.values}, one.hardware_id)
            for one in found.status
        )
        return neutral.Diagnostics(statuses, *header)
    raise KeyError(f"{kind} is not read here")
