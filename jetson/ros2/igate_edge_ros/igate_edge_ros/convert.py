"""ROS messages <-> the plain ones of igate_edge.robotics.messages."""

from __future__ import annotations

import array
import io
import json
import time
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header, String

from igate_edge.frames import pillow
from igate_edge.robotics import messages
from igate_edge.runtime.frame import Camera, Frame

try:  # not everywhere: the same as JSON in a std_msgs/String then
    from vision_msgs.msg import Classification, LabelInfo, ObjectHypothesis, VisionClass
except ImportError:
    Classification = LabelInfo = ObjectHypothesis = VisionClass = None

#: Bytes of a pixel in the encodings that need no conversion to be looked at.
CHANNELS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1}
#: Of the overlay as JPEG, 1 to 95.
JPEG_QUALITY = 80
#: ROS type of each plain message that a node publishes for a task.
LABELS = LabelInfo or String
SCORES = Classification or String


def nanoseconds(stamp: Time) -> int:
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def header(stamp_ns: int, frame_id: str) -> Header:
    return Header(stamp=Time(sec=stamp_ns // 1_000_000_000, nanosec=stamp_ns % 1_000_000_000), frame_id=frame_id)


def to_frame(message: Image, source: str, camera: Camera | None, now_ns: int) -> Frame:
    """The image as a frame with its age; raises InputError where it is malformed.

    Shares the message's memory where that can be: rclpy makes a message of its own for every callback.
    """
    channels, size = CHANNELS.get(message.encoding, 0), message.height * message.step
    if not channels or not size or message.step != message.width * channels or len(message.data) != size:
        return messages.to_frame(from_image(message), source, camera, now_ns)
    shape = (message.height, message.width, channels) if channels > 1 else (message.height, message.width)
    pixels, stamp_ns = np.frombuffer(message.data, np.uint8).reshape(shape), nanoseconds(message.header.stamp)
    age_ms = (now_ns - stamp_ns) / 1e6 if stamp_ns else float("nan")
    received_ns, frame_id = time.monotonic_ns(), message.header.frame_id
    return Frame(pixels, message.encoding, stamp_ns, frame_id, source, camera, received_ns, age_ms)


def from_image(message: Image) -> messages.ImageMessage:
    """Shares the message's memory."""
    return messages.ImageMessage(
        message.height,
        message.width,
        message.encoding,
        message.step,
        message.data,
        bool(message.is_bigendian),
        nanoseconds(message.header.stamp),
        message.header.frame_id,
    )


def from_compressed(message: CompressedImage) -> messages.CompressedImageMessage:
    """Shares the message's memory."""
    stamp_ns = nanoseconds(message.header.stamp)
    return messages.CompressedImageMessage(message.format, message.data, stamp_ns, message.header.frame_id)


def to_camera(info: CameraInfo) -> Camera | None:
    """None for a camera that was not calibrated: its matrix is zero."""
    if not any(info.k):
        return None
    return Camera(
        info.width,
        info.height,
        tuple(map(float, info.k)),
        tuple(map(float, info.d)),
        info.distortion_model,
        tuple(map(float, info.r)),
        tuple(map(float, info.p)),
    )


class ImageSlot:
    """One Image that is filled again for every frame: setting new data each time costs a copy and an allocation."""

    def __init__(self) -> None:
        self._message = Image()

    def fill(self, plain: messages.ImageMessage) -> Image:
        """The same Image every time: publish it before the next call."""
        message, data = self._message, memoryview(plain.data).cast("B")
        if len(message.data) != len(data):
            message.data = array.array("B", bytes(len(data)))
        memoryview(message.data)[:] = data
        # In place: three new Python objects a message are a tenth of what publishing costs.
        stamp = message.header.stamp
        stamp.sec, stamp.nanosec = divmod(plain.stamp_ns, 1_000_000_000)
        message.header.frame_id = plain.frame_id
        message.height, message.width, message.step = plain.height, plain.width, plain.step
        message.encoding, message.is_bigendian = plain.encoding, int(plain.is_bigendian)
        return message


def to_jpeg(plain: messages.ImageMessage) -> CompressedImage:
    """An rgb8 image without row padding as JPEG, in the words of image_transport; raises UnavailableError."""
    file, size = io.BytesIO(), (plain.width, plain.height)
    pillow().Image.frombuffer("RGB", size, memoryview(plain.data)).save(file, "jpeg", quality=JPEG_QUALITY)
    message = CompressedImage(header=header(plain.stamp_ns, plain.frame_id), format="rgb8; jpeg compressed bgr8")
    message.data = array.array("B", file.getvalue())
    return message


def to_info(plain: messages.CameraInfoMessage) -> CameraInfo:
    camera = plain.camera
    info = CameraInfo(header=header(plain.stamp_ns, plain.frame_id), width=camera.width, height=camera.height)
    info.distortion_model, info.d, info.k, info.r = camera.model, list(camera.d), list(camera.k), list(camera.r)
    if camera.p:
        info.p = list(camera.p)
    return info


def to_labels(plain: messages.LabelInfoMessage) -> Any:
    """vision_msgs/LabelInfo, or its JSON in a std_msgs/String."""
    if LabelInfo is None:
        return String(data=json.dumps(plain.as_json()))
    classes = [VisionClass(class_id=index, class_name=name) for index, name in enumerate(plain.classes)]
    return LabelInfo(header=header(plain.stamp_ns, plain.frame_id), class_map=classes, threshold=plain.threshold)


def to_scores(plain: messages.ScoresMessage) -> Any:
    """vision_msgs/Classification, or its JSON in a std_msgs/String."""
    if Classification is None:
        return String(data=json.dumps(plain.as_json()))
    pairs = zip(plain.labels, plain.scores, strict=True)
    results = [ObjectHypothesis(class_id=label, score=score) for label, score in pairs]
    return Classification(header=header(plain.stamp_ns, plain.frame_id), results=results)


def to_diagnostics(plain: messages.Diagnostics) -> DiagnosticArray:
    statuses = [
        DiagnosticStatus(
            level=bytes([status.level]),
            name=status.name,
            message=status.message,
            hardware_id=status.hardware_id,
            values=[KeyValue(key=key, value=value) for key, value in status.values.items()],
        )
        for status in plain.statuses
    ]
    return DiagnosticArray(header=header(plain.stamp_ns, plain.frame_id), status=statuses)
