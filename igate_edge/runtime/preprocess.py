"""Camera frame -> network input. One Preprocess, from the bundle, serves calibration, golden and live frames."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..contract import Preprocess
from ..errors import InputError

#: How a frame comes to the network's size: as training does it; whole, with borders; its middle, without borders.
FITS = ("stretch", "letterbox", "crop")
#: Of each target index: two source indices and the share of the second.
Taps = tuple[np.ndarray, np.ndarray, np.ndarray]


def check_frame(frame: Any) -> np.ndarray:
    """Return `frame` when it is a uint8 RGB image [H,W,3]; else raise InputError that says how to make it one."""
    if not isinstance(frame, np.ndarray):
        raise InputError("a frame must be a numpy array", f"got {type(frame).__name__}", "call np.asarray(frame) first")
    if frame.dtype != np.uint8:
        fix = "pass uint8 RGB in 0..255; scaling and normalising happen inside"
        if frame.dtype.kind == "f":
            fix += ": for a float frame in 0..1 use (frame * 255).round().astype(np.uint8)"
        raise InputError("a frame must be uint8", f"got {frame.dtype} of shape {frame.shape}", fix)
    if frame.ndim == 3 and frame.shape[2] == 3 and frame.size:
        return frame
    fixes = {
        "grey": "repeat the grey channel: np.repeat(frame.reshape(*frame.shape[:2], 1), 3, axis=2)",
        "rgba": "drop alpha: frame[..., :3]",
        "batch": "pass one frame at a time",
        "chw": "put channels last: frame.transpose(1, 2, 0)",
        "empty": "check the camera or the crop: a frame has at least 1x1 pixels",
        "other": "pass height x width x 3, channels last, RGB order",
    }
    raise InputError("a frame must have shape [H,W,3]", f"got {list(frame.shape)}", fixes[_what(frame.shape)])


def _what(shape: tuple[int, ...]) -> str:
    if 0 in shape:
        return "empty"
    if len(shape) == 2 or (len(shape) == 3 and shape[2] == 1):
        return "grey"
    if len(shape) == 3 and shape[2] == 4:
        return "rgba"
    if len(shape) == 3 and shape[0] == 3:
        return "chw"
    return "batch" if len(shape) == 4 else "other"


def to_input(frame: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """uint8 RGB [H,W,3], any size and strides -> float32 [1,3,height,width]; raises InputError for anything else.

    >>> white = np.full((2, 2, 3), 255, np.uint8)
    >>> to_input(white, Preprocess(1, 1, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))).ravel().tolist()
    [1.0, 1.0, 1.0]
    """
    return _normalised(resize_frame(frame, (preprocess.height, preprocess.width)), preprocess)


def _normalised(image: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    mean = np.asarray(preprocess.mean, np.float32)[:, None, None]
    std = np.asarray(preprocess.std, np.float32)[:, None, None]
    scaled = np.multiply(image, np.float32(1 / 255), order="C")
    scaled -= mean
    scaled /= std
    return scaled[None]


def to_network_size(frame: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """uint8 RGB [H,W,3] -> uint8 RGB [height,width,3]: the same resize, rounded: how golden frames are stored."""
    return to_size(frame, (preprocess.height, preprocess.width))


def to_size(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 RGB [H,W,3] -> an owned uint8 RGB [*size,3] by the same resize, rounded."""
    return to_picture(resize_frame(frame, size))


def to_picture(planes: np.ndarray) -> np.ndarray:
    """float32 [3,h,w] of 0..255 -> an owned uint8 RGB [h,w,3], rounded."""
    return np.ascontiguousarray(np.rint(planes).astype(np.uint8).transpose(1, 2, 0))


@dataclass(frozen=True)
class Fit:
    """window: (top, left, height, width) of the frame that is looked at, pixels; place: where it lies on the network's
    input; canvas: the input's (height, width). Beyond `place` the input is padded with the mean colour."""

    window: tuple[int, int, int, int]
    place: tuple[int, int, int, int]
    canvas: tuple[int, int]

    @property
    def part(self) -> tuple[float, float, float, float] | None:
        """`place` in shares of the canvas; None when it is all of it."""
        top, left, height, width = self.place
        if (height, width) == self.canvas:
            return None
        return top / self.canvas[0], left / self.canvas[1], height / self.canvas[0], width / self.canvas[1]


