"""Camera frame -> network input. One Preprocess, from the bundle, serves calibration, golden and live frames."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from ..contract import Preprocess
from ..errors import InputError


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
    planes = check_frame(frame).transpose(2, 0, 1)
    image = resize(planes, (preprocess.height, preprocess.width))
    mean = np.asarray(preprocess.mean, np.float32)[:, None, None]
    std = np.asarray(preprocess.std, np.float32)[:, None, None]
    return np.ascontiguousarray((image * np.float32(1 / 255) - mean) / std)[None]


def to_network_size(frame: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """uint8 RGB [H,W,3] -> uint8 RGB [height,width,3]: the same resize, rounded: how golden frames are stored."""
    image = resize(check_frame(frame).transpose(2, 0, 1), (preprocess.height, preprocess.width))
    return np.ascontiguousarray(np.rint(image).astype(np.uint8).transpose(1, 2, 0))


def resize(planes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear resize of [C,H,W] to float32 [C,*size]: half-pixel centres, no antialias.

    The same numbers as torch.nn.functional.interpolate(mode="bilinear", align_corners=False).

    >>> resize(np.array([[[0.0, 4.0]]]), (1, 4)).tolist()
    [[[0.0, 1.0, 3.0, 4.0]]]
    """
    if planes.shape[1:] == tuple(size):
        return planes.astype(np.float32)
    low, high, share = _taps(planes.shape[1], size[0])
    top = planes[:, low].astype(np.float32)
    rows = top + share[:, None] * (planes[:, high] - top)
    low, high, share = _taps(planes.shape[2], size[1])
    left = rows[:, :, low]
    return left + share * (rows[:, :, high] - left)


@lru_cache(maxsize=64)
def _taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each target index: the two source indices and the share of the second; in float32, as torch computes them."""
    half, scale = np.float32(0.5), np.float32(source / target)
    centre = np.maximum((np.arange(target, dtype=np.float32) + half) * scale - half, np.float32(0))
    low = np.minimum(centre.astype(np.int64), source - 1)
    high = np.minimum(low + 1, source - 1)
    taps = low, high, (centre - low).astype(np.float32)
    for array in taps:
        array.setflags(write=False)
    return taps
