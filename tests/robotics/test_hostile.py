"""Bags and recordings made to harm: no memory, no time and no traceback is to be had, and what is whole is answered."""

from __future__ import annotations

import os
import sqlite3
import struct
import time
import tracemalloc
from pathlib import Path

import bags
import numpy as np
import pytest
import tinynet
from igate_command import igate, refused

from igate_edge.errors import DataError, InputError, UnavailableError
from igate_edge.robotics.bag import BagSource, BagWriter
from igate_edge.robotics.messages import CameraInfoMessage, ImageMessage, TextMessage, image_message, to_array
from igate_edge.robotics.recorder import RECORDING, Recorder
from igate_edge.robotics.replay import read_recording
from igate_edge.robotics.typestore import IMAGE, deserialise, serialise
from igate_edge.runtime.frame import Frame

FRAMES = tinynet.frames(3, size=(16, 24))
TOPICS = "CREATE TABLE topics(id INTEGER PRIMARY KEY, name TEXT, type TEXT, serialization_format TEXT)"
MESSAGES = "CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id INTEGER, timestamp INTEGER, data BLOB)"


def mcap(path: Path, *records: tuple[int, bytes]) -> Path:
    """A file of these records (opcode, content), without an end."""
    body = b"".join(struct.pack("<BQ", kind, len(content)) + content for kind, content in records)
    path.write_bytes(b"\x89MCAP0\r\n" + struct.pack("<BQ", 1, 8) + bytes(8) + body)
    return path


def text(value: str) -> bytes:
    return struct.pack("<I", len(value)) + value.encode()


def one_image(stamp: int = 1) -> list[tuple[int, bytes]]:
    """Schema, channel and message of one image."""
    schema = (3, struct.pack("<H", 1) + text(IMAGE) + text("ros2msg") + struct.pack("<I", 0))
    channel = (4, struct.pack("<HH", 1, 1) + text("/c/image") + text("cdr") + struct.pack("<I", 0))
    data = serialise(image_message(FRAMES[0], "rgb8", stamp))
    return [schema, channel, (5, struct.pack("<HIQQ", 1, 0, stamp, stamp) + data)]


def chunk(content: bytes, size: int | None = None, compression: str = "") -> tuple[int, bytes]:
    size = len(content) if size is None else size
    head = struct.pack("<QQQI", 0, 0, size, 0) + text(compression)
    return 6, head + struct.pack("<Q", len(content)) + content


# Bags


def test_a_chunk_inside_a_chunk_is_not_unpacked(tmp_path: Path) -> None:
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(200_000_000))
    kind, inner = chunk(bomb, 200_000_000, "zstd")
    outer = chunk(struct.pack("<BQ", kind, len(inner)) + inner)
    path = mcap(tmp_path / "in.mcap", *one_image(), outer)
    tracemalloc.start()
    try:
        assert [frame.stamp_ns for frame in BagSource(path)] == [1]
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("more", "damage"), [(b"", 0), (struct.pack("<BQ", 5, 999) + b"cut", 1)])
def test_records_of_a_kind_that_is_not_known_are_no_damage_and_half_ones_are(
    tmp_path: Path, more: bytes, damage: int
) -> None:
    records = [*one_image(), (0x90, b"private")]
    content = b"".join(struct.pack("<BQ", kind, len(data)) + data for kind, data in records)
    source = BagSource(mcap(tmp_path / "in.mcap", chunk(content + more)))
    assert [frame.stamp_ns for frame in source] == [1]
    assert sum("chunk before byte" in loss for loss in source.losses) == damage


def test_a_record_as_long_as_a_file_with_holes_takes_no_memory(tmp_path: Path) -> None:
    path = mcap(tmp_path / "in.mcap", *one_image())
    with path.open("ab") as file:
        file.write(struct.pack("<BQ", 9, 1 << 40))
    os.truncate(path, 1 << 41)  # takes no disk
    source = BagSource(path)
    assert [frame.stamp_ns for frame in source] == [1]
    assert len(source.losses) == 1 and "longer than" in source.losses[0]


def lite(path: Path, *statements: str) -> Path:
    with sqlite3.connect(path) as base:
        for statement in statements:
            base.execute(statement)
    base.close()
    return path


