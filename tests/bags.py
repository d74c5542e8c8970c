"""Bags for tests: written by our writer or by rosbags itself, and read back by a reader that shares no code with it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from igate_edge.robotics.bag import BagWriter
from igate_edge.robotics.messages import CameraInfoMessage, CompressedImageMessage, image_message
from igate_edge.robotics.storage import Storage
from igate_edge.robotics.typestore import typestore
from igate_edge.runtime.frame import Camera

WHY = "NOT TESTED: bags need the extra bag and mcap-ros2-support, pip install 'igate-edge[bag]' mcap-ros2-support"
for _package in ("rosbags", "mcap", "mcap_ros2"):
    pytest.importorskip(_package, reason=WHY)

CAMERA = Camera(24, 16, (20.0, 0.0, 11.5, 0.0, 21.0, 7.5, 0.0, 0.0, 1.0), (0.1, 0.0, 0.0, 0.0, 0.0))
START = 1_700_000_000 * 10**9
#: Storage and compression mode of rosbag2.
PACKED = ("mcap message", "mcap file", "sqlite3 message", "sqlite3 file")
#: numpy type and channels of the encodings that our results have.
_PIXELS = {"mono8": ("u1", 1), "16UC1": ("<u2", 1), "32FC1": ("<f4", 1), "32FC3": ("<f4", 3), "rgb8": ("u1", 3)}


def compressed(pixels: np.ndarray, kind: str = "PNG", text: str = "rgb8; png compressed bgr8") -> dict[str, Any]:
    """Format and data of a compressed image."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return {"format": text, "data": buffer.getvalue()}


def camera_bag(
    path: Path,
    frames: list[np.ndarray],
    stamps: list[int] | None = None,
    topic: str = "/front/image_raw",
    pack: bool = False,
) -> list[int]:
    """A bag of one camera that records each image 2 ms after its stamp, camera_info behind it; gives the stamps."""
    stamps = stamps or [START + 50_000_000 * k for k in range(len(frames))]
    with BagWriter(path, compress=pack) as bag:
        for k, (frame, stamp) in enumerate(zip(frames, stamps, strict=True)):
            log_ns = START + 50_000_000 * k + 2_000_000
            if topic.endswith("/compressed"):
                message: Any = CompressedImageMessage(**compressed(frame), stamp_ns=stamp, frame_id="front_optical")
            else:
                message = image_message(frame, "rgb8", stamp, "front_optical")
            bag.write(topic, message, log_ns)
            info = topic.removesuffix("/compressed").rpartition("/")[0] + "/camera_info"
            bag.write(info, CameraInfoMessage(CAMERA, stamp, "front_optical"), log_ns)
    return stamps


def convert(source: Path, target: Path, storage: str, mode: str = "none") -> Path:
    """The same messages in a folder that rosbags writes: storage mcap or sqlite3, mode none, message or file (zstd)."""
    from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

    writer = Writer(target, version=8, storage_plugin=StoragePlugin[storage.upper()])
    if mode != "none":
        writer.set_compression(CompressionMode[mode.upper()], CompressionFormat.ZSTD)
    with writer:
        there: dict[str, Any] = {}
        for topic, kind, log_ns, data in Storage(source).read(None, []):
            there[topic] = there.get(topic) or writer.add_connection(topic, kind, typestore=typestore())
            writer.write(there[topic], log_ns, data)
    return target


def decoded(path: Path) -> list[tuple[str, int, Any]]:
    """(topic, log time, message) of an mcap file, decoded by mcap-ros2-support from the definitions in the file."""
    from mcap.reader import make_reader
    from mcap_ros2.decoder import DecoderFactory

    with path.open("rb") as file:
        reader = make_reader(file, decoder_factories=[DecoderFactory()])
        assert reader.get_header().profile == "ros2"
        return [
            (channel.topic, message.log_time, content)
            for _, channel, message, content in reader.iter_decoded_messages()
        ]


def pixels(message: Any) -> np.ndarray:
    """The array of a decoded sensor_msgs/Image without row padding."""
    kind, channels = _PIXELS[message.encoding]
    array = np.frombuffer(bytes(message.data), kind)
    assert message.step == message.width * channels * array.itemsize
    return array.reshape((message.height, message.width) + ((channels,) if channels > 1 else ()))


def stamp(message: Any) -> int:
    """The header's stamp in nanoseconds."""
    return message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
