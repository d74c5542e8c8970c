"""A small ROS world for tests: a camera, listeners and an executor that spins on a thread of its own. Needs rclpy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from igate_edge_ros.executor import CameraExecutor
from igate_edge_ros.node import IgateNode
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image

from igate_edge.contract import OutputSpec, Preprocess

BEST_EFFORT = QoSProfile(depth=50, reliability=ReliabilityPolicy.BEST_EFFORT)
RELIABLE = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
#: Long enough for a busy machine; nothing waits for it in full unless something is broken.
PATIENCE_S = 20.0


class BrightnessEngine:
    """Answers what a reader can redo: class 1 where red is above half, depth = 1 m + mean of the image, normals -z."""

    tasks = (
        OutputSpec("rooms", "semseg", 2, ("dark", "bright")),
        OutputSpec("range", "depth", 1),
        OutputSpec("facing", "normals", 3),
    )
    preprocess = Preprocess(12, 16)

    def __init__(self, seconds: float = 0.0) -> None:
        self.calls, self.closed, self.error = 0, False, ""
        self.seconds = seconds
        #: While it is clear, the engine hangs.
        self.go = threading.Event()
        self.go.set()

    def infer(self, image: np.ndarray) -> dict[str, np.ndarray]:
        self.calls += 1
        if self.error:
            raise RuntimeError(self.error)
        self.go.wait()
        if self.seconds:
            time.sleep(self.seconds)
        red = image[0, 0]
        logits = np.stack([0.5 - red, red - 0.5])[None]
        depth = np.log(1 + image.mean(keepdims=True)) * np.ones((1, 1, 12, 16), np.float32)
        normals = np.zeros((1, 3, 12, 16), np.float32)
        normals[:, 2] = -1
        return {"rooms": logits, "range": depth, "facing": normals}

    def close(self) -> None:
        self.closed = True


class Listener:
    """Messages of a topic as they come; `arrived`: when, in nanoseconds of the node's clock."""

    def __init__(self, node: Any, kind: Any, topic: str, profile: QoSProfile) -> None:
        self.messages: list[Any] = []
        self.arrived: list[int] = []
        self._clock = node.get_clock()
        self._news = threading.Condition()
        self._subscription = node.create_subscription(kind, topic, self._on_message, profile)

    def _on_message(self, message: Any) -> None:
        with self._news:
            self.messages.append(message)
            self.arrived.append(self._clock.now().nanoseconds)
            self._news.notify_all()

    def wait(self, done: Callable[[list[Any]], Any], seconds: float = PATIENCE_S) -> Any:
        """What `done(messages)` gives as soon as it is true; fails after `seconds`."""
        with self._news:
            if not self._news.wait_for(lambda: done(self.messages), seconds):
                raise AssertionError(f"not within {seconds} s; {len(self.messages)} messages came")
            return done(self.messages)

    def first(self, count: int = 1) -> Any:
        return self.wait(lambda messages: len(messages) >= count and messages[count - 1])


