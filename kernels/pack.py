"""How tensors and weights lie in memory for the deploy kernels: 16-channel blocks, branches, chunks of K, tiles.

A branch is a set of 16-channel output blocks that read the same 16-byte chunks of K, where a chunk is one (tap, input
block). What no output block of a branch has a weight for is not in its list: the zero blocks of the merged layout
cost neither time nor memory here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from igate_edge.errors import InputError

from .launch import Tile

BLOCK = 16
#: Chunks of K in one step of the main loop: only the end of K is padded, to this many.
STEP = 4
#: 16 products of at most 128 * 128 a chunk: more chunks than this could overflow INT32.
MAX_CHUNKS = (2**31 - 1) // (BLOCK * 128 * 128)
MAX_BYTES = 2**31 - 1

Key = int  # the chunks that a branch reads, as bits: tap * (input blocks) + input block


@dataclass(frozen=True)
class BlockLayout:
    """An INT8 tensor [images, channels, height, width] in planes of `group` channels; group 0 is NHWC, one plane.

    Channels are padded with zeros to whole planes (NHWC: to 16). TensorRT calls groups of 16 and 32 CHW16 and CHW32.

    >>> BlockLayout(1, 40, 2, 3).bytes, BlockLayout(1, 40, 2, 3, group=32).bytes
    (288, 384)
    """

    images: int
    channels: int
    height: int
    width: int
    group: int = 0

    def __post_init__(self) -> None:
        if min(self.images, self.channels, self.height, self.width) < 1 or self.group % BLOCK or self.group < 0:
            raise InputError(
                "not a tensor of 16-channel blocks", repr(self), "use sizes of 1 and more, group 0, 16, .."
            )
        if self.bytes > MAX_BYTES:
            raise InputError("a tensor is too large for 32-bit addresses", f"{self.bytes} bytes", "use fewer images")

    @property
    def blocks(self) -> int:
        return -(-self.channels // BLOCK)

    @property
    def pixel(self) -> int:
        """Bytes from a pixel to the next one."""
        return self.group or self.blocks * BLOCK

    @property
    def planes(self) -> int:
        return -(-self.channels // self.pixel)

    @property
    def image(self) -> int:
        """Bytes from an image to the next one."""
        return self.planes * self.pixel * self.height * self.width

    @property
    def bytes(self) -> int:
        return self.images * self.image

    def offset(self, block: int) -> int:
        """Bytes from a pixel of plane 0 to its block number `block`."""
        plane, place = divmod(block * BLOCK, self.pixel)
        return plane * self.pixel * self.height * self.width + place

    def pack(self, array: np.ndarray) -> np.ndarray:
        """[images, channels, height, width] -> its bytes in this layout, flat, of the same dtype."""
        if array.shape != (self.images, self.channels, self.height, self.width):
            raise InputError("a tensor does not fit its layout", f"{array.shape} for {self}", "pass [N,C,H,W]")
        wide = np.zeros((self.images, self.planes * self.pixel, self.height, self.width), array.dtype)
        wide[:, : self.channels] = array
        split = wide.reshape(self.images, self.planes, self.pixel, self.height, self.width)
        return np.ascontiguousarray(split.transpose(0, 1, 3, 4, 2)).reshape(-1)

    def unpack(self, flat: np.ndarray) -> np.ndarray:
        """The way back from `pack`."""
        split = flat.reshape(self.images, self.planes, self.height, self.width, self.pixel).transpose(0, 1, 4, 2, 3)
        wide = split.reshape(self.images, self.planes * self.pixel, self.height, self.width)
        return np.ascontiguousarray(wide[:, : self.channels])


@dataclass(frozen=True)
class Branch:
    """Output blocks, and the sorted chunks (tap, input block) that their weights read."""

    outputs: tuple[int, ...]
    chunks: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        return BLOCK * len(self.outputs)

    @property
    def steps(self) -> int:
        return -(-len(self.chunks) // STEP)


def blocked(weight: np.ndarray) -> np.ndarray:
    """[O, I, kh, kw] -> [output blocks, 16, input blocks, 16, taps], filled up with zeros."""
    rows, columns, taps = weight.shape[0], weight.shape[1], weight.shape[2] * weight.shape[3]
    wide = np.zeros((-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK, taps), np.int8)
    wide[:rows, :columns] = weight.reshape(rows, columns, taps)
    return wide.reshape(len(wide) // BLOCK, BLOCK, -1, BLOCK, taps)


def read_chunks(weight: np.ndarray) -> np.ndarray:
    """bool [output blocks, taps, input blocks]: where any weight of [O, I, kh, kw] is not 0."""
    used = np.asarray((blocked(weight) != 0).any(axis=(1, 3)))
    return used.transpose(0, 2, 1)


def padded_chunks(outputs: int, chunks: int, tile: Tile) -> int:
    """Row chunks a tile column multiplies for a branch of `outputs` blocks: what it costs, in MACs / 16 a pixel."""
    return -(-outputs * BLOCK // tile.channels) * tile.channels * -(-chunks // STEP) * STEP


def branches(weight: np.ndarray, tile: Tile) -> list[Branch]:
    """Output blocks that read the same chunks, joined; then pairs whose union is cheaper in whole tiles, greedily."""
    used = read_chunks(weight)
    groups: dict[Key, list[int]] = {}
    for block, row in enumerate(used.reshape(len(used), -1)):
        key = sum(1 << bit for bit in np.flatnonzero(row).tolist())
        groups.setdefault(key, []).append(block)
    parts = list(groups.items())
    while (pair := _cheapest(parts, tile)) is not None:
        (first, ours), (second, theirs) = parts[pair[0]], parts[pair[1]]
        parts[pair[0]] = (first | second, sorted(ours + theirs))
        del parts[pair[1]]
    count, places = used.shape[2], range(used[0].size)
    return [
        Branch(tuple(outputs), tuple(divmod(bit, count) for bit in places if key >> bit & 1)) for key, outputs in parts
    ]


def _cheapest(parts: list[tuple[Key, list[int]]], tile: Tile) -> tuple[int, int] | None:
    """The pair of parts that saves most when joined, or None where no pair saves anything."""
    alone = [padded_chunks(len(outputs), key.bit_count(), tile) for key, outputs in parts]
    best, found = 0, None
    for j in range(len(parts)):
        for i in range(j):
            (first, ours), (second, theirs) = parts[i], parts[j]
            both = padded_chunks(len(ours) + len(theirs), (first | second).bit_count(), tile)
            if alone[i] + alone[j] - both > best:
                best, found = alone[i] + alone[j] - both, (i, j)
    return found


def pack_weights(weight: np.ndarray, branch: Branch) -> np.ndarray:
    """int8 [rows, steps * 64] of a branch: K in the order of its chunks, zeros at the end."""
    packed = np.zeros((branch.rows, branch.steps * STEP * BLOCK), np.int8)
    if branch.chunks:
        taps, sources = np.array(branch.chunks).T
        picked = blocked(weight)[list(branch.outputs)][:, :, sources, :, taps]  # [chunks, outputs, 16, 16]
        packed[:, : len(taps) * BLOCK] = picked.transpose(1, 2, 0, 3).reshape(branch.rows, -1)
    return packed


def tile_table(parts: list[Branch], pixels: int, tile: Tile) -> np.ndarray:
    """int32 [tiles, 4]: (branch, first pixel, first row, 0), the longest K first so that no long tile comes last."""
    rows = [
        (index, pixel, row, 0)
        for index in sorted(range(len(parts)), key=lambda i: -parts[i].steps)
        for row in range(0, parts[index].rows, tile.channels)
        for pixel in range(0, pixels, tile.pixels)
    ]
    return np.array(rows, np.int32).reshape(-1, 4)