@pytest.mark.parametrize(
    "messages",
    [
        # Rows without end, a value of any size, one that is computed.
        "CREATE VIEW messages AS WITH RECURSIVE r(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM r)"
        " SELECT id, 1 AS topic_id, id AS timestamp, zeroblob(9) AS data FROM r",
        "CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id, timestamp, data BLOB AS (zeroblob(900000000)))",
        "CREATE TABLE others(id INTEGER)",
    ],
)
def test_a_table_that_makes_its_rows_up_is_refused(tmp_path: Path, messages: str) -> None:
    path = lite(tmp_path / "in.db3", TOPICS, messages, f"INSERT INTO topics VALUES(1, '/c/image', '{IMAGE}', 'cdr')")
    begun = time.monotonic()
    with pytest.raises(DataError, match="messages is no table of recorded values"):
        BagSource(path)
    assert time.monotonic() - begun < 20


def test_rows_of_other_types_are_left_out_and_named(tmp_path: Path) -> None:
    path = lite(
        tmp_path / "in.db3",
        TOPICS,
        MESSAGES,
        f"INSERT INTO topics VALUES(1, '/c/image', '{IMAGE}', 'cdr'), (2, NULL, 'x', 'cdr'), (3, 7, x'ff', 'cdr')",
        "INSERT INTO messages VALUES(1, 1, 5, NULL), (2, 1, NULL, x'00'), (3, 1, -5, x'00'), (4, 1, 'a', x'00'),"
        " (5, 2, 1, x'00'), (6, 99, 1, x'00'), (7, 1, 3, 'text')",
    )
    with sqlite3.connect(path) as base:
        data = serialise(image_message(FRAMES[0], "rgb8", 4))
        base.execute("INSERT INTO messages VALUES(8, 1, 4, ?)", (data,))
    base.close()
    source = BagSource(path)
    assert source.topics == ("/c/image",) and [frame.stamp_ns for frame in source] == [4]
    assert source.losses == ["in.db3: 5 row(s) without bytes or time of recording are left out"]


@pytest.mark.parametrize(
    "listed",
    ["7", "{a: b}", "[7, null, [x]]", f"['{'x' * 300}.mcap']", '["a\\0b"]', "!!int x", "[" * 5000, "&a [*a]"],
)
def test_any_metadata_is_read_past(tmp_path: Path, listed: str) -> None:
    folder = tmp_path / "bag"
    folder.mkdir()
    bags.camera_bag(folder / "one.mcap", FRAMES, [1, 2, 3])
    (folder / "metadata.yaml").write_text(f"rosbag2_bagfile_information:\n  relative_file_paths: {listed}\n")
    assert [frame.stamp_ns for frame in BagSource(folder)] == [1, 2, 3]


def test_metadata_of_any_size_is_read_past(tmp_path: Path) -> None:
    folder = tmp_path / "bag"
    folder.mkdir()
    bags.camera_bag(folder / "one.mcap", FRAMES, [1, 2, 3])
    (folder / "metadata.yaml").touch()
    os.truncate(folder / "metadata.yaml", 1 << 40)
    assert len(list(BagSource(folder))) == 3


