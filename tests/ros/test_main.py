"""`igate_node` as a process: what systemd hears of it, how it ends, and with which exit code."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="NOT TESTED: ROS 2 is missing; `make test-ros` brings it")
import tinynet
from robot import service_manager
from ros_world import PATIENCE_S, World, image
from sensor_msgs.msg import Image

pytestmark = pytest.mark.ros
GREY = np.full((48, 64, 3), 90, np.uint8)
#: A program around main(): a callback that blocks until a line comes in.
WEDGED = """
import sys
from igate_edge_ros import main, node
main.WAIT_S, main.WEDGED_S = 0.1, 0.4
class Wedged(node.IgateNode):
    def autostart(self):
        self.timer = self.create_timer(0.2, sys.stdin.readline)
main.IgateNode = Wedged
sys.exit(main.main(["igate_node", "--autostart"]))
"""
#: The engine answers warming up and one frame; then it raises, and there is no other.
LOST = """
import functools, sys
from igate_edge.runtime import supervise
from igate_edge_ros import main, node
from ros_world import BrightnessEngine
supervise.DOWN_S = 0.0
class Once(BrightnessEngine):
    def infer(self, image):
        self.error = "the driver is gone" if self.calls > 3 else ""
        return super().infer(image)
engines = iter([Once()])
def opened(options):
    for engine in engines:
        return engine
    raise OSError("no device")
main.IgateNode = functools.partial(node.IgateNode, open_engine=opened)
sys.exit(main.main(["igate_node", "--autostart", "--ros-args", "-p", "bundle:=an engine", "-p", "diag_period:=0.1"]))
"""


@contextlib.contextmanager
def running(*command: Any, **environment: str) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    with subprocess.Popen([sys.executable, *map(str, command)], text=True, env=env, **pipes) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with service_manager(tmp_path / "notify", PATIENCE_S) as listening:
        yield listening


def notifying(systemd: socket.socket, watchdog_usec: int) -> dict[str, str]:
    return {"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": str(watchdog_usec)}


def again(camera: Any) -> Any:
    """Sends images, each newer than the one before."""
    stamps = itertools.count(1)
    return lambda: camera.publish(image(GREY, stamp=(next(stamps), 0)))


def test_the_process_tells_systemd_and_ends_on_sigterm_with_everything_closed(
    world: World, tmp_path: Path, systemd: socket.socket
) -> None:
    tinynet.packaged(tmp_path / "tiny.igate")
    parameters = {"bundle": tmp_path / "tiny.igate", "backend": "onnxruntime", "cache_dir": tmp_path / "cache"}
    command = ["-m", "igate_edge_ros.main", "--autostart", "--camera", "/front", "--camera", "/rear"]
    command += ["--ros-args", *(word for name, value in parameters.items() for word in ("-p", f"{name}:={value}"))]
    labels, camera = world.listen(Image, "/rear/igate/segmentation"), world.camera("/rear/image")
    send = again(camera)

    def read_and_send() -> None:
        while select.select([systemd], [], [], 0)[0]:  # systemd reads too; a full queue would swallow the last word
            systemd.recv(4096)
        send()

    with running(*command, **notifying(systemd, 400_000)) as process:
        assert systemd.recv(4096) == b"READY=1"
        assert systemd.recv(4096) == systemd.recv(4096) == b"WATCHDOG=1"
        world.until(lambda: labels.messages, "an answer", read_and_send)
        process.send_signal(signal.SIGTERM)
        said_last = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 0 and "Traceback" not in said_last, said_last
    assert said_last.count("ready: bundle") == 2
    last = b""
    while last != b"STOPPING=1":
        last = systemd.recv(4096)


def test_the_watchdog_hears_no_more_of_an_executor_that_a_callback_blocks(systemd: socket.socket) -> None:
    with running("-c", WEDGED, **notifying(systemd, 200_000)) as process:
        assert systemd.recv(4096) == b"READY=1"
        assert systemd.recv(4096) == b"WATCHDOG=1"
        systemd.settimeout(1.5)
        until = time.monotonic() + PATIENCE_S
        with pytest.raises(TimeoutError):
            while time.monotonic() < until:
                systemd.recv(4096)
        systemd.settimeout(PATIENCE_S)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert systemd.recv(4096) == b"WATCHDOG=1", "the executor goes round again"


def test_an_engine_that_is_lost_for_good_ends_the_process_with_1(world: World) -> None:
    depth, camera = world.listen(Image, "/igate/depth"), world.camera()
    send = again(camera)
    with running("-c", LOST) as process:
        world.until(lambda: process.poll() is not None, "the end", send)
        said_last = process.communicate()[0]
    assert process.returncode == 1 and "lost for good: " in said_last, said_last
    assert "the driver is gone" in said_last and "Traceback" not in said_last, said_last
    assert depth.messages, "it had answered before"
