"""A live camera: never an old frame, what is lost is counted, and the process ends as it should."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
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

from igate_edge.package import package

pytestmark = pytest.mark.ros
VGA = np.full((480, 640, 3), 90, np.uint8)


class Paced(threading.Thread):
    """Publishes VGA images at a rate, stamped with the ROS clock, until `count` were sent."""

    def __init__(self, world: World, camera: Any, count: int, hz: float) -> None:
        super().__init__(daemon=True)
        self.world, self.camera, self.count, self.period = world, camera, count, 1 / hz
        self.message = image(VGA)

    def run(self) -> None:
        due = time.monotonic()
        for _ in range(self.count):
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
    # The newest frame when the engine became free, its inference, and the transport of a busy machine.
    ages_s = (np.array(depth.arrived) - stamps) / 1e9
    assert np.median(ages_s) < 1 / hz + 2 * inference_s
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


def test_a_flight_recording_is_written_when_the_engine_fails(world: World, tmp_path: Path) -> None:
    engine = BrightnessEngine()
    world.active(engine, record_dir=str(tmp_path))
    depth, camera = world.listen(Image, "/igate/depth"), world.camera()
    stamps = iter(range(1, 10_000))
    world.matched(camera)

    def again() -> None:
        camera.publish(image(VGA[::20, ::20], stamp=(next(stamps), 0)))

    world.until(lambda: len(depth.messages) >= 3, "answers", again)
    engine.error = "the driver is gone"
    world.until(lambda: list(tmp_path.glob("flight_*.mcap")), "a recording", again)


def test_the_process_ends_on_sigterm_with_everything_closed(world: World, tmp_path: Path) -> None:
    frames = tinynet.frames(8)
    package(tinynet.gated_onnx(), tmp_path / "tiny.igate", calibration=frames, golden=frames[:4])
    parameters = {"bundle": tmp_path / "tiny.igate", "backend": "onnxruntime", "cache_dir": tmp_path / "cache"}
    command = [sys.executable, "-m", "igate_edge_ros.main", "--autostart", "--camera", "/front", "--camera", "/rear"]
    command += ["--ros-args", *(word for name, value in parameters.items() for word in ("-p", f"{name}:={value}"))]
    labels, camera = world.listen(Image, "/rear/igate/segmentation"), world.camera("/rear/image")
    stamps = iter(range(1, 10_000))

    def again() -> None:
        camera.publish(image(VGA[::10, ::10], stamp=(next(stamps), 0)))

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ) as process:
        try:
            world.until(lambda: labels.messages, "an answer", again)
            process.send_signal(signal.SIGTERM)
            said_last = process.communicate(timeout=PATIENCE_S)[0].decode()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    assert process.returncode == 0 and "Traceback" not in said_last, said_last
    assert said_last.count("ready: bundle") == 2
