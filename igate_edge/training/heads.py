"""Light task heads: they read the backbone's feature maps and are never gated.

Only Conv, Relu, Resize and Add are used: all of them run in INT8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConvertError


@dataclass(frozen=True)
class FeatureInfo:
    """One feature map of a backbone: its channels, and how many input pixels (one axis) a position covers."""

    channels: int
    stride: int


class DenseHead(nn.Module):
    """Feature maps (fine to coarse) -> one map at the finest stride.

    Every map goes through a 1x1 convolution to `width` channels; from coarse to fine they are resized and added; a 3x3
    convolution with norm and ReLU smooths, a 1x1 convolution answers. One map alone: 3x3 and 1x1 only.
    Input: list of [N,C_i,H_i,W_i]. Output: [N,outputs,H_0,W_0].

    >>> head = DenseHead([FeatureInfo(4, 4), FeatureInfo(8, 8)], outputs=3, width=8)
    >>> head([torch.zeros(1, 4, 6, 8), torch.zeros(1, 8, 3, 4)]).shape
    torch.Size([1, 3, 6, 8])
    """

    def __init__(self, features: Sequence[FeatureInfo], outputs: int, width: int = 32) -> None:
        super().__init__()
        _check(features)
        several = len(features) > 1
        self.lateral = nn.ModuleList(nn.Conv2d(f.channels, width, 1) for f in features) if several else None
        self.smooth = nn.Conv2d(width if several else features[0].channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.out = nn.Conv2d(width, outputs, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = features[-1]
        if self.lateral is not None:
            x = self.lateral[-1](x)
            for lateral, feature in zip(list(self.lateral)[-2::-1], features[-2::-1], strict=True):
                skip = lateral(feature)
                # Nearest keeps INT8 values as they are; the 3x3 convolution smooths the steps.
                x = F.interpolate(x, size=skip.shape[-2:], mode="nearest") + skip
        return self.out(F.relu(self.norm(self.smooth(x))))


class VectorHead(nn.Module):
    """Global average of the coarsest map, then a 1x1 convolution. Input: list of [N,C_i,H_i,W_i]. Output: [N,outputs].

    >>> VectorHead([FeatureInfo(8, 32)], outputs=5)([torch.zeros(2, 8, 3, 4)]).shape
    torch.Size([2, 5])
    """

    def __init__(self, features: Sequence[FeatureInfo], outputs: int) -> None:
        super().__init__()
        _check(features)
        self.out = nn.Conv2d(features[-1].channels, outputs, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        return torch.flatten(self.out(F.adaptive_avg_pool2d(features[-1], 1)), 1)


def _check(features: Sequence[FeatureInfo]) -> None:
    if not features:
        raise ConvertError(
            "the backbone gives no feature map", "a head needs at least one", "return one tensor or a list of tensors"
        )
    strides = [f.stride for f in features]
    if strides != sorted(strides):
        raise ConvertError(
            "feature maps are not ordered fine to coarse", f"strides {strides}", "return the finest feature map first"
        )
