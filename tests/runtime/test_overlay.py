"""One picture of what was seen."""

from __future__ import annotations

import numpy as np
import pytest

from igate_edge.errors import InputError
from igate_edge.reports.pictures import palette
from igate_edge.runtime.frame import Result
from igate_edge.runtime.overlay import colour_overlay, overlay

IMAGE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
CLASSES = (np.arange(12 * 16).reshape(12, 16) % 5).astype(np.uint8)


def result(**outputs: np.ndarray) -> Result:
    return Result(1, "", "", 0, IMAGE, outputs)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.77, 1.0])
def test_every_pixel_is_the_mix_and_never_wraps(alpha: float) -> None:
    white = np.full_like(IMAGE, 255)
    for image in (IMAGE, white, white * 0):
        got = colour_overlay(image, CLASSES, alpha, dict.fromkeys(range(4), (255, 255, 255)) | {4: (10, 200, 0)})
        colours = np.array([[255] * 3] * 4 + [[10, 200, 0]])[CLASSES]
        assert np.abs(got - ((1 - alpha) * image + alpha * colours)).max() <= 2


def test_pixels_without_a_class_stay_as_they_are() -> None:
    classes = CLASSES.copy()
    classes[3:6] = 255
    before = IMAGE.copy()
    got = overlay(result(seg=classes))
    assert np.array_equal(got[3:6], IMAGE[3:6]) and not np.array_equal(got[:3], IMAGE[:3])
    assert np.array_equal(IMAGE, before) and not np.shares_memory(got, IMAGE)
    want = IMAGE[0, 1] * 0.5 + palette()[1] * 0.5
    assert np.abs(got[0, 1] - want).max() <= 1.5


def test_depth_or_normals_where_there_are_no_classes() -> None:
    depth = np.linspace(1, 5, 12 * 16, dtype=np.float32).reshape(12, 16)
    depth[0, 0] = np.nan
    normals = np.zeros((12, 16, 3), np.float32)
    normals[..., 2] = -1
    assert overlay(result(tag=np.ones(3, np.float32), depth=depth, normals=normals))[0, 0].tolist() == [226, 226, 230]
    assert overlay(result(normals=normals))[0, 0].tolist() == [128, 128, 0]
    assert np.array_equal(overlay(result()), IMAGE) and not np.shares_memory(overlay(result()), IMAGE)
    assert np.array_equal(overlay(result(depth=depth, seg=CLASSES)), colour_overlay(IMAGE, CLASSES))


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": float("nan")},
        {"alpha": 1.5},
        {"alpha": None},
        {"classes": np.zeros((3, 2), np.uint8)},
        {"classes": np.zeros((2, 3), np.int64)},
        {"classes": None},
        {"image": np.zeros((2, 3, 3))},
        {"colours": {256: (1, 2, 3)}},
        {"colours": {1: (1, 2, 999)}},
    ],
)
def test_what_does_not_fit_together_is_refused(change: dict[str, object]) -> None:
    good = {"image": np.zeros((2, 3, 3), np.uint8), "classes": np.zeros((2, 3), np.uint8)}
    with pytest.raises(InputError):
        colour_overlay(**(good | change))  # type: ignore[arg-type]
