"""What a packed layer should take on an Orin: PREDICTED from a machine model, nothing here was measured on one.

An SM multiplies 4096 INT8 operations a clock. A block's step of 64 bytes of K takes at least `LATENCY` clocks, however
small its tile, so few tiles leave the SMs waiting; many share them. Global memory is read and written once. The time
of the launch itself (2 to 10 us, hidden in a CUDA graph) is not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .grouped_conv import FEED, GroupedConvPlan
from .launch import TILES

OPERATIONS = 4096  # of a dense INT8 multiply-add, two each, per clock and SM
LATENCY = 160  # clocks from one barrier to the next with nobody else on the SM
ENDS = 900  # clocks to fill the pipeline and to store a tile
#: Blocks that an SM holds at once, by registers.
RESIDENT = dict(zip(TILES, (6, 5, 3), strict=True))


@dataclass(frozen=True)
class Machine:
    """An Orin module in one of its power modes. gigabytes: bytes a second of its memory, in 1e9."""

    name: str
    multiprocessors: int
    gigahertz: float
    gigabytes: float

    @property
    def tops(self) -> float:
        """Dense INT8 operations a second of the GPU alone, in 1e12.

        >>> [round(machine.tops, 1) for machine in MACHINES]
        [20.5, 33.4, 30.1, 53.3, 85.2]
        """
        return self.multiprocessors * self.gigahertz * OPERATIONS / 1e3


MACHINES = (
    Machine("Orin Nano 8 GB", 8, 0.625, 68),
    Machine("Orin Nano 8 GB Super", 8, 1.02, 102),
    Machine("Orin NX 16 GB", 8, 0.918, 102),
    Machine("AGX Orin 32 GB", 14, 0.93, 205),
    Machine("AGX Orin 64 GB", 16, 1.3, 205),
)


@dataclass(frozen=True)
class Prediction:
    """Microseconds of one launch: of the tiles, of the memory, the larger of both; and of a perfect machine.

    waves: how often all SMs are filled with blocks, the last time only partly.
    """

    tiles_us: float
    memory_us: float
    bound_us: float
    waves: float

    @property
    def us(self) -> float:
        return max(self.tiles_us, self.memory_us)


def predict(plan: GroupedConvPlan, machine: Machine) -> Prediction:
    """Predicted time of a plan's launch; its tiles run longest first on whichever place is free."""
    tile, resident = plan.tile, RESIDENT[plan.tile]
    places = machine.multiprocessors * resident
    sharing = min(resident, math.ceil(plan.tiles / machine.multiprocessors))
    step = max(LATENCY, sharing * FEED[tile] * tile.pixels * tile.channels * 64 * 2 / OPERATIONS)
    ends = [0.0] * min(places, plan.tiles)
    pixels = plan.target.images * plan.target.height * plan.target.width
    for branch in sorted(plan.branches, key=lambda part: -part.steps):
        for _ in range(-(-branch.rows // tile.channels) * -(-pixels // tile.pixels)):
            first = min(range(len(ends)), key=ends.__getitem__)
            ends[first] += branch.steps * step + ENDS
    skip = plan.target.bytes if plan.layer.skip_scale is not None else 0
    moved = plan.source.bytes + plan.target.bytes * (4 if plan.layer.floats else 1) + skip + plan.tables.data.nbytes
    memory_us = moved / machine.gigabytes / 1e3
    bound_us = max(2 * plan.macs / machine.tops / 1e6, memory_us)
    return Prediction(max(ends) / machine.gigahertz / 1e3, memory_us, bound_us, plan.tiles / places)
