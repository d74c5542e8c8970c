"""The topics a node answers on: one per task, labels, intrinsics and a picture, each only while somebody listens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from igate_edge.contract import OutputSpec
from igate_edge.errors import UnavailableError
from igate_edge.frames import pillow
from igate_edge.robotics import messages
from igate_edge.runtime.frame import Result

from . import convert, qos
from .parameters import Settings

OVERLAY, COMPRESSED, CAMERA = "overlay", "overlay/compressed", "camera_info"


class Outputs:
    """Publishers of one node. `publish` is for one thread; everything else may be called from any.

    draw: what ~/overlay shows of a result, uint8 RGB [H,W,3]; ~/overlay/compressed is offered where Pillow is
    installed. `overlay` and `depth_encoding` may be set at any time.
    """

    def __init__(
        self,
        node: Any,
        specs: Sequence[OutputSpec],
        settings: Settings,
        report: qos.Report,
        draw: Callable[[Result], np.ndarray],
    ) -> None:
        self.overlay, self.depth_encoding = settings.publish_overlay, settings.depth_encoding
        self._node, self._specs, self._draw = node, tuple(specs), draw
        self._drawn = _drawn(self._specs)
        self._topics = messages.topics_of(specs)
        kinds = {self._topics[spec.name]: Image if spec.dense else convert.SCORES for spec in specs}
        kinds |= {CAMERA: CameraInfo, OVERLAY: Image}
        try:
            pillow()
            kinds[COMPRESSED] = CompressedImage
        except UnavailableError as error:
            node.get_logger().info(f"no ~/{COMPRESSED}: {error}", once=True)
        self._slots = {topic: convert.ImageSlot() for topic, kind in kinds.items() if kind is Image}
        self._heard: frozenset[str] = frozenset()
        self._publishers: dict[str, Any] = {}
        self._labels: dict[str, Any] = {}
        try:
            for topic, kind in kinds.items():
                profile = qos.sensor(depth=5, fps=settings.fps)
                self._publishers[topic] = qos.publisher(node, kind, f"~/{topic}", profile, report)
            for topic, _ in messages.label_infos(specs):
                self._labels[topic] = qos.publisher(node, convert.LABELS, f"~/{topic}", qos.latched(), report)
        except BaseException:
            self.close()
            raise

    def latch(self) -> None:
        """Publish what the numbers in label images mean, for those who listen now and those who come later."""
        for topic, message in messages.label_infos(self._specs):
            if isinstance(message, messages.LabelInfoMessage):
                self._labels[topic].publish(convert.to_labels(message))

    def wanted(self) -> tuple[OutputSpec, ...] | None:
        """The tasks that somebody listens to, and the one that the overlay shows; None when nobody needs an answer."""
        heard = {topic for topic, publisher in self._publishers.items() if publisher.get_subscription_count()}
        if not self.overlay:
            heard -= {OVERLAY, COMPRESSED}
        self._heard = frozenset(heard)
        if not heard:
            return None
        drawn = self._drawn if heard & {OVERLAY, COMPRESSED} else None
        return tuple(spec for spec in self._specs if spec == drawn or self._topics[spec.name] in heard)

    def unheard(self, topic: str) -> bool:
        """True for the full name of a topic of ours that nobody listens to."""
        ours = [p for name, p in self._publishers.items() if self._node.resolve_topic_name(f"~/{name}") == topic]
        return bool(ours) and not ours[0].get_subscription_count()

    def publish(self, result: Result) -> None:
        """What somebody listened to of `result` when `wanted` looked last, with its stamp and frame id."""
        heard = self._heard
        answers = {task: value for task, value in result.outputs.items() if self._topics[task] in heard}
        told = dataclasses.replace(result, outputs=answers, camera=result.camera if CAMERA in heard else None)
        for topic, message in messages.from_result(told, self._specs, self.depth_encoding):
            self._send(topic, message)
        if heard & {OVERLAY, COMPRESSED}:
            picture = messages.image_message(self._draw(result), "rgb8", result.stamp_ns, result.frame_id)
            for topic in (OVERLAY, COMPRESSED):
                if topic in heard:
                    self._send(topic, picture)

    def close(self) -> None:
        """Take the topics down."""
        for publisher in (*self._publishers.values(), *self._labels.values()):
            self._node.destroy_lifecycle_publisher(publisher)
        self._publishers, self._labels = {}, {}

    def _send(self, topic: str, message: messages.Message) -> None:
        publisher = self._publishers.get(topic)
        if publisher is None:  # taken down meanwhile
            return
        if isinstance(message, messages.ImageMessage):
            slot = self._slots.get(topic)
            publisher.publish(convert.to_jpeg(message) if slot is None else slot.fill(message))
        elif isinstance(message, messages.CameraInfoMessage):
            publisher.publish(convert.to_info(message))
        elif isinstance(message, messages.ScoresMessage):
            publisher.publish(convert.to_scores(message))


def _drawn(specs: Sequence[OutputSpec]) -> OutputSpec | None:
    """The task that `runtime.overlay.overlay` shows."""
    found = [spec for kind in ("semseg", "depth", "edges", "normals") for spec in specs if spec.kind == kind]
    return found[0] if found else None
