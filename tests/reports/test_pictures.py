"""Pictures: colours mean what they say, invalid pixels are visible as such, scales are in metres."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from igate_edge.contract import OutputSpec
from igate_edge.errors import InputError
from igate_edge.reports import pictures

SEMSEG = OutputSpec("semseg", "semseg", 3, ("floor", "table", "cup"))


def luminance(colours: np.ndarray) -> np.ndarray:
    """Relative luminance of sRGB bytes (WCAG 2)."""
    value = colours / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def test_40_class_colours_differ_and_stand_out_from_white_and_from_invalid() -> None:
    palette = pictures.palette()
    assert palette.shape == (40, 3) and palette.dtype == np.uint8
    distance = np.linalg.norm(palette[:, None].astype(int) - palette[None], axis=-1)
    assert distance[~np.eye(40, dtype=bool)].min() > 25
    assert distance[:12, :12][~np.eye(12, dtype=bool)].min() > 70
    assert (1.05 / (luminance(palette) + 0.05)).min() > 1.5
    assert np.linalg.norm(palette - np.array(pictures.INVALID), axis=1).min() > 40


def test_depth_colours_get_darker_with_distance_in_even_steps() -> None:
    light = luminance(pictures.depth_colours())
    assert light[0] > 0.7 and light[-1] < 0.05
    assert np.diff(light).max() < 0.004, "never lighter further away, but for rounding"
    assert np.abs(np.diff(pictures.depth_colours().astype(int), axis=0)).max() <= 6, "no visible bands"


def test_class_mask_uses_one_colour_a_class_and_marks_ignored_pixels() -> None:
    picture = pictures.class_mask(np.array([[0, 1], [2, 255]], np.uint8))
    assert picture[0, 1].tolist() == list(pictures.class_colour(1))
    assert picture[1, 1].tolist() == list(pictures.INVALID)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_depth_marks_what_is_not_a_distance(bad: float) -> None:
    picture = pictures.depth_map(np.array([[1.0, 2.0, bad]], np.float32), (1.0, 2.0))
    table = pictures.depth_colours()
    assert picture[0, 0].tolist() == table[0].tolist()
    assert picture[0, 1].tolist() == table[-1].tolist()
    assert picture[0, 2].tolist() == list(pictures.INVALID)


def test_depth_range_leaves_out_invalid_pixels_and_survives_a_flat_wall() -> None:
    metres = np.full((10, 10), 2.0, np.float32)
    metres[0] = [0, np.nan, np.inf, -1, 0, 0, 0, 0, 0, 0]
    near, far = pictures.depth_range(metres)
    assert near == pytest.approx(2 * 0.95) and far == pytest.approx(2 * 1.05)
    assert pictures.depth_range(np.zeros((2, 2))) == (0.0, 1.0)


def test_normals_are_half_of_n_plus_one() -> None:
    picture = pictures.normal_map(np.array([[[0, 0, -1], [1, 0, 0], [0, 0, 0], [np.nan, 0, 0]]], np.float32))
    assert picture[0, 0].tolist() == [128, 128, 0]
    assert picture[0, 1].tolist() == [255, 128, 128]
    assert picture[0, 2].tolist() == picture[0, 3].tolist() == list(pictures.INVALID)


def test_edges_are_dark_on_white() -> None:
    picture = pictures.edge_map(np.array([[0.0, 1.0, 255.0]]))
    assert picture[0].tolist() == [[255] * 3, [0] * 3, list(pictures.INVALID)]


def test_a_vector_task_has_no_map_but_a_list() -> None:
    spec = OutputSpec("tag", "classification", 3, ("a", "b", "c"))
    with pytest.raises(InputError, match="one vector a frame"):
        pictures.colourise(spec, np.zeros(3))
    assert pictures.answer_lines(spec, np.array([0.2, 0.5, 0.3]), most=2) == [
        ("b", pytest.approx(0.5)),
        ("c", pytest.approx(0.3)),
    ]


@pytest.mark.parametrize(("values", "names"), [([0.9, 0.1, 0.6], ["a", "c"]), ([0.1, 0.3, 0.2], ["b"])])
def test_multilabel_lists_what_is_above_a_half_or_the_best(values: list[float], names: list[str]) -> None:
    spec = OutputSpec("tags", "multilabel", 3, ("a", "b", "c"))
    assert [name for name, _ in pictures.answer_lines(spec, np.array(values))] == names


def test_legend_names_only_classes_that_occur() -> None:
    legend = pictures.legend_of(SEMSEG, np.array([[0, 2, 255]], np.uint8))
    assert [name for name, _ in legend] == ["floor", "cup"]
    assert legend[1][1] == pictures.class_colour(2)


def test_png_reads_back_as_it_was() -> None:
    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(pictures.png(picture)))), picture)


def test_side_by_side_enlarges_by_a_whole_factor_and_keeps_pixels_crisp() -> None:
    picture = np.zeros((60, 80, 3), np.uint8)
    picture[::2] = 200
    sheet = pictures.side_by_side([pictures.Panel("image", picture)], height=240)
    assert np.array_equal(sheet[24 : 24 + 240, 12 : 12 + 320], pictures.enlarge(picture, 4))


def test_side_by_side_thins_a_large_frame() -> None:
    sheet = pictures.side_by_side([pictures.Panel("image", np.zeros((1080, 1920, 3), np.uint8))] * 3)
    assert sheet.shape[0] < 700 and sheet.shape[1] < 3200


def test_side_by_side_draws_a_legend_entry_for_every_class_in_its_colour() -> None:
    labels = np.repeat(np.arange(3, dtype=np.uint8), 20).reshape(3, 20)
    panel = pictures.Panel("semseg", pictures.class_mask(labels), pictures.legend_of(SEMSEG, labels))
    sheet = pictures.side_by_side([panel], height=30)
    below = sheet[24 + 30 :].reshape(-1, 3).tolist()
    assert all(list(pictures.class_colour(k)) in below for k in range(3))


@pytest.mark.parametrize(
    ("limits", "ticks"), [((0.0, 4.0), [0, 1, 2, 3, 4]), ((0.42, 1.1), [0.6, 0.8, 1.0]), ((1.0, 101.0), [50, 100])]
)
def test_ticks_are_round_numbers_inside_the_scale(limits: tuple[float, float], ticks: list[float]) -> None:
    assert pictures.ticks(limits) == pytest.approx(ticks)
