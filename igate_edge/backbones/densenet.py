"""A small densely connected net: layers add channels to a concatenation (after Huang et al., 2016; norm after conv)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class DenseBlock(nn.Module):
    """Each of `layers` 3x3 convolutions sees all maps before it: [N,C,H,W] -> [N,C+layers*growth,H,W]."""

    def __init__(self, inputs: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_unit(inputs + index * growth, growth, 3) for index in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class DenseNetTiny(nn.Module):
    """Three dense blocks with halving transitions; returns their maps at strides 4, 8 and 16."""

    def __init__(self, growth: int, layers: int) -> None:
        super().__init__()
        width = 2 * growth
        self.stem = nn.Sequential(_unit(3, width, 3, 2), nn.MaxPool2d(3, 2, 1))
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for index in range(3):
            self.transitions.append(
                nn.Sequential(_unit(width, width // 2, 1), nn.AvgPool2d(2)) if index else nn.Identity()
            )
            width = width // 2 if index else width
            self.blocks.append(DenseBlock(width, growth, layers))
            width += growth * layers

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.stem(image)
        maps = []
        for transition, block in zip(self.transitions, self.blocks, strict=True):
            x = block(transition(x))
            maps.append(x)
        return maps


def densenet_tiny(growth: int = 16, layers: int = 3) -> DenseNetTiny:
    """Small densely connected net; maps at strides 4, 8 and 16.

    Channels with growth g and 3 layers: 5g, 5g/2 + 3g and half of that + 3g.

    >>> [tuple(f.shape[1:]) for f in densenet_tiny(growth=8)(torch.zeros(1, 3, 64, 64))]
    [(40, 16, 16), (44, 8, 8), (46, 4, 4)]
    """
    return DenseNetTiny(growth, layers)
