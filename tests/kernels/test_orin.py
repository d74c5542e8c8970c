"""The machine model: never faster than its bounds, and slower where tiles or waves are wasted."""

from __future__ import annotations

import numpy as np
import pytest
from igate_edge.kernels.grouped_conv import ConvLayer, GroupedConvPlan
from igate_edge.kernels.launch import TILES
from igate_edge.kernels.orin import ENDS, LATENCY, MACHINES, predict


def plan(rows: int, columns: int, kernel: int, size: tuple[int, int], tile: int = 1) -> GroupedConvPlan:
    weight = np.ones((rows, columns, kernel, kernel), np.int8)
    ends = np.ones(rows, np.float32)
    layer = ConvLayer(weight, ends, ends, (1, *size), pads=(kernel // 2,) * 4)
    return GroupedConvPlan.from_layer(layer, TILES[tile])


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
@pytest.mark.parametrize("shape", [(64, 64, 3, (60, 80)), (16, 16, 1, (8, 8)), (256, 64, 1, (120, 160))])
def test_nothing_is_faster_than_the_machine(shape: tuple, machine) -> None:
    for tile in range(3):
        one = predict(plan(*shape, tile), machine)
        assert one.us >= one.bound_us > 0


def test_one_tile_takes_its_steps() -> None:
    machine = MACHINES[0]
    one = plan(64, 64, 3, (8, 8))  # 64 pixels, 36 chunks: 9 steps
    assert one.tiles == 1
    assert predict(one, machine).tiles_us == pytest.approx((9 * LATENCY + ENDS) / 0.625 / 1e3)


def test_a_second_wave_takes_as_long_as_the_first() -> None:
    machine = MACHINES[0]
    places = machine.multiprocessors * 5
    full, more = (predict(plan(64, 64, 3, (count, 64)), machine) for count in (places, places + 1))
    assert full.waves == 1
    assert more.tiles_us == pytest.approx(2 * full.tiles_us)


def test_memory_decides_for_a_1x1_convolution_of_few_channels() -> None:
    one = predict(plan(16, 256, 1, (120, 160), tile=0), MACHINES[0])
    moved = 120 * 160 * (256 + 16)
    assert one.memory_us == pytest.approx(moved / 68e3, rel=0.01)
