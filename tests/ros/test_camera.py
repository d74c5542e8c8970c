"""A live camera: never an old frame, what is lost is counted, and what a flight recording holds."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="NOT TESTED: ROS 2 is missing; `make test-ros` brings it")
import tinynet
from ros_world import PATIENCE_S, BrightnessEngine, World, image, said, values
from sensor_msgs.msg import Image

from igate_edge import Bundle, Engine
from igate_edge.robotics.replay import replay

pytestmark = pytest.mark.ros
VGA = np.full((480, 640, 3), 90, np.uint8)


class Paced(threading.Thread):
    """Publishes VGA images at a rate, stamped with the ROS clock, until `count` were sent."""

    def __init__(self, world: World, camera: Any, count: int, hz: float) -> None:
        super().__init__(daemon=True)
        self.world, self.camera, self.count, self.period = world, camera, count, 1 / hz
        self.message = image(VGA)
        self.late_s = 0.0

    def run(self) -> None:
        due = time.monotonic()
        for _ in range(self.count):
            self.late_s = max(self.late_s, time.monotonic() - due)
            self.message.header.stamp = self.world.peer.get_clock().now().to_msg()
            self.camera.publish(self.message)
            due += self.period
            time.sleep(max(0.0, due - time.monotonic()))


def test_a_slow_engine_answers_the_newest_frames_and_counts_the_others(world: World) -> None:
    inference_s, hz, count = 0.1, 30.0, 60
    engine = BrightnessEngine()
    node = world.active(engine, diag_period=60.0, output_size="network")
    depth, health, camera = world.listen(Image, "/igate/depth"), world.listen_health(), world.camera()
    world.matched(camera)
    world.until(lambda: depth.messages, "a first answer", lambda: camera.publish(image(VGA, stamp=(1, 0))))
    node._work.drain()
    del depth.messages[:], depth.arrived[:]
    before = node._work._pipeline.counts
    engine.seconds = inference_s
    sender = Paced(world, camera, count, hz)
    sender.start()
    sender.join(PATIENCE_S)
    node._work.drain()
    counts = node._work._pipeline.counts
    received, answered = counts.received - before.received, counts.answered - before.answered
    dropped, stale = counts.dropped - before.dropped, counts.stale - before.stale
    assert received == answered + dropped + stale and not counts.errors and not counts.refused
    assert answered <= count / hz / inference_s + 2 and dropped >= received / 2
    depth.wait(lambda messages: len(messages) >= answered)
    stamps = [m.header.stamp.sec * 10**9 + m.header.stamp.nanosec for m in depth.messages]
    assert stamps == sorted(set(stamps)), "each newer than the one before"
    # The newest frame when the engine became free, its inference, and as much again for transport; of four frames in
    # five, since a busy machine keeps some of them waiting that the camera knows nothing of.
    ages_s = np.sort((np.array(depth.arrived) - stamps) / 1e9)
    allowed_s = 1 / hz + 2 * inference_s + sender.late_s
    assert ages_s[int(0.8 * len(ages_s))] < allowed_s, ages_s
    del health.messages[:]
    status = world.heard(node, health, said("pipeline", "dropped"))
    assert int(values(status)["dropped"]) == counts.dropped


def test_in_mode_every_no_frame_is_dropped(world: World) -> None:
    engine = BrightnessEngine(seconds=0.02)
    node = world.active(engine, drop_policy="every", max_age_ms=0.0)
    depth, camera = world.listen(Image, "/igate/depth"), world.camera()
    world.matched(camera)
    world.until(lambda: depth.messages, "a first answer", lambda: camera.publish(image(VGA[::20, ::20])))
    before = len(depth.messages)
    for number in range(8):
        camera.publish(image(VGA[::20, ::20], stamp=(9, number)))
    depth.wait(lambda messages: {m.header.stamp.nanosec for m in messages if m.header.stamp.sec == 9} == set(range(8)))
    assert node._work._pipeline.counts.dropped == 0 and len(depth.messages) > before


def test_an_old_image_is_not_answered(world: World) -> None:
    node = world.active(BrightnessEngine(), max_age_ms=200.0, diag_period=60.0)
    depth, health, camera = world.listen(Image, "/igate/depth"), world.listen_health(), world.camera()
    world.matched(camera)

    def publish(age_s: float) -> None:
        now = world.peer.get_clock().now().nanoseconds - int(age_s * 1e9)
        camera.publish(image(VGA[::20, ::20], stamp=(now // 10**9, now % 10**9)))

    def stale() -> Any:
        return said("pipeline", "ms are allowed")(health.messages)

    world.until(stale, "a stale frame", lambda: (publish(0.5), node.publish_diagnostics()))
    assert int(values(stale())["stale"]) >= 1 and not depth.messages
    world.until(lambda: depth.messages, "an answer to a new image", lambda: publish(0.0))


class Failing:
    """An engine that raises `error` once it is set."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.preprocess, self.tasks, self.close = engine, engine.preprocess, engine.tasks, engine.close
        self.error = ""

    def infer(self, image: np.ndarray) -> dict[str, np.ndarray]:
        if self.error:
            raise RuntimeError(self.error)
        return self._engine.infer(image)


@pytest.mark.parametrize(("output_size", "fit"), [("network", "stretch"), ("frame", "letterbox")])
def test_a_flight_recording_is_written_when_the_engine_fails_and_replays_as_it_was(
    world: World, tmp_path: Path, output_size: str, fit: str
) -> None:
    path = tinynet.packaged(tmp_path / "tiny.igate")
    options = {"backend": "onnxruntime", "precision": "float", "cache_dir": tmp_path / "cache"}
    engine = Failing(Engine.open(path, **options))
    world.active(engine, record_dir=str(tmp_path), output_size=output_size, fit=fit)
    depth, camera = world.listen(Image, "/igate/depth"), world.camera()
    # Not of the network's shape: who looks at it in another way, or at another size, gets other answers.
    picture = np.random.default_rng(0).integers(0, 256, (24, 48, 3), np.uint8)
    stamps = iter(range(1, 10_000))
    world.matched(camera)

    def again() -> None:
        camera.publish(image(picture, stamp=(next(stamps), 0)))

    world.until(lambda: len(depth.messages) >= 3, "answers", again)
    engine.error = "the driver is gone"
    world.until(lambda: list(tmp_path.glob("flight_*.mcap")), "a recording", again)
    with Engine.open(path, **options) as now:
        found = replay(now, Bundle.read(path), next(tmp_path.glob("flight_*.mcap")))
    assert (found.about["fit"], found.about["at"]) == (fit, output_size)
    assert found.passed and not found.losses, found
    tasks = {task.task: task for task in found.tasks}
    assert tasks["depth"].frames >= 3 and tasks["depth"].identical == tasks["depth"].frames
    assert any("the driver is gone" in then and not now for _, then, now in found.errors)
