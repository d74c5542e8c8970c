"""A stem without waste: a convolution of stride 2 on 3 channels, as one of stride 1 on squares of 2x2 pixels.

A tensor core reads 16 channels, of which an image fills 3. Four neighbouring pixels together fill 12, and a 7x7 kernel
of stride 2 on pixels is a 4x4 kernel of stride 1 on such squares: 16 chunks of K in place of 49, the same sums.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from igate_edge.errors import InputError

from .grouped_conv import ConvLayer
from .pack import BLOCK


def foldable(layer: ConvLayer) -> bool:
    """Whether `fold` takes the layer: stride 2, no dilation, at most 4 channels, even sides."""
    even = layer.size[1] % 2 == 0 and layer.size[2] % 2 == 0
    if not even or layer.stride != (2, 2) or layer.dilation != (1, 1) or 4 * layer.weight.shape[1] > BLOCK:
        return False
    return min(_pads(layer)) >= 0


def fold(layer: ConvLayer) -> ConvLayer:
    """The same outputs from `fold_input` of the input. Raises InputError where it is not foldable.

    >>> ends = np.ones(8, np.float32)
    >>> fold(ConvLayer(np.ones((8, 3, 7, 7), np.int8), ends, ends, (1, 96, 128), (2, 2), (3, 3, 3, 3))).weight.shape
    (8, 12, 4, 4)
    """
    if not foldable(layer):
        evidence = f"weights {list(layer.weight.shape)}, stride {layer.stride}, size {layer.size}"
        raise InputError("a convolution cannot be folded", evidence, "fold stems: stride 2, few channels, even sides")
    rows, channels, *sides = layer.weight.shape
    (first_y, last_y), (first_x, last_x) = _squares(sides[0], layer.pads[0]), _squares(sides[1], layer.pads[1])
    weight = np.zeros((rows, 4 * channels, last_y - first_y + 1, last_x - first_x + 1), np.int8)
    for ky in range(sides[0]):
        square_y, y = divmod(ky - layer.pads[0], 2)
        for kx in range(sides[1]):
            square_x, x = divmod(kx - layer.pads[1], 2)
            at = slice((2 * y + x) * channels, (2 * y + x + 1) * channels)
            weight[:, at, square_y - first_y, square_x - first_x] = layer.weight[:, :, ky, kx]
    size = (layer.size[0], layer.size[1] // 2, layer.size[2] // 2)
    return dataclasses.replace(layer, weight=weight, size=size, stride=(1, 1), pads=_pads(layer))


def fold_input(x: np.ndarray) -> np.ndarray:
    """[N, C, H, W] -> [N, 4 C, H / 2, W / 2]: of each square the pixels (0, 0), (0, 1), (1, 0), (1, 1)."""
    images, channels, height, width = x.shape
    squares = x.reshape(images, channels, height // 2, 2, width // 2, 2).transpose(0, 3, 5, 1, 2, 4)
    return np.ascontiguousarray(squares).reshape(images, 4 * channels, height // 2, width // 2)


def _squares(taps: int, pad: int) -> tuple[int, int]:
    """The first and the last square that a row of taps touches, counted from the output's own."""
    return -pad // 2, (taps - 1 - pad) // 2


def _pads(layer: ConvLayer) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) squares, so that the output's size stays."""
    ends = []
    for side in (0, 1):
        first, last = _squares(layer.weight.shape[2 + side], layer.pads[side])
        ends.append((-first, layer.out_size[side] - layer.size[1 + side] // 2 + last))
    return ends[0][0], ends[1][0], ends[0][1], ends[1][1]
