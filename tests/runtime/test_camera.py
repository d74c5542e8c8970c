"""A point in the world lands on the same thing after a resize, a crop or a border."""

from __future__ import annotations

import numpy as np
import pytest

from igate_edge.runtime.camera import cropped, pinhole, scaled
from igate_edge.runtime.frame import Camera
from igate_edge.runtime.preprocess import resize

CAMERA = Camera(
    640,
    480,
    (500.0, 2.0, 310.5, 0.0, 510.0, 250.25, 0.0, 0.0, 1.0),
    (0.1, -0.2, 0.001, 0.002, 0.0),
    p=(490.0, 0.0, 320.0, -60.0, 0.0, 495.0, 240.0, 5.0, 0.0, 0.0, 1.0, 0.0),
)


def pixel(matrix: tuple[float, ...], columns: int, point: np.ndarray) -> np.ndarray:
    x, y, z = np.array(matrix).reshape(3, columns) @ point
    return np.array([x, y]) / z


@pytest.mark.parametrize("size", [(320, 240), (128, 96), (1280, 360)])
def test_scaled(size: tuple[int, int]) -> None:
    small, point = scaled(CAMERA, *size), np.array([0.3, -0.2, 2.0])
    ratio = np.array(size) / (640, 480)
    # A pixel's centre is a whole number, so its left border is half a pixel before it.
    want = (pixel(CAMERA.k, 3, point) + 0.5) * ratio - 0.5
    np.testing.assert_allclose(pixel(small.k, 3, point), want)
    world = np.append(point, 1.0)
    np.testing.assert_allclose(pixel(small.p, 4, world), (pixel(CAMERA.p, 4, world) + 0.5) * ratio - 0.5)
    assert (small.width, small.height, small.d, small.r) == (*size, CAMERA.d, CAMERA.r)
    back = scaled(small, 640, 480)
    np.testing.assert_allclose(back.k, CAMERA.k)
    np.testing.assert_allclose(back.p, CAMERA.p)


def test_cropped_and_padded() -> None:
    part, point = cropped(CAMERA, 40, 30, 200, 100), np.array([0.3, -0.2, 2.0])
    np.testing.assert_allclose(pixel(part.k, 3, point), pixel(CAMERA.k, 3, point) - (40, 30))
    world = np.append(point, 1.0)
    np.testing.assert_allclose(pixel(part.p, 4, world), pixel(CAMERA.p, 4, world) - (40, 30))
    assert (part.width, part.height) == (200, 100)
    padded = cropped(part, -40, -30, 640, 480)
    assert padded == CAMERA


def test_the_picture_moves_as_the_camera_says() -> None:
    """A bright spot, resized as the pipeline does it: its centre of mass is where the scaled camera puts it."""
    camera = pinhole(64, 48)
    y, x = np.mgrid[0:48, 0:64]
    spot = np.exp(-((x - 40.25) ** 2 + (y - 20.5) ** 2) / 18)
    small = resize(spot[None], (24, 32))[0]
    ys, xs = np.mgrid[0:24, 0:32]
    found = np.array([(small * xs).sum(), (small * ys).sum()]) / small.sum()
    k = np.array(camera.k).reshape(3, 3)
    ray = np.linalg.inv(k) @ (40.25, 20.5, 1.0)
    np.testing.assert_allclose(pixel(scaled(camera, 32, 24).k, 3, ray), found, atol=0.02)


def test_a_camera_without_a_projection_stays_without() -> None:
    assert scaled(Camera(4, 4, pinhole(4, 4).k), 2, 2).p == () and cropped(Camera(4, 4, ()), 1, 1, 2, 2).k == ()