class World:
    """Everything that a test makes, and its end."""

    def __init__(self) -> None:
        self.executor = CameraExecutor()
        self.peer = rclpy.create_node("peer")
        self.nodes: list[Any] = []
        self.executor.add_node(self.peer)
        self._thread = threading.Thread(target=self.executor.spin, daemon=True)
        self._thread.start()

    def node(self, engine: Any = None, *, name: str = "igate", namespace: str = "/", **parameters: Any) -> IgateNode:
        """A node of the product; `engine` in place of a bundle's."""
        own = [Parameter(key, value=value) for key, value in parameters.items()]
        if engine is not None:
            own.append(Parameter("bundle", value="an engine of the test's"))
        opener = None if engine is None else lambda options: engine
        made = IgateNode(name, namespace=namespace, parameter_overrides=own, open_engine=opener)
        self.nodes.append(made)
        self.executor.add_node(made)
        return made

    def active(self, engine: Any = None, **arguments: Any) -> IgateNode:
        """A node that takes images."""
        node = self.node(engine, **arguments)
        assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS, node.reason
        assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS, node.reason
        return node

    def listen(self, kind: Any, topic: str, profile: QoSProfile = BEST_EFFORT) -> Listener:
        return Listener(self.peer, kind, topic, profile)

    def listen_health(self) -> Listener:
        return self.listen(DiagnosticArray, "/diagnostics", RELIABLE)

    def heard(self, node: IgateNode, health: Listener, done: Callable[[list[Any]], Any]) -> Any:
        """What `done` gives of the diagnostics, which `node` is asked for now instead of in a second."""
        self.until(lambda: done(health.messages), "a status", node.publish_diagnostics)
        return done(health.messages)

    def set(self, node: IgateNode, **parameters: Any) -> Any:
        """Set parameters as `ros2 param set` does; the result of the last."""
        return node.set_parameters([Parameter(name, value=value) for name, value in parameters.items()])[-1]

    def camera(self, topic: str = "/image", profile: QoSProfile = BEST_EFFORT) -> Any:
        return self.peer.create_publisher(Image, topic, profile)

    def until(self, true: Callable[[], Any], what: str, again: Callable[[], Any] = lambda: None) -> None:
        """Discovery has no event to wait for: look until it happened, doing `again` each time."""
        end = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < end, f"never came: {what}"
            again()
            time.sleep(0.02)

    def matched(self, camera: Any, count: int = 1) -> None:
        self.until(lambda: camera.get_subscription_count() >= count, "a subscriber of the camera")

    def close(self) -> None:
        self.executor.shutdown()
        self._thread.join(PATIENCE_S)
        for node in [*self.nodes, self.peer]:
            node.destroy_node()


def image(
    pixels: np.ndarray, encoding: str = "rgb8", *, stamp: tuple[int, int] = (5, 7), frame_id: str = "optical"
) -> Image:
    """[H,W] or [H,W,C] uint8 as a message."""
    message = Image(height=pixels.shape[0], width=pixels.shape[1], encoding=encoding)
    message.step = int(np.prod(pixels.shape[1:])) * pixels.itemsize
    message.header.stamp.sec, message.header.stamp.nanosec = stamp
    message.header.frame_id = frame_id
    message.data = pixels.tobytes()
    return message


def pixels_of(message: Image) -> np.ndarray:
    kinds = {"mono8": (np.uint8, 1), "32FC1": (np.float32, 1), "16UC1": (np.uint16, 1), "32FC3": (np.float32, 3)}
    kind, channels = kinds.get(message.encoding, (np.uint8, 3))
    array = np.frombuffer(message.data, kind)
    return array.reshape((message.height, message.width, channels) if channels > 1 else (message.height, message.width))


def statuses(message: DiagnosticArray, node: str = "igate") -> dict[str, DiagnosticStatus]:
    """The part behind "NODE: " of each status' name -> status."""
    prefix = f"{node}: "
    return {status.name[len(prefix) :]: status for status in message.status if status.name.startswith(prefix)}


def values(status: DiagnosticStatus) -> Mapping[str, str]:
    return {item.key: item.value for item in status.values}


def level(status: DiagnosticStatus) -> int:
    return status.level[0]


def said(name: str, part: str, node: str = "igate") -> Callable[[Sequence[DiagnosticArray]], DiagnosticStatus | None]:
    """For Listener.wait: the newest status `name` when its message holds `part`."""

    def look(messages: Sequence[DiagnosticArray]) -> DiagnosticStatus | None:
        found = [every[name] for every in (statuses(message, node) for message in messages) if name in every]
        return found[-1] if found and part in found[-1].message else None

    return look


def calibration(width: int, height: int) -> CameraInfo:
    info = CameraInfo(width=width, height=height, distortion_model="plumb_bob")
    info.k = [100.0, 0.0, (width - 1) / 2, 0.0, 100.0, (height - 1) / 2, 0.0, 0.0, 1.0]
    info.p = [100.0, 0.0, (width - 1) / 2, 0.0, 0.0, 100.0, (height - 1) / 2, 0.0, 0.0, 0.0, 1.0, 0.0]
    return info
