"""ResNet-18, 34 and 50 layouts of any width, with a 3x3 stem (He et al., Deep Residual Learning, 2015)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip: [N,inputs,H,W] -> [N,width,H/stride,W/stride]."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a skip: [N,inputs,H,W] -> [N,4*width,H/stride,W/stride]."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + self.downsample(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """Four stages of residual blocks; returns their four maps at strides 4, 8, 16 and 32."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], depths: Sequence[int], width: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = _conv(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages, inputs = [], width
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(inputs, width << stage, stride))
                inputs = (width << stage) * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        stride4 = self.layer1(x)
        stride8 = self.layer2(stride4)
        stride16 = self.layer3(stride8)
        return [stride4, stride8, stride16, self.layer4(stride16)]


def resnet18(width: int = 64) -> ResNet:
    """ResNet-18 layout: maps of width, 2, 4 and 8 times width channels at strides 4, 8, 16 and 32.

    >>> import torch
    >>> [tuple(f.shape[1:]) for f in resnet18(width=8)(torch.zeros(1, 3, 64, 64))]
    [(8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 2, 2)]
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), width)


def resnet34(width: int = 64) -> ResNet:
    """ResNet-34 layout: same maps as `resnet18`, 3, 4, 6 and 3 blocks a stage."""
    return ResNet(BasicBlock, (3, 4, 6, 3), width)


def resnet50(width: int = 64) -> ResNet:
    """ResNet-50 layout with bottlenecks: maps of 4, 8, 16 and 32 times width channels at strides 4, 8, 16 and 32."""
    return ResNet(Bottleneck, (3, 4, 6, 3), width)
