"""A small feature pyramid: coarse maps are resized and added to finer ones (after Lin et al., 2016)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class PyramidNet(nn.Module):
    """Bottom-up strides 2 to 16, top-down to 8 and 4; returns two maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = _unit(3, width, 3, 2)
        self.down4 = _unit(width, 2 * width, 3, 2)
        self.down8 = _unit(2 * width, 4 * width, 3, 2)
        self.down16 = _unit(4 * width, 4 * width, 3, 2)
        self.lateral16 = _unit(4 * width, 2 * width, 1)
        self.lateral8 = _unit(4 * width, 2 * width, 1)
        self.lateral4 = _unit(2 * width, 2 * width, 1)
        self.smooth8 = _unit(2 * width, 2 * width, 3)
        self.smooth4 = _unit(2 * width, 2 * width, 3)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        stride4 = self.down4(self.stem(image))
        stride8 = self.down8(stride4)
        top = self.lateral16(self.down16(stride8))
        middle = self.lateral8(stride8) + functional.interpolate(top, scale_factor=2.0, mode="nearest")
        fine = self.lateral4(stride4) + functional.interpolate(middle, scale_factor=2.0, mode="nearest")
        return self.smooth4(fine), self.smooth8(middle)


def pyramid_net(width: int = 16) -> PyramidNet:
    """Small feature pyramid with two outputs of 2 * width channels, at strides 4 and 8; sides must be multiples of 16.

    >>> import torch
    >>> [tuple(f.shape) for f in pyramid_net(width=4)(torch.zeros(1, 3, 32, 32))]
    [(1, 8, 8, 8), (1, 8, 4, 4)]
    """
    return PyramidNet(width)
