"""Parameters of the node: what is refused, when, and what changes at once."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="NOT TESTED: ROS 2 is missing; `make test-ros` brings it")
import tinynet
from igate_edge_ros import parameters
from igate_edge_ros.node import IgateNode
from igate_edge_ros.parameters import ABOUT, Settings, check
from ros_world import BrightnessEngine, World, image, level, pixels_of, said, values
from sensor_msgs.msg import Image

from igate_edge.errors import InputError

pytestmark = pytest.mark.ros
PACKAGE = Path(__file__).resolve().parents[2] / "jetson" / "ros2" / "igate_edge_ros"


def test_defaults_pass_and_whole_numbers_are_numbers() -> None:
    assert check({}) == Settings() and set(ABOUT) == set(Settings.__dataclass_fields__)
    assert check({"budget_ms": 10, "tasks": [""]}) == Settings(budget_ms=10.0)
    assert check({"bundle": "~/scene.igate"}).bundle == str(Path.home() / "scene.igate")


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        ({"threads": 0}, "use a number from 1 to 64"),
        ({"threads": True}, "pass a value of type int"),
        ({"fps": float("nan")}, "pass a number"),
        ({"fps": "30"}, "pass a number"),
        ({"diag_period": 0.0}, "use a number from 0.1 to 60"),
        ({"tasks": "semseg"}, "pass a list of task names"),
        ({"depth_encoding": "16SC1"}, "use one of 32FC1, 16UC1"),
        ({"output_size": "vga"}, "use one of network, frame"),
        ({"fit": "squash"}, "use one of stretch, letterbox, crop"),
        ({"publish_overlay": 1}, "pass a value of type bool"),
        ({"record_seconds": 1e9}, "use a number from 0.5 to 60"),
    ],
)
def test_what_is_not_usable_is_named_with_its_fix(wrong: dict[str, Any], fix: str) -> None:
    (name,) = wrong
    with pytest.raises(InputError, match=f"parameter {name} is not usable") as caught:
        check(wrong)
    assert caught.value.fix == fix


@pytest.mark.parametrize("active", [False, True], ids=["inactive", "active"])
def test_what_configure_reads_is_fixed_while_an_engine_is_loaded(world: World, active: bool) -> None:
    node = world.node(BrightnessEngine())
    node.trigger_configure()
    if active:
        node.trigger_activate()
    for name, value in {"backend": "onnxruntime", "fps": 30.0, "drop_policy": "every"}.items():
        result = world.set(node, **{name: value})
        assert not result.successful and result.reason.startswith(f"{name}: read by configure, the node is ")
        assert node.get_parameter(name).value != value
    assert world.set(node, backend="auto").successful, "what does not change may be set"


def test_live_parameters_take_effect_at_once_or_are_refused(world: World) -> None:
    node = world.active(BrightnessEngine(), diag_period=60.0)
    health = world.listen_health()
    refused = world.set(node, budget_ms=-5.0)
    assert not refused.successful and "parameter budget_ms is not usable" in refused.reason
    assert world.set(node, budget_ms=12.5).successful
    assert values(world.heard(node, health, said("perception: latency", "")))["budget"] == "12.500 ms"
    heard = len(health.messages)
    assert world.set(node, diag_period=0.1).successful
    health.first(heard + 3)


def test_the_parameter_file_is_one_that_ros_reads(world: World) -> None:
    file = PACKAGE / "config" / "igate.yaml"
    node = IgateNode("igate", namespace="/front", cli_args=["--ros-args", "--params-file", str(file)])
    try:
        assert check(parameters.read(node)) == Settings()
        assert node.describe_parameter("fps").description == ABOUT["fps"]
    finally:
        node.destroy_node()


def sender(camera: Any, pixels: np.ndarray) -> Any:
    """Sends this picture, each time newer than the time before."""
    stamps = itertools.count(1)
    return lambda: camera.publish(image(pixels, stamp=(next(stamps), 0)))


@pytest.mark.parametrize(
    ("fit", "size", "top"),
    [("stretch", (12, 16), 1), ("letterbox", (12, 12), 1), ("crop", (12, 16), 0)],
)
def test_fit_says_how_a_square_picture_meets_a_network_of_12x16(
    world: World, fit: str, size: tuple[int, int], top: int
) -> None:
    """The upper three of 24 rows are red; the middle of 18 rows that `crop` looks at has none of them."""
    picture = np.zeros((24, 24, 3), np.uint8)
    picture[:3, :, 0] = 255
    world.active(BrightnessEngine(), fit=fit)
    labels, camera = world.listen(Image, "/igate/segmentation"), world.camera()
    world.matched(camera)
    world.until(lambda: labels.messages, "an answer", sender(camera, picture))
    answer = pixels_of(labels.messages[0])
    assert answer.shape == size and set(answer[0].tolist()) == {top} and not answer[3:].any()


def test_an_engine_that_hangs_for_hang_s_is_opened_again_and_it_is_said(world: World) -> None:
    first, second = BrightnessEngine(), BrightnessEngine()
    node, engines = world.node(first, hang_s=0.5, diag_period=60.0), iter([first, second])
    node._open_engine = lambda options: next(engines)
    node.trigger_configure()
    node.trigger_activate()
    labels, health, camera = world.listen(Image, "/igate/segmentation"), world.listen_health(), world.camera()
    send = sender(camera, np.zeros((12, 16, 3), np.uint8))
    world.matched(camera)
    world.until(lambda: labels.messages, "an answer", send)
    first.go.clear()
    try:
        send()
        status = world.heard(node, health, said("pipeline", "the engine did not answer within 0.5 s"))
        assert level(status) == 2 and node.alive
        before = len(labels.messages)
        world.until(lambda: len(labels.messages) > before, "an answer of the second engine", send)
    finally:
        first.go.set()
    del health.messages[:]
    assert second.calls and values(world.heard(node, health, said("state", "active")))["restarts"] == "1"


def test_only_the_tasks_that_are_named_are_published(world: World, tmp_path: Path) -> None:
    path = tinynet.packaged(tmp_path / "tiny.igate")
    options = {"backend": "onnxruntime", "precision": "float", "cache_dir": str(tmp_path / "cache")}
    node = world.active(bundle=str(path), build_apart=False, tasks=["depth", "tag"], **options)
    topics = {name for name, _ in node.get_publisher_names_and_types_by_node("igate", "/")}
    assert {"/igate/depth", "/igate/classification"} <= topics
    assert not {name for name in topics if name.startswith(("/igate/segmentation", "/igate/label_info"))}
    depth, camera = world.listen(Image, "/igate/depth"), world.camera()
    world.matched(camera)
    world.until(lambda: depth.messages, "a depth", sender(camera, np.zeros((16, 16, 3), np.uint8)))
