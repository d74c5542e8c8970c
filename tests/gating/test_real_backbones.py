"""Every backbone that ships, gated: ties, frozen execution and the two extremes of the gates."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch_nets import all_masks, plain_state, random_masks, scatter, tasks

from igate_edge import backbones
from igate_edge.gating.convert import InterroGateNet, PlainNet, interrogate

SMALL: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: backbones.resnet18(width=4),
    "resnet50": lambda: backbones.resnet50(width=4),
    "mobilenet_v2": lambda: backbones.mobilenet_v2(width=0.25),
    "efficientnet_lite0": backbones.efficientnet_lite0,
    "densenet_tiny": lambda: backbones.densenet_tiny(growth=4),
    "pyramid_net": lambda: backbones.pyramid_net(width=4),
}
EXAMPLE = torch.zeros(1, 3, 32, 32)
IMAGE = torch.randn(2, 3, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(7))
#: Sites (and groups of tied sites with tie="stage"); resnet: stem, then one per 3x3 or 1x1 and one per add.
COUNTS = {
    "resnet18": (1 + 8 + 8, 8 + 4),  # the stem joins stage 1's adds
    "resnet50": (1 + 16 * 2 + 16, 1 + 16 * 2 + 4),  # its shortcut is a convolution: the stem stays alone
    "densenet_tiny": (1 + 3 * 3 + 2, 1 + 3 * 3 + 2),
}


def small(name: str) -> InterroGateNet:
    torch.manual_seed(0)
    net = interrogate(SMALL[name](), tasks(2), tie="stage", example=EXAMPLE)
    scatter(net)
    return net.double().eval()


@pytest.mark.parametrize("name", SMALL)
def test_frozen_equals_dense_and_the_extremes_are_plain_and_single_nets(name: str) -> None:
    net = small(name)
    net.set_gates(random_masks(net, 0.3))
    frozen = copy.deepcopy(net)
    frozen.freeze_gates()
    for key, value in net(IMAGE).items():
        torch.testing.assert_close(frozen(IMAGE)[key], value)
    net.set_gates(all_masks(net, False))
    plain = PlainNet(SMALL[name](), tasks(2), EXAMPLE).double().eval()
    plain.load_state_dict(plain_state(net))
    closed, expected = net(IMAGE), plain(IMAGE)
    assert all(torch.equal(closed[key], expected[key]) for key in expected)
    net.set_gates(all_masks(net, True))
    opened = net(IMAGE)
    for task in net.task_names:
        plain.backbone.load_state_dict(net.branches[task].state_dict())
        assert torch.equal(opened[task], plain(IMAGE)[task])


@pytest.mark.parametrize("name", COUNTS)
def test_sites_and_ties(name: str) -> None:
    net = small(name)
    assert (len(net.sites), len({id(site.gates) for site in net.gate_sites()})) == COUNTS[name]


@pytest.mark.parametrize("name", SMALL)
def test_every_convolution_is_gated_by_exactly_one_site(name: str) -> None:
    """The MACs of all rows of all sites are the MACs of the backbone."""
    module = SMALL[name]()
    net = interrogate(module, tasks(2), example=EXAMPLE)
    total = 0

    def count(conv: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        total += conv.weight[0].numel() * output[0].numel()  # type: ignore[index, operator, union-attr]

    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(count)
    module.eval()(EXAMPLE)
    assert sum(net.site_costs()[site.name] * site.channels for site in net.gate_sites()) == total