@lru_cache(maxsize=64)
def fit_of(mode: str, size: tuple[int, int], preprocess: Preprocess) -> Fit:
    """Where a frame of `size` = (H, W) lies on the network's input; mode: one of FITS, else raises InputError.

    >>> fit_of("letterbox", (100, 200), Preprocess(64, 64)).place
    (16, 0, 32, 64)
    >>> fit_of("crop", (100, 200), Preprocess(64, 64)).window
    (0, 50, 100, 100)
    """
    canvas = preprocess.height, preprocess.width
    ratios = canvas[0] / size[0], canvas[1] / size[1]
    window, place = size, canvas
    if mode == "letterbox":
        place = _shrunk(canvas, size, min(ratios))
    elif mode == "crop":
        window = _shrunk(size, canvas, 1 / max(ratios))
    elif mode != "stretch":
        raise InputError("a frame has no such fit", f"got {mode!r:.40}", f"use {', '.join(FITS)}")
    return Fit(_middle(window, size), _middle(place, canvas), canvas)


def _shrunk(most: tuple[int, int], size: tuple[int, int], scale: float) -> tuple[int, int]:
    """`size` times `scale`, from 1 pixel to `most`."""
    return min(most[0], max(1, round(size[0] * scale))), min(most[1], max(1, round(size[1] * scale)))


def _middle(part: tuple[int, int], whole: tuple[int, int]) -> tuple[int, int, int, int]:
    return (whole[0] - part[0]) // 2, (whole[1] - part[1]) // 2, part[0], part[1]


def to_canvas(planes: np.ndarray, fit: Fit, preprocess: Preprocess) -> np.ndarray:
    """The looked-at pixels at the size of `fit.place`, float32 [3,h,w] -> the network's input [1,3,height,width]."""
    top, left, height, width = fit.place
    inner = _normalised(planes, preprocess)
    if (height, width) == fit.canvas:
        return inner
    canvas = np.zeros((1, 3, *fit.canvas), np.float32)
    canvas[:, :, top : top + height, left : left + width] = inner
    return canvas


def resize_frame(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 RGB [H,W,3] -> float32 [3,*size]: the numbers of `resize`, faster where a frame shrinks to under a half."""
    planes = check_frame(frame).transpose(2, 0, 1)
    if 2 * size[1] >= frame.shape[1]:
        return resize(planes, size)
    (low, high, share), (left, right, part) = taps(frame.shape[0], size[0]), taps(frame.shape[1], size[1])
    # Only the values that are mixed are read and made floats; by single values, planes come without a transposition.
    columns = np.concatenate([left, right]) * 3 + np.arange(3)[:, None]
    top, rows = (_values(frame, index, columns) for index in (low, high))
    rows -= top
    rows *= share[:, None, None]
    rows += top
    first, second = rows[:, :, : size[1]], rows[:, :, size[1] :]
    second -= first
    second *= part
    second += first
    return second.transpose(1, 0, 2)


def _values(frame: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """float32 [rows,3,n]: of some rows the values at `columns`, [3,n] places in a row of values."""
    return frame[rows].reshape(len(rows), -1).take(columns, 1).astype(np.float32)


def resize(planes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear resize of [C,H,W] to float32 [C,*size]: half-pixel centres, no antialias.

    The same numbers as torch.nn.functional.interpolate(mode="bilinear", align_corners=False).

    >>> resize(np.array([[[0.0, 4.0]]]), (1, 4)).tolist()
    [[[0.0, 1.0, 3.0, 4.0]]]
    """
    if planes.shape[1:] == tuple(size):
        return planes.astype(np.float32)
    low, high, share = taps(planes.shape[1], size[0])
    top = planes[:, low].astype(np.float32)
    rows = top + share[:, None] * (planes[:, high] - top)
    low, high, share = taps(planes.shape[2], size[1])
    left = rows[:, :, low]
    return left + share * (rows[:, :, high] - left)


@lru_cache(maxsize=64)
def taps(
    source: int, target: int, start: float = 0.0, length: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How each target index mixes the source's values; in float32, as torch computes it.

    start, length: the part of the source that is resized, in shares of it.
    """
    half, scale, offset = np.float32(0.5), np.float32(length * source / target), np.float32(start * source - 0.5)
    centre = np.maximum((np.arange(target, dtype=np.float32) + half) * scale + offset, np.float32(0))
    low = np.minimum(centre.astype(np.int64), source - 1)
    high = np.minimum(low + 1, source - 1)
    found = low, high, (centre - low).astype(np.float32)
    for array in found:
        array.setflags(write=False)
    return found
