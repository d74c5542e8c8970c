"""Topics of the node, with real messages: headers, encodings, intrinsics, labels, and nothing for nobody."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="NOT TESTED: ROS 2 is missing; `make test-ros` brings it")
from igate_edge_ros import convert
from rcl_interfaces.msg import Log
from ros_world import (
    BEST_EFFORT,
    LATCHED,
    RELIABLE,
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


def encoded(encoding: str) -> Image:
    """PICTURE as a message; yuv is BT.601 of video range, where its red is (67, 98, 216) and black (16, 128, 128)."""
    alpha = np.full((24, 32, 1), 9, np.uint8)
    luma, chroma = np.full((24, 32), 16, np.uint8), np.full((12, 16, 2), 128, np.uint8)
    luma[:, :16], chroma[:, :8] = 67, (98, 216)
    packed = np.stack([chroma.repeat(2, 0).reshape(24, 32), luma], 2)
    variants = {
        "bgr8": PICTURE[..., ::-1],
        "rgba8": np.concatenate([PICTURE, alpha], 2),
        "bgra8": np.concatenate([PICTURE[..., ::-1], alpha], 2),
        "padded": np.concatenate([PICTURE, np.full((24, 4, 3), 255, np.uint8)], 1),
        "yuv422": packed,
        "yuv422_yuy2": packed[..., ::-1],
        "nv12": np.concatenate([luma, chroma.reshape(12, 32)]),
    }
    pixels = np.ascontiguousarray(variants[encoding])
    message = image(pixels, "rgb8" if encoding == "padded" else encoding, stamp=(2, 0))
    message.height, message.width, message.header.frame_id = 24, 32, encoding
    return message


@pytest.mark.parametrize("encoding", ["bgr8", "rgba8", "bgra8", "padded", "yuv422", "yuv422_yuy2", "nv12"])
def test_a_picture_is_the_same_picture_in_every_encoding(world: World, encoding: str) -> None:
    world.active(BrightnessEngine())
    labels, depth = world.listen(Image, "/igate/segmentation"), world.listen(Image, "/igate/depth")
    camera = world.camera()
    ready(world, camera, labels)
    ready(world, camera, depth)
    camera.publish(encoded(encoding))
    np.testing.assert_array_equal(pixels_of(labels.wait(stamped(2))), pixels_of(labels.messages[0]))
    assert labels.wait(stamped(2)).header.frame_id == encoding
    np.testing.assert_allclose(pixels_of(depth.wait(stamped(2))), METRES, rtol=3e-3)


@pytest.mark.parametrize("big_endian", [False, True])
def test_sixteen_bits_are_read_in_the_order_that_the_message_says(world: World, big_endian: bool) -> None:
    world.active(BrightnessEngine())
    labels, camera = world.listen(Image, "/igate/segmentation"), world.camera()
    ready(world, camera, labels)
    grey = np.zeros((24, 32), ">u2" if big_endian else "<u2")
    grey[:, :16], grey[:, 16:] = 0xC800, 0x00C8
    message = image(grey, "mono16", stamp=(2, 0))
    message.is_bigendian = int(big_endian)
    camera.publish(message)
    assert pixels_of(labels.wait(stamped(2)))[0].tolist() == [1] * 8 + [0] * 8


def test_a_camera_that_changes_its_size_is_answered_and_it_is_said(world: World) -> None:
    node = world.active(BrightnessEngine(), output_size="frame", diag_period=60.0)
    labels, health, camera = world.listen(Image, "/igate/segmentation"), world.listen_health(), world.camera()
    ready(world, camera, labels)
    camera.publish(image(PICTURE.repeat(2, 0).repeat(2, 1), stamp=(2, 0)))
    larger = labels.wait(stamped(2))
    assert (larger.width, larger.height, larger.step, len(larger.data)) == (64, 48, 64, 64 * 48)
    assert pixels_of(larger)[0, [0, 28, 36, 63]].tolist() == [1, 1, 0, 0]
    camera.publish(image(PICTURE, stamp=(3, 0)))
    assert (labels.wait(stamped(3)).width, labels.wait(stamped(3)).height) == (32, 24)
    status = world.heard(node, health, said("pipeline", "/image changed from 64x48 to 32x24"))
    assert level(status) == 1 and values(status)["events/size"] == "2"


def test_stamps_that_jump_back_are_answered_and_a_late_image_is_not(world: World) -> None:
    node = world.active(BrightnessEngine(), diag_period=60.0)
    labels, health, camera = world.listen(Image, "/igate/segmentation"), world.listen_health(), world.camera()
    ready(world, camera, labels)
    for stamp in ((500, 0), (499, 500_000_000), (20, 0)):  # the second is half a second late, the third another clock's
        camera.publish(image(PICTURE, stamp=stamp))
        if stamp[1]:
            world.until(lambda: node._work._pipeline.counts.stale, "a late image")
        else:
            labels.wait(stamped(stamp[0]))
    assert not stamped(499)(labels.messages)
    status = world.heard(node, health, said("pipeline", "the stamps of /image jumped back by 480.0 s"))
    assert level(status) == 1 and values(status)["events/clock"] == values(status)["stale"] == "1"


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


def test_the_overlay_comes_as_jpeg_where_somebody_asks_for_it(world: World) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="NOT TESTED: Pillow is missing, pip install 'igate-edge[images]'")
    world.active(BrightnessEngine(), output_size="frame")
    jpeg, camera = world.listen(CompressedImage, "/igate/overlay/compressed"), world.camera()
    ready(world, camera, jpeg)
    camera.publish(image(PICTURE, stamp=(2, 5), frame_id="left_optical"))
    message = jpeg.wait(stamped(2))
    assert (message.header.stamp.nanosec, message.header.frame_id) == (5, "left_optical")
    assert message.format == "rgb8; jpeg compressed bgr8"
    overlay = world.listen(Image, "/igate/overlay")
    world.until(lambda: overlay.messages, "both", lambda: camera.publish(image(PICTURE, stamp=(3, 0))))
    with pillow.open(io.BytesIO(message.data)) as picture:
        assert picture.format == "JPEG"
        shown = np.asarray(picture).astype(int)
    assert np.abs(shown - pixels_of(overlay.messages[0])).mean() < 6, "the same picture, with JPEG's losses"


def test_without_pillow_there_is_no_jpeg_and_the_log_says_so_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    log = world.listen(Log, "/rosout", RELIABLE)
    world.until(lambda: world.peer.count_publishers("/rosout"), "a log")
    node = world.active(BrightnessEngine(), name="bare")
    topics = {name for name, _ in node.get_publisher_names_and_types_by_node("bare", "/")}
    assert "/bare/overlay" in topics and "/bare/overlay/compressed" not in topics
    node.trigger_deactivate()
    node.trigger_cleanup()
    node.trigger_configure()
    found = log.wait(lambda logs: [m.msg for m in logs if m.msg.startswith("ready: ")][1:] and [m.msg for m in logs])
    assert len([line for line in found if "no ~/overlay/compressed: " in line and "Pillow" in line]) == 1


def test_who_joins_late_learns_the_labels(world: World) -> None:
    world.active(BrightnessEngine())
    told = world.listen(convert.LABELS, "/igate/label_info", LATCHED).first()
    if convert.LabelInfo is None:
        classes = [(row["class_id"], row["class_name"]) for row in json.loads(told.data)["class_map"]]
    else:
        classes = [(row.class_id, row.class_name) for row in told.class_map]
    assert classes == [(0, "dark"), (1, "bright")]


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
