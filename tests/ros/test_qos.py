"""Quality of service against real peers: what fits, what does not and is said, deadlines, and a camera that stops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="NOT TESTED: ROS 2 is missing; `make test-ros` brings it")
from igate_edge_ros import qos
from igate_edge_ros.health import Health
from rcl_interfaces.msg import Log
from rclpy.duration import Duration
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from ros_world import BEST_EFFORT, LATCHED, RELIABLE, BrightnessEngine, World, image, level, said, values
from sensor_msgs.msg import Image

pytestmark = pytest.mark.ros
GREY = np.full((12, 16, 3), 90, np.uint8)


def feed(world: World, camera: Any, until: Any, what: str) -> None:
    """Images, each newer than the one before, until something is true."""
    stamps = iter(range(1, 10_000))
    world.matched(camera)
    world.until(until, what, lambda: camera.publish(image(GREY, stamp=(next(stamps), 0))))


def test_a_reliable_subscriber_is_warned_about_and_the_others_are_served(world: World) -> None:
    node = world.active(BrightnessEngine(), diag_period=60.0)
    reliable = world.listen(Image, "/igate/depth", RELIABLE)
    served, health, camera = world.listen(Image, "/igate/depth"), world.listen_health(), world.camera()
    status = world.heard(node, health, said("qos", "/igate/depth: a subscriber asks for another reliability"))
    assert level(status) == 1 and "/igate/depth incompatible" in values(status)
    feed(world, camera, lambda: len(served.messages) >= 3, "depths")
    assert not reliable.messages


def test_an_override_makes_a_topic_reliable(world: World) -> None:
    node = world.active(
        BrightnessEngine(),
        diag_period=60.0,
        **{"qos_overrides./igate/depth.publisher.reliability": "reliable"},
    )
    reliable, health, camera = world.listen(Image, "/igate/depth", RELIABLE), world.listen_health(), world.camera()
    feed(world, camera, lambda: reliable.messages, "a depth")
    assert level(world.heard(node, health, said("qos", "every peer fits"))) == 0


def test_the_log_warns_of_a_reliable_subscriber_once(world: World) -> None:
    log = world.listen(Log, "/rosout", RELIABLE)
    world.active(BrightnessEngine(), name="warner", diag_period=60.0)
    world.listen(Image, "/warner/depth", RELIABLE)
    sentence = "/warner/depth: a subscriber asks for another reliability: it gets nothing"
    found = log.wait(lambda logs: [m for m in logs if m.name == "warner" and m.msg == sentence])
    assert [int.from_bytes(m.level, "little") if isinstance(m.level, bytes) else m.level for m in found] == [30]
    world.listen(Image, "/warner/depth", RELIABLE)
    world.until(lambda: world.peer.count_subscribers("/warner/depth") == 2, "a second one")
    world.listen(Image, "/warner/normals", RELIABLE)
    log.wait(lambda logs: any(m.msg.startswith("/warner/normals: a subscriber") for m in logs))
    assert len([m for m in log.messages if m.msg == sentence]) == 1


def test_depth_history_and_durability_can_be_overridden_on_both_sides(world: World) -> None:
    given = {
        "/igate/depth.publisher.depth": 3,
        "/igate/depth.publisher.durability": "transient_local",
        "/igate/depth.publisher.reliability": "reliable",
        "/igate/normals.publisher.history": "keep_all",
        "/image.subscription.depth": 7,
        "/image.subscription.history": "keep_all",
        "/camera_info.subscription.durability": "transient_local",
        "/camera_info.subscription.reliability": "reliable",
    }
    node = world.active(BrightnessEngine(), **{f"qos_overrides.{name}": value for name, value in given.items()})
    topics = {made.topic_name: made.qos_profile for made in (*node.publishers, *node.subscriptions)}
    depth, image_, info = topics["/igate/depth"], topics["/image"], topics["/camera_info"]
    assert (depth.depth, depth.durability) == (3, DurabilityPolicy.TRANSIENT_LOCAL)
    assert topics["/igate/normals"].history == image_.history == HistoryPolicy.KEEP_ALL and image_.depth == 7
    assert info.durability == DurabilityPolicy.TRANSIENT_LOCAL
    segmentation = topics["/igate/segmentation"]
    assert (segmentation.depth, segmentation.durability) == (5, DurabilityPolicy.VOLATILE), "as it was"
    assert segmentation.history == HistoryPolicy.KEEP_LAST
    early, camera = world.listen(Image, "/igate/depth"), world.camera()
    feed(world, camera, lambda: early.messages, "a depth")
    late = world.listen(Image, "/igate/depth", LATCHED)
    assert late.first().header.stamp.sec >= 1, "kept for who comes later"


def test_a_camera_that_does_not_fit_is_the_reason_for_silence(world: World) -> None:
    override = {"qos_overrides./image.subscription.reliability": "reliable"}
    node = world.active(BrightnessEngine(), fps=50.0, diag_period=60.0, **override)
    health, camera = world.listen_health(), world.camera("/image", BEST_EFFORT)
    lost = world.heard(node, health, said("input", "on /image: a publisher offers another reliability"))
    assert level(lost) == 2 and camera.get_subscription_count() == 0


def test_a_missing_and_a_silent_camera_are_told_apart(world: World) -> None:
    node = world.active(BrightnessEngine(), fps=50.0, diag_period=60.0)
    health = world.listen_health()
    assert level(world.heard(node, health, said("input", "on /image: nobody publishes it"))) == 2
    camera = world.camera()
    world.matched(camera)
    assert level(world.heard(node, health, said("input", "on /image: its publisher sends nothing"))) == 2
    camera.publish(image(GREY))
    del health.messages[:]
    world.until(
        lambda: said("input", "images arrive")(health.messages),
        "images",
        lambda: (camera.publish(image(GREY)), node.publish_diagnostics()),
    )


def test_no_image_for_five_periods_is_a_fault_and_not_earlier() -> None:
    now = [100.0]
    health = Health(clock=lambda: now[0])
    health.begin()
    now[0] += 0.49
    assert health.input_status("/image", 1, 10.0).level == 0
    now[0] += 0.02
    assert health.input_status("/image", 1, 10.0).message.startswith("no image for 0.5 s on /image")
    health.image()
    assert health.input_status("/image", 1, 10.0).level == 0
    now[0] += 1.99
    assert health.input_status("/image", 1, 0.0).level == 0, "a camera of unknown rate gets two seconds"
    now[0] += 0.02
    assert health.input_status("/image", 1, 0.0).level == 2


def test_missed_deadlines_of_topics_with_listeners_are_said(world: World) -> None:
    node = world.active(BrightnessEngine(), fps=20.0, diag_period=60.0)
    asked = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT, deadline=Duration(nanoseconds=75_000_000))
    depth, health = world.listen(Image, "/igate/depth", asked), world.listen_health()
    feed(world, world.camera(), lambda: depth.messages, "a depth, though the listener asks for the deadline")
    status = world.heard(node, health, said("qos", "/igate/depth: a deadline was missed"))
    missed = values(status)
    assert level(status) == 1 and int(missed["/igate/depth deadlines missed"]) >= 1
    assert not any("normals" in name for name in missed), "nobody listens to those"


def test_a_deadline_of_the_camera_can_be_asked_for(world: World) -> None:
    override = {"qos_overrides./image.subscription.deadline": 75_000_000}
    node = world.active(BrightnessEngine(), diag_period=60.0, **override)
    depth, health = world.listen(Image, "/igate/depth"), world.listen_health()
    promising = QoSProfile(
        depth=5, reliability=ReliabilityPolicy.BEST_EFFORT, deadline=Duration(nanoseconds=50_000_000)
    )
    feed(world, world.camera("/image", promising), lambda: depth.messages, "a depth")
    assert level(world.heard(node, health, said("qos", "/image: a deadline was missed"))) == 1


def test_an_executor_survives_events_of_a_topic_that_is_taken_down(world: World) -> None:
    from igate_edge_ros.node import IgateNode

    node = IgateNode("apart")
    made = qos.publisher(node, Image, "~/gone", qos.sensor(1), lambda *event: None)
    handlers = list(made.event_handlers)
    assert handlers
    node.destroy_lifecycle_publisher(made)
    for handler in handlers:
        handler.add_to_wait_set(None)  # what an executor does that began to look before the end
    node.destroy_node()
