"""Frames become the input that training saw, whatever their size and strides; anything else is refused."""

from __future__ import annotations

import numpy as np
import pytest

from igate_edge.contract import Preprocess
from igate_edge.errors import InputError
from igate_edge.runtime.preprocess import (
    FITS,
    fit_of,
    resize,
    resize_frame,
    to_canvas,
    to_input,
    to_network_size,
)

torch = pytest.importorskip("torch", reason="compared with torch")

PLAIN = Preprocess(8, 8)


def frame(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("source", [(1, 1), (3, 5), (8, 8), (7, 9), (48, 64)])
@pytest.mark.parametrize("target", [(1, 1), (8, 8), (16, 24), (5, 31)])
def test_resize_equals_torch(source: tuple[int, int], target: tuple[int, int]) -> None:
    image = np.random.default_rng(1).standard_normal((4, *source)).astype(np.float32)
    batch = torch.from_numpy(image)[None]
    want = torch.nn.functional.interpolate(batch, target, mode="bilinear", align_corners=False)[0]
    got = resize(image, target)
    assert got.dtype == np.float32 and got.shape == (4, *target)
    np.testing.assert_allclose(got, want.numpy(), atol=2e-6, rtol=0)


def test_input_equals_the_training_formula() -> None:
    pre = Preprocess(8, 12, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    image = frame(20, 30)
    rgb = torch.from_numpy(image).permute(2, 0, 1).float()[None] / 255
    rgb = torch.nn.functional.interpolate(rgb, (8, 12), mode="bilinear", align_corners=False)
    want = (rgb - torch.tensor(pre.mean).view(1, 3, 1, 1)) / torch.tensor(pre.std).view(1, 3, 1, 1)
    got = to_input(image, pre)
    assert got.shape == (1, 3, 8, 12) and got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_allclose(got, want.numpy(), atol=5e-6, rtol=0)


def test_strides_do_not_matter_and_the_frame_is_not_touched() -> None:
    image = frame(16, 20)
    before = image.copy()
    image.setflags(write=False)
    padded = np.zeros((16, 26, 4), np.uint8)
    padded[:, 3:23, :3] = image
    want = to_input(image, PLAIN)
    assert np.array_equal(to_input(padded[:, 3:23, :3], PLAIN), want)
    assert np.array_equal(to_input(np.asfortranarray(image), PLAIN), want)
    assert np.array_equal(to_input(image[::-1, ::-1], PLAIN), to_input(image[::-1, ::-1].copy(), PLAIN))
    assert np.array_equal(image, before)


def test_the_result_is_owned() -> None:
    image = frame(8, 8)
    first = to_input(image, PLAIN)
    kept = first.copy()
    image[:] = 0
    assert np.array_equal(first, kept)


def test_network_size_is_rounded_once_and_stable() -> None:
    small = to_network_size(frame(20, 30), PLAIN)
    assert small.shape == (8, 8, 3) and small.dtype == np.uint8 and small.flags.c_contiguous
    assert np.array_equal(to_network_size(small, PLAIN), small)
    pair = np.array([[[0, 0, 0], [255, 3, 4]]], np.uint8)
    assert to_network_size(pair, Preprocess(1, 1)).ravel().tolist() == [128, 2, 2]


@pytest.mark.parametrize(
    ("bad", "cause", "fix"),
    [
        (np.zeros((8, 8, 3), np.float32), "must be uint8", "astype"),
        (np.full((8, 8, 3), np.nan), "must be uint8", "uint8 RGB"),
        (np.zeros((8, 8, 3), np.uint16), "must be uint8", "uint8 RGB"),
        (np.zeros((8, 8), np.uint8), "shape", "repeat the grey"),
        (np.zeros((8, 8, 1), np.uint8), "shape", "repeat the grey"),
        (np.zeros((8, 8, 4), np.uint8), "shape", "drop alpha"),
        (np.zeros((3, 8, 8), np.uint8), "shape", "channels last"),
        (np.zeros((1, 8, 8, 3), np.uint8), "shape", "one frame at a time"),
        (np.zeros((0, 8, 3), np.uint8), "shape", "at least 1x1"),
        (np.zeros((8, 8, 5), np.uint8), "shape", "height x width x 3"),
        (np.uint8(3), "numpy array", "np.asarray"),
        ([[1, 2, 3]], "numpy array", "np.asarray"),
        (None, "numpy array", "np.asarray"),
    ],
)
def test_other_frames_are_refused(bad: object, cause: str, fix: str) -> None:
    with pytest.raises(InputError) as caught:
        to_input(bad, PLAIN)  # type: ignore[arg-type]
    assert cause in caught.value.cause and fix in caught.value.fix and caught.value.evidence.startswith("got ")


@pytest.mark.parametrize("size", [(480, 640), (720, 1280), (100, 30), (333, 1000), (1, 1), (1, 500), (96, 128)])
@pytest.mark.parametrize("mode", FITS)
def test_every_fit_lies_inside_and_keeps_what_it_promises(mode: str, size: tuple[int, int]) -> None:
    pre = Preprocess(96, 128)
    fit = fit_of(mode, size, pre)
    for (top, left, height, width), whole in ((fit.window, size), (fit.place, fit.canvas)):
        assert top >= 0 and left >= 0 and height >= 1 and width >= 1
        assert top + height <= whole[0] and left + width <= whole[1]
    (_, _, h, w), (_, _, ph, pw) = fit.window, fit.place
    if mode == "letterbox":
        assert (h, w) == size and (ph == 96 or pw == 128)
        scale = min(96 / h, 128 / w)
        assert (ph, pw) == (max(1, round(h * scale)), max(1, round(w * scale))), "one scale for both axes"
    elif mode == "crop":
        assert (ph, pw) == fit.canvas and (h == size[0] or w == size[1]) and fit.part is None
        assert min(size) == 1 or abs(h / w - 96 / 128) * w <= 1
    else:
        assert (h, w) == size and (ph, pw) == fit.canvas and fit.part is None


def test_letterboxed_input_is_the_frame_with_borders_of_the_mean_colour() -> None:
    pre = Preprocess(16, 16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    image = frame(20, 40)
    fit = fit_of("letterbox", (20, 40), pre)
    got = to_canvas(resize_frame(image, fit.place[2:]), fit, pre)
    assert fit.place == (4, 0, 8, 16) and fit.part == (0.25, 0.0, 0.5, 1.0)
    assert np.array_equal(got[0, :, 4:12], to_input(image, Preprocess(8, 16, pre.mean, pre.std))[0])
    assert not got[0, :, :4].any() and not got[0, :, 12:].any()
    whole = to_canvas(resize_frame(image, (16, 16)), fit_of("stretch", (20, 40), pre), pre)
    assert np.array_equal(whole, to_input(image, pre))
    with pytest.raises(InputError, match="no such fit"):
        fit_of("zoom", (20, 40), pre)


@pytest.mark.parametrize("source", [(1, 1), (7, 9), (48, 64), (480, 640)])
@pytest.mark.parametrize("target", [(1, 1), (8, 8), (24, 31), (96, 128)])
def test_the_faster_way_gives_the_same_numbers(source: tuple[int, int], target: tuple[int, int]) -> None:
    image = frame(*source)
    want = resize(image.transpose(2, 0, 1), target)
    assert np.array_equal(resize_frame(image, target), want)
    assert np.array_equal(resize_frame(image[::-1, ::-1], target), resize(image[::-1, ::-1].transpose(2, 0, 1), target))
