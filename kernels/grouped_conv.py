"""Grouped INT8 convolution in one launch: the layer, its packed plan for igemm_s8_*, and the integer reference.

plan = GroupedConvPlan.from_layer(layer)
emulator.run(plan.launch(address(x), address(y), address(plan.tables.data)), [x, y, *plan.tables.each()])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from igate_edge.contract import MAX_SIDE
from igate_edge.errors import InputError

from . import pack
from .exact import fmaf, to_int8
from .launch import TILES, IgemmParams, Launch, Tile
from .memory import Tables, check_addresses
from .pack import BlockLayout, Branch

#: Bytes of shared memory an INT8 multiply-add waits for, relative to what an SM can feed: small tiles are starved.
FEED = {TILES[0]: 1.5, TILES[1]: 1.0, TILES[2]: 0.9}


@dataclass(frozen=True)
class ConvLayer:
    """A quantised convolution with what follows it: y = clamp(round(acc * scale + bias [+ skip * skip_scale])).

    weight: int8 [O, I, kh, kw]. scale, bias: float32 [O], steps of y for one unit of the INT32 sum; where `floats` is
    set y is float32 itself and nothing is rounded. size: (images, height, width) of x. stride, dilation: (y, x).
    pads: (top, left, bottom, right). low, high: clamp of y, whole steps: (0, 127) is a Relu. skip_scale: steps of y in
    one step of the skip, None without one. Raises InputError for what is no such layer.
    """

    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    size: tuple[int, int, int]
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    low: int = -128
    high: int = 127
    skip_scale: float | None = None
    floats: bool = False

    def __post_init__(self) -> None:
        rows = self.weight.shape[:1]
        if self.weight.dtype != np.int8 or self.weight.ndim != 4 or 0 in self.weight.shape:
            evidence = f"{self.weight.dtype} {list(self.weight.shape)}"
            raise InputError("not the weights of an INT8 convolution", evidence, "pass int8 [O, I, kh, kw]")
        for name, row in (("scale", self.scale), ("bias", self.bias)):
            if row.dtype != np.float32 or row.shape != rows or not np.isfinite(row).all():
                evidence = f"{row.dtype} {list(row.shape)}"
                raise InputError(f"{name} does not fit the weights", evidence, f"pass finite float32 {list(rows)}")
        if min(*self.stride, *self.dilation) < 1 or min(self.pads) < 0 or min(self.out_size) < 1:
            evidence = f"size {self.size}, stride {self.stride}, pads {self.pads}, dilation {self.dilation}"
            raise InputError("a convolution without a result", evidence, "check its geometry")
        if max(*self.pads, *self.reach, *self.size[1:]) > MAX_SIDE:
            evidence = f"size {self.size}, pads {self.pads}, reach {self.reach}"
            raise InputError("a convolution reaches too far", evidence, f"stay within {MAX_SIDE} pixels")
        if not -128 <= self.low <= self.high <= 127 or not np.isfinite(self.skip_scale or 0.0):
            evidence = f"low {self.low}, high {self.high}, skip_scale {self.skip_scale}"
            raise InputError("not the steps of an INT8 tensor", evidence, "clamp within -128..127, use finite scales")
        if self.floats and self.skip_scale is not None:
            raise InputError("a float result takes no skip", "floats and skip_scale are set", "leave one of them out")

    @property
    def reach(self) -> tuple[int, int]:
        """Pixels from the first tap to the last, (y, x)."""
        height, width = self.weight.shape[2:]
        return (height - 1) * self.dilation[0], (width - 1) * self.dilation[1]

    @property
    def out_size(self) -> tuple[int, int]:
        (_, height, width), (top, left, bottom, right) = self.size, self.pads
        return (
            (height + top + bottom - self.reach[0] - 1) // self.stride[0] + 1,
            (width + left + right - self.reach[1] - 1) // self.stride[1] + 1,
        )


@dataclass(frozen=True)
class GroupedConvPlan:
    """A layer packed for one tile size: where its tensors lie, all its tables in one buffer, and its tiles.

    source, target: layouts of x and y. tables: one buffer, to be copied to the device once.
    """

    layer: ConvLayer
    source: BlockLayout
    target: BlockLayout
    tile: Tile
    branches: tuple[Branch, ...]
    tables: Tables
    tiles: int

    @classmethod
    def from_layer(cls, layer: ConvLayer, tile: Tile | None = None, group: int = 0) -> GroupedConvPlan:
        """Pack `layer` for tensors in planes of `group` channels (0: NHWC); tile None takes the cheapest."""
        images, height, width = layer.size
        source = BlockLayout(images, layer.weight.shape[1], height, width, group)
        target = BlockLayout(images, layer.weight.shape[0], *layer.out_size, group)
        pixels = images * target.height * target.width
        choices = {each: pack.branches(layer.weight, each) for each in (TILES if tile is None else (tile,))}
        tile, branches = min(choices.items(), key=lambda choice: cost(choice[1], choice[0], pixels))
        longest = max(len(branch.chunks) for branch in branches)
        if longest > pack.MAX_CHUNKS:
            raise InputError("a sum could overflow INT32", f"{longest * 16} products", "split the convolution")
        arrays = _arrays(layer, source, target, branches)
        arrays["tiles"] = pack.tile_table(branches, pixels, tile)
        return cls(layer, source, target, tile, tuple(branches), Tables.of(arrays), len(arrays["tiles"]))

    @property
    def macs(self) -> int:
        """Multiply-adds with a weight block that is not zero, pixels and channels unpadded where they can be."""
        pixels = self.target.images * self.target.height * self.target.width
        return pixels * pack.BLOCK * pack.BLOCK * int(pack.read_chunks(self.layer.weight).sum())

    @property
    def padded_macs(self) -> int:
        """Multiply-adds that the tiles really carry out."""
        return padded_macs(self.branches, self.tile, self.target.images * self.target.height * self.target.width)

    def launch(self, x: int, y: int, tables: int, skip: int = 0) -> Launch:
        """The launch for tensors and tables at these device addresses; raises InputError for one that is misaligned."""
        check_addresses(x=x, y=y, tables=tables, **({"skip": skip} if skip else {}))
        if (skip != 0) != (self.layer.skip_scale is not None):
            raise InputError("a skip is missing, or not asked for", f"address {skip:#x}", "pass what the layer adds")
        layer, source, target = self.layer, self.source, self.target
        params = IgemmParams(
            x=x, y=y, skip=skip or None, **self.tables.addresses(tables),
            height=source.height, width=source.width, out_width=target.width,
            out_plane=target.height * target.width, pixels=target.images * target.height * target.width,
            stride_y=layer.stride[0], stride_x=layer.stride[1], pad_y=layer.pads[0], pad_x=layer.pads[1],
            x_image=source.image, x_pixel=source.pixel, y_image=target.image, y_pixel=target.pixel,
            low=layer.low, high=layer.high, skip_scale=layer.skip_scale or 0.0, floats=int(layer.floats),
        )  # fmt: skip
        return Launch(self.tile.kernel, (self.tiles, 1, 1), (128, 1, 1), self.tile.shared, params)


def padded_macs(branches: Sequence[Branch], tile: Tile, pixels: int) -> int:
    """Multiply-adds of whole tiles for that many output pixels."""
    columns = sum(pack.padded_chunks(len(branch.outputs), len(branch.chunks), tile) for branch in branches)
    return -(-pixels // tile.pixels) * tile.pixels * pack.BLOCK * columns


def cost(branches: Sequence[Branch], tile: Tile, pixels: int, multiprocessors: int = 8) -> float:
    """Relative time: all padded work shared by the multiprocessors, but no less than the longest tile's."""
    longest = max(branch.steps for branch in branches) * pack.STEP * pack.BLOCK * tile.pixels * tile.channels
    return FEED[tile] * max(padded_macs(branches, tile, pixels) / multiprocessors, longest)


