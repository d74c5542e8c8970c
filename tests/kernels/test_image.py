"""Pictures in and out on the CPU: the kernels against their definitions, the definitions against the runtime's."""

from __future__ import annotations

import numpy as np
import pytest
from igate_edge.kernels import image
from igate_edge.kernels.emulator import Emulator
from igate_edge.kernels.fold import fold_input
from igate_edge.kernels.image import PreprocessPlan, UpsamplePlan
from igate_edge.kernels.memory import address, aligned, device_array
from igate_edge.kernels.pack import BlockLayout
from kernel_cases import needs_compiler

from igate_edge.contract import OutputSpec, Preprocess
from igate_edge.errors import InputError
from igate_edge.runtime.postprocess import decode
from igate_edge.runtime.preprocess import resize, to_input

PREPROCESS = Preprocess(12, 20, mean=(0.45, 0.4, 0.5), std=(0.22, 0.25, 0.2))


def preprocessed(plan: PreprocessPlan, frame: np.ndarray, chroma: np.ndarray | None = None) -> np.ndarray:
    """What the kernel writes: int8 [vector, height, width]."""
    memory = device_array(frame)
    buffers, place = [memory], 0
    if chroma is not None:
        buffers.append(device_array(chroma))
        place = address(buffers[-1])
    y = device_array(np.full(plan.size[0] * plan.size[1] * plan.vector, 99, np.int8))
    launch = plan.launch(address(memory), address(y), address(plan.tables.data), place)
    Emulator.load().run(launch, [*buffers, y, *plan.tables.each()])
    return y.reshape(*plan.size, plan.vector).transpose(2, 0, 1)


@needs_compiler
@pytest.mark.parametrize("vector", [4, 16, 32])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("frame", [(30, 50), (12, 20), (5, 40), (64, 7), (1, 1)])
def test_rgb_frames_bit_for_bit(frame: tuple[int, int], keep: bool, vector: int) -> None:
    plan = PreprocessPlan.of(frame, PREPROCESS, 0.018, vector=vector, keep_proportions=keep, pad=(114, 0, 255))
    picture = np.random.default_rng(0).integers(0, 256, (*frame, 3)).astype(np.uint8)
    got = preprocessed(plan, picture)
    np.testing.assert_array_equal(got[:3], image.preprocess_reference(plan, picture))
    assert not got[3:].any()


@needs_compiler
@pytest.mark.parametrize("vector", [16, 32])
@pytest.mark.parametrize("keep", [False, True])
def test_a_folded_input_holds_squares_of_pixels(keep: bool, vector: int) -> None:
    plan = PreprocessPlan.of((31, 50), PREPROCESS, 0.018, vector=vector, folded=True, keep_proportions=keep)
    picture = np.random.default_rng(0).integers(0, 256, (31, 50, 3)).astype(np.uint8)
    memory, y = device_array(picture), device_array(np.full(6 * 10 * vector, 99, np.int8))
    launch = plan.launch(address(memory), address(y), address(plan.tables.data))
    Emulator.load().run(launch, [memory, y, *plan.tables.each()])
    got = y.reshape(6, 10, vector).transpose(2, 0, 1)
    np.testing.assert_array_equal(got[:12], fold_input(image.preprocess_reference(plan, picture)[None])[0])
    assert not got[12:].any()


