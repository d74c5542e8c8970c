"""What a robot saw, as one picture: class colours over the image, or depth or normals where there are no classes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..contract import is_number
from ..errors import InputError
from .frame import Result
from .preprocess import check_frame


def overlay(result: Result, alpha: float = 0.5) -> np.ndarray:
    """A result's first class image over its picture as an owned uint8 RGB [H,W,3]; alpha: the colours' share, 0..1.

    Without classes depth (near to far, invalid pixels grey) or an edge map is shown, else normals, else the picture.
    """
    images = [answer for answer in result.outputs.values() if answer.ndim >= 2]
    for answer in images:
        if answer.dtype == np.uint8:
            return colour_overlay(result.image, answer, alpha)
    from ..reports.pictures import depth_map, depth_range, normal_map

    for answer in images:
        if answer.ndim == 2:
            return depth_map(answer, depth_range(answer[::4, ::4]))
    return normal_map(images[0]) if images else result.image.copy()


def colour_overlay(
    image: np.ndarray,
    classes: np.ndarray,
    alpha: float = 0.5,
    colours: Mapping[int, tuple[int, int, int]] | None = None,
    ignore: int = 255,
) -> np.ndarray:
    """Class numbers uint8 [H,W] as colours over uint8 RGB [H,W,3]; pixels of the class `ignore` stay as they are.

    colours: class -> RGB, None = the package's palette. Raises InputError for what does not fit together.

    >>> grey, classes = np.full((1, 2, 3), 100, np.uint8), np.array([[3, 255]], np.uint8)
    >>> colour_overlay(grey, classes, 0.5, {3: (200, 0, 0)}).tolist()
    [[[150, 50, 50], [100, 100, 100]]]
    """
    _check(image, classes, alpha)
    table = np.zeros((256, 3), np.float32)
    if colours is None:
        from ..reports.pictures import palette

        table[:] = palette()[np.arange(256) % len(palette())]
    else:
        for index, colour in colours.items():
            if index not in range(256) or len(colour) != 3 or not all(0 <= level <= 255 for level in colour):
                raise InputError("not a colour of a class", f"{index!r:.20}: {colour!r:.40}", "use 0..255: (r, g, b)")
            table[index] = colour
    shades = np.rint(np.arange(256, dtype=np.float32) * (1 - alpha)).astype(np.uint8)
    tint = (table * alpha).astype(np.uint8)  # rounded down, so that the sum of both never passes 255
    if 0 <= ignore < 256:
        tint[ignore] = 0
    picture = shades.take(image)
    if 0 <= ignore < 256:
        np.copyto(picture, image, where=(classes == ignore)[..., None])
    picture += tint.take(classes, axis=0)
    return picture


def _check(image: np.ndarray, classes: np.ndarray, alpha: float) -> None:
    size = check_frame(image).shape[:2]
    if not isinstance(classes, np.ndarray) or classes.dtype != np.uint8 or classes.shape != size:
        got = f"{classes.dtype} {list(classes.shape)}" if isinstance(classes, np.ndarray) else type(classes).__name__
        raise InputError("no class numbers of this image", f"got {got}", f"pass uint8 {list(size)}")
    if not is_number(alpha) or not 0 <= alpha <= 1:
        raise InputError("not a share of the colours", f"alpha {alpha!r:.40}", "pass a number from 0 to 1")
