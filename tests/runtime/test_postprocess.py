"""Raw outputs become classes, metres, unit vectors and probabilities at the size that was asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from igate_edge.contract import OutputSpec
from igate_edge.errors import InputError
from igate_edge.runtime.postprocess import decode, invalid_depth
from igate_edge.runtime.preprocess import resize

torch = pytest.importorskip("torch", reason="compared with torch")


def raw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def upsampled(array: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    return torch.nn.functional.interpolate(torch.from_numpy(array), size, mode="bilinear", align_corners=False)[0]


def test_semseg_is_the_class_of_the_resized_logits() -> None:
    logits = raw(1, 5, 4, 6)
    out = decode(OutputSpec("s", "semseg", 5), logits, (17, 23))
    assert out.dtype == np.uint8
    assert np.array_equal(out, upsampled(logits, (17, 23)).argmax(0).numpy())


def test_depth_is_metres_and_never_infinite() -> None:
    logs = raw(1, 1, 4, 4)
    out = decode(OutputSpec("d", "depth", 1), logs, (9, 9))
    np.testing.assert_allclose(out, upsampled(logs, (9, 9))[0].exp().numpy(), rtol=1e-5)
    huge = decode(OutputSpec("d", "depth", 1), np.array([[[1e30, -1e30]]], np.float32), (1, 2))
    assert huge.dtype == np.float32 and np.isfinite(huge).all() and (huge > 0).all()


def test_normals_have_unit_length_and_keep_their_direction() -> None:
    vectors = np.zeros((1, 3, 1, 2), np.float32)
    vectors[0, :, 0, 0] = (0, 3, -4)
    out = decode(OutputSpec("n", "normals", 3), vectors, (1, 2))
    assert out.shape == (1, 2, 3) and out.dtype == np.float32
    np.testing.assert_allclose(out[0, 0], (0, 0.6, -0.8), rtol=1e-6)
    assert out[0, 1].tolist() == [0, 0, 0]
    many = decode(OutputSpec("n", "normals", 3), raw(1, 3, 5, 5), (12, 11))
    np.testing.assert_allclose(np.linalg.norm(many, axis=2), 1, atol=1e-6)


def test_probabilities() -> None:
    edges = decode(OutputSpec("e", "edges", 1), np.array([[[[0, 1000, -1000]]]], np.float32), (1, 3))
    assert edges.tolist() == [[0.5, 1, 0]] and edges.dtype == np.float32
    labels = decode(OutputSpec("m", "multilabel", 2), np.array([[math.log(3), -math.log(3)]], np.float32), (7, 7))
    np.testing.assert_allclose(labels, [0.75, 0.25], rtol=1e-6)
    label = decode(OutputSpec("c", "classification", 2), np.array([1000, 1000 + math.log(3)], np.float32), (7, 7))
    np.testing.assert_allclose(label, [0.25, 0.75], rtol=1e-4)
    assert label.shape == labels.shape == (2,) and label.dtype == labels.dtype == np.float32


@pytest.mark.parametrize("kind", ["semseg", "depth", "normals", "edges", "classification", "multilabel"])
def test_results_are_owned_even_when_nothing_has_to_be_resized(kind: str) -> None:
    spec = OutputSpec("t", kind, {"semseg": 4, "normals": 3}.get(kind, 1))
    source = raw(1, spec.channels, 4, 4) if spec.dense else raw(1, spec.channels)
    before = source.copy()
    out = decode(spec, source, (4, 4))
    assert not np.shares_memory(out, source)
    out[...] = 0
    assert np.array_equal(source, before)


def test_wrong_shapes_are_refused() -> None:
    spec = OutputSpec("s", "semseg", 5)
    for bad in (raw(1, 4, 2, 2), raw(2, 5, 2, 2), raw(5, 2), raw(1, 5)):
        with pytest.raises(InputError, match="task 's' got a raw output it cannot decode"):
            decode(spec, bad, (4, 4))
    for bad in (None, [[1.0]], np.full((1, 5, 2, 2), "a"), np.zeros((1, 5, 0, 0), np.float32)):
        with pytest.raises(InputError, match="task 's' got a raw output it cannot decode"):
            decode(spec, bad, (4, 4))  # type: ignore[arg-type]
    for size in ((0, 4), (-1, 4), (4.5, 4), None, (4,), "ab", (10**9, 10**9)):
        with pytest.raises(InputError, match="not a picture's size"):
            decode(spec, raw(1, 5, 2, 2), size)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at most 255 classes"):
        decode(OutputSpec("s", "semseg", 256), raw(256, 1, 1), (2, 2))


@pytest.mark.parametrize("channels", [1, 2, 10, 40])
@pytest.mark.parametrize(
    ("source", "target"), [((24, 32), (96, 128)), ((6, 8), (37, 53)), ((5, 7), (3, 4)), ((1, 1), (9, 9))]
)
def test_classes_that_cannot_win_are_left_out_without_a_difference(
    channels: int, source: tuple[int, int], target: tuple[int, int]
) -> None:
    """Smooth scores as a network's, where most places have one winner, and noise, where all classes can win."""
    rng, spec = np.random.default_rng(4), OutputSpec("s", "semseg", channels)
    noise = rng.standard_normal((channels, *source)).astype(np.float32)
    smooth = resize(rng.standard_normal((channels, 2, 2)).astype(np.float32) * 5, source)
    one = noise.copy()
    one[channels // 2] += 100
    for logits in (noise, smooth, one, np.round(noise)):
        want = resize(logits, target)
        got = decode(spec, logits, target)
        # Where two classes are equal but for rounding either is right.
        best = np.take_along_axis(want, got[None].astype(np.int64), 0)[0]
        np.testing.assert_allclose(best, want.max(0), atol=1e-5)
        assert (got != want.argmax(0)).mean() <= (0.02 if logits is not noise else 0.001)


@pytest.mark.parametrize("kind", ["semseg", "depth", "normals", "edges"])
def test_a_part_of_the_output_is_decoded_alone(kind: str) -> None:
    """What a letterboxed frame needs: the same values as decoding everything and cutting the part out."""
    spec = OutputSpec("t", kind, {"semseg": 4, "normals": 3}.get(kind, 1))
    source = raw(spec.channels, 8, 12)
    whole = decode(spec, source, (32, 48))
    part = decode(spec, source, (16, 36), (0.25, 0.125, 0.5, 0.75))
    np.testing.assert_allclose(part, whole[8:24, 6:42], atol=1e-5)


@pytest.mark.parametrize("kind", ["semseg", "depth", "normals"])
def test_an_array_that_fits_is_used_again(kind: str) -> None:
    spec = OutputSpec("t", kind, {"semseg": 4, "normals": 3}.get(kind, 1))
    first = decode(spec, raw(spec.channels, 4, 4, seed=1), (9, 7))
    want = decode(spec, raw(spec.channels, 4, 4, seed=2), (9, 7))
    again = decode(spec, raw(spec.channels, 4, 4, seed=2), (9, 7), out=first)
    assert again is first and np.array_equal(again, want)
    for other in (first[:5], first.astype(np.float64), first[::-1]):
        kept = other.copy()
        got = decode(spec, raw(spec.channels, 4, 4, seed=3), (9, 7), out=other)
        assert got is not other and np.array_equal(other, kept)


def test_depth_outside_of_its_range_is_invalid() -> None:
    depth = np.array([[0.1, 0.2, 3.0, np.inf, np.nan]], np.float32)
    assert invalid_depth(depth, 0.2, 20.0) is depth
    assert np.array_equal(depth, np.array([[np.nan, 0.2, 3.0, np.nan, np.nan]], np.float32), equal_nan=True)