def test_frames_that_nobody_can_answer_cost_only_themselves(tmp_path: Path, bundle: Path, cache: Path) -> None:
    """A side beyond every picture, nanoseconds beyond a second, and an infinite camera, between good frames."""
    path, out = tmp_path / "in.mcap", tmp_path / "out.mcap"
    with BagWriter(path) as bag:
        bag.write("/c/image", image_message(FRAMES[0], "rgb8", 1))
        bag.write("/c/image", image_message(np.zeros((1, 70_000, 3), np.uint8), "rgb8", 2))
        data = bytearray(serialise(image_message(FRAMES[1], "rgb8", (2**31 - 1) * 10**9)))
        data[8:12] = struct.pack("<I", 2**32 - 1)  # behind four bytes of CDR and the seconds
        bag.write_raw("/c/image", IMAGE, 3, bytes(data))
        bag.write("/c/image", image_message(FRAMES[2], "rgb8", 4))
    done = igate("run", bundle, "--cache", cache, "--precision", "float", "--bag", path, "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.json["frames"] == 2 and sum(done.json["refused"].values()) == 2, done.json
    kept = [bags.stamp(message) for topic, _, message in bags.decoded(out) if topic == "/c/igate/depth"]
    assert kept == [1, 4]


def test_a_camera_of_numbers_that_are_none_comes_through(tmp_path: Path) -> None:
    nan, k = float("nan"), (float("inf"),) * 9
    with BagWriter(tmp_path / "in.mcap") as bag:
        bag.write("/c/camera_info", CameraInfoMessage(bags.CAMERA.__class__(0, 0, k, (nan,) * 5), 1))
        bag.write("/c/image", image_message(FRAMES[0], "rgb8", 1))
    (frame,) = BagSource(tmp_path / "in.mcap")
    assert frame.camera is not None and frame.camera.width == 0


def test_links_and_limits_of_the_command(tmp_path: Path, bundle: Path, cache: Path) -> None:
    path, loop = tmp_path / "in.mcap", tmp_path / "loop.mcap"
    bags.camera_bag(path, FRAMES)
    loop.symlink_to(loop)
    (tmp_path / "link.mcap").symlink_to(path)
    before = path.read_bytes()
    command = ("run", bundle, "--cache", cache, "--precision", "float", "--json", "--bag")
    refused(igate(*command, loop, "--out", tmp_path / "o.mcap"), 2, "no such bag")
    refused(igate(*command, path, "--out", tmp_path / "link.mcap"), 2, "overwrite the input")
    refused(igate(*command, path, "--out", tmp_path / ("x" * 300 + ".mcap")), 3, "File name too long")
    assert igate(*command, path, "--out", loop).code == 0 and not loop.is_symlink(), "the link, not what it names"
    assert igate(*command, path, "--out", tmp_path / "o.mcap", "--limit", 10**30).json["frames"] == 3
    assert path.read_bytes() == before


# Messages


@pytest.mark.parametrize(
    "fields",
    [
        {"height": None},
        {"width": 2.0},
        {"step": float("nan")},
        {"height": 10**9, "width": 10**9},
        {"height": -2, "width": -2},
        {"encoding": None},
        {"encoding": []},
        {"data": None},
        {"data": "text"},
        {"step": 10**18},
    ],
)
def test_an_image_that_is_none_is_refused(fields: dict[str, object]) -> None:
    good = {"height": 2, "width": 2, "encoding": "mono8", "step": 2, "data": bytes(4)}
    with pytest.raises(InputError, match="malformed image message"):
        to_array(ImageMessage(**(good | fields)))  # type: ignore[arg-type]


def test_what_ros_cannot_hold_is_a_sentence() -> None:
    with pytest.raises(InputError, match="sensor_msgs/msg/Image that ROS cannot hold"):
        serialise(ImageMessage(2**40, 2, "mono8", 2, bytes(4)))
    with pytest.raises(InputError, match="ROS cannot hold"):
        serialise(TextMessage("\ud800"))
    with pytest.raises(InputError, match="no message"):
        serialise("text")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="cannot decode"):
        deserialise(None, IMAGE)  # type: ignore[arg-type]


@pytest.mark.parametrize(("topic", "log_ns"), [("", 1), (None, 1), ("/a", -1), ("/a", 2**64), ("/a", 1.5)])
def test_a_message_without_a_topic_or_a_time(tmp_path: Path, topic: str, log_ns: int) -> None:
    with BagWriter(tmp_path / "o.mcap") as bag:
        with pytest.raises(InputError, match="no message of a bag"):
            bag.write(topic, TextMessage("a"), log_ns)
        bag.write("/good", TextMessage("b"), 7)
    assert [message.data for _, _, message in bags.decoded(tmp_path / "o.mcap")] == ["b"]


# Recordings


