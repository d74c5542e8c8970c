"""MobileNetV2 layout (Sandler et al., Inverted Residuals and Linear Bottlenecks, 2018)."""

from __future__ import annotations

from torch import Tensor, nn

#: (expansion, output channels at width 1, repeats, stride of the first block) of the seven stages.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _scaled(channels: int, width: float) -> int:
    """Multiple of 8 nearest to channels * width, at least 8, never more than 10 % below it, as in the paper."""
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU6()]


class InvertedResidual(nn.Module):
    """1x1 expand, 3x3 depthwise, linear 1x1 project; a skip when shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        expand = _unit(inputs, wide, 1) if expansion != 1 else []
        project = [nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*expand, *_unit(wide, wide, 3, stride, groups=wide), *project)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.skip else self.conv(x)


class MobileNetV2(nn.Module):
    """Returns the last map at each of strides 4, 8, 16 and 32; see `mobilenet_v2`."""

    def __init__(self, width: float) -> None:
        super().__init__()
        inputs = _scaled(32, width)
        self.stem = nn.Sequential(*_unit(3, inputs, 3, 2))
        self.stages = nn.ModuleList()
        for expansion, channels, repeats, first_stride in STAGES:
            outputs, blocks = _scaled(channels, width), []
            for index in range(repeats):
                blocks.append(InvertedResidual(inputs, outputs, first_stride if index == 0 else 1, expansion))
                inputs = outputs
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.stem(image)
        maps = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in (1, 2, 4, 6):
                maps.append(x)
        return maps


def mobilenet_v2(width: float = 1.0) -> MobileNetV2:
    """MobileNetV2 layout: maps of 24, 32, 96 and 320 channels (times width, in steps of 8) at strides 4, 8, 16 and 32.

    >>> import torch
    >>> [tuple(f.shape[1:]) for f in mobilenet_v2(width=0.25)(torch.zeros(1, 3, 64, 64))]
    [(8, 16, 16), (8, 8, 8), (24, 4, 4), (80, 2, 2)]
    """
    return MobileNetV2(width)
