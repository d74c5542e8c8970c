"""Neutral messages: ROS's conventions out, and malformed images refused on the way in."""

from __future__ import annotations

import math
import sys

import bags
import numpy as np
import pytest

from igate_edge.contract import OutputSpec
from igate_edge.errors import DataError, InputError
from igate_edge.robotics.messages import (
    CompressedImageMessage,
    ImageMessage,
    LabelInfoMessage,
    ScoresMessage,
    encode_depth,
    from_result,
    image_message,
    label_infos,
    to_array,
    to_frame,
    topics_of,
)
from igate_edge.runtime.frame import Result

SPECS = (
    OutputSpec("rooms", "semseg", 2, ("floor", "wall")),
    OutputSpec("far", "depth", 1),
    OutputSpec("up", "normals", 3),
    OutputSpec("rim", "edges", 1),
    OutputSpec("what", "classification", 2, ("cup", "pen")),
)


def result(**outputs: np.ndarray) -> Result:
    return Result(123, "optical", "/cam", 0, np.zeros((2, 3, 3), np.uint8), outputs, bags.CAMERA)


def test_a_result_becomes_the_messages_of_the_convention() -> None:
    depth = np.array([[1.5, 0.0, np.inf]], np.float32)
    normals = np.zeros((1, 3, 3), np.float32)
    answer = result(
        rooms=np.array([[0, 1, 255]], np.uint8),
        far=depth,
        up=normals,
        rim=np.full((1, 3), 0.25, np.float32),
        what=np.array([0.75, 0.25], np.float32),
    )
    found = dict(from_result(answer, SPECS))
    kinds = {topic: getattr(message, "encoding", type(message).__name__) for topic, message in found.items()}
    assert kinds == {
        "segmentation": "mono8",
        "depth": "32FC1",
        "normals": "32FC3",
        "edges": "32FC1",
        "classification": "ScoresMessage",
        "camera_info": "CameraInfoMessage",
    }
    assert all((message.stamp_ns, message.frame_id) == (123, "optical") for message in found.values())
    assert found["normals"].step == 3 * 3 * 4 and found["segmentation"].step == 3
    assert np.isnan(to_array(found["depth"])).tolist() == [[False, True, True]]
    assert found["classification"].as_json()["scores"] == {"cup": 0.75, "pen": 0.25}
    millimetres = dict(from_result(answer, SPECS, "16UC1"))["depth"]
    assert to_array(millimetres).tolist() == [[1500, 0, 0]]


def test_more_than_255_classes_need_mono16() -> None:
    specs = [OutputSpec("many", "semseg", 300)]
    message = dict(from_result(result(many=np.array([[0, 299, 65535]], np.uint16)), specs))["segmentation"]
    assert message.encoding == "mono16" and to_array(message).tolist() == [[0, 299, 65535]]


def test_an_unknown_depth_encoding_is_refused() -> None:
    with pytest.raises(InputError, match=r"64FC1.*use 32FC1"):
        from_result(result(), SPECS, "64FC1")


def test_depth_in_millimetres_rounds_and_ends_at_what_16_bits_hold() -> None:
    metres = np.array([[0.0004, 0.0006, 65.535, 65.536, -1.0, math.nan]])
    assert encode_depth(metres, "16UC1").tolist() == [[0, 1, 65535, 0, 0, 0]]


def test_topics_never_meet() -> None:
    specs = [OutputSpec(name, "semseg", 2) for name in ("a b", "a_b", "2")]
    assert list(topics_of(specs).values()) == ["segmentation/a_b", "segmentation/a_b_", "segmentation/_2"]
    assert [topic for topic, _ in label_infos(specs)] == ["label_info/a_b", "label_info/a_b_", "label_info/_2"]


def test_label_names_count_where_there_are_none() -> None:
    ((topic, message),) = label_infos([OutputSpec("s", "semseg", 2)])
    assert topic == "label_info" and isinstance(message, LabelInfoMessage) and message.classes == ("0", "1")


# Images in: case R2 and R3


def padded(step: int, cut: int = 0) -> ImageMessage:
    """4 rows of 5 rgb8 pixels whose values count up, in rows of `step` bytes; `cut` bytes are missing at the end."""
    rows = np.full((4, step), 99, np.uint8)
    rows[:, :15] = np.arange(60, dtype=np.uint8).reshape(4, 15)[:, : min(step, 15)]
    return ImageMessage(4, 5, "rgb8", step, rows.tobytes()[: 4 * step - cut], stamp_ns=5, frame_id="f")


