"""Every encoding gives the same RGB for the same scene; padded rows, cut frames and unnamed encodings are seen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from igate_edge.errors import InputError
from igate_edge.runtime.encodings import ENCODINGS, Refused, check, strided, to_rgb
from igate_edge.runtime.frame import Frame

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 6, 8


def yuv_of(red: int, green: int, blue: int) -> tuple[int, int, int]:
    """BT.601 of video range, from its definition."""
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    u, v = 112 / 0.886 * (blue - luma) / 255 + 128, 112 / 0.701 * (red - luma) / 255 + 128
    return round(16 + 219 * luma / 255), round(u), round(v)


def packed(order: str) -> Callable[[tuple[int, int, int]], np.ndarray]:
    def make(colour: tuple[int, int, int]) -> np.ndarray:
        values = dict(zip("yuv", yuv_of(*colour), strict=True))
        return np.tile(np.array([values[c] for c in order], np.uint8), (HEIGHT, WIDTH // 2)).reshape(HEIGHT, WIDTH, 2)

    return make


def semi_planar(order: str) -> Callable[[tuple[int, int, int]], np.ndarray]:
    def make(colour: tuple[int, int, int]) -> np.ndarray:
        values = dict(zip("yuv", yuv_of(*colour), strict=True))
        out = np.full((HEIGHT * 3 // 2, WIDTH), values["y"], np.uint8)
        out[HEIGHT:, 0::2], out[HEIGHT:, 1::2] = values[order[0]], values[order[1]]
        return out

    return make


def plain(order: str, kind: type = np.uint8) -> Callable[[tuple[int, int, int]], np.ndarray]:
    def make(colour: tuple[int, int, int]) -> np.ndarray:
        values = {**dict(zip("rgb", colour, strict=True)), "a": 7}
        pixel = np.array([values[c] for c in order]) * (257 if kind is np.uint16 else 1)
        return np.tile(pixel.astype(kind), (HEIGHT, WIDTH, 1))

    return make


MAKERS = {
    "rgb8": plain("rgb"),
    "bgr8": plain("bgr"),
    "rgba8": plain("rgba"),
    "bgra8": plain("bgra"),
    "rgb16": plain("rgb", np.uint16),
    "bgr16": plain("bgr", np.uint16),
    "yuv422": packed("uyvy"),
    "uyvy": packed("uyvy"),
    "yuv422_yuy2": packed("yuyv"),
    "yuyv": packed("yuyv"),
    "nv12": semi_planar("uv"),
    "nv21": semi_planar("vu"),
}
GREY = {"mono8", "8UC1", "mono16", "16UC1"}


def test_every_encoding_is_tested() -> None:
    assert set(MAKERS) | GREY == set(ENCODINGS)


@pytest.mark.parametrize("encoding", MAKERS)
@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (180, 90, 30)])
def test_a_colour_is_the_same_in_every_encoding(encoding: str, colour: tuple[int, int, int]) -> None:
    """Pure red is red whatever the camera calls it (cases R3)."""
    frame = Frame(MAKERS[encoding](colour), encoding)
    assert check(frame) == (HEIGHT, WIDTH)
    rgb = to_rgb(frame)
    assert rgb.shape == (HEIGHT, WIDTH, 3) and rgb.dtype == np.uint8
    exact = not encoding.startswith(("yuv", "uyvy", "yuyv", "nv"))
    assert np.abs(rgb.astype(int) - colour).max() <= (0 if exact else 2)  # a byte of chroma is two steps of a colour
    out = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    assert to_rgb(frame, out) is out and np.array_equal(out, rgb)


@pytest.mark.parametrize("encoding", ["yuv422", "yuv422_yuy2", "nv12", "nv21"])
def test_yuv_equals_the_formula_for_all_values(encoding: str) -> None:
    height, width = 64, 64
    if encoding.startswith("nv"):
        data = RNG.integers(0, 256, (height * 3 // 2, width), np.uint8)
        pair = data[height:].reshape(height // 2, width // 2, 2).repeat(2, 0).repeat(2, 1).astype(float)
        luma, (u, v) = data[:height].astype(float), (pair[..., 0], pair[..., 1])
        if encoding == "nv21":
            u, v = v, u
    else:
        data = RNG.integers(0, 256, (height, width, 2), np.uint8)
        first = 1 if encoding == "yuv422" else 0
        luma, chroma = data[..., first].astype(float), data[..., 1 - first].astype(float)
        u, v = chroma[:, 0::2].repeat(2, 1), chroma[:, 1::2].repeat(2, 1)
    y = (luma - 16) * 255 / 219
    r, b = y + 1.402 * 255 / 224 * (v - 128), y + 1.772 * 255 / 224 * (u - 128)
    g = y - (0.114 * 1.772 * (u - 128) + 0.299 * 1.402 * (v - 128)) / 0.587 * 255 / 224
    want = np.clip(np.stack([r, g, b], axis=2), 0, 255)
    assert np.abs(to_rgb(Frame(data, encoding)) - want).max() <= 0.6


@pytest.mark.parametrize(("encoding", "name"), [("nv12", "nv12"), ("yuv422", "uyvy422"), ("yuv422_yuy2", "yuyv422")])
def test_yuv_agrees_with_ffmpeg(encoding: str, name: str) -> None:
    """FFmpeg writes the frame, we read it: its layout and its colours are the ones that cameras have."""
    av = pytest.importorskip("av", reason="NOT TESTED: PyAV is missing, pip install 'igate-edge[video]'")
    y, x = np.mgrid[0:48, 0:64]
    scene = np.stack([x * 3, y * 4, 255 - x * 2], axis=2).astype(np.uint8)
    picture = av.VideoFrame.from_ndarray(scene, format="rgb24").reformat(format=name, dst_colorspace="ITU601")
    planes = [np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size) for plane in picture.planes]
    data = np.vstack([plane[:, :64] for plane in planes]) if encoding == "nv12" else None
    if data is None:
        data = planes[0][:, :128].reshape(48, 64, 2)
    off = np.abs(to_rgb(Frame(data, encoding)).astype(int) - scene)
    assert np.median(off) <= 2 and off.max() <= 8  # neighbours share their chroma


@pytest.mark.parametrize("encoding", sorted(GREY))
def test_grey_is_spread_over_all_its_bits(encoding: str) -> None:
    steps = np.arange(256).reshape(16, 16)
    kind, factor = (np.uint16, 257) if "16" in encoding else (np.uint8, 1)
    for data in ((steps * factor).astype(kind), (steps * factor).astype(kind)[..., None]):
        assert np.array_equal(to_rgb(Frame(data, encoding)), steps[..., None].repeat(3, 2))


def test_16_bits_are_rounded_and_either_byte_order_is_fine() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    want = np.rint(values / 257).astype(np.uint8)
    for data in (values, values.astype(">u2")):
        assert np.array_equal(to_rgb(Frame(data, "mono16"))[..., 1], want)


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_padded_rows_give_the_pixels_without_padding(encoding: str) -> None:
    """Rows of a driver's buffer end with bytes that are no pixels (cases R2)."""
    kind, channels = ENCODINGS[encoding]
    rows = HEIGHT * 3 // 2 if channels == 0 else HEIGHT
    used = WIDTH * max(channels, 1) * kind.itemsize
    step = used + 10  # a step of 10 more is no multiple of the pixel's size
    raw = RNG.integers(0, 256, (rows, step), np.uint8)
    view = strided(raw.tobytes(), HEIGHT, WIDTH, step, encoding)
    tight = np.ascontiguousarray(raw[:, :used]).reshape(-1).view(kind.newbyteorder("<")).reshape(view.shape)
    assert np.array_equal(view, tight) and view.strides[0] == step
    assert np.array_equal(to_rgb(Frame(view, encoding)), to_rgb(Frame(tight, encoding)))
    for wrong, length in ((used - 1, rows * step), (step, rows * step - 1)):
        with pytest.raises(InputError, match="rows and bytes of a frame do not agree"):
            strided(raw.reshape(-1)[:length], HEIGHT, WIDTH, wrong, encoding)


