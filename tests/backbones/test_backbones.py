"""What holds for every backbone: strides, channels, tracing, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from igate_edge.backbones import BACKBONES

SMALL = {
    "resnet18": {"width": 4},
    "resnet34": {"width": 4},
    "resnet50": {"width": 4},
    "efficientnet_lite0": {},
    "mobilenet_v2": {"width": 0.25},
    "densenet_tiny": {"growth": 4},
    "pyramid_net": {"width": 4},
}
#: name -> (channels, strides) of the maps that SMALL gives.
MAPS = {
    "resnet18": ([4, 8, 16, 32], [4, 8, 16, 32]),
    "resnet34": ([4, 8, 16, 32], [4, 8, 16, 32]),
    "resnet50": ([16, 32, 64, 128], [4, 8, 16, 32]),
    "efficientnet_lite0": ([24, 40, 112, 320], [4, 8, 16, 32]),
    "mobilenet_v2": ([8, 8, 24, 80], [4, 8, 16, 32]),
    "densenet_tiny": ([8 + 3 * 4, 20 // 2 + 3 * 4, 22 // 2 + 3 * 4], [4, 8, 16]),
    "pyramid_net": ([8, 8], [4, 8]),
}


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return BACKBONES[name](**SMALL[name])


def test_every_backbone_is_covered():
    assert set(SMALL) == set(MAPS) == set(BACKBONES)


@pytest.mark.parametrize("name", BACKBONES)
def test_channels_and_strides(name):
    channels, strides = MAPS[name]
    maps = make(name).eval()(torch.zeros(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, c, 64 // s, 96 // s) for c, s in zip(channels, strides, strict=True)]


@pytest.mark.parametrize("name", BACKBONES)
def test_fx_traces_to_the_same_function(name):
    net = make(name).eval()
    image = torch.randn(1, 3, 64, 64)
    wanted, got = net(image), fx.symbolic_trace(net)(image)
    assert all(torch.equal(w, g) for w, g in zip(wanted, got, strict=True))


@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_learns(name):
    net = make(name).train()
    sum(m.square().mean() for m in net(torch.randn(2, 3, 64, 64))).backward()
    idle = [key for key, p in net.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not idle
    assert all(p.grad.abs().sum() > 0 for key, p in net.named_parameters() if key.endswith("0.weight"))
