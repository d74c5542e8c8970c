"""Image files as users have them: good ones read alike, bad ones named."""

from __future__ import annotations

import os
import struct
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igate_edge.errors import DataError
from igate_edge.frames import read_16bit, read_frames, read_ids, read_image, read_rgb_label

RGB = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def _save(path: Path, array: np.ndarray = RGB, mode: str | None = None) -> Path:
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path)
    return path


def _png(path: Path, width: int, height: int, depth: int, colour: int, rows: bytes) -> Path:
    """A PNG by hand, for kinds that Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


def test_read_image_gives_rgb_for_every_8_bit_kind(tmp_path) -> None:
    assert np.array_equal(read_image(_save(tmp_path / "a.png")), RGB)
    rgba = np.concatenate([RGB, np.full((4, 6, 1), 7, np.uint8)], 2)
    assert np.array_equal(read_image(_save(tmp_path / "b.png", rgba)), RGB)
    grey = read_image(_save(tmp_path / "c.png", RGB[..., 0]))
    assert np.array_equal(grey, np.repeat(RGB[..., :1], 3, 2))
    assert read_image(_save(tmp_path / "d.jpg")).shape == (4, 6, 3)
    assert np.array_equal(read_image(_save(tmp_path / "e.bmp")), RGB)


def test_read_image_obeys_the_rotation_mark(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.rot90(RGB, -1))


def test_read_frames_takes_a_file_a_folder_and_a_pattern(tmp_path) -> None:
    for name in ("b.png", "a.JPG", "c.bmp"):
        Image.fromarray(RGB).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._b.png").write_bytes(b"helper of another program")
    assert [name for name, _ in read_frames(tmp_path)] == ["a.JPG", "b.png", "c.bmp"]
    assert [name for name, _ in read_frames(str(tmp_path / "*.png"))] == ["b.png"]
    ((name, frame),) = read_frames(tmp_path / "b.png")
    assert name == "b.png" and frame.dtype == np.uint8 and np.array_equal(frame, RGB)


def test_read_frames_refuses_nothing_to_read_at_once(tmp_path) -> None:
    with pytest.raises(DataError, match="no image in the folder"):
        read_frames(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        read_frames(tmp_path / "absent")
    with pytest.raises(DataError, match="no file fits the pattern"):
        read_frames(str(tmp_path / "*.png"))
    (tmp_path / "train" / "image").mkdir(parents=True)
    with pytest.raises(DataError, match=r"Fix: pass .*train/image"):
        read_frames(tmp_path)


def test_an_unreadable_frame_is_named_after_the_good_ones(tmp_path) -> None:
    _save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    frames = read_frames(tmp_path)
    assert next(frames)[0] == "a.png"
    with pytest.raises(DataError, match=r"corrupt image .*b\.png: 0 bytes"):
        next(frames)


@pytest.mark.parametrize("keep", [8, 20, 40, 60, -12], ids=lambda n: f"first {n} bytes")
def test_a_cut_png_is_corrupt(tmp_path, keep) -> None:
    path = tmp_path / "a.png"
    _save(path, np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:keep] if keep > 0 else path.read_bytes()[: len(path.read_bytes()) // 2])
    with pytest.raises(DataError, match=r"corrupt image .*a\.png"):
        read_image(path)


def test_a_flipped_byte_in_a_png_is_corrupt(tmp_path) -> None:
    path = _save(tmp_path / "a.png")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match="corrupt image"):
        read_image(path)


@pytest.mark.parametrize("side", [10_000, 100_000], ids=["refused by us", "refused by Pillow"])
def test_a_decompression_bomb_is_refused_undecoded(tmp_path, side) -> None:
    path = _png(tmp_path / "bomb.png", side, side, 8, 2, b"")
    warned = pytest.warns(Image.DecompressionBombWarning) if side == 10_000 else nullcontext()
    with warned, pytest.raises(DataError, match=r"bomb\.png is too large"):
        read_image(path)
    assert path.stat().st_size < 100


def test_16_bit_images_are_not_frames(tmp_path) -> None:
    with pytest.raises(DataError, match=r"not 8-bit.*depth image"):
        read_image(_save(tmp_path / "a.png", np.full((4, 6), 1000, np.uint16)))
    rows = (b"\x00" + b"\x12\x34" * 9) * 2
    with pytest.raises(DataError, match="not 8-bit"):
        read_image(_png(tmp_path / "b.png", 3, 2, 16, 2, rows))


def test_black_and_white_is_a_picture_and_lab_is_named(tmp_path) -> None:
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "bw.png")
    assert read_image(tmp_path / "bw.png").tolist() == [[[0] * 3, [255] * 3]]
    Image.new("LAB", (4, 4)).save(tmp_path / "lab.tif")
    with pytest.raises(DataError, match=r"not 8-bit RGB or grey: .*lab\.tif has mode LAB\. Fix"):
        read_image(tmp_path / "lab.tif")


def test_a_side_that_no_answer_can_have_is_refused_undecoded(tmp_path) -> None:
    with pytest.raises(DataError, match=r"wide\.png is too large: 65537x1 pixels"):
        read_image(_png(tmp_path / "wide.png", 65_537, 1, 8, 2, b""))


def test_what_is_no_image_is_shown_by_its_first_bytes(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"<html>no")
    with pytest.raises(DataError, match=r"a\.png: 8 bytes that start with b'<html>no'"):
        read_image(tmp_path / "a.png")


def test_labels_of_the_wrong_depth_are_named(tmp_path) -> None:
    deep = _save(tmp_path / "deep.png", np.full((4, 6), 1000, np.uint16))
    flat = _save(tmp_path / "flat.png", np.full((4, 6), 3, np.uint8))
    colour = _save(tmp_path / "colour.png")
    assert read_16bit(deep, "depth").dtype == np.uint16 and (read_16bit(deep, "depth") == 1000).all()
    assert (read_ids(flat, "semseg") == 3).all() and np.array_equal(read_rgb_label(colour, "normals"), RGB)
    for read, path in ((read_ids, deep), (read_ids, colour), (read_16bit, flat), (read_16bit, colour)):
        with pytest.raises(DataError, match=rf"depth label .*{path.name} is not"):
            read(path, "depth")
    for path in (deep, flat, _png(tmp_path / "wide.png", 3, 2, 16, 2, (b"\x00" + b"\x12\x34" * 9) * 2)):
        with pytest.raises(DataError, match=rf"{path.name} is not 8-bit RGB"):
            read_rgb_label(path, "normals")


def test_palette_labels_are_read_as_their_numbers(tmp_path) -> None:
    picture = Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8)).convert("P")
    picture.putpalette([k % 256 for k in range(768)])
    picture.save(tmp_path / "a.png")
    assert read_ids(tmp_path / "a.png", "semseg").tolist() == [[0, 1], [2, 255]]


def test_missing_forbidden_and_wrong_kinds_of_files_are_told_apart(tmp_path, monkeypatch) -> None:
    with pytest.raises(DataError, match=r"missing image: .*a\.png"):
        read_image(tmp_path / "a.png")
    with pytest.raises(DataError, match="cannot read the image"):
        read_image(tmp_path)
    path = _save(tmp_path / "b.png")

    def forbidden(self: Path) -> bytes:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(DataError, match=r"no permission to read the image .*b\.png"):
        read_image(path)
