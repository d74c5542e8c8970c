"""Layouts and branches: what the packer promises, without any kernel."""

from __future__ import annotations

import numpy as np
import pytest
from igate_edge.kernels import pack
from igate_edge.kernels.grouped_conv import ConvLayer, GroupedConvPlan
from igate_edge.kernels.launch import TILES
from igate_edge.kernels.pack import BlockLayout

from igate_edge.errors import InputError


@pytest.mark.parametrize("group", [0, 16, 32, 48])
@pytest.mark.parametrize("channels", [1, 16, 17, 40, 64])
def test_a_layout_is_undone_and_says_where_each_block_lies(group: int, channels: int) -> None:
    layout = BlockLayout(2, channels, 3, 5, group)
    array = np.random.default_rng(0).integers(-128, 128, (2, channels, 3, 5)).astype(np.int8)
    flat = layout.pack(array)
    assert flat.size == layout.bytes
    np.testing.assert_array_equal(layout.unpack(flat), array)
    for block in range(layout.blocks):
        start = 1 * layout.image + (2 * 5 + 4) * layout.pixel + layout.offset(block)
        count = min(16, channels - 16 * block)
        np.testing.assert_array_equal(flat[start : start + count], array[1, 16 * block :, 2, 4][:count])


def test_nhwc_is_plain_channels_last() -> None:
    array = np.arange(2 * 32 * 3 * 4, dtype=np.int32).reshape(2, 32, 3, 4)
    np.testing.assert_array_equal(
        BlockLayout(2, 32, 3, 4).pack(array), np.ascontiguousarray(array.transpose(0, 2, 3, 1)).reshape(-1)
    )


def merged_weight(shared: int, own: int, tasks: int, kernel: int = 3) -> np.ndarray:
    """A layer of the merged layout: shared rows read all values, a task's own rows the shared ones and its own."""
    weight = np.ones(((shared + tasks * own),) * 2 + (kernel, kernel), np.int8)
    for a in range(tasks):
        for b in range(tasks):
            if a != b:
                weight[shared + a * own : shared + (a + 1) * own, shared + b * own : shared + (b + 1) * own] = 0
    return weight


def conv(weight: np.ndarray, size: tuple[int, int, int] = (1, 8, 8)) -> ConvLayer:
    rows = len(weight)
    pads = (weight.shape[2] // 2,) * 4
    return ConvLayer(weight, np.ones(rows, np.float32), np.zeros(rows, np.float32), size, pads=pads)


def test_zero_blocks_of_the_merged_layout_are_not_read() -> None:
    weight = merged_weight(shared=32, own=64, tasks=3)
    parts = pack.branches(weight, TILES[0])
    assert [part.outputs for part in parts] == [(0, 1), (2, 3, 4, 5), (6, 7, 8, 9), (10, 11, 12, 13)]
    assert [len(part.chunks) for part in parts] == [9 * 14, 9 * 6, 9 * 6, 9 * 6]
    plan = GroupedConvPlan.from_layer(conv(weight), TILES[0])
    # All pixels, rows and chunks fill their tiles; 9 * 14 and 9 * 6 chunks are padded to 128 and 56.
    assert plan.padded_macs == 64 * 16 * (32 * 128 + 3 * 64 * 56)
    assert plan.macs == 64 * 16 * (32 * 126 + 3 * 64 * 54)


def test_small_branches_are_joined_where_a_tile_has_room() -> None:
    parts = pack.branches(merged_weight(shared=64, own=16, tasks=2, kernel=1), TILES[1])
    # 16 rows of a task alone would fill a quarter of a 64-row tile: both share one.
    assert sorted(sum((part.outputs for part in parts), ())) == list(range(6))
    assert pack.Branch((4, 5), tuple((0, block) for block in range(6))) in parts


def test_all_of_a_dense_layer_is_one_branch() -> None:
    parts = pack.branches(np.ones((40, 20, 3, 3), np.int8), TILES[1])
    assert parts == [pack.Branch((0, 1, 2), tuple((tap, block) for tap in range(9) for block in range(2)))]


def test_the_longest_tiles_start_first_and_cover_everything_once() -> None:
    rng = np.random.default_rng(3)
    weight = rng.integers(-9, 9, (200, 150, 3, 3)).astype(np.int8)
    weight *= np.repeat(np.repeat(rng.random((13, 10)) < 0.3, 16, 0), 16, 1)[:200, :150, None, None]
    for tile in TILES:
        parts = pack.branches(weight, tile)
        table = pack.tile_table(parts, 300, tile)
        steps = [parts[row[0]].steps for row in table]
        assert steps == sorted(steps, reverse=True)
        assert len({tuple(row) for row in table}) == len(table)
        assert len(table) == -(-300 // tile.pixels) * sum(-(-part.rows // tile.channels) for part in parts)
        assert sorted(block for part in parts for block in part.outputs) == list(range(13))


def test_only_the_end_of_k_is_padded() -> None:
    weight = np.ones((16, 48, 3, 3), np.int8)
    (branch,) = pack.branches(weight, TILES[0])
    packed = pack.pack_weights(weight, branch)
    assert packed.shape == (16, 28 * 16)  # 9 taps of 3 blocks are 27 chunks
    assert packed[:, : 27 * 16].all()
    assert not packed[:, 27 * 16 :].any()


def test_a_plan_without_a_tile_takes_the_cheapest() -> None:
    layer = conv(np.ones((32, 16, 1, 1), np.int8), (1, 4, 4))
    assert GroupedConvPlan.from_layer(layer).tile == TILES[0]
    layer = conv(np.ones((128, 64, 3, 3), np.int8), (1, 96, 96))
    assert GroupedConvPlan.from_layer(layer).tile == TILES[2]


@pytest.mark.parametrize(
    "bad", [(0, 4, 4, 4, 0), (1, 0, 4, 4, 0), (1, 4, 4, 4, 8), (1, 4, 4, 4, -16), (1, 32768, 256, 256, 0)]
)
def test_what_is_no_layout_is_refused(bad: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(InputError):
        BlockLayout(*bad)


def test_another_shape_does_not_fit() -> None:
    with pytest.raises(InputError, match="does not fit its layout"):
        BlockLayout(1, 4, 4, 4).pack(np.zeros((1, 4, 4, 5), np.int8))
