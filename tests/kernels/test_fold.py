"""Folded stems give the same outputs, and multiply less."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from igate_edge.kernels.fold import fold, fold_input, foldable
from igate_edge.kernels.grouped_conv import ConvLayer, GroupedConvPlan, reference

from igate_edge.errors import InputError


def stem(kernel: int = 7, pads: tuple[int, int, int, int] = (3, 3, 3, 3), channels: int = 3) -> ConvLayer:
    rng = np.random.default_rng([kernel, *pads])
    weight = rng.integers(-127, 128, (8, channels, kernel, kernel)).astype(np.int8)
    scale = np.full(8, 1 / (70 * kernel * 40), np.float32)
    return ConvLayer(weight, scale, rng.normal(0, 20, 8).astype(np.float32), (2, 12, 18), (2, 2), pads)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("kernel", "pads"),
    [(7, (3, 3, 3, 3)), (7, (2, 3, 3, 2)), (3, (1, 1, 1, 1)), (3, (0, 0, 1, 1)), (3, (1, 0, 0, 1)), (5, (2, 2, 2, 2)),
     (2, (0, 0, 0, 0)), (4, (1, 1, 1, 1)), (6, (5, 4, 2, 2))],
)  # fmt: skip
def test_the_same_outputs(kernel: int, pads: tuple[int, int, int, int], channels: int) -> None:
    layer = stem(kernel, pads, channels)
    assert foldable(layer)
    folded = fold(layer)
    assert (folded.stride, folded.out_size) == ((1, 1), layer.out_size)
    x = np.random.default_rng(1).integers(-128, 128, (2, channels, 12, 18)).astype(np.int8)
    want = reference(layer, x)
    assert len(np.unique(want)) > 20
    np.testing.assert_array_equal(reference(folded, fold_input(x)), want)


def test_squares_keep_the_order_of_pixels() -> None:
    x = np.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    got = fold_input(x)
    assert got.shape == (1, 8, 2, 3)
    assert got[0, :, 1, 2].tolist() == [x[0, c, 2 + y, 4 + z] for y in (0, 1) for z in (0, 1) for c in (0, 1)]


def test_a_7x7_stem_multiplies_a_third() -> None:
    layer = dataclasses.replace(stem(), size=(1, 96, 128))
    plain, folded = (GroupedConvPlan.from_layer(each) for each in (layer, fold(layer)))
    assert [len(plan.branches[0].chunks) for plan in (plain, folded)] == [49, 16]
    assert folded.padded_macs < 0.35 * plain.padded_macs


@pytest.mark.parametrize(
    "change", [{"stride": (1, 1)}, {"stride": (2, 1)}, {"dilation": (2, 2)}, {"size": (1, 13, 18)}]
)
def test_what_is_no_stem_is_refused(change: dict) -> None:
    layer = dataclasses.replace(stem(), **change)
    assert not foldable(layer)
    with pytest.raises(InputError, match="cannot be folded"):
        fold(layer)
    assert not foldable(stem(channels=5))
