"""Every fit at every size: the answer's picture, its camera's numbers, and a point of the world on its spot."""

from __future__ import annotations

import numpy as np
import pytest
from robot import Echo

from igate_edge.contract import OutputSpec, Preprocess
from igate_edge.runtime.camera import pinhole
from igate_edge.runtime.frame import Frame, Result
from igate_edge.runtime.pipeline import Pipeline

#: fit, at -> image [H,W] and fx, fy, cx, cy of a camera of 64x32 pixels before a network of 16x16, reckoned by hand.
EXPECTED = {
    ("stretch", "frame"): ((32, 64), (64.0, 64.0, 31.5, 15.5)),
    ("letterbox", "frame"): ((32, 64), (64.0, 64.0, 31.5, 15.5)),
    ("crop", "frame"): ((32, 32), (64.0, 64.0, 15.5, 15.5)),  # 16 columns on either side are gone
    ("stretch", "network"): ((16, 16), (16.0, 32.0, 7.5, 7.5)),  # a quarter and a half
    ("letterbox", "network"): ((8, 16), (16.0, 16.0, 7.5, 3.5)),  # a quarter both ways, without the borders
    ("crop", "network"): ((16, 16), (32.0, 32.0, 7.5, 7.5)),  # a half of what the crop left
}
#: Where the spot is in the frame: off the centre, and inside the crop.
COLUMN, ROW = 36.5, 13.0


class Bright(Echo):
    """Answers with the brightness that it sees: metres = level + 1, so the spot is found in the answer too."""

    def __init__(self) -> None:
        super().__init__(Preprocess(16, 16))
        self.tasks = (OutputSpec("far", "depth", 1),)

    def infer(self, image: np.ndarray) -> dict[str, np.ndarray]:
        return {"far": np.log(image[:, :1] * 255 + 1)}


def spot() -> np.ndarray:
    """A frame with one soft spot: three pixels wide, so that the smallest image still shows it."""
    rows, columns = np.mgrid[0:32, 0:64]
    light = 250 * np.exp(-((columns - COLUMN) ** 2 + (rows - ROW) ** 2) / 18)
    return np.rint(light)[..., None].repeat(3, axis=2).astype(np.uint8)


def centre(light: np.ndarray) -> tuple[float, float]:
    """Column and row of the centre of mass."""
    rows, columns = np.mgrid[0 : light.shape[0], 0 : light.shape[1]]
    return float((light * columns).sum() / light.sum()), float((light * rows).sum() / light.sum())


@pytest.mark.parametrize(("fit", "at"), list(EXPECTED))
def test_a_point_of_the_world_lies_where_the_answers_camera_says(fit: str, at: str) -> None:
    seen: list[Result] = []
    camera = pinhole(64, 32)
    with Pipeline(Bright(), seen.append, mode="every", fit=fit, at=at) as pipeline:
        counts = pipeline.run([Frame(spot(), stamp_ns=1, camera=camera)])
    assert counts.answered == 1 and counts.events == {}
    (result,), (shape, (fx, fy, cx, cy)) = seen, EXPECTED[fit, at]
    assert result.image.shape == (*shape, 3) and result.outputs["far"].shape == shape
    k = result.camera.k if result.camera is not None else ()
    assert (result.camera.width, result.camera.height) == (shape[1], shape[0])  # type: ignore[union-attr]
    assert (k[0], k[4], k[2], k[5]) == (fx, fy, cx, cy) and (k[1], k[3], *k[6:]) == (0.0, 0.0, 0.0, 0.0, 1.0)
    # A point two metres ahead that the whole frame's camera sees at the spot.
    x, y, z = 2 * np.linalg.inv(np.array(camera.k).reshape(3, 3)) @ (COLUMN, ROW, 1.0)
    column, row = fx * x / z + cx, fy * y / z + cy
    np.testing.assert_allclose(centre(result.image[..., 0].astype(float)), (column, row), atol=0.1)
    far = result.outputs["far"] - 1.0
    np.testing.assert_allclose(centre(far), (column, row), atol=0.3, err_msg="the answer lies elsewhere")