@needs_compiler
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("frame", [(30, 50), (12, 20), (2, 2)])
def test_nv12_frames_bit_for_bit(frame: tuple[int, int], keep: bool) -> None:
    plan = PreprocessPlan.of(frame, PREPROCESS, 0.018, nv12=True, keep_proportions=keep)
    rng = np.random.default_rng(1)
    luma = rng.integers(0, 256, frame).astype(np.uint8)
    chroma = rng.integers(0, 256, (frame[0] // 2, frame[1] // 2, 2)).astype(np.uint8)
    want = image.preprocess_reference(plan, luma, chroma)
    np.testing.assert_array_equal(preprocessed(plan, luma, chroma)[:3], want)


@pytest.mark.parametrize("frame", [(30, 50), (12, 20), (7, 9)])
def test_the_definition_is_the_runtimes_preprocessing_on_the_int8_grid(frame: tuple[int, int]) -> None:
    picture = np.random.default_rng(2).integers(0, 256, (*frame, 3)).astype(np.uint8)
    plan = PreprocessPlan.of(frame, PREPROCESS, 0.018)
    want = np.clip(to_input(picture, PREPROCESS)[0] / 0.018, -128, 127)
    # Half a step of rounding, and shares of 1/2048 of up to 255 levels twice.
    levels = 255 * 2 / 4096 * float(plan.scale.max())
    assert np.abs(image.preprocess_reference(plan, picture) - want).max() <= 0.5 + levels


def test_grey_nv12_is_grey() -> None:
    plan = PreprocessPlan.of((4, 6), Preprocess(4, 6), 1 / 100, nv12=True)
    luma, chroma = np.full((4, 6), 16 + 110, np.uint8), np.full((2, 3, 2), 128, np.uint8)
    want = round(110 * 1.164383 / 255 * 100)
    assert set(image.preprocess_reference(plan, luma, chroma).ravel().tolist()) == {want}


def test_a_letterboxed_frame_has_its_colour_around_it() -> None:
    plan = PreprocessPlan.of((10, 20), Preprocess(20, 20), 1 / 100, keep_proportions=True, pad=(255, 0, 51))
    got = image.preprocess_reference(plan, np.full((10, 20, 3), 102, np.uint8))
    assert [got[:, row, 3].tolist() for row in (0, 4, 5, 14, 15)] == [[100, 0, 20]] * 2 + [[40] * 3] * 2 + [
        [100, 0, 20]
    ]


def upsampled(plan: UpsamplePlan, x: np.ndarray) -> np.ndarray:
    source = device_array(plan.source.pack(x[None]))
    shape, dtype = (plan.size, np.uint8) if plan.kind == "semseg" else (plan.size, np.float32)
    shape = (*shape, 3) if plan.kind == "normals" else shape
    y = aligned(int(np.prod(shape)), dtype)
    launch = plan.launch(address(source), address(y), address(plan.tables.data))
    Emulator.load().run(launch, [source, y, *plan.tables.each()])
    return y.reshape(shape)


KINDS = {"semseg": (1, 12, 16, 40), "depth": (1,), "normals": (3,)}


@needs_compiler
@pytest.mark.parametrize("group", [0, 16, 32])
@pytest.mark.parametrize("size", [(24, 40), (6, 10), (11, 5)])
@pytest.mark.parametrize(("kind", "channels"), [(kind, count) for kind, counts in KINDS.items() for count in counts])
def test_answers_at_the_frames_size(kind: str, channels: int, size: tuple[int, int], group: int) -> None:
    x = np.random.default_rng(3).integers(-128, 128, (channels, 6, 10)).astype(np.int8)
    plan = UpsamplePlan.of(kind, BlockLayout(1, channels, 6, 10, group), size, 0.02)
    got, want = upsampled(plan, x), image.upsample_reference(plan, x)
    if kind == "depth":  # exact up to the exponential, whose polynomial is as good as a float32 library's
        np.testing.assert_allclose(got, want, rtol=3e-7)
    else:
        np.testing.assert_array_equal(got, want)


@needs_compiler
def test_equal_logits_give_the_lowest_class() -> None:
    x = np.zeros((20, 2, 2), np.int8)
    x[[3, 17]] = 5
    plan = UpsamplePlan.of("semseg", BlockLayout(1, 20, 2, 2), (7, 7))
    assert set(upsampled(plan, x).ravel().tolist()) == {3}


@needs_compiler
def test_depth_over_its_whole_range() -> None:
    x = np.arange(-128, 128).astype(np.int8).reshape(1, 16, 16)
    plan = UpsamplePlan.of("depth", BlockLayout(1, 1, 16, 16), (16, 16), 0.2)  # -25.6 .. 25.4, clipped at 13.8
    np.testing.assert_allclose(upsampled(plan, x), image.upsample_reference(plan, x), rtol=3e-7)


@pytest.mark.parametrize(("kind", "channels"), [("semseg", 7), ("depth", 1), ("normals", 3)])
def test_the_definitions_are_the_runtimes_decoding(kind: str, channels: int) -> None:
    x = np.random.default_rng(4).integers(-128, 128, (channels, 6, 10)).astype(np.int8)
    plan = UpsamplePlan.of(kind, BlockLayout(1, channels, 6, 10), (24, 40), 0.02)
    got = image.upsample_reference(plan, x)
    raw = x.astype(np.float32) * np.float32(0.02)
    want = decode(OutputSpec("t", kind, channels), raw, (24, 40))
    if kind == "semseg":  # shares of 1/2048 may decide between logits that are nearly equal
        logits = np.sort(resize(raw, (24, 40)), axis=0)
        assert ((got == want) | (logits[-1] - logits[-2] < 256 / 2048 * 0.02)).all()
        assert np.mean(got != want) < 0.01
    else:
        np.testing.assert_allclose(got, want, rtol=3e-3, atol=3e-3)


def test_bad_pictures_are_refused() -> None:
    layout = BlockLayout(1, 3, 6, 10)
    for build in (
        lambda: PreprocessPlan.of((10, 10), PREPROCESS, 0.1, vector=8),
        lambda: PreprocessPlan.of((11, 10), PREPROCESS, 0.1, nv12=True),
        lambda: PreprocessPlan.of((10, 20000), PREPROCESS, 0.1),
        lambda: PreprocessPlan.of((10, 10), PREPROCESS, 0.0),
        lambda: PreprocessPlan.of((10, 10), PREPROCESS, 0.1, vector=4, folded=True),
        lambda: PreprocessPlan.of((10, 10), Preprocess(11, 20), 0.1, folded=True),
        lambda: UpsamplePlan.of("edges", layout, (4, 4)),
        lambda: UpsamplePlan.of("depth", layout, (4, 4)),
        lambda: UpsamplePlan.of("normals", layout, (0, 4)),
        lambda: UpsamplePlan.of("normals", layout, (4, 4), float("nan")),
        lambda: PreprocessPlan.of((10, 10), PREPROCESS, 0.1, nv12=True).launch(256, 256, 256),
        lambda: PreprocessPlan.of((10, 10), PREPROCESS, 0.1).launch(256, 8, 256),
        lambda: UpsamplePlan.of("normals", layout, (4, 4)).launch(0, 256, 256),
    ):
        with pytest.raises(InputError):
            build()
