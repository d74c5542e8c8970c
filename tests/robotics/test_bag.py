"""Bags in and out: several cameras, odd stamps, damage of every kind, and what another reader makes of ours."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import bags
import numpy as np
import pytest
import tinynet

from igate_edge.errors import DataError, InputError, UnavailableError
from igate_edge.robotics.bag import BagSource, BagWriter
from igate_edge.robotics.messages import (
    CameraInfoMessage,
    CompressedImageMessage,
    Diagnostics,
    ImageMessage,
    LabelInfoMessage,
    Message,
    ScoresMessage,
    Status,
    TextMessage,
    image_message,
)
from igate_edge.robotics.typestore import TYPES, deserialise, serialise
from igate_edge.runtime.frame import Camera

FRAMES = tinynet.frames(6, size=(16, 24))


@pytest.fixture(scope="module")
def noise() -> list[np.ndarray]:
    """Images that no compression makes smaller, so that a cut falls among them."""
    return list(np.random.default_rng(0).integers(0, 255, (60, 60, 80, 3), np.uint8))


# Whole bags


@pytest.mark.parametrize("topic", ["/front/image_raw", "/front/image_raw/compressed"])
@pytest.mark.parametrize("packing", ["mcap", "packed mcap", "folder", "sqlite3", *bags.PACKED])
def test_frames_come_back_as_they_were(tmp_path: Path, topic: str, packing: str) -> None:
    path = tmp_path / ("bag" if packing == "folder" else "in.mcap")
    stamps = bags.camera_bag(path, FRAMES, topic=topic, pack=packing == "packed mcap")
    if packing == "sqlite3" or packing in bags.PACKED:
        path = bags.convert(path, tmp_path / "converted", *packing.split())
    source = BagSource(path)
    frames = list(source)
    assert source.topics == (topic,) and source.losses == [] and not source.refused and source.notes == []
    assert [frame.stamp_ns for frame in frames] == stamps
    for frame, image in zip(frames, FRAMES, strict=True):
        assert np.array_equal(frame.data, image) and frame.encoding == "rgb8"
        assert (frame.frame_id, frame.source, frame.age_ms) == ("front_optical", topic, 2.0)
        # p is not given: the bag has what it is for an image that needs no rectifying.
        assert frame.camera is not None and frame.camera.k == bags.CAMERA.k and frame.camera.d == bags.CAMERA.d
    assert [frame.stamp_ns for frame in source] == stamps, "a second reading gives the same"


def test_stamps_that_repeat_or_go_back_lose_no_frame(tmp_path: Path) -> None:
    stamps = [bags.START + k for k in (10, 30, 20, 20, 0, 40)]
    bags.camera_bag(tmp_path / "in.mcap", FRAMES, stamps)
    source = BagSource(tmp_path / "in.mcap")
    assert [frame.stamp_ns for frame in source] == stamps
    assert [note.split(":")[0] for note in source.notes] == [
        "2 frame(s) of /front/image_raw with a stamp older than the one before",
        "1 frame(s) of /front/image_raw with a stamp that was there before",
    ]


def test_only_cameras_are_read_unless_topics_are_named(tmp_path: Path) -> None:
    path = tmp_path / "in.mcap"
    grey = np.zeros((4, 4), np.uint8)
    with BagWriter(path) as bag:
        for camera in ("left", "right"):
            bag.write(f"/{camera}/image_raw", image_message(FRAMES[0], "rgb8", 1, camera))
            bag.write(f"/{camera}/image_raw/compressed", CompressedImageMessage(**bags.compressed(grey), stamp_ns=1))
            bag.write(f"/{camera}/camera_info", CameraInfoMessage(bags.CAMERA, 1, camera))
        bag.write("/mask", image_message(grey, "mono8", 1))
    source = BagSource(path)
    assert [(frame.source, frame.frame_id) for frame in source] == [
        ("/left/image_raw", "left"),
        ("/right/image_raw", "right"),
    ]
    assert [note.split(":")[0] for note in source.notes] == [
        "left out /mask",
        "left out /left/image_raw/compressed",
        "left out /right/image_raw/compressed",
    ]
    assert [frame.source for frame in BagSource(path, ["/mask"])] == ["/mask"]
    with pytest.raises(DataError, match=r"no image topic '/nothing'.*/left/image_raw"):
        BagSource(path, ["/nothing"])


def test_a_camera_that_was_not_calibrated_gives_no_intrinsics(tmp_path: Path) -> None:
    with BagWriter(tmp_path / "in.mcap") as bag:
        bag.write("/c/camera_info", CameraInfoMessage(Camera(24, 16, ()), 1))
        bag.write("/c/image", image_message(FRAMES[0], "rgb8", 1))
        bag.write("/c/camera_info", CameraInfoMessage(bags.CAMERA, 2))
        bag.write("/c/image", image_message(FRAMES[0], "rgb8", 2))
        bag.write("/c/camera_info", CameraInfoMessage(Camera(24, 16, ()), 3))
        bag.write("/c/image", image_message(FRAMES[0], "rgb8", 3))
    cameras = [frame.camera for frame in BagSource(tmp_path / "in.mcap")]
    assert all(camera is not None and camera.k == bags.CAMERA.k for camera in cameras)
    with BagWriter(tmp_path / "none.mcap") as bag:
        bag.write("/c/camera_info", CameraInfoMessage(Camera(24, 16, ()), 1))
        bag.write("/c/image", image_message(FRAMES[0], "rgb8", 1))
    assert [frame.camera for frame in BagSource(tmp_path / "none.mcap")] == [None]


def test_malformed_images_are_counted_and_left_out(tmp_path: Path) -> None:
    path, depth = tmp_path / "in.mcap", image_message(np.ones((4, 4), np.uint16), "16UC1", 2)
    messages: list[ImageMessage] = [
        ImageMessage(4, 5, "rgb8", 14, bytes(60), stamp_ns=1),
        ImageMessage(4, 5, "rgb8", 15, bytes(59), stamp_ns=2),
        depth,
        image_message(FRAMES[0], "rgb8", 3),
    ]
    with BagWriter(path) as bag:
        for message in messages:
            bag.write("/c/image", message)
        bag.write_raw("/c/image", "sensor_msgs/msg/Image", 4, b"\0\1\0\0\5")
    source = BagSource(path)
    assert [frame.stamp_ns for frame in source] == [3]
    assert dict(source.refused) == {
        "/c/image: malformed image message": 2,
        "/c/image: 16UC1 is a depth image's encoding": 1,
        "/c/image: cannot decode a message of type sensor_msgs/msg/Image": 1,
    }
    assert len(list(BagSource(path, ["/c/image"]))) == 2, "a depth topic that was named is read"


# Damaged bags


@pytest.mark.parametrize("pack", [False, True])
def test_a_cut_mcap_gives_what_lies_before_the_cut(tmp_path: Path, noise: list[np.ndarray], pack: bool) -> None:
    whole, cut = tmp_path / "in.mcap", tmp_path / "cut.mcap"
    stamps = bags.camera_bag(whole, noise, pack=pack)
    data, counts = whole.read_bytes(), []
    for size in np.linspace(0, len(data) - 1, 40).astype(int):
        cut.write_bytes(data[:size])
        try:
            source = BagSource(cut)
        except DataError:  # not one image is left
            counts.append(0)
            continue
        frames = list(source)
        assert [frame.stamp_ns for frame in frames] == stamps[: len(frames)]
        assert all(np.array_equal(frame.data, image) for frame, image in zip(frames, noise, strict=False))
        assert len(source.losses) == 1 and "cut.mcap: " in source.losses[0]
        # 14,400 bytes an image, and zstd hands out no part of a block of 128 kB.
        assert len(frames) >= size / 15_000 - (10 if pack else 1)
        counts.append(len(frames))
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 60


def test_a_chunk_with_a_wrong_checksum_is_left_out_and_named(tmp_path: Path, noise: list[np.ndarray]) -> None:
    from mcap.writer import CompressionType, Writer

    path, image = tmp_path / "in.mcap", TYPES[ImageMessage]
    with path.open("wb") as file:
        writer = Writer(file, chunk_size=100_000, compression=CompressionType.NONE)
        writer.start(profile="ros2")
        schema = writer.register_schema(image, "ros2msg", b"")
        channel = writer.register_channel("/c/image", "cdr", schema)
        for k, frame in enumerate(noise):
            writer.add_message(channel, k, serialise(image_message(frame, "rgb8", k)), k)
        writer.finish()
    assert len(list(BagSource(path))) == 60
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    source = BagSource(path)
    frames = list(source)
    assert 50 <= len(frames) < 60 and frames[0].stamp_ns == 0 and frames[-1].stamp_ns == 59
    assert len(source.losses) == 1 and "wrong checksum" in source.losses[0]


@pytest.mark.parametrize("length", [2**62, 2**63 - 1, 100_000_000])
def test_a_length_beyond_the_file_takes_no_memory(tmp_path: Path, length: int) -> None:
    path = tmp_path / "in.mcap"
    header = b"\x01" + (8).to_bytes(8, "little") + bytes(8)
    path.write_bytes(b"\x89MCAP0\r\n" + header + b"\x06" + length.to_bytes(8, "little") + bytes(900))
    with pytest.raises(DataError, match=r"no images.*longer than the file"):
        BagSource(path)


def test_a_cut_sqlite_bag_gives_what_lies_before_the_cut(tmp_path: Path, noise: list[np.ndarray]) -> None:
    stamps = bags.camera_bag(tmp_path / "in.mcap", noise)
    folder = bags.convert(tmp_path / "in.mcap", tmp_path / "lite", "sqlite3")
    (base,) = folder.glob("*.db3")
    os.truncate(base, base.stat().st_size * 6 // 10)
    source = BagSource(folder)
    found = [frame.stamp_ns for frame in source]
    assert found == stamps[: len(found)] and 20 < len(found) < 60
    assert len(source.losses) == 1 and "what follows is lost" in source.losses[0]


def test_a_folder_whose_recorder_was_killed_is_read_by_its_files(tmp_path: Path) -> None:
    folder, stamps = tmp_path / "crashed", []
    folder.mkdir()
    for part in (10, 9):
        stamps += bags.camera_bag(folder / f"crashed_{part}.mcap", FRAMES[:2], [part, part + 100])
    source = BagSource(folder)
    assert [frame.stamp_ns for frame in source] == [9, 109, 10, 110]
    assert source.notes[0].startswith("metadata.yaml is missing")


def test_a_file_that_metadata_names_but_is_gone_is_named(tmp_path: Path) -> None:
    bags.camera_bag(tmp_path / "two", FRAMES)
    meta = tmp_path / "two" / "metadata.yaml"
    meta.write_text(meta.read_text().replace("- two.mcap", "- two.mcap\n  - ../../gone.mcap"))
    source = BagSource(tmp_path / "two")
    assert len(list(source)) == 6 and source.notes == ["metadata.yaml names files that are not there: gone.mcap"]


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.mcap", b""), ("a.mcap", b"#ROSBAG V2.0\n" + bytes(99)), ("a.db3", b"hello"), ("a.bag", b"#ROSBAG V2.0\n")],
)
def test_what_is_no_bag_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match="not a bag of ROS 2"):
        BagSource(tmp_path / name)


def test_no_file_an_empty_folder_and_a_pipe_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mcap")
    for path in (tmp_path / "nothing.mcap", tmp_path / "pipe.mcap", tmp_path):
        with pytest.raises(DataError, match="no such bag|no bag in this folder"):
            BagSource(path)


# Writing

ALL: list[Message] = [
    image_message(FRAMES[0], "rgb8", 7, "f"),
    CompressedImageMessage("png", b"abc", 7, "f"),
    CameraInfoMessage(bags.CAMERA, 7, "f"),
    LabelInfoMessage(("floor", "wall"), 0.5, 7, "f"),
    ScoresMessage(("a", "b"), (0.25, 0.75), 7, "f"),
    TextMessage("{}"),
    Diagnostics((Status(1, "igate", "slow", {"p99": "7"}),), 7, "f"),
]


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_every_message_comes_back_from_its_bytes(message: Message) -> None:
    found = deserialise(serialise(message), TYPES[type(message)])
    if isinstance(message, ImageMessage | CompressedImageMessage):
        assert isinstance(found, type(message)) and bytes(found.data) == bytes(message.data)
    elif isinstance(message, CameraInfoMessage):
        assert isinstance(found, CameraInfoMessage) and found.camera.k == bags.CAMERA.k
        assert found.camera.p == (20.0, 0.0, 11.5, 0.0, 0.0, 21.0, 7.5, 0.0, 0.0, 0.0, 1.0, 0.0)
    else:
        assert found == message


def test_another_reader_decodes_every_type_by_the_definitions_in_the_bag(tmp_path: Path) -> None:
    with BagWriter(tmp_path / "out.mcap") as bag:
        for number, message in enumerate(ALL):
            bag.write(f"/t{number}", message, 1000 + number)
    found = {topic: message for topic, _, message in bags.decoded(tmp_path / "out.mcap")}
    assert np.array_equal(bags.pixels(found["/t0"]), FRAMES[0]) and bags.stamp(found["/t0"]) == 7
    assert list(found["/t2"].k) == list(bags.CAMERA.k) and found["/t2"].distortion_model == "plumb_bob"
    assert [(one.class_id, one.class_name) for one in found["/t3"].class_map] == [(0, "floor"), (1, "wall")]
    assert [(one.class_id, one.score) for one in found["/t4"].results] == [("a", 0.25), ("b", 0.75)]
    assert found["/t6"].status[0].message == "slow" and found["/t6"].status[0].values[0].value == "7"


def test_label_names_are_latched(tmp_path: Path) -> None:
    from rosbags.interfaces import QosDurability
    from rosbags.rosbag2 import Reader

    with BagWriter(tmp_path / "out.mcap") as bag:
        bag.write("/label_info", LabelInfoMessage(("a",), 0.0, 1))
        bag.write("/image", image_message(FRAMES[0], "rgb8", 1))
    with Reader(tmp_path / "out.mcap") as reader:
        profiles = {one.topic: one.ext.offered_qos_profiles for one in reader.connections}
    assert [profile.durability for profile in profiles["/label_info"]] == [QosDurability.TRANSIENT_LOCAL]
    assert profiles["/image"] == []


def test_a_bag_is_whole_or_absent(tmp_path: Path) -> None:
    (tmp_path / "old.mcap").write_bytes(b"old")
    for name in ("old.mcap", "new.mcap", "folder"):
        with pytest.raises(RuntimeError), BagWriter(tmp_path / name) as bag:
            bag.write("/t", TextMessage("x"), 1)
            raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["old.mcap"]
    assert (tmp_path / "old.mcap").read_bytes() == b"old"
    with BagWriter(tmp_path / "old.mcap") as bag:
        bag.write("/t", TextMessage("x"), 1)
    bag.close()
    assert len(bags.decoded(tmp_path / "old.mcap")) == 1
    with pytest.raises(InputError, match="closed"):
        bag.write("/t", TextMessage("x"), 1)


def test_a_folder_in_the_way_is_kept(tmp_path: Path) -> None:
    (tmp_path / "bag").mkdir()
    with pytest.raises(InputError, match="stands in the bag's place"):
        BagWriter(tmp_path / "bag")


def test_a_full_disk_leaves_nothing_and_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = BagWriter(tmp_path / "out.mcap")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer._writer.storage, "close_chunk", full)
    with pytest.raises(UnavailableError, match=r"cannot write .*No space left"):
        writer.write("/big", image_message(np.zeros((700, 600, 3), np.uint8), "rgb8", 1))
    assert list(tmp_path.iterdir()) == []


def test_a_stamp_beyond_what_ros_counts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="32 bits"), BagWriter(tmp_path / "out.mcap") as bag:
        bag.write("/t", image_message(FRAMES[0], "rgb8", 2**62))
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_the_command_that_helps_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rosbags", None)
    for opening in (lambda: BagSource(tmp_path / "a.mcap"), lambda: BagWriter(tmp_path / "b.mcap")):
        with pytest.raises(UnavailableError, match=r"pip install 'igate-edge\[bag\]'"):
            opening()