def test_row_padding_is_left_out_and_the_frame_owns_its_pixels() -> None:
    message = padded(16)
    frame = to_frame(message, "/cam", log_ns=1_000_005)
    assert frame.data.ravel().tolist() == list(range(60)) and frame.data.flags.c_contiguous
    assert (frame.encoding, frame.stamp_ns, frame.frame_id, frame.source, frame.age_ms) == ("rgb8", 5, "f", "/cam", 1.0)


def test_a_frame_does_not_change_with_its_message() -> None:
    data = np.zeros(60, np.uint8)
    frame = to_frame(ImageMessage(4, 5, "rgb8", 15, data))
    data[:] = 7
    assert not frame.data.any()


def test_a_step_too_small_and_cut_data_are_refused() -> None:
    short = ImageMessage(4, 5, "rgb8", 14, bytes(60))
    for message, words in ((short, "step 14"), (padded(16, cut=1), "63 bytes, 4 rows of step 16")):
        with pytest.raises(InputError, match=words):
            to_frame(message)


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (2**31, 2**31), (-1, 4)])
def test_an_impossible_size_is_refused(height: int, width: int) -> None:
    with pytest.raises(InputError, match="malformed"):
        to_frame(ImageMessage(height, width, "mono8", max(width, 0), bytes(16)))


def test_an_unknown_encoding_is_refused_not_guessed() -> None:
    with pytest.raises(InputError, match="unknown encoding 'rgb'"):
        to_frame(ImageMessage(1, 1, "rgb", 3, bytes(3)))


@pytest.mark.parametrize("big", [False, True])
def test_16_bits_come_in_this_machines_order(big: bool) -> None:
    data = np.array([[1, 515]], ">u2" if big else "<u2").tobytes()
    assert to_array(ImageMessage(1, 2, "16UC1", 4, data, big)).tolist() == [[1, 515]]
    assert image_message(np.zeros((1, 1), np.uint16), "16UC1").is_bigendian == (sys.byteorder == "big")


def test_yuv_keeps_its_layout() -> None:
    assert to_frame(ImageMessage(4, 6, "nv12", 8, bytes(48))).data.shape == (6, 6)
    assert to_frame(ImageMessage(4, 6, "yuv422_yuy2", 12, bytes(48))).data.shape == (4, 6, 2)
    assert image_message(np.zeros((6, 6), np.uint8), "nv12").height == 4


# Compressed images

RED = np.zeros((8, 8, 3), np.uint8) + np.array([250, 10, 20], np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_compressed_colours_are_what_they_were(kind: str) -> None:
    frame = to_frame(CompressedImageMessage(**bags.compressed(RED, kind, kind.lower()), stamp_ns=9))
    assert (frame.encoding, frame.stamp_ns) == ("rgb8", 9)
    assert np.abs(frame.data.astype(int) - RED).max() <= (0 if kind == "PNG" else 4)


def test_an_encoder_of_bgr_that_was_given_rgb_is_undone() -> None:
    # image_transport marks it with "compressed rgb8": what the file calls blue was red.
    swapped = CompressedImageMessage(**bags.compressed(RED[..., ::-1], "PNG", "rgb8; png compressed rgb8"))
    assert np.array_equal(to_frame(swapped).data, RED)


def test_grey_stays_grey() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    frame = to_frame(CompressedImageMessage(**bags.compressed(grey, "PNG", "mono8; png compressed ")))
    assert frame.encoding == "mono8" and np.array_equal(frame.data, grey)
    deep = to_frame(CompressedImageMessage(**bags.compressed(grey.astype(np.uint16) * 1000, "PNG", "mono16; png")))
    assert deep.encoding == "mono16" and deep.data[7, 7] == 63000


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_cut_data_are_refused(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    good = bags.compressed(noise, kind)
    for keep in (0, 5, 60, len(good["data"]) // 2):
        with pytest.raises(DataError, match=r"damaged|neither PNG nor JPEG"):
            to_frame(CompressedImageMessage(good["format"], good["data"][:keep]))


def test_compressed_depth_and_other_formats_are_refused() -> None:
    with pytest.raises(DataError, match="depth image"):
        to_frame(CompressedImageMessage("16UC1; compressedDepth png", b"\0" * 12))
    with pytest.raises(DataError, match="neither PNG nor JPEG"):
        to_frame(CompressedImageMessage(**bags.compressed(RED, "GIF", "gif")))


def test_scores_name_their_labels() -> None:
    message = ScoresMessage(("a", "b"), (0.5, 0.5), 3, "f")
    assert message.as_json() == {"stamp_ns": 3, "frame_id": "f", "scores": {"a": 0.5, "b": 0.5}}
