"""Layers for the tests of igemm_s8_*, and running one on the emulator against the integer reference."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from igate_edge.kernels.emulator import SCHEDULES, Emulator
from igate_edge.kernels.grouped_conv import ConvLayer, GroupedConvPlan, reference
from igate_edge.kernels.launch import TILES, Tile
from igate_edge.kernels.memory import address, device_array

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="NOT TESTED: the deploy kernels, because g++ is missing (apt install g++)"
)


@dataclass(frozen=True)
class Case:
    """One layer and the way to run it. keep: share of 16x16 weight blocks that are not zero."""

    rows: int
    columns: int
    kernel: tuple[int, int] = (3, 3)
    size: tuple[int, int, int] = (1, 7, 9)
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    group: int = 0
    tile: Tile = TILES[0]
    schedule: str = "forward"
    eager: bool = False
    skip: bool = False
    floats: bool = False
    relu: bool = True
    keep: float = 1.0

    def __str__(self) -> str:
        extra = "".join(name[0] for name in ("eager", "skip", "floats", "relu") if getattr(self, name))
        shape = "x".join(map(str, (self.rows, self.columns, *self.kernel, *self.size)))
        way = f"s{self.stride[0]}{self.stride[1]}p{self.pads[0]}d{self.dilation[0]}g{self.group}{extra}"
        return f"{shape}-{way}-k{self.keep:g}-{self.tile.pixels}x{self.tile.channels}-{self.schedule}"

    def layer(self) -> tuple[ConvLayer, np.ndarray, np.ndarray | None]:
        """The layer, its input and its skip; outputs spread over the whole range, some saturate."""
        rng = np.random.default_rng([self.rows, self.columns, *self.kernel, *self.size, *self.stride])
        weight = rng.integers(-127, 128, (self.rows, self.columns, *self.kernel)).astype(np.int8)
        blocks = rng.random((-(-self.rows // 16), -(-self.columns // 16))) < self.keep
        weight *= np.repeat(np.repeat(blocks, 16, 0), 16, 1)[: self.rows, : self.columns, None, None]
        fan = max(self.keep * self.columns * self.kernel[0] * self.kernel[1], 1.0)
        scale = (rng.uniform(30, 90, self.rows) / (70.0 * 70.0 * np.sqrt(fan))).astype(np.float32)
        bias = rng.normal(0, 20, self.rows).astype(np.float32)
        skip_scale = 0.37 if self.skip else None
        layer = ConvLayer(
            weight, scale, bias, self.size, self.stride, self.pads, self.dilation,
            0 if self.relu else -128, 127, skip_scale, self.floats,
        )  # fmt: skip
        x = rng.integers(-128, 128, (self.size[0], self.columns, *self.size[1:])).astype(np.int8)
        shape = (self.size[0], self.rows, *layer.out_size)
        return layer, x, rng.integers(-128, 128, shape).astype(np.int8) if self.skip else None


def run(emulator: Emulator, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """(what the kernel gave, what the reference gives), both [N, O, h, w]."""
    layer, x, skip = case.layer()
    plan = GroupedConvPlan.from_layer(layer, case.tile, case.group)
    source = device_array(plan.source.pack(x))
    source.setflags(write=False)
    dtype = np.float32 if case.floats else np.int8
    target = device_array(np.full(plan.target.bytes, 77, dtype))
    buffers, place = [source, target, *plan.tables.each()], 0
    if skip is not None:
        held = device_array(plan.target.pack(skip))
        buffers.append(held)
        place = address(held)
    launch = plan.launch(address(source), address(target), address(plan.tables.data), place)
    emulator.run(launch, buffers, case.schedule, case.eager)
    return plan.target.unpack(target), reference(layer, x, skip)


def _ways() -> Iterator[dict[str, object]]:
    """All schedules, both moments of a copy, all tiles and layouts, in turn."""
    ways = itertools.product(SCHEDULES, (False, True), TILES, (0, 16, 32))
    ordered = sorted(ways, key=lambda way: hash_of(way[0], way[1], way[2].kernel, way[3]))
    for schedule, eager, tile, group in itertools.cycle(ordered):
        yield {"schedule": schedule, "eager": eager, "tile": tile, "group": group}


def hash_of(*parts: object) -> int:
    """The same number in every process."""
    return sum(ord(char) * 31**index for index, char in enumerate(repr(parts))) % 1009


def cases() -> list[Case]:
    """At least 150: kernels, strides, dilations, layouts, ragged counts, every number of K-steps modulo the stages."""
    ways, found = _ways(), []
    for kernel, stride in itertools.product((1, 2, 3, 5, 7), (1, 2, 3)):
        for rows, columns in ((16, 16), (5, 3), (33, 40), (64, 24), (96, 50)):
            pads = (kernel // 2, (kernel - 1) // 2, kernel // 2, kernel // 2)
            case = Case(rows, columns, (kernel,) * 2, (1, 8, 11), (stride,) * 2, pads, **next(ways))  # type: ignore[arg-type]
            found.append(case)
    for steps in range(1, 10):  # 1x1: one chunk a block, four chunks a step; ragged ends of K as well
        for spare in (0, 3):
            for tile in TILES:
                way = {**next(ways), "tile": tile}
                found.append(Case(48, 16 * (4 * steps - spare), (1, 1), (1, 5, 13), pads=(0,) * 4, **way))  # type: ignore[arg-type]
    for kernel, dilation in itertools.product(((3, 3), (1, 3), (5, 2)), ((2, 2), (1, 3))):
        found.append(Case(20, 17, kernel, (2, 9, 12), (1, 2), (2, 3, 1, 0), dilation, **next(ways)))  # type: ignore[arg-type]
    for keep, (rows, columns) in itertools.product((0.0, 0.3, 0.6), ((100, 70), (48, 130), (130, 33), (17, 200))):
        found.append(Case(rows, columns, (3, 3), (1, 6, 9), keep=keep, skip=keep > 0.5, **next(ways)))  # type: ignore[arg-type]
    for option, tile in itertools.product(("skip", "floats", "relu"), TILES):
        way = {**next(ways), "tile": tile, option: option != "relu"}
        found.append(Case(70, 36, (3, 3), (2, 7, 9), **way))  # type: ignore[arg-type]
    found += [Case(33, 48, (3, 3), (3, 5, 7), skip=True, relu=False, **next(ways)) for _ in range(6)]  # type: ignore[arg-type]
    return found
