"""Topics of the node, with real messages: headers, encodings, intrinsics, labels, and nothing for nobody."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="NOT TESTED: ROS 2 is missing; `make test-ros` brings it")
from ros_world import (
    BEST_EFFORT,
    LATCHED,
    BrightnessEngine,
    World,
    calibration,
    image,
    level,
    pixels_of,
    said,
    statuses,
    values,
)
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import String

pytestmark = pytest.mark.ros
#: Red is above half in the left half of the picture only.
PICTURE = np.zeros((24, 32, 3), np.uint8)
PICTURE[:, :16, 0] = 200
#: What the stand-in engine answers to it: 1 m and the mean of the image, 200/255 in one of three channels' left half.
METRES = 1 + 200 / 255 / 6


def ready(world: World, camera: Any, listener: Any) -> None:
    """Camera, node and listener know each other."""
    world.matched(camera)
    world.until(lambda: listener.messages, "an answer", lambda: camera.publish(image(PICTURE, stamp=(1, 0))))


def stamped(second: int) -> Any:
    return lambda messages: next((m for m in messages if m.header.stamp.sec == second), None)


def test_answers_carry_the_header_of_their_image_and_the_conventions_of_their_kind(world: World) -> None:
    world.active(BrightnessEngine())
    listeners = {name: world.listen(Image, f"/igate/{name}") for name in ("segmentation", "depth", "normals")}
    camera = world.camera()
    world.matched(camera)
    world.until(
        lambda: all(listener.messages for listener in listeners.values()),
        "all answers",
        lambda: camera.publish(image(PICTURE, stamp=(1, 0))),
    )
    camera.publish(image(PICTURE, stamp=(12, 345), frame_id="left_optical"))
    got = {name: listener.wait(stamped(12)) for name, listener in listeners.items()}
    assert {m.header.stamp.nanosec for m in got.values()} == {345}
    assert {m.header.frame_id for m in got.values()} == {"left_optical"}
    shapes = {name: (m.encoding, m.height, m.width, m.step, m.is_bigendian) for name, m in got.items()}
    assert shapes == {
        "segmentation": ("mono8", 12, 16, 16, 0),
        "depth": ("32FC1", 12, 16, 64, 0),
        "normals": ("32FC3", 12, 16, 192, 0),
    }
    labels = pixels_of(got["segmentation"])
    assert (labels[:, :7] == 1).all() and (labels[:, 9:] == 0).all()
    np.testing.assert_allclose(pixels_of(got["depth"]), METRES, rtol=1e-3)
    np.testing.assert_array_equal(pixels_of(got["normals"])[3, 4], [0, 0, -1])


@pytest.mark.parametrize("encoding", ["bgr8", "rgba8", "bgra8", "padded"])
def test_a_picture_is_the_same_picture_in_every_encoding(world: World, encoding: str) -> None:
    world.active(BrightnessEngine())
    labels, camera = world.listen(Image, "/igate/segmentation"), world.camera()
    ready(world, camera, labels)
    alpha = np.full((24, 32, 1), 9, np.uint8)
    variants = {
        "bgr8": PICTURE[..., ::-1],
        "rgba8": np.concatenate([PICTURE, alpha], 2),
        "bgra8": np.concatenate([PICTURE[..., ::-1], alpha], 2),
        "padded": np.concatenate([PICTURE, np.full((24, 4, 3), 255, np.uint8)], 1),
    }
    message = image(
        np.ascontiguousarray(variants[encoding]), "rgb8" if encoding == "padded" else encoding, stamp=(2, 0)
    )
    message.width = 32
    camera.publish(message)
    np.testing.assert_array_equal(pixels_of(labels.wait(stamped(2))), pixels_of(labels.messages[0]))


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ({"encoding": "purple7"}, "unknown encoding 'purple7'"),
        ({"encoding": ""}, "unknown encoding ''"),
        ({"step": 95}, "step 95, a row has 96 bytes"),
        ({"data": b"\0" * 100}, "100 bytes, 24 rows of step 96"),
        ({"height": 0}, "32x0 pixels"),
    ],
)
def test_a_malformed_image_is_refused_by_name_and_the_next_one_is_answered(
    world: World, broken: dict[str, Any], sentence: str
) -> None:
    node = world.active(BrightnessEngine(), diag_period=60.0)
    labels, health, camera = world.listen(Image, "/igate/segmentation"), world.listen_health(), world.camera()
    ready(world, camera, labels)
    message = image(PICTURE, stamp=(3, 0))
    for name, value in broken.items():
        setattr(message, name, value)
    camera.publish(message)
    status = world.heard(node, health, said("input", sentence))
    assert level(status) == 2 and values(status)["refused"] == "1"
    camera.publish(image(PICTURE, stamp=(4, 0)))
    labels.wait(stamped(4))
    assert not stamped(3)(labels.messages)
    assert level(world.heard(node, health, said("input", "1 images could not be taken"))) == 1


def test_depth_in_millimetres_from_the_next_frame_on(world: World) -> None:
    node = world.active(BrightnessEngine())
    depth, camera = world.listen(Image, "/igate/depth"), world.camera()
    ready(world, camera, depth)
    assert world.set(node, depth_encoding="16UC1").successful
    camera.publish(image(PICTURE, stamp=(2, 0)))
    message = depth.wait(stamped(2))
    assert (message.encoding, message.step) == ("16UC1", 32)
    assert abs(int(pixels_of(message)[0, 0]) - round(METRES * 1000)) <= 1


@pytest.mark.parametrize(("output_size", "width", "centre"), [("network", 16, 7.5), ("frame", 32, 15.5)])
def test_camera_info_is_that_of_the_answers(world: World, output_size: str, width: int, centre: float) -> None:
    world.active(BrightnessEngine(), output_size=output_size)
    infos, depth = world.listen(CameraInfo, "/igate/camera_info"), world.listen(Image, "/igate/depth")
    camera, calibrated = world.camera(), world.peer.create_publisher(CameraInfo, "/camera_info", BEST_EFFORT)
    world.matched(camera)
    world.matched(calibrated)
    stamps = iter(range(1, 10_000))

    def again() -> None:
        calibrated.publish(calibration(32, 24))
        camera.publish(image(PICTURE, stamp=(next(stamps), 5)))

    world.until(lambda: infos.messages and depth.messages, "intrinsics", again)
    info = infos.messages[0]
    assert (info.width, depth.messages[0].width, info.header.frame_id) == (width, width, "optical")
    assert info.k[2] == centre and info.k[0] == 100.0 * width / 32 and info.p[2] == centre


def test_nothing_is_computed_while_nobody_listens(world: World) -> None:
    engine = BrightnessEngine()
    node = world.active(engine, diag_period=60.0)
    warm, health, camera = engine.calls, world.listen_health(), world.camera()
    world.matched(camera)

    def ignored() -> Any:
        camera.publish(image(PICTURE, stamp=(1, 0)))
        node.publish_diagnostics()

    def unwatched() -> Any:
        status = said("input", "images arrive")(health.messages)
        return status and int(values(status)["unwatched"]) >= 5 and status

    world.until(unwatched, "five images that nobody asked for", ignored)
    status = unwatched()
    assert level(status) == 0 and engine.calls == warm
    depth = world.listen(Image, "/igate/depth")
    ready(world, camera, depth)
    assert engine.calls > warm
    latency = values(world.heard(node, health, said("perception: latency", "p99")))
    assert "post/range p50" in latency and not {"post/rooms p50", "post/facing p50"} & set(latency)


def test_the_overlay_is_drawn_for_whoever_looks_and_can_be_switched_off(world: World) -> None:
    node = world.active(BrightnessEngine())
    overlay, camera = world.listen(Image, "/igate/overlay"), world.camera()
    ready(world, camera, overlay)
    assert (overlay.messages[0].encoding, overlay.messages[0].height) == ("rgb8", 12)
    assert world.set(node, publish_overlay=False).successful
    depth = world.listen(Image, "/igate/depth")
    world.until(lambda: depth.messages, "a depth", lambda: camera.publish(image(PICTURE, stamp=(2, 0))))
    shown = len(overlay.messages)
    camera.publish(image(PICTURE, stamp=(9, 0)))
    depth.wait(stamped(9))
    assert len(overlay.messages) == shown


def test_who_joins_late_learns_the_labels(world: World) -> None:
    world.active(BrightnessEngine())
    late = world.listen(String, "/igate/label_info", LATCHED)
    assert json.loads(late.first().data)["class_map"] == [
        {"class_id": 0, "class_name": "dark"},
        {"class_id": 1, "class_name": "bright"},
    ]


def test_two_cameras_in_one_process_keep_apart(world: World) -> None:
    front = world.active(BrightnessEngine(), namespace="/front")
    rear = world.active(BrightnessEngine(), namespace="/rear")
    assert front.get_fully_qualified_name() == "/front/igate" != rear.get_fully_qualified_name()
    depths = {side: world.listen(Image, f"/{side}/igate/depth") for side in ("front", "rear")}
    for side, depth in depths.items():
        camera = world.camera(f"/{side}/image")
        world.matched(camera)
        message = image(PICTURE if side == "front" else PICTURE * 0, stamp=(1, 0), frame_id=side)
        world.until(lambda depth=depth: depth.messages, "an answer", lambda c=camera, m=message: c.publish(m))
    for side, metres in (("front", METRES), ("rear", 1.0)):
        assert {message.header.frame_id for message in depths[side].messages} == {side}
        np.testing.assert_allclose(pixels_of(depths[side].messages[0]), metres, rtol=1e-3)


def test_compressed_images_are_taken_where_asked(world: World) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="NOT TESTED: Pillow is missing, pip install 'igate-edge[images]'")
    world.active(BrightnessEngine(), compressed=True)
    labels = world.listen(Image, "/igate/segmentation")
    camera = world.peer.create_publisher(CompressedImage, "/image/compressed", BEST_EFFORT)
    world.matched(camera)
    file = io.BytesIO()
    pillow.fromarray(PICTURE).save(file, "png")
    message = CompressedImage(format="png", data=file.getvalue())
    message.header.stamp.sec = 8
    world.until(lambda: labels.messages, "an answer", lambda: camera.publish(message))
    assert pixels_of(labels.messages[0])[0].tolist() == [1] * 8 + [0] * 8


def test_diagnostics_name_the_node_and_say_what_runs(world: World) -> None:
    node = world.active(BrightnessEngine(), namespace="/front", diag_period=60.0)
    health = world.listen_health()
    status = world.heard(node, health, said("state", "active", "front/igate"))
    assert values(status)["tasks"] == "rooms, range, facing"
    assert {"input", "pipeline", "perception", "qos"} <= set(statuses(health.messages[-1], "front/igate"))
