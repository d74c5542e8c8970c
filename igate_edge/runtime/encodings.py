"""Pixel encodings of cameras -> uint8 RGB. An encoding is always named, never guessed.

Names are those of sensor_msgs. Layouts: rgb8 and the like uint8 [H,W,C]; mono8 uint8 and mono16 uint16 [H,W] or
[H,W,1]; rgb16, bgr16 uint16 [H,W,3]; yuv422 (bytes U Y V Y; also "uyvy") and yuv422_yuy2 (Y U Y V; also "yuyv")
uint8 [H,W,2]; nv12, nv21 uint8 [H*3/2,W], luma rows above chroma rows. Any strides: `strided` makes a view of padded
rows. YUV is BT.601 of video range, as OpenCV and cv_bridge take it; 16 bits are the full range 0..65535.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InputError
from .frame import Frame

#: Images with more pixels than this are refused: a damaged message may claim any size.
MAX_PIXELS = 64_000_000
_U1, _U2 = np.dtype(np.uint8), np.dtype(np.uint16)
#: Encoding -> type of a value, values a pixel (0: luma and chroma planes).
ENCODINGS: dict[str, tuple[np.dtype, int]] = {
    "rgb8": (_U1, 3),
    "bgr8": (_U1, 3),
    "rgba8": (_U1, 4),
    "bgra8": (_U1, 4),
    "mono8": (_U1, 1),
    "8UC1": (_U1, 1),
    "rgb16": (_U2, 3),
    "bgr16": (_U2, 3),
    "mono16": (_U2, 1),
    "16UC1": (_U2, 1),
    "yuv422": (_U1, 2),
    "uyvy": (_U1, 2),
    "yuv422_yuy2": (_U1, 2),
    "yuyv": (_U1, 2),
    "nv12": (_U1, 0),
    "nv21": (_U1, 0),
}
#: Order of the bytes of two pixels: where the first luma, U and V are.
_PACKED = {"yuv422": (1, 0, 2), "uyvy": (1, 0, 2), "yuv422_yuy2": (0, 1, 3), "yuyv": (0, 1, 3)}


class Refused(InputError):
    """A frame that cannot be taken; `reason` is what it is counted as: "encoding", "type" or "size"."""

    def __init__(self, reason: str, cause: str, evidence: str, fix: str) -> None:
        super().__init__(cause, evidence, fix)
        self.reason = reason


def check(frame: Frame) -> tuple[int, int]:
    """(H, W) of a frame's picture; raises Refused (an InputError) unless data, type and encoding agree.

    >>> check(Frame(np.zeros((6, 8), np.uint8), "nv12"))
    (4, 8)
    """
    if not isinstance(frame, Frame) or type(frame.stamp_ns) is not int or type(frame.received_ns) is not int:
        raise Refused("type", "not a frame", f"got {frame!r:.60}", "pass a Frame; its times are whole nanoseconds")
    data, encoding = frame.data, frame.encoding
    known = ENCODINGS.get(encoding) if isinstance(encoding, str) else None
    if known is None:
        fix = f"name one of {', '.join(ENCODINGS)}"
        raise Refused("encoding", "the frame's encoding is not known", f"got {encoding!r:.40}", fix)
    kind, channels = known
    # Either byte order of 16 bits is fine; floats are not, whatever they are called.
    if not isinstance(data, np.ndarray) or data.dtype.newbyteorder("=") != kind:
        got = _described(data)
        fix = f"pass {kind} pixels; scale floats yourself, as only you know their range"
        raise Refused("type", f"a {encoding} frame holds other values", got, fix)
    shape = data.shape
    if len(shape) == 3 and shape[2] == 1 and channels == 1:
        shape = shape[:2]
    whole = shape[2:] == (channels,) if channels > 1 else len(shape) == 2
    height, width = (*shape, 0, 0)[:2]
    if channels == 0:
        whole, height = whole and height % 3 == 0 and width % 2 == 0, height * 2 // 3
        whole = whole and height % 2 == 0
    if encoding in _PACKED:
        whole = whole and width % 2 == 0
    if not whole or not 0 < height * width <= MAX_PIXELS:
        fix = "send whole frames: the picture was cut, is empty, or has another layout"
        raise Refused("size", f"a {encoding} frame has no such shape", f"got {list(data.shape)}", fix)
    return height, width


def _described(data: Any) -> str:
    if not isinstance(data, np.ndarray):
        return f"got {type(data).__name__}"
    text = f"got {data.dtype} {list(data.shape)}"
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        text += f", {int(np.count_nonzero(~np.isfinite(data)))} of its values are NaN or infinite"
    return text


def strided(buffer: Any, height: int, width: int, step: int, encoding: str, big_endian: bool = False) -> np.ndarray:
    """A view of `height` rows, `step` bytes apart, in a flat buffer, without their padding; nothing is copied.

    Raises Refused when the buffer is shorter than height * step, or step shorter than a row.

    >>> strided(bytes([1, 2, 99, 3, 4, 99]), 2, 2, 3, "mono8").tolist()
    [[1, 2], [3, 4]]
    """
    if not isinstance(encoding, str) or encoding not in ENCODINGS:
        fix = f"name one of {', '.join(ENCODINGS)}"
        raise Refused("encoding", "the frame's encoding is not known", f"got {encoding!r:.40}", fix)
    kind, channels = ENCODINGS[encoding]
    if not all(isinstance(value, int | np.integer) for value in (height, width, step)):
        evidence = f"{width!r:.20}x{height!r:.20}, step {step!r:.20}"
        raise Refused("size", "rows and bytes of a frame do not agree", evidence, "give whole numbers")
    try:
        flat = np.frombuffer(buffer, np.uint8) if len(buffer) else np.empty(0, np.uint8)
    except (TypeError, ValueError) as error:
        raise Refused("type", "a frame's bytes are no buffer", str(error), "pass bytes or a flat array") from error
    rows = height + height // 2 if channels == 0 else height
    used = width * max(channels, 1) * kind.itemsize
    if min(height, width) < 1 or height * width > MAX_PIXELS or step < used or len(flat) < rows * step:
        evidence = f"{width}x{height} {encoding}, step {step} (a row has {used} bytes), {len(flat)} bytes"
        raise Refused("size", "rows and bytes of a frame do not agree", evidence, "send whole frames and their step")
    shape: tuple[int, ...] = (rows, width) if channels < 2 else (rows, width, channels)
    strides = (step, kind.itemsize) if channels < 2 else (step, channels * kind.itemsize, kind.itemsize)
    order = kind.newbyteorder(">" if big_endian else "<") if kind.itemsize > 1 else kind
    return np.ndarray(shape, order, flat.data, strides=strides)


def to_rgb(frame: Frame, out: np.ndarray | None = None) -> np.ndarray:
    """The frame as uint8 RGB [H,W,3]; raises Refused as `check` does.

    An rgb8 frame comes back as it is (not copied) unless `out` is given: a uint8 [H,W,3] array that is written.

    >>> to_rgb(Frame(np.array([[[1, 2, 3]]], np.uint8), "bgr8")).tolist()
    [[[3, 2, 1]]]
    """
    height, width = check(frame)
    data, encoding = frame.data, frame.encoding
    if encoding == "rgb8" and out is None:
        return data
    if out is None:
        out = np.empty((height, width, 3), np.uint8)
    if data.dtype.itemsize == 2:
        data = _eight_bits(data)
    if encoding in _PACKED:
        _packed(data, _PACKED[encoding], out)
    elif encoding in ("nv12", "nv21"):
        _planar(data, height, encoding == "nv21", out)
    elif ENCODINGS[encoding][1] == 1:
        for target in range(3):
            out[..., target] = data.reshape(height, width)
    else:
        # A plane at a time: over a last axis of three numpy is several times slower.
        for target, source in enumerate((2, 1, 0) if encoding.startswith("bgr") else (0, 1, 2)):
            out[..., target] = data[..., source]
    return out


def _eight_bits(data: np.ndarray) -> np.ndarray:
    """0..65535 -> 0..255, rounded: a byte is 257 steps."""
    wide = data.astype(np.uint32)
    wide *= 255
    wide += 32895
    wide >>= 16
    return wide.astype(np.uint8)


def _packed(data: np.ndarray, order: tuple[int, int, int], out: np.ndarray) -> None:
    luma, u, v = order
    height, width = data.shape[:2]
    four = np.ascontiguousarray(data).reshape(height, width // 2, 4)
    _yuv(data[..., luma % 2], four[..., u], four[..., v], out)


def _planar(data: np.ndarray, height: int, swapped: bool, out: np.ndarray) -> None:
    chroma = data[height:].reshape(height // 2, data.shape[1] // 2, 2)
    u, v = chroma[..., 1 if swapped else 0], chroma[..., 0 if swapped else 1]
    _yuv(data[:height], u.repeat(2, 0), v.repeat(2, 0), out)


def _table(offset: int, factor: float, half: int = 0) -> np.ndarray:
    """A byte's share of a colour in steps of 1/32: so fine that any sum of three still fits in 16 bits."""
    return np.rint((np.arange(256) - offset) * factor * 32 + half).astype(np.int16)


#: BT.601 with luma 16..235 and chroma 16..240; the half step rounds.
_LUMA = _table(16, 255 / 219, half=16)
_RED_V, _BLUE_U = _table(128, 1.402 * 255 / 224), _table(128, 1.772 * 255 / 224)
_GREEN_U, _GREEN_V = _table(128, -0.344136 * 255 / 224), _table(128, -0.714136 * 255 / 224)


def _yuv(luma: np.ndarray, u: np.ndarray, v: np.ndarray, out: np.ndarray) -> None:
    """Luma [H,W] with chroma of half the width [H,W/2] -> RGB."""
    height, half = u.shape
    bright = _LUMA.take(luma).reshape(height, half, 2)
    total, pixels = np.empty_like(bright), out.reshape(height, half, 2, 3)
    for colour, chroma in enumerate((_RED_V.take(v), _GREEN_U.take(u) + _GREEN_V.take(v), _BLUE_U.take(u))):
        # Twice on every other pixel: broadcasting over a last axis of two is several times slower.
        np.add(bright[..., 0], chroma, out=total[..., 0])
        np.add(bright[..., 1], chroma, out=total[..., 1])
        np.right_shift(total, 5, out=total)
        np.clip(total, 0, 255, out=total)
        pixels[..., colour] = total
