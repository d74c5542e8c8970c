"""Camera intrinsics of resized, cropped and padded images; pixel centres are whole numbers, as in OpenCV and ROS."""

from __future__ import annotations

from dataclasses import replace

from .frame import Camera


def scaled(camera: Camera, width: int, height: int) -> Camera:
    """The camera of the same image resized to `width` x `height` by half-pixel centres, as `preprocess.resize` does.

    Focal lengths, skew and the baseline term of p scale; a centre c becomes (c + 0.5) * scale - 0.5. d and r stay.

    >>> half = scaled(Camera(4, 2, (8.0, 0.0, 1.5, 0.0, 8.0, 0.5, 0.0, 0.0, 1.0)), 2, 1)
    >>> half.width, half.k
    (2, (4.0, 0.0, 0.5, 0.0, 4.0, 0.0, 0.0, 0.0, 1.0))
    """
    x, y = width / camera.width, height / camera.height
    k, p = camera.k, camera.p
    k = (k[0] * x, k[1] * x, _centre(k[2], x), k[3] * y, k[4] * y, _centre(k[5], y), *k[6:]) if k else k
    if p:
        first = (p[0] * x, p[1] * x, _centre(p[2], x), p[3] * x)
        p = (*first, p[4] * y, p[5] * y, _centre(p[6], y), p[7] * y, *p[8:])
    return replace(camera, width=width, height=height, k=k, p=p)


def cropped(camera: Camera, left: int, top: int, width: int, height: int) -> Camera:
    """The camera of the part of the image that begins at (left, top); negative numbers pad on that side.

    >>> cropped(Camera(4, 2, (8.0, 0.0, 1.5, 0.0, 8.0, 0.5, 0.0, 0.0, 1.0)), 1, 0, 2, 2).k[2]
    0.5
    """
    k, p = list(camera.k), list(camera.p)
    for matrix, (column, row) in ((k, (2, 5)), (p, (2, 6))):
        if matrix:
            matrix[column] -= left
            matrix[row] -= top
    return replace(camera, width=width, height=height, k=tuple(k), p=tuple(p))


def _centre(value: float, scale: float) -> float:
    return (value + 0.5) * scale - 0.5


def pinhole(width: int, height: int, focal: float | None = None) -> Camera:
    """An ideal camera that looks straight ahead; focal length in pixels, None = the width (53 degrees wide).

    >>> pinhole(4, 2).k
    (4.0, 0.0, 1.5, 0.0, 4.0, 0.5, 0.0, 0.0, 1.0)
    """
    f, x, y = float(focal or width), (width - 1) / 2, (height - 1) / 2
    k = (f, 0.0, x, 0.0, f, y, 0.0, 0.0, 1.0)
    return Camera(width, height, k, p=(f, 0.0, x, 0.0, 0.0, f, y, 0.0, 0.0, 0.0, 1.0, 0.0))
