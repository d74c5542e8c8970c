"""The grouped INT8 kernel's packing: padding, tiles, and the time that the machine model predicts for an Orin.

Nothing here ran on an Orin: every time is predicted (kernels/orin.py) and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from igate_edge.kernels.grouped_conv import ConvLayer, GroupedConvPlan
from igate_edge.kernels.orin import MACHINES, predict

#: Of what the tiles multiply, at most this share may be padding.
MOST_PADDING = 0.4


@dataclass(frozen=True)
class Layer:
    """A merged 3x3 layer: shared channels in and out, and for each task own ones, of which only it reads its own."""

    size: tuple[int, int]
    shared: tuple[int, int]
    own: tuple[int, int]
    tasks: int

    def packed(self) -> ConvLayer:
        (shared_in, shared_out), (own_in, own_out) = self.shared, self.own
        weight = np.zeros((shared_out + self.tasks * own_out, shared_in + self.tasks * own_in, 3, 3), np.int8)
        weight[:, :shared_in] = 1
        for task in range(self.tasks):
            rows = slice(shared_out + task * own_out, shared_out + (task + 1) * own_out)
            weight[rows, shared_in + task * own_in : shared_in + (task + 1) * own_in] = 1
        ends = np.ones(len(weight), np.float32)
        return ConvLayer(weight, ends, ends, (1, *self.size), pads=(1, 1, 1, 1))


LAYERS = {
    "A": Layer((60, 80), (48, 64), (16, 32), 4),
    "B": Layer((30, 40), (96, 96), (32, 32), 4),
    "C": Layer((15, 20), (192, 160), (64, 48), 4),
    "D": Layer((120, 160), (32, 32), (16, 16), 2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_layer(name: str, benchmark: Any, figures: Callable[..., None]) -> None:
    layer = LAYERS[name].packed()
    dense = 9 * int(np.prod(layer.weight.shape[:2])) * int(np.prod(layer.out_size))
    plan = benchmark.pedantic(GroupedConvPlan.from_layer, (layer,), rounds=3, warmup_rounds=1)
    padding = 1 - plan.macs / plan.padded_macs
    figures(
        f"layer {name}: {plan.macs / 1e6:.0f} M multiply-adds ({dense / 1e6:.0f} M dense), {padding:.0%} padding, "
        f"{plan.tiles} tiles of {plan.tile.pixels}x{plan.tile.channels}",
        **{f"padding_{name}": padding, f"tiles_{name}": plan.tiles},
    )
    for machine in MACHINES:
        one = predict(plan, machine)
        figures(
            f"  predicted, {machine.name}: {one.us:.1f} us, {one.bound_us / one.us:.0%} of its bound "
            f"({one.waves:.1f} waves)",
            **{f"predicted_us_{name}_{machine.name}": one.us},
        )
        assert one.us >= one.bound_us
    assert padding <= MOST_PADDING, f"{padding:.0%} of layer {name} is padding"
    assert plan.macs < dense, "the zero blocks of the merged layout are skipped"