def test_big_endian_rows() -> None:
    view = strided(bytes([1, 0, 2, 0]), 1, 2, 4, "mono16", big_endian=True)
    assert view.tolist() == [[256, 512]] and to_rgb(Frame(view, "mono16"))[0, :, 0].tolist() == [1, 2]


def test_an_encoding_is_never_guessed() -> None:
    for name in ("8UC3", "RGB8", "bayer_rggb8", "", None, 3):
        with pytest.raises(Refused, match="the frame's encoding is not known") as error:
            check(Frame(np.zeros((2, 2, 3), np.uint8), name))  # type: ignore[arg-type]
        assert error.value.reason == "encoding"
    with pytest.raises(Refused, match="encoding is not known"):
        strided(b"abc", 1, 1, 3, "8UC3")


def test_odd_sizes_have_no_shared_chroma() -> None:
    for data, encoding in ((np.zeros((4, 3, 2), np.uint8), "yuv422"), (np.zeros((3, 3), np.uint8), "nv12")):
        with pytest.raises(Refused, match="no such shape"):
            check(Frame(data, encoding))
    with pytest.raises(Refused, match="do not agree"):
        strided(b"", 10**6, 10**6, 10**6, "mono8")


def test_rgb_is_passed_on_and_strides_do_not_matter() -> None:
    data = RNG.integers(0, 256, (12, 16, 3), np.uint8)
    assert to_rgb(Frame(data, "rgb8")) is data
    assert np.array_equal(to_rgb(Frame(data[::-1, ::2], "bgr8")), data[::-1, ::2, ::-1])


@pytest.mark.parametrize(
    "change",
    [
        {"height": -2, "width": -2},
        {"height": None},
        {"width": 2.0},
        {"step": float("nan")},
        {"buffer": None},
        {"buffer": "text"},
        {"encoding": []},
        {"height": 10**9, "width": 10**9, "step": 10**9},
    ],
)
def test_rows_that_are_none_are_refused(change: dict[str, object]) -> None:
    good = {"buffer": bytes(6), "height": 2, "width": 2, "step": 3, "encoding": "mono8"}
    with pytest.raises(Refused):
        strided(**(good | change))  # type: ignore[arg-type]