def test_a_frame_that_ros_cannot_hold_costs_no_other(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for stamp, name in ((1, "optical"), (10**20, "optical"), (3, "\ud800"), (4, "optical")):
            recorder.add(Frame(FRAMES[0], "rgb8", stamp, name, "/cam/image", received_ns=9), None)
        path = recorder.trigger("torn")
        assert path is not None and recorder.flush(30)
        assert [one.frame.stamp_ns for one in read_recording(path, [])[1]] == [1, 4]
        assert [problem.partition(": ")[2] for problem in recorder.problems] == [
            "the frame with stamp 100000000000000000000 is left out: a stamp that ROS cannot hold",
            "the frame with stamp 3 is left out: a sensor_msgs/msg/Image that ROS cannot hold",
        ]


def test_16_bits_of_either_byte_order_are_recorded_as_they_are(tmp_path: Path) -> None:
    grey = np.arange(12, dtype=np.uint16).reshape(3, 4) * 1000
    with Recorder(tmp_path) as recorder:
        for stamp, kind in ((1, "<u2"), (2, ">u2")):
            recorder.add(Frame(grey.astype(kind), "mono16", stamp, "", "/cam/image"), None)
        path = recorder.trigger("alarm")
    assert path is not None
    assert [one.frame.data.tolist() for one in read_recording(path, [])[1]] == [grey.tolist()] * 2


def test_what_a_killed_recorder_left_is_deleted_after_an_hour(tmp_path: Path) -> None:
    old, new, other = tmp_path / ".flight_1_x.mcap.ab.tmp", tmp_path / ".flight_2.mcap.cd.tmp", tmp_path / ".mine.tmp"
    for folder in (old, new, other):
        folder.mkdir()
        (folder / "part").write_bytes(b"half")
    for folder in (old, other):
        os.utime(folder, (1, 1))
    Recorder(tmp_path).close()
    assert {path.name for path in tmp_path.iterdir()} == {new.name, other.name}
    out = tmp_path / ".o.mcap.ab.tmp"
    out.mkdir()
    os.utime(out, (1, 1))
    BagWriter(tmp_path / "o.mcap").abort()
    assert not out.exists()


@pytest.mark.parametrize("settings", [{"seconds": None}, {"max_mb": "x"}, {"ring_mb": float("nan")}, {"seconds": True}])
def test_limits_of_other_types(tmp_path: Path, settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match="not a limit of a recorder"):
        Recorder(tmp_path, **settings)


def test_a_reason_is_words_and_a_wrong_one_loses_nothing(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.add(Frame(FRAMES[0], "rgb8", 1), None)
        with pytest.raises(InputError, match="not a reason"):
            recorder.trigger(None)  # type: ignore[arg-type]
        assert recorder.trigger("now") is not None


@pytest.mark.parametrize(
    "facts",
    ["", "[]", "7", '{"inputs": 1, "outputs": 2}', '{"inputs": {}, "outputs": {"/a": "b"}}', "[" * 100_000],
)
def test_facts_that_are_none_are_refused(tmp_path: Path, facts: str) -> None:
    with BagWriter(tmp_path / "flight_1.mcap") as bag:
        bag.write(RECORDING, TextMessage(facts), 1)
    with pytest.raises(DataError, match="facts are damaged"):
        read_recording(tmp_path / "flight_1.mcap", [])


def test_a_replay_of_nothing_has_not_passed(tmp_path: Path, bundle: Path, cache: Path) -> None:
    path = tmp_path / "flight_1.mcap"
    with BagWriter(path) as bag:
        bag.write(RECORDING, TextMessage('{"inputs": {"/cam/image": "cam"}, "outputs": {}}'), 1)
    done = igate("replay", bundle, path, "--cache", cache, "--precision", "float", "--json")
    refused(done, 2, "holds no frame", "nothing was compared")


def test_recorded_answers_of_any_kind_are_compared_or_named(tmp_path: Path, bundle: Path, cache: Path) -> None:
    """Class numbers that are NaN, negative or beyond all classes; depth and probabilities of other shapes."""
    answers = {
        "seg": np.full((16, 24), np.nan, np.float32),
        "depth": np.full((16, 24), -5, np.int16),
        "tag": np.full((2, 2), 7, np.uint8),
    }
    with Recorder(tmp_path) as recorder:
        from igate_edge.runtime.frame import Result

        frame = Frame(FRAMES[0], "rgb8", 1, "", "/cam/image")
        recorder.add(frame, Result(1, "", "/cam/image", 0, FRAMES[0], answers))
        path = recorder.trigger("alarm")
    done = igate("replay", bundle, path, "--cache", cache, "--precision", "float", "--json")
    assert done.code == 1 and not done.json["passed"] and "Traceback" not in done.err


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """A real one: a file system of a megabyte, where this process may make one."""
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"NOT TESTED: no file system can be mounted here: {made.stderr.strip()}")
    try:
        noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8)
        with pytest.raises(UnavailableError, match=r"No space left on device.*free disk space"):
            bags.camera_bag(disk / "o.mcap", [noise] * 5)
        assert list(disk.iterdir()) == []
        with Recorder(disk / "records") as recorder:
            for stamp in range(1, 5):
                recorder.add(Frame(noise, "rgb8", stamp), None)
            assert recorder.trigger("alarm") is not None and recorder.flush(30)
            assert "No space left on device" in recorder.problems[0]
        assert list((disk / "records").iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)