def _arrays(
    layer: ConvLayer, source: BlockLayout, target: BlockLayout, branches: list[Branch]
) -> dict[str, np.ndarray]:
    """The tables by their names in IgemmParams, but for the tiles."""
    chunk = np.dtype([("offset", np.int32), ("dy", np.int16), ("dx", np.int16)])
    weights = [pack.pack_weights(layer.weight, branch) for branch in branches]
    starts = np.cumsum([0, *(part.size for part in weights)])
    if starts[-1] > pack.MAX_BYTES:
        raise InputError("the weights are too large for 32-bit addresses", f"{starts[-1]} bytes", "split the layer")
    kernel_width = layer.weight.shape[3]
    chunks = []
    for branch in branches:
        for tap, block in branch.chunks:
            dy, dx = tap // kernel_width * layer.dilation[0], tap % kernel_width * layer.dilation[1]
            chunks.append(((dy * source.width + dx) * source.pixel + source.offset(block), dy, dx))
    rows, first_row, first_chunk = [], 0, 0
    for branch, start in zip(branches, starts, strict=False):
        rows.append((first_chunk, len(branch.chunks), start, branch.rows, first_row, 0, 0, 0))
        first_row, first_chunk = first_row + branch.rows, first_chunk + len(branch.chunks)
    blocks = [block for branch in branches for block in branch.outputs]
    affine = np.zeros((target.blocks * pack.BLOCK, 2), np.float32)
    affine[: len(layer.scale)] = np.stack([layer.scale, layer.bias], axis=1)
    return {
        "weights": np.concatenate([part.reshape(-1) for part in weights]),
        "chunks": np.array(chunks, chunk),
        "branches": np.array(rows, np.int32),
        "blocks": np.array([target.offset(block) for block in blocks], np.int32),
        "affine": affine.reshape(-1, pack.BLOCK, 2)[blocks],
    }


def reference(layer: ConvLayer, x: np.ndarray, skip: np.ndarray | None = None) -> np.ndarray:
    """The definition: int8 x [N, I, H, W] -> int8 (or float32) [N, O, h, w], sums exact, one fused multiply-add.

    skip: int8 of y's shape, where the layer adds one.
    """
    (height, width), (top, left, bottom, right) = layer.out_size, layer.pads
    wide = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    sums = np.zeros((x.shape[0], height, width, len(layer.weight)))
    for ky in range(layer.weight.shape[2]):
        for kx in range(layer.weight.shape[3]):
            y0, x0 = ky * layer.dilation[0], kx * layer.dilation[1]
            rows = slice(y0, y0 + (height - 1) * layer.stride[0] + 1, layer.stride[0])
            columns = slice(x0, x0 + (width - 1) * layer.stride[1] + 1, layer.stride[1])
            # Whole numbers below 2**53: exact in float64, whatever the order.
            sums += wide[:, :, rows, columns].transpose(0, 2, 3, 1) @ layer.weight[:, :, ky, kx].T.astype(np.float64)
    values = fmaf(sums.astype(np.int64).astype(np.float32), layer.scale, layer.bias)
    if skip is not None and layer.skip_scale is not None:
        values = fmaf(skip.transpose(0, 2, 3, 1).astype(np.float32), np.float32(layer.skip_scale), values)
    out = values if layer.floats else to_int8(values, layer.low, layer.high)
    return np.ascontiguousarray(out.transpose(0, 3, 1, 2))
