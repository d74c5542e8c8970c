from __future__ import annotations

import pytest
import torch
from torch import nn

from igate_edge.backbones import resnet18, resnet34, resnet50


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def basic_stage(inputs: int, width: int, blocks: int) -> int:
    """Parameters of one stage of basic blocks: 3x3 convolutions, 2 norm parameters a channel, and a 1x1 skip."""
    first = 9 * inputs * width + 9 * width * width + 4 * width
    skip = 0 if inputs == width else inputs * width + 2 * width
    return first + skip + (blocks - 1) * (18 * width * width + 4 * width)


@pytest.mark.parametrize(("make", "depths"), [(resnet18, (2, 2, 2, 2)), (resnet34, (3, 4, 6, 3))])
@pytest.mark.parametrize("width", [4, 24])
def test_parameters_of_basic_layouts(make, depths, width):
    stem = 3 * 3 * 3 * width + 2 * width
    stages = [basic_stage(max(width, (width << i) // 2), width << i, blocks) for i, blocks in enumerate(depths)]
    assert parameters(make(width=width)) == stem + sum(stages)


@pytest.mark.parametrize(
    ("make", "convolutions"),
    [(resnet18, 1 + 2 * 8 + 3), (resnet34, 1 + 2 * 16 + 3), (resnet50, 1 + 3 * 16 + 4)],
)
def test_number_of_convolutions(make, convolutions):
    net = make(width=4)
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) == convolutions


def test_stride_of_a_bottleneck_is_in_its_3x3_convolution():
    block = resnet50(width=4).layer2[0]
    assert [conv.stride for conv in (block.conv1, block.conv2, block.conv3)] == [(1, 1), (2, 2), (1, 1)]


def test_skip_carries_the_input():
    """With the second norm's weight at zero a block is relu(input): the residual branch adds nothing."""
    block = resnet18(width=4).layer1[0].eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x), x.relu())
